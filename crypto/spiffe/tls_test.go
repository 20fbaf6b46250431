package spiffe

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/knhk/sidecar/crypto/spiffe/spiffetest"
)

// pair gives both ends of a connection over loopback. A pipe would not do: it holds nothing, so that two sides that refuse wait for each other.
func pair(t testing.TB) (server, client net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return server, client
}

// shake does one handshake and sends one byte each way, so that the server's refusal reaches the client. It gives both sides' states.
func shake(t testing.TB, server, client *tls.Config) (srv, cl tls.ConnectionState, srvErr, clErr error) {
	t.Helper()
	a, b := pair(t)
	end := time.Now().Add(20 * time.Second)
	a.SetDeadline(end)
	b.SetDeadline(end)
	var wg sync.WaitGroup
	wg.Go(func() {
		c := tls.Server(a, server)
		defer a.Close()
		if srvErr = c.Handshake(); srvErr == nil {
			srv = c.ConnectionState()
			_, srvErr = c.Write([]byte{1})
		}
	})
	wg.Go(func() {
		c := tls.Client(b, client)
		defer b.Close()
		if clErr = c.Handshake(); clErr == nil {
			cl = c.ConnectionState()
			_, clErr = io.ReadFull(c, make([]byte, 1))
		}
	})
	wg.Wait()
	return srv, cl, srvErr, clErr
}

func TestHandshake(t *testing.T) {
	ca := spiffetest.NewCA(t, "knhk.test")
	var log journal
	cfg := filesOf(t, ca.Issue(serverID), ca)
	cfg.Log = log.logger()
	server := mustOpen(t, cfg)
	client := mustOpen(t, filesOf(t, ca.Issue(clientID), ca))
	only := func(id string) func(spiffeid.ID) error {
		p, err := ParsePattern(id)
		if err != nil {
			t.Fatal(err)
		}
		return func(id spiffeid.ID) error {
			if !p.Match(id) {
				return fmt.Errorf("%s is not allowed here", id)
			}
			return nil
		}
	}
	srv, cl, srvErr, clErr := shake(t, server.ServerTLS([]string{"h2", "http/1.1"}, only(clientID)), client.ClientTLS([]string{"h2"}, only(serverID)))
	if srvErr != nil || clErr != nil {
		t.Fatal(srvErr, clErr)
	}
	for side, cs := range map[string]tls.ConnectionState{clientID: srv, serverID: cl} {
		peer, err := PeerID(&cs)
		if err != nil || peer.String() != side {
			t.Errorf("the peer is %s, %v, want %s", peer, err, side)
		}
		if cs.Version != tls.VersionTLS13 || cs.CurveID != tls.X25519MLKEM768 || cs.NegotiatedProtocol != "h2" || cs.DidResume {
			t.Errorf("version %x, key exchange %s, protocol %q, resumed %v", cs.Version, cs.CurveID, cs.NegotiatedProtocol, cs.DidResume)
		}
	}
	for _, want := range []string{"msg=\"tls connection\"", "peer=" + clientID, "peer_serial=" + serialOf(t, client), "own_serial=" + serialOf(t, server),
		"peer_not_after=", "own_not_after="} {
		if log.count(want) != 1 {
			t.Errorf("the log does not have %s once:\n%s", want, &log)
		}
	}
	// Those who know no post-quantum exchange, and a foreign one that is not on the list.
	for curve, ok := range map[tls.CurveID]bool{tls.X25519: true, tls.CurveP256: true, tls.CurveP384: false} {
		c := client.ClientTLS(nil, anyone)
		c.CurvePreferences = []tls.CurveID{curve}
		srv, _, srvErr, _ := shake(t, server.ServerTLS(nil, anyone), c)
		if (srvErr == nil) != ok || ok && srv.CurveID != curve {
			t.Errorf("%s: %s, %v", curve, srv.CurveID, srvErr)
		}
	}
}

