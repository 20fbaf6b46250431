package beat

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/knhk/sidecar/policy"
)

func mustNew(t testing.TB, cfg Config) *Beat {
	t.Helper()
	b, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestNewRefuses(t *testing.T) {
	good := Config{R1: Limits{Capacity: 1}, W1: Limits{Capacity: MaxCapacity, MaxWaitTicks: View}}
	mustNew(t, good)
	for _, c := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"no capacity", Config{W1: good.W1}, "capacity of R1 is 0"},
		{"too much capacity", Config{R1: good.R1, W1: Limits{Capacity: MaxCapacity + 1}}, "capacity of W1 is 1000001"},
		{"waiting beyond the view", Config{R1: good.R1, W1: Limits{Capacity: 1, MaxWaitTicks: View + 1}}, "W1 may wait 9 ticks"},
		{"R1 waits", Config{R1: Limits{Capacity: 1, MaxWaitTicks: 1}, W1: good.W1}, "R1 may wait 1 ticks: want 0"},
		{"all at once", Config{R1: Limits{MaxWaitTicks: 9}, W1: Limits{MaxWaitTicks: 9}}, "capacity of W1 is 0"},
	} {
		b, err := New(c.cfg)
		if b != nil || err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	b := mustNew(t, good)
	if err := b.Reconfigure(Config{}); err == nil {
		t.Error("Reconfigure accepts nothing")
	}
	b.Advance(1)
	if _, ok := b.Take(policy.R1); !ok {
		t.Error("a refused Reconfigure changed something")
	}
}

func TestTake(t *testing.T) {
	b := mustNew(t, Config{R1: Limits{Capacity: 2}, W1: Limits{Capacity: 2, MaxWaitTicks: 3}})
	granted := func(class policy.Class, tick uint64, wait uint32) {
		t.Helper()
		if g, ok := b.Take(class); !ok || g != (Grant{Tick: tick, Wait: wait}) {
			t.Errorf("got %+v, %v, want tick %d after %d", g, ok, tick, wait)
		}
	}
	refused := func(class policy.Class, tick uint64, retry uint32) {
		t.Helper()
		if g, ok := b.Take(class); ok || g != (Grant{Tick: tick, Retry: retry}) {
			t.Errorf("got %+v, %v, want a refusal in tick %d with retry %d", g, ok, tick, retry)
		}
	}
	// Before the first Advance there is no tick, tick 0 neither.
	refused(policy.W1, 0, View+1)
	refused(policy.R1, 0, View+1)
	b.Advance(0)
	granted(policy.R1, 0, 0)

	b.Advance(1000)
	if b.Now() != 1000 {
		t.Errorf("now is %d", b.Now())
	}
	// R1 never waits. The next tick is free.
	granted(policy.R1, 1000, 0)
	granted(policy.R1, 1000, 0)
	refused(policy.R1, 1000, 1)
	refused(policy.R1, 1000, 1)
	// W1 waits in the order in which it asks; its credits are its own.
	for wait := range uint32(4) {
		granted(policy.W1, 1000+uint64(wait), wait)
		granted(policy.W1, 1000+uint64(wait), wait)
	}
	refused(policy.W1, 1000, 4) // the fourth tick is free, but too far
	// The next tick has been given away to those who wait; they keep it.
	b.Advance(1001)
	granted(policy.R1, 1001, 0)
	granted(policy.W1, 1004, 3)
	granted(policy.W1, 1004, 3)
	refused(policy.W1, 1001, 4)
	// A skipped tick is lost: no burst afterwards.
	b.Advance(1003)
	granted(policy.R1, 1003, 0)
	granted(policy.R1, 1003, 0)
	refused(policy.R1, 1003, 1)
	granted(policy.W1, 1005, 2)
	// Time does not go back, and standing still does not refill.
	b.Advance(1003)
	b.Advance(5)
	refused(policy.R1, 1003, 1)
	// Nor does it jump beyond what fits.
	b.Advance(math.MaxUint64)
	refused(policy.R1, 1003, 1)

	for _, class := range []policy.Class{policy.ClassUnknown, policy.W1 + 1, 255} {
		refused(class, 1003, View+1)
	}
}

