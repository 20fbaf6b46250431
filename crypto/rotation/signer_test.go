package rotation

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
)

// sized is the text of a checkpoint with an arbitrary root.
func sized(size uint64, root byte) []byte {
	return []byte(checkpointText(Head{size, receipt.Hash{0: root, 31: 1}}))
}

// TestSignerRefuses: what a daily key does not sign, and with which error.
func TestSignerRefuses(t *testing.T) {
	// A log with keys stated at 0 and 2; the second is in force.
	setup := func(t *testing.T) *world {
		w := newWorld(t, 1)
		w.mustStart()
		mustNil(t, w.publishes())
		_, err := w.m.Rotate(t.Context())
		mustNil(t, err)
		return w
	}
	for _, c := range []struct {
		why string
		do  func(w *world, s note.Signer) error
		is  error // nil: any error
	}{
		{"not a checkpoint", func(_ *world, s note.Signer) error { _, err := s.Sign([]byte("knhk/key/v1\n{}\n")); return err }, nil},
		{"empty", func(_ *world, s note.Signer) error { _, err := s.Sign(nil); return err }, nil},
		{"another origin", func(_ *world, s note.Signer) error {
			_, err := s.Sign([]byte("other\n9\n" + receipt.Hash{}.String() + "\n"))
			return err
		}, nil},
		{"size with a leading zero", func(_ *world, s note.Signer) error {
			_, err := s.Sign([]byte(testOrigin + "\n09\n" + receipt.Hash{}.String() + "\n"))
			return err
		}, nil},
		{"no root", func(_ *world, s note.Signer) error { _, err := s.Sign([]byte(testOrigin + "\n9\n")); return err }, nil},
		{"short root", func(_ *world, s note.Signer) error { _, err := s.Sign([]byte(testOrigin + "\n9\nAAAA\n")); return err }, nil},
		{"the size over which it was stated", func(_ *world, s note.Signer) error { _, err := s.Sign(sized(2, 0)); return err }, ErrRange},
		{"the empty log, which only the first key signs", func(_ *world, s note.Signer) error { _, err := s.Sign(sized(0, 0)); return err }, ErrRange},
		{"another root of a size it signed", func(_ *world, s note.Signer) error {
			if _, err := s.Sign(sized(9, 0)); err != nil {
				return nil
			}
			if _, err := s.Sign(sized(9, 0)); err != nil {
				return nil // the same again is fine
			}
			_, err := s.Sign(sized(9, 1))
			return err
		}, ErrRange},
		{"a smaller size than it signed", func(_ *world, s note.Signer) error { s.Sign(sized(9, 0)); _, err := s.Sign(sized(8, 0)); return err }, ErrRange},
		{"at its end", func(w *world, s note.Signer) error {
			w.time.pass(w.m.Info().Left)
			_, err := s.Sign(sized(9, 0))
			return err
		}, ErrExpired},
		{"past its end by a jump of the wall, and back", func(w *world, s note.Signer) error {
			w.time.jump(MaxAge)
			w.m.Info() // somebody looked at the clock
			w.time.jump(-MaxAge)
			_, err := s.Sign(sized(9, 0))
			return err
		}, ErrExpired},
		{"past its end while it signs", func(w *world, s note.Signer) error {
			w.store.signed = func(*memVersion, []byte) { w.time.pass(MaxAge) }
			_, err := s.Sign(sized(9, 0))
			return err
		}, ErrExpired},
		{"pinned, then replaced: beyond its last size", func(w *world, s note.Signer) error {
			s.KeyHash()
			w.m.Rotate(w.t.Context())
			_, err := s.Sign(sized(9, 0))
			return err
		}, ErrRange},
		{"disabled in the store", func(w *world, s note.Signer) error {
			w.store.set(w.d.parsed(w.t).Current.ID, keys.Disabled)
			_, err := s.Sign(sized(9, 0))
			return err
		}, keys.ErrDisabled},
		{"store away", func(w *world, s note.Signer) error {
			w.p.draw = func(string) (fault, error) { return fails, keys.ErrUnavailable }
			_, err := s.Sign(sized(9, 0))
			return err
		}, keys.ErrUnavailable},
		{"sealed", func(w *world, s note.Signer) error {
			w.m.Seal(w.t.Context(), "x")
			_, err := s.Sign(sized(9, 0))
			return err
		}, ErrSealed},
	} {
		t.Run(c.why, func(t *testing.T) {
			w := setup(t)
			err := c.do(w, w.m.Signer())
			if err == nil || c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("Sign: %v; want %v", err, c.is)
			}
		})
	}
}

