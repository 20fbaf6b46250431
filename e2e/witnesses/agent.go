package witnesses

import (
	"crypto/ed25519"
	"net"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/crypto/ssh/agent"

	"github.com/knhk/sidecar/e2e/harness"
)

// serveAgent is an SSH agent that holds one key, and returns its socket. It ends with the test.
func serveAgent(t harness.TB, key ed25519.PrivateKey) (socket string) {
	t.Helper()
	// Directly below /tmp, whatever $TMPDIR is: a socket's path has 107 bytes.
	dir, err := os.MkdirTemp("/tmp", "knhk-w-")
	if err != nil {
		t.Fatalf("ssh agent: %v", err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // empty but for the socket
	ring := agent.NewKeyring()
	if err := ring.Add(agent.AddedKey{PrivateKey: key}); err != nil {
		t.Fatalf("ssh agent: %v", err)
	}
	socket = filepath.Join(dir, "agent")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatalf("ssh agent: %v", err)
	}
	var (
		serving sync.WaitGroup
		mu      sync.Mutex
		conns   []net.Conn
	)
	serving.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return // closed below
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
			serving.Go(func() { _ = agent.ServeAgent(ring, c) }) // until the client has gone
		}
	})
	t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		serving.Wait()
	})
	return socket
}
