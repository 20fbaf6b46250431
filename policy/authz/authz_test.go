package authz

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/policy/rule"
)

func mustNew(t testing.TB, rules ...Rule) *Authorizer {
	t.Helper()
	a, err := New(rules)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func input(req policy.Request) rule.Input {
	return rule.Input{Request: &req, Class: policy.W1, Time: time.Date(2026, 2, 3, 12, 0, 0, 0, time.UTC)}
}

func TestDecide(t *testing.T) {
	a := mustNew(t,
		Rule{Name: "no-admin", Hosts: []string{"admin.example.com"}, Effect: Forbid},
		Rule{Name: "no-delete", Methods: []string{"DELETE"}, Effect: Forbid},
		Rule{Name: "web", Hosts: []string{"*.example.com"}, Methods: []string{"GET", "HEAD"}, Effect: Permit},
		Rule{Name: "batch", Routes: []string{"jobs"}, When: `spiffe_id == "spiffe://example.org/batch" && class == "W1"`, Effect: Permit},
		Rule{Name: "day", Routes: []string{"day"}, When: `time.getHours("UTC") < 12`, Effect: Permit},
		Rule{Name: "hot", Routes: []string{"hot"}, When: `heat > 0.5`, Effect: Permit},
		Rule{Name: "broken", Routes: []string{"broken"}, When: `int(path) > 0`, Effect: Permit},
		Rule{Name: "dear", Routes: []string{"dear"}, When: `[1,2,3,4,5,6,7,8].all(a, [1,2,3,4,5,6,7,8].all(b, [1,2,3,4,5,6,7,8].all(c, [1,2,3,4,5,6,7,8].all(d, a+b+c+d > 0))))`, Effect: Permit},
		Rule{Name: "database", When: `protocol == "tcp" && authority == "192.0.2.1:5432"`, Effect: Permit},
		Rule{Name: "late", Hosts: []string{"www.example.com"}, Effect: Forbid},
	)
	for _, c := range []struct {
		name string
		req  policy.Request
		want Result
	}{
		{"permitted", policy.Request{Method: "GET", Authority: "www.example.com"}, Result{Rule: "web"}},
		{"the first that matches decides", policy.Request{Method: "GET", Authority: "admin.example.com"}, Result{Rule: "no-admin", Err: policy.ReasonAuthzForbid}},
		{"a forbidden host, spelt otherwise", policy.Request{Method: "GET", Authority: "ADMIN.example.com.:443"}, Result{Rule: "no-admin", Err: policy.ReasonAuthzForbid}},
		{"a forbidden method, spelt otherwise", policy.Request{Method: "delete", Authority: "www.example.com"}, Result{Rule: "no-delete", Err: policy.ReasonAuthzForbid}},
		{"a permitted method, spelt otherwise", policy.Request{Method: "get", Authority: "www.example.com"}, Result{Rule: "late", Err: policy.ReasonAuthzForbid}},
		{"deep below", policy.Request{Method: "HEAD", Authority: "a.b.c.example.com"}, Result{Rule: "web"}},
		{"not the suffix itself", policy.Request{Method: "GET", Authority: "example.com"}, Result{Err: policy.ReasonAuthzNone}},
		{"not another name that ends like it", policy.Request{Method: "GET", Authority: "notexample.com"}, Result{Err: policy.ReasonAuthzNone}},
		{"user information", policy.Request{Method: "GET", Authority: "x@www.example.com"}, Result{Err: policy.ReasonAuthzNone}},
		{"percent-encoded", policy.Request{Method: "GET", Authority: "admin%2eexample.com"}, Result{Err: policy.ReasonAuthzNone}},
		{"no host", policy.Request{Method: "GET", Route: "jobs", SPIFFEID: "spiffe://example.org/batch"}, Result{Err: policy.ReasonAuthzNone}},
		{"by route and identity", policy.Request{Route: "jobs", Authority: "x", SPIFFEID: "spiffe://example.org/batch"}, Result{Rule: "batch"}},
		{"another identity", policy.Request{Route: "jobs", Authority: "x", SPIFFEID: "spiffe://example.org/web"}, Result{Err: policy.ReasonAuthzNone}},
		{"too late in the day", policy.Request{Route: "day", Authority: "x"}, Result{Err: policy.ReasonAuthzNone}},
		{"heat is not known", policy.Request{Route: "hot", Authority: "x"}, Result{Rule: "hot", Err: policy.ReasonAuthzError}},
		{"a rule that fails", policy.Request{Route: "broken", Authority: "x", Path: "/"}, Result{Rule: "broken", Err: policy.ReasonAuthzError}},
		{"a rule that costs too much", policy.Request{Route: "dear", Authority: "x"}, Result{Rule: "dear", Err: policy.ReasonAuthzError}},
		{"a value that is too long", policy.Request{Route: "broken", Authority: "x", Path: strings.Repeat("1", rule.MaxValue+1)}, Result{Rule: "broken", Err: policy.ReasonAuthzError}},
		{"a connection", policy.Request{TCP: true, Authority: "192.0.2.1:5432"}, Result{Rule: "database"}},
		{"a request like it", policy.Request{Authority: "192.0.2.1:5432"}, Result{Err: policy.ReasonAuthzNone}},
	} {
		got := a.Decide(input(c.req))
		if got.Err == policy.ReasonAuthzError && got.Detail == "" {
			t.Errorf("%s: no detail", c.name)
		}
		got.Detail = ""
		if got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
	in := input(policy.Request{Route: "hot", Authority: "x"})
	in.Heat, in.HeatKnown = 0.6, true
	if got := a.Decide(in); got != (Result{Rule: "hot"}) || !a.ReadsHeat() {
		t.Errorf("a known heat: %+v", got)
	}
	none := mustNew(t)
	if got := none.Decide(input(policy.Request{})); got != (Result{}) || !none.Empty() || none.ReadsHeat() {
		t.Errorf("without rules: %+v", got)
	}
	any := mustNew(t, Rule{Name: "all", Effect: Permit})
	if got := any.Decide(input(policy.Request{Authority: "x@y"})); got.Rule != "all" || got.Err != "" {
		t.Errorf("rules that name no host do not ask for one: %+v", got)
	}
	total := make([]Rule, 1000)
	for i := range total {
		total[i] = Rule{Name: fmt.Sprint("r", i), When: fmt.Sprintf(`path.contains("%d") && size(path) < 0`, i), Effect: Forbid}
	}
	got := mustNew(t, total...).Decide(input(policy.Request{Path: strings.Repeat("0123456789", 800)}))
	if got.Err != policy.ReasonAuthzError || got.Detail != rule.ErrTotalCost.Error() || got.Rule == "" {
		t.Errorf("all rules together: %+v", got)
	}
}

func TestNewRefuses(t *testing.T) {
	for _, c := range []struct {
		rule  Rule
		field string
		want  string
	}{
		{Rule{}, "name", "empty"},
		{Rule{Name: "ok"}, "name", "taken"},
		{Rule{Name: "a", Effect: 7}, "effect", "none"},
		{Rule{Name: "a", Hosts: []string{"a", "b c"}}, "hosts[1]", "want a host"},
		{Rule{Name: "a", Hosts: []string{""}}, "hosts[0]", "want a host"},
		{Rule{Name: "a", Hosts: []string{"*"}}, "hosts[0]", "leave hosts out"},
		{Rule{Name: "a", Hosts: []string{"*.*.example.com"}}, "hosts[0]", "want a host"},
		{Rule{Name: "a", Hosts: []string{"*example.com"}}, "hosts[0]", "want a host"},
		{Rule{Name: "a", Hosts: []string{"example.com:443"}}, "hosts[0]", "port"},
		{Rule{Name: "a", Hosts: []string{"[::1]:443"}}, "hosts[0]", "port"},
		{Rule{Name: "a", Hosts: []string{"*.10.0.0.1"}}, "hosts[0]", "below"},
		{Rule{Name: "a", Hosts: []string{"*.::1"}}, "hosts[0]", "below"},
		{Rule{Name: "a", Hosts: []string{"127.1"}}, "hosts[0]", "want a host"},
		{Rule{Name: "a", Hosts: []string{"bücher.example"}}, "hosts[0]", "xn--"},
		{Rule{Name: "a", Routes: []string{""}}, "routes[0]", "empty"},
		{Rule{Name: "a", Methods: []string{"GET", "get"}}, "methods[1]", "want GET"},
		{Rule{Name: "a", Methods: []string{"G T"}}, "methods[0]", "no method"},
		{Rule{Name: "a", Methods: []string{""}}, "methods[0]", "1 to 64"},
		{Rule{Name: "a", When: "pth == ''"}, "", "undeclared"},
		{Rule{Name: "a", When: "path"}, "", "want bool"},
	} {
		_, err := New([]Rule{{Name: "ok", Effect: Permit}, c.rule})
		var faults rule.Faults
		if !errors.As(err, &faults) || len(faults) != 1 || faults[0].Index != 1 || faults[0].Field != c.field || !strings.Contains(faults[0].Msg, c.want) {
			t.Errorf("%+v: %v, want %s %s", c.rule, err, c.field, c.want)
		}
	}
	mustNew(t, Rule{Name: "a", Hosts: []string{"Shop.Example.COM", "*.example.com.", "::1", "[2001:DB8::1]", "10.0.0.1", "a_b"}, Methods: []string{"M-SEARCH"}})
}

func TestHost(t *testing.T) {
	for authority, want := range map[string]string{
		"example.com": "example.com", "EXAMPLE.com:80": "example.com", "example.com.": "example.com", "example.com.:443": "example.com",
		"example.com:": "example.com", "a_b.example": "a_b.example", "xn--bcher-kva.example": "xn--bcher-kva.example", "1.2.3.4:80": "1.2.3.4", "1.2.3.4.": "1.2.3.4",
		"[::1]": "::1", "[0:0::0:1]:80": "::1", "[::ffff:1.2.3.4]": "1.2.3.4", "[2001:DB8::A]": "2001:db8::a", "1.example": "1.example", "0xy.example": "0xy.example",
		strings.Repeat("a", 63) + ".b": strings.Repeat("a", 63) + ".b",
		// No hosts.
		"": "", ":80": "", ".": "", "..": "", "a..b": "", ".a": "", "a..": "", "u@example.com": "", "u:p@example.com": "", "example.com/": "", "example.com#": "",
		"exa%6dple.com": "", "example.com:80:80": "", "example.com:x": "", "a b": "", " a": "", "a,b": "", "a\x00": "", "bücher.example": "", "*.example.com": "",
		"::1": "", "[::1": "", "[::1]x": "", "[::1%25eth0]": "", "[::1%eth0]": "", "[1.2.3.4]": "", "[]": "", "127.1": "", "2130706433": "", "0x7f.1": "", "0x7f000001": "",
		"1.2.3.04": "", "0x": "", "1.2.3.4.5": "", "1.2.3.256": "", "example.0x1": "", strings.Repeat("a", 64): "", strings.Repeat("a.", 130): "",
	} {
		if got, ok := Host(authority); got != want || ok != (want != "") {
			t.Errorf("%q: %q, %v, want %q", authority, got, ok, want)
		}
	}
}

// FuzzHost: a host has one spelling, and the spellings that mean the same give the same.
func FuzzHost(f *testing.F) {
	for _, s := range []string{"example.com", "A.b:80", "[::1]:1", "1.2.3.4", "a@b", "a%2e", "x.", "[::ffff:1.2.3.4]"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, authority string) {
		host, ok := Host(authority)
		if !ok {
			return
		}
		if host == "" || host != strings.ToLower(host) || strings.ContainsAny(host, "@%/ []") || strings.HasSuffix(host, ".") {
			t.Fatalf("%q: %q", authority, host)
		}
		again := host
		if strings.Contains(host, ":") {
			again = "[" + host + "]"
		}
		forms := []string{again, again + ":65535", strings.ToUpper(again), strings.ToUpper(authority)}
		if again == host {
			forms = append(forms, host+".", host+".:80")
		}
		for _, form := range forms {
			if got, ok := Host(form); !ok || got != host {
				t.Errorf("%q is %q, but %q is %q, %v", authority, host, form, got, ok)
			}
		}
		if pattern, below, fault := hostPattern(again); pattern != host || below || fault != "" {
			t.Errorf("a rule cannot name %q: %q, %v, %s", host, pattern, below, fault)
		}
	})
}

// naive decides by looking at every rule, with CEL alone.
func naive(t *testing.T, rules []Rule, in rule.Input) Result {
	t.Helper()
	lists := func(list []string, eq func(string) bool) bool { return len(list) == 0 || slices.ContainsFunc(list, eq) }
	hosts := slices.ContainsFunc(rules, func(r Rule) bool { return len(r.Hosts) > 0 })
	host, ok := Host(in.Request.Authority)
	if len(rules) == 0 {
		return Result{}
	}
	if hosts && !ok {
		return Result{Err: policy.ReasonAuthzNone}
	}
	for _, r := range rules {
		if !lists(r.Routes, func(s string) bool { return s == in.Request.Route }) ||
			!lists(r.Methods, func(s string) bool {
				return s == in.Request.Method || r.Effect == Forbid && strings.EqualFold(s, in.Request.Method)
			}) ||
			!lists(r.Hosts, func(s string) bool {
				s = strings.ToLower(s)
				if rest, below := strings.CutPrefix(s, "*"); below {
					return strings.HasSuffix(host, rest)
				}
				return s == host
			}) {
			continue
		}
		yes, err := true, error(nil)
		if r.When != "" {
			yes, err = celAlone(t, r.When, in)
		}
		switch {
		case err != nil:
			return Result{Rule: r.Name, Err: policy.ReasonAuthzError}
		case yes && r.Effect == Permit:
			return Result{Rule: r.Name}
		case yes:
			return Result{Rule: r.Name, Err: policy.ReasonAuthzForbid}
		}
	}
	return Result{Err: policy.ReasonAuthzNone}
}

var programs = map[string]cel.Program{}

func celAlone(t *testing.T, expr string, in rule.Input) (bool, error) {
	t.Helper()
	prog := programs[expr]
	if prog == nil {
		env, err := cel.NewEnv(cel.Variable("method", cel.StringType), cel.Variable("path", cel.StringType), cel.Variable("authority", cel.StringType),
			cel.Variable("spiffe_id", cel.StringType), cel.Variable("class", cel.StringType), cel.Variable("protocol", cel.StringType),
			cel.Variable("heat", cel.DoubleType), cel.Variable("heat_known", cel.BoolType), cel.Variable("time", cel.TimestampType))
		if err != nil {
			t.Fatal(err)
		}
		checked, issues := env.Compile(expr)
		if issues.Err() != nil {
			t.Fatal(issues.Err())
		}
		if prog, err = env.Program(checked); err != nil {
			t.Fatal(err)
		}
		programs[expr] = prog
	}
	vars := map[string]any{
		"method": in.Request.Method, "path": in.Request.Path, "authority": in.Request.Authority, "spiffe_id": in.Request.SPIFFEID,
		"class": in.Class.String(), "protocol": rule.Protocol(in.Request), "heat_known": in.HeatKnown, "time": in.Time,
	}
	if in.HeatKnown {
		vars["heat"] = in.Heat
	}
	val, _, err := prog.Eval(vars)
	if err != nil {
		return false, err
	}
	return bool(val.(types.Bool)), nil
}

// TestAgainstNaive has sets of random rules decide about random requests, as naive does.
func TestAgainstNaive(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 1))
	pick := func(most int, from ...string) (out []string) {
		for range r.IntN(most + 1) {
			out = append(out, from[r.IntN(len(from))])
		}
		return out
	}
	one := func(from ...string) string { return from[r.IntN(len(from))] }
	reasons := map[policy.Reason]int{}
	for range 30 {
		rules := make([]Rule, r.IntN(150))
		for i := range rules {
			rules[i] = Rule{
				Name: fmt.Sprint("r", i), Effect: Effect(r.IntN(2)),
				Hosts:   pick(2, "a.example", "B.example", "*.example", "*.a.example", "*.b.a.example", "10.0.0.1", "c.example"),
				Routes:  pick(2, "r1", "r2", "r3", "r4"),
				Methods: pick(2, "GET", "PUT", "DELETE", "M-SEARCH"),
				When: one(`path.contains("x")`, `method == "GET" && path.startsWith("/a")`, `spiffe_id.endsWith("/web") && size(path) > 3`, `class == "R1"`,
					`heat_known && heat > 0.5`, `path in ["/a", "/b"]`, `protocol == "tcp" || int(path) > 0`, `time.getHours() == 12 && path == "/xyz"`, `false`, `method != "GET" && false`),
			}
			if r.IntN(20) == 0 {
				rules[i].When = ""
			}
		}
		a := mustNew(t, rules...)
		for range 40 {
			in := input(policy.Request{
				Method: one("GET", "get", "PUT", "put", "DELETE", "M-Search", "", "PATCH"), Route: one("r1", "r2", "r3", "r4", "r5", ""),
				Authority: one("a.example", "A.EXAMPLE:80", "b.example.", "x.b.a.example", "y.x.b.a.example:1", "example", "10.0.0.1:80", "010.0.0.1", "u@a.example", "", "other"),
				Path:      one("/a", "/b", "/ax", "/xyz", "12", "0", ""), SPIFFEID: one("spiffe://e/web", "", "spiffe://e/db"), TCP: r.IntN(5) == 0,
			})
			in.Class = policy.Class(1 + r.IntN(2))
			if in.HeatKnown = r.IntN(2) == 0; in.HeatKnown {
				in.Heat = r.Float64()
			}
			want := naive(t, rules, in)
			e := a.Explain(in)
			got := a.Decide(in)
			if got != e.Result {
				t.Fatalf("seed %d: %+v, explained as %+v", seed, got, e.Result)
			}
			got.Detail = ""
			if got != want {
				t.Fatalf("seed %d: %+v, %+v for %+v: %+v, want %+v", seed, rules, in, in.Request, got, want)
			}
			reasons[got.Err]++
			if n := len(e.Judged) + e.Later + e.Skipped; n != len(rules) && e.Judged != nil {
				t.Fatalf("seed %d: %d rules of %d are accounted for", seed, n, len(rules))
			}
		}
	}
	if len(reasons) != 4 || slices.Contains([]int{reasons[""], reasons[policy.ReasonAuthzForbid], reasons[policy.ReasonAuthzError]}, 0) {
		t.Errorf("seed %d: results %v", seed, reasons)
	}
}

