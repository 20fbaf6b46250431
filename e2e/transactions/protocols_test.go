package transactions

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/harness"
)

// protocols are the transactions that are not HTTP/1.1 requests from beginning to end, and the body-less oddities.
var protocols = []transaction{
	{name: "grpc-unary", reached: 1, send: func(w *world, name string) {
		withGRPC(w, name, func(ctx context.Context, c grpc_testing.TestServiceClient) error {
			_, err := c.UnaryCall(ctx, &grpc_testing.SimpleRequest{ResponseSize: 10})
			return err
		})
	}, want: []string{"W1 admit ok by route:rpc" + ok200}},
	// The status of a gRPC call is in its trailers: for HTTP the exchange is complete.
	{name: "grpc-error", reached: 1, send: func(w *world, name string) {
		withGRPC(w, name, func(ctx context.Context, c grpc_testing.TestServiceClient) error {
			_, err := c.UnaryCall(ctx, &grpc_testing.SimpleRequest{ResponseStatus: &grpc_testing.EchoStatus{Code: 9, Message: "no"}})
			if status.Code(err) != codes.FailedPrecondition {
				return errors.New("the error of the upstream did not arrive: " + status.Code(err).String())
			}
			return nil
		})
	}, want: []string{"W1 admit ok by route:rpc" + ok200}},
	{name: "grpc-stream", reached: 1, send: func(w *world, name string) {
		withGRPC(w, name, func(ctx context.Context, c grpc_testing.TestServiceClient) error {
			s, err := c.FullDuplexCall(ctx)
			if err != nil {
				return err
			}
			for range 3 {
				in := &grpc_testing.StreamingOutputCallRequest{ResponseParameters: []*grpc_testing.ResponseParameters{{Size: 8}, {Size: 8}}}
				if err := s.Send(in); err != nil {
					return err
				}
				for range 2 {
					if _, err := s.Recv(); err != nil {
						return err
					}
				}
			}
			if err := s.CloseSend(); err != nil {
				return err
			}
			if _, err := s.Recv(); !errors.Is(err, io.EOF) {
				return err
			}
			return nil
		})
	}, want: []string{"W1 admit ok by route:rpc" + ok200}},
	{name: "grpc-stream-cancelled", reached: 1, send: func(w *world, name string) {
		withGRPC(w, name, func(ctx context.Context, c grpc_testing.TestServiceClient) error {
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			s, err := c.FullDuplexCall(ctx)
			if err != nil {
				return err
			}
			in := &grpc_testing.StreamingOutputCallRequest{ResponseParameters: []*grpc_testing.ResponseParameters{{Size: 8}}}
			if err := s.Send(in); err != nil {
				return err
			}
			_, err = s.Recv()
			return err
		})
	}, want: []string{"W1 admit ok by route:rpc | als client_abort 200 [DR] http2.remote_reset"}},
	{name: "http2", reached: 2, send: func(w *world, name string) {
		c := h2(w)
		defer c.CloseIdleConnections()
		for _, target := range []string{"/hot/do/bytes/40000", "/p/do/status/404"} {
			resp, err := c.Do(h2Request(w, name, http.MethodGet, target, nil))
			if err != nil {
				w.t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, resp.Body); err != nil || len(resp.Header["X-Knhk-Receipt"]) != 1 || resp.ProtoMajor != 2 {
				w.t.Errorf("%s: %v %s %v", name, err, resp.Proto, resp.Header)
			}
			resp.Body.Close()
		}
	}, want: []string{
		"R1 admit ok by route:hot" + ok200,
		"W1 admit ok by route:pages | als complete 404 up=404 via_upstream"}},
	{name: "http2-client-resets-stream", reached: 1, send: func(w *world, name string) {
		c := h2(w)
		defer c.CloseIdleConnections()
		ctx, cancel := context.WithCancel(w.t.Context())
		defer cancel()
		go func() {
			for ctx.Err() == nil && w.Reached(name) == 0 {
				time.Sleep(5 * time.Millisecond)
			}
			cancel()
		}()
		resp, err := c.Do(h2Request(w, name, http.MethodGet, "/p/do/never", nil).WithContext(ctx))
		if err == nil {
			resp.Body.Close()
			w.t.Errorf("%s: an answer: %s", name, resp.Status)
		}
	}, want: []string{"W1 admit ok by route:pages | als client_abort [DR] http2.remote_reset"}},
}

// withGRPC calls the upstream's gRPC service through Envoy.
func withGRPC(w *world, name string, call func(context.Context, grpc_testing.TestServiceClient) error) {
	w.t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+w.Listener, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithAuthority(name+audited.CaseSuffix), grpc.WithNoProxy())
	if err != nil {
		w.t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(w.t.Context(), harness.Patience)
	defer cancel()
	if err := call(ctx, grpc_testing.NewTestServiceClient(conn)); err != nil {
		w.t.Errorf("%s: %v", name, err)
	}
}

// h2 is an HTTP/2 client without TLS.
func h2(_ *world) *http.Client {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	return &http.Client{Transport: &http.Transport{Protocols: p}, Timeout: harness.Patience}
}

func h2Request(w *world, name, method, target string, body io.Reader) *http.Request {
	w.t.Helper()
	r, err := http.NewRequestWithContext(w.t.Context(), method, "http://"+w.Listener+target, body)
	if err != nil {
		w.t.Fatal(err)
	}
	r.Host = name + audited.CaseSuffix
	return r
}

// openWebsocket opens a websocket to the echo, and the connection under it: closing that one leaves without a word.
func openWebsocket(w *world, name string) (*websocket.Conn, net.Conn) {
	w.t.Helper()
	tcp := w.TCP()
	at := &url.URL{Scheme: "ws", Host: name + audited.CaseSuffix, Path: "/ws/do/ws"}
	c, err := websocket.NewClient(&websocket.Config{Location: at, Origin: &url.URL{Scheme: "http", Host: at.Host}, Version: 13}, tcp)
	if err != nil {
		w.t.Fatal(err)
	}
	return c, tcp
}