// TestWholeViewGone: nothing is free anywhere in view.
func TestWholeViewGone(t *testing.T) {
	b := mustNew(t, Config{R1: Limits{Capacity: 1}, W1: Limits{Capacity: 1, MaxWaitTicks: View}})
	b.Advance(7)
	for range View + 1 {
		if _, ok := b.Take(policy.W1); !ok {
			t.Fatal("refused within the view")
		}
	}
	if g, ok := b.Take(policy.W1); ok || g.Retry != View+1 {
		t.Errorf("got %+v, %v", g, ok)
	}
}

func TestReconfigure(t *testing.T) {
	b := mustNew(t, Config{R1: Limits{Capacity: 1}, W1: Limits{Capacity: 1}})
	b.Advance(10)
	b.Take(policy.R1)
	if err := b.Reconfigure(Config{R1: Limits{Capacity: 5}, W1: Limits{Capacity: 1, MaxWaitTicks: 1}}); err != nil {
		t.Fatal(err)
	}
	take := func() (n int) {
		for {
			if _, ok := b.Take(policy.R1); !ok {
				return n
			}
			n++
		}
	}
	if n := take(); n != 0 {
		t.Errorf("%d more credits in a tick that was used up", n)
	}
	b.Take(policy.W1)
	if g, ok := b.Take(policy.W1); !ok || g.Wait != 1 {
		t.Errorf("the new waiting time does not hold: %+v, %v", g, ok)
	}
	for tick := uint64(11); tick <= 20; tick++ {
		b.Advance(tick)
		want := 1 // in view when the limits changed
		if tick > 10+View {
			want = 5
		}
		if n := take(); n != want {
			t.Errorf("tick %d has %d credits, want %d", tick, n, want)
		}
	}
}

// TestStale holds a taker up between its steps, for any time.
func TestStale(t *testing.T) {
	const class = 0
	for late := uint64(1); late <= 3*ringSize; late++ {
		b := mustNew(t, Config{R1: Limits{Capacity: 1}, W1: Limits{Capacity: 1}})
		b.Advance(100)
		stale := b.now.Load()
		b.Advance(100 + late)
		// The old tick still has its credit, unless its slot has gone to a tick now in view. Then the taker gets what anybody
		// gets who comes now.
		want := Grant{Tick: 100}
		for tick := 100 + late; tick <= 100+late+View; tick++ {
			if tick%ringSize == 100%ringSize {
				want = Grant{Tick: 100 + late}
			}
		}
		g, ok := b.takeAt(class, stale)
		if !ok || g != want {
			t.Errorf("%d ticks late: got %+v, %v, want %+v", late, g, ok, want)
		}
		for tick := 100 + late; tick <= 100+late+View; tick++ {
			b.Advance(tick)
			if _, ok := b.Take(policy.R1); !ok && tick != want.Tick {
				t.Errorf("%d ticks late: the credit of tick %d was stolen", late, tick)
			}
			if g, ok := b.Take(policy.R1); ok {
				t.Errorf("%d ticks late: a second credit: %+v", late, g)
			}
		}
	}
}

// TestPutBack holds a taker up that has stepped below zero: the put-back is for the tick that was stepped into.
func TestPutBack(t *testing.T) {
	b := mustNew(t, Config{R1: Limits{Capacity: 1}, W1: Limits{Capacity: 1}})
	b.Advance(100)
	s := &b.slots[0][100%ringSize]
	full := s.word.Load()
	first := s.word.Add(^uint64(0))
	second := s.word.Add(^uint64(0)) // below zero
	if second&creditMask >= zero || second>>creditBits != 100 {
		t.Fatalf("%x after %x: the step below zero changed the tick", second, first)
	}
	s.putBack(second)
	if got := s.word.Load(); got != first {
		t.Errorf("put back to %x, want %x", got, first)
	}
	b.Advance(100 + ringSize)
	s.putBack(first)
	if got := s.word.Load(); got&creditMask != full&creditMask || got>>creditBits != 100+ringSize {
		t.Errorf("a late put-back changed another tick: %x", got)
	}
	// A credit that comes back after the tick was flagged as used up is found all the same.
	w := s.word.Add(^uint64(0))
	if _, ok := b.Take(policy.R1); ok {
		t.Fatal("granted a credit that somebody holds")
	}
	if b.now.Load()&1 == 0 {
		t.Error("the tick is not flagged")
	}
	s.putBack(w)
	if g, ok := b.Take(policy.R1); !ok || g.Tick != 100+ringSize {
		t.Errorf("the credit is lost: %+v, %v", g, ok)
	}
}

