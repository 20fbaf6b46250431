// Package control is the socket over which the keys of a running knhk are changed: a unix socket in its state directory.
//
// It promises that only root and the user that knhk runs as get through: the socket has mode 0600 in a directory of mode 0700, and
// on Linux the kernel is asked who is at the other end of each connection. It promises too that neither end minds how long the path
// of the directory is, though a socket's address holds only 107 bytes. It says nothing about what is spoken on the socket, and
// starts nothing: package server serves on the Listener, the program's commands call over a Client's transport.
package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// Name of the socket in a state directory.
const Name = "control"

const (
	mode      = 0o600
	probeWait = time.Second
)

// ErrNotRunning says that nobody serves on the socket of a directory.
var ErrNotRunning = errors.New("no knhk serves there")

// Listener accepts connections of root and of the own user. Close removes the socket.
type Listener struct {
	*net.UnixListener
	dir  *directory
	log  *slog.Logger
	once sync.Once
}

// Listen binds the socket of a state directory, which the caller must own (its lock): a socket that a dead process left is replaced.
// Anything else under the name is left alone, and an error.
func Listen(ctx context.Context, dir string, log *slog.Logger) (_ *Listener, err error) {
	d, err := openDirectory(dir)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("control socket: %w", err), d.close())
		}
	}()
	name := d.path(Name)
	switch fi, err := os.Lstat(name); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case fi.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("%s is there and is no socket: knhk makes one of that name, move the file away", filepath.Join(dir, Name))
	default:
		// The lock of the directory is ours, so whoever answers holds no lock: it is no knhk, and not ours to push aside.
		if c, err := net.DialTimeout("unix", name, probeWait); err == nil {
			return nil, errors.Join(fmt.Errorf("%s: somebody serves there who does not own the directory", filepath.Join(dir, Name)), c.Close())
		}
		if err := os.Remove(name); err != nil {
			return nil, err
		}
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "unix", name)
	if err != nil {
		return nil, err
	}
	u := ln.(*net.UnixListener)
	u.SetUnlinkOnClose(false) // by Close, which knows the directory
	// Until here the umask alone said who may connect; the directory's mode, and Accept, keep others out.
	if err := os.Chmod(name, mode); err != nil {
		return nil, errors.Join(err, u.Close())
	}
	return &Listener{UnixListener: u, dir: d, log: log}, nil
}

// Accept gives the next connection of somebody who may; others are closed, with a warning.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		uid, err := peerUID(c)
		if err == nil && (uid == 0 || uid == os.Geteuid()) {
			return c, nil
		}
		if err != nil {
			l.log.Warn("control socket: connection refused: who is at its other end cannot be told", "error", err)
		} else {
			l.log.Warn("control socket: connection refused: only root and the user that knhk runs as may", "uid", uid)
		}
		c.Close()
	}
}

// Close stops listening and removes the socket. A second call does nothing.
func (l *Listener) Close() error {
	err := net.ErrClosed
	l.once.Do(func() {
		err = l.UnixListener.Close()
		// A crash before this line leaves a socket that nobody serves; the next Listen replaces it.
		if rerr := os.Remove(l.dir.path(Name)); !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
		err = errors.Join(err, l.dir.close())
	})
	return err
}

// Transport returns an HTTP transport that reaches the knhk that serves a state directory, whatever host a request names.
// Its errors wrap ErrNotRunning when nobody serves there.
func Transport(dir string) *http.Transport {
	return &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			d, err := openDirectory(dir)
			if err != nil {
				return nil, err
			}
			defer func() { _ = d.close() }() // nothing is read or written through it
			var nd net.Dialer
			c, err := nd.DialContext(ctx, "unix", d.path(Name))
			switch {
			case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
				return nil, fmt.Errorf("%s: %w", filepath.Join(dir, Name), ErrNotRunning)
			case errors.Is(err, fs.ErrPermission):
				return nil, fmt.Errorf("%s: only root and the user that knhk runs as may connect: %w", filepath.Join(dir, Name), fs.ErrPermission)
			}
			return c, err
		},
	}
}
