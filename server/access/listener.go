package access

import (
	"fmt"
	"net"
)

// PlainListener accepts connections that need no handshake to know who is at their other end: those of a unix socket, by the uid that the
// kernel tells, and, if Insecure, those of a TCP listener, by anyone.
type PlainListener struct {
	net.Listener
	Authority *Authority
	On        Listener
	Insecure  bool
}

// Accept gives the next connection of somebody who may do something here; others are closed.
func (l PlainListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		who, err := l.ask(c)
		if err != nil {
			l.Authority.Refuse(l.On, Stranger, err)
		} else if err = l.Authority.Enter(l.On, who); err == nil {
			return &known{c, who}, nil
		}
		c.Close()
	}
}

func (l PlainListener) ask(c net.Conn) (Who, error) {
	if u, ok := c.(*net.UnixConn); ok {
		uid, err := PeerUID(u)
		if err != nil {
			return Who{}, fmt.Errorf("who is at the other end cannot be told: %w", err)
		}
		return Who{UID: uid, User: true}, nil
	}
	if !l.Insecure {
		return Who{}, fmt.Errorf("a connection from %s without TLS", c.RemoteAddr())
	}
	return Who{Insecure: true}, nil
}

// known is a connection of somebody known.
type known struct {
	net.Conn
	who Who
}

// Who is at the other end.
func (k *known) Who() Who { return k.who }
