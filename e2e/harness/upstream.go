package harness

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Seen is one request as the upstream saw it.
type Seen struct {
	RequestID string // x-request-id
	Receipt   string // x-knhk-receipt, if anything let it through
	Method    string
	Path      string // with its query; the full method of a gRPC call
	Proto     string // "HTTP/1.1", "HTTP/2.0" or "gRPC"
	Host      string
	// Peer is the client's certificate, of an upstream with TLS.
	Peer *x509.Certificate
	// PeerLeft is how long that had still to live when the request arrived.
	PeerLeft time.Duration
	// Own is the certificate that the upstream showed on the connection, and OwnLeft how long it had still to live then.
	Own     *x509.Certificate
	OwnLeft time.Duration
}

// Upstream is an HTTP server (HTTP/1.1 and HTTP/2 without TLS on one port) and a gRPC server (grpc-go's interop
// TestService on another) that behave as the path asks, and a journal of every request that reached them.
//
// The behaviour follows "/do/" anywhere in the path, so that a route's prefix may stand before it:
//
//	/do/status/CODE       that status, empty body
//	/do/bytes/N           200 with N bytes
//	/do/slow/MS           200 after MS milliseconds
//	/do/drip/N/MS         200, N chunks of one byte, MS milliseconds apart
//	/do/never             no answer until the client leaves
//	/do/reset             the connection (HTTP/2: the stream) is reset before any header
//	/do/cut/N             200, N bytes, and when the request's body has ended the connection is closed (HTTP/2: the
//	                      stream reset) without an end; a client that keeps its body open decides when (Request.Open)
//	/do/hasty/CODE        that status with an empty body, before the request's body has ended
//	/do/redirect/CODE/... that redirect to the rest of the path
//	/do/echo              200 with an Echo as JSON
//	/do/trailers          200 with trailers x-sum: 1 and x-knhk-receipt: forged-trailer
//	/do/early             103 with a Link header, then 200
//	/do/forge             200 with forged x-knhk-receipt, x-knhk-class and x-knhk-other headers
//	/do/odd               200 with header values that are no UTF-8 (Cache-Status too) and X-Twice two times
//	/do/cached            200 with a Cache-Status hit
//	/do/ws                a websocket that echoes
//
// Anything else is 200 with the body "ok\n".
type Upstream struct {
	http *http.Server
	grpc *grpc.Server

	httpAddr, grpcAddr string
	serving            sync.WaitGroup

	mu   sync.Mutex
	seen []Seen

	shown sync.Map // certificates by raw connections
}

// Echo is what /do/echo answers.
type Echo struct {
	Method   string
	URL      string
	Proto    string
	Host     string
	Header   http.Header
	Trailer  http.Header
	Body     int64 // bytes received
	Length   int64 // content-length, -1 if there was none
	Encoding []string
}

// StartUpstream starts both servers on free loopback ports. Close ends them.
func StartUpstream() (*Upstream, error) { return StartUpstreamTLS(nil) }

// StartUpstreamTLS is StartUpstream with TLS on both ports; cfg says who may connect. nil means no TLS.
func StartUpstreamTLS(cfg *tls.Config) (*Upstream, error) {
	hl, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start upstream: %w", err)
	}
	gl, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		hl.Close()
		return nil, fmt.Errorf("start upstream: %w", err)
	}
	u := &Upstream{httpAddr: hl.Addr().String(), grpcAddr: gl.Addr().String()}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	u.http = &http.Server{Handler: u, Protocols: protocols, ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 1 << 20}
	serve := u.http.Serve
	var opts []grpc.ServerOption
	if cfg != nil {
		protocols.SetHTTP2(true)
		u.http.TLSConfig = u.remembering(cfg)
		u.http.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, rawConn{}, c.(*tls.Conn).NetConn())
		}
		u.http.ErrorLog = log.New(io.Discard, "", 0) // of handshakes that are refused
		serve = func(l net.Listener) error { return u.http.ServeTLS(l, "", "") }
		opts = append(opts, grpc.Creds(credentials.NewTLS(cfg.Clone())))
	}
	u.grpc = grpc.NewServer(opts...)
	grpc_testing.RegisterTestServiceServer(u.grpc, &testService{up: u})
	u.serving.Go(func() { _ = serve(hl) }) // ends with ErrServerClosed
	u.serving.Go(func() { _ = u.grpc.Serve(gl) })
	return u, nil
}

// rawConn is the key of the connection below TLS in a request's context.
type rawConn struct{}

// remembering is cfg, and notes which certificate it shows on which connection.
func (u *Upstream) remembering(cfg *tls.Config) *tls.Config {
	cfg = cfg.Clone()
	if get := cfg.GetCertificate; get != nil {
		cfg.GetCertificate = func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
			c, err := get(h)
			if err != nil {
				return nil, err
			}
			leaf, err := x509.ParseCertificate(c.Certificate[0])
			u.shown.Store(h.Conn, leaf)
			return c, err
		}
	}
	return cfg
}