// TestSignerPins: a publisher that asked for the key hash before a change gets a signature of that key, for a size that is its.
func TestSignerPins(t *testing.T) {
	w := newWorld(t, 1)
	w.mustStart()
	mustNil(t, w.publishes())
	s := w.m.Signer()
	hash := s.KeyHash()
	old, err := keys.Verifier(w.m.Info().VKey)
	mustNil(t, err)
	w.log.header()
	msg := []byte(checkpointText(Head{w.d.size(), w.d.root(w.d.size())}))
	// The version is not destroyed while the publisher is between KeyHash and Sign.
	w.p.draw = func(op string) (fault, error) {
		if op == "destroy" {
			return fails, keys.ErrUnavailable
		}
		return works, nil
	}
	if _, err := w.m.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if sig, err := s.Sign(msg); err != nil || hash != old.KeyHash() || !old.Verify(msg, sig) {
		t.Errorf("Sign after the change: %v, or not by the key of the hash", err)
	}
	if s.KeyHash() == hash {
		t.Error("the next KeyHash is that of the old key")
	}
}

// TestFirstSignsEmpty: Tessera signs the empty log before the first statement can be in it.
func TestFirstSignsEmpty(t *testing.T) {
	w := newWorld(t, 1)
	mustNil(t, w.start(nil))
	if _, err := w.m.Signer().Sign(sized(1, 0)); !errors.Is(err, ErrRange) {
		t.Errorf("a first key that is not in the log signs size 1: %v", err)
	}
	mustNil(t, w.log.publish(0))
	if _, _, ok := w.m.HeaderKey(); ok {
		t.Error("a header may be made before the first statement")
	}
	mustNil(t, w.m.Settle(t.Context()))
	mustNil(t, w.publishes())
	mustNil(t, w.audit())
}

// TestNothingBeforeSettle: a process that opens an old log signs nothing and makes no header before it has compared log and state.
func TestNothingBeforeSettle(t *testing.T) {
	w := newWorld(t, 1)
	w.mustStart()
	mustNil(t, w.publishes())
	mustNil(t, w.start(nil))
	if _, _, ok := w.m.HeaderKey(); ok {
		t.Error("HeaderKey is ok before Settle")
	}
	if _, err := w.m.Signer().Sign(sized(9, 0)); !errors.Is(err, ErrUntrusted) {
		t.Errorf("Sign before Settle: %v", err)
	}
	mustNil(t, w.m.Settle(t.Context()))
	mustNil(t, w.publishes())
}

// TestConcurrent signs, makes headers and asks from many goroutines while keys change. It is for the race detector; what
// was signed is audited.
func TestConcurrent(t *testing.T) {
	w := newWorld(t, 1)
	w.mustStart()
	var mu sync.Mutex // of the disk and of Hold
	tree := &lockedTree{memLog: w.log, mu: &mu}
	w.m.tree = tree
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 3 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			s := w.m.Signer()
			for {
				select {
				case <-done:
					return
				default:
				}
				mu.Lock()
				h := Head{w.d.size(), w.d.root(w.d.size())}
				mu.Unlock()
				signed, err := note.Sign(&note.Note{Text: checkpointText(h)}, w.id, s)
				if err == nil {
					mu.Lock()
					w.d.cps = append(w.d.cps, checkpoint{h, signed})
					mu.Unlock()
				}
				w.m.Info()
				w.time.pass(time.Second)
			}
		}()
	}
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			select {
			case <-done:
				return
			default:
			}
			mu.Lock()
			if !w.log.held && w.d.size() < 400 {
				w.log.header()
			}
			mu.Unlock()
			w.m.Settle(t.Context())
		}
	}()
	for range 20 {
		if _, err := w.m.Rotate(t.Context()); err != nil {
			t.Error(err)
		}
	}
	close(done)
	wg.Wait()
	mustNil(t, w.audit())
	if n := len(w.d.statements()); n < 21 || len(w.d.cps) == 0 {
		t.Errorf("%d statements, %d checkpoints", n, len(w.d.cps))
	}
}

// lockedTree is memLog for more than one goroutine.
type lockedTree struct {
	*memLog
	mu *sync.Mutex
}

func (l *lockedTree) Hold(ctx context.Context) (Head, func(), error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h, release, err := l.memLog.Hold(ctx)
	return h, func() { l.mu.Lock(); defer l.mu.Unlock(); release() }, err
}

func (l *lockedTree) Put(ctx context.Context, leaf []byte) (uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.memLog.Put(ctx, leaf)
}

func (l *lockedTree) Leaf(ctx context.Context, index uint64) ([]byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.memLog.Leaf(ctx, index)
}

func (l *lockedTree) Published(ctx context.Context, size uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.memLog.Published(ctx, size)
}
