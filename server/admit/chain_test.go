package admit

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/server/accesslog"
)

const uuidText = "01932c5e-8a4b-7c3d-9e2f-1122334455%02d"

// chained is the test configuration with both filters, and two replicas beside this one, a.
func chained(s string) string {
	return strings.Replace(s, "on_receipt_failure: ALLOW", "on_receipt_failure: DENY", 1) + `envoy:
  filter: BOTH
  replicas: [{instance: a, address: "127.0.0.1:9002"}, {instance: b, address: "127.0.0.1:9012"}]
parents: ["spiffe://shop.example/edge", "spiffe://shop.example/envoys/*"]
`
}

// TestChain: a decision that passed is given to the second filter once, and to nobody else.
func TestChain(t *testing.T) {
	running(t, func(s string) string {
		return chained(strings.Replace(s, "r1: {capacity: 2}", "r1: {capacity: 100}", 1))
	},
		func(t *testing.T, p *Pipeline, r *recorder, m *meter) {
			r.real = true
			ask := func(decided string) policy.Decision {
				return p.Admit(t.Context(), &policy.Request{Path: "/hot", Decided: decided})
			}
			first := ask("")
			if second := ask(first.ID); second != first || r.n != 1 || m.decided != 1 {
				t.Fatalf("second filter got %+v, want %+v; %d records, %d counted", second, first, r.n, m.decided)
			}
			if third := ask(first.ID); third.ID == first.ID || r.n != 2 {
				t.Errorf("a decision was given a third time: %+v", third)
			}
			for name, id := range map[string]string{
				"no id":                     "x",
				"upper case":                strings.ToUpper(fmt.Sprintf(uuidText, 1)) + ".a",
				"ours, never decided":       fmt.Sprintf(uuidText, 2) + ".a",
				"of no replica of ours":     fmt.Sprintf(uuidText, 3) + ".c",
				"of a replica, with a tail": fmt.Sprintf(uuidText, 4) + ".b.b",
			} {
				if d := ask(id); d.ID == id || d.ID == "" {
					t.Errorf("%s: %q was believed: %+v", name, id, d)
				}
			}
			n, other := r.n, fmt.Sprintf(uuidText, 5)+".b"
			if d := ask(other); d.ID != other || !d.Passes() || r.n != n {
				t.Errorf("decided by another replica: %+v, %d more records", d, r.n-n)
			}
			p.Finish(other, policy.Outcome{Source: "ext_proc", Result: policy.ResultComplete}, true)
			p.Finish(other, policy.Outcome{Source: "ext_proc", Result: policy.ResultComplete}, false)
			time.Sleep(2 * holdFor)
			if got := r.told(other); len(got) != 0 {
				t.Errorf("an outcome of another replica's decision was recorded here: %v", got)
			}
			late := ask("")
			time.Sleep(2*keepPassed + time.Second)
			if d := ask(late.ID); d.ID == late.ID {
				t.Error("a decision was kept for ever")
			}
			// A stream that ends while the second filter waits for a body owes no record.
			again, n := ask(""), r.n
			p.Abandon(&policy.Request{Path: "/hot", Decided: again.ID})
			if r.n != n {
				t.Errorf("%d records of a request that was decided before it was abandoned", r.n-n)
			}
		})
}

// TestChainRefused: a refusal is not there to be found.
func TestChainRefused(t *testing.T) {
	running(t, func(s string) string { return chained(strings.Replace(s, "r1: {capacity: 2}", "r1: {capacity: 1}", 1)) },
		func(t *testing.T, p *Pipeline, r *recorder, _ *meter) {
			r.real = true
			p.Admit(t.Context(), &policy.Request{Path: "/hot"})
			refused := p.Admit(t.Context(), &policy.Request{Path: "/hot"})
			if refused.Passes() || refused.ID == "" {
				t.Fatalf("not refused: %+v", refused)
			}
			if d := p.Admit(t.Context(), &policy.Request{Path: "/hot", Decided: refused.ID}); d.Passes() || d.ID == refused.ID {
				t.Errorf("a refusal was taken for a decision that passed: %+v", d)
			}
		})
}

