//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/pkcs11"
	"github.com/sony/gobreaker/v2"

	"github.com/knhk/sidecar/crypto/keys"
)

// All of these run on the module in memory, in bubbles: time is the bubble's, and nothing in it calls C.

// TestBreaker walks the circuit breaker through its states: what is counted is calls of the module, never time of a clock.
func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		var logged bytes.Buffer
		s := f.open(t, f.registry(), func(c *Config) { c.Sessions, c.Log = 1, slog.New(slog.NewTextHandler(&logged, nil)) })
		defer closeStore(t, s)
		v, sg := mustCreate(t, s, keys.Ed25519)
		state := func(want gobreaker.State) {
			t.Helper()
			if got := s.tok.current().cb.State(); got != want {
				t.Fatalf("the breaker is %v, want %v", got, want)
			}
		}
		tries := func(want int) func() {
			before := f.count("C_Initialize")
			return func() {
				t.Helper()
				if n := f.count("C_Initialize") - before; n != want {
					t.Errorf("%d recoveries were tried, want %d", n, want)
				}
			}
		}
		unavailable := func() {
			t.Helper()
			if _, err := sg.Sign(t.Context(), nil); !errors.Is(err, keys.ErrUnavailable) {
				t.Fatalf("Sign: %v, want %v", err, keys.ErrUnavailable)
			}
		}
		f.set(func(f *fake) { f.absent = true })
		done := tries(breakerTrips)
		for range breakerTrips { // each is a recovery of its own
			state(gobreaker.StateClosed)
			unavailable()
		}
		for range 100 { // no call at all
			state(gobreaker.StateOpen)
			unavailable()
		}
		if _, err := s.Versions(t.Context(), v.Label); !errors.Is(err, keys.ErrUnavailable) || !strings.Contains(err.Error(), "tried again within 1s") {
			t.Errorf("Versions: %v; want a refusal that says when it is tried again", err)
		}
		done()

		time.Sleep(breakerWait + time.Millisecond)
		state(gobreaker.StateHalfOpen)
		done = tries(1)
		unavailable() // the probe
		state(gobreaker.StateOpen)
		unavailable()
		done()

		f.set(func(f *fake) { f.absent = false })
		unavailable() // still open
		time.Sleep(breakerWait + time.Millisecond)
		mustSign(t, sg) // the probe, and it is a signature
		state(gobreaker.StateClosed)
		mustSign(t, sg)

		// What a token that is there refuses does not count.
		f.set(func(f *fake) {
			f.hook = func(call string) (bool, error) {
				if call == "C_Sign" {
					return true, pkcs11.Error(pkcs11.CKR_DATA_LEN_RANGE)
				}
				return false, nil
			}
		})
		for range 3 * breakerTrips {
			if _, err := sg.Sign(t.Context(), nil); err == nil || errors.Is(err, keys.ErrUnavailable) {
				t.Fatalf("Sign: %v", err)
			}
			if _, err := s.Signer(t.Context(), v.Label, "none"); !errors.Is(err, keys.ErrNotFound) {
				t.Fatalf("Signer: %v", err)
			}
		}
		f.set(func(f *fake) { f.hook = nil })
		state(gobreaker.StateClosed)
		mustSign(t, sg)
		if opened, closed := strings.Count(logged.String(), "circuit breaker open"), strings.Count(logged.String(), "circuit breaker closed"); opened != 1 || closed != 1 {
			t.Errorf("the log says opened %d times, closed %d times, want 1 and 1:\n%s", opened, closed, &logged)
		}
		f.audit(t)
	})
}

// TestBreakerProbeHangs: the one operation that tries the token hangs. Others are refused at once, and its caller by its context.
func TestBreakerProbeHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		s := f.open(t, f.registry(), nil)
		defer closeStore(t, s)
		_, sg := mustCreate(t, s, keys.Ed25519)
		f.set(func(f *fake) { f.absent = true })
		for range breakerTrips {
			_, _ = sg.Sign(t.Context(), nil)
		}
		g := newGate(f, "C_Initialize")
		time.Sleep(breakerWait + time.Millisecond)
		var wg sync.WaitGroup
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if _, err := sg.Sign(ctx, nil); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("the probe: %v, want %v", err, context.DeadlineExceeded)
			}
		})
		<-g.in
		start := time.Now()
		for range 10 {
			if _, err := sg.Sign(t.Context(), nil); !errors.Is(err, keys.ErrUnavailable) || time.Since(start) != 0 {
				t.Errorf("Sign beside the probe: %v after %v; want %v at once", err, time.Since(start), keys.ErrUnavailable)
			}
		}
		wg.Wait()
		f.set(func(f *fake) { f.absent, f.hook = false, nil })
		close(g.free)
		synctest.Wait()
		time.Sleep(breakerWait + time.Millisecond)
		mustSign(t, sg)
		f.audit(t)
	})
}

