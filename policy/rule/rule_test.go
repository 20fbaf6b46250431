package rule

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"

	"github.com/knhk/sidecar/policy"
)

var sample = Input{
	Request: &policy.Request{
		Method: "POST", Scheme: "https", Authority: "shop.example.com", Path: "/orders/42?x=1", Route: "orders", Cluster: "backend",
		SPIFFEID: "spiffe://example.org/web",
	},
	Class: policy.W1, Time: time.Date(2026, 2, 3, 4, 5, 6, 7, time.UTC), Heat: 0.75, HeatKnown: true,
}

func compile(t testing.TB, expr string) *Condition {
	t.Helper()
	c, faults, err := Compile(All, expr)
	if err != nil || faults != nil {
		t.Fatalf("%s: %v, %v", expr, err, faults)
	}
	return c
}

func judge(c *Condition, in Input) (bool, error) {
	r := Start(in)
	defer r.End()
	return r.Judge(c)
}

// byCEL judges without guards, cost and activation of ours.
func byCEL(t *testing.T, expr string, in Input) (bool, error) {
	t.Helper()
	env, err := envs[All]()
	if err != nil {
		t.Fatal(err)
	}
	checked, issues := env.Compile(expr)
	if issues.Err() != nil {
		t.Fatal(issues.Err())
	}
	prog, err := env.Program(checked)
	if err != nil {
		t.Fatal(err)
	}
	vars := map[string]any{"time": in.Time, "heat_known": in.HeatKnown}
	for v := range strs {
		vars[names[v]] = in.str(v)
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

// TestGuards compares conditions as they run, guards first, with what CEL says of them alone.
func TestGuards(t *testing.T) {
	requests := []policy.Request{
		{}, *sample.Request,
		{Method: "GET", Path: "/static/app.js", Scheme: "http", Route: "static"},
		{Method: "GET", Path: "/", Authority: "GET", Cluster: "GET"},
		{Method: "get", Path: "/static", SPIFFEID: "spiffe://example.org/web"},
		{TCP: true, Authority: "192.0.2.1:5432"},
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
		{`method != "GET"`, 0, true},
		{`!(method == "GET")`, 0, true},
		{`method == "GET" || path == "/"`, 0, true},
		{`method in ["GET", "HEAD"] && !path.contains("..")`, 0, true},
		{`"GET" != method && (path.contains("a") || path in [])`, 0, true},
		{`path == "/" && (spiffe_id != "" || !(scheme.startsWith("http") && class == "W1"))`, 1, true},
		{`path.matches("^/(static|api)/[a-z]+[.]js$") && method != "PUT"`, 0, true},
		{`matches(path, "a")`, 0, true},
		{`method in ["GET", authority]`, 0, false},
		{`"a" in [path, "/"]`, 0, false},
		{`heat_known || method == "GET"`, 0, false},
		{`method == authority`, 0, false},
		{`path.startsWith(authority)`, 0, false},
		{`"/static/app.js".startsWith(path)`, 0, false},
		{`["GET"].exists(method, method == "GET")`, 0, false}, // another method than the request's
		{`method == "GET" ? path == "/" : scheme == "https"`, 0, false},
		{`path.endsWith("")`, 1, true},
		{`true`, 0, false},
		{`spiffe_id == "spiffe://example.org/web" && method == "POST"`, 2, true},
		{`protocol == "tcp" && class == "W1"`, 2, true},
		{`protocol == "http" && heat_known && heat > 0.5`, 1, false},
		{`heat == 0.75`, 0, false},
	} {
		cond := compile(t, c.expr)
		if len(cond.guards) != c.guards || (cond.prog == nil && cond.tracked == nil) != c.whole {
			t.Errorf("%s: guards %+v, program %v", c.expr, cond.guards, cond.prog != nil)
		}
		for i := range requests {
			in := sample
			in.Request = &requests[i]
			yes, err := byCEL(t, c.expr, in)
			got, gotErr := judge(cond, in)
			if (gotErr != nil) != (err != nil) || got != yes {
				t.Errorf("%s for %+v: %v, %v, CEL says %v, %v", c.expr, requests[i], got, gotErr, yes, err)
			}
		}
	}
}

// TestVariables: each name gives its own value, by guard and by CEL.
func TestVariables(t *testing.T) {
	r := sample.Request
	for _, c := range []struct{ name, want string }{
		{"method", r.Method}, {"scheme", r.Scheme}, {"authority", r.Authority}, {"path", r.Path}, {"route", r.Route}, {"cluster", r.Cluster},
		{"spiffe_id", r.SPIFFEID}, {"protocol", "http"}, {"class", "W1"},
	} {
		for _, form := range []string{"%s == %q", "%s in [%q]"} {
			expr := fmt.Sprintf(form, c.name, c.want)
			if yes, err := judge(compile(t, expr), sample); !yes || err != nil {
				t.Errorf("%s: %v, %v", expr, yes, err)
			}
		}
	}
	for _, expr := range []string{
		`time == timestamp("2026-02-03T04:05:06.000000007Z")`, `time.getHours("+02:00") == 6`, `time.getDayOfWeek() == 2`, `heat == 0.75`, `heat_known`,
	} {
		if yes, err := judge(compile(t, expr), sample); !yes || err != nil {
			t.Errorf("%s: %v, %v", expr, yes, err)
		}
	}
	if names != [...]string{"method", "scheme", "authority", "path", "route", "cluster", "spiffe_id", "protocol", "class", "time", "heat", "heat_known"} {
		t.Error("a variable is not tested")
	}
}

// TestHeat: a condition that reads a heat which is not known fails, whatever stands beside it, unless a guard or an earlier operand
// keeps CEL from reading it.
func TestHeat(t *testing.T) {
	in := sample
	in.HeatKnown = false
	for _, c := range []struct {
		expr string
		want error
		yes  bool
	}{
		{`heat > 0.5`, ErrHeat, false},
		{`heat > 0.5 || true`, ErrHeat, false},
		{`heat > 0.5 && method.contains("x")`, ErrHeat, false},
		{`[1].exists(x, heat > 0.5)`, ErrHeat, false},
		{`heat_known ? heat > 0.5 : method.contains("O")`, nil, true},
		{`heat_known && heat > 0.5`, nil, false},
		{`!heat_known || heat > 0.5`, nil, true},
		{`heat > 0.5 && method == "GET"`, nil, false},
		{`heat > 0.5 && method == "POST"`, ErrHeat, false},
	} {
		cond := compile(t, c.expr)
		if yes, err := judge(cond, in); yes != c.yes || !errors.Is(err, c.want) {
			t.Errorf("%s: %v, %v", c.expr, yes, err)
		}
		if !cond.ReadsHeat() {
			t.Errorf("%s: reads heat", c.expr)
		}
	}
	if compile(t, `path.contains("heat")`).ReadsHeat() {
		t.Error("a string is no variable")
	}
}

// TestCalls: what a client could make expensive or what would be read from disk has to be a literal.
func TestCalls(t *testing.T) {
	for _, c := range []struct {
		expr string
		col  int // of the fault; 0: it is right
		want string
	}{
		{`time.getHours("Europe/Berlin") < 8`, 15, "offset"},
		{`time.getHours(path) < 8`, 15, "offset"},
		{`time.getHours("+25:00") < 8`, 15, "offset"},
		{`time.getDayOfYear("") < 8`, 19, "offset"},
		{`time.getMilliseconds("UTC") < 8`, 0, ""},
		{`time.getMinutes("-05:30") < 8`, 0, ""},
		{`time.getSeconds() < 8`, 0, ""},
		{`duration("1h").getHours() < 8`, 0, ""},
		{`path.matches(authority)`, 14, "string literal"},
		{`path.matches("(abc){200}")`, 14, "instructions"},
	} {
		_, faults, err := Compile(All, c.expr)
		if err != nil || (faults != nil) != (c.col != 0) {
			t.Errorf("%s: %v, %v", c.expr, faults, err)
		} else if c.col != 0 && (faults[0].Column != c.col || faults[0].Line != 1 || !strings.Contains(faults[0].Msg, c.want)) {
			t.Errorf("%s: %v", c.expr, faults)
		}
	}
}

// TestBounds: no condition costs more than was said beforehand, and those whose bound allows it run without being counted.
func TestBounds(t *testing.T) {
	env, err := envs[All]()
	if err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	for _, expr := range []string{
		`path.contains("/x")`, `path.contains(authority)`, `path + authority == spiffe_id`, `path.matches("^/a+b?$") || path.endsWith(cluster)`,
		`(path + path).matches("a*b")`, `[method, scheme].exists(x, path.contains(x))`, `path in ["a", "b", "/c"]`, `size(path) > 3 && size(path + path + path) < 9`,
		`path < authority || authority != path`, `string(time) == path`, `time > timestamp("2026-01-01T00:00:00Z") && heat > 0.5 && heat_known`,
		`[1,2,3].all(a, [1,2,3].all(b, a + b > 0 && path.contains("x")))`, `[path, path + "x"].map(p, p + p).exists(p, p.contains("aab"))`,
		`{"a": path}["a"].contains("aaab") ? path.startsWith(authority) : path.endsWith(authority)`, `method == "GET" || method == "POST" || path == authority`,
	} {
		checked, issues := env.Compile(expr)
		if issues.Err() != nil {
			t.Fatal(issues.Err())
		}
		sizes, _ := checkCalls(checked.NativeRep())
		b, err := estimate(env, checked, sizes)
		if err != nil {
			t.Fatal(err)
		}
		prog, err := env.Program(checked, cel.EvalOptions(cel.OptOptimize), cel.CostTracking(sizes))
		if err != nil {
			t.Fatal(err)
		}
		for range 40 {
			text := func() string { return strings.Repeat("a", int(float64(MaxValue)*r.Float64()*r.Float64()*r.Float64())) }
			in := sample
			in.Request = &policy.Request{Method: "GET", Path: text(), Authority: text(), SPIFFEID: text(), Cluster: text()}
			run := Start(in)
			_, details, err := prog.Eval(run)
			if bound := b[sizeOf(&in)]; err != nil || details == nil || *details.ActualCost() > bound {
				t.Errorf("seed %d: %s: cost %d, bound %d, %v", seed, expr, *details.ActualCost(), bound, err)
			}
			run.End()
		}
	}
	if c := compile(t, `size(path) > 3`); c.tracked != nil || c.prog == nil {
		t.Error("a cheap condition is counted")
	}
	if c := compile(t, `path.matches("(a{9}){20}$")`); c.tracked == nil || c.native == nil {
		t.Error("what is cheap for short values only is not counted, or is always")
	}
}

func TestTotalCost(t *testing.T) {
	cond := compile(t, `path.contains("xyz")`)
	in := sample
	in.Request = &policy.Request{Path: strings.Repeat("a", MaxValue)}
	run := Start(in)
	defer run.End()
	for n := range 10_000 {
		if _, err := run.Judge(cond); err != nil {
			if !errors.Is(err, ErrTotalCost) || n < 10 {
				t.Errorf("after %d: %v", n, err)
			}
			return
		}
	}
	t.Error("the sum has no limit")
}

// FuzzRules compiles any expression and judges a request with it: nothing panics, and guards agree with CEL.
func FuzzRules(f *testing.F) {
	for _, s := range []string{
		`method == "GET" && path.matches("^/a+$")`, `[1, 2].map(x, x * 2).size() == 2`,
		`path.startsWith("/") || 1 / 0 == 1`,
		`has({"a": 1}.a)`, `timestamp("2020-01-01T00:00:00Z").getFullYear() == 2020`, `path[0] == "/"`, "method == 'GET' && 1/0 > 0",
		`time.getHours("+01:00") < 9 && class == "R1" && heat > 0.5`,
	} {
		f.Add(s, "GET", "/aaa")
	}
	f.Fuzz(func(t *testing.T, expr, method, path string) {
		c, faults, err := Compile(All, expr)
		if err != nil {
			t.Fatal(err)
		}
		if faults != nil {
			return
		}
		in := sample
		in.Request = &policy.Request{Method: method, Path: path}
		got, gotErr := judge(c, in)
		if gotErr != nil && strings.Contains(gotErr.Error(), "cost") || len(method) > MaxValue || len(path) > MaxValue {
			return
		}
		yes, err := byCEL(t, expr, in)
		if (gotErr != nil) != (err != nil) || got != yes {
			t.Errorf("%s: %v, %v, CEL says %v, %v", expr, got, gotErr, yes, err)
		}
	})
}

// TestLongValues has values that are longer than MaxValue looked into, with CEL and without: an error, unless what stands before
// decides.
func TestLongValues(t *testing.T) {
	in := sample
	in.Request = &policy.Request{Method: "GET", Path: strings.Repeat("a", MaxValue+1)}
	for _, c := range []struct {
		expr string
		want error
	}{
		{`path.contains("b")`, ErrLong},
		{`path.contains("b") || method == "GET"`, ErrLong}, // even if the rest is true
		{`path in ["a", "b"]`, ErrLong},
		{`path.matches("b")`, ErrLong},
		{`method != "GET" && path.contains("b")`, nil},
		{`path != "b" || method == "GET"`, ErrLong},
		{`path == "b" && path.contains("b")`, nil}, // equality works beyond it, and decides
	} {
		if yes, err := judge(compile(t, c.expr), in); yes || !errors.Is(err, c.want) {
			t.Errorf("%s: %v, %v, want %v", c.expr, yes, err, c.want)
		}
	}
}
