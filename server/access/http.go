package access

import (
	"context"
	"errors"
	"net"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"github.com/knhk/sidecar/crypto/spiffe"
)

// Mux is an http.ServeMux that knows what it serves, so that a test can hold it against the rules.
type Mux struct {
	mux      http.ServeMux
	patterns []string
}

// Handle is http.ServeMux.Handle.
func (m *Mux) Handle(pattern string, h http.Handler) {
	m.mux.Handle(pattern, h)
	m.patterns = append(m.patterns, pattern)
}

// HandleFunc is http.ServeMux.HandleFunc.
func (m *Mux) HandleFunc(pattern string, h func(http.ResponseWriter, *http.Request)) {
	m.Handle(pattern, http.HandlerFunc(h))
}

// ServeHTTP implements http.Handler.
func (m *Mux) ServeHTTP(w http.ResponseWriter, r *http.Request) { m.mux.ServeHTTP(w, r) }

// Patterns are those that were given to Handle, in order.
func (m *Mux) Patterns() []string { return m.patterns }

// call is one over HTTP that is under way.
type call struct {
	who    Who
	need   Role
	cancel context.CancelCauseFunc
	out    *http.ResponseController
}

// revoke ends the call, even one that waits for a reader who does not read. The call is not over: its end takes the lock that the
// caller holds.
func (c *call) revoke(now time.Time) {
	c.cancel(ErrRevoked)
	_ = c.out.SetWriteDeadline(now) // a writer that has no deadline has no reader that makes it wait
}

type whoKey struct{}

// ConnContext is for http.Server: it notes who is at the other end of a connection that a PlainListener accepted.
func ConnContext(ctx context.Context, c net.Conn) context.Context {
	if k, ok := c.(interface{ Who() Who }); ok {
		return WithWho(ctx, k.Who())
	}
	return ctx
}

// WithWho notes that w is at the other end of the connection that ctx is of.
func WithWho(ctx context.Context, w Who) context.Context { return context.WithValue(ctx, whoKey{}, w) }

// caller is who makes a request: as its TLS connection proves, or as ConnContext noted.
func caller(r *http.Request) Who {
	if r.TLS != nil {
		id, err := spiffe.PeerID(r.TLS)
		if err != nil {
			return Who{}
		}
		return Who{ID: id}
	}
	w, _ := r.Context().Value(whoKey{}).(Who)
	return w
}

// Handler lets through to next the requests that their callers may make, and answers the others with 403, in the words of Connect or
// gRPC if they speak it. A request's context ends with ErrRevoked when its caller may no longer make it.
func (a *Authority) Handler(on Listener, next http.Handler) http.Handler {
	errs := connect.NewErrorWriter()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithCancelCause(r.Context())
		defer cancel(nil)
		c := &call{who: caller(r), need: Allowed(on, r.URL.Path), cancel: cancel, out: http.NewResponseController(w)}
		// Noted before it is judged: a reload in between finds it, or has been.
		a.mu.Lock()
		a.calls[c] = struct{}{}
		a.mu.Unlock()
		defer func() {
			a.mu.Lock()
			delete(a.calls, c)
			a.mu.Unlock()
		}()
		if a.grants.Load().Of(c.who)&c.need == 0 {
			err := a.refuseCall(on, r.URL.Path, c.who, c.need)
			if errs.IsSupported(r) {
				_ = errs.Write(w, r, connect.NewError(connect.CodePermissionDenied, err)) // the caller may be gone
				return
			}
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r.WithContext(ctx))
		if errors.Is(context.Cause(ctx), ErrRevoked) {
			panic(http.ErrAbortHandler) // what was sent is not whole, and must not look so
		}
	})
}