// TestChainLearned: without envoy.filter BOTH nothing is kept until a check brings an id along.
func TestChainLearned(t *testing.T) {
	running(t, func(s string) string { return strings.Replace(s, "r1: {capacity: 2}", "r1: {capacity: 100}", 1) },
		func(t *testing.T, p *Pipeline, r *recorder, _ *meter) {
			r.real = true
			first := p.Admit(t.Context(), &policy.Request{Path: "/hot"})
			if len(p.passed.now) != 0 {
				t.Error("decisions are kept for nobody")
			}
			if d := p.Admit(t.Context(), &policy.Request{Path: "/hot", Decided: first.ID}); d.ID == first.ID {
				t.Errorf("given what was not kept: %+v", d)
			}
			second := p.Admit(t.Context(), &policy.Request{Path: "/hot"})
			if d := p.Admit(t.Context(), &policy.Request{Path: "/hot", Decided: second.ID}); d != second {
				t.Errorf("got %+v, want %+v", d, second)
			}
		})
}

// TestPassedIsBounded: who never asks again cannot fill the memory.
func TestPassedIsBounded(t *testing.T) {
	var p passed
	for i := range 5 * maxPassed {
		p.put(policy.Decision{ID: fmt.Sprint(i)})
	}
	if n := len(p.now) + len(p.old); n > 2*maxPassed || n < maxPassed {
		t.Errorf("%d kept", n)
	}
	if _, ok := p.take(fmt.Sprint(5*maxPassed - 1)); !ok {
		t.Error("the newest is not there")
	}
	if _, ok := p.take("0"); ok {
		t.Error("the oldest is there")
	}
}

// TestParent: the header counts from those whom parents names, if it is a receipt id.
func TestParent(t *testing.T) {
	id := fmt.Sprintf(uuidText, 7) + ".edge"
	running(t, func(s string) string {
		return chained(strings.Replace(s, "r1: {capacity: 2}", "r1: {capacity: 100}", 1))
	},
		func(t *testing.T, p *Pipeline, r *recorder, _ *meter) {
			for _, c := range []struct{ parent, spiffe, want string }{
				{id, "spiffe://shop.example/edge", id},
				{id, "spiffe://shop.example/envoys/a/b", id},
				{id, "", ""},                             // nobody said who it is
				{id, "spiffe://shop.example/web", ""},    // a client's claim
				{id, "spiffe://shop.example/envoys", ""}, // the path itself is not below it
				{id, "spiffe://shop.example/edge/x", ""}, // nor is that the one
				{id, "spiffe://other.example/edge", ""},
				{id + " ", "spiffe://shop.example/edge", ""},
				{"x", "spiffe://shop.example/edge", ""},
				{"", "spiffe://shop.example/edge", ""},
			} {
				p.Admit(t.Context(), &policy.Request{Path: "/hot", Parent: c.parent, SPIFFEID: c.spiffe})
				if got := r.last().Parent; got != c.want {
					t.Errorf("parent %q from %q: recorded %q, want %q", c.parent, c.spiffe, got, c.want)
				}
			}
			p.Abandon(&policy.Request{Parent: id, SPIFFEID: "spiffe://shop.example/edge"})
			if got := r.last().Parent; got != id {
				t.Errorf("abandoned: recorded %q, want %q", got, id)
			}
		})
}

// TestAged: a stream that was ended for its age and comes back was heard all the time; one that does not come back was not.
func TestAged(t *testing.T) {
	running(t, nil, func(t *testing.T, p *Pipeline, _ *recorder, m *meter) {
		unheard := func() int { m.mu.Lock(); defer m.mu.Unlock(); return m.unreceipted["unheard"] }
		p.LogStream("e", accesslog.StreamOpened)
		first := unheard()
		p.LogStream("e", accesslog.StreamAged)
		time.Sleep(time.Second)
		p.LogStream("e", accesslog.StreamOpened)
		if n := unheard(); n != first {
			t.Errorf("%d intervals after a stream went on", n-first)
		}
		p.LogStream("e", accesslog.StreamAged)
		time.Sleep(reopen + time.Second)
		p.LogStream("e", accesslog.StreamOpened)
		if n := unheard(); n != first+1 {
			t.Errorf("%d intervals after a stream came back late, want 1", n-first)
		}
		if len(p.unheard.aged) != 0 || len(p.unheard.ended) != 0 {
			t.Errorf("left: %v %v", p.unheard.aged, p.unheard.ended)
		}
	})
}

// BenchmarkChainOff shows that a process without a chain pays nothing for it.
func BenchmarkChainOff(b *testing.B) {
	var p Pipeline
	r := &rules{}
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := p.earlier(r, &policy.Request{}); ok || p.chained.Load() {
			b.Fatal("chained")
		}
	}
}
