package spiffe

import (
	"bytes"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/knhk/sidecar/crypto/spiffe/spiffetest"
)

const (
	serverID = "spiffe://knhk.test/knhk"
	clientID = "spiffe://knhk.test/envoy"
)

func anyone(spiffeid.ID) error { return nil }

// filesOf writes an SVID and the authorities of its own domain, and gives the configuration.
func filesOf(t testing.TB, svid *x509svid.SVID, ca *spiffetest.CA, federated ...*spiffetest.CA) Config {
	t.Helper()
	dir := t.TempDir()
	p := spiffetest.WriteFiles(t, dir, svid, ca)
	f := &Files{Certificate: p.Certificate, Key: p.Key, CA: p.CA, Federated: map[spiffeid.TrustDomain]string{}}
	for _, other := range federated {
		name := dir + "/" + other.TrustDomain.Name() + ".pem"
		spiffetest.WriteFile(t, name, other.PEM())
		f.Federated[other.TrustDomain] = name
	}
	return Config{ID: svid.ID, Files: f}
}

func mustOpen(t testing.TB, cfg Config) *Source {
	t.Helper()
	s, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// wantError fails unless err has every part in its text.
func wantError(t *testing.T, what string, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: no error, want %q", what, parts)
		return
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("%s: error %q, want %q in it", what, err, p)
		}
	}
}

func serialOf(t testing.TB, s *Source) string {
	t.Helper()
	svid, err := s.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	return serialHex(svid.Certificates[0])
}

// journal keeps a log in memory.
type journal struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (j *journal) Write(b []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.buf.Write(b)
}

func (j *journal) count(text string) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return strings.Count(j.buf.String(), text)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.buf.String()
}

func (j *journal) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(j, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// eventually waits for what another process or the network brings.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}