// model is a Beat without concurrency, written as the documentation reads.
type model struct {
	cfg     Config
	started bool
	now     uint64
	next    uint64 // ticks below it are prepared or lost
	left    map[policy.Class]map[uint64]uint32
}

func (m *model) advance(tick uint64) {
	if m.started && tick <= m.now {
		return
	}
	m.started, m.now = true, tick
	for t := tick; t <= tick+View; t++ {
		if t >= m.next {
			m.left[policy.R1][t], m.left[policy.W1][t], m.next = m.cfg.R1.Capacity, m.cfg.W1.Capacity, t+1
		}
	}
}

func (m *model) take(class policy.Class) (Grant, bool) {
	wait := map[policy.Class]uint32{policy.R1: 0, policy.W1: m.cfg.W1.MaxWaitTicks}[class]
	for ahead := uint32(0); ahead <= View; ahead++ {
		if t := m.now + uint64(ahead); m.left[class][t] > 0 {
			if ahead > wait {
				return Grant{Tick: m.now, Retry: ahead}, false
			}
			m.left[class][t]--
			return Grant{Tick: t, Wait: ahead}, true
		}
	}
	return Grant{Tick: m.now, Retry: View + 1}, false
}

// TestSimulation compares with the model, step by step: skipped ticks, late tickers, stale takers, new limits.
func TestSimulation(t *testing.T) {
	for seed := range uint64(200) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		limits := func() Config {
			return Config{R1: Limits{Capacity: 1 + rnd.Uint32N(4)}, W1: Limits{Capacity: 1 + rnd.Uint32N(4), MaxWaitTicks: rnd.Uint32N(View + 1)}}
		}
		cfg := limits()
		b := mustNew(t, cfg)
		m := &model{cfg: cfg, left: map[policy.Class]map[uint64]uint32{policy.R1: {}, policy.W1: {}}}
		tick := rnd.Uint64N(1 << 40)
		var olds []uint64
		for step := range 500 {
			switch r := rnd.IntN(20); {
			case r < 3:
				tick++
				b.Advance(tick)
				m.advance(tick)
				olds = append(olds, b.now.Load())
			case r == 3: // a late ticker, a suspended machine, or a clock that went back
				tick += rnd.Uint64N(3 * ringSize)
				to := tick - min(tick, rnd.Uint64N(3))
				b.Advance(to)
				m.advance(to)
			case r == 4 && len(olds) > 0: // whoever read the tick long ago
				class := policy.R1 + policy.Class(rnd.IntN(classes))
				old := olds[rnd.IntN(len(olds))]
				got, ok := b.takeAt(uint(class-policy.R1), old)
				if ok && got.Tick == old>>flagBits && got.Tick != m.now {
					if got.Wait != 0 || m.left[class][got.Tick] == 0 {
						t.Fatalf("seed %d, step %d: %+v, though that tick has no credit", seed, step, got)
					}
					m.left[class][got.Tick]--
				} else if want, wantOK := m.take(class); got != want || ok != wantOK {
					t.Fatalf("seed %d, step %d, %v, stale: got %+v, %v, want %+v, %v", seed, step, class, got, ok, want, wantOK)
				}
			case r == 5:
				cfg := limits()
				if err := b.Reconfigure(cfg); err != nil {
					t.Fatal(err)
				}
				m.cfg = cfg
			default:
				class := policy.R1 + policy.Class(rnd.IntN(classes))
				got, gotOK := b.Take(class)
				want, wantOK := m.take(class)
				if got != want || gotOK != wantOK {
					t.Fatalf("seed %d, step %d, %v: got %+v, %v, want %+v, %v", seed, step, class, got, gotOK, want, wantOK)
				}
			}
		}
	}
}