// TestRecoveryTime: a token that was away for a minute, asked for 100 times a second, is tried once a breakerWait, and found
// within one when it is back.
func TestRecoveryTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		s := f.open(t, f.registry(), nil)
		defer closeStore(t, s)
		_, sg := mustCreate(t, s, keys.Ed25519)
		f.set(func(f *fake) { f.absent = true })
		before := f.count("C_Initialize")
		for start := time.Now(); time.Since(start) < time.Minute; time.Sleep(10 * time.Millisecond) {
			if _, err := sg.Sign(t.Context(), nil); !errors.Is(err, keys.ErrUnavailable) {
				t.Fatalf("Sign: %v, want %v", err, keys.ErrUnavailable)
			}
		}
		if n := f.count("C_Initialize") - before; n < 50 || n > breakerTrips+60 {
			t.Errorf("%d recoveries were tried in a minute of 6000 tries, want 50 to %d", n, breakerTrips+60)
		}
		f.set(func(f *fake) { f.absent = false })
		start := time.Now()
		for {
			if _, err := sg.Sign(t.Context(), nil); err == nil {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if took := time.Since(start); took > breakerWait+20*time.Millisecond {
			t.Errorf("recovered %v after the token came back, want at most %v", took, breakerWait)
		}
		f.audit(t)
	})
}

// TestOpenClosesBreaker: somebody opens the token anew and finds it there; operations need not wait.
func TestOpenClosesBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		reg := f.registry()
		s := f.open(t, reg, nil)
		defer closeStore(t, s)
		_, sg := mustCreate(t, s, keys.Ed25519)
		f.set(func(f *fake) { f.absent = true })
		for range breakerTrips + 1 {
			_, _ = sg.Sign(t.Context(), nil)
		}
		if _, err := open(t.Context(), fakeConfig(), reg); !errors.Is(err, keys.ErrUnavailable) {
			t.Errorf("Open while the token is away: %v, want %v", err, keys.ErrUnavailable)
		}
		f.set(func(f *fake) { f.absent = false })
		defer closeStore(t, f.open(t, reg, nil))
		mustSign(t, sg)
		f.audit(t)
	})
}

// TestHangAtLogin: a login that hangs holds up the other worker, but no caller beyond its context, and nothing is called twice.
func TestHangAtLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		s := f.open(t, f.registry(), nil)
		defer closeStore(t, s)
		_, sg := mustCreate(t, s, keys.Ed25519)
		g := newGate(f, "C_Login")
		logins := f.count("C_Login")
		f.set(func(f *fake) { f.drop() })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if _, err := sg.Sign(ctx, nil); !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, keys.ErrUnavailable) {
					t.Errorf("Sign: %v", err)
				}
			})
		}
		wg.Wait()
		if n := f.count("C_Login") - logins; n != 1 {
			t.Errorf("%d calls of C_Login, want the one that hangs", n)
		}
		f.set(func(f *fake) { f.hook = nil })
		close(g.free)
		time.Sleep(breakerWait + time.Millisecond)
		mustSign(t, sg)
		f.audit(t)
	})
}

// TestCredentialLatch: only the token's refusal of the PIN stops a store for good. After everything else it signs again by itself.
func TestCredentialLatch(t *testing.T) {
	for _, c := range []struct {
		code    uint // of C_Login
		latched bool
	}{
		{pkcs11.CKR_PIN_INCORRECT, true},
		{pkcs11.CKR_PIN_INVALID, true},
		{pkcs11.CKR_PIN_LEN_RANGE, true},
		{pkcs11.CKR_PIN_EXPIRED, true},
		{pkcs11.CKR_PIN_LOCKED, true},
		{pkcs11.CKR_USER_PIN_NOT_INITIALIZED, false},
		{pkcs11.CKR_USER_ANOTHER_ALREADY_LOGGED_IN, false},
		{pkcs11.CKR_USER_TOO_MANY_TYPES, false},
		{pkcs11.CKR_SESSION_READ_ONLY_EXISTS, false},
		{pkcs11.CKR_DEVICE_ERROR, false},
		{pkcs11.CKR_DEVICE_REMOVED, false},
		{pkcs11.CKR_GENERAL_ERROR, false},
		{pkcs11.CKR_FUNCTION_FAILED, false},
		{pkcs11.CKR_TOKEN_NOT_PRESENT, false},
		{pkcs11.CKR_VENDOR_DEFINED + 3, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake()
			s := f.open(t, f.registry(), nil)
			defer closeStore(t, s)
			_, sg := mustCreate(t, s, keys.P256)
			f.set(func(f *fake) {
				f.drop()
				f.hook = func(call string) (bool, error) {
					if call == "C_Login" {
						return false, pkcs11.Error(c.code)
					}
					return false, nil
				}
			})
			before := f.count("C_Login")
			for range 20 {
				if _, err := sg.Sign(t.Context(), nil); errors.Is(err, keys.ErrCredential) != c.latched || err == nil {
					t.Fatalf("%#x: Sign: %v; want %v: %v", c.code, err, keys.ErrCredential, c.latched)
				}
				time.Sleep(breakerWait)
			}
			if n := f.count("C_Login") - before; c.latched && n != 1 {
				t.Errorf("%#x: %d logins, want 1", c.code, n)
			}
			f.set(func(f *fake) { f.hook = nil })
			time.Sleep(breakerWait + time.Millisecond)
			before = f.count("C_Login")
			_, err := sg.Sign(t.Context(), nil)
			if (err == nil) == c.latched || c.latched && (!errors.Is(err, keys.ErrCredential) || f.count("C_Login") != before) {
				t.Errorf("%#x: Sign once the cause is gone: %v, latched should be %v", c.code, err, c.latched)
			}
			f.audit(t)
		})
	}
}

