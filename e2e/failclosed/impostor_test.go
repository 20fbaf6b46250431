package failclosed

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
	"github.com/knhk/sidecar/server/extauthz"
	"github.com/knhk/sidecar/server/extproc"
)

// bytesCodec has gRPC carry bytes as they are.
type bytesCodec struct{}

func (bytesCodec) Name() string { return "proto" }

func (bytesCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*[]byte))}, nil
}

func (bytesCodec) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

// deed is what an impostor does on an ext_proc stream whose first message it has read; its error ends the call.
type deed func(grpc.ServerStream) error

// impostor is a gRPC server at knhk's address that is healthy, takes access logs, and does as told on ext_proc streams.
type impostor struct {
	srv  *grpc.Server
	deed atomic.Value // deed
	hits atomic.Int64 // ext_proc streams it has misbehaved on
	done sync.WaitGroup
}

func (w *site) impostor() *impostor {
	w.t.Helper()
	l, err := w.listenAsKnhk()
	if err != nil {
		w.t.Fatal(err)
	}
	im := &impostor{}
	im.srv = grpc.NewServer(grpc.ForceServerCodecV2(bytesCodec{}), grpc.UnknownServiceHandler(im.serve))
	im.done.Go(func() { _ = im.srv.Serve(l) })
	w.t.Cleanup(im.stop)
	return im
}

// listenAsKnhk listens where knhk should.
func (w *site) listenAsKnhk() (net.Listener, error) {
	if path, ok := strings.CutPrefix(w.Sidecar, "unix:"); ok {
		return net.Listen("unix", path)
	}
	return net.Listen("tcp", w.Sidecar)
}

func (im *impostor) stop() {
	im.srv.Stop()
	im.done.Wait()
}

func (im *impostor) serve(_ any, ss grpc.ServerStream) error {
	var in []byte
	if err := ss.RecvMsg(&in); err != nil {
		return err
	}
	switch method, _ := grpc.MethodFromServerStream(ss); {
	case strings.HasPrefix(method, "/grpc.health."):
		serving := []byte{1 << 3, 1}
		return ss.SendMsg(&serving)
	case strings.Contains(method, "AccessLogService"):
		for {
			if err := ss.RecvMsg(&in); err != nil {
				return err
			}
		}
	}
	im.hits.Add(1)
	return im.deed.Load().(deed)(ss)
}

// says sends one message and then waits for the end of the stream.
func says(message ...byte) deed {
	return func(ss grpc.ServerStream) error {
		if err := ss.SendMsg(&message); err != nil {
			return err
		}
		<-ss.Context().Done()
		return ss.Context().Err()
	}
}

// replies answers a unary call with one message.
func replies(message ...byte) deed {
	return func(ss grpc.ServerStream) error { return ss.SendMsg(&message) }
}

// fails answers with a gRPC error.
func fails(code codes.Code) deed {
	return func(grpc.ServerStream) error { return status.Error(code, "as told") }
}

// mischief is what an impostor does, and what becomes of requests.
type mischief struct {
	name string
	deed deed
	want refusal
}

// garbage is what an impostor says who speaks gRPC: messages that are none, or none that fit.
func (w *site) garbage(noise func(int) []byte) []mischief {
	own := refusal{503, ""}
	if w.door == authorizer {
		never := append([]byte{0x07}, noise(64)...) // no protobuf begins so
		return []mischief{
			{"noise", replies(never...), own},
			{"much-noise", replies(append(never, noise(1<<20)...)...), own},
			{"cut-off", replies(0x0a, 0x7f), own},
			{"no-message", func(grpc.ServerStream) error { return nil }, own},
			{"consent-then-error", func(ss grpc.ServerStream) error {
				if err := replies()(ss); err != nil {
					return err
				}
				return status.Error(codes.Internal, "as told")
			}, own},
			{"consent-without-end", says(), w.hung},
		}
	}
	return []mischief{
		{"noise", says(noise(64)...), own},
		{"much-noise", says(noise(1 << 20)...), own},
		{"cut-off", says(0x0a, 0x7f), own},
		{"empty-message", says(), own},
		{"unknown-field", says(0xfa, 0x3e, 0x01, 'x'), own},
		{"metadata-alone", says(0x42, 0x00), own},
		{"mode-alone", says(0x4a, 0x00), own},
		{"answer-to-response", says(0x12, 0x00), own},
		{"answer-to-body", says(0x1a, 0x00), own},
		{"answer-to-trailers", says(0x2a, 0x00), own},
	}
}

