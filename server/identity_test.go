package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/knhk/sidecar/crypto/spiffe/spiffetest"
	"github.com/knhk/sidecar/server/access"
	"github.com/knhk/sidecar/server/envoywire"
)

// patience bounds every wait: reached only when something is wrong.
const patience = 2 * time.Minute

// world is a knhk with an identity, and the authorities of its clients.
type world struct {
	t         *testing.T
	s         *Server
	file      string
	ca, other *spiffetest.CA
	addr      map[access.Listener]string
	probes    string
}

const worldRoles = `roles:
  envoy: ["spiffe://knhk.test/envoy"]
  operator: ["spiffe://knhk.test/ops/*"]
  auditor: ["spiffe://knhk.test/auditor"]
  peer: ["spiffe://knhk.test/peer"]
`

// newWorld runs a knhk; more is done with it before.
func newWorld(t *testing.T, more ...func(*Server)) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{t: t, file: filepath.Join(dir, "knhk.yaml"), ca: spiffetest.NewCA(t, "knhk.test"), other: spiffetest.NewCA(t, "other.test"),
		addr: map[access.Listener]string{}}
	spiffetest.WriteFiles(t, dir, w.ca.Issue("spiffe://knhk.test/knhk"), w.ca)
	w.configure(worldRoles)
	var err error
	if w.s, err = New(t.Context(), w.file, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	for _, f := range more {
		f(w.s)
	}
	for i, on := range []access.Listener{access.OnEnvoy, access.OnAdmin, access.OnTiles} {
		w.addr[on] = w.s.listeners[i].Addr().String()
	}
	w.probes = w.s.listeners[3].Addr().String()
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.s.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	return w
}

func (w *world) configure(roles string) {
	w.t.Helper()
	dir := filepath.Dir(w.file)
	text := fmt.Sprintf(`origin: example.com/identity
instance: a
state_dir: %[1]s/state
listeners: {envoy: "127.0.0.1:0", admin: "127.0.0.1:0", tiles: "127.0.0.1:0", probes: "127.0.0.1:0"}
identity:
  spiffe_id: spiffe://knhk.test/knhk
  files: {certificate: %[1]s/certificate.pem, key: %[1]s/key.pem, ca: %[1]s/bundle.pem}
keys: {identity: {uri: "soft:%[1]s/keys?label=identity"}, daily: {uri: "soft:%[1]s/keys?label=daily"}}
shutdown: {announce: 0s, drain: 1s}
%[2]s`, dir, roles)
	spiffetest.WriteFile(w.t, w.file, []byte(text))
}

// client is somebody who connects.
type client struct {
	name  string
	roles access.Role
	tls   *tls.Config
	known bool // the handshake is to succeed wherever a role counts
}

// as shows a certificate whatever the server asks for; nil: none.
func as(svid *x509svid.SVID, protocols ...string) *tls.Config {
	c := &tls.Config{InsecureSkipVerify: true, NextProtos: protocols} // the server is not what is tested
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		if svid == nil {
			return &tls.Certificate{}, nil
		}
		return &tls.Certificate{Certificate: [][]byte{svid.Certificates[0].Raw}, PrivateKey: svid.PrivateKey}, nil
	}
	return c
}

func (w *world) clients() []client {
	h2 := []string{"h2", "http/1.1"}
	past := time.Now().Add(-time.Minute)
	bare := as(w.ca.Issue("spiffe://knhk.test/ops/alice"), h2...)
	bare.MaxVersion = tls.VersionTLS12
	return []client{
		{"no certificate", 0, as(nil, h2...), false},
		{"wrong trust domain", 0, as(w.other.Issue("spiffe://other.test/ops/alice"), h2...), false},
		{"an ID of ours by another's authority", 0, as(w.other.Issue("spiffe://knhk.test/ops/alice"), h2...), false},
		{"expired", 0, as(w.ca.Issue("spiffe://knhk.test/ops/alice", spiffetest.WithNotBefore(past.Add(-time.Hour)), spiffetest.WithNotAfter(past)), h2...), false},
		{"not yet valid", 0, as(w.ca.Issue("spiffe://knhk.test/ops/alice", spiffetest.WithNotBefore(time.Now().Add(time.Hour)), spiffetest.WithNotAfter(time.Now().Add(2*time.Hour))), h2...), false},
		{"two IDs", 0, as(w.ca.Issue("spiffe://knhk.test/ops/alice", spiffetest.With(func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) })), h2...), false},
		{"TLS 1.2", 0, bare, false},
		{"no role", 0, as(w.ca.Issue("spiffe://knhk.test/nobody"), h2...), true},
		{"the parent of a role's IDs", 0, as(w.ca.Issue("spiffe://knhk.test/ops"), h2...), true},
		{"envoy", access.Envoy, as(w.ca.Issue("spiffe://knhk.test/envoy"), h2...), true},
		{"operator", access.Operator, as(w.ca.Issue("spiffe://knhk.test/ops/alice"), h2...), true},
		{"auditor", access.Auditor, as(w.ca.Issue("spiffe://knhk.test/auditor"), h2...), true},
		{"peer", access.Peer, as(w.ca.Issue("spiffe://knhk.test/peer"), h2...), true},
	}
}

