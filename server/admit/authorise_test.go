package admit

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/policy/heat"
	"github.com/knhk/sidecar/region/receiptlog"
	"github.com/knhk/sidecar/server/config"
)

const testAuthz = `authz_rules:
- {name: no-debug, when: 'path.startsWith("/debug")', effect: FORBID}
- {name: warm-only, routes: [warm], when: 'heat > 0.5', effect: PERMIT}
- {name: maybe-warm, routes: [maybe], when: '!heat_known', effect: PERMIT}
- {name: strange, routes: [strange], when: 'int(path) > 0', effect: PERMIT}
- {name: hot, when: 'class == "R1"', effect: PERMIT}
- {name: web, routes: [r, open, body], when: 'path != "/secret" && protocol == "http"', effect: PERMIT}
`

func withAuthz(s string) string {
	return strings.Replace(s, "w1: {capacity: 1,", "w1: {capacity: 1000,", 1) + testAuthz
}

// TestAuthorise: an unauthorised request is refused with 403 and takes no credit; the record says which rule decided.
func TestAuthorise(t *testing.T) {
	cases := []struct {
		req    policy.Request
		rule   string
		reason policy.Reason
	}{
		{policy.Request{Route: "r", Path: "/"}, "web", policy.ReasonOK},
		{policy.Request{Route: "r", Path: "/debug/x"}, "no-debug", policy.ReasonAuthzForbid},
		{policy.Request{Route: "r", Path: "/secret"}, "", policy.ReasonAuthzNone},
		{policy.Request{Route: "elsewhere", Path: "/"}, "", policy.ReasonAuthzNone},
		{policy.Request{Route: "elsewhere", Path: "/hot"}, "hot", policy.ReasonOK},
		{policy.Request{Route: "strange", Path: "/x"}, "strange", policy.ReasonAuthzError},
		{policy.Request{Route: "warm", Path: "/"}, "warm-only", policy.ReasonAuthzError}, // nothing is known of its heat
		{policy.Request{Route: "maybe", Path: "/"}, "maybe-warm", policy.ReasonOK},
		{policy.Request{Route: "r", Path: "/broken", Method: "x"}, "", policy.ReasonClassRule}, // not asked without a class
	}
	for _, dry := range []bool{false, true} {
		running(t, func(s string) string { return withAuthz(s) + fmt.Sprintf("dry_run: %v\n", dry) }, func(t *testing.T, p *Pipeline, r *recorder, _ *meter) {
			for _, c := range cases {
				d := p.Admit(t.Context(), &c.req)
				l := r.last()
				if d.Authz != c.rule || d.Reason != c.reason || l.Authz != c.rule || l.Reason != string(c.reason) || l.DryRun != dry || d.ID == "" {
					t.Errorf("dry run %v: %+v: %+v, recorded %+v", dry, c.req, d, l)
				}
				passes, status := c.reason == policy.ReasonOK, uint32(0)
				switch {
				case passes:
				case c.reason == policy.ReasonClassRule:
					status = http.StatusServiceUnavailable
				default:
					status = http.StatusForbidden
				}
				if d.Passes() != (passes || dry) || l.Status != status || !dry && uint32(d.Status) != status {
					t.Errorf("dry run %v: %+v: %+v, recorded %+v", dry, c.req, d, l)
				}
				if (l.Tick == 0) != !passes {
					t.Errorf("%+v: a credit of tick %d", c.req, l.Tick)
				}
			}
		})
	}
}

// TestUnauthorisedGap: on_receipt_failure: ALLOW lets pass what cannot be recorded, never what no rule permits.
func TestUnauthorisedGap(t *testing.T) {
	for _, early := range []bool{true, false} {
		for _, dry := range []bool{false, true} {
			running(t, func(s string) string { return withAuthz(s) + fmt.Sprintf("dry_run: %v\n", dry) }, func(t *testing.T, p *Pipeline, r *recorder, _ *meter) {
				if early {
					r.refusing = receiptlog.ErrFull
				} else {
					r.err = receiptlog.ErrFull
				}
				for _, c := range []struct {
					path   string
					passes bool
				}{{"/", true}, {"/hot", true}, {"/debug", false}, {"/secret", false}, {"/broken", false}} {
					d := p.Admit(t.Context(), &policy.Request{Route: "open", Path: c.path, Method: "x"})
					if d.Passes() != (c.passes || dry) || d.Gap != d.Passes() || d.Reason != policy.ReasonLogFull || !d.Passes() && d.Status != http.StatusServiceUnavailable {
						t.Errorf("early %v, dry run %v: %s: %+v", early, dry, c.path, d)
					}
				}
				if d := p.Admit(t.Context(), &policy.Request{Route: "r", Path: "/"}); d.Passes() != dry {
					t.Errorf("a route that does not allow: %+v", d)
				}
			})
		}
	}
}

