package rotation

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
)

var (
	simSeeds = flag.Int("sim.seeds", 48, "number of seeds of TestSimulation")
	simSeed  = flag.Uint64("sim.seed", 0, "the one seed of TestSimulation; 0: all")
	simSteps = flag.Int("sim.steps", 250, "steps of each seed")
	simTrace = flag.Bool("sim.trace", false, "tell every step")
)

// sim is a world with chance, and what must never be.
type sim struct {
	*world
	rand       *rand.Rand
	faults     float64         // probability that a call fails
	superseded map[string]bool // keys that were followed by another in some life of the log
	stated     map[string]*Key // every key that a journal has held
	copies     []*disk         // taken before
	live       *disk           // set aside while a copy runs
	restored   bool            // a copy has been put in place: refusals may come
	mixed      bool            // journal and tree are of different times: latches may come
	killed     map[string]bool // by an operator, in the store
	operator   bool            // this seed has an operator who kills keys; else copies are restored
	stragglers int             // versions that a failed Create may still make
	noted      []byte          // state and size when note looked last
	notedSize  uint64
	bad        []string
	counts     map[string]int
}

func newSim(t testing.TB, seed uint64) *sim {
	s := &sim{
		world: newWorld(t, seed), rand: rand.New(rand.NewPCG(seed, 2)), superseded: map[string]bool{}, stated: map[string]*Key{},
		killed: map[string]bool{}, operator: seed%2 == 0, counts: map[string]int{},
	}
	s.rnd = s.rand.Float64
	s.store.signed = s.onSign
	return s
}

func (s *sim) draw(op string) (fault, error) {
	s.note()
	if s.rand.Float64() >= s.faults {
		return works, nil
	}
	errs := []error{errInjected, keys.ErrUnavailable, keys.ErrCredential, context.DeadlineExceeded}
	err := fmt.Errorf("%s: %w", op, errs[s.rand.IntN(len(errs))])
	f := []fault{fails, fails, failsDone, failsDone, endsBefore, endsAfter}[s.rand.IntN(6)]
	if op == "create" && f == fails && s.rand.IntN(2) == 0 {
		s.stragglers++
	}
	s.counts["fault "+op]++
	return f, err
}

// note remembers the keys of the journal and which of them are over.
func (s *sim) note() {
	if s.d.state == nil || bytes.Equal(s.d.state, s.noted) && s.d.size() == s.notedSize {
		return
	}
	s.noted, s.notedSize = s.d.state, s.d.size()
	st := s.d.parsed(s.t)
	for _, k := range []*Key{st.Current, st.Next} {
		if k != nil {
			s.stated[k.VKey] = k
		}
	}
	all := s.d.statements()
	for _, ks := range all[:max(len(all)-1, 0)] {
		s.superseded[ks.Key] = true
	}
}

// onSign judges each signature where it is made: in the store.
func (s *sim) onSign(v *memVersion, msg []byte) {
	vkey, err := keys.VKey(testOrigin, v.Public)
	if err != nil {
		s.badf("%v", err)
		return
	}
	if bytes.HasPrefix(msg, []byte("knhk/key-proof/v1\n")) {
		return
	}
	s.note()
	k := s.stated[vkey]
	if k == nil {
		s.badf("a key signs that was never stated")
		return
	}
	// The wall and what is durable in the log say the least that the time can be.
	now := s.time.wall
	if t := s.d.lastTime(); t.After(now) {
		now = t
	}
	if c := s.log.clock.Now(); c.After(now) {
		now = c
	}
	if !now.Before(k.NotAfter) || !now.Before(k.NotBefore.Add(s.interval)) {
		s.badf("a key signs %v past its age", now.Sub(k.NotAfter))
	}
	if s.superseded[vkey] {
		s.badf("key stated at %d signs after its successor is in the log: %.60q", k.Index, msg)
	}
	if bytes.HasPrefix(msg, []byte("knhk/")) {
		return // a statement or a seal; the audit of the log judges it
	}
	h, err := parseCheckpoint(testOrigin, msg)
	if err != nil {
		s.badf("a key signs %.60q", msg)
		return
	}
	if h.Size == 0 {
		if k.Index != 0 {
			s.badf("key stated at %d signs the empty log", k.Index)
		}
		return
	}
	var in *receipt.KeyStatement
	for _, ks := range s.d.statements() {
		if ks.FirstSize < h.Size {
			in = ks
		}
	}
	if in == nil || in.Key != vkey || h.Size > s.d.size() || h.Root != s.d.root(h.Size) {
		s.badf("key stated at %d signs size %d of a log of %d", k.Index, h.Size, s.d.size())
	}
}

func (s *sim) badf(format string, args ...any) { s.bad = append(s.bad, fmt.Sprintf(format, args...)) }

