package rotation

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/soft"
	"golang.org/x/mod/sumdb/note"
)

func TestOpenRefuses(t *testing.T) {
	w := newWorld(t, 1)
	id, _ := identityKey(t)
	good := func() Config {
		p := &process{}
		l := &memLog{p: p, d: new(disk), clock: w.time.clock(time.Time{})}
		return Config{Origin: testOrigin, Identity: id, Store: storeView{newMemStore(1), p}, Label: testLabel, Algorithm: keys.Ed25519,
			Interval: MaxAge, Journal: l, Clock: l.clock}
	}
	if _, err := Open(t.Context(), good()); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		why, want string
		change    func(*Config)
	}{
		{"interval 0", "interval", func(c *Config) { c.Interval = 0 }},
		{"negative interval", "interval", func(c *Config) { c.Interval = -time.Hour }},
		{"interval of 25 h", "24h0m0s", func(c *Config) { c.Interval = 25 * time.Hour }},
		{"interval of 24 h and 1 ns", "24h0m0s", func(c *Config) { c.Interval = MaxAge + 1 }},
		{"no store", "store", func(c *Config) { c.Store = nil }},
		{"no label", "label", func(c *Config) { c.Label = "" }},
		{"no journal", "journal", func(c *Config) { c.Journal = nil }},
		{"no identity", "identity", func(c *Config) { c.Identity = nil }},
		{"identity of another log", "identity", func(c *Config) { c.Origin = "other" }},
		{"sealed only, and is not", "not sealed", func(c *Config) { c.OnlyPublic = true }},
		{"journal fails", "injected", func(c *Config) {
			c.Journal.(*memLog).p.draw = func(string) (fault, error) { return fails, errInjected }
		}},
		{"store away", "unavailable", func(c *Config) {
			c.Store.(storeView).p.draw = func(op string) (fault, error) {
				if op == "versions" {
					return fails, keys.ErrUnavailable
				}
				return works, nil
			}
		}},
	} {
		cfg := good()
		c.change(&cfg)
		if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v; want one line with %q", c.why, err, c.want)
		}
	}
}