// Who does not get in, as each side sees it.
func TestPeerRefused(t *testing.T) {
	ca, partner, stranger := spiffetest.NewCA(t, "knhk.test"), spiffetest.NewCA(t, "partner.test"), spiffetest.NewCA(t, "stranger.test")
	forged := spiffetest.NewCA(t, "knhk.test") // an authority of the same name
	now := time.Now()
	ids := func(s ...string) (u []*url.URL) {
		for _, id := range s {
			u = append(u, spiffeid.RequireFromString(id).URL())
		}
		return u
	}
	selfSigned := spiffetest.NewCA(t, "knhk.test")
	for name, c := range map[string]struct {
		svid *x509svid.SVID
		want string // empty: let in
	}{
		"own domain":                             {ca.Issue(clientID), ""},
		"federated domain":                       {partner.Issue("spiffe://partner.test/envoy"), ""},
		"same path, unknown domain":              {stranger.Issue("spiffe://stranger.test/envoy"), "could not get X509 bundle"},
		"partner's authority for our domain":     {partner.Issue(clientID), "could not verify leaf"},
		"our authority for the partner's domain": {ca.Issue("spiffe://partner.test/envoy"), "could not verify leaf"},
		"authority of the same name":             {forged.Issue(clientID), "could not verify leaf"},
		"expired":                                {ca.Issue(clientID, spiffetest.WithNotAfter(now.Add(-time.Second))), "expired"},
		"not yet valid":                          {ca.Issue(clientID, spiffetest.WithNotBefore(now.Add(time.Hour/2))), "not yet valid"},
		"two URI SANs":                           {ca.Issue(clientID, spiffetest.WithURIs(ids(clientID, serverID)...)), "more than one URI SAN"},
		"the same URI SAN twice":                 {ca.Issue(clientID, spiffetest.WithURIs(ids(clientID, clientID)...)), "more than one URI SAN"},
		"no URI SAN":                             {ca.Issue(clientID, spiffetest.WithURIs(), spiffetest.WithDNS("knhk.test")), "no URI SAN"},
		"no SPIFFE URI":                          {ca.Issue(clientID, spiffetest.WithURIs(&url.URL{Scheme: "https", Host: "knhk.test", Path: "/envoy"})), "scheme"},
		"an endless ID":                          {ca.Issue(clientID + strings.Repeat("/a", 10_000)), "at most 2048 are read"},
		"a trust domain":                         {ca.Issue("spiffe://knhk.test"), "names a trust domain"},
		"an authority": {ca.Issue(clientID, spiffetest.With(func(c *x509.Certificate) {
			c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
		})), "CA flag"},
		"not allowed": {ca.Issue("spiffe://knhk.test/nobody"), "not on the list"},
		"without its authority's signature": {&x509svid.SVID{Certificates: []*x509.Certificate{selfSigned.Certificate},
			PrivateKey: ca.Issue(clientID).PrivateKey}, "CA flag"},
		"a stolen certificate, another key": {&x509svid.SVID{Certificates: ca.Issue(clientID).Certificates,
			PrivateKey: ca.Issue(clientID).PrivateKey}, "invalid signature"},
	} {
		allow := func(id spiffeid.ID) error {
			if strings.HasSuffix(id.String(), "/nobody") {
				return errors.New("not on the list")
			}
			return nil
		}
		us := mustOpen(t, filesOf(t, ca.Issue(serverID), ca, partner))
		cert := (&material{svid: c.svid}).certificate()
		them := base(nil)
		them.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
		them.Certificates = []tls.Certificate{cert}
		them.ClientAuth = tls.RequireAnyClientCert
		them.InsecureSkipVerify = true
		check := func(side string, err, other error) {
			t.Helper()
			switch {
			case c.want == "" && (err != nil || other != nil):
				t.Errorf("%s as %s: %v, %v", name, side, err, other)
			case c.want != "":
				wantError(t, name+" as "+side, err, c.want)
				if other == nil {
					t.Errorf("%s as %s: the other side got through", name, side)
				}
			}
		}
		_, _, srvErr, clErr := shake(t, us.ServerTLS(nil, allow), them)
		check("client", srvErr, clErr)
		_, _, srvErr, clErr = shake(t, them, us.ClientTLS(nil, allow))
		check("server", clErr, srvErr)
	}
}