// answer is what came of a call.
type answer string

const (
	answered answer = "answered"
	denied   answer = "denied"     // by a rule
	notIn    answer = "not let in" // in the handshake
)

// method is one that is served.
type method struct {
	on   access.Listener
	path string
	post bool
}

// methods are all that a Server serves to those who are somebody, as the servers themselves say.
func methods(s *Server) (all []method) {
	for name, info := range s.grpc.GetServiceInfo() {
		for _, m := range info.Methods {
			all = append(all, method{access.OnEnvoy, "/" + name + "/" + m.Name, true})
		}
	}
	services := map[string]protoreflect.ServiceDescriptor{}
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			d := f.Services().Get(i)
			services["/"+string(d.FullName())+"/"] = d
		}
		return true
	})
	for _, e := range s.http {
		on, patterns := e.on, []string{"/checkpoint", "/tile/0/000"} // all that tiles answers: see TestTiles
		switch h := e.served.(type) {
		case *access.Mux:
			patterns = h.Patterns()
		case *http.ServeMux:
			continue // the probes, which are for anyone: see TestProbes
		}
		for _, p := range patterns {
			if d, ok := services[p]; ok {
				for i := range d.Methods().Len() {
					all = append(all, method{on, p + string(d.Methods().Get(i).Name()), true})
				}
				continue
			}
			all = append(all, method{on, strings.TrimPrefix(p, "GET "), false})
		}
	}
	slices.SortFunc(all, func(a, b method) int { return strings.Compare(string(a.on)+a.path, string(b.on)+b.path) })
	return all
}