// TestGarbage has somebody else at knhk's address: first one who speaks gRPC and sends messages that are none, or none that
// fit, then one who does not even speak HTTP/2.
func TestGarbage(t *testing.T) {
	t.Parallel()
	each(t, "garbage", stack.Config{}, func(w *site) {
		rng := w.runs[0].Rand()
		noise := func(n int) []byte {
			b := make([]byte, n)
			for i := range b {
				b[i] = byte(rng.Uint32())
			}
			return b
		}
		im := w.impostor()
		w.startEnvoy()
		behaved := 0
		for _, c := range w.garbage(noise) {
			im.deed.Store(c.deed)
			before := im.hits.Load()
			w.refuses(c.name, c.want)
			w.passes("gap-"+c.name, 2)
			if im.hits.Load() == before {
				behaved++
				t.Errorf("%s: nobody was asked", c.name)
			}
		}
		im.stop()
		for _, c := range []struct {
			name string
			talk func(net.Conn)
			want refusal
		}{
			{"bytes", func(c net.Conn) { _, _ = c.Write(noise(4096)) }, refusal{503, ""}},
			{"http1", func(c net.Conn) { _, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n") }, refusal{503, ""}},
			{"frames", func(c net.Conn) {
				_, _ = c.Write(append([]byte("\x00\x00\x00\x04\x00\x00\x00\x00\x00"), noise(4096)...))
			}, refusal{503, ""}},
			{"closes", func(net.Conn) {}, refusal{503, ""}},
			{"mute", func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }, w.hung},
		} {
			stop, hits := w.listen(c.talk)
			w.refuses(c.name, c.want)
			w.passes("gap-"+c.name, 2)
			if hits() == 0 {
				behaved++
				t.Errorf("%s: nobody connected", c.name)
			}
			stop()
		}
		if behaved == 0 {
			w.observed("the impostor's own counts")
		}
		seen := []string{w.failed}
		if w.door == processor {
			seen = append(seen, spurious)
		}
		for _, name := range seen {
			if w.stat(name) == 0 {
				t.Errorf("Envoy counts none of %s", name)
			}
		}
		if n := w.stat(w.failedOpen); n != float64(w.gaps) {
			t.Errorf("Envoy counts %v gaps of %d", n, w.gaps)
		}
		w.startKnhk("back")
		line := w.unknown(0)
		w.complete(0)
		w.row("garbage", fmt.Sprintf("%v; %d if it accepts and says nothing", refusal{503, ""}, w.hung.status), envoyExact,
			"Envoy "+strings.Join(seen, ", "), line)
	})
}

// listen has every connection to knhk's address talked to, and closed once the talk is over. It returns what ends it and how many
// connections there were.
func (w *site) listen(talk func(net.Conn)) (stop func(), hits func() int64) {
	w.t.Helper()
	l, err := w.listenAsKnhk()
	if err != nil {
		w.t.Fatal(err)
	}
	var n atomic.Int64
	var talks sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	talks.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n.Add(1)
			talks.Go(func() {
				defer c.Close()
				defer context.AfterFunc(ctx, func() { c.Close() })()
				// Envoy's first bytes, so that closing is no RST on them.
				_ = c.SetReadDeadline(time.Now().Add(time.Second))
				_, _ = bufio.NewReader(c).Peek(1)
				_ = c.SetReadDeadline(time.Time{})
				talk(c)
			})
		}
	})
	end := func() {
		cancel()
		l.Close()
		talks.Wait()
	}
	w.t.Cleanup(end)
	return end, n.Load
}

// TestGRPCError has knhk's address answer every question with a gRPC error, each of them in turn.
func TestGRPCError(t *testing.T) {
	t.Parallel()
	each(t, "grpc-error", stack.Config{}, func(w *site) {
		im := w.impostor()
		w.startEnvoy()
		failed := w.stat(w.failed)
		all := 0
		for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
			im.deed.Store(fails(code))
			before := im.hits.Load()
			w.refuses(code.String(), refusal{503, ""})
			w.passes("gap-"+code.String(), 2)
			if im.hits.Load() > before {
				all++
			} else {
				t.Errorf("%v: nobody was asked", code)
			}
		}
		if all == 16 {
			w.observed("the impostor's own counts")
		}
		if n := w.stat(w.failed) - failed; n == 0 {
			t.Error("Envoy counts no failed stream")
		}
		im.stop()
		w.startKnhk("back")
		line := w.unknown(0)
		w.complete(0)
		w.row("gRPC error, any code", refusal{503, ""}.String(), envoyExact, "Envoy "+w.failed, line)
	})
}

