//go:build !linux

package control

import (
	"net"
	"os"
	"path/filepath"
)

// directory is a directory by its path: elsewhere than on Linux the path must fit into a socket's address, and the modes of socket
// and directory alone keep others out.
type directory struct{ dir string }

func openDirectory(dir string) (*directory, error) {
	_, err := os.Stat(dir)
	return &directory{dir}, err
}

func (d *directory) path(name string) string { return filepath.Join(d.dir, name) }
func (d *directory) close() error            { return nil }

func peerUID(*net.UnixConn) (int, error) { return os.Geteuid(), nil }
