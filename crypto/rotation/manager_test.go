package rotation

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
)

// TestDay: a log that runs for thirty days with a call of Settle every 100 minutes changes its key at two thirds of each
// interval, signs throughout, and leaves no other version in the store.
func TestDay(t *testing.T) {
	w := newWorld(t, 1)
	mustNil(t, w.start(nil))
	mustNil(t, w.log.publish(0)) // Tessera signs the empty log when it is made
	for range 30 * 6 * 24 / 10 {
		mustNil(t, w.m.Settle(t.Context()))
		mustNil(t, w.publishes())
		w.time.pass(100 * time.Minute)
	}
	mustNil(t, w.audit())
	st := w.d.statements()
	if n := len(st); n < 40 || n > 46 {
		t.Errorf("%d key statements", n)
	}
	for _, ks := range st[1:] {
		if ks.Ended != receipt.EndedRotated {
			t.Errorf("the key before %d ended %q", ks.FirstSize, ks.Ended)
		}
	}
	alive := 0
	for _, v := range w.store.versions {
		if v.State != keys.Destroyed {
			alive++
		}
	}
	if i := w.m.Info(); alive != 1 || len(i.Retired) != 0 || len(i.Keys) != len(st) || i.Phase != PhaseFresh {
		t.Errorf("%d versions alive, info %+v", alive, i)
	}
}

func TestRotateRevokeSeal(t *testing.T) {
	w := newWorld(t, 1)
	w.mustStart()
	mustNil(t, w.publishes())
	first := w.m.Info().VKey
	info, err := w.m.Rotate(t.Context())
	mustNil(t, err)
	if info.VKey == first || len(info.Keys) != 2 || info.Keys[0].Ended != receipt.EndedRotated || info.Changes[receipt.EndedRotated] != 1 {
		t.Errorf("after Rotate: %+v", info)
	}
	mustNil(t, w.publishes())
	// The key in force, then a past one.
	n, err := w.m.Revoke(t.Context(), "", "laptop stolen")
	mustNil(t, err)
	r, err := receipt.ParseRevocation(n)
	mustNil(t, err)
	if r.Key != info.VKey || r.Size != w.m.Info().Index || r.Root != w.d.root(r.Size) || r.Reason != "laptop stolen" {
		t.Errorf("revocation %+v", r)
	}
	again, err := w.m.Revoke(t.Context(), info.VKey, "other")
	mustNil(t, err)
	if string(again) != string(n) {
		t.Error("a second revocation of one key")
	}
	n, err = w.m.Revoke(t.Context(), first, "as well")
	mustNil(t, err)
	if r, err = receipt.ParseRevocation(n); err != nil || r.Key != first || r.Size != info.Index {
		t.Errorf("revocation %+v, %v", r, err)
	}
	if got := w.m.Info(); len(got.Keys) != 3 || !got.Keys[0].Revoked || !got.Keys[1].Revoked || got.Keys[2].Revoked || len(got.Revocations) != 2 {
		t.Errorf("after Revoke: %+v", got)
	}
	if _, err := w.m.Revoke(t.Context(), "log.example/test+00000000+AAAA", "x"); !errors.Is(err, ErrUnknownKey) {
		t.Errorf("Revoke of a key that never was: %v", err)
	}
	mustNil(t, w.publishes())
	leaf, err := w.m.Seal(t.Context(), "identity key compromised")
	mustNil(t, err)
	s, err := receipt.VerifySeal(leaf, w.idv)
	mustNil(t, err)
	if s.Size+1 != w.d.size() || w.d.cps[len(w.d.cps)-1].head.Size != s.Size+1 {
		t.Errorf("seal %+v, log of size %d", s, w.d.size())
	}
	if w.publishes() == nil || !errors.Is(w.log.publish(1000), ErrSealed) {
		t.Error("something is signed after the seal")
	}
	if _, err := w.m.Rotate(t.Context()); !errors.Is(err, ErrSealed) {
		t.Errorf("Rotate after the seal: %v", err)
	}
	for _, v := range w.store.versions {
		if v.State != keys.Destroyed {
			t.Errorf("version %s is %s", v.ID, v.State)
		}
	}
	mustNil(t, w.audit())
	// Again, for reading, without any key.
	m, err := Open(t.Context(), Config{Origin: testOrigin, Interval: MaxAge, Journal: w.log, Clock: w.log.clock, OnlyPublic: true})
	mustNil(t, err)
	if i := m.Info(); i.Phase != PhaseSealed || !i.SealPublished || string(i.Seal) != string(leaf) || len(i.Keys) != 3 {
		t.Errorf("sealed log: %+v", i)
	}
	if _, err := m.Signer().Sign([]byte(checkpointText(Head{w.d.size(), w.d.root(w.d.size())}))); !errors.Is(err, ErrSealed) {
		t.Errorf("Sign of a sealed log: %v", err)
	}
	if _, _, ok := m.HeaderKey(); ok {
		t.Error("HeaderKey of a sealed log is ok")
	}
	if err := m.Settle(t.Context()); err != nil {
		t.Errorf("Settle of a sealed log: %v", err)
	}
	if got, err := m.Seal(t.Context(), "again"); err != nil || string(got) != string(leaf) {
		t.Errorf("Seal of a sealed log: %v", err)
	}
}

