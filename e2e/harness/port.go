package harness

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// Ports are taken below the usual ephemeral range (32768 on), so that no outgoing connection of another test sits on
// one between the moment it was found free and the moment its owner binds it.
const (
	portLow  = 20000
	portHigh = 32000
)

var held struct {
	sync.Mutex
	locks []*os.File // one per port given out; the kernel releases them when this process ends
}

// FreePort returns a loopback TCP port that nobody listens on and that no other process using this package gets while
// this one lives: SO_REUSEPORT lets two Envoys share a port without an error, so looking free is not enough.
func FreePort() (int, error) {
	dir := filepath.Join(os.TempDir(), "knhk-e2e-ports")
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return 0, fmt.Errorf("free port: %w", err)
	}
	for range 1000 {
		port := portLow + rand.IntN(portHigh-portLow)
		ok, err := claim(dir, port)
		if err != nil {
			return 0, fmt.Errorf("free port: %w", err)
		}
		if ok {
			return port, nil
		}
	}
	return 0, errors.New("free port: none found in 1000 tries")
}

// FreeAddr is FreePort as "127.0.0.1:port".
func FreeAddr() (string, error) {
	port, err := FreePort()
	if err != nil {
		return "", err
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), nil
}

func claim(dir string, port int) (bool, error) {
	f, err := os.OpenFile(filepath.Join(dir, strconv.Itoa(port)), os.O_CREATE|os.O_RDWR, 0o666)
	if err != nil {
		return false, err
	}
	// flock belongs to the open file: a second claim of this very process fails as well.
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return false, nil
	}
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		f.Close()
		return false, nil
	}
	if err := l.Close(); err != nil {
		f.Close()
		return false, err
	}
	held.Lock()
	defer held.Unlock()
	held.locks = append(held.locks, f)
	return true, nil
}