func TestProtocolRefused(t *testing.T) {
	ca := spiffetest.NewCA(t, "knhk.test")
	server, client := mustOpen(t, filesOf(t, ca.Issue(serverID), ca)), mustOpen(t, filesOf(t, ca.Issue(clientID), ca))
	for name, c := range map[string]struct {
		server, client func(c *tls.Config)
		want           string
	}{
		"client of TLS 1.2":    {nil, func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }, "version"},
		"client of any before": {nil, func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS12 }, "version"},
		"server of TLS 1.2": {func(c *tls.Config) {
			*c = tls.Config{MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{server.state.Load().certificate()}}
		}, nil, "version"},
		"client without certificate": {nil, func(c *tls.Config) {
			c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &tls.Certificate{}, nil }
		}, "certificate"},
		"other application protocol": {nil, func(c *tls.Config) { c.NextProtos = []string{"imap"} }, "protocol"},
	} {
		s, cl := server.ServerTLS([]string{"h2"}, anyone), client.ClientTLS([]string{"h2"}, anyone)
		if c.server != nil {
			c.server(s)
		}
		if c.client != nil {
			c.client(cl)
		}
		_, _, srvErr, clErr := shake(t, s, cl)
		wantError(t, name, srvErr, c.want)
		if clErr == nil {
			t.Errorf("%s: the client got through", name)
		}
	}
	_, _, srvErr, clErr := shake(t, server.ServerTLS(nil, nil), client.ClientTLS(nil, anyone))
	wantError(t, "server that allows nobody", srvErr, "nobody is allowed")
	if clErr == nil {
		t.Error("the client of a server that allows nobody got through")
	}
	_, _, _, clErr = shake(t, server.ServerTLS(nil, anyone), client.ClientTLS(nil, nil))
	wantError(t, "client that allows nobody", clErr, "nobody is allowed")
}

// A second connection with a client's session cache is a full handshake.
func TestNoResumption(t *testing.T) {
	ca := spiffetest.NewCA(t, "knhk.test")
	server, client := mustOpen(t, filesOf(t, ca.Issue(serverID), ca)), mustOpen(t, filesOf(t, ca.Issue(clientID), ca))
	asked := 0
	s := server.ServerTLS(nil, func(spiffeid.ID) error { asked++; return nil })
	c := client.ClientTLS(nil, anyone)
	c.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	c.ServerName = "knhk.test" // or there is nothing to find the session by
	for range 3 {
		srv, _, srvErr, clErr := shake(t, s, c)
		if srvErr != nil || clErr != nil || srv.DidResume {
			t.Fatal(srvErr, clErr, srv.DidResume)
		}
	}
	if asked != 3 {
		t.Fatalf("allow was asked %d times in 3 handshakes", asked)
	}
}

// The injected clock decides, for our own certificate and for the peer's.
func TestClock(t *testing.T) {
	ca := spiffetest.NewCA(t, "knhk.test")
	now := time.Now()
	open := func(id string, end time.Duration) *Source {
		cfg := filesOf(t, ca.Issue(id, spiffetest.WithNotAfter(now.Add(end))), ca)
		cfg.Now = func() time.Time { return now }
		return mustOpen(t, cfg)
	}
	server, long, short := open(serverID, time.Hour), open(clientID, 2*time.Hour), open(clientID, time.Minute)
	if _, _, srvErr, clErr := shake(t, server.ServerTLS(nil, anyone), short.ClientTLS(nil, anyone)); srvErr != nil || clErr != nil {
		t.Fatal(srvErr, clErr)
	}
	cert := short.state.Load().certificate()
	now = cert.Leaf.NotAfter // to the second: one that x509 takes
	wantError(t, "Ready", short.Ready(), "expired at")
	_, err := short.GetX509SVID()
	wantError(t, "GetX509SVID", err, "expired at", clientID)
	_, _, _, clErr := shake(t, server.ServerTLS(nil, anyone), short.ClientTLS(nil, anyone))
	wantError(t, "client with an expired SVID", clErr, "expired at")
	insist := long.ClientTLS(nil, anyone)
	insist.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
	_, _, srvErr, _ := shake(t, server.ServerTLS(nil, anyone), insist)
	wantError(t, "expired client that insists", srvErr, "expired")
	now = now.Add(time.Hour)
	_, _, srvErr, _ = shake(t, server.ServerTLS(nil, anyone), long.ClientTLS(nil, anyone))
	wantError(t, "server with an expired SVID", srvErr, "expired at")
	if long.Ready() != nil {
		t.Error("the longest one is ready")
	}
}