// check audits everything there is.
func (s *sim) check() error {
	if len(s.bad) > 0 {
		return errors.New(s.bad[0])
	}
	if err := s.audit(); err != nil {
		return err
	}
	st := s.d.parsed(s.t)
	for _, ks := range s.d.statements() {
		if ks.Ended == receipt.EndedLost && !s.killed[ks.Predecessor] && !s.restored {
			return fmt.Errorf("the key before %d is told to be lost, and nobody touched it", ks.FirstSize)
		}
	}
	if s.m == nil {
		return nil // not open: what is on the disk may be a copy that was refused
	}
	// No version that nobody knows, but for those that Loose counts.
	if unknown := s.unknown(); unknown > st.Loose {
		return fmt.Errorf("%d versions in the store that nobody knows, %d may be", unknown, st.Loose)
	}
	i := s.m.Info()
	if i.Phase == PhaseFailed && !s.mixed {
		return fmt.Errorf("latched: %s", i.LastError)
	}
	return nil
}

// unknown counts the versions in the store that the journal does not know.
func (s *sim) unknown() (n uint64) {
	st := s.d.parsed(s.t)
	for _, v := range s.store.versions {
		if v.State != keys.Destroyed && !st.knows(v.ID) {
			n++
		}
	}
	return n
}

// open begins a process, in spite of what refuses it.
func (s *sim) open() error {
	s.counts["start"]++
	var err error
	for try := range 3 {
		draw := s.draw
		if try > 0 {
			draw = s.noFault
		}
		if err = s.start(draw); err == nil {
			break
		}
		if errors.Is(err, ErrOlderCopy) {
			s.counts["refused"]++
			if !s.restored && len(s.killed) == 0 {
				return fmt.Errorf("refused without a reason: %w", err)
			}
			if s.live != nil && (s.mixed || s.rand.IntN(2) == 0) {
				s.d, s.live, s.mixed = s.live, nil, false // the operator finds the right directory
			} else {
				s.replace = true
				s.live, s.copies = nil, nil
			}
			if err = s.start(s.noFault); errors.Is(err, ErrOlderCopy) {
				s.replace = true // the copy has changed the store before it was found out
				err = s.start(s.noFault)
			}
			s.replace = false
			break
		}
	}
	if err != nil {
		return err
	}
	if !s.mixed {
		s.live = nil // what runs is the log now
	}
	if s.rand.IntN(4) > 0 {
		s.m.Settle(s.t.Context()) // as the log does when it opens
	}
	return nil
}

func (s *sim) noFault(string) (fault, error) { s.note(); return works, nil }

// quiet ends the faults and demands that the log signs.
func (s *sim) quiet() error {
	was := s.faults
	s.faults = 0
	defer func() { s.faults = was }()
	if s.p.dead {
		if err := s.open(); err != nil {
			return err
		}
	}
	var last error
	for range 20 {
		last = s.m.Settle(s.t.Context())
		i := s.m.Info()
		switch {
		case i.Phase == PhaseSealed:
			if s.publishes() == nil {
				return errors.New("something is signed after the seal")
			}
			return nil
		case i.Phase == PhaseFailed && s.mixed:
			s.counts["latched"]++
			s.d, s.live, s.mixed = s.live, nil, false
			if err := s.open(); err != nil {
				return err
			}
		case s.publishes() == nil && len(i.Retired) == 0:
			s.counts["alive"]++
			return nil
		}
		s.time.pass(61 * time.Second)
	}
	return fmt.Errorf("the log does not sign: %+v; Settle: %v; header and checkpoint: %v", s.m.Info(), last, s.publishes())
}

var jumps = []time.Duration{
	time.Second, time.Minute, time.Hour, 16 * time.Hour, 24*time.Hour - time.Second, 24 * time.Hour, 24*time.Hour + time.Second, 48 * time.Hour,
	30 * 24 * time.Hour, 365 * 24 * time.Hour, 10 * 365 * 24 * time.Hour,
}

