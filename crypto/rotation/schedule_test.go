package rotation

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"log/slog"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
)

func TestDue(t *testing.T) {
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, life := range []time.Duration{time.Second, time.Hour, MaxAge} {
		for _, r := range []float64{0, 0.5, 0.999} {
			got := due(begin, begin.Add(life), r).Sub(begin)
			if least, most := life*63/100, life*71/100; got < least || got > most {
				t.Errorf("life %v, chance %v: due after %v, want between %v and %v", life, r, got, least, most)
			}
		}
	}
	if a, b := due(begin, begin.Add(MaxAge), 0), due(begin, begin.Add(MaxAge), 0.9); !a.Before(b) {
		t.Error("no jitter")
	}
}

func TestPhaseAt(t *testing.T) {
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(d time.Duration) time.Time { return begin.Add(d) }
	for _, c := range []struct {
		age  time.Duration
		want Phase
	}{
		{0, PhaseFresh}, {16*time.Hour - 1, PhaseFresh}, {16 * time.Hour, PhaseDue}, {18*time.Hour - 1, PhaseDue}, {18 * time.Hour, PhaseWarn},
		{20*time.Hour - 1, PhaseWarn}, {20 * time.Hour, PhaseAlarm}, {24*time.Hour - 1, PhaseAlarm}, {24 * time.Hour, PhaseExpired},
		{1000 * time.Hour, PhaseExpired},
	} {
		if got := phaseAt(at(c.age), begin, at(16*time.Hour), at(24*time.Hour)); got != c.want {
			t.Errorf("age %v: %s, want %s", c.age, got, c.want)
		}
	}
}

func TestPace(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	var p pace
	if !p.ready(now) {
		t.Error("the first attempt waits")
	}
	for _, want := range []float64{1, 2, 4, 8, 16, 32, 60, 60} {
		p.failed(now, errInjected, 0)
		if got := p.next.Sub(now).Seconds(); got != want {
			t.Errorf("next attempt after %v, want %v s", got, want)
		}
	}
	p.failed(now, errInjected, 0.99)
	if got := p.next.Sub(now); got >= time.Minute || got < 45*time.Second {
		t.Errorf("with chance: after %v", got)
	}
	p.succeeded()
	p.failed(now, fmt.Errorf("x: %w", keys.ErrCredential), 0)
	if got := p.next.Sub(now); got != time.Minute {
		t.Errorf("a refused credential is tried again after %v", got)
	}
}

// TestClock: never back, whatever the wall does; between readings of the wall the monotonic clock counts.
func TestClock(t *testing.T) {
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	tt := &testTime{wall: at}
	c := tt.clock(at.Add(-time.Hour))
	is := func(why string, want time.Time, behind time.Duration) {
		t.Helper()
		if now, b := c.Now(), c.Behind(); !now.Equal(want) || b != behind {
			t.Errorf("%s: %v, %v behind; want %v, %v", why, now, b, want, behind)
		}
	}
	is("wall ahead of the floor", at, 0)
	tt.jump(-time.Hour)
	is("wall set back", at, time.Hour)
	tt.pass(time.Minute)
	is("time passes all the same", at.Add(time.Minute), time.Hour)
	tt.jump(2 * time.Hour)
	is("wall set ahead", at.Add(time.Hour+time.Minute), 0)
	c.raise(at.Add(3 * time.Hour))
	is("raised", at.Add(3*time.Hour), 119*time.Minute)
	c.raise(at)
	is("not lowered", at.Add(3*time.Hour), 119*time.Minute)
	// The public constructor: readings with a monotonic part.
	n := NewClock(time.Now, time.Now().Add(time.Hour))
	a := n.Now()
	if b := n.Now(); b.Before(a) || n.Behind() < 59*time.Minute || a.Location() != time.UTC {
		t.Errorf("%v then %v, %v behind", a, b, n.Behind())
	}
}

// heard collects log lines.
type heard struct{ lines []string }