// RunUpstream is StartUpstream for tests, closed at the end.
func RunUpstream(t TB) *Upstream {
	t.Helper()
	u, err := StartUpstream()
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(u.Close)
	return u
}

// HTTP returns host:port of the HTTP server.
func (u *Upstream) HTTP() string { return u.httpAddr }

// GRPC returns host:port of the gRPC server.
func (u *Upstream) GRPC() string { return u.grpcAddr }

// Close ends both servers and every connection.
func (u *Upstream) Close() {
	_ = u.http.Close()
	u.grpc.Stop()
	u.serving.Wait()
}

// Seen returns the journal so far, in the order in which requests arrived.
func (u *Upstream) Seen() []Seen {
	u.mu.Lock()
	defer u.mu.Unlock()
	return append([]Seen(nil), u.seen...)
}

// Count returns how often a request with this x-request-id arrived.
func (u *Upstream) Count(requestID string) int {
	n := 0
	for _, s := range u.Seen() {
		if s.RequestID == requestID {
			n++
		}
	}
	return n
}

// CountPath returns how many requests arrived whose path, query included, ends in suffix. It is how a client that never
// learns its x-request-id (Envoy makes it) asks whether its request arrived: it puts a unique query.
func (u *Upstream) CountPath(suffix string) int {
	n := 0
	for _, s := range u.Seen() {
		if strings.HasSuffix(s.Path, suffix) {
			n++
		}
	}
	return n
}

// Forget empties the journal.
func (u *Upstream) Forget() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.seen = nil
}

func (u *Upstream) note(s Seen) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.seen = append(u.seen, s)
}

// ServeHTTP journals the request, then behaves.
func (u *Upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var client *x509.Certificate
	var left time.Duration
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		client = r.TLS.PeerCertificates[0]
		left = time.Until(client.NotAfter)
	}
	var own *x509.Certificate
	var ownLeft time.Duration
	if c, ok := u.shown.Load(r.Context().Value(rawConn{})); ok {
		own = c.(*x509.Certificate)
		ownLeft = time.Until(own.NotAfter)
	}
	u.note(Seen{
		Peer: client, PeerLeft: left, Own: own, OwnLeft: ownLeft,
		RequestID: r.Header.Get("X-Request-Id"), Receipt: r.Header.Get("X-Knhk-Receipt"),
		Method: r.Method, Path: r.URL.RequestURI(), Proto: r.Proto, Host: r.Host,
	})
	_, action, _ := strings.Cut(r.URL.Path, "/do/")
	name, arg, _ := strings.Cut(action, "/")
	if do, ok := behaviours[name]; ok {
		do(w, r, arg)
		return
	}
	_, _ = io.WriteString(w, "ok\n")
}

