package admit

import (
	"strings"
	"sync"
	"time"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/server/config"
)

// Two filters of one Envoy may ask about the same request, ext_authz and ext_proc in either order. The first one's answer leaves the
// receipt id in the dynamic metadata, the second one sends it along: the request has been decided. Clients cannot set dynamic metadata, and
// who can speak for Envoy here is authenticated; still an id is believed only if it is of a decision of ours that passed, and only once,
// or of another replica of envoy.replicas.
//
// Decisions are kept for this only where it is known to be needed: with envoy.filter BOTH, or once a check has brought an id along. Where
// neither is so, the first request of a chain that somebody wrote by hand is decided twice.

// keepPassed is how long a decision is kept for the second filter at least, as long as there are fewer than maxPassed; twice as long at most.
const keepPassed = 5 * time.Second

// maxPassed bounds each of the two generations of passed.
const maxPassed = 32 << 10

// passed keeps decisions that passed until the next filter asks.
type passed struct {
	mu       sync.Mutex
	now, old map[string]policy.Decision
	turned   time.Time
}

func (p *passed) put(d policy.Decision) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.now) >= maxPassed {
		p.now, p.old = nil, p.now
	}
	if p.now == nil {
		p.now = map[string]policy.Decision{}
	}
	p.now[d.ID] = d
}

// take gives a decision, once.
func (p *passed) take(id string) (policy.Decision, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, m := range [...]map[string]policy.Decision{p.now, p.old} {
		if d, ok := m[id]; ok {
			delete(m, id)
			return d, true
		}
	}
	return policy.Decision{}, false
}

func (p *passed) turn(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if now.Sub(p.turned) >= keepPassed {
		p.now, p.old, p.turned = nil, p.now, now
	}
}

// earlier gives the decision that an earlier filter of the same Envoy got for req.
func (p *Pipeline) earlier(r *rules, req *policy.Request) (policy.Decision, bool) {
	if req.Decided == "" {
		return policy.Decision{}, false
	}
	_, instance, err := receipt.ParseID(req.Decided)
	if err != nil {
		return policy.Decision{}, false
	}
	if !p.chained.Load() {
		p.chained.Store(true)
	}
	if instance == r.cfg.Instance {
		return p.passed.take(req.Decided)
	}
	if _, ok := r.replicas[instance]; ok {
		return policy.Decision{ID: req.Decided, Verdict: policy.Admit, Reason: policy.ReasonOK}, true
	}
	return policy.Decision{}, false
}

// elsewhere reports whether id is of another replica, whose log alone takes its outcome.
func (r *rules) elsewhere(id string) bool {
	i := strings.LastIndexByte(id, '.')
	return i >= 0 && id[i+1:] != r.cfg.Instance
}

// parent is the receipt id that caused req, if who sent it may say so.
func (r *rules) parent(req *policy.Request) string {
	if req.Parent == "" || req.SPIFFEID == "" {
		return ""
	}
	if _, _, err := receipt.ParseID(req.Parent); err != nil || !r.cfg.Parents.Match(req.SPIFFEID) {
		return ""
	}
	return req.Parent
}

// replicasOf lists the other replicas.
func replicasOf(cfg *config.Config) map[string]struct{} {
	out := map[string]struct{}{}
	for _, r := range cfg.Proto().GetEnvoy().GetReplicas() {
		if r.GetInstance() != cfg.Instance {
			out[r.GetInstance()] = struct{}{}
		}
	}
	return out
}
