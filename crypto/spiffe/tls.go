package spiffe

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// maxID is how long a SPIFFE ID may be, in bytes (SPIFFE-ID specification, section 2.3). A certificate has room for a hundred times that,
// and who looks an ID up looks at each level of its path.
const maxID = 2048

// ServerTLS gives mutual TLS, version 1.3 only, with the key exchanges X25519MLKEM768, X25519 and P-256 in that order and no session
// tickets: a resumed session would not be verified. A client is refused in the handshake unless its SVID verifies against the bundle of its
// own trust domain and allow gives nil for its ID; a nil allow lets nobody in. The connection under the TLS one is closed when the first of
// both certificates expires.
//
// nextProtos are the protocols of ALPN. They must be all that the caller wants: what is added to the configuration later does not count.
func (s *Source) ServerTLS(nextProtos []string, allow func(spiffeid.ID) error) *tls.Config {
	outer := base(nextProtos)
	outer.ClientAuth = tls.RequireAnyClientCert
	outer.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		m, err := s.current()
		if err != nil {
			return nil, fmt.Errorf("spiffe: %w", err)
		}
		h := &handle{s.conns, hello.Conn}
		c := base(nextProtos)
		c.ClientAuth = tls.RequireAnyClientCert // and VerifyConnection verifies it
		c.Certificates = []tls.Certificate{m.certificate()}
		c.VerifyConnection = func(cs tls.ConnectionState) error { return s.admit(h, m, &cs, allow) }
		return c, nil
	}
	return outer
}

// ClientTLS gives the client's side of ServerTLS: the server is whoever allow says, never a host name. A tls.Config cannot get at a
// client's connection, so this one checks both certificates in the handshake but does not end the connection when one expires: DialTLS does.
func (s *Source) ClientTLS(nextProtos []string, allow func(spiffeid.ID) error) *tls.Config {
	return s.clientTLS(nil, s.current, nextProtos, allow)
}

// clientTLS is ClientTLS with the material that get gives. h, if there is one, is of the connection that ends when a certificate does.
func (s *Source) clientTLS(h *handle, get func() (*material, error), nextProtos []string, allow func(spiffeid.ID) error) *tls.Config {
	c := base(nextProtos)
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		m, err := get()
		if err != nil {
			return nil, fmt.Errorf("spiffe: %w", err)
		}
		cert := m.certificate()
		return &cert, nil
	}
	c.InsecureSkipVerify = true // of host names; VerifyConnection verifies the certificate
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		m, err := get()
		if err != nil {
			return fmt.Errorf("spiffe: %w", err)
		}
		return s.admit(h, m, &cs, allow)
	}
	return c
}

// DialTLS dials TCP and does the client's handshake of ClientTLS, for http.Transport.DialTLSContext and the like. The connection is a
// *tls.Conn. It is closed when the first of both certificates expires. The handshake takes no longer than ctx.
func (s *Source) DialTLS(nextProtos []string, allow func(spiffeid.ID) error) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		var d net.Dialer
		raw, err := d.DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		conn, err := s.client(ctx, raw, nextProtos, allow)
		if err != nil {
			raw.Close()
			return nil, err
		}
		return conn, nil
	}
}

// client does the handshake on raw.
func (s *Source) client(ctx context.Context, raw net.Conn, nextProtos []string, allow func(spiffeid.ID) error) (*tls.Conn, error) {
	m, err := s.current()
	if err != nil {
		return nil, fmt.Errorf("spiffe: %w", err)
	}
	one := func() (*material, error) { return m, nil } // for the whole handshake
	conn := tls.Client(raw, s.clientTLS(&handle{s.conns, raw}, one, nextProtos, allow))
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	return conn, nil
}

func base(nextProtos []string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		CurvePreferences:       []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256},
		SessionTicketsDisabled: true,
		NextProtos:             nextProtos,
	}
}

