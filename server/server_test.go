package server

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/knhk/sidecar/server/config"
)

// TestTiles serves the public files of a log and nothing else in its directory.
func TestTiles(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{
		"checkpoint": "cp", "tile/0/000": "hashes", "tile/entries/000.p/3": "entries", ".state/treeState": "private", ".state/x": "private",
	} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	h := httptest.NewServer(tiles(dir))
	defer h.Close()
	for _, c := range []struct {
		method, path string
		status       int
		body         string
	}{
		{"GET", "/checkpoint", 200, "cp"},
		{"GET", "/tile/0/000", 200, "hashes"},
		{"GET", "/tile/entries/000.p/3", 200, "entries"},
		{"HEAD", "/checkpoint", 200, ""},
		{"GET", "/tile/0/001", 404, ""},
		{"GET", "/", 404, ""},
		{"GET", "/tile/", 404, ""},
		{"GET", "/.state/treeState", 404, ""},
		{"GET", "/tile/../.state/treeState", 404, ""},
		{"GET", "/tile/%2e%2e/.state/treeState", 404, ""},
		{"PUT", "/checkpoint", 405, ""},
	} {
		req, err := http.NewRequestWithContext(t.Context(), c.method, h.URL+c.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != c.status || c.status == 200 && string(body) != c.body || strings.Contains(string(body), "private") {
			t.Errorf("%s %s: %d %q, want %d %q", c.method, c.path, resp.StatusCode, body, c.status, c.body)
		}
	}
}

// TestListen replaces a socket that a dead process left, and nothing else.
func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	addr := config.Address{Network: "unix", Address: path}
	ln, err := listen(t.Context(), addr)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != socketMode {
		t.Errorf("socket mode %v, %v", fi.Mode(), err)
	}
	if _, err := listen(t.Context(), addr); err == nil || !strings.Contains(err.Error(), "somebody is serving") {
		t.Errorf("a served socket: %v", err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false) // as a killed process leaves it
	ln.Close()
	if ln, err = listen(t.Context(), addr); err != nil {
		t.Errorf("a left socket: %v", err)
	} else {
		ln.Close()
	}
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(t.Context(), addr); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file: %v", err)
	}
}
