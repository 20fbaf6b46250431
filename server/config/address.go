package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"strconv"
	"strings"
)

// maxSocketPath is what fits into sun_path on Linux with its closing NUL.
const maxSocketPath = 107

// parseAddress reads host:port with a literal IP address, or unix:/path.
func parseAddress(s string) (Address, error) {
	if p, ok := strings.CutPrefix(s, "unix:"); ok {
		switch {
		case !path.IsAbs(p):
			return Address{}, fmt.Errorf("socket path %q is not absolute: want unix:/path", p)
		case len(p) > maxSocketPath:
			return Address{}, fmt.Errorf("socket path is %d bytes long: the system takes at most %d", len(p), maxSocketPath)
		case strings.ContainsRune(p, 0):
			return Address{}, errors.New("socket path contains a NUL")
		case path.Clean(p) == "/" || strings.HasSuffix(p, "/"):
			return Address{}, fmt.Errorf("socket path %q is a directory", p)
		}
		return Address{Network: "unix", Address: p}, nil
	}
	host, port, err := splitHostPort(s)
	if err != nil {
		return Address{}, fmt.Errorf("%w: want host:port or unix:/path", err)
	}
	if _, err := netip.ParseAddr(host); err != nil {
		return Address{}, fmt.Errorf("host %q is not an IP address: names are not looked up; write 127.0.0.1 or localhost for loopback", host)
	}
	return Address{Network: "tcp", Address: net.JoinHostPort(host, port)}, nil
}

// splitHostPort is net.SplitHostPort with a port in 0 to 65535, written in digits.
func splitHostPort(s string) (host, port string, err error) {
	host, port, err = net.SplitHostPort(s)
	if err != nil {
		var addr *net.AddrError
		if errors.As(err, &addr) {
			return "", "", fmt.Errorf("%q: %s", s, addr.Err)
		}
		return "", "", err
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || strconv.FormatUint(n, 10) != port {
		return "", "", fmt.Errorf("port %q is not a number from 0 to 65535", port)
	}
	return host, port, nil
}

// loopback reports whether only this machine can reach a.
func (a Address) loopback() bool {
	if a.Network == "unix" {
		return true
	}
	ap, err := netip.ParseAddrPort(a.Address)
	return err == nil && ap.Addr().Unmap().IsLoopback()
}

// port returns a's TCP port, 0 for a socket.
func (a Address) port() uint16 {
	ap, err := netip.ParseAddrPort(a.Address)
	if a.Network == "unix" || err != nil {
		return 0
	}
	return ap.Port()
}

// overlaps reports whether a and b cannot both be listened on. Port 0 is a free port and overlaps nothing.
func (a Address) overlaps(b Address) bool {
	if a.Network != b.Network {
		return false
	}
	if a.Network == "unix" {
		return path.Clean(a.Address) == path.Clean(b.Address)
	}
	x, errX := netip.ParseAddrPort(a.Address)
	y, errY := netip.ParseAddrPort(b.Address)
	if errX != nil || errY != nil || x.Port() != y.Port() || x.Port() == 0 {
		return false
	}
	return x.Addr().Unmap() == y.Addr().Unmap() || x.Addr().IsUnspecified() || y.Addr().IsUnspecified()
}
