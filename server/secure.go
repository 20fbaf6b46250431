package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/credentials"

	"github.com/knhk/sidecar/crypto/spiffe"
	"github.com/knhk/sidecar/server/access"
	"github.com/knhk/sidecar/server/config"
)

// openIdentity waits for knhk's own certificate. Without one in the configuration there is nothing to open.
func (s *Server) openIdentity(ctx context.Context, id config.Identity) (err error) {
	if id.IsZero() {
		return nil
	}
	cfg := spiffe.Config{
		ID: id.ID, WorkloadAPI: id.WorkloadAPI, Log: s.log, Now: time.Now, OnError: s.metrics.IdentityFailed,
		OnUpdate: func(notAfter time.Time) {
			s.metrics.IdentityUpdated(notAfter)
			if left := time.Until(notAfter); left < id.SVIDTTL/3 {
				s.log.Error("identity: the certificate lives shorter than identity.svid_ttl promises: connections may be closed when it expires",
					"left", left.Round(time.Millisecond), "svid_ttl", id.SVIDTTL)
			}
		},
	}
	if f := id.Files; f != nil {
		cfg.Files = &spiffe.Files{Certificate: f.Certificate, Key: f.Key, CA: f.CA, Federated: f.Federated}
	}
	s.identity, err = spiffe.Open(ctx, cfg)
	return err
}

// tlsFor gives the TLS of a TCP listener; nil where there is none.
func (s *Server) tlsFor(on access.Listener, protocols ...string) *tls.Config {
	if s.identity == nil {
		return nil
	}
	return s.identity.ServerTLS(protocols, s.access.Admit(on))
}

// plain reports whether who connects to addr is known without a handshake.
func (s *Server) plain(addr config.Address) bool { return addr.Network == "unix" || s.identity == nil }

// transport is the security of the Envoy-facing listener, for gRPC: mutual TLS, or what the listener knows of who connected.
type transport struct {
	s   *Server
	tls *tls.Config // nil: the listener knows
}

// ServerHandshake says who is at the other end of raw, a connection of the guard. gRPC gives it a deadline. Bytes are counted once they
// are decrypted: what TLS adds to a message would else be held against a peer that finishes all its messages.
func (t transport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	p, ok := raw.(*peerConn)
	if !ok {
		return nil, nil, errors.New("a connection that nobody guards")
	}
	if t.tls == nil {
		k, ok := p.Conn.(interface{ Who() access.Who })
		if !ok {
			return nil, nil, errors.New("a connection of nobody")
		}
		who := k.Who()
		p.who.Store(&who)
		return p, access.AuthInfo{Who: who}, nil
	}
	c := tls.Server(p.Conn, t.tls)
	id, err := handshake(c)
	if err != nil {
		if !errors.Is(err, access.ErrStranger) { // who has been counted
			t.s.access.Refuse(access.OnEnvoy, access.Handshake, fmt.Errorf("from %s: %w", p, err))
		}
		return nil, nil, err
	}
	who := access.Who{ID: id}
	p.who.Store(&who)
	return &secured{c, p}, access.AuthInfo{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, Who: who,
	}, nil
}

func handshake(c *tls.Conn) (id spiffeid.ID, err error) {
	if err := c.Handshake(); err != nil {
		return id, err
	}
	cs := c.ConnectionState()
	if cs.NegotiatedProtocol != "h2" {
		return id, errors.New("the peer does not ask for h2: gRPC takes ALPN")
	}
	return spiffe.PeerID(&cs)
}

// ClientHandshake is not for servers.
func (transport) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("for servers only")
}

// Info implements credentials.TransportCredentials.
func (t transport) Info() credentials.ProtocolInfo {
	if t.tls == nil {
		return credentials.ProtocolInfo{SecurityProtocol: "insecure"}
	}
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials: nothing in it changes.
func (t transport) Clone() credentials.TransportCredentials { return t }

// OverrideServerName is not for servers.
func (transport) OverrideServerName(string) error { return errors.New("for servers only") }

// secured is a peer's connection after its handshake.
type secured struct {
	*tls.Conn
	p *peerConn
}

// Read counts what was decrypted.
func (c *secured) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	return c.p.count(n, err)
}

// RemoteAddr is the guard's: see peerConn.
func (c *secured) RemoteAddr() net.Addr { return c.p }

// Close says goodbye to the peer and gives up the place.
func (c *secured) Close() error {
	c.p.leave()
	return c.Conn.Close()
}

// handshakeErrors counts the TLS handshakes that an http.Server tells of in its error log, and drops its lines: access logs them, not
// more often than is good.
type handshakeErrors struct {
	s  *Server
	on access.Listener
}

// Write implements io.Writer for one line of an http.Server.
func (h handshakeErrors) Write(line []byte) (int, error) {
	text := strings.TrimSpace(string(line))
	if rest, ok := strings.CutPrefix(text, "http: TLS handshake error "); ok {
		// A stranger's handshake has been counted; its error is flattened here.
		if !strings.Contains(rest, access.ErrStranger.Error()) {
			h.s.access.Refuse(h.on, access.Handshake, errors.New(rest))
		}
	} else {
		h.s.log.LogAttrs(context.Background(), slog.LevelDebug, text)
	}
	return len(line), nil
}
