package hsm

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"
)

// Config says which token to open and how.
type Config struct {
	// Module is the absolute path of the PKCS#11 library. It runs inside this process: who can write it has everything.
	Module string
	// TokenLabel is the label of the token; exactly one token of the module may have it. 1 to 32 bytes.
	TokenLabel string
	// PIN returns the user PIN. It is called for each login, on a goroutine of the store, and the PIN is not kept. Who knows
	// it and reaches the token can sign, and can destroy keys; it cannot take keys out. keys.URI.PIN fits.
	PIN func() (string, error)
	// AllowExportable lets keys sign that can leave the token, could once, or are not kept secret by it: who copied one signs
	// without the token, for ever, and nobody sees it. Default false: such keys are refused. Each use of one is logged when it
	// is opened. Keys made by this package are never exportable, whatever this says.
	AllowExportable bool
	// Sessions is the number of sessions, workers and threads that may stand in C calls. 1 to 64, default 2: more than
	// there are cores gain nothing with SoftHSM; a network HSM gains with more.
	Sessions int
	// Queue is how many operations may wait for a worker; one that finds the queue full fails with keys.ErrUnavailable.
	// 1 to 65536, default 256.
	Queue int
	// CloseTimeout is how long Close waits for operations that stand in C calls. Default 5 s.
	CloseTimeout time.Duration
	// Log hears of lost sessions, recoveries, refused PINs, exportable keys and the circuit breaker. Default: nobody.
	Log *slog.Logger
}

// withDefaults fills in defaults and names everything that is wrong at once.
func (c Config) withDefaults() (Config, error) {
	var errs []error
	if !filepath.IsAbs(c.Module) {
		errs = append(errs, fmt.Errorf("module path %q is not absolute", c.Module))
	}
	if len(c.TokenLabel) == 0 || len(c.TokenLabel) > 32 {
		errs = append(errs, fmt.Errorf("token label has %d bytes, want 1 to 32", len(c.TokenLabel)))
	}
	if c.PIN == nil {
		errs = append(errs, errors.New("no source of the PIN"))
	}
	if c.Sessions == 0 {
		c.Sessions = 2
	}
	if c.Sessions < 1 || c.Sessions > 64 {
		errs = append(errs, fmt.Errorf("%d sessions, want 1 to 64", c.Sessions))
	}
	if c.Queue == 0 {
		c.Queue = 256
	}
	if c.Queue < 1 || c.Queue > 65536 {
		errs = append(errs, fmt.Errorf("queue of %d, want 1 to 65536", c.Queue))
	}
	if c.CloseTimeout == 0 {
		c.CloseTimeout = 5 * time.Second
	}
	if c.CloseTimeout < 0 {
		errs = append(errs, fmt.Errorf("close timeout %v is below 0", c.CloseTimeout))
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, errors.Join(errs...)
}