// websocketEcho opens a websocket, has a word echoed and closes it.
func websocketEcho(w *world, name string) {
	w.t.Helper()
	c, tcp := openWebsocket(w, name)
	defer tcp.Close()
	word := []byte("hello")
	if _, err := c.Write(word); err != nil {
		w.t.Fatal(err)
	}
	if _, err := io.ReadFull(c, word); err != nil || string(word) != "hello" {
		w.t.Errorf("%s: %q, %v", name, word, err)
	}
}

const (
	hotDelta   = `{"additions":[{"subject":"s","predicate":"p","object":"o"}],"removals":[]}`
	blankDelta = `{"additions":[{"subject":"_:b","predicate":"p","object":"o"}]}`
)

// bodies are the transactions of a route that is classified by the body of its requests.
var bodies = []transaction{
	{name: "delta-hot", reached: 1, send: delta(harness.Request{Body: hotDelta}),
		want: []string{"R1 admit ok by delta:hot" + ok200}},
	{name: "delta-blank-node", reached: 1, send: delta(harness.Request{Body: blankDelta}),
		want: []string{"W1 admit ok by delta:blank" + ok200}},
	{name: "delta-not-json", reached: 1, send: delta(harness.Request{Body: "additions"}),
		want: []string{"W1 admit ok by delta:malformed" + ok200}},
	{name: "delta-at-limit", reached: 1, send: delta(harness.Request{Body: padded(8 << 10)}),
		want: []string{"R1 admit ok by delta:hot" + ok200}},
	{name: "delta-over-limit", reached: 1, send: delta(harness.Request{Body: padded(8<<10 + 1)}),
		want: []string{"W1 admit ok by delta:large" + ok200}},
	// Longer than Envoy's buffer: it must arrive whole all the same.
	{name: "delta-300-kib", reached: 1, send: delta(harness.Request{Body: padded(300 << 10)}),
		want: []string{"W1 admit ok by delta:large" + ok200}},
	// Without a length nobody can promise that a body message comes: decided by the headers.
	{name: "delta-chunked", reached: 1, send: delta(harness.Request{Chunks: []string{hotDelta[:10], hotDelta[10:]}}),
		want: []string{"W1 admit ok by delta:large" + ok200}},
	{name: "delta-chunked-300-kib", reached: 1, send: delta(harness.Request{Chunks: []string{padded(100 << 10), padded(200 << 10)}}),
		want: []string{"W1 admit ok by delta:large" + ok200}},
	{name: "delta-chunked-with-trailers", reached: 1,
		send: delta(harness.Request{Chunks: []string{hotDelta}, Trailer: map[string]string{"X-Sum": "1"}}),
		want: []string{"W1 admit ok by delta:large" + ok200}},
	{name: "delta-without-body", reached: 1, send: answers(200, "/delta"),
		want: []string{"W1 admit ok by delta:malformed" + ok200}},
	{name: "delta-http2-trailers-only", reached: 1, send: func(w *world, name string) {
		c := h2(w)
		defer c.CloseIdleConnections()
		r := h2Request(w, name, http.MethodPost, "/delta", http.NoBody)
		r.Body, r.ContentLength = io.NopCloser(strings.NewReader("")), -1
		r.Trailer = http.Header{"X-Sum": {"1"}}
		resp, err := c.Do(r)
		if err != nil {
			w.t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 200 {
			w.t.Errorf("%s: %s", name, resp.Status)
		}
	}, want: []string{"W1 admit ok by delta:large" + ok200}},
	// The client leaves while Envoy gathers the body: decided all the same, refused, and the upstream saw nothing.
	{name: "delta-client-leaves-mid-upload", send: leaveMidDelta,
		want: []string{"unknown refuse client_gone 499 | ext_proc client_abort knhk_client_gone"}},
}

// padded is a hot delta of n bytes.
func padded(n int) string { return hotDelta + strings.Repeat(" ", n-len(hotDelta)) }

// delta sends a body to the route and wants it to arrive whole.
func delta(r harness.Request) func(*world, string) {
	return func(w *world, name string) {
		w.t.Helper()
		r.Method, r.Target = "POST", "/delta/do/echo"
		want := len(r.Body)
		for _, c := range r.Chunks {
			want += len(c)
		}
		if e := w.echo(name, w.Send(name, r)); e.Body != int64(want) {
			w.t.Errorf("%s: %d bytes arrived of %d", name, e.Body, want)
		}
	}
}

const extProcReplies = "http.knhk.ext_proc.stream_msgs_received"

// leaveMidDelta leaves once knhk has answered the headers and waits for the body.
func leaveMidDelta(w *world, name string) {
	w.t.Helper()
	before, err := w.Envoy.Stat(w.t.Context(), extProcReplies)
	if err != nil {
		w.t.Fatal(err)
	}
	abandoned := w.Metric("knhk_extproc_events_total", `knhk_event="abandoned"`)
	r := harness.Request{Method: "POST", Host: name + audited.CaseSuffix, Target: "/delta/do/echo", Body: padded(4 << 10)}
	if err := harness.AbortUpload(w.t.Context(), w.Listener, r, 1000, func() error {
		w.Until("Envoy has the answer to the headers", func() bool {
			n, err := w.Envoy.Stat(w.t.Context(), extProcReplies)
			return err == nil && n > before
		})
		return nil
	}); err != nil {
		w.t.Error(err)
	}
	w.AwaitMetric(abandoned+1, "knhk_extproc_events_total", `knhk_event="abandoned"`)
}
