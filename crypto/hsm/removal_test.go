//go:build cgo

package hsm

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/hsm/softhsm"
	"github.com/knhk/sidecar/crypto/keys"
)

// patience is how long something that has to happen may take here. It judges nothing: what is too slow by design would
// never happen.
const patience = time.Minute

// eventually calls fn until it returns nil.
func eventually(t *testing.T, what string, fn func() error) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		err := fn()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: not in %v: %v", what, patience, err)
		}
	}
}

// TestSoftHSMRemovals takes a real token away and brings it back while goroutines sign, list, look up and create: 100 times
// with KNHK_FAULT_FULL=1, else 12. Nobody is told that a version does not exist or is destroyed because its token was away,
// nothing but the token's absence is reported, every signature verifies, the versions made stay made, and no session, goroutine
// or file descriptor is left behind.
func TestSoftHSMRemovals(t *testing.T) {
	rounds := 12
	if os.Getenv("KNHK_FAULT_FULL") == "1" {
		rounds = 100
	}
	seed := rand.Uint64()
	t.Logf("seed %d, %d rounds", seed, rounds)
	rng := rand.New(rand.NewPCG(seed, 5))
	tok := newSoftToken(t)
	s := tok.open(t)
	impatient(t, s)
	var vs [2]keys.Version
	var signers [2]keys.Signer
	vs[0], signers[0] = mustCreate(t, s, keys.Ed25519)
	vs[1], signers[1] = mustCreate(t, s, keys.P256)
	gone, err := s.Create(t.Context(), "log", keys.Ed25519)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Destroy(t.Context(), "log", gone.ID); err != nil {
		t.Fatal(err)
	}
	goroutines := runtime.NumGoroutine()

	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var made, refused, created atomic.Int64
	until := func(what string, op func(i int) error) { // repeats op until the test ends
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				switch err := op(i); {
				case err == nil:
				case errors.Is(err, keys.ErrUnavailable):
					refused.Add(1)
					time.Sleep(time.Millisecond)
				default:
					t.Errorf("%s: %v", what, err)
					cancel()
				}
			}
		})
	}
	for g := range 4 {
		until("Sign", func(i int) error {
			msg, k := fmt.Appendf(nil, "%d/%d", g, i), (g+i)%2
			sig, err := signers[k].Sign(context.Background(), msg)
			if err == nil {
				made.Add(1)
				err = keys.Verify(vs[k].Algorithm, vs[k].Public, msg, sig)
			}
			return err
		})
	}
	until("Versions", func(int) error {
		found, err := s.Versions(context.Background(), "log")
		if err == nil && (len(found) != 3 || found[0].State != keys.Enabled || found[1].State != keys.Enabled || found[2].State != keys.Destroyed) {
			err = fmt.Errorf("%+v; want two enabled and one destroyed", found)
		}
		return err
	})
	until("Signer", func(i int) error {
		_, err := s.Signer(context.Background(), "log", vs[i%2].ID)
		return err
	})
	until("Create", func(i int) error {
		time.Sleep(20 * time.Millisecond)
		if created.Load() >= 20 {
			return nil
		}
		_, err := s.Create(context.Background(), "made", keys.P256)
		if err == nil {
			created.Add(1)
		}
		return err
	})

	away, home := filepath.Join(tok.dir, "away"), softhsm.TokenDir(tok.dir)
	for round := range rounds {
		before := made.Load()
		eventually(t, fmt.Sprintf("round %d: signatures", round), func() error {
			if n := made.Load() - before; n < 10 && ctx.Err() == nil {
				return fmt.Errorf("%d", n)
			}
			return nil
		})
		if err := os.Rename(home, away); err != nil {
			t.Fatal(err)
		}
		if round%3 == 0 { // long enough for somebody to notice; else as it comes
			before := refused.Load()
			eventually(t, fmt.Sprintf("round %d: a refusal", round), func() error {
				if refused.Load() == before && ctx.Err() == nil {
					return errors.New("none")
				}
				return nil
			})
		} else {
			time.Sleep(time.Duration(rng.IntN(20_000)) * time.Microsecond)
		}
		if err := os.Rename(away, home); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	wg.Wait()
	eventually(t, "a signature at the end", func() error {
		_, err := signers[0].Sign(t.Context(), nil)
		return err
	})
	found, err := s.Versions(t.Context(), "made")
	enabled := 0
	for _, v := range found {
		if v.State == keys.Enabled {
			enabled++
		}
	}
	if err != nil || int64(enabled) < created.Load() {
		t.Errorf("%d versions are there, %v, and %d were made", enabled, err, created.Load())
	}
	m := s.tok.mod
	m.mu.Lock()
	if n := len(m.sessions); n > 2 {
		t.Errorf("%d sessions are open, want at most 2", n)
	}
	m.mu.Unlock()
	if n := runtime.NumGoroutine(); n > goroutines {
		t.Errorf("%d goroutines, %d before", n, goroutines)
	}
	t.Logf("%d signatures, %d refusals, %d versions made", made.Load(), refused.Load(), created.Load())
}
