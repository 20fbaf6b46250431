package class

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/policy/rule"
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
	long := "path == '" + strings.Repeat("x", rule.MaxExpr) + "'"
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
		var faults rule.Faults
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
	var faults rule.Faults
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
		r := Rule{"regex", fmt.Sprintf("path.matches(%q)", pattern), policy.R1}
		return mustNew(t, Config{Rules: []Rule{r}, Default: Route{Class: policy.W1}})
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
		{"a usual pattern, a long path", regex("^/a+$"), path(rule.MaxValue), ""},
		{"a short pattern that is large inside", regex("(a{9}){20}$"), path(rule.MaxValue), "cost limit exceeded"},
		{"the same, a short path", regex("(a{9}){20}$"), path(80), ""},
		{"a path longer than rules look at", regex("^/a+$"), path(rule.MaxValue + 1), "more than 8192 bytes"},
		{"a prefix of it is fine", prefix, path(60 << 10), ""},
		{"1000 rules", many, path(100), ""},
		{"1000 rules, a long path", many, path(rule.MaxValue), rule.ErrTotalCost.Error()},
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
	for _, name := range []string{"protocol == ''", "class == ''", "heat_known", "time == time"} {
		if _, err := New(Config{Rules: []Rule{{"r", name, policy.R1}}}); err == nil {
			t.Errorf("%s: a class is asked for before there is one", name)
		}
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
	r := Rule{"r", `path.matches("^/[0-9]*$") && !(method in ["PUT"])`, policy.R1}
	c := mustNew(t, Config{Rules: []Rule{r}, Default: Route{ClassifyBody: true}})
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
			if bench.name == "worst" { // a pattern near MaxRegex, a path of rule.MaxValue
				req.Path = strings.Repeat("a", rule.MaxValue)
			}
			b.ReportAllocs()
			for b.Loop() {
				c.Classify(&req)
			}
		})
	}
}