func (h *heard) Enabled(context.Context, slog.Level) bool { return true }
func (h *heard) WithAttrs([]slog.Attr) slog.Handler       { return h }
func (h *heard) WithGroup(string) slog.Handler            { return h }
func (h *heard) Handle(_ context.Context, r slog.Record) error {
	h.lines = append(h.lines, r.Level.String()+" "+r.Message)
	return nil
}

// TestStoreAway: while the store is away the key is warned of, alarmed of, refuses; it is never told to be lost; attempts keep
// their pace; when the store is back the log signs without a restart.
func TestStoreAway(t *testing.T) {
	for _, away := range []error{keys.ErrUnavailable, keys.ErrCredential, context.DeadlineExceeded, errInjected} {
		t.Run(away.Error(), func(t *testing.T) {
			w := newWorld(t, 1)
			w.mustStart()
			mustNil(t, w.publishes())
			h := new(heard)
			w.m.cfg.Log = slog.New(h)
			calls := map[string]int{}
			w.p.draw = func(op string) (fault, error) {
				switch op {
				case "versions", "create", "signer", "sign", "destroy":
					calls[op]++
					return fails, away
				}
				return works, nil
			}
			phases := map[Phase]bool{}
			for range 25 * 60 * 6 { // 25 h, every 10 s
				w.m.Settle(t.Context())
				phases[w.m.Info().Phase] = true
				w.time.pass(10 * time.Second)
			}
			for _, p := range []Phase{PhaseFresh, PhaseDue, PhaseWarn, PhaseAlarm, PhaseExpired} {
				if !phases[p] {
					t.Errorf("phase %s was never told", p)
				}
			}
			if len(phases) != 5 {
				t.Errorf("phases %v", phases)
			}
			if got := strings.Join(h.lines, "; "); got != "WARN daily key was not replaced in time and will refuse to sign; "+
				"ERROR daily key is about to refuse to sign; ERROR daily key does not sign" {
				t.Errorf("log: %s", got)
			}
			i := w.m.Info()
			// From 16 h on, at most one attempt in 45 s after the first few.
			if n := calls["versions"]; n > 9*3600/45+10 || n < 60 {
				t.Errorf("%d attempts in 9 h", n)
			}
			if i.LastError == "" || i.NextAttempt.IsZero() || i.Failures[string(keys.Kind(away))] == 0 {
				t.Errorf("info %+v", i)
			}
			if _, _, ok := w.m.HeaderKey(); ok {
				t.Error("headers go on past the key's age")
			}
			w.p.draw = nil
			w.time.pass(time.Minute)
			mustNil(t, w.m.Settle(t.Context()))
			mustNil(t, w.publishes())
			mustNil(t, w.audit())
			if st := w.d.statements(); len(st) != 2 || st[1].Ended != receipt.EndedExpired {
				t.Errorf("%d statements, the last %+v", len(st), st[len(st)-1])
			}
			if i := w.m.Info(); i.LastError != "" || !i.NextAttempt.IsZero() || i.Phase != PhaseFresh {
				t.Errorf("afterwards: %+v", i)
			}
		})
	}
}

// TestLost: a key that the store has disabled or destroyed is replaced in a process that lives, as soon as a signature shows it.
func TestLost(t *testing.T) {
	for _, state := range []keys.State{keys.Disabled, keys.Destroyed} {
		w := newWorld(t, 1)
		w.mustStart()
		mustNil(t, w.publishes())
		w.store.set("v1", state)
		if w.publishes() == nil {
			t.Fatal("it signs")
		}
		mustNil(t, w.m.Settle(t.Context()))
		mustNil(t, w.publishes())
		mustNil(t, w.audit())
		if st := w.d.statements(); len(st) != 2 || st[1].Ended != receipt.EndedLost || st[1].Predecessor == "" {
			t.Errorf("%s: %+v", state, st[len(st)-1])
		}
	}
}

