package harness

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sort"
	"strings"
	"time"

	"golang.org/x/net/websocket"
)

// connTimeout bounds everything on a client connection: a test that hangs says so instead.
const connTimeout = Patience

// Request is an HTTP/1.1 request that may be wrong on purpose.
type Request struct {
	Method string            // default GET
	Target string            // request target; default "/"
	Host   string            // default "test.local"; "-" sends none
	Header map[string]string // sent in the order of their names
	Body   string            // sent with content-length
	Chunks []string          // sent chunked, instead of Body
	// Trailer fields follow Chunks. A nil Chunks with trailers sends a body of no chunk.
	Trailer map[string]string
	// Open sends Chunks but not the end of the body; Conn.EndBody does.
	Open bool
}

// Bytes returns the request as it goes over the wire.
func (r Request) Bytes() []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\n", orDefault(r.Method, http.MethodGet), orDefault(r.Target, "/"))
	if r.Host != "-" {
		fmt.Fprintf(&b, "Host: %s\r\n", orDefault(r.Host, "test.local"))
	}
	fields(&b, r.Header)
	switch {
	case r.Chunks != nil || r.Trailer != nil || r.Open:
		b.WriteString("Transfer-Encoding: chunked\r\n\r\n")
		for _, c := range r.Chunks {
			fmt.Fprintf(&b, "%x\r\n%s\r\n", len(c), c)
		}
		if r.Open {
			break
		}
		b.WriteString("0\r\n")
		fields(&b, r.Trailer)
		b.WriteString("\r\n")
	case r.Body != "":
		fmt.Fprintf(&b, "Content-Length: %d\r\n\r\n%s", len(r.Body), r.Body)
	default:
		b.WriteString("\r\n")
	}
	return []byte(b.String())
}

func fields(b *strings.Builder, h map[string]string) {
	names := make([]string, 0, len(h))
	for k := range h {
		names = append(names, k)
	}
	sort.Strings(names)
	for _, k := range names {
		fmt.Fprintf(b, "%s: %s\r\n", k, h[k])
	}
}

// Response is a response whose body has been read.
type Response struct {
	Status  int
	Header  http.Header
	Trailer http.Header
	Body    []byte
}

// Conn is one raw HTTP/1.1 connection, kept alive for as many requests as the server lets it.
type Conn struct {
	tcp  *net.TCPConn
	conn net.Conn // tcp, or TLS on it
	r    *bufio.Reader
}

// Dial opens a connection to addr (host:port). Everything on it ends after Patience at the latest.
func Dial(ctx context.Context, addr string) (*Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("dial: %w", err)
	}
	if err := c.SetDeadline(time.Now().Add(connTimeout)); err != nil {
		c.Close()
		return nil, fmt.Errorf("dial: %w", err)
	}
	return &Conn{tcp: c.(*net.TCPConn), conn: c, r: bufio.NewReader(c)}, nil
}

// DialTLS is Dial, and the handshake that cfg wants. With TLS 1.3 a server that refuses the client's certificate says so after it: then
// the first Read fails.
func DialTLS(ctx context.Context, addr string, cfg *tls.Config) (*Conn, error) {
	c, err := Dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	t := tls.Client(c.tcp, cfg)
	if err := t.HandshakeContext(ctx); err != nil {
		c.Close()
		return nil, fmt.Errorf("dial: %w", err)
	}
	c.conn, c.r = t, bufio.NewReader(t)
	return c, nil
}

// TLS is the state of a connection that DialTLS made, else nil.
func (c *Conn) TLS() *tls.ConnectionState {
	t, ok := c.conn.(*tls.Conn)
	if !ok {
		return nil
	}
	state := t.ConnectionState()
	return &state
}

// Close ends the connection in the ordinary way (FIN).
func (c *Conn) Close() error { return c.conn.Close() }

// Abort ends the connection with RST, as a crashed client's kernel would.
func (c *Conn) Abort() error {
	if err := c.tcp.SetLinger(0); err != nil {
		return err
	}
	return c.tcp.Close()
}

// Write sends bytes as they are.
func (c *Conn) Write(b []byte) error {
	_, err := c.conn.Write(b)
	return err
}

// Do sends a request and reads the response whole. 1xx responses other than 101 are read and dropped.
func (c *Conn) Do(r Request) (*Response, error) {
	if err := c.Write(r.Bytes()); err != nil {
		return nil, fmt.Errorf("send: %w", err)
	}
	return c.Read(orDefault(r.Method, http.MethodGet))
}

// Read reads one response to a request with the given method. With an error in the body it returns what came before,
// headers included, beside the error.
func (c *Conn) Read(method string) (*Response, error) {
	for {
		resp, err := http.ReadResponse(c.r, &http.Request{Method: method})
		if err != nil {
			return nil, fmt.Errorf("read response: %w", err)
		}
		if resp.StatusCode >= 100 && resp.StatusCode < 200 && resp.StatusCode != http.StatusSwitchingProtocols {
			continue
		}
		body, err := io.ReadAll(resp.Body)
		out := &Response{Status: resp.StatusCode, Header: resp.Header, Trailer: resp.Trailer, Body: body}
		if err != nil {
			return out, fmt.Errorf("read body: %w", err)
		}
		return out, nil
	}
}