// TestEveryCall fails each call of a log's life in each way, one at a time: the life then goes on to the same end.
func TestEveryCall(t *testing.T) {
	for _, kind := range []struct {
		name string
		f    fault
	}{{"fails", fails}, {"fails though done", failsDone}, {"process ends before", endsBefore}, {"process ends after", endsAfter}} {
		n := 0
		for ; ; n++ {
			w := newWorld(t, 1)
			calls, struck := 0, ""
			draw := func(op string) (fault, error) {
				calls++
				if calls-1 != n {
					return works, nil
				}
				struck = op
				return kind.f, errInjected
			}
			err := life(w, draw)
			if err == nil {
				err = w.audit()
			}
			for _, v := range w.store.versions {
				if err == nil && v.State != keys.Destroyed {
					err = fmt.Errorf("version %s is %s", v.ID, v.State)
				}
			}
			if err != nil {
				t.Fatalf("%s, call %d (%s): %v", kind.name, n, struck, err)
			}
			if struck == "" {
				break
			}
		}
		t.Logf("%s: %d calls", kind.name, n)
	}
}

// life opens a log, signs, replaces its key by hand and because it has expired, revokes one and seals. Each part is tried until it is done.
func life(w *world, draw func(string) (fault, error)) error {
	ctx := w.t.Context()
	parts := []func() error{
		func() error { return w.m.Settle(ctx) },
		func() error { return w.publishes() },
		func() error { _, err := w.m.Rotate(ctx); return err },
		func() error { return w.publishes() },
		func() error { w.time.pass(25 * time.Hour); return w.m.Settle(ctx) },
		func() error { return w.publishes() },
		func() error { _, err := w.m.Revoke(ctx, w.m.Info().Keys[0].VKey, "past"); return err },
		func() error { return w.publishes() },
		func() error { _, err := w.m.Revoke(ctx, w.m.Info().VKey, "in force"); return err },
		func() error { return w.publishes() },
		func() error { _, err := w.m.Seal(ctx, "end"); return err },
		func() error {
			if i := w.m.Info(); i.Phase != PhaseSealed || !i.SealPublished || len(i.Revocations) < 2 || len(i.Retired) > 0 {
				return fmt.Errorf("at the end: %+v", i)
			}
			return nil
		},
	}
	for n, part := range parts {
		var err error
		for range 6 {
			if w.m == nil || w.p.dead {
				if err = w.start(draw); err != nil {
					continue
				}
				if err = w.m.Settle(ctx); err != nil {
					continue
				}
				if w.m.Info().Phase == PhaseSealed {
					break
				}
			}
			if err = part(); err == nil {
				break
			}
			w.time.pass(2 * time.Minute)
			if e := w.m.Settle(ctx); e != nil {
				err = errors.Join(err, e)
			} else if w.m.Info().Phase == PhaseSealed {
				err = nil
				break
			}
		}
		if err != nil {
			return fmt.Errorf("part %d: %w", n, err)
		}
	}
	return nil
}
