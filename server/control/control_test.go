package control

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// serve answers every request until the test ends.
func serve(t *testing.T, ln *Listener) {
	t.Helper()
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "here") }), ReadHeaderTimeout: time.Minute}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(ln) }()
	t.Cleanup(func() { srv.Close(); <-done })
}

func get(dir string) (string, error) {
	resp, err := (&http.Client{Transport: Transport(dir), Timeout: time.Minute}).Get("http://knhk/")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

// TestLongPath: the address of a socket holds 107 bytes, and the path of a state directory may be longer.
func TestLongPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("x", 100), strings.Repeat("y", 100))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := get(dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("nobody there: %v", err)
	}
	ln, err := Listen(t.Context(), dir, quiet())
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Lstat(filepath.Join(dir, Name))
	if err != nil || fi.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the socket: %v, %v", fi, err)
	}
	serve(t, ln)
	if got, err := get(dir); got != "here" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if err := ln.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(filepath.Join(dir, Name)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Close: %v, want it gone", err)
	}
	if _, err := get(dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("after Close: %v", err)
	}
}

// TestStale: what a dead process left is replaced; a socket that is served, or a file, is not touched.
func TestStale(t *testing.T) {
	dir := t.TempDir()
	dead, err := Listen(t.Context(), dir, quiet())
	if err != nil {
		t.Fatal(err)
	}
	dead.UnixListener.Close() // as a kill does: the file stays
	if _, err := get(dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("a socket of a dead process: %v", err)
	}
	ln, err := Listen(t.Context(), dir, quiet())
	if err != nil {
		t.Fatal(err)
	}
	serve(t, ln)
	if _, err := Listen(t.Context(), dir, quiet()); err == nil || !strings.Contains(err.Error(), "somebody serves there") {
		t.Errorf("a served socket: %v", err)
	}
	if got, err := get(dir); got != "here" || err != nil {
		t.Errorf("%q, %v", got, err)
	}

	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, Name), []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(t.Context(), dir, quiet()); err == nil || !strings.Contains(err.Error(), "is no socket") {
		t.Errorf("a file: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, Name)); err != nil || !bytes.Equal(b, []byte("precious")) {
		t.Errorf("the file: %q, %v", b, err)
	}
	if _, err := get(filepath.Join(dir, "nowhere")); err == nil || errors.Is(err, ErrNotRunning) {
		t.Errorf("no such directory: %v", err)
	}
}