// TestOlderCopy: directories from before, and what is the same to look at.
func TestOlderCopy(t *testing.T) {
	refused := func(t *testing.T, w *world) {
		t.Helper()
		err := w.start(nil)
		if !errors.Is(err, ErrOlderCopy) || !strings.Contains(err.Error(), "--replace-daily-key") {
			t.Fatalf("Open: %v; want %v and the way out", err, ErrOlderCopy)
		}
		w.replace = true
		w.mustStart()
		w.replace = false
	}
	ended := func(t *testing.T, w *world, want string) {
		t.Helper()
		mustNil(t, w.publishes())
		mustNil(t, w.audit())
		st := w.d.statements()
		if got := st[len(st)-1].Ended; got != want {
			t.Errorf("the key ended %q, want %q", got, want)
		}
		for _, v := range w.store.versions {
			if v.State != keys.Destroyed && v.ID != w.d.parsed(t).Current.ID {
				t.Errorf("version %s is %s", v.ID, v.State)
			}
		}
	}
	t.Run("its key was replaced and destroyed", func(t *testing.T) {
		w := newWorld(t, 1)
		w.mustStart()
		mustNil(t, w.publishes())
		c := w.d.copy()
		_, err := w.m.Rotate(t.Context())
		mustNil(t, err)
		w.d = c
		refused(t, w)
		ended(t, w, receipt.EndedLost)
	})
	t.Run("its key was replaced and is still there", func(t *testing.T) {
		w := newWorld(t, 1)
		w.mustStart()
		mustNil(t, w.publishes())
		c := w.d.copy()
		w.p.draw = func(op string) (fault, error) {
			if op == "destroy" {
				return fails, errInjected
			}
			return works, nil
		}
		_, err := w.m.Rotate(t.Context())
		mustNil(t, err)
		w.d = c
		refused(t, w)
		ended(t, w, receipt.EndedUntrusted)
	})
	t.Run("the log was sealed since", func(t *testing.T) {
		w := newWorld(t, 1)
		w.mustStart()
		c := w.d.copy()
		_, err := w.m.Seal(t.Context(), "x")
		mustNil(t, err)
		w.d = c
		refused(t, w)
	})
	// The same states after a crash: they look like a copy, so the key in force signs no more.
	for _, c := range []struct {
		why string
		f   fault
	}{{"crash before Create", endsBefore}, {"crash after Create", endsAfter}} {
		t.Run(c.why, func(t *testing.T) {
			w := newWorld(t, 1)
			w.mustStart()
			mustNil(t, w.publishes())
			w.p.draw = func(op string) (fault, error) {
				if op == "create" {
					return c.f, nil
				}
				return works, nil
			}
			if _, err := w.m.Rotate(t.Context()); !errors.Is(err, errDead) {
				t.Fatal(err)
			}
			mustNil(t, w.start(nil))
			if c.f == endsAfter {
				if _, err := w.m.Signer().Sign(sized(9, 0)); !errors.Is(err, ErrUntrusted) {
					t.Errorf("Sign before the change: %v", err)
				}
			}
			mustNil(t, w.m.Settle(t.Context()))
			mustNil(t, w.publishes())
			if c.f == endsAfter {
				ended(t, w, receipt.EndedUntrusted)
			} else if n := len(w.d.statements()); n != 1 {
				t.Errorf("%d statements, want the one that is in force", n)
			}
		})
	}
	// Between the note of the new version and its statement, and between the statement's note and the log.
	for _, c := range []struct{ op, want string }{{"signer", receipt.EndedUntrusted}, {"put", receipt.EndedRotated}} {
		t.Run("crash before "+c.op, func(t *testing.T) {
			w := newWorld(t, 1)
			w.mustStart()
			mustNil(t, w.publishes())
			w.p.draw = func(op string) (fault, error) {
				if op == c.op {
					return endsBefore, nil
				}
				return works, nil
			}
			if _, err := w.m.Rotate(t.Context()); !errors.Is(err, errDead) {
				t.Fatal(err)
			}
			mustNil(t, w.start(nil))
			if _, err := w.m.Signer().Sign(sized(9, 0)); err == nil {
				t.Error("the old key signs before the change")
			}
			mustNil(t, w.m.Settle(t.Context()))
			ended(t, w, c.want)
		})
	}
	t.Run("the flag does nothing without a reason", func(t *testing.T) {
		w := newWorld(t, 1)
		w.mustStart()
		w.replace = true
		w.mustStart()
		if n := len(w.d.statements()); n != 1 {
			t.Errorf("%d statements", n)
		}
	})
	t.Run("a directory that was told to replace its key does so though it ended first", func(t *testing.T) {
		w := newWorld(t, 1)
		w.mustStart()
		mustNil(t, w.publishes())
		w.store.set(w.d.parsed(t).Current.ID, keys.Destroyed)
		if err := w.start(nil); !errors.Is(err, ErrOlderCopy) {
			t.Fatal(err)
		}
		w.replace = true
		mustNil(t, w.start(nil)) // and ends before Settle
		w.replace = false
		w.mustStart()
		ended(t, w, receipt.EndedLost)
	})
	t.Run("versions of another log that were there before", func(t *testing.T) {
		w := newWorld(t, 1)
		w.store.create()
		w.mustStart()
		w.mustStart()
		if s := w.store.state("v1"); s != keys.Enabled {
			t.Errorf("the other log's key is %s", s)
		}
	})
}

// TestMixed: a journal from before beside the log of today latches before anything is signed or made.
func TestMixed(t *testing.T) {
	w := newWorld(t, 1)
	w.mustStart()
	mustNil(t, w.publishes())
	old := w.d.copy()
	_, err := w.m.Rotate(t.Context())
	mustNil(t, err)
	mustNil(t, w.publishes())
	w.d = &disk{state: old.state, leaves: w.d.leaves, cps: w.d.cps}
	w.replace = true
	mustNil(t, w.start(nil))
	if err := w.m.Settle(t.Context()); err == nil || !strings.Contains(err.Error(), "mixed from copies") {
		t.Errorf("Settle: %v", err)
	}
	if i := w.m.Info(); i.Phase != PhaseFailed || w.publishes() == nil {
		t.Errorf("it goes on: %+v", i)
	}
}