// TestLostForAMoment: a token that loses its session says for a moment that there is no such key. It is asked again, and believed.
func TestLostForAMoment(t *testing.T) {
	w := newWorld(t, 1)
	w.mustStart()
	mustNil(t, w.publishes())
	w.p.draw = func(op string) (fault, error) {
		if op == "sign" {
			return fails, keys.ErrNotFound
		}
		return works, nil
	}
	if w.publishes() == nil {
		t.Fatal("it signs")
	}
	w.p.draw = func(op string) (fault, error) { // the second look finds the store away
		if op == "signer" {
			return fails, keys.ErrUnavailable
		}
		return works, nil
	}
	mustNil(t, w.m.Settle(t.Context()))
	w.p.draw = nil
	mustNil(t, w.m.Settle(t.Context()))
	mustNil(t, w.publishes())
	if n := len(w.d.statements()); n != 1 {
		t.Errorf("%d statements: the key was replaced", n)
	}
}

// TestDud: a fresh version that cannot be used is dropped and destroyed, and the next attempt makes another.
func TestDud(t *testing.T) {
	w := newWorld(t, 1)
	w.mustStart()
	w.store.dud = true
	if _, err := w.m.Rotate(t.Context()); !errors.Is(err, keys.ErrDisabled) {
		t.Fatalf("Rotate: %v", err)
	}
	_, err := w.m.Rotate(t.Context())
	mustNil(t, err)
	if a, b, c := w.store.state("v1"), w.store.state("v2"), w.store.state("v3"); a != keys.Destroyed || b != keys.Destroyed || c != keys.Enabled {
		t.Errorf("versions are %s, %s, %s", a, b, c)
	}
	mustNil(t, w.publishes())
	mustNil(t, w.audit())
}

// TestDestroyIsTrue: a version is not told to be destroyed before it is; a store that does not do it is asked again.
func TestDestroyIsTrue(t *testing.T) {
	w := newWorld(t, 1)
	w.mustStart()
	w.p.draw = func(op string) (fault, error) {
		if op == "destroy" {
			return fails, nil // it says that it has, and has not
		}
		return works, nil
	}
	_, err := w.m.Rotate(t.Context())
	mustNil(t, err)
	if i := w.m.Info(); len(i.Retired) != 1 || w.store.state("v1") != keys.Enabled {
		t.Errorf("retired %v while the version is %s", i.Retired, w.store.state("v1"))
	}
	w.p.draw = nil
	w.time.pass(time.Minute)
	mustNil(t, w.m.Settle(t.Context()))
	if i := w.m.Info(); len(i.Retired) != 0 || w.store.state("v1") != keys.Destroyed {
		t.Errorf("retired %v, the version is %s", i.Retired, w.store.state("v1"))
	}
}

// TestPublisherStuck: a publisher that makes no checkpoint delays a key change and does not prevent it.
func TestPublisherStuck(t *testing.T) {
	w := newWorld(t, 1)
	w.mustStart()
	w.log.header()
	w.time.pass(17 * time.Hour)
	w.p.draw = func(op string) (fault, error) {
		if op == "published" {
			return fails, context.DeadlineExceeded
		}
		return works, nil
	}
	mustNil(t, w.m.Settle(t.Context()))
	if st := w.d.statements(); len(st) != 2 || st[1].Ended != receipt.EndedRotated {
		t.Fatalf("%d statements", len(st))
	}
	if _, err := w.m.Rotate(t.Context()); err == nil || !strings.Contains(err.Error(), "in force, but") {
		t.Errorf("Rotate: %v", err)
	}
	w.p.draw = nil
	mustNil(t, w.publishes())
	mustNil(t, w.audit())
}

// TestBadReason: what no note can hold is refused before it is in the journal.
func TestBadReason(t *testing.T) {
	w := newWorld(t, 1)
	w.mustStart()
	for _, reason := range []string{strings.Repeat("x", 100_000), "\xff"} {
		if _, err := w.m.Revoke(t.Context(), "", reason); err == nil {
			t.Error("Revoke takes it")
		}
		if _, err := w.m.Seal(t.Context(), reason); err == nil {
			t.Error("Seal takes it")
		}
	}
	if s := w.d.parsed(t); s.Revoking != nil || s.Sealing != nil || len(s.Past) > 0 {
		t.Errorf("state %+v", s)
	}
}
