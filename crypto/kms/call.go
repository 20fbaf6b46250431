package kms

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/sony/gobreaker/v2"

	"github.com/knhk/sidecar/crypto/keys"
)

var errClosed = errors.New("store is closed")

// errSlow is a deadline of the caller's that ran out while the service did not answer for as long as slow.
var errSlow = errors.New("no answer in time")

// slow is how long a service may take until a caller's deadline that runs out is the service's fault.
const slow = time.Second

// early is how long before its context's deadline a client's DeadlineExceeded is taken for the context's own.
const early = 50 * time.Millisecond

// refusal is a refused credential of one operation on one label: another operation may be allowed all the same.
type refusal struct {
	err   error
	until time.Time
}

// newBreaker makes the circuit breaker. It judges the service alone: a service that answers no, or a caller that gave up, is no
// failure. After trips calls in a row that found the service away, throttling or silent it opens, and calls are refused at
// once; after wait one call is let through, and its success closes the breaker.
func (s *Store) newBreaker() *gobreaker.TwoStepCircuitBreaker[struct{}] {
	return gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		Name: s.cfg.Place, MaxRequests: 1, Timeout: s.cfg.BreakerWait,
		ReadyToTrip: func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= s.cfg.BreakerTrips },
		IsSuccessful: func(err error) bool {
			return !errors.Is(err, keys.ErrUnavailable) && !errors.Is(err, keys.ErrThrottled) && !errors.Is(err, context.DeadlineExceeded)
		},
		IsExcluded: func(err error) bool {
			return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, errSlow)
		},
		OnStateChange: func(_ string, from, to gobreaker.State) {
			level := slog.LevelInfo
			if to == gobreaker.StateOpen && from == gobreaker.StateClosed {
				level = slog.LevelWarn
			} else if to != gobreaker.StateClosed {
				return // a try that failed, once each wait
			}
			s.cfg.Log.LogAttrs(context.Background(), level, "kms: circuit breaker "+to.String(), slog.String("place", s.cfg.Place))
		},
	})
}

// do makes one call to the service and waits for it, at most until ctx ends. What fn writes may be read only when do returns
// nil. fn runs on a goroutine of its own, because clients are known to answer late after their context has ended.
func (s *Store) do(ctx context.Context, op keys.Op, label string, timeout time.Duration, fn func(context.Context) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	latch := string(op) + "\x00" + label
	if err := s.refused(latch); err != nil {
		return err
	}
	if s.breaker.State() == gobreaker.StateOpen { // here already, because every place may be taken by a call that hangs
		return s.away()
	}
	if s.waiting.Add(1) > int64(s.cfg.Calls+s.cfg.Queue) {
		s.waiting.Add(-1)
		return fmt.Errorf("%w: %d calls wait already", keys.ErrUnavailable, s.cfg.Queue)
	}
	defer s.waiting.Add(-1)
	select {
	case s.places <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	case <-s.closing.Done():
		return errClosed
	}
	// Asked with a place in hand, so that what waited while the breaker opened does not knock at the service as well.
	report, err := s.breaker.Allow()
	if err != nil {
		<-s.places
		return s.away()
	}
	if err := s.enter(); err != nil {
		report(context.Canceled)
		<-s.places
		return err
	}
	done := make(chan error, 1)
	go func() {
		defer s.calls.Done()
		defer func() { <-s.places }()
		err := s.call(ctx, timeout, fn)
		report(err)
		s.note(latch, op, err)
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		select {
		case err := <-done: // it has just finished
			return err
		default:
			return ctx.Err()
		}
	case <-s.closing.Done():
		select {
		case err := <-done:
			return err
		default:
			return errClosed
		}
	}
}

// call runs fn with the time it has, and says whose time ran out when it did.
func (s *Store) call(ctx context.Context, timeout time.Duration, fn func(context.Context) error) error {
	own, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	defer context.AfterFunc(s.closing, cancel)()
	start := time.Now()
	err := fn(own)
	if end, ok := ctx.Deadline(); ok && errors.Is(err, context.DeadlineExceeded) && time.Until(end) < early {
		<-ctx.Done() // gRPC, or the service that was told of the deadline, gives up a moment before the context says so
	}
	switch {
	case err == nil:
		return nil
	case s.closing.Err() != nil:
		return errClosed
	case ctx.Err() != nil:
		if errors.Is(ctx.Err(), context.DeadlineExceeded) && time.Since(start) >= slow {
			return fmt.Errorf("%w: %w", errSlow, ctx.Err())
		}
		return ctx.Err()
	case own.Err() != nil:
		return fmt.Errorf("%w: none within %v: %w", errSlow, timeout, context.DeadlineExceeded)
	case errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded):
		// Some time limit of the client's own.
		return fmt.Errorf("%w: %w", errSlow, err)
	}
	return err
}

// refused returns the credential's refusal while it is not to be tried again.
func (s *Store) refused(latch string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.latched[latch]
	if !ok {
		return nil
	}
	if n, can := s.cfg.Backend.(Renewer); !s.cfg.now().Before(r.until) || can && n.Renewed() {
		delete(s.latched, latch)
		return nil
	}
	return fmt.Errorf("%w (the same credential is tried again within %v)", r.err, s.cfg.CredentialWait)
}

// note remembers what a call found out for those that follow.
func (s *Store) note(latch string, op keys.Op, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if errors.Is(err, keys.ErrCredential) {
		s.latched[latch] = refusal{err, s.cfg.now().Add(s.cfg.CredentialWait)}
		s.cfg.Log.LogAttrs(context.Background(), slog.LevelError, "kms: credential refused", slog.String("place", s.cfg.Place),
			slog.String("operation", string(op)), slog.Any("error", err))
	}
	if errors.Is(err, keys.ErrUnavailable) || errors.Is(err, keys.ErrThrottled) || errors.Is(err, errSlow) {
		s.lastErr = err
	}
}

// away is the refusal of an open breaker.
func (s *Store) away() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if errors.Is(s.lastErr, keys.ErrThrottled) {
		return fmt.Errorf("tried again within %v, last: %w", s.cfg.BreakerWait, s.lastErr)
	}
	// The last failure may be a deadline, which would read as the caller's own.
	return fmt.Errorf("%w: %s is tried again within %v, last: %v", keys.ErrUnavailable, s.cfg.Place, s.cfg.BreakerWait, s.lastErr)
}

// enter counts a call in, unless the store is closed.
func (s *Store) enter() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing.Err() != nil {
		return errClosed
	}
	s.calls.Add(1)
	return nil
}
