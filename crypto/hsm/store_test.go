//go:build cgo

package hsm

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/keys/keystest"
)

func TestFakeConformance(t *testing.T) {
	f := newFake()
	reg := f.registry()
	keystest.Run(t, func(t *testing.T) keys.Store { return f.open(t, reg, nil) })
	f.audit(t)
	if f.initialized {
		t.Error("C_Finalize was not called at the end")
	}
}

// gate blocks calls of one function until opened.
type gate struct {
	call string
	free chan struct{}
	in   chan struct{} // one value for each call that stands in the gate
}

func newGate(f *fake, call string) *gate {
	g := &gate{call: call, free: make(chan struct{}), in: make(chan struct{}, 100)}
	f.set(func(f *fake) {
		f.hook = func(call string) (bool, error) {
			if call == g.call {
				g.in <- struct{}{}
				<-g.free
			}
			return false, nil
		}
	})
	return g
}

func closeStore(t *testing.T, s *Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

// TestContextEndsInC: a caller returns at the end of its context, exactly, while C_Sign blocks; the other session serves on;
// the abandoned operation finishes later and hurts nobody.
func TestContextEndsInC(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		s := f.open(t, f.registry(), nil)
		defer closeStore(t, s)
		_, sg := mustCreate(t, s, keys.Ed25519)
		g := newGate(f, "C_Sign")
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		start := time.Now()
		msg := []byte("the caller's again after Sign")
		if _, err := sg.Sign(ctx, msg); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Sign: %v, want %v", err, context.DeadlineExceeded)
		}
		clear(msg)
		if took := time.Since(start); took != 50*time.Millisecond {
			t.Errorf("Sign returned after %v, want 50ms", took)
		}
		f.set(func(f *fake) { f.hook = nil })
		mustSign(t, sg)
		close(g.free)
		synctest.Wait()
		mustSign(t, sg)
		f.audit(t)
	})
}

// TestAllWorkersStuck: what a token that hangs costs is bounded: two calls in C, three in the queue, the sixth is refused.
func TestAllWorkersStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		s := f.open(t, f.registry(), func(c *Config) { c.Sessions, c.Queue = 2, 3 })
		defer closeStore(t, s)
		_, sg := mustCreate(t, s, keys.P256)
		before := f.count("C_Sign")
		g := newGate(f, "C_Sign")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var wg sync.WaitGroup
		sign := func() {
			if _, err := sg.Sign(ctx, nil); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Sign: %v, want %v", err, context.DeadlineExceeded)
			}
		}
		for range 2 {
			wg.Go(sign)
		}
		synctest.Wait() // both stand in C_Sign
		for range 3 {
			wg.Go(sign)
		}
		synctest.Wait() // three wait
		if _, err := sg.Sign(ctx, nil); !errors.Is(err, keys.ErrUnavailable) {
			t.Errorf("Sign with the queue full: %v, want %v", err, keys.ErrUnavailable)
		}
		wg.Wait() // all gave up
		close(g.free)
		synctest.Wait()
		if n := f.count("C_Sign") - before; n != 2 {
			t.Errorf("%d calls of C_Sign, want 2: callers that had gone need none", n)
		}
		mustSign(t, sg)
		f.audit(t)
	})
}

// TestAbandonedCreate: a version whose creator has gone does not stay.
func TestAbandonedCreate(t *testing.T) {
	for _, call := range []string{"C_GenerateKeyPair", "C_Sign", "C_FindObjectsInit"} {
		t.Run(call, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake()
				s := f.open(t, f.registry(), nil)
				defer closeStore(t, s)
				g := newGate(f, call)
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				if _, err := s.Create(ctx, "log", keys.Ed25519); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("Create: %v, want %v", err, context.DeadlineExceeded)
				}
				close(g.free)
				synctest.Wait()
				if vs, err := s.Versions(t.Context(), "log"); err != nil || len(vs) != 0 || len(f.objects) != 0 {
					t.Errorf("%d versions, %v, %d objects; want none", len(vs), err, len(f.objects))
				}
				f.audit(t)
			})
		})
	}
}

// TestCloseWhileStuck: Close gives up after its timeout and does not finalize under the call; that happens when it is back.
func TestCloseWhileStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		s := f.open(t, f.registry(), func(c *Config) { c.Sessions, c.CloseTimeout = 1, 3*time.Second })
		_, sg := mustCreate(t, s, keys.Ed25519)
		g := newGate(f, "C_Sign")
		var wg sync.WaitGroup
		for range 2 { // one in C, one in the queue; neither has a deadline
			wg.Go(func() {
				if sig, err := sg.Sign(context.Background(), nil); !errors.Is(err, errClosed) || sig != nil {
					t.Errorf("Sign = %d bytes, %v; want %v", len(sig), err, errClosed)
				}
			})
			synctest.Wait()
		}
		start := time.Now()
		if err := s.Close(); !errors.Is(err, errStuck) || time.Since(start) != 3*time.Second {
			t.Errorf("Close: %v after %v; want %v after 3s", err, time.Since(start), errStuck)
		}
		wg.Wait()
		if !f.initialized {
			t.Error("C_Finalize was called while C_Sign blocked")
		}
		close(g.free)
		synctest.Wait()
		if f.initialized || len(f.sessions) != 0 {
			t.Errorf("after the call came back: initialized %v, %d sessions; want false, 0", f.initialized, len(f.sessions))
		}
		f.audit(t)
	})
}