// step does something.
func (s *sim) step() (what string, err error) {
	ctx := s.t.Context()
	pick := func(d []time.Duration) time.Duration { return d[s.rand.IntN(len(d))] }
	if s.p.dead {
		return "start again", s.open()
	}
	switch n := s.rand.IntN(100); {
	case n < 30:
		s.log.header()
		if s.rand.IntN(3) > 0 {
			s.p.call("publish", func() error { return s.log.publish(s.d.size()) })
		}
		return "header", nil
	case n < 52:
		for range 1 + s.rand.IntN(4) {
			s.m.Settle(ctx)
			s.time.pass(time.Duration(s.rand.Int64N(int64(time.Minute))))
		}
		return "settle", nil
	case n < 60:
		d := pick(jumps[:8])
		if s.rand.IntN(2) == 0 { // to the edge of the key's age
			if i := s.m.Info(); i.Left > 0 {
				d = i.Left + pick([]time.Duration{-time.Second, -1, 0, 1, time.Second})
			}
		}
		s.time.pass(max(d, 0))
		return "pass " + d.String(), nil
	case n < 68:
		d := pick(jumps)
		if s.rand.IntN(2) == 0 {
			d = -d
		}
		if y := s.time.wall.Add(d).Year(); y > 1990 && y < 2200 {
			s.time.jump(d)
		}
		return "jump " + d.String(), nil
	case n < 73:
		s.m.Rotate(ctx)
		return "rotate", nil
	case n < 77:
		vkey := ""
		if k := s.m.Info().Keys; len(k) > 0 && s.rand.IntN(2) == 0 {
			vkey = k[s.rand.IntN(len(k))].VKey
		}
		if len(s.d.parsed(s.t).Revoked) < 20 {
			s.m.Revoke(ctx, vkey, "test")
		}
		return "revoke", nil
	case n < 85:
		s.p.dead = true
		return "end", nil
	case n < 87:
		if s.rand.IntN(8) == 0 {
			s.m.Seal(ctx, "test")
			return "seal", nil
		}
		s.store.dud = true
		return "dud", nil
	case n < 89:
		// A Create that goes on in the store for longer than loosePeriod is beyond what can be told from another log's.
		if s.stragglers > 0 && s.m != nil && s.unknown() < s.d.parsed(s.t).Loose {
			s.stragglers--
			s.store.create()
			return "straggler", nil
		}
		return "nothing", nil
	case n < 92:
		s.interval = pick([]time.Duration{time.Hour, 12 * time.Hour, MaxAge, MaxAge})
		s.p.dead = true
		return "interval " + s.interval.String(), nil
	case s.operator && n < 96:
		if k := s.d.parsed(s.t).Current; k != nil && !s.p.dead {
			s.killed[k.VKey] = true
			s.store.set(k.ID, []keys.State{keys.Disabled, keys.Destroyed}[s.rand.IntN(2)])
			return "operator kills the key", nil
		}
	case !s.operator && n < 96:
		s.copies = append(s.copies, s.d.copy())
		return "copy", nil
	case !s.operator && len(s.copies) > 0 && !s.sealedLeaf():
		c := s.copies[s.rand.IntN(len(s.copies))].copy()
		s.p.dead, s.restored, s.m = true, true, nil
		if s.live == nil {
			s.live = s.d.copy()
		}
		s.note()
		s.counts["restored"]++
		if s.rand.IntN(3) == 0 && !s.mixed {
			s.live = s.d.copy()
			s.d, s.mixed = &disk{state: c.state, leaves: s.d.leaves, cps: s.d.cps}, true
			return "older journal", nil
		}
		s.d, s.mixed = c, false
		return "older copy", nil
	}
	return "nothing", nil
}

func (s *sim) sealedLeaf() bool {
	return s.d.size() > 0 && bytes.HasPrefix(s.d.leaves[s.d.size()-1], []byte(receipt.SealPrefix))
}

// TestSimulation: whatever fails, ends, jumps or is put back, in any order: the log stays as an auditor wants it, no key signs
// what it may not, nothing is left over in the store, and when the faults stop the log signs again.
func TestSimulation(t *testing.T) {
	total := map[string]int{}
	run := func(seed uint64) {
		s := newSim(t, seed)
		var trace []string
		fail := func(err error) {
			if !*simTrace && len(trace) > 25 {
				trace = trace[len(trace)-25:]
			}
			for _, l := range trace {
				t.Log(l)
			}
			t.Fatalf("seed %d: %v", seed, err)
		}
		if err := s.open(); err != nil {
			fail(err)
		}
		for n := range *simSteps {
			// Calm and storm take turns.
			s.faults = []float64{0.02, 0.1, 0.2, 0.4}[n/15%4]
			what, err := s.step()
			s.note()
			st := s.d.parsed(t)
			trace = append(trace, fmt.Sprintf("%d %s: wall %s size %d dead %v err %v", n, what, s.time.wall.Format(time.DateTime), s.d.size(), s.p.dead, err))
			if *simTrace {
				trace = append(trace, fmt.Sprintf("   current %v next %v prepared %v loose %d retired %v seal %d sealed %v", id(st.Current), id(st.Next), st.Prepared, st.Loose, st.Retired, st.SealAt, st.Sealed))
			}
			if err == nil {
				err = s.check()
			}
			if err == nil && n%10 == 9 {
				if err = s.quiet(); err == nil {
					err = s.check()
				}
			}
			if err != nil {
				fail(err)
			}
			if s.d.parsed(t).Sealed && n%10 == 9 {
				s.counts["sealed"]++
				break
			}
		}
		for _, ks := range s.d.statements() {
			s.counts["ended "+ks.Ended]++
		}
		for k, n := range s.counts {
			total[k] += n
		}
	}
	if *simSeed != 0 {
		run(*simSeed)
	} else {
		t.Logf("seeds 1 to %d", *simSeeds)
		for seed := range *simSeeds {
			run(uint64(seed) + 1)
		}
	}
	t.Log(total)
}

func id(k *Key) string {
	if k == nil {
		return "-"
	}
	return fmt.Sprintf("%s@%d", k.ID, k.Index)
}
