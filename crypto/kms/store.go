package kms

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sony/gobreaker/v2"

	"github.com/knhk/sidecar/crypto/keys"
)

// Config says what a Store works with.
type Config struct {
	// Backend is the service. Store closes it.
	Backend Backend
	// Archive keeps public keys. Who can write it can make a version unusable, and cannot make it sign or verify anything else.
	Archive *Archive
	// Place names the service in errors and logs, as keys.URI.Place does.
	Place string
	// AllowExportable lets keys sign that can leave the service or came from outside. Default false.
	AllowExportable bool
	// Calls is how many calls may be under way at once, Queue how many may wait for a place; one more fails with
	// keys.ErrUnavailable. Defaults 16 and 256.
	Calls, Queue int
	// Timeout bounds each call, CreateTimeout the making of a version. Defaults 10 s and 60 s.
	Timeout, CreateTimeout time.Duration
	// CredentialWait is how long a refused credential is not tried again for the operation and label it was refused for. Default
	// one minute.
	CredentialWait time.Duration
	// BreakerTrips is after how many failures in a row the circuit breaker opens, BreakerWait how long until one call tries the
	// service. Defaults 3 and 1 s, as in crypto/hsm.
	BreakerTrips uint32
	BreakerWait  time.Duration
	// CloseTimeout is how long Close waits for calls under way, whose contexts it ends. Default 5 s.
	CloseTimeout time.Duration
	// Log hears of the circuit breaker and refused credentials. Default: nobody.
	Log *slog.Logger

	now func() time.Time
}

func (c *Config) defaults() error {
	if c.Backend == nil || c.Archive == nil {
		return errors.New("no backend or no archive")
	}
	for _, d := range []struct {
		value *time.Duration
		def   time.Duration
	}{
		{&c.Timeout, 10 * time.Second}, {&c.CreateTimeout, time.Minute}, {&c.CredentialWait, time.Minute},
		{&c.BreakerWait, time.Second}, {&c.CloseTimeout, 5 * time.Second},
	} {
		if *d.value < 0 {
			return fmt.Errorf("a time of %v is below 0", *d.value)
		}
		if *d.value == 0 {
			*d.value = d.def
		}
	}
	if c.Calls == 0 {
		c.Calls = 16
	}
	if c.Queue == 0 {
		c.Queue = 256
	}
	if c.Calls < 1 || c.Queue < 1 {
		return fmt.Errorf("%d calls and a queue of %d: want 1 or more", c.Calls, c.Queue)
	}
	if c.BreakerTrips == 0 {
		c.BreakerTrips = 3
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.now == nil {
		c.now = time.Now
	}
	return nil
}

// Store is keys.Store over one service. Safe for concurrent use. Between calls it holds no goroutine.
type Store struct {
	cfg     Config
	breaker *gobreaker.TwoStepCircuitBreaker[struct{}]
	places  chan struct{} // one for each call under way
	waiting atomic.Int64  // calls under way and callers that wait for a place
	calls   sync.WaitGroup
	closing context.Context // ends with Close
	close   context.CancelFunc
	once    sync.Once
	closed  error

	mu      sync.Mutex
	latched map[string]refusal // refused credentials by operation and label
	lastErr error              // of the last call that found the service away
	public  map[string]known   // immutable facts, by label and id
}

var (
	_ keys.Store     = (*Store)(nil)
	_ keys.Inspector = (*Store)(nil)
)

// Open makes the store. It makes no call to the service.
func Open(cfg Config) (*Store, error) {
	if err := cfg.defaults(); err != nil {
		return nil, fmt.Errorf("kms: open: %w", err)
	}
	s := &Store{
		cfg: cfg, places: make(chan struct{}, cfg.Calls), latched: make(map[string]refusal), public: make(map[string]known),
	}
	s.closing, s.close = context.WithCancel(context.Background())
	s.breaker = s.newBreaker()
	return s, nil
}

// Custody says where the keys live, in words.
func (s *Store) Custody() string { return s.cfg.Backend.Custody() }

// Close ends the calls under way, waits for them and lets go of connections. Further calls return the same.
func (s *Store) Close() error {
	s.once.Do(func() {
		s.mu.Lock()
		s.close()
		s.mu.Unlock()
		gone := make(chan struct{})
		go func() {
			s.calls.Wait()
			close(gone)
		}()
		timer := time.NewTimer(s.cfg.CloseTimeout)
		defer timer.Stop()
		var err error
		select {
		case <-gone:
		case <-timer.C:
			err = fmt.Errorf("calls to %s did not end within %v", s.cfg.Place, s.cfg.CloseTimeout)
		}
		if err = errors.Join(err, s.cfg.Backend.Close()); err != nil {
			s.closed = fmt.Errorf("kms: close: %w", err)
		}
	})
	return s.closed
}
