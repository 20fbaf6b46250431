package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path"
	"strings"
	"time"

	"github.com/knhk/sidecar/server/config"
)

// socketMode lets the owner and the group connect: Envoy often runs as another user of the same group.
const socketMode = 0o660

// listen binds addr. A unix socket that a dead process left is replaced; one that somebody serves is not.
func listen(ctx context.Context, addr config.Address) (net.Listener, error) {
	var lc net.ListenConfig
	if addr.Network == "unix" {
		if err := clearSocket(addr.Address); err != nil {
			return nil, err
		}
	}
	ln, err := lc.Listen(ctx, addr.Network, addr.Address)
	if err != nil {
		return nil, err
	}
	if addr.Network == "unix" {
		if err := os.Chmod(addr.Address, socketMode); err != nil {
			return nil, errors.Join(err, ln.Close())
		}
	}
	return ln, nil
}

func clearSocket(name string) error {
	fi, err := os.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("listen on %s: something else is there, not a socket", name)
	}
	if c, err := net.DialTimeout("unix", name, time.Second); err == nil {
		c.Close()
		return fmt.Errorf("listen on %s: somebody is serving there", name)
	}
	return os.Remove(name)
}

// tiles serves the log's public files, read-only: the checkpoint, the tiles and the entry bundles (C2SP tlog-tiles), never the
// log's own state.
func tiles(dir string) http.Handler {
	files := http.FileServerFS(os.DirFS(dir))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p := r.URL.Path
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			http.Error(w, "read-only", http.StatusMethodNotAllowed)
			return
		}
		switch {
		case path.Clean(p) != p: // dot segments would lead to the log's own state
			http.NotFound(w, r)
			return
		case p == "/checkpoint":
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			w.Header().Set("Cache-Control", "no-cache")
		case strings.HasPrefix(p, "/tile/") && !strings.HasSuffix(p, "/"):
			w.Header().Set("Content-Type", "application/octet-stream")
			w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
		default:
			http.NotFound(w, r)
			return
		}
		files.ServeHTTP(w, r)
	})
}