// Both sides close a connection when the first certificate expires, whichever it is.
func TestClosedAtExpiry(t *testing.T) {
	for name, c := range map[string]struct{ server, client time.Duration }{
		"the server's first": {90 * time.Second, time.Hour},
		"the client's first": {time.Hour, 3 * time.Second},
	} {
		for _, side := range []string{"server", "client"} {
			synctest.Test(t, func(t *testing.T) {
				ca := spiffetest.NewCA(t, "knhk.test")
				var log journal
				scfg := filesOf(t, ca.Issue(serverID, spiffetest.WithNotAfter(time.Now().Add(c.server))), ca)
				ccfg := filesOf(t, ca.Issue(clientID, spiffetest.WithNotAfter(time.Now().Add(c.client))), ca)
				if side == "server" {
					scfg.Log = log.logger()
				} else {
					ccfg.Log = log.logger()
				}
				server, client := mustOpen(t, scfg), mustOpen(t, ccfg)
				start := time.Now()
				a, b := net.Pipe()
				defer a.Close()
				defer b.Close()
				var srv, cl *tls.Conn
				sdone := make(chan error, 1)
				go func() {
					srv = tls.Server(a, server.ServerTLS(nil, anyone))
					if side == "client" { // it keeps no eye on the end
						plain := base(nil)
						plain.ClientAuth = tls.RequireAnyClientCert
						plain.Certificates = []tls.Certificate{server.state.Load().certificate()}
						srv = tls.Server(a, plain)
					}
					sdone <- srv.Handshake()
				}()
				var err error
				if side == "client" {
					cl, err = client.client(t.Context(), b, nil, anyone)
				} else {
					cl = tls.Client(b, client.ClientTLS(nil, anyone))
					err = cl.Handshake()
				}
				if err := errors.Join(err, <-sdone); err != nil {
					t.Fatal(err)
				}
				watched, other := srv, cl
				if side == "client" {
					watched, other = cl, srv
				}
				gone := make(chan error, 2)
				for _, conn := range []*tls.Conn{watched, other} {
					go func() {
						_, err := conn.Read(make([]byte, 1))
						gone <- err
					}()
				}
				runtime.GC() // the connection is in use: it must not be forgotten
				runtime.GC()
				end := min(c.server, c.client)
				time.Sleep(end - time.Second - time.Since(start)) // certificates have whole seconds
				synctest.Wait()
				select {
				case err := <-gone:
					t.Fatalf("%s, %s: closed early: %v", name, side, err)
				default:
				}
				if <-gone == nil || <-gone == nil {
					t.Fatalf("%s, %s: something was read", name, side)
				}
				synctest.Wait()
				if d := time.Since(start); d > end+time.Second {
					t.Errorf("%s, %s: closed after %s, want %s", name, side, d, end)
				}
				if log.count("level=WARN msg=\"tls connection closed: a certificate expired\"") != 1 {
					t.Errorf("%s, %s: the log does not say it once:\n%s", name, side, &log)
				}
			})
		}
	}
}

// A clock that was set forward, or a machine that slept: the end comes within a minute by the new time.
func TestClosedAfterClockStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := spiffetest.NewCA(t, "knhk.test")
		var ahead atomic.Int64
		cfg := filesOf(t, ca.Issue(serverID), ca)
		cfg.Now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
		server, client := mustOpen(t, cfg), mustOpen(t, filesOf(t, ca.Issue(clientID), ca))
		a, b := net.Pipe()
		defer a.Close()
		defer b.Close()
		srv, cl := tls.Server(a, server.ServerTLS(nil, anyone)), tls.Client(b, client.ClientTLS(nil, anyone))
		gone := make(chan error, 1)
		go func() {
			_, err := srv.Read(make([]byte, 1))
			gone <- err
		}()
		if err := cl.Handshake(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // the server has finished, too
		start := time.Now()
		ahead.Store(int64(2 * time.Hour))
		err := <-gone
		if d := time.Since(start); err == nil || d > maxTimer {
			t.Errorf("closed after %s: %v", d, err)
		}
	})
}

// A connection that ended leaves nothing behind to wait for its certificate.
func TestForgotten(t *testing.T) {
	ca := spiffetest.NewCA(t, "knhk.test")
	server, client := mustOpen(t, filesOf(t, ca.Issue(serverID), ca)), mustOpen(t, filesOf(t, ca.Issue(clientID), ca))
	for range 8 {
		if _, _, srvErr, clErr := shake(t, server.ServerTLS(nil, anyone), client.ClientTLS(nil, anyone)); srvErr != nil || clErr != nil {
			t.Fatal(srvErr, clErr)
		}
	}
	eventually(t, "the connections to be forgotten", func() bool {
		runtime.GC()
		server.conns.mu.Lock()
		defer server.conns.mu.Unlock()
		return len(server.conns.open) == 0
	})
}

