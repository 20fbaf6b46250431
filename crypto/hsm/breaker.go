//go:build cgo

package hsm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/sony/gobreaker/v2"

	"github.com/knhk/sidecar/crypto/keys"
)

// The circuit breaker's figures. A token that is back is found by the first operation after at most breakerWait.
const (
	breakerTrips = 3           // operations in a row that found the token unavailable, each after its own recovery
	breakerWait  = time.Second // between two operations that try a token that is away
)

// breaker keeps operations from a token that is away: each would restart the module in vain, and hold up a worker for as
// long as the module takes to say no. After trips operations in a row that ended in keys.ErrUnavailable it opens, and
// operations are refused at once. After wait one operation is let through, a real one: it signs, or reads the token's objects
// and asks whether token and login are there (session.present), because a session that opens proves nothing. Its success
// closes the breaker, its failure opens it for another wait. Meanwhile others are refused.
//
// It judges the token, so every other error is a token that answers: a version that is disabled, a refused PIN (which has a
// latch of its own, and which nothing here may lift), an unknown mechanism.
type breaker struct {
	cb      *gobreaker.CircuitBreaker[struct{}]
	lastErr error // of the last failed operation; behind token.guard
}

func (t *token) newBreaker() *breaker {
	return &breaker{cb: gobreaker.NewCircuitBreaker[struct{}](gobreaker.Settings{
		Name: t.label, MaxRequests: 1, Timeout: t.breakerWait,
		ReadyToTrip:  func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= t.breakerTrips },
		IsSuccessful: func(err error) bool { return !errors.Is(err, keys.ErrUnavailable) },
		OnStateChange: func(_ string, from, to gobreaker.State) {
			level := slog.LevelInfo
			if to == gobreaker.StateOpen && from == gobreaker.StateClosed {
				level = slog.LevelWarn
			} else if to != gobreaker.StateClosed {
				return // a try that failed, once a second
			}
			if log := t.log.Load(); log != nil {
				log.LogAttrs(context.Background(), level, "hsm: circuit breaker "+to.String(), slog.String("token", t.label))
			}
		},
	})}
}

// guarded runs an operation through the breaker; the error has its sentinel. With now it runs whatever the breaker says, and
// a success is believed.
func (t *token) guarded(now bool, fn func() error) error {
	b := t.current()
	if now {
		err := fn()
		if !errors.Is(err, keys.ErrUnavailable) {
			t.guard.Lock()
			t.breaker = nil // closed: current makes a new one
			t.guard.Unlock()
		}
		return err
	}
	_, err := b.cb.Execute(func() (struct{}, error) { return struct{}{}, fn() })
	switch {
	case errors.Is(err, gobreaker.ErrOpenState), errors.Is(err, gobreaker.ErrTooManyRequests):
		return t.refusal(b)
	case errors.Is(err, keys.ErrUnavailable):
		t.guard.Lock()
		b.lastErr = err
		t.guard.Unlock()
	}
	return err
}

// tripped returns the refusal of an open breaker, nil when an operation may be queued.
func (t *token) tripped() error {
	if b := t.current(); b.cb.State() == gobreaker.StateOpen {
		return t.refusal(b)
	}
	return nil
}

func (t *token) current() *breaker {
	t.guard.Lock()
	defer t.guard.Unlock()
	if t.breaker == nil {
		t.breaker = t.newBreaker()
	}
	return t.breaker
}

func (t *token) refusal(b *breaker) error {
	t.guard.Lock()
	last := b.lastErr
	t.guard.Unlock()
	if last == nil { // a probe is on its way and none has failed since
		return fmt.Errorf("%w: token %q is away, one operation tries it", keys.ErrUnavailable, t.label)
	}
	return fmt.Errorf("token %q is tried again within %v, last: %w", t.label, t.breakerWait, last)
}
