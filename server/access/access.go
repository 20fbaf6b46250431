package access

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Cause says why somebody was refused: from a closed set, for metrics.
type Cause string

// The causes.
const (
	Handshake Cause = "handshake" // no certificate, or one that does not hold: who it was is not known
	Stranger  Cause = "stranger"  // somebody who has no role on the listener
	NoRole    Cause = "no_role"   // has a role there, but none that may do this
	NoRule    Cause = "no_rule"   // nobody may do this
	Full      Cause = "full"      // too many connections
)

// ErrRevoked is the cause of a context that ended because a reload took the caller's role away.
var ErrRevoked = errors.New("the role that this call needs was taken away")

// ErrStranger is what Enter refuses with.
var ErrStranger = errors.New("has no role on this listener")

// Config is what New needs. All fields are required unless they say otherwise.
type Config struct {
	Grants  *Grants
	Log     *slog.Logger
	Refused func(on Listener, cause Cause) // optional: called for everybody who was refused
	Now     func() time.Time
}

// Authority refuses. Safe for concurrent use.
type Authority struct {
	cfg    Config
	grants atomic.Pointer[Grants]

	mu    sync.Mutex
	calls map[*call]struct{} // over HTTP, under way
	said  map[refusal]*said
}

type refusal struct {
	on    Listener
	cause Cause
}

// said is when a refusal was last logged, and how many have not been since.
type said struct {
	at   time.Time
	more int
}

// sayEvery is the shortest time between two lines in the log about refusals of one kind: anybody can cause them.
const sayEvery = 10 * time.Second

// New starts nothing.
func New(cfg Config) (*Authority, error) {
	if cfg.Grants == nil || cfg.Log == nil || cfg.Now == nil {
		return nil, errors.New("access: grants, log and clock are required")
	}
	a := &Authority{cfg: cfg, calls: map[*call]struct{}{}, said: map[refusal]*said{}}
	a.grants.Store(cfg.Grants)
	return a, nil
}

// Set puts other grants in force. Calls over HTTP of those who may no longer make them are ended; gRPC connections are the server's
// to close, see Knows.
func (a *Authority) Set(g *Grants) {
	a.grants.Store(g)
	a.mu.Lock()
	defer a.mu.Unlock()
	for c := range a.calls {
		if g.Of(c.who)&c.need == 0 {
			c.revoke(a.cfg.Now())
		}
	}
}

// Knows reports whether w may do anything on a listener.
func (a *Authority) Knows(on Listener, w Who) bool { return a.grants.Load().Of(w)&Any(on) != 0 }

// Enter refuses a connection of somebody who may do nothing on a listener, with ErrStranger.
func (a *Authority) Enter(on Listener, w Who) error {
	if a.Knows(on, w) {
		return nil
	}
	err := fmt.Errorf("%s %w", w, ErrStranger)
	a.Refuse(on, Stranger, err)
	return err
}

// Admit is Enter for TLS handshakes.
func (a *Authority) Admit(on Listener) func(spiffeid.ID) error {
	return func(id spiffeid.ID) error { return a.Enter(on, Who{ID: id}) }
}

// Call refuses a call of a gRPC method, Connect procedure or HTTP path that w may not make.
func (a *Authority) Call(on Listener, method string, w Who) error {
	need := Allowed(on, method)
	if a.grants.Load().Of(w)&need != 0 {
		return nil
	}
	return a.refuseCall(on, method, w, need)
}

func (a *Authority) refuseCall(on Listener, method string, w Who, need Role) error {
	method = method[:min(len(method), 200)]
	if need == 0 {
		err := fmt.Errorf("nobody may call %q", method)
		a.Refuse(on, NoRule, err)
		return err
	}
	err := fmt.Errorf("%s may not call %q: that takes role %s", w, method, need)
	a.Refuse(on, NoRole, err)
	return err
}

// Refuse counts a refusal, and logs it unless one of its kind was logged a moment ago.
func (a *Authority) Refuse(on Listener, cause Cause, err error) {
	if a.cfg.Refused != nil {
		a.cfg.Refused(on, cause)
	}
	now := a.cfg.Now()
	a.mu.Lock()
	s := a.said[refusal{on, cause}]
	if s == nil {
		s = &said{at: now.Add(-sayEvery)}
		a.said[refusal{on, cause}] = s
	}
	if now.Sub(s.at) < sayEvery {
		s.more++
		a.mu.Unlock()
		return
	}
	more := s.more
	s.at, s.more = now, 0
	a.mu.Unlock()
	a.cfg.Log.WarnContext(context.Background(), "refused", "listener", string(on), "cause", string(cause), "error", err, "not_logged_before", more)
}