func TestCloseEndsConnections(t *testing.T) {
	ca := spiffetest.NewCA(t, "knhk.test")
	server, client := mustOpen(t, filesOf(t, ca.Issue(serverID), ca)), mustOpen(t, filesOf(t, ca.Issue(clientID), ca))
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	srv, cl := tls.Server(a, server.ServerTLS(nil, anyone)), tls.Client(b, client.ClientTLS(nil, anyone))
	go srv.Handshake()
	if err := cl.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := srv.Handshake(); err != nil { // waits for the one that runs
		t.Fatal(err)
	}
	server.Close()
	server.Close()
	if _, err := cl.Read(make([]byte, 1)); err == nil {
		t.Fatal("the connection goes on")
	}
	runtime.KeepAlive(srv)
	wantError(t, "Ready", server.Ready(), "closed")
	_, err := server.GetX509SVID()
	wantError(t, "GetX509SVID", err, "closed")
	_, err = server.GetX509BundleForTrustDomain(ca.TrustDomain)
	wantError(t, "GetX509BundleForTrustDomain", err, "closed")
	_, _, srvErr, clErr := shake(t, server.ServerTLS(nil, anyone), client.ClientTLS(nil, anyone))
	wantError(t, "handshake after Close", srvErr, "closed")
	if clErr == nil {
		t.Error("the client got through after Close")
	}
}

func TestPeerID(t *testing.T) {
	ca := spiffetest.NewCA(t, "knhk.test")
	certs := ca.Issue(clientID).Certificates
	for name, cs := range map[string]*tls.ConnectionState{
		"none":              nil,
		"not completed":     {Version: tls.VersionTLS13, PeerCertificates: certs},
		"TLS 1.2":           {Version: tls.VersionTLS12, HandshakeComplete: true, PeerCertificates: certs},
		"no certificate":    {Version: tls.VersionTLS13, HandshakeComplete: true},
		"without SPIFFE ID": {Version: tls.VersionTLS13, HandshakeComplete: true, PeerCertificates: ca.Issue(clientID, spiffetest.WithURIs()).Certificates},
	} {
		if id, err := PeerID(cs); err == nil || !id.IsZero() {
			t.Errorf("%s: %s, %v", name, id, err)
		}
	}
}

// HTTP/2 over loopback with net/http on both sides, while the certificates of both are renewed all the time.
func TestRotationUnderHandshakes(t *testing.T) {
	ca := spiffetest.NewCA(t, "knhk.test")
	scfg, ccfg := filesOf(t, ca.Issue(serverID), ca), filesOf(t, ca.Issue(clientID), ca)
	server, client := mustOpen(t, scfg), mustOpen(t, ccfg)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	protos := []string{"h2", "http/1.1"}
	web := &http.Server{TLSConfig: server.ServerTLS(protos, anyone), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, err := PeerID(r.TLS)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		io.WriteString(w, r.Proto+" "+id.String())
	})}
	served := make(chan error, 1)
	go func() { served <- web.ServeTLS(l, "", "") }()
	defer func() {
		web.Close()
		<-served
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	stop := make(chan struct{})
	var rotating, asking sync.WaitGroup
	for _, s := range []struct {
		cfg Config
		s   *Source
	}{{scfg, server}, {ccfg, client}} {
		rotating.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				spiffetest.WriteFiles(t, filepath.Dir(s.cfg.Files.Certificate), ca.Issue(s.s.ID().String()), ca)
				s.s.poll(ctx)
			}
		})
	}
	for range 4 {
		asking.Go(func() {
			for range 10 {
				tr := &http.Transport{DialTLSContext: client.DialTLS(protos, anyone), ForceAttemptHTTP2: true}
				req, _ := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+l.Addr().String(), nil)
				res, err := tr.RoundTrip(req)
				if err != nil {
					t.Error(err)
					return
				}
				body, _ := bufio.NewReader(res.Body).ReadString('\n')
				res.Body.Close()
				tr.CloseIdleConnections()
				if body != "HTTP/2.0 "+clientID {
					t.Errorf("the server answers %q", body)
				}
			}
		})
	}
	asking.Wait()
	close(stop)
	rotating.Wait()
}