// behaviours are the actions of the path; writes fail only when the client has left, which ends the handler anyway.
var behaviours = map[string]func(http.ResponseWriter, *http.Request, string){
	"status": func(w http.ResponseWriter, _ *http.Request, arg string) { w.WriteHeader(number(arg, 200)) },
	"bytes": func(w http.ResponseWriter, _ *http.Request, arg string) {
		n := number(arg, 0)
		w.Header().Set("Content-Length", strconv.Itoa(n))
		writeBytes(w, n)
	},
	"slow": func(w http.ResponseWriter, r *http.Request, arg string) {
		if pause(r.Context(), number(arg, 0)) {
			_, _ = io.WriteString(w, "late\n")
		}
	},
	"drip": func(w http.ResponseWriter, r *http.Request, arg string) {
		n, ms, _ := strings.Cut(arg, "/")
		for range number(n, 1) {
			writeBytes(w, 1)
			_ = http.NewResponseController(w).Flush()
			if !pause(r.Context(), number(ms, 10)) {
				return
			}
		}
	},
	"never": func(_ http.ResponseWriter, r *http.Request, _ string) { <-r.Context().Done() },
	"reset": func(w http.ResponseWriter, _ *http.Request, _ string) { abort(w, true) },
	"cut": func(w http.ResponseWriter, r *http.Request, arg string) {
		ctl := http.NewResponseController(w)
		_ = ctl.EnableFullDuplex() // HTTP/2 needs none
		writeBytes(w, number(arg, 1))
		_ = ctl.Flush()
		_, _ = io.Copy(io.Discard, r.Body)
		abort(w, false) // RST could overtake the bytes
	},
	"hasty": func(w http.ResponseWriter, _ *http.Request, arg string) {
		ctl := http.NewResponseController(w)
		_ = ctl.EnableFullDuplex() // HTTP/2 needs none
		w.Header().Set("Content-Length", "0")
		w.WriteHeader(number(arg, 200))
		_ = ctl.Flush()
	},
	"redirect": func(w http.ResponseWriter, r *http.Request, arg string) {
		code, to, _ := strings.Cut(arg, "/")
		w.Header().Set("Location", "http://"+r.Host+"/"+to)
		w.WriteHeader(number(code, http.StatusFound))
	},
	"echo": echo,
	"trailers": func(w http.ResponseWriter, _ *http.Request, _ string) {
		w.Header().Set("Trailer", "X-Sum, X-Knhk-Receipt")
		_, _ = io.WriteString(w, "with trailers\n")
		w.Header().Set("X-Sum", "1")
		w.Header().Set("X-Knhk-Receipt", "forged-trailer")
	},
	"early": func(w http.ResponseWriter, _ *http.Request, _ string) {
		w.Header().Set("Link", "</style.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		_, _ = io.WriteString(w, "after 103\n")
	},
	"forge": func(w http.ResponseWriter, _ *http.Request, _ string) {
		for _, name := range []string{"X-Knhk-Receipt", "X-Knhk-Class", "X-Knhk-Other"} {
			w.Header().Set(name, "forged")
		}
		_, _ = io.WriteString(w, "forged\n")
	},
	"odd": func(w http.ResponseWriter, _ *http.Request, _ string) {
		for _, name := range []string{"X-Odd", "Cache-Status", "X-Cache", "Content-Type"} {
			w.Header().Set(name, "caf\xe9\xff\x80")
		}
		w.Header()["X-Twice"] = []string{"1", "2"}
		_, _ = io.WriteString(w, "odd\n")
	},
	"cached": func(w http.ResponseWriter, _ *http.Request, _ string) {
		w.Header().Set("Cache-Status", "upstream; hit")
		_, _ = io.WriteString(w, "cached\n")
	},
	"ws": func(w http.ResponseWriter, r *http.Request, _ string) {
		websocket.Server{Handler: func(c *websocket.Conn) { _, _ = io.Copy(c, c) }}.ServeHTTP(w, r)
	},
}

func number(s string, def int) int {
	s, _, _ = strings.Cut(s, "/")
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 {
		return def
	}
	return n
}

// pause reports whether the time passed before the client left.
func pause(ctx context.Context, ms int) bool {
	t := time.NewTimer(time.Duration(ms) * time.Millisecond)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func writeBytes(w io.Writer, n int) {
	buf := []byte(strings.Repeat("x", min(n, 32<<10)))
	for n > 0 {
		k, err := w.Write(buf[:min(n, len(buf))])
		if err != nil {
			return
		}
		n -= k
	}
}

// abort ends the exchange without its end: for HTTP/1.1 by RST or, in order behind what was written, by FIN; for HTTP/2
// by RST_STREAM, which ErrAbortHandler makes.
func abort(w http.ResponseWriter, rst bool) {
	c, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := c.(*net.TCPConn); ok && rst {
		_ = tcp.SetLinger(0)
	}
	_ = c.Close()
}

func echo(w http.ResponseWriter, r *http.Request, _ string) {
	n, err := io.Copy(io.Discard, r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(Echo{
		Method: r.Method, URL: r.URL.RequestURI(), Proto: r.Proto, Host: r.Host, Header: r.Header, Trailer: r.Trailer,
		Body: n, Length: r.ContentLength, Encoding: r.TransferEncoding,
	})
}

// testService answers the interop calls that tests need: unary and both kinds of streams.
type testService struct {
	grpc_testing.UnimplementedTestServiceServer
	up *Upstream
}

func (s *testService) note(ctx context.Context, method string) {
	md, _ := metadata.FromIncomingContext(ctx)
	one := func(k string) string {
		if v := md.Get(k); len(v) > 0 {
			return v[0]
		}
		return ""
	}
	s.up.note(Seen{RequestID: one("x-request-id"), Receipt: one("x-knhk-receipt"), Method: http.MethodPost,
		Path: "/grpc.testing.TestService/" + method, Proto: "gRPC", Host: one(":authority")})
}

// UnaryCall answers with response_size bytes, or with the response_status that was asked for.
func (s *testService) UnaryCall(ctx context.Context, in *grpc_testing.SimpleRequest) (*grpc_testing.SimpleResponse, error) {
	s.note(ctx, "UnaryCall")
	if st := in.GetResponseStatus(); st != nil {
		return nil, status.Error(codes.Code(st.GetCode()), st.GetMessage())
	}
	return &grpc_testing.SimpleResponse{Payload: &grpc_testing.Payload{Body: make([]byte, in.GetResponseSize())}}, nil
}

// EmptyCall answers with nothing.
func (s *testService) EmptyCall(ctx context.Context, _ *grpc_testing.Empty) (*grpc_testing.Empty, error) {
	s.note(ctx, "EmptyCall")
	return &grpc_testing.Empty{}, nil
}

// FullDuplexCall answers each request with the sizes it asks for.
func (s *testService) FullDuplexCall(stream grpc_testing.TestService_FullDuplexCallServer) error {
	s.note(stream.Context(), "FullDuplexCall")
	for {
		in, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if st := in.GetResponseStatus(); st != nil {
			return status.Error(codes.Code(st.GetCode()), st.GetMessage())
		}
		for _, p := range in.GetResponseParameters() {
			out := &grpc_testing.StreamingOutputCallResponse{Payload: &grpc_testing.Payload{Body: make([]byte, p.GetSize())}}
			if err := stream.Send(out); err != nil {
				return err
			}
		}
	}
}
