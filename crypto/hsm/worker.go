//go:build cgo

package hsm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"

	"github.com/miekg/pkcs11"

	"github.com/knhk/sidecar/crypto/keys"
)

var errClosed = errors.New("store is closed")

// op is one operation on its way through the queue.
type op struct {
	ctx  context.Context
	fn   func(*session) error // may run more than once: a try that met a lost session is repeated
	undo func(*session) error // not nil: run after fn when the caller has gone
	now  bool                 // tried even while the circuit breaker is open
	done chan error           // buffered: a worker never waits for a caller
	end  atomic.Bool          // set by whoever is first: the worker that finishes, or the caller that gives up
}

// do queues fn and waits for it, at most until ctx ends. What fn writes may be read only when do returns nil.
func (s *Store) do(ctx context.Context, o *op) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if !o.now { // refused here already, because every worker may stand in a C call
		if err := s.tok.tripped(); err != nil {
			return err
		}
	}
	o.ctx, o.done = ctx, make(chan error, 1)
	if err := s.enqueue(o); err != nil {
		return err
	}
	select {
	case err := <-o.done:
		return err
	case <-ctx.Done():
		if !o.end.CompareAndSwap(false, true) {
			return <-o.done // it has just finished; the channel is about to be filled
		}
		return ctx.Err()
	case <-s.abandoned:
		if !o.end.CompareAndSwap(false, true) {
			return <-o.done
		}
		return errClosed
	}
}

func (s *Store) enqueue(o *op) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return errClosed
	}
	select {
	case s.queue <- o:
		return nil
	default:
		return fmt.Errorf("%w: %d operations wait already", keys.ErrUnavailable, cap(s.queue))
	}
}

// worker owns one session and runs operations on it, one after the other.
type worker struct {
	store *Store
	sess  *session
}

// run serves the queue until the store closes, then answers what is left in it and closes the session.
func (w *worker) run() {
	defer w.store.leave()
	defer w.close()
	for {
		select {
		case o := <-w.store.queue:
			w.serve(o)
		case <-w.store.quit:
			w.store.refuseQueued()
			return
		}
	}
}

func (w *worker) serve(o *op) {
	if o.ctx.Err() != nil {
		return // the caller has gone before the token was asked
	}
	err := w.exec(o)
	if o.end.CompareAndSwap(false, true) {
		o.done <- err
		return
	}
	if o.undo != nil {
		if _, err := w.try(o.undo); err != nil {
			w.store.log.Warn("hsm: undo of an abandoned operation failed", "token", w.store.tok.label, "error", err)
		}
	}
}

// exec runs an operation through the circuit breaker, unless the store's PIN was refused: that is for good.
func (w *worker) exec(o *op) error {
	s, t := w.store, w.store.tok
	if err := s.refused.Load(); err != nil {
		return *err
	}
	err := t.guarded(o.now, func() error { return sentinel(w.persist(o)) })
	if errors.Is(err, keys.ErrCredential) && s.refused.CompareAndSwap(nil, &err) {
		s.log.LogAttrs(o.ctx, slog.LevelError, "hsm: credential refused; no more tries until restart",
			slog.String("token", t.label), slog.Any("error", err))
	}
	return err
}

// persist runs an operation and recovers when its session turns out to be lost: first new sessions, then a new C_Initialize.
// What another worker has recovered costs none of these steps, only a turn.
func (w *worker) persist(o *op) error {
	s, t := w.store, w.store.tok
	var err error
	steps := 0
	for range 6 {
		var seen uint64
		seen, err = w.try(o.fn)
		doubt := errors.Is(err, errDoubt) // not a loss: however the sessions were lost before, it is looked at once more
		if !isLost(err) || steps == 2 && !doubt {
			break
		}
		if o.ctx.Err() != nil {
			return err // nobody waits for the recovery; the next caller sees to it
		}
		hard := steps >= 1 || needsRestart(err)
		did, failed := t.recover(seen, hard)
		if did && !errors.Is(err, errDown) {
			s.log.LogAttrs(o.ctx, slog.LevelWarn, "hsm: session lost, recovering", slog.String("token", t.label),
				slog.Bool("restart", hard), slog.Any("cause", err), slog.Any("error", failed))
		}
		if failed != nil {
			err = fmt.Errorf("%w; recovery: %w", err, failed)
			var bad loadError
			if errors.As(failed, &bad) {
				return failed
			}
			break
		}
		if did {
			steps++
			if hard {
				steps = 2
			}
		}
	}
	return err
}

// try runs fn once on a session of the current generation, which it returns.
func (w *worker) try(fn func(*session) error) (gen uint64, err error) {
	t := w.store.tok
	t.mod.enter()
	defer t.mod.exit()
	gen = t.gen
	if !t.mod.up {
		return gen, errDown
	}
	if w.sess == nil || w.sess.gen != gen {
		h, err := t.open(w.store.pin, w.store.proved.Load())
		if err != nil {
			return gen, err
		}
		w.sess = &session{tok: t, h: h, gen: gen, exportable: w.store.exportable, private: make(map[name]pkcs11.ObjectHandle)}
		w.store.proved.Store(true)
	}
	return gen, fn(w.sess)
}

// close gives the session back, unless it is void already.
func (w *worker) close() {
	t := w.store.tok
	t.mod.enter()
	defer t.mod.exit()
	if w.sess != nil && w.sess.gen == t.gen && t.mod.up {
		t.drop(w.sess.h)
	}
}