func TestExplain(t *testing.T) {
	a := mustNew(t,
		Rule{Name: "elsewhere", Hosts: []string{"b.example"}, Effect: Forbid},
		Rule{Name: "no", When: `path == "/x"`, Effect: Forbid},
		Rule{Name: "yes", Routes: []string{"r"}, Effect: Permit},
		Rule{Name: "later", When: "true", Effect: Forbid},
	)
	e := a.Explain(input(policy.Request{Authority: "a.example", Route: "r", Path: "/"}))
	want := []Judged{{"no", Forbid, `path == "/x"`, false, nil}, {"yes", Permit, "", true, nil}}
	if !slices.Equal(e.Judged, want) || e.Rule != "yes" || e.Later != 1 || e.Skipped != 1 {
		t.Errorf("%+v", e)
	}
	if e := a.Explain(input(policy.Request{Authority: "@"})); e.Judged != nil || e.Err != policy.ReasonAuthzNone || e.Detail == "" {
		t.Errorf("%+v", e)
	}
}

// TestAllocations: what is decided without CEL allocates nothing, however many rules there are.
func TestAllocations(t *testing.T) {
	var rules []Rule
	for i := range 2000 {
		rules = append(rules, Rule{Name: fmt.Sprint("r", i), Hosts: []string{fmt.Sprintf("h%d.example", i), "*.a.example"}, When: `path.startsWith("/x")`, Effect: Forbid})
	}
	a := mustNew(t, append(rules, Rule{Name: "last", Methods: []string{"GET"}, Effect: Permit})...)
	in := input(policy.Request{Method: "GET", Authority: "H77.example:443", Path: "/"})
	if n := testing.AllocsPerRun(100, func() {
		if a.Decide(in).Rule != "last" {
			t.Error("not decided by the last rule")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	in.Request.Authority = "b.c.A.example"
	if n := testing.AllocsPerRun(20, func() { a.Decide(in) }); n != 0 {
		t.Errorf("%v allocations with 2,000 candidates", n)
	}
}

// TestConcurrent shares one Authorizer and its pools; the race detector judges.
func TestConcurrent(t *testing.T) {
	a := mustNew(t, Rule{Name: "r", Hosts: []string{"*.example"}, When: `path.matches("^/[0-9]*$") && !(method in ["PUT"])`, Effect: Permit})
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 500 {
				in := input(policy.Request{Method: "GET", Authority: fmt.Sprintf("h%d.example", g), Path: fmt.Sprintf("/%d", i*g)})
				if got := a.Decide(in); got != (Result{Rule: "r"}) {
					t.Errorf("%+v", got)
				}
			}
		})
	}
	wg.Wait()
}

