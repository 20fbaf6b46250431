package heat

import (
	"math"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestJudge(t *testing.T) {
	for _, c := range []struct {
		status     string
		hit, known bool
	}{
		{"", false, false},
		{"edge; hit", true, true},
		{"edge;hit;ttl=30", true, true},
		{`"edge; fwd=miss"; hit`, true, true},
		{`"a, b; hit"; fwd=uri-miss; stored`, false, true},
		{`"a \"; hit"; fwd=stale`, false, true},
		{"edge; fwd=bypass", false, true},
		{"origin; fwd=uri-miss, edge; hit", true, true},
		{"origin; hit, edge; fwd=uri-miss", true, true},
		{"edge; hit=?1", true, true},
		{"edge; hit=?0", false, false},
		{"edge; ttl=3", false, false},
		{"edge; xhit; fwdx=1", false, false},
		{"hit", true, true},
		{"MISS from proxy", false, true},
		{"Hit from cloudfront", true, true},
		{"hits", false, false},
		{";;,,;=,\"", false, false},
		{"edge; fwd=miss, " + strings.Repeat("x", 300) + "; hit", false, true}, // the last one may have been cut
		{strings.Repeat("x", 300) + "; hit", false, false},
	} {
		if hit, known := Judge(c.status); hit != c.hit || known != c.known {
			t.Errorf("%q: %v, %v", c.status, hit, known)
		}
	}
}

func TestHeat(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	h := New([]string{"a"}, nil)
	near := func(what string, c *Counter, at time.Time, want float64) {
		t.Helper()
		if share, known := c.Heat(at); !known || math.Abs(share-want) > 1e-3 {
			t.Errorf("%s: %v, %v, want %v", what, share, known, want)
		}
	}
	a := h.Of("a")
	for i := range 2 * MinEvidence {
		if _, known := a.Heat(now); known != (i >= MinEvidence) {
			t.Errorf("known is %v after %d", known, i)
		}
		a.Observe(i%4 != 0, now)
	}
	near("three of four", a, now, 0.75)
	near("time that goes back changes nothing", a, now.Add(-time.Hour), 0.75)
	if _, known := h.Of("b").Heat(now); known || h.Of("b") != h.Of("c") {
		t.Error("the rest is known, or not one")
	}
	later := now.Add(HalfLife - time.Second)
	near("the share does not fade, the evidence does", a, later, 0.75)
	for range MinEvidence {
		a.Observe(false, later)
	}
	near("what is old counts half", a, later, 0.375)
	if _, known := a.Heat(now.Add(3 * HalfLife)); known {
		t.Error("old evidence counts for ever")
	}
	a.Observe(true, later.Add(1000*time.Hour))
	if a.hits != 1 || a.misses > 1e-9 {
		t.Errorf("after a long time: %v, %v", a.hits, a.misses)
	}
	next := New([]string{"a", "b"}, h)
	if next.Of("a") != a || next.Of("b") == h.Of("b") || next.Of("c") != h.Of("c") {
		t.Error("counts are not taken over")
	}
}

func TestConcurrent(t *testing.T) {
	h, now := New([]string{"a"}, nil), time.Now()
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 500 {
				h.Of("a").Observe(i%2 == 0, now.Add(time.Duration(g*i)))
				h.Of("a").Heat(now)
			}
		})
	}
	wg.Wait()
	if share, known := h.Of("a").Heat(now); !known || math.Abs(share-0.5) > 0.01 {
		t.Errorf("%v, %v", share, known)
	}
}

// FuzzJudge: nothing panics, and what is no hit or miss is not known.
func FuzzJudge(f *testing.F) {
	for _, s := range []string{"edge; hit", `"a\`, `a;fwd=x,b;hit`, "HIT"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if hit, known := Judge(s); hit && !known {
			t.Errorf("%q: a hit that is not known", s)
		} else if low := strings.ToLower(s); known && !strings.Contains(low, "hit") && !strings.Contains(low, "fwd") && !strings.HasPrefix(low, "miss") {
			t.Errorf("%q says nothing", s)
		}
	})
}

func BenchmarkObserve(b *testing.B) {
	h, now := New([]string{"a"}, nil), time.Now()
	b.ReportAllocs()
	for b.Loop() {
		now = now.Add(time.Millisecond)
		hit, _ := Judge(`"edge"; hit; ttl=30`)
		h.Of("a").Observe(hit, now)
	}
}
