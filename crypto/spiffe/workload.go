package spiffe

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Retries begin soon, for an issuer that starts beside us, and stay frequent, for one that comes back shortly before our SVID expires.
const (
	firstRetry = 200 * time.Millisecond
	lastRetry  = 5 * time.Second
)

// openWorkloadAPI starts the watch and waits for what it brings first.
func (s *Source) openWorkloadAPI(ctx context.Context, timeout time.Duration) error {
	path, ok := strings.CutPrefix(s.cfg.WorkloadAPI, "unix:")
	if ok && strings.HasPrefix(path, "//") { // unix:///path, as SPIFFE_ENDPOINT_SOCKET has it
		path = path[2:]
	}
	if !ok || !filepath.IsAbs(path) {
		return fmt.Errorf("workload api %q: want unix:/path with an absolute path", s.cfg.WorkloadAPI)
	}
	client, err := workloadapi.New(ctx, workloadapi.WithAddr(s.cfg.WorkloadAPI), workloadapi.WithBackoffStrategy(retries{}),
		// Without it the connection itself would wait up to two minutes between tries.
		workloadapi.WithDialOptions(grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: firstRetry, Multiplier: 2, Jitter: 0.1, MaxDelay: lastRetry}, MinConnectTimeout: lastRetry,
		})))
	if err != nil {
		return fmt.Errorf("workload api %q: %w", s.cfg.WorkloadAPI, err)
	}
	watching, cancel := context.WithCancel(context.WithoutCancel(ctx)) // it outlives the opening
	s.cancel = cancel
	w := &apiWatch{s: s, ctx: watching, path: path, first: make(chan struct{})}
	s.watching.Go(func() {
		defer client.Close()
		wait := retries{}.NewBackoff()
		for watching.Err() == nil {
			// It ends for good on codes that an issuer may say when it is stopped. The watcher has heard its error.
			_ = client.WatchX509Context(watching, w)
			select {
			case <-watching.Done():
			case <-time.After(wait.Next()):
			}
		}
	})
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-w.first:
		return nil
	case <-timer.C:
		err = fmt.Errorf("no SVID within %s", timeout)
	case <-ctx.Done():
		err = ctx.Err()
	}
	s.Close()
	if last := w.lastError(); last != nil {
		return fmt.Errorf("%w: %w", err, last)
	}
	return fmt.Errorf("%w: workload api %q does not answer", err, s.cfg.WorkloadAPI)
}

// apiWatch takes what the Workload API says. Its methods are called by one goroutine.
type apiWatch struct {
	s     *Source
	ctx   context.Context // done when the Source is closed
	path  string
	first chan struct{} // closed with the first SVID

	mu   sync.Mutex
	last error // of the last try; nil after an SVID was taken
}

func (w *apiWatch) lastError() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last
}

// OnX509ContextUpdate implements workloadapi.X509ContextWatcher.
func (w *apiWatch) OnX509ContextUpdate(c *workloadapi.X509Context) {
	if w.ctx.Err() != nil {
		return
	}
	m, left, err := w.choose(c)
	if err != nil {
		w.fail(err)
		return
	}
	w.mu.Lock()
	w.last = nil
	w.mu.Unlock()
	for _, err := range left {
		w.s.log.Warn("a federated trust domain is left out, nobody of it is believed", "err", err)
	}
	begin := w.s.state.Load() == nil
	w.s.take(m)
	if begin {
		close(w.first)
	}
}

// choose takes the SVID that we are to have. Federated bundles that do not hold are left out: another domain cannot take ours down.
func (w *apiWatch) choose(c *workloadapi.X509Context) (m *material, left []error, err error) {
	var svid *x509svid.SVID
	var offered []string
	for _, v := range c.SVIDs {
		if svid == nil && v.ID == w.s.id {
			svid = v
		}
		offered = append(offered, v.ID.String())
	}
	if svid == nil {
		return nil, nil, fmt.Errorf("workload api %s offers %s, not %s: correct identity.spiffe_id or the workload's registration",
			w.s.cfg.WorkloadAPI, strings.Join(offered, ", "), w.s.id)
	}
	bundles := x509bundle.NewSet()
	for _, b := range c.Bundles.Bundles() {
		switch err := checkBundle(b.X509Authorities()); {
		case err == nil:
			bundles.Add(b)
		case b.TrustDomain() == w.s.id.TrustDomain():
			return nil, nil, fmt.Errorf("workload api %s: bundle of %s: %w", w.s.cfg.WorkloadAPI, b.TrustDomain(), err)
		default:
			left = append(left, fmt.Errorf("workload api %s: bundle of %s: %w", w.s.cfg.WorkloadAPI, b.TrustDomain(), err))
		}
	}
	m, err = checkMaterial(w.s.id, svid, bundles, w.s.now())
	if err != nil {
		return nil, nil, fmt.Errorf("workload api %s: %w", w.s.cfg.WorkloadAPI, err)
	}
	return m, left, nil
}

// OnX509ContextWatchError implements workloadapi.X509ContextWatcher.
func (w *apiWatch) OnX509ContextWatchError(err error) {
	if w.ctx.Err() == nil {
		w.fail(explain(w.s.id, w.s.cfg.WorkloadAPI, w.path, err))
	}
}

// fail keeps err for Open, and tells it once if it is not the same as before.
func (w *apiWatch) fail(err error) {
	w.mu.Lock()
	again := w.last != nil && w.last.Error() == err.Error()
	w.last = err
	w.mu.Unlock()
	m := w.s.state.Load()
	if m == nil {
		return // Open says it
	}
	if !again {
		w.s.log.Warn("no SVID from the Workload API, the last one stays in use until it expires", "err", err, "not_after", stamp(m.notAfter()))
	}
	w.s.failed()
}

// explain says what to do about an error of the Workload API.
func explain(id spiffeid.ID, addr, path string, err error) error {
	if err == nil {
		return fmt.Errorf("workload api %s ended the stream", addr)
	}
	switch status.Code(err) {
	case codes.PermissionDenied:
		return fmt.Errorf("workload api %s knows no workload like this process: register %s with selectors that this process has: %w", addr, id, err)
	case codes.Unavailable:
		// The error's text has the errno, but no type that could be asked for it.
		info, serr := os.Stat(path)
		switch {
		case errors.Is(serr, os.ErrNotExist):
			return fmt.Errorf("there is no socket %s: start the SPIFFE agent, or correct the path: %w", path, err)
		case errors.Is(serr, os.ErrPermission):
			return fmt.Errorf("socket %s is closed to this user: %w", path, err)
		case serr == nil && info.Mode()&os.ModeSocket == 0:
			return fmt.Errorf("%s is no socket: correct the path: %w", path, err)
		}
		return fmt.Errorf("nobody answers on socket %s: is the SPIFFE agent running, and may this user connect?: %w", path, err)
	}
	return fmt.Errorf("workload api %s: %w", addr, err)
}

// retries is a workloadapi.BackoffStrategy.
type retries struct{}

// NewBackoff implements workloadapi.BackoffStrategy.
func (retries) NewBackoff() workloadapi.Backoff { return &retry{firstRetry} }

type retry struct{ next time.Duration }

// Next implements workloadapi.Backoff.
func (r *retry) Next() time.Duration {
	d := r.next
	r.next = min(2*d, lastRetry)
	return d
}

// Reset implements workloadapi.Backoff.
func (r *retry) Reset() { r.next = firstRetry }