// TestNeverMoreThanCapacity lets goroutines take while ticks pass and are skipped, and counts per tick. Each of them also
// moves the time on now and then, so that takes and advances meet in every way without anybody waiting for anybody.
func TestNeverMoreThanCapacity(t *testing.T) {
	const takers, takes = 8, 20000
	for _, capacity := range []uint32{1, 3, 50} {
		for _, skip := range []uint64{1, 5, 40} {
			t.Run(fmt.Sprintf("capacity=%d/skip=%d", capacity, skip), func(t *testing.T) {
				b := mustNew(t, Config{R1: Limits{Capacity: capacity}, W1: Limits{Capacity: capacity, MaxWaitTicks: View}})
				b.Advance(1)
				var clock atomic.Uint64
				var wg sync.WaitGroup
				counts := make([][classes]map[uint64]uint32, takers)
				for g := range takers {
					counts[g] = [classes]map[uint64]uint32{{}, {}}
					wg.Go(func() {
						rnd := rand.New(rand.NewPCG(uint64(g), skip))
						for n := range takes {
							if rnd.Uint32N(capacity*takers) == 0 {
								b.Advance(clock.Add(1 + rnd.Uint64N(skip)))
							}
							class := n % classes
							grant, ok := b.Take(policy.R1 + policy.Class(class))
							if ok {
								counts[g][class][grant.Tick]++
								if grant.Wait > View || class == 0 && grant.Wait != 0 {
									t.Errorf("%+v", grant)
								}
							} else if grant.Retry == 0 || grant.Retry > View+1 {
								t.Errorf("refused with %+v", grant)
							}
						}
					})
				}
				wg.Wait()
				last := b.Now()
				for class := range classes {
					sum := make(map[uint64]uint32)
					for _, c := range counts {
						for tick, n := range c[class] {
							sum[tick] += n
						}
					}
					for tick, n := range sum {
						if n > capacity {
							t.Errorf("class %d: %d credits of tick %d, which had %d", class, n, tick, capacity)
						}
					}
					// Nobody is on the way any more: what is left and what was granted make up the capacity.
					for tick := last; tick <= last+View; tick++ {
						w := b.slots[class][tick%ringSize].word.Load()
						if left := uint32(w&creditMask - zero); w>>creditBits != tick || left+sum[tick] != capacity {
							t.Errorf("class %d, tick %d: %d left and %d granted of %d", class, tick, left, sum[tick], capacity)
						}
					}
				}
			})
		}
	}
}

func TestTakeDoesNotAllocate(t *testing.T) {
	b := mustNew(t, Config{R1: Limits{Capacity: 10}, W1: Limits{Capacity: 10, MaxWaitTicks: View}})
	tick := uint64(0)
	if n := testing.AllocsPerRun(1000, func() {
		if _, ok := b.Take(policy.W1); !ok {
			tick++
			b.Advance(tick)
		}
		b.Take(policy.R1)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestRetryAfter(t *testing.T) {
	const tick = 16 * time.Millisecond
	for _, c := range []struct {
		name   string
		ticks  uint32
		len    time.Duration
		jitter uint64
		want   time.Duration
	}{
		{"no jitter: the ticks", 3, tick, 0, 3 * tick},
		{"half of it: half a cycle more", 3, tick, 1 << 63, 7 * tick},
		{"all of it: almost a cycle more", 3, tick, math.MaxUint64, 11*tick - 1},
		{"no ticks", 0, tick, 0, 0},
		{"no tick length", 3, 0, 7, 0},
		{"a negative one", 3, -tick, 7, 0},
		{"more than fits", math.MaxUint32, math.MaxInt64, 0, math.MaxInt64},
		{"a spread that does not fit", 0, math.MaxInt64, math.MaxUint64, math.MaxInt64},
	} {
		if got := RetryAfter(c.ticks, c.len, c.jitter); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}