// TestPlanAllow: a request whose decision panicked passes where the route allows it, but not past rules that were not asked.
func TestPlanAllow(t *testing.T) {
	for edit, want := range map[string]bool{"": true, testAuthz: false} {
		running(t, func(s string) string { return s + edit }, func(t *testing.T, p *Pipeline, _ *recorder, _ *meter) {
			if got := p.Plan("open").Allow; got != want {
				t.Errorf("rules %q: allow %v", edit, got)
			}
		})
	}
}

// TestHeat: outcomes of requests on a route make its heat, whoever tells them, and it survives a reload.
func TestHeat(t *testing.T) {
	edit := func(s string) string {
		return strings.Replace(withAuthz(s), "routes:\n", "routes:\n- {name: warm}\n", 1) + `- {name: anything, when: 'heat_known || path != ""', effect: PERMIT}` + "\n"
	}
	running(t, edit, func(t *testing.T, p *Pipeline, r *recorder, _ *meter) {
		begin := func(route string) string {
			t.Helper()
			d := p.Admit(t.Context(), &policy.Request{Route: route, Path: "/hot"}) // R1
			if route == "warm" {
				if d.Authz != "warm-only" || d.Reason != policy.ReasonAuthzError {
					t.Fatalf("%+v", d)
				}
				// The rule wants heat, which needs requests that pass: they come from another rule's time.
				d.ID = fmt.Sprint("warm-", r.n)
				p.warm.put(d.ID, p.rules.Load().heat.Of(route))
			}
			return d.ID
		}
		for i := range 2 * heat.MinEvidence {
			p.Finish(begin("warm"), policy.Outcome{Source: "als", CacheStatus: "edge; hit"}, true)
			p.Finish(fmt.Sprint("unknown-", i), policy.Outcome{Source: "als", CacheStatus: "edge; fwd=miss"}, true)
			time.Sleep(20 * time.Millisecond)
			if share, known := p.rules.Load().heat.Of("warm").Heat(time.Now()); known {
				if share != 1 || i < heat.MinEvidence-1 {
					t.Fatalf("heat %v after %d", share, i+1)
				}
				break
			}
		}
		if d := p.Admit(t.Context(), &policy.Request{Route: "warm", Path: "/hot"}); !d.Passes() || d.Authz != "warm-only" {
			t.Errorf("a warm route: %+v", d)
		} else {
			p.Finish(d.ID, policy.Outcome{Source: "ext_proc"}, true) // nothing about a cache
			p.Finish(d.ID, policy.Outcome{Source: "ext_proc", CacheStatus: "x; fwd=miss"}, true)
			if share, _ := p.rules.Load().heat.Of("warm").Heat(time.Now()); share != 1 {
				t.Errorf("heat %v: an outcome counts twice", share)
			}
		}
		cfg, err := config.Parse("x.yaml", []byte(edit(testConfig)))
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Set(cfg); err != nil {
			t.Fatal(err)
		}
		if _, known := p.rules.Load().heat.Of("warm").Heat(time.Now()); !known {
			t.Error("a reload forgets the heat")
		}
		if _, known := p.rules.Load().heat.Of("other").Heat(time.Now()); known {
			t.Error("the rest is warm")
		}
	})
}

func TestWarmIsBounded(t *testing.T) {
	var w warm
	c := new(heat.Counter)
	for i := range 3 * maxWarm {
		w.put(fmt.Sprint(i), c)
	}
	if n := len(w.now) + len(w.old); n > 2*maxWarm {
		t.Errorf("%d are remembered", n)
	}
	if w.take("0") != nil || w.take(fmt.Sprint(3*maxWarm-1)) != c || w.take(fmt.Sprint(2*maxWarm-1)) != c || w.take(fmt.Sprint(3*maxWarm-1)) != nil {
		t.Error("the wrong ones are remembered")
	}
}

// TestAuthoriseAllocations: without rules, and with rules that need no CEL, a decision allocates what it always did.
func TestAuthoriseAllocations(t *testing.T) {
	measure := func(edit func(string) string) float64 {
		p, r, _ := newPipeline(t, func(s string) string { return edit(strings.ReplaceAll(s, "capacity: 2}", "capacity: 1000000}")) })
		r.refusing = nil
		p.Advance()
		req := get("/hot")
		rules := p.rules.Load()
		c := rules.classes.Classify(req)
		return testing.AllocsPerRun(100, func() {
			if a := p.authorise(rules, req, c.Class); a.Err != "" {
				t.Errorf("%+v", a)
			}
			p.observe("id", &policy.Outcome{})
		})
	}
	for name, rules := range map[string]string{
		"no rules": "", "a rule": "authz_rules: [{name: a, methods: [GET], when: 'path.startsWith(\"/\")', effect: PERMIT}]\n",
	} {
		if n := measure(func(s string) string { return s + rules }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}
