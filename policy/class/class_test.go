package class

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"

	"github.com/knhk/sidecar/policy"
)

func mustNew(t testing.TB, cfg Config) *Classifier {
	t.Helper()
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

var sample = policy.Request{
	Method: "POST", Scheme: "https", Authority: "shop.example.com", Path: "/orders/42?x=1", Route: "orders", Cluster: "backend",
	SPIFFEID: "spiffe://example.org/web",
}

func TestClassify(t *testing.T) {
	rules := []Rule{
		{"get", `method == "GET"`, policy.R1},
		{"pattern", `path.matches("^/orders/[0-9]+$") && method in ["PUT", "PATCH"]`, policy.R1},
		{"identity", `spiffe_id == "spiffe://example.org/batch"`, policy.W1},
		{"fails", `path.startsWith("/fail") && 1 / (size(path) - size(path)) == 0`, policy.R1},
		{"late", `method == "GET"`, policy.W1},
	}
	cfg := Config{
		Rules: rules,
		Routes: map[string]Route{
			"hot":     {Class: policy.R1},
			"delta":   {Class: policy.R1, ClassifyBody: true},
			"unknown": {},
		},
		Default: Route{Class: policy.W1},
	}
	hot := []byte(`{"additions":[["s","p","o"]]}`)
	for _, c := range []struct {
		name string
		req  policy.Request
		want Result
	}{
		{"the first rule that matches decides", policy.Request{Method: "GET"}, Result{Class: policy.R1, Rule: "get"}},
		{"a rule comes before the route", policy.Request{Method: "GET", Route: "unknown"}, Result{Class: policy.R1, Rule: "get"}},
		{"a rule comes before the body", policy.Request{Method: "GET", Route: "delta"}, Result{Class: policy.R1, Rule: "get"}},
		{"a rule that CEL judges", policy.Request{Method: "PUT", Path: "/orders/7"}, Result{Class: policy.R1, Rule: "pattern"}},
		{"the same, false", policy.Request{Method: "PUT", Path: "/orders/x"}, Result{Class: policy.W1, Rule: RouteDefault}},
		{"by identity", policy.Request{SPIFFEID: "spiffe://example.org/batch"}, Result{Class: policy.W1, Rule: "identity"}},
		{"a rule that fails refuses", policy.Request{Path: "/fail", Route: "hot"}, Result{Rule: "fails", Err: policy.ReasonClassRule}},
		{"by the route", policy.Request{Method: "POST", Route: "hot"}, Result{Class: policy.R1, Rule: "route:hot"}},
		{"a route that is not listed", policy.Request{Method: "POST", Route: "cold"}, Result{Class: policy.W1, Rule: "route:*"}},
		{"no route matched", policy.Request{}, Result{Class: policy.W1, Rule: "route:*"}},
		{"nothing gives a class", policy.Request{Route: "unknown"}, Result{Rule: "route:unknown", Err: policy.ReasonUnknownClass}},
		{"by the body", policy.Request{Route: "delta", HasBody: true, Body: hot}, Result{Class: policy.R1, Rule: DeltaHot}},
		{"an empty body", policy.Request{Route: "delta", HasBody: true}, Result{Class: policy.W1, Rule: DeltaMalformed}},
		{"a body beyond the limit", policy.Request{Route: "delta", BodyLarge: true}, Result{Class: policy.W1, Rule: DeltaLarge}},
		{"no body", policy.Request{Route: "delta"}, Result{Class: policy.W1, Rule: DeltaMalformed}},
		{"Envoy does not send the body", policy.Request{Route: "delta", BodyMissing: true}, Result{Rule: "route:delta", Err: policy.ReasonBodyMode}},
		{"a body nobody asked for", policy.Request{Route: "hot", HasBody: true, Body: hot}, Result{Class: policy.R1, Rule: "route:hot"}},
	} {
		got := mustNew(t, cfg).Classify(&c.req)
		if (got.Detail != "") != (got.Err == policy.ReasonClassRule) {
			t.Errorf("%s: detail %q with reason %q", c.name, got.Detail, got.Err)
		}
		got.Detail = ""
		if got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
	c := mustNew(t, cfg)
	if !c.NeedsBody("delta") || c.NeedsBody("hot") || c.NeedsBody("nowhere") {
		t.Error("NeedsBody is wrong")
	}
	if c := mustNew(t, Config{Default: Route{ClassifyBody: true}}); !c.NeedsBody("nowhere") || !c.NeedsBody("") {
		t.Error("NeedsBody is wrong about the default route")
	}
}

func TestNewRefuses(t *testing.T) {
	long := "path == '" + strings.Repeat("x", MaxExpr) + "'"
	for _, c := range []struct {
		name, expr string
		line, col  int
		want       string
	}{
		{"nothing", "", 1, 1, "Syntax error"},
		{"not CEL", "path = 'a'", 1, 6, "Syntax error"},
		{"a name that is none", "method == 'GET' &&\n  pth == ''", 2, 3, "undeclared reference to 'pth'"},
		{"wide characters before the fault", "path == 'äö😀' && pth", 1, 18, "undeclared"},
		{"not a bool", "path", 1, 1, "want bool"},
		{"any type is not bool", "dyn(true)", 1, 1, "want bool"},
		{"types that do not meet", "path == 1", 1, 6, "no matching overload"},
		{"a pattern from the request", "path.matches(authority)", 1, 14, "string literal"},
		{"the same as a function, nested", "true || [path].exists(p, matches(p, p))", 1, 37, "string literal"},
		{"a broken pattern", "path.matches('(')", 1, 14, "missing closing )"},
		{"a pattern that explodes", "path.matches('(abc){200}')", 1, 14, "instructions"},
		{"too long", long, 0, 0, "longer than"},
		{"not UTF-8", "path == '\xff'", 0, 0, "not UTF-8"},
		{"deep", strings.Repeat("(", 1000) + "true" + strings.Repeat(")", 1000), 1, 0, ""},
	} {
		_, err := New(Config{Rules: []Rule{{"ok", "true", policy.R1}, {"bad", c.expr, policy.R1}}})
		var faults RuleErrors
		if !errors.As(err, &faults) || faults[0].Index != 1 || faults[0].Name != "bad" {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		f := faults[0]
		if f.Line != c.line || c.col != 0 && f.Column != c.col || !strings.Contains(strings.ToLower(f.Msg), strings.ToLower(c.want)) {
			t.Errorf("%s: %v, want %d:%d %s", c.name, f, c.line, c.col, c.want)
		}
	}
	_, err := New(Config{Rules: []Rule{{"", "true", 0}, {"a", "pth", 9}, {"a:b", "true", 1}, {"a", "true", 1}}})
	var faults RuleErrors
	if !errors.As(err, &faults) || len(faults) != 6 || strings.Count(err.Error(), "\n") != 5 {
		t.Errorf("want two faults in the first rule, two in the second, one in each other:\n%v", err)
	}
	if _, err := New(Config{Default: Route{Class: 9}}); err == nil {
		t.Error("a default of no class is accepted")
	}
	if _, err := New(Config{Routes: map[string]Route{"a": {Class: 9}}}); err == nil {
		t.Error("a route of no class is accepted")
	}
}

// TestCost: what a client sends decides how much a rule costs; beyond the bounds it is refused, never passed over.
func TestCost(t *testing.T) {
	path := func(n int) *policy.Request { return &policy.Request{Path: "/" + strings.Repeat("a", n-1)} }
	regex := func(pattern string) *Classifier {
		rule := Rule{"regex", fmt.Sprintf("path.matches(%q)", pattern), policy.R1}
		return mustNew(t, Config{Rules: []Rule{rule}, Default: Route{Class: policy.W1}})
	}
	var rules []Rule
	for i := range 1000 {
		rules = append(rules, Rule{fmt.Sprint("r", i), fmt.Sprintf(`path.contains("%d") || path.endsWith("%d")`, i, i), policy.R1})
	}
	many := mustNew(t, Config{Rules: rules, Default: Route{Class: policy.W1}})
	prefix := mustNew(t, Config{Rules: []Rule{{"prefix", `path.startsWith("/a")`, policy.R1}}})
	for _, c := range []struct {
		name   string
		on     *Classifier
		req    *policy.Request
		detail string // part of it; empty: the rules are judged
	}{
		{"a usual pattern, a long path", regex("^/a+$"), path(MaxValue), ""},
		{"a short pattern that is large inside", regex("(a{9}){20}$"), path(MaxValue), "cost limit exceeded"},
		{"the same, a short path", regex("(a{9}){20}$"), path(80), ""},
		{"a path longer than rules look at", regex("^/a+$"), path(MaxValue + 1), "more than 8192 bytes"},
		{"a prefix of it is fine", prefix, path(60 << 10), ""},
		{"1000 rules", many, path(100), ""},
		{"1000 rules, a long path", many, path(MaxValue), errTotalCost.Error()},
	} {
		r := c.on.Classify(c.req)
		if (r.Err == policy.ReasonClassRule) != (c.detail != "") || !strings.Contains(r.Detail, c.detail) || (r.Err == "") != (r.Class != 0) {
			t.Errorf("%s: %+v", c.name, r)
		}
	}
	nested := `[1,2,3,4,5,6,7,8].all(a, [1,2,3,4,5,6,7,8].all(b, [1,2,3,4,5,6,7,8].all(c, [1,2,3,4,5,6,7,8].all(d, a+b+c+d > 0))))`
	c := mustNew(t, Config{Rules: []Rule{{"nested", nested, policy.R1}}})
	if r := c.Classify(path(1)); r.Err != policy.ReasonClassRule {
		t.Errorf("nested loops: %+v", r)
	}
}

// TestGuards compares rules as they run, guards first, with what CEL says of them alone.
func TestGuards(t *testing.T) {
	env, err := newEnv()
	if err != nil {
		t.Fatal(err)
	}
	requests := []policy.Request{
		{}, sample,
		{Method: "GET", Path: "/static/app.js", Scheme: "http", Route: "static"},
		{Method: "GET", Path: "/", Authority: "GET", Cluster: "GET"},
		{Method: "get", Path: "/static", SPIFFEID: "spiffe://example.org/web"},
	}
	for _, c := range []struct {
		expr   string
		guards int
		whole  bool // no CEL needed at run time
	}{
		{`method == "GET"`, 1, true},
		{`"GET" == method`, 1, true},
		{`method == "GET" && path.startsWith("/static/") && path.endsWith(".js")`, 3, true},
		{`(method == "GET" && scheme == "http") && (path.startsWith("/") && route == "static")`, 4, true},
		{`method == "GET" && size(path) > 1`, 1, false},
		{`size(path) > 1 && method == "GET" && (scheme == "http" || cluster == "GET")`, 1, false},
		{`1/size(path) == 0 && method == "GET"`, 1, false}, // an error && false is false
		{`method != "GET"`, 0, false},
		{`!(method == "GET")`, 0, false},
		{`method == "GET" || path == "/"`, 0, false},
		{`method == authority`, 0, false},
		{`path.startsWith(authority)`, 0, false},
		{`"/static/app.js".startsWith(path)`, 0, false},
		{`["GET"].exists(method, method == "GET")`, 0, false}, // another method than the request's
		{`method == "GET" ? path == "/" : scheme == "https"`, 0, false},
		{`path.endsWith("")`, 1, true},
		{`true`, 0, false},
		{`spiffe_id == "spiffe://example.org/web" && method == "POST"`, 2, true},
	} {
		r, bad := compileRule(env, Rule{"r", c.expr, policy.R1})
		if bad != nil {
			t.Errorf("%s: %v", c.expr, bad)
			continue
		}
		if len(r.guards) != c.guards || (r.prog == nil) != c.whole {
			t.Errorf("%s: guards %+v, program %v", c.expr, r.guards, r.prog != nil)
		}
		classifier := mustNew(t, Config{Rules: []Rule{{"r", c.expr, policy.R1}}, Default: Route{Class: policy.W1}})
		for i := range requests {
			yes, err := byCEL(t, env, c.expr, &requests[i])
			got := classifier.Classify(&requests[i])
			if (got.Err != "") != (err != nil) || err == nil && (got.Class == policy.R1) != yes {
				t.Errorf("%s for %+v: %+v, CEL says %v, %v", c.expr, requests[i], got, yes, err)
			}
		}
	}
}

// byCEL judges without guards, cost and activation of ours.
func byCEL(t *testing.T, env *cel.Env, expr string, req *policy.Request) (bool, error) {
	t.Helper()
	checked, issues := env.Compile(expr)
	if issues.Err() != nil {
		t.Fatal(issues.Err())
	}
	prog, err := env.Program(checked)
	if err != nil {
		t.Fatal(err)
	}
	val, _, err := prog.Eval(map[string]any{
		"method": req.Method, "scheme": req.Scheme, "authority": req.Authority, "path": req.Path, "route": req.Route,
		"cluster": req.Cluster, "spiffe_id": req.SPIFFEID,
	})
	if err != nil {
		return false, err
	}
	return bool(val.(types.Bool)), nil
}

// TestVariables: each name gives its own field.
func TestVariables(t *testing.T) {
	for name, want := range map[string]string{
		"method": sample.Method, "scheme": sample.Scheme, "authority": sample.Authority, "path": sample.Path, "route": sample.Route,
		"cluster": sample.Cluster, "spiffe_id": sample.SPIFFEID,
	} {
		for _, form := range []string{"%s == %q", "%s in [%q]"} { // by guard, by CEL
			c := mustNew(t, Config{Rules: []Rule{{"r", fmt.Sprintf(form, name, want), policy.R1}}, Default: Route{Class: policy.W1}})
			if r := c.Classify(&sample); r.Class != policy.R1 {
				t.Errorf("%s: %+v", fmt.Sprintf(form, name, want), r)
			}
		}
	}
	if len(variables) != 7 {
		t.Error("a variable is not tested")
	}
}

func TestClassifyDoesNotAllocate(t *testing.T) {
	for name, cfg := range map[string]Config{
		"no rules":    {Routes: map[string]Route{"orders": {Class: policy.R1}}},
		"guards only": {Rules: []Rule{{"a", `method == "GET"`, policy.R1}, {"b", `path.startsWith("/orders/")`, policy.R1}}},
	} {
		c, req := mustNew(t, cfg), sample
		if r := c.Classify(&req); r.Class != policy.R1 {
			t.Errorf("%s: %+v", name, r)
		}
		if n := testing.AllocsPerRun(1000, func() { c.Classify(&req) }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// TestConcurrent shares one Classifier and its pools; the race detector judges.
func TestConcurrent(t *testing.T) {
	rule := Rule{"r", `path.matches("^/[0-9]*$") && !(method in ["PUT"])`, policy.R1}
	c := mustNew(t, Config{Rules: []Rule{rule}, Default: Route{ClassifyBody: true}})
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 500 {
				req := policy.Request{Method: "GET", Path: fmt.Sprintf("/%d", i*g)}
				want := Result{Class: policy.R1, Rule: "r"}
				if i%2 == 0 {
					req = policy.Request{Path: "/x", HasBody: true, Body: []byte(`{"removals":[["s","p","o"]]}`)}
					want = Result{Class: policy.R1, Rule: DeltaHot}
				}
				if got := c.Classify(&req); got != want {
					t.Errorf("%+v: %+v", req, got)
				}
			}
		})
	}
	wg.Wait()
}

// FuzzRules compiles any expression and judges a request with it: nothing panics, and guards agree with CEL.
func FuzzRules(f *testing.F) {
	for _, s := range []string{
		`method == "GET" && path.matches("^/a+$")`, `[1, 2].map(x, x * 2).size() == 2`,
		`path.startsWith("/") || 1 / 0 == 1`,
		`has({"a": 1}.a)`, `timestamp("2020-01-01T00:00:00Z").getFullYear() == 2020`, `path[0] == "/"`, "method == 'GET' && 1/0 > 0",
	} {
		f.Add(s, "GET", "/aaa")
	}
	env, err := newEnv()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, expr, method, path string) {
		c, err := New(Config{Rules: []Rule{{"r", expr, policy.R1}}, Default: Route{Class: policy.W1}})
		if err != nil {
			var faults RuleErrors
			if !errors.As(err, &faults) || len(faults) == 0 {
				t.Errorf("error of type %T: %v", err, err)
			}
			return
		}
		req := policy.Request{Method: method, Path: path}
		got := c.Classify(&req)
		if strings.Contains(got.Detail, "cost") || len(method) > MaxValue || len(path) > MaxValue {
			return
		}
		yes, err := byCEL(t, env, expr, &req)
		if (got.Err != "") != (err != nil) || err == nil && (got.Class == policy.R1) != yes {
			t.Errorf("%s: %+v, CEL says %v, %v", expr, got, yes, err)
		}
	})
}

func BenchmarkClassify(b *testing.B) {
	guarded := func(n int) (rules []Rule) {
		for i := range n {
			rules = append(rules, Rule{fmt.Sprint("r", i), fmt.Sprintf(`method == "POST" && path.startsWith("/svc%d/")`, i), policy.R1})
		}
		return rules
	}
	for _, bench := range []struct {
		name string
		cfg  Config
	}{
		{"rules=0", Config{Routes: map[string]Route{"orders": {Class: policy.R1}}}},
		{"guarded=1", Config{Rules: guarded(1), Default: Route{Class: policy.W1}}},
		{"guarded=1000", Config{Rules: guarded(1000), Default: Route{Class: policy.W1}}},
		{"cel=1", Config{Rules: []Rule{{"r", `method in ["PUT", "PATCH"]`, policy.R1}}, Default: Route{Class: policy.W1}}},
		{"worst", Config{Rules: []Rule{{"r", `path.matches("(.{0,40}.{0,40}a?){1}(b|c)$") || true`, policy.R1}}}},
		{"regex=1", Config{Rules: []Rule{{"r", `path.matches("^/orders/[0-9]+$")`, policy.R1}}, Default: Route{Class: policy.W1}}},
	} {
		b.Run(bench.name, func(b *testing.B) {
			c, req := mustNew(b, bench.cfg), sample
			if bench.name == "worst" { // a pattern near MaxRegex, a path of MaxValue
				req.Path = strings.Repeat("a", MaxValue)
			}
			b.ReportAllocs()
			for b.Loop() {
				c.Classify(&req)
			}
		})
	}
}
