package control

import (
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/knhk/sidecar/server/access"
)

// directory is an open directory; names in it are reached through the descriptor, so that they are short.
type directory struct{ f *os.File }

func openDirectory(dir string) (*directory, error) {
	f, err := os.OpenFile(dir, unix.O_DIRECTORY|unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return &directory{f}, nil
}

func (d *directory) path(name string) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s", d.f.Fd(), name)
}
func (d *directory) close() error { return d.f.Close() }

// peerUID asks the kernel for the user at the other end.
func peerUID(c *net.UnixConn) (int, error) { return access.PeerUID(c) }