// certificate gives the SVID as package tls wants it.
func (m *material) certificate() tls.Certificate {
	c := tls.Certificate{PrivateKey: m.svid.PrivateKey, Leaf: m.svid.Certificates[0]}
	for _, cert := range m.svid.Certificates {
		c.Certificate = append(c.Certificate, cert.Raw)
	}
	return c
}

// admit decides whether the handshake goes on: it is the one place that says who a peer is. The peer has yet to prove that it has the key of
// its certificate (RFC 8446, section 4.4.3); package tls sees to that right after, before anything of the connection is anybody's to read.
func (s *Source) admit(h *handle, m *material, cs *tls.ConnectionState, allow func(spiffeid.ID) error) error {
	peer, end, err := s.verify(m, cs, allow)
	if err != nil {
		s.log.Debug("tls peer refused", "err", err)
		return fmt.Errorf("spiffe: peer refused: %w", err)
	}
	leaf, own := cs.PeerCertificates[0], m.svid.Certificates[0]
	s.log.Debug("tls connection", "peer", peer.String(), "peer_serial", serialHex(leaf), "peer_not_after", stamp(leaf.NotAfter),
		"own_serial", serialHex(own), "own_not_after", stamp(own.NotAfter))
	if h != nil {
		h.closeAt(end, peer)
	}
	return nil
}

// verify gives the peer and when the first of both certificates expires.
func (s *Source) verify(m *material, cs *tls.ConnectionState, allow func(spiffeid.ID) error) (spiffeid.ID, time.Time, error) {
	now := s.now()
	if cs.Version != tls.VersionTLS13 || cs.DidResume { // neither can be, as configured
		return spiffeid.ID{}, time.Time{}, errors.New("want TLS 1.3 and no resumed session")
	}
	if s.expired(m) {
		return spiffeid.ID{}, time.Time{}, errors.New("the own SVID expired in the handshake")
	}
	// It takes the one URI SAN of the leaf, and the authorities of that ID's trust domain alone.
	id, _, err := x509svid.Verify(cs.PeerCertificates, m.bundles, x509svid.WithTime(now))
	if err != nil {
		return spiffeid.ID{}, time.Time{}, err
	}
	leaf := cs.PeerCertificates[0]
	switch {
	case id.Path() == "":
		return spiffeid.ID{}, time.Time{}, fmt.Errorf("%s names a trust domain, not a workload", id)
	case len(id.String()) > maxID:
		return spiffeid.ID{}, time.Time{}, fmt.Errorf("the certificate has a SPIFFE ID of %d bytes: at most %d are read", len(id.String()), maxID)
	case !now.Before(leaf.NotAfter): // to the second, where x509 is generous
		return spiffeid.ID{}, time.Time{}, fmt.Errorf("the certificate of %s expired at %s", id, stamp(leaf.NotAfter))
	case allow == nil:
		return spiffeid.ID{}, time.Time{}, fmt.Errorf("nobody is allowed, nor is %s", id)
	}
	if err := allow(id); err != nil {
		return spiffeid.ID{}, time.Time{}, err
	}
	end := m.notAfter()
	if leaf.NotAfter.Before(end) {
		end = leaf.NotAfter
	}
	return id, end, nil
}

// PeerID gives the peer of a connection whose handshake ServerTLS, ClientTLS or DialTLS has seen to, and that is done. It verifies nothing
// again: of any other connection its answer is worth nothing.
func PeerID(cs *tls.ConnectionState) (spiffeid.ID, error) {
	switch {
	case cs == nil || !cs.HandshakeComplete:
		return spiffeid.ID{}, errors.New("spiffe: peer id: no TLS handshake was completed")
	case cs.Version != tls.VersionTLS13:
		return spiffeid.ID{}, errors.New("spiffe: peer id: not TLS 1.3")
	case len(cs.PeerCertificates) == 0:
		return spiffeid.ID{}, errors.New("spiffe: peer id: the peer has no certificate")
	}
	id, err := x509svid.IDFromCert(cs.PeerCertificates[0])
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("spiffe: peer id: %w", err)
	}
	return id, nil
}
