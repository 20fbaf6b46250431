//go:build cgo

package hsm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
)

// Store is one token opened. Safe for concurrent use. Implements keys.Store.
type Store struct {
	tok     *token
	log     *slog.Logger
	pin     func() (string, error)
	now     func() time.Time
	custody string
	timeout time.Duration // of Close

	queue     chan *op
	quit      chan struct{}         // closed by Close: workers end
	gone      chan struct{}         // closed when the last worker has ended
	abandoned chan struct{}         // closed by Close when workers did not end in time
	refused   atomic.Pointer[error] // latched keys.ErrCredential
	proved    atomic.Bool           // the store's PIN has been compared with the process's login once

	exportable bool // Config.AllowExportable

	mu     sync.RWMutex // over closed and sends to queue
	closed bool

	workers  atomic.Int32
	once     sync.Once
	closeErr error
	leaveErr error // of the last worker; read after gone
}

var _ keys.Store = (*Store)(nil)

// Open loads the module, finds the token and logs in; its workers run until Close.
//
// Errors: the context's; keys.ErrCredential when the PIN is refused, after which this process does not send that PIN to
// the token again; keys.ErrUnavailable when the token is not there or does not answer; anything else is a configuration
// that cannot work (module missing or not loadable, two tokens of one label).
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if _, err := cfg.withDefaults(); err != nil {
		return nil, fmt.Errorf("hsm: open: %w", err)
	}
	if err := moduleExists(cfg.Module); err != nil {
		return nil, fmt.Errorf("hsm: open: %w", err)
	}
	s, err := open(ctx, cfg, process)
	if err != nil {
		return nil, fmt.Errorf("hsm: open: %w", err)
	}
	return s, nil
}

func open(ctx context.Context, cfg Config, reg *registry) (*Store, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m := reg.acquire(cfg.Module)
	s := &Store{
		tok: m.token(cfg.TokenLabel), log: cfg.Log, pin: cfg.PIN, now: time.Now, timeout: cfg.CloseTimeout, exportable: cfg.AllowExportable,
		queue: make(chan *op, cfg.Queue), quit: make(chan struct{}), gone: make(chan struct{}), abandoned: make(chan struct{}),
	}
	s.tok.log.Store(cfg.Log)
	s.workers.Store(int32(cfg.Sessions))
	for range cfg.Sessions {
		go (&worker{store: s}).run()
	}
	var model string
	err = s.do(ctx, &op{now: true, fn: func(se *session) error {
		info, err := se.present()
		model = info.Model
		return err
	}})
	if err != nil && ctx.Err() != nil {
		s.stop() // nobody waits: the workers clean up when C lets them
		return nil, err
	} else if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	s.custody = fmt.Sprintf("token %s (%s)", cfg.TokenLabel, model)
	return s, nil
}

// moduleExists turns the commonest mistake into a plain sentence before anything is started.
func moduleExists(path string) error {
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("pkcs11 module %s does not exist: install the token's library or correct module-path", path)
	} else if err != nil {
		return fmt.Errorf("pkcs11 module: %w", err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("pkcs11 module %s is not a file", path)
	}
	return nil
}

// leave counts a worker out; the last one lets go of the module, so that a worker stuck in C keeps it initialized.
func (s *Store) leave() {
	if s.workers.Add(-1) > 0 {
		return
	}
	s.leaveErr = s.tok.mod.release()
	close(s.gone)
}

// refuseQueued answers operations that no worker will take.
func (s *Store) refuseQueued() {
	for {
		select {
		case o := <-s.queue:
			if o.end.CompareAndSwap(false, true) {
				o.done <- errClosed
			}
		default:
			return
		}
	}
}

// stop takes no more operations, refuses the queued ones and tells the workers to end. Called once.
func (s *Store) stop() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	close(s.quit)
	s.refuseQueued()
}

// Close lets operations in flight finish, refuses the queued ones, closes the sessions and, as the last store of the
// module, finalizes it. When operations do not come back from C within Config.CloseTimeout it returns an error; their
// workers then clean up when they do come back. Further calls return the same.
func (s *Store) Close() error {
	s.once.Do(func() {
		s.stop()
		timer := time.NewTimer(s.timeout)
		defer timer.Stop()
		select {
		case <-s.gone:
			if s.leaveErr != nil {
				s.closeErr = fmt.Errorf("hsm: close: %w", s.leaveErr)
			}
		case <-timer.C:
			close(s.abandoned)
			s.closeErr = fmt.Errorf("hsm: close: %w within %v; the module stays initialized until it does", errStuck, s.timeout)
		}
	})
	return s.closeErr
}
