package failclosed

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
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

// TestGarbage has somebody else at knhk's address: first one who speaks gRPC and sends messages that are none, or none that
// fit, then one who does not even speak HTTP/2.
func TestGarbage(t *testing.T) {
	t.Parallel()
	each(t, "garbage", stack.Config{}, func(w *site) {
		rng := w.closed.Rand()
		noise := func(n int) []byte {
			b := make([]byte, n)
			for i := range b {
				b[i] = byte(rng.Uint32())
			}
			return b
		}
		im := w.impostor()
		w.startEnvoy()
		misbehaved := 0
		for _, c := range []struct {
			name string
			deed deed
			want refusal
		}{
			{"noise", says(noise(64)...), refusal{503, ""}},
			{"much-noise", says(noise(1 << 20)...), refusal{503, ""}},
			{"cut-off", says(0x0a, 0x7f), refusal{503, ""}},
			{"empty-message", says(), refusal{503, ""}},
			{"unknown-field", says(0xfa, 0x3e, 0x01, 'x'), refusal{503, ""}},
			{"metadata-alone", says(0x42, 0x00), refusal{503, ""}},
			{"mode-alone", says(0x4a, 0x00), refusal{503, ""}},
			{"answer-to-response", says(0x12, 0x00), refusal{503, ""}},
			{"answer-to-body", says(0x1a, 0x00), refusal{503, ""}},
			{"answer-to-trailers", says(0x2a, 0x00), refusal{503, ""}},
		} {
			im.deed.Store(c.deed)
			before := im.hits.Load()
			w.refuses(c.name, c.want)
			w.passes("gap-"+c.name, 2)
			if im.hits.Load() > before {
				misbehaved++
			} else {
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
			{"mute", func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }, refusal{504, ""}},
		} {
			stop, hits := w.listen(c.talk)
			w.refuses(c.name, c.want)
			w.passes("gap-"+c.name, 2)
			if hits() > 0 {
				misbehaved++
			} else {
				t.Errorf("%s: nobody connected", c.name)
			}
			stop()
		}
		if misbehaved == 15 {
			w.observed("the impostor's own counts")
		}
		if bad, failed := w.stat(spurious), w.stat(streamsFailed); bad == 0 || failed == 0 {
			t.Errorf("Envoy counts %v answers that do not fit and %v failed streams", bad, failed)
		}
		if n := w.stat(failedOpen); n != float64(w.gaps) {
			t.Errorf("Envoy counts %v gaps of %d", n, w.gaps)
		}
		w.startKnhk("back")
		line := w.unknown(0, w.gaps)
		w.complete(0)
		w.row("garbage", refusal{503, ""}.String()+"; 504 if it accepts and says nothing", envoyExact,
			"Envoy "+streamsFailed+", "+spurious, line)
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
		failed := w.stat(streamsFailed)
		all := 0
		for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
			im.deed.Store(deed(func(grpc.ServerStream) error { return status.Error(code, "as told") }))
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
		if n := w.stat(streamsFailed) - failed; n == 0 {
			t.Error("Envoy counts no failed stream")
		}
		im.stop()
		w.startKnhk("back")
		line := w.unknown(0, w.gaps)
		w.complete(0)
		w.row("gRPC error, any code", refusal{503, ""}.String(), envoyExact, "Envoy "+streamsFailed, line)
	})
}

// TestCleanEnd holds fast why knhk never ends a stream without an answer: Envoy (1.40) takes a clean end for consent, on routes that
// deny too. Then knhk itself is asked in every way in which there may be nothing to answer: each call gets an answer or an error.
func TestCleanEnd(t *testing.T) {
	t.Parallel()
	harness.RequireEnvoy(t)
	// Nobody tells an outcome of what is decided here without Envoy.
	impatient := "log: {outcome_timeout: 2s}" + strings.ReplaceAll(routes, "cluster: up", "cluster: up, timeout: 2s")
	w := &site{World: audited.Prepare(t, stack.Config{YAML: impatient}), t: t}
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
	conn, err := grpc.NewClient(w.Sidecar, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(bytesCodec{})))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	headers := []byte{0x12, 0x02, 0x18, 0x01} // ProcessingRequest.request_headers{end_of_stream: true}
	for name, send := range map[string][][]byte{
		"nothing": {}, "an empty message": {{}}, "noise": {{0xff, 0xff, 0xff}}, "request headers": {headers},
		"request headers twice": {headers, headers}, "response headers": {{0x1a, 0x00}}, "request body": {{0x22, 0x00}},
		"response body": {{0x2a, 0x00}}, "request trailers": {{0x32, 0x00}}, "response trailers": {{0x3a, 0x00}},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), harness.Patience)
		st, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/"+extproc.ServiceDesc.ServiceName+"/Process")
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range send {
			if err := st.SendMsg(&m); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if err := st.CloseSend(); err != nil {
			t.Error(err)
		}
		answers := 0
		var in []byte
		for err = nil; err == nil; {
			if err = st.RecvMsg(&in); err == nil {
				answers++
			}
		}
		if errors.Is(err, io.EOF) || answers < len(send) {
			t.Errorf("%s: %d answers, then %v", name, answers, err)
		}
		cancel()
	}
	w.complete(0)
}