// TestClockAtBoot: overdue rotates at once; a wall behind the log's time rotates before anything is signed.
func TestClockAtBoot(t *testing.T) {
	for _, c := range []struct {
		why        string
		pass, jump time.Duration
		want       string // why the first key ended; empty: it did not
	}{
		{"soon", time.Hour, 0, ""},
		{"due", 17 * time.Hour, 0, receipt.EndedRotated},
		{"expired", 24 * time.Hour, 0, receipt.EndedExpired},
		{"a month later", 30 * 24 * time.Hour, 0, receipt.EndedExpired},
		{"back by no more than readings differ", 0, -wallSlack, ""},
		{"back by a second", 0, -time.Second, receipt.EndedUntrusted},
		{"back by ten years", time.Hour, -10 * 365 * 24 * time.Hour, receipt.EndedUntrusted},
		{"ahead by ten years", time.Hour, 10 * 365 * 24 * time.Hour, receipt.EndedExpired},
	} {
		t.Run(c.why, func(t *testing.T) {
			w := newWorld(t, 1)
			w.mustStart()
			mustNil(t, w.publishes())
			w.time.pass(c.pass)
			w.time.jump(c.jump)
			mustNil(t, w.start(nil))
			size := w.d.size()
			if c.want != "" && c.want != receipt.EndedRotated && w.log.publish(size+1) == nil {
				t.Error("the old key signs")
			}
			mustNil(t, w.m.Settle(t.Context()))
			mustNil(t, w.publishes())
			mustNil(t, w.audit())
			got := ""
			if st := w.d.statements(); len(st) > 1 {
				got = st[len(st)-1].Ended
			}
			if got != c.want {
				t.Errorf("the key ended %q, want %q", got, c.want)
			}
		})
	}
}

// TestSoftStore: the same over a store of this module, opened anew with each process.
func TestSoftStore(t *testing.T) {
	w := newWorld(t, 1)
	dir := filepath.Join(t.TempDir(), "keys")
	id, _ := identityKey(t)
	start := func() {
		t.Helper()
		s, err := soft.Open(dir)
		mustNil(t, err)
		t.Cleanup(func() { s.Close() })
		w.p = new(process)
		w.log = &memLog{p: w.p, d: w.d, clock: w.time.clock(w.d.lastTime())}
		w.m, err = Open(t.Context(), Config{Origin: testOrigin, Identity: id, Store: s, Label: testLabel, Algorithm: keys.P256, Interval: MaxAge,
			Journal: w.log, Clock: w.log.clock})
		mustNil(t, err)
		w.log.m, w.log.sign = w.m, []note.Signer{id, w.m.Signer()}
		w.m.SetTree(w.log)
		mustNil(t, w.m.Settle(t.Context()))
		mustNil(t, w.publishes())
	}
	for range 3 {
		start()
		_, err := w.m.Rotate(t.Context())
		mustNil(t, err)
		mustNil(t, w.publishes())
		w.time.pass(17 * time.Hour)
	}
	start()
	// The first key, three by hand, three that were due at a start.
	if i := w.m.Info(); len(i.Keys) != 7 || len(i.Retired) != 0 {
		t.Errorf("%d keys, retired %v", len(i.Keys), i.Retired)
	}
	_, err := w.m.Seal(t.Context(), "end")
	mustNil(t, err)
	mustNil(t, w.audit())
}

// labelled is a store in which a version is found under its own label only.
type labelled struct{ storeView }

func (l labelled) Versions(ctx context.Context, label string) (out []keys.Version, err error) {
	all, err := l.storeView.Versions(ctx, label)
	for _, v := range all {
		if v.Label == label {
			out = append(out, v)
		}
	}
	return out, err
}

func (l labelled) Destroy(ctx context.Context, label, id string) error {
	if label == testLabel {
		return keys.ErrUnavailable
	}
	return l.storeView.Destroy(ctx, label, id)
}

// TestRetiredUnderAnotherLabel changes the label of the daily key: a version under the one before is not said to be destroyed while
// the store has it.
func TestRetiredUnderAnotherLabel(t *testing.T) {
	w := newWorld(t, 1)
	w.mustStart()
	w.m.cfg.Store = labelled{w.m.cfg.Store.(storeView)}
	if _, err := w.m.Rotate(t.Context()); err != nil { // the old version is retired, and cannot be destroyed
		t.Fatal(err)
	}
	w.m.cfg.Label = "another"
	if err := w.m.destroyRetired(t.Context()); err == nil {
		t.Error("no error for a key that cannot be destroyed")
	}
	if n := len(w.m.Info().Retired); n != 1 {
		t.Errorf("%d retired versions", n)
	}
}