// ReadHead reads one response up to the end of its headers and leaves the body unread.
func (c *Conn) ReadHead(method string) (*Response, error) {
	resp, err := http.ReadResponse(c.r, &http.Request{Method: method})
	if err != nil {
		return nil, fmt.Errorf("read response: %w", err)
	}
	return &Response{Status: resp.StatusCode, Header: resp.Header}, nil
}

// Do opens a connection, sends one request, reads the response and closes.
func Do(ctx context.Context, addr string, r Request) (*Response, error) {
	c, err := Dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.Do(r)
}

// DoTLS is Do with TLS.
func DoTLS(ctx context.Context, addr string, cfg *tls.Config, r Request) (*Response, error) {
	c, err := DialTLS(ctx, addr, cfg)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.Do(r)
}

// EndBody ends the chunked body of a request that was sent with Open.
func (c *Conn) EndBody() error { return c.Write([]byte("0\r\n\r\n")) }

// CutMidBody asks target (an upstream's /do/cut) for a response that breaks off, lets it break only once headers and a
// first byte of the body are here, and returns the headers and how reading the rest ended. Reading on to a proper end is
// an error of this function.
func CutMidBody(ctx context.Context, addr, target string) (*Response, error) {
	c, err := Dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := c.Write(Request{Method: http.MethodPost, Target: target, Open: true}.Bytes()); err != nil {
		return nil, fmt.Errorf("cut mid body: %w", err)
	}
	resp, err := http.ReadResponse(c.r, &http.Request{Method: http.MethodPost})
	if err != nil {
		return nil, fmt.Errorf("cut mid body: %w", err)
	}
	out := &Response{Status: resp.StatusCode, Header: resp.Header}
	if _, err := io.ReadFull(resp.Body, make([]byte, 1)); err != nil {
		return out, fmt.Errorf("cut mid body: %w", err)
	}
	if err := c.EndBody(); err != nil {
		return out, fmt.Errorf("cut mid body: %w", err)
	}
	if out.Body, err = io.ReadAll(resp.Body); err == nil {
		return out, fmt.Errorf("cut mid body: the body had an end after %d bytes", len(out.Body))
	}
	return out, nil
}

// AbortBeforeResponse sends a request, waits until sent returns (for instance: until the upstream has seen it) and
// resets the connection.
func AbortBeforeResponse(ctx context.Context, addr string, r Request, sent func() error) error {
	c, err := Dial(ctx, addr)
	if err != nil {
		return err
	}
	if err := c.Write(r.Bytes()); err != nil {
		return fmt.Errorf("abort before response: %w", err)
	}
	if err := sent(); err != nil {
		return fmt.Errorf("abort before response: %w", err)
	}
	return c.Abort()
}

// AbortMidBody sends a request, reads the headers of the response and at least one byte of its body, and resets the
// connection. The returned response has no body.
func AbortMidBody(ctx context.Context, addr string, r Request) (*Response, error) {
	c, err := Dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	if err := c.Write(r.Bytes()); err != nil {
		return nil, fmt.Errorf("abort mid body: %w", err)
	}
	resp, err := c.ReadHead(orDefault(r.Method, http.MethodGet))
	if err != nil {
		return nil, fmt.Errorf("abort mid body: %w", err)
	}
	if _, err := c.r.ReadByte(); err != nil {
		return nil, fmt.Errorf("abort mid body: %w", err)
	}
	return resp, c.Abort()
}

// AbortUpload sends a request with a content-length of its body, but only the first n bytes of it, and resets the
// connection once sent returns.
func AbortUpload(ctx context.Context, addr string, r Request, n int, sent func() error) error {
	whole := r.Bytes()
	if n < 0 || n > len(r.Body) {
		return fmt.Errorf("abort upload: %d of %d bytes", n, len(r.Body))
	}
	c, err := Dial(ctx, addr)
	if err != nil {
		return err
	}
	if err := c.Write(whole[:len(whole)-len(r.Body)+n]); err != nil {
		return fmt.Errorf("abort upload: %w", err)
	}
	if err := sent(); err != nil {
		return fmt.Errorf("abort upload: %w", err)
	}
	return c.Abort()
}

// MissingHost is a request without a Host header, which Envoy answers with 400 before any route.
func MissingHost() Request { return Request{Host: "-"} }

// OversizedHeaders is a request with kib KiB of headers in one field, which Envoy answers with 431 above its limit.
func OversizedHeaders(kib int) Request {
	return Request{Header: map[string]string{"X-Padding": strings.Repeat("p", kib<<10)}}
}

// WebSocket opens a websocket to path at addr.
func WebSocket(ctx context.Context, addr, path string) (*websocket.Conn, error) {
	cfg := &websocket.Config{
		Location: &url.URL{Scheme: "ws", Host: addr, Path: path},
		Origin:   &url.URL{Scheme: "http", Host: addr},
		Version:  websocket.ProtocolVersionHybi13,
	}
	c, err := cfg.DialContext(ctx)
	if err != nil {
		return nil, fmt.Errorf("websocket: %w", err)
	}
	if err := c.SetDeadline(time.Now().Add(connTimeout)); err != nil {
		c.Close()
		return nil, fmt.Errorf("websocket: %w", err)
	}
	return c, nil
}

// Eventually calls ok every few milliseconds until it is true, and fails the test after Patience: for what another
// process does soon, but at no stated moment.
func Eventually(t TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(Patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", Patience, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