// TestPINFileChanges: the PIN is proved once for a store. A file that changes later matters at the next login only, whichever
// worker needs its first session meanwhile.
func TestPINFileChanges(t *testing.T) {
	f := newFake()
	var pin atomic.Value
	pin.Store(testPIN)
	s := f.open(t, f.registry(), func(c *Config) {
		c.Sessions, c.PIN = 8, func() (string, error) { return pin.Load().(string), nil }
	})
	defer closeStore(t, s)
	_, sg := mustCreate(t, s, keys.P256)
	pin.Store("the next PIN")
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() { mustSign(t, sg) })
	}
	wg.Wait()
	f.set(func(f *fake) { f.pin = "the next PIN"; f.drop() })
	mustSign(t, sg)
	f.audit(t)
}

// TestRandomTroubles: 100 times, in the order of a seed: the token goes, sessions are lost, handles come again, calls hang or
// fail, the PIN is nearly locked. Signatures go on in between. Nobody hears anything but what is true, the token is found again
// within a breakerWait, and at the end no session, goroutine or thread is left.
func TestRandomTroubles(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 5))
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.reuse = true
		const sessions = 3
		s := f.open(t, f.registry(), func(c *Config) { c.Sessions, c.Queue = sessions, 16 })
		v, sg := mustCreate(t, s, keys.Ed25519)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		var made atomic.Int64
		for g := range 4 {
			wg.Go(func() {
				for i := 0; ctx.Err() == nil; i++ {
					msg := fmt.Appendf(nil, "%d/%d", g, i)
					short, done := context.WithTimeout(ctx, 700*time.Millisecond)
					sig, err := sg.Sign(short, msg)
					done()
					switch {
					case err == nil:
						made.Add(1)
						if err := keys.Verify(keys.Ed25519, v.Public, msg, sig); err != nil {
							t.Error(err)
						}
					case errors.Is(err, keys.ErrUnavailable), errors.Is(err, context.DeadlineExceeded), ctx.Err() != nil:
					default:
						t.Errorf("Sign: %v", err)
						cancel()
					}
					time.Sleep(50 * time.Millisecond)
				}
			})
		}
		for range 100 {
			lasts := time.Duration(rng.IntN(3000)) * time.Millisecond
			switch rng.IntN(6) {
			case 0:
				f.set(func(f *fake) { f.absent = true })
			case 1:
				f.set(func(f *fake) { f.drop() })
			case 2:
				f.set(func(f *fake) { f.drop(); f.flags = pkcs11.CKF_USER_PIN_FINAL_TRY })
			case 3:
				calls := []string{"C_Sign", "C_SignInit", "C_Login", "C_OpenSession", "C_GetSlotList"}
				failing := calls[rng.IntN(len(calls))]
				f.set(func(f *fake) {
					f.drop()
					f.hook = func(call string) (bool, error) {
						if call == failing {
							return false, pkcs11.Error(pkcs11.CKR_DEVICE_ERROR)
						}
						return false, nil
					}
				})
			case 4: // hangs for as long, and comes back
				end := time.Now().Add(lasts)
				f.set(func(f *fake) {
					f.hook = func(call string) (bool, error) {
						if call == "C_Sign" {
							time.Sleep(time.Until(end))
						}
						return false, nil
					}
				})
			case 5:
				f.set(func(f *fake) { f.absent = true; f.drop() })
			}
			time.Sleep(lasts)
			f.set(func(f *fake) { f.absent, f.flags, f.hook = false, 0, nil })
			time.Sleep(breakerWait + 100*time.Millisecond)
			before := made.Load()
			time.Sleep(200 * time.Millisecond)
			if made.Load() == before {
				t.Errorf("no signature in the 300 ms after a breakerWait that followed the trouble")
			}
			f.set(func(f *fake) {
				if n := len(f.sessions); n > sessions {
					t.Errorf("%d sessions are open, want at most %d", n, sessions)
				}
			})
		}
		cancel()
		wg.Wait()
		closeStore(t, s)
		t.Logf("%d signatures", made.Load())
		if len(f.sessions) != 0 || f.initialized || len(s.tok.mod.sessions) != 0 {
			t.Errorf("after Close: %d sessions, initialized %v, %d sessions noted; want none", len(f.sessions), f.initialized, len(s.tok.mod.sessions))
		}
		if n := f.count("C_Login"); f.tries != 3 {
			t.Errorf("%d logins, and the token has %d tries left of 3", n, f.tries)
		}
		f.audit(t)
	})
}