// TestRecoveryWhileStuck: a loss that only C_Initialize could heal is not healed while a call stands in C; nothing is
// finalized under it, and afterwards all is well.
func TestRecoveryWhileStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		s := f.open(t, f.registry(), nil)
		defer closeStore(t, s)
		_, sg := mustCreate(t, s, keys.Ed25519)
		g := newGate(f, "C_Sign")
		var wg sync.WaitGroup
		wg.Go(func() { // comes back from C to a session that is gone, and recovers
			if _, err := sg.Sign(context.Background(), nil); err != nil {
				t.Errorf("the stuck Sign: %v", err)
			}
		})
		synctest.Wait()
		f.set(func(f *fake) { f.drop(); f.absent = true })
		restarts := f.count("C_Finalize")
		_, err := s.Versions(t.Context(), "log")
		if !errors.Is(err, keys.ErrUnavailable) || !errors.Is(err, errStuck) {
			t.Errorf("Versions with the token gone and another call stuck: %v; want %v", err, keys.ErrUnavailable)
		}
		if n := f.count("C_Finalize"); n != restarts {
			t.Errorf("%d calls of C_Finalize while C_Sign blocks, want none", n-restarts)
		}
		f.set(func(f *fake) { f.absent = false })
		close(g.free)
		f.set(func(f *fake) { f.hook = nil })
		wg.Wait()
		time.Sleep(10 * time.Second) // past the circuit breaker
		mustSign(t, sg)
		f.audit(t)
	})
}

// TestPINLocks: the token's counter of wrong PINs is never used up by this package.
func TestPINLocks(t *testing.T) {
	f := newFake()
	reg := f.registry()
	wrong := func(pin string) error {
		cfg := fakeConfig()
		cfg.PIN = func() (string, error) { return pin, nil }
		s, err := open(t.Context(), cfg, reg)
		if err == nil {
			closeStore(t, s)
		}
		return err
	}
	for range 5 {
		if err := wrong("0000"); !errors.Is(err, keys.ErrCredential) {
			t.Fatalf("Open: %v, want %v", err, keys.ErrCredential)
		}
	}
	if n := f.count("C_Login"); n != 1 || f.tries != 2 {
		t.Errorf("one wrong PIN, tried five times: %d logins, %d tries left; want 1, 2", n, f.tries)
	}
	// The token warns: not even another PIN is tried. That is no refusal of ours, so it is not latched.
	f.flags = pkcs11.CKF_USER_PIN_FINAL_TRY
	for _, pin := range []string{"1111", testPIN} {
		if err := wrong(pin); !errors.Is(err, errLastTry) || !errors.Is(err, keys.ErrUnavailable) || f.count("C_Login") != 1 {
			t.Errorf("Open at the last try: %v, %d logins; want %v and no login", err, f.count("C_Login"), errLastTry)
		}
	}
	// The warning is gone, as after a login with the vendor's tool: the right PIN works.
	f.flags = 0
	if err := wrong(testPIN); err != nil {
		t.Errorf("Open with the right PIN: %v", err)
	}
	// The token says it is locked: then no PIN is tried any more.
	f.flags = pkcs11.CKF_USER_PIN_LOCKED
	before := f.count("C_Login")
	for _, pin := range []string{"2222", testPIN} {
		if err := wrong(pin); !errors.Is(err, keys.ErrCredential) {
			t.Errorf("Open on a locked token: %v, want %v", err, keys.ErrCredential)
		}
	}
	if n := f.count("C_Login"); n != before {
		t.Errorf("%d logins on a locked token, want none", n-before)
	}
	f.audit(t)
}

// TestPINRefusedLater: the PIN changes while sessions are lost. The store says so and does not knock again.
func TestPINRefusedLater(t *testing.T) {
	f := newFake()
	s := f.open(t, f.registry(), nil)
	defer closeStore(t, s)
	v, sg := mustCreate(t, s, keys.Ed25519)
	f.set(func(f *fake) { f.drop(); f.pin = "changed" })
	before := f.count("C_Login")
	for range 10 {
		if _, err := sg.Sign(t.Context(), nil); !errors.Is(err, keys.ErrCredential) {
			t.Fatalf("Sign: %v, want %v", err, keys.ErrCredential)
		}
	}
	if err := s.Check(t.Context(), v.Label); !errors.Is(err, keys.ErrCredential) {
		t.Errorf("Check: %v, want %v", err, keys.ErrCredential)
	}
	if n := f.count("C_Login") - before; n != 1 {
		t.Errorf("%d logins with a PIN that is wrong, want 1", n)
	}
	f.audit(t)
}