// call calls over HTTP.
func call(ctx context.Context, h *http.Client, url string, post bool) (answer, error) {
	verb, body := http.MethodGet, ""
	if post { // a streaming procedure refuses the content type, once it is asked at all
		verb, body = http.MethodPost, "{}"
	}
	req, err := http.NewRequestWithContext(ctx, verb, url, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	if post {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := h.Do(req)
	if err != nil {
		return notIn, nil
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusForbidden {
		return denied, nil
	}
	return answered, nil
}

// callGRPC opens a stream and ends it without a message.
func callGRPC(ctx context.Context, cc *grpc.ClientConn, path string) (answer, error) {
	st, err := cc.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, path, grpc.ForceCodecV2(envoywire.Codec{}))
	if err == nil {
		_ = st.CloseSend() // RecvMsg says what it was
		err = st.RecvMsg(&envoywire.Frame{})
	}
	switch status.Code(err) {
	case codes.PermissionDenied:
		return denied, nil
	case codes.Unavailable:
		return notIn, nil
	}
	return answered, nil
}

// TestEveryMethod calls every method that is served, as everybody. A new method that has no rule is refused to all, and fails here.
func TestEveryMethod(t *testing.T) {
	w := newWorld(t)
	all := methods(w.s)
	if len(all) < 20 {
		t.Fatalf("only %d methods: %v", len(all), all)
	}
	for _, m := range all {
		if access.Allowed(m.on, m.path) == 0 {
			t.Errorf("%s %s: no rule says who may call it", m.on, m.path)
		}
	}
	// What nobody serves there, and paths that lead elsewhere once they are cleaned.
	for on, paths := range map[access.Listener][]string{
		access.OnAdmin: {"/", "/knhk.admin.v1.KeyService/Rotate", "/metrics/", "/debug/", "/debug/pprof/../../policy", "/tile/0/000",
			"/knhk.admin.v1.ReceiptService/", "//metrics", "/policy/../metrics"},
		access.OnTiles: {"/", "/metrics", "/tile/../.state/treeState", "/.state/treeState"},
	} {
		for _, p := range paths {
			all = append(all, method{on, p, false})
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, c := range w.clients() {
		cc, err := grpc.NewClient("passthrough:///"+w.addr[access.OnEnvoy], grpc.WithTransportCredentials(credentials.NewTLS(c.tls)))
		if err != nil {
			t.Fatal(err)
		}
		tr := &http.Transport{TLSClientConfig: c.tls, ForceAttemptHTTP2: true}
		h := &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
		for _, m := range all {
			var got answer
			switch m.on {
			case access.OnControl: // reached over its socket alone: control's tests
				continue
			case access.OnEnvoy:
				got, err = callGRPC(ctx, cc, m.path)
			default:
				path := m.path
				if path == "/debug/pprof/profile" || path == "/debug/pprof/trace" {
					path += "?seconds=1"
				}
				got, err = call(ctx, h, "https://"+w.addr[m.on]+path, m.post)
			}
			if err != nil {
				t.Fatal(err)
			}
			want := notIn
			switch {
			case !c.known || access.Any(m.on)&c.roles == 0:
			case access.Allowed(m.on, m.path)&c.roles != 0:
				want = answered
			default:
				want = denied
			}
			if got != want {
				t.Errorf("%s %s as %s: %s, want %s", m.on, m.path, c.name, got, want)
			}
		}
		cc.Close()
		tr.CloseIdleConnections()
	}
}

// TestNoRule calls gRPC methods that somebody added without saying who may call them: they are refused to Envoy too, who may call the others.
func TestNoRule(t *testing.T) {
	w := newWorld(t, func(s *Server) {
		s.grpc.RegisterService(&grpc.ServiceDesc{
			ServiceName: "knhk.test.New", HandlerType: (*any)(nil),
			Methods: []grpc.MethodDesc{{MethodName: "Unary", Handler: func(_ any, ctx context.Context, _ func(any) error, icpt grpc.UnaryServerInterceptor) (any, error) {
				return icpt(ctx, nil, &grpc.UnaryServerInfo{FullMethod: "/knhk.test.New/Unary"}, func(context.Context, any) (any, error) { return nil, nil })
			}}},
			Streams: []grpc.StreamDesc{{StreamName: "Stream", ClientStreams: true, ServerStreams: true, Handler: func(any, grpc.ServerStream) error { return nil }}},
		}, struct{}{})
	})
	cc, err := grpc.NewClient("passthrough:///"+w.addr[access.OnEnvoy],
		grpc.WithTransportCredentials(credentials.NewTLS(as(w.ca.Issue("spiffe://knhk.test/envoy"), "h2"))))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for path, want := range map[string]answer{
		"/knhk.test.New/Unary": denied, "/knhk.test.New/Stream": denied, "/grpc.health.v1.Health/Check": answered,
	} {
		if got, err := callGRPC(ctx, cc, path); err != nil || got != want {
			t.Errorf("%s: %s, %v, want %s", path, got, err, want)
		}
	}
}

// TestNoTLS: what comes in the plain is not served, nor what speaks no h2 to gRPC.
func TestNoTLS(t *testing.T) {
	w := newWorld(t)
	for on, addr := range w.addr {
		resp, err := http.Get("http://" + addr + "/metrics")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode != http.StatusBadRequest {
				t.Errorf("%s over plain HTTP: %s", on, resp.Status)
			}
		}
	}
	c, err := tls.Dial("tcp", w.addr[access.OnEnvoy], as(w.ca.Issue("spiffe://knhk.test/envoy")))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if n, err := c.Read(make([]byte, 1)); err == nil || n > 0 {
		t.Error("gRPC without h2 was answered")
	} else if nerr, ok := err.(net.Error); ok && nerr.Timeout() {
		t.Error("gRPC without h2 was left open")
	}
}

// TestProbes: two words for anyone, and nothing else.
func TestProbes(t *testing.T) {
	w := newWorld(t)
	for path, want := range map[string]string{
		"/livez": "200 ok\n", "/readyz": "200 ok\n", "/metrics": "404", "/policy": "404", "/": "404", "/debug/pprof/": "404",
		"/knhk.admin.v1.ReceiptService/Status": "404",
	} {
		resp, err := http.Get("http://" + w.probes + path)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if got := fmt.Sprintf("%d %s", resp.StatusCode, body); err != nil || !strings.HasPrefix(got, want) {
			t.Errorf("%s: %q, %v; want %q", path, got, err, want)
		}
	}
	w.s.stopping.Store(true)
	resp, err := http.Get("http://" + w.probes + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != http.StatusServiceUnavailable || string(body) != "not ready\n" {
		t.Errorf("not ready: %d %q: want no reason", resp.StatusCode, body)
	}
	w.s.stopping.Store(false)
	var open []net.Conn
	for range maxProbeConns + 10 { // whoever holds all the places keeps nobody out
		c, err := net.Dial("tcp", w.probes)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	if resp, err := http.Get("http://" + w.probes + "/livez"); err != nil {
		t.Errorf("with every place taken: %v", err)
	} else {
		resp.Body.Close()
	}
	for _, c := range open {
		c.Close()
	}
}

// TestHalfOpen: whoever begins handshakes and finishes none keeps nobody out of the HTTP listeners, and closes nobody's connection.
func TestHalfOpen(t *testing.T) {
	w := newWorld(t)
	for _, protocol := range []string{"http/1.1", "h2"} {
		for on, who := range map[access.Listener]string{access.OnAdmin: "spiffe://knhk.test/auditor", access.OnTiles: "spiffe://knhk.test/peer"} {
			path := map[access.Listener]string{access.OnAdmin: "/livez", access.OnTiles: "/checkpoint"}[on]
			tr := &http.Transport{TLSClientConfig: as(w.ca.Issue(who), protocol), ForceAttemptHTTP2: protocol == "h2", MaxIdleConnsPerHost: 1}
			dials := 0
			tr.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
				dials++
				var d net.Dialer
				return d.DialContext(ctx, network, addr)
			}
			get := func(h *http.Client) {
				t.Helper()
				resp, err := h.Get("https://" + w.addr[on] + path)
				if err != nil {
					t.Fatalf("%s, %s: %v", on, protocol, err)
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
			get(&http.Client{Transport: tr, Timeout: patience})
			var open []net.Conn
			for range maxHTTPConns + 10 {
				c, err := net.Dial("tcp", w.addr[on])
				if err != nil {
					t.Fatal(err)
				}
				open = append(open, c)
			}
			get(&http.Client{Transport: tr, Timeout: patience})
			if dials != 1 {
				t.Errorf("%s, %s: an open connection was closed for one that proves nothing", on, protocol)
			}
			fresh := tr.Clone()
			get(&http.Client{Transport: fresh, Timeout: patience})
			// What handshakes can hold is bounded below what connections are.
			if err := open[len(open)-maxHandshakes-1].SetReadDeadline(time.Now().Add(httpHeaderTime / 2)); err != nil {
				t.Fatal(err)
			}
			if _, err := open[len(open)-maxHandshakes-1].Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
				t.Errorf("%s, %s: more than %d handshakes are waited for: %v", on, protocol, maxHandshakes, err)
			}
			for _, c := range open {
				c.Close()
			}
			tr.CloseIdleConnections()
			fresh.CloseIdleConnections()
		}
	}
}

// TestRolesReload: a role that is taken away is gone on open connections too, and ends what runs under it.
func TestRolesReload(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cc, err := grpc.NewClient("passthrough:///"+w.addr[access.OnEnvoy],
		grpc.WithTransportCredentials(credentials.NewTLS(as(w.ca.Issue("spiffe://knhk.test/envoy"), "h2"))))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	const als = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"
	logs, err := cc.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, als, grpc.ForceCodecV2(envoywire.Codec{}))
	if err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{DialTLSContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		d := tls.Dialer{Config: as(w.ca.Issue("spiffe://knhk.test/ops/alice"), "http/1.1")}
		return d.DialContext(ctx, network, addr)
	}, MaxConnsPerHost: 2}
	h := &http.Client{Transport: tr}
	defer tr.CloseIdleConnections()
	url := "https://" + w.addr[access.OnAdmin]
	if got, err := call(ctx, h, url+"/metrics", false); got != answered || err != nil {
		t.Fatalf("the operator: %s, %v", got, err)
	}
	// A tail, which never ends by itself.
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/knhk.admin.v1.ReceiptService/Tail", strings.NewReader("\x00\x00\x00\x00\x02{}"))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/connect+json")
	resp, err := h.Do(req)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("tail: %v, %v", resp, err)
	}
	defer resp.Body.Close()

	w.configure(`roles: {auditor: ["spiffe://knhk.test/auditor"]}` + "\n")
	w.s.reload("test")
	if err := logs.RecvMsg(&envoywire.Frame{}); status.Code(err) != codes.Unavailable {
		t.Errorf("an open access log of one who lost the role: %v", err)
	}
	if body, err := io.ReadAll(resp.Body); err == nil && !strings.Contains(string(body), "permission_denied") {
		t.Errorf("an open tail of one who lost the role ended well: %q", body)
	}
	if got, err := call(ctx, h, url+"/metrics", false); got == answered || err != nil {
		t.Errorf("an open connection after the role is gone: %s, %v", got, err)
	}
	if got, _ := callGRPC(ctx, cc, als); got == answered {
		t.Errorf("a new stream after the role is gone: %s", got)
	}
	if err := os.Remove(w.file); err != nil {
		t.Fatal(err)
	}
	w.s.reload("a file that is gone") // is refused, and gives nobody anything back
	if got, _ := callGRPC(ctx, cc, als); got == answered {
		t.Errorf("after a reload that failed: %s", got)
	}
	w.configure(worldRoles)
	w.s.reload("test")
	for got := answer(""); got != answered; { // the client waits between its attempts to connect
		if got, err = callGRPC(ctx, cc, "/grpc.health.v1.Health/Check"); err != nil || ctx.Err() != nil {
			t.Fatalf("with the role again: %s, %v", got, ctx.Err())
		}
	}
}

type packet []byte

func (p packet) EncodeFrame() []byte { return p }

// TestGuardTLS: what TLS adds to messages that are finished is not held against the peer. Counted as they come off the socket, each message
// here would leave some 150 bytes behind, and a peer that never paused would be closed for them in the end.
func TestGuardTLS(t *testing.T) {
	w := newWorld(t)
	g := newGuard(slog.New(slog.DiscardHandler))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(grpc.Creds(transport{s: w.s, tls: w.s.tlsFor(access.OnEnvoy, "h2")}), grpc.ForceServerCodecV2(envoywire.Codec{}),
		grpc.StaticStreamWindowSize(streamWindow), grpc.StaticConnWindowSize(streamWindow), grpc.StreamInterceptor(g.stream),
		grpc.UnknownServiceHandler(func(_ any, ss grpc.ServerStream) error {
			var f envoywire.Frame
			defer f.Free()
			for {
				if err := ss.RecvMsg(&f); err != nil {
					return ss.SendMsg(packet(nil))
				}
			}
		}))
	done := make(chan error, 1)
	go func() { done <- srv.Serve(guardedListener{ln, g}) }()
	defer func() { srv.Stop(); <-done }()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cc, err := grpc.NewClient("passthrough:///"+ln.Addr().String(),
		grpc.WithTransportCredentials(credentials.NewTLS(as(w.ca.Issue("spiffe://knhk.test/envoy"), "h2"))))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	st, err := cc.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/x/y", grpc.ForceCodecV2(envoywire.Codec{}))
	if err != nil {
		t.Fatal(err)
	}
	const messages, lost = 500, 24 << 10 // bytes: acknowledgements, and a few for each message that is sent in many frames
	message := packet(make([]byte, 100<<10))
	for range messages {
		if err := st.SendMsg(message); err != nil {
			break
		}
	}
	if err := st.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if err := st.RecvMsg(&envoywire.Frame{}); err != nil {
		t.Fatalf("closed by the guard: %v", err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.conns) != 1 {
		t.Fatalf("%d connections", len(g.conns))
	}
	for c := range g.conns {
		if n := c.held.Load(); n > lost {
			t.Errorf("%d bytes are held against a peer that finished %d messages", n, messages)
		}
	}
}
