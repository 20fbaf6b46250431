package admit

import (
	"sync"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/policy/authz"
	"github.com/knhk/sidecar/policy/heat"
	"github.com/knhk/sidecar/policy/rule"
	"github.com/knhk/sidecar/server/config"
)

// setAuthz puts the authorisation rules of r.cfg into r. Heat is kept only while rules read it, and goes on with what old knows.
func (r *rules) setAuthz(old *rules) (err error) {
	if r.authz, err = authz.New(r.cfg.Authz()); err != nil || !r.authz.ReadsHeat() {
		return err
	}
	var known *heat.Heat
	if old != nil {
		known = old.heat
	}
	r.heat = heat.New(r.cfg.RouteNames(), known)
	return nil
}

// authorise has the rules decide about a request of class c.
func (p *Pipeline) authorise(r *rules, req *policy.Request, c policy.Class) authz.Result {
	if r.authz.Empty() {
		return authz.Result{}
	}
	in := rule.Input{Request: req, Class: c, Time: p.now()}
	if r.heat != nil {
		in.Heat, in.HeatKnown = r.heat.Of(req.Route).Heat(in.Time)
	}
	a := r.authz.Decide(in)
	if a.Err == policy.ReasonAuthzError {
		p.logOnce(string(a.Err), "authorisation rule failed: refused", "rule", a.Rule, "detail", a.Detail)
	}
	return a
}

// unasked judges a request whose decision will not be recorded. It is worth the work only where such a request may pass.
func (p *Pipeline) unasked(r *rules, route *config.RoutePolicy, req *policy.Request) policy.Decision {
	if !route.AllowOnFailure || r.authz.Empty() {
		return policy.Decision{}
	}
	c := r.classes.Classify(req)
	d := policy.Decision{Class: c.Class, Rule: c.Rule, Reason: c.Err}
	if c.Err == "" {
		a := p.authorise(r, req, c.Class)
		d.Authz, d.Reason = a.Rule, a.Err
	}
	return d
}

// permits reports whether d may go on as far as the authorisation rules are concerned: one that was not asked does not permit.
func (r *rules) permits(d policy.Decision) bool {
	if r.authz.Empty() {
		return true
	}
	switch d.Reason {
	case policy.ReasonAuthzForbid, policy.ReasonAuthzNone, policy.ReasonAuthzError:
		return false
	}
	return d.Authz != ""
}

// maxWarm bounds each generation of warm.
const maxWarm = 1 << 16

// warm remembers of which route's heat the outcome of a request will tell. Requests whose outcome comes after so many others have
// begun are forgotten: they say nothing about heat.
type warm struct {
	mu       sync.Mutex
	now, old map[string]*heat.Counter
}

func (w *warm) put(id string, c *heat.Counter) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.now == nil || len(w.now) >= maxWarm {
		w.old, w.now = w.now, map[string]*heat.Counter{}
	}
	w.now[id] = c
}

func (w *warm) take(id string) *heat.Counter {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, m := range []map[string]*heat.Counter{w.now, w.old} {
		if c, ok := m[id]; ok {
			delete(m, id)
			return c
		}
	}
	return nil
}

// begin notes that the outcome of a request that passes will tell about its route.
func (p *Pipeline) begin(r *rules, req *policy.Request, d policy.Decision) {
	if r.heat != nil && d.ID != "" && d.Passes() {
		p.warm.put(d.ID, r.heat.Of(req.Route))
	}
}

// observe has an outcome tell about its route.
func (p *Pipeline) observe(id string, o *policy.Outcome) {
	if p.rules.Load().heat == nil {
		return
	}
	c := p.warm.take(id)
	if hit, known := heat.Judge(o.CacheStatus); known && c != nil {
		c.Observe(hit, p.now())
	}
}
