package spiffe

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

const (
	openTimeout  = 10 * time.Second
	pollInterval = time.Second
)

// Files names PEM files. Whoever has Key is this workload to everyone; whoever can write CA or Federated decides whom we believe.
type Files struct {
	Certificate string                          // the chain, the leaf first
	Key         string                          // private key of the leaf: PKCS #8, SEC 1 or PKCS #1; for its owner only
	CA          string                          // authorities of the own trust domain
	Federated   map[spiffeid.TrustDomain]string // authorities of other trust domains, believed about IDs of that domain only
}

// Config says who we are and where that is proved: exactly one of WorkloadAPI and Files.
type Config struct {
	ID          spiffeid.ID              // the SVID must have it; required
	WorkloadAPI string                   // "unix:/path" of the SPIFFE Workload API
	Files       *Files                   // PEM files instead
	Log         *slog.Logger             // default: nothing is logged
	Now         func() time.Time         // default time.Now
	OnUpdate    func(notAfter time.Time) // optional: called for every SVID taken into use; must not block
	OnError     func()                   // optional: called for every renewal that failed; must not block
}

// Source holds the SVID in use and the bundles. It is an x509svid.Source and an x509bundle.Source, safe for concurrent use.
type Source struct {
	id    spiffeid.ID
	log   *slog.Logger
	now   func() time.Time
	cfg   Config
	state atomic.Pointer[material]
	conns *connections

	files *fileWatch // of Run; nil with the Workload API

	closeOnce sync.Once
	closed    atomic.Bool
	cancel    context.CancelFunc // ends the Workload API's watch
	watching  sync.WaitGroup
}

// material is one SVID with the bundles that came with it. It is never changed, only replaced, so that one handshake sees one of them.
type material struct {
	svid    *x509svid.SVID
	bundles *x509bundle.Set
}

func (m *material) notAfter() time.Time { return m.svid.Certificates[0].NotAfter }

// Open checks cfg and waits for a first valid SVID, 10 seconds at most and no longer than ctx: for the Workload API, and for files that are
// not there yet or are being written. Whatever else is wrong with files is an error at once. Its errors say what to do. With the Workload API
// it leaves a goroutine that Close ends.
func Open(ctx context.Context, cfg Config) (*Source, error) {
	s, err := open(ctx, cfg, openTimeout)
	if err != nil {
		return nil, fmt.Errorf("spiffe: open: %w", err)
	}
	return s, nil
}

func open(ctx context.Context, cfg Config, timeout time.Duration) (*Source, error) {
	switch {
	case cfg.ID.IsZero():
		return nil, errors.New("no SPIFFE ID is configured")
	case cfg.ID.Path() == "":
		return nil, fmt.Errorf("%q names a trust domain, not a workload: the ID needs a path", cfg.ID)
	case (cfg.WorkloadAPI == "") == (cfg.Files == nil):
		return nil, errors.New("want exactly one of the Workload API and files")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	s := &Source{id: cfg.ID, log: cfg.Log, now: cfg.Now, cfg: cfg, conns: newConnections(cfg.Now, cfg.Log), cancel: func() {}}
	if cfg.Files == nil {
		return s, s.openWorkloadAPI(ctx, timeout)
	}
	w, err := newFileWatch(cfg.ID, *cfg.Files)
	if err != nil {
		return nil, err
	}
	m, err := w.wait(ctx, timeout, s.now, s.log)
	if err != nil {
		return nil, err
	}
	s.files = w
	s.take(m)
	return s, nil
}

// Run reads the files again every second and takes what changed, watches the SVID's end, and blocks until ctx is done. Its error is nil:
// what fails is logged, and told to Config.OnError, and the last good SVID stays.
func (s *Source) Run(ctx context.Context) error {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	var expired *material // told
	for {
		if m := s.state.Load(); m != expired && s.expired(m) {
			expired = m
			s.log.ErrorContext(ctx, "the SVID expired and was not renewed: every TLS handshake fails from now on",
				"spiffe_id", s.id.String(), "not_after", stamp(m.notAfter()), "source", s.origin())
		}
		s.conns.sweep()
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		if s.files != nil {
			s.poll(ctx)
		}
	}
}

// poll looks at the files once.
func (s *Source) poll(ctx context.Context) {
	m, err := s.files.next(s.now())
	if err != nil {
		s.log.WarnContext(ctx, "the SVID's files changed and are not taken, the last good ones stay in use", "err", err,
			"not_after", stamp(s.state.Load().notAfter()))
		s.failed()
	}
	if m != nil {
		s.take(m)
	}
}

// take puts m into use. It has been checked.
func (s *Source) take(m *material) {
	before := s.state.Swap(m)
	leaf := m.svid.Certificates[0]
	if before != nil && before.svid.Certificates[0].Equal(leaf) {
		s.log.Debug("the bundles were renewed, the svid is the same", "spiffe_id", s.id.String())
		return
	}
	s.log.Info("svid in use", "spiffe_id", s.id.String(), "serial", serialHex(leaf), "not_after", stamp(leaf.NotAfter), "source", s.origin())
	if s.cfg.OnUpdate != nil {
		s.cfg.OnUpdate(leaf.NotAfter)
	}
}

func (s *Source) failed() {
	if s.cfg.OnError != nil {
		s.cfg.OnError()
	}
}

func (s *Source) origin() string {
	if s.cfg.Files != nil {
		return s.cfg.Files.Certificate
	}
	return s.cfg.WorkloadAPI
}

// Close ends the watch and hard closes the connections whose end it can no longer see to. The Source is of no use after it.
func (s *Source) Close() error {
	s.closeOnce.Do(func() {
		s.closed.Store(true)
		s.cancel()
		s.watching.Wait()
		s.conns.close()
	})
	return nil
}

// ID is Config.ID.
func (s *Source) ID() spiffeid.ID { return s.id }

// GetX509SVID gives the SVID in use. It is an error when it has expired, or after Close.
func (s *Source) GetX509SVID() (*x509svid.SVID, error) {
	m, err := s.current()
	if err != nil {
		return nil, fmt.Errorf("spiffe: get svid: %w", err)
	}
	return m.svid, nil
}

// GetX509BundleForTrustDomain gives a copy of a trust domain's authorities: the own one's or a federated one's. Any other is an error.
func (s *Source) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if s.closed.Load() {
		return nil, errors.New("spiffe: get bundle: the source is closed")
	}
	b, err := s.state.Load().bundles.GetX509BundleForTrustDomain(td)
	if err != nil {
		return nil, fmt.Errorf("spiffe: get bundle: %w", err)
	}
	return b.Clone(), nil
}