// conditions are false for the request of the benchmarks but for the last: as people write them, which package rule judges without CEL, or
// such that CEL has to.
func conditions(i, last int, byCEL bool) string {
	n, size := fmt.Sprint(i), 1000+i
	if i == last {
		n, size = "42", 3
	} else if i == 42 {
		n = "x42"
	}
	if byCEL {
		return []string{
			fmt.Sprintf(`size(path) > %d && spiffe_id != ""`, size),
			fmt.Sprintf(`spiffe_id != "" && time.getHours("UTC") + %d < 1000`, size),
			fmt.Sprintf(`heat_known && int(heat) + size(path) > %d`, size),
		}[i%3]
	}
	return []string{
		fmt.Sprintf(`path.contains("/orders/%s?") || spiffe_id in ["spiffe://example.org/a%s", "spiffe://example.org/b%s"]`, n, n, n),
		fmt.Sprintf(`spiffe_id != "" && path.matches("^/orders/%s[?]")`, n),
		fmt.Sprintf(`(class == "R1" || class == "W1") && path.contains("/%s?")`, n),
	}[i%3]
}

func benchmark(b *testing.B, groups, rules int, byCEL bool) {
	set := make([]Rule, rules)
	for i := range set {
		set[i] = Rule{Name: fmt.Sprint("r", i), Effect: Permit, When: conditions(i, rules-1, byCEL)}
		if groups > 1 {
			set[i].Hosts = []string{fmt.Sprintf("host%d.example.com", i%groups)}
			set[i].Routes = []string{"orders"}
			set[i].Methods = []string{"GET", "POST"}
		}
	}
	a := mustNew(b, set...)
	in := input(policy.Request{
		Method: "POST", Scheme: "https", Authority: fmt.Sprintf("host%d.example.com:443", (rules-1)%groups), Path: "/orders/42?x=1", Route: "orders", Cluster: "backend",
		SPIFFEID: "spiffe://example.org/web",
	})
	in.Heat, in.HeatKnown = 0.5, true
	if e := a.Explain(in); e.Rule != set[rules-1].Name || len(e.Judged) != rules/groups {
		b.Fatalf("%+v", e)
	}
	b.ReportAllocs()
	for b.Loop() {
		a.Decide(in)
	}
}

// Of 1,000 rules 10 can concern the request; all but the last are false.
func BenchmarkAuthz1000Of10(b *testing.B)    { benchmark(b, 100, 1000, false) }
func BenchmarkAuthz1000Of10CEL(b *testing.B) { benchmark(b, 100, 1000, true) }

// All 1,000 rules can concern the request; all but the last are false.
func BenchmarkAuthz1000All(b *testing.B)    { benchmark(b, 1, 1000, false) }
func BenchmarkAuthz1000AllCEL(b *testing.B) { benchmark(b, 1, 1000, true) }

// Of 10,000 rules 10 can concern the request.
func BenchmarkAuthz10000Of10(b *testing.B) { benchmark(b, 1000, 10_000, false) }