// TestCleanEnd holds fast why knhk never ends a stream without an answer: Envoy (1.40) takes a clean end for consent, on routes that
// deny too. Then knhk itself is asked in every way in which there may be nothing to answer: each call gets an answer or an error.
func TestCleanEnd(t *testing.T) {
	t.Parallel()
	harness.RequireEnvoy(t)
	// Nobody tells an outcome of what is decided here without Envoy.
	impatient := "log: {outcome_timeout: 2s}" + strings.ReplaceAll(routes, "cluster: up", "cluster: up, timeout: 2s")
	w := &site{World: audited.Prepare(t, stack.Config{YAML: impatient}), t: t, turn: turn{door: processor, denying: true, letting: true}}
	im := w.impostor()
	im.deed.Store(deed(func(grpc.ServerStream) error { return nil }))
	w.startEnvoy()
	if resp := w.Get("clean-end", "/p"); resp.Status != 200 || w.Reached("clean-end") != 1 {
		t.Errorf("Envoy has changed: a stream that ends cleanly without an answer gives %d, and %d requests at the upstream",
			resp.Status, w.Reached("clean-end"))
	}
	w.Upstream.Forget() // they went on by nobody's decision, as was to be shown
	im.stop()
	w.startKnhk("started")
	ask := w.asks(extproc.ServiceDesc.ServiceName + "/Process")
	headers := []byte{0x12, 0x02, 0x18, 0x01} // ProcessingRequest.request_headers{end_of_stream: true}
	for name, send := range map[string][][]byte{
		"nothing": {}, "an empty message": {{}}, "noise": {{0xff, 0xff, 0xff}}, "request headers": {headers},
		"request headers twice": {headers, headers}, "response headers": {{0x1a, 0x00}}, "request body": {{0x22, 0x00}},
		"response body": {{0x2a, 0x00}}, "request trailers": {{0x32, 0x00}}, "response trailers": {{0x3a, 0x00}},
	} {
		answers, err := ask(send)
		if errors.Is(err, io.EOF) || len(answers) < len(send) {
			t.Errorf("%s: %d answers, then %v", name, len(answers), err)
		}
	}
	w.complete(0)
}

// asks gives what has a method of knhk asked: all messages are sent, then the end of them; what comes back is the answers and how the
// call ended, io.EOF if cleanly.
func (w *site) asks(method string) func(send [][]byte) (answers [][]byte, err error) {
	w.t.Helper()
	conn, err := grpc.NewClient(w.Sidecar, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(bytesCodec{})))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	return func(send [][]byte) (answers [][]byte, err error) {
		w.t.Helper()
		ctx, cancel := context.WithTimeout(w.t.Context(), harness.Patience)
		defer cancel()
		st, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/"+method)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, m := range send {
			// One that knhk has answered already takes no more: how it ended is told below.
			if err := st.SendMsg(&m); err != nil && !errors.Is(err, io.EOF) {
				w.t.Error(err)
			}
		}
		if err := st.CloseSend(); err != nil {
			w.t.Error(err)
		}
		for {
			var in []byte
			if err := st.RecvMsg(&in); err != nil {
				return answers, err
			}
			answers = append(answers, in)
		}
	}
}

// TestConsent holds fast why knhk never sends an answer to ext_authz without a status: Envoy (1.40) takes a CheckResponse in which it
// finds none for consent, whatever else stands there; the nearest there is to a stream that ends cleanly. Then knhk itself is asked in
// every way in which there may be nothing to say: each call gets a denial or an error.
func TestConsent(t *testing.T) {
	t.Parallel()
	harness.RequireEnvoy(t)
	r := turn{door: authorizer, denying: true}
	w := &site{World: audited.Prepare(t, stack.Config{YAML: r.yaml(logOf("seal_every: 1s"))}), t: t, turn: r}
	im := w.impostor()
	w.startEnvoy()
	for name, c := range map[string]struct {
		answer []byte
		want   int
	}{
		"empty":                   {nil, 200},
		"status-without-code":     {[]byte{0x0a, 0x00}, 200},
		"status-of-another-type":  {[]byte{0x08, 0x07}, 200},
		"unknown-field":           {[]byte{0xfa, 0x3e, 0x01, 'x'}, 200},
		"denial-without-response": {[]byte{0x0a, 0x02, 0x08, 0x07}, 403},
	} {
		im.deed.Store(replies(c.answer...))
		if resp := w.Get(name, "/p"); resp.Status != c.want || (w.Reached(name) == 1) != (c.want == 200) {
			t.Errorf("Envoy has changed: %s gives %d, and %d requests at the upstream", name, resp.Status, w.Reached(name))
		}
	}
	w.Upstream.Forget() // they went on by nobody's decision, as was to be shown
	im.stop()
	w.startKnhk("started")
	ask := w.asks(extauthz.ServiceDesc.ServiceName + "/Check")
	for name, send := range map[string][][]byte{
		"nothing": {}, "an empty message": {{}}, "noise": {{0xff, 0xff, 0xff}}, "empty attributes": {{0x0a, 0x00}},
		"attributes of another type": {{0x08, 0x01}}, "a request without HTTP": {{0x0a, 0x02, 0x22, 0x00}},
		"an empty HTTP request": {{0x0a, 0x04, 0x22, 0x02, 0x12, 0x00}}, "two messages": {{}, {}},
	} {
		answers, err := ask(send)
		for _, b := range answers {
			var r authv3.CheckResponse
			if err := proto.Unmarshal(b, &r); err != nil || r.GetStatus().GetCode() == 0 || r.GetDeniedResponse() == nil {
				t.Errorf("%s is answered by %v: %v", name, &r, err)
			}
		}
		if errors.Is(err, io.EOF) && len(answers) == 0 {
			t.Errorf("%s: the call ends without an answer or an error", name)
		}
	}
	w.complete(0)
}