// Ready says why the SVID cannot be used; nil if it can.
func (s *Source) Ready() error {
	if _, err := s.current(); err != nil {
		return fmt.Errorf("spiffe: %w", err)
	}
	return nil
}

// current gives what a handshake may use.
func (s *Source) current() (*material, error) {
	m := s.state.Load()
	switch {
	case s.closed.Load():
		return nil, errors.New("the source is closed")
	case m == nil:
		return nil, errors.New("there is no SVID yet")
	case s.expired(m):
		return nil, fmt.Errorf("the SVID of %s expired at %s and %s gave no other", s.id, stamp(m.notAfter()), s.origin())
	}
	return m, nil
}

func (s *Source) expired(m *material) bool { return !s.now().Before(m.notAfter()) }

// checkMaterial decides whether svid may be taken into use.
func checkMaterial(id spiffeid.ID, svid *x509svid.SVID, bundles *x509bundle.Set, now time.Time) (*material, error) {
	leaf := svid.Certificates[0]
	own, err := x509svid.IDFromCert(leaf)
	switch {
	case err != nil:
		return nil, fmt.Errorf("the certificate is no SVID: %w", err)
	case own != id:
		return nil, fmt.Errorf("the certificate is for %s, identity is %s", own, id)
	case now.Before(leaf.NotBefore):
		return nil, fmt.Errorf("the certificate is not valid before %s, and it is %s: look at the clocks", stamp(leaf.NotBefore), stamp(now))
	case !now.Before(leaf.NotAfter):
		return nil, fmt.Errorf("the certificate expired at %s, and it is %s", stamp(leaf.NotAfter), stamp(now))
	}
	if _, _, err := x509svid.Verify(svid.Certificates, bundles, x509svid.WithTime(now)); err != nil {
		return nil, fmt.Errorf("the certificate does not verify against the authorities of %s: %w", id.TrustDomain(), err)
	}
	return &material{svid, bundles}, nil
}

// checkBundle takes authorities only. Any other certificate in a pool of roots vouches for itself.
func checkBundle(certs []*x509.Certificate) error {
	if len(certs) == 0 {
		return errors.New("holds no authority")
	}
	for _, c := range certs {
		if !c.BasicConstraintsValid || !c.IsCA || (c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0) {
			return fmt.Errorf("certificate %s (%s) is no authority: it must not sign others", serialHex(c), c.Subject)
		}
	}
	return nil
}

// stamp writes a time into a log or an error.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// serialHex writes a serial number as openssl does, in lower case: pairs of hexadecimal digits without colons.
func serialHex(c *x509.Certificate) string {
	if c.SerialNumber == nil {
		return ""
	}
	s := c.SerialNumber.Text(16)
	if digits := strings.TrimPrefix(s, "-"); len(digits)%2 == 1 {
		return s[:len(s)-len(digits)] + "0" + digits
	}
	return s
}