// TestPINSourceFails: a PIN file that cannot be read is worth another try; the token is not asked.
func TestPINSourceFails(t *testing.T) {
	f := newFake()
	cfg := fakeConfig()
	cfg.PIN = func() (string, error) { return "", errors.New("no such file") }
	if _, err := open(t.Context(), cfg, f.registry()); !errors.Is(err, keys.ErrUnavailable) || f.count("C_Login") != 0 {
		t.Errorf("Open: %v after %d logins; want %v after none", err, f.count("C_Login"), keys.ErrUnavailable)
	}
	f.audit(t)
}

// TestWrongSignatures: a token that computes wrongly never gets a signature, or a version, past this package.
func TestWrongSignatures(t *testing.T) {
	f := newFake()
	s := f.open(t, f.registry(), nil)
	defer closeStore(t, s)
	for _, alg := range []keys.Algorithm{keys.Ed25519, keys.P256} {
		v, sg := mustCreate(t, s, alg)
		objects := len(f.objects)
		f.set(func(f *fake) { f.corrupt = true })
		if sig, err := sg.Sign(t.Context(), nil); err == nil || sig != nil {
			t.Errorf("%s: Sign = %d bytes, %v; want an error", alg, len(sig), err)
		}
		if err := s.Check(t.Context(), v.Label); err == nil {
			t.Errorf("%s: Check passed", alg)
		}
		if _, err := s.Create(t.Context(), "log", alg); err == nil || len(f.objects) != objects {
			t.Errorf("%s: Create: %v, %d new objects; want an error and none", alg, err, len(f.objects)-objects)
		}
		f.set(func(f *fake) { f.corrupt = false })
		mustSign(t, sg)
	}
	f.audit(t)
}

// TestSwappedKey: after a reset another key stands under the label and id, as on a token restored from elsewhere.
func TestSwappedKey(t *testing.T) {
	f := newFake()
	s := f.open(t, f.registry(), nil)
	defer closeStore(t, s)
	v, sg := mustCreate(t, s, keys.Ed25519)
	raw(t, s, func(se *session) error {
		n := name{v.Label, v.ID}
		return errors.Join(se.erase(n), se.generate(n, keys.Ed25519))
	})
	f.set(func(f *fake) { f.drop() })
	if _, err := sg.Sign(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "another key") {
		t.Errorf("Sign: %v; want a refusal of the other key", err)
	}
	f.audit(t)
}

// TestHandlesReused: a token that was reset counts sessions from 1 again, so a lost handle may be another worker's new one.
// No two calls meet on one session, and no signature fails.
func TestHandlesReused(t *testing.T) {
	f := newFake()
	f.reuse = true
	s := f.open(t, f.registry(), func(c *Config) { c.Sessions = 4 })
	defer closeStore(t, s)
	_, sg := mustCreate(t, s, keys.P256)
	// Every 40th signature begins with a reset, between C_SignInit and C_Sign of others as it happens.
	inits, resets := 0, 0
	f.set(func(f *fake) {
		f.hook = func(call string) (bool, error) {
			if call == "C_SignInit" {
				f.set(func(f *fake) {
					if inits++; inits%40 == 0 {
						f.drop()
						resets++
					}
				})
			}
			return false, nil
		}
	})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 100 {
				msg := fmt.Appendf(nil, "%d", i)
				if sig, err := sg.Sign(t.Context(), msg); err != nil {
					t.Errorf("Sign: %v", err)
				} else if err := keys.Verify(keys.P256, sg.Public(), msg, sig); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if resets < 10 {
		t.Errorf("only %d resets", resets)
	}
	f.audit(t)
}

// TestForeignInitialize: something else in the process has initialized the module. It is used, and not finalized.
func TestForeignInitialize(t *testing.T) {
	f := newFake()
	f.foreign = true
	s := f.open(t, f.registry(), nil)
	_, sg := mustCreate(t, s, keys.Ed25519)
	mustSign(t, sg)
	closeStore(t, s)
	if n := f.count("C_Finalize"); n != 0 {
		t.Errorf("C_Finalize was called %d times on a module that is not ours", n)
	}
	f.audit(t)
}

func TestOpenContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		g := newGate(f, "C_Initialize")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		s, err := open(ctx, fakeConfig(), f.registry())
		if took := time.Since(start); s != nil || !errors.Is(err, context.DeadlineExceeded) || took != time.Second {
			t.Errorf("Open while C_Initialize blocks: %v after %v, want %v after 1s", err, took, context.DeadlineExceeded)
		}
		close(g.free)
		synctest.Wait()
		if f.initialized {
			t.Error("the module stayed initialized for nobody")
		}
		f.audit(t)
	})
}

func TestConfig(t *testing.T) {
	_, err := Config{Module: "x.so", Sessions: 65, Queue: -1, CloseTimeout: -1}.withDefaults()
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"not absolute", "token label", "source of the PIN", "65 sessions", "queue of -1", "close timeout"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q in it: everything wrong is named at once", err, want)
		}
	}
	c, err := fakeConfig().withDefaults()
	if err != nil || c.Sessions != 2 || c.Queue != 256 || c.CloseTimeout != 5*time.Second || c.Log == nil {
		t.Errorf("defaults: %+v, %v", c, err)
	}
}
