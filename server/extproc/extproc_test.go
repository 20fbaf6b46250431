package extproc

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/server/envoywire"
)

func TestNewChecks(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	for name, cfg := range map[string]Config{
		"no admitter":     {Log: log},
		"no logger":       {Admitter: &admitter{}},
		"unknown capture": {Admitter: &admitter{}, Log: log, Capture: "most"},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: New accepts it", name)
		}
	}
}

// TestRequestFields checks that a request arrives whole.
func TestRequestFields(t *testing.T) {
	var got policy.Request
	a := &admitter{
		plan: func(route string) Plan {
			if route != "cart" {
				t.Errorf("Plan(%q), want cart", route)
			}
			return Plan{}
		},
		admit: func(_ context.Context, r *policy.Request) policy.Decision { got = *r; return pass },
	}
	h := serve(t, Config{Admitter: a})
	ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
	st, err := h.client.Process(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Send(requestMessage()); err != nil {
		t.Fatal(err)
	}
	if _, err := st.Recv(); err != nil {
		t.Fatal(err)
	}
	want := policy.Request{
		Method: "GET", Scheme: "https", Authority: "shop.example.com", Path: "/cart/items?id=17",
		RequestID: "55bd02a2-cbe4-4285-8ead-9f4268d68d32", Route: "cart", Cluster: "cart-v2", Source: "10.0.0.7:53150",
		SPIFFEID: "spiffe://example.com/ns/shop/sa/web",
		TraceID:  [16]byte{0x4b, 0xf9, 0x2f, 0x35, 0x77, 0xb3, 0x4d, 0xa6, 0xa3, 0xce, 0x92, 0x9d, 0x0e, 0x0e, 0x47, 0x36},
		SpanID:   [8]byte{0x00, 0xf0, 0x67, 0xaa, 0x0b, 0xa9, 0x02, 0xb7},
	}
	if got.Body != nil || got.HasBody || got.BodyLarge || got.BodyMissing {
		t.Errorf("a body was made up: %+v", got)
	}
	if describe(&got) != describe(&want) || got.Scheme != want.Scheme || got.Authority != want.Authority ||
		got.RequestID != want.RequestID || got.Route != want.Route || got.Cluster != want.Cluster || got.Source != want.Source ||
		got.SPIFFEID != want.SPIFFEID || got.TraceID != want.TraceID || got.SpanID != want.SpanID {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
}

// TestConnect: CONNECT has no :path and no :scheme, which is no fault.
func TestConnect(t *testing.T) {
	a := &admitter{}
	h := serve(t, Config{Admitter: a})
	st, err := h.client.Process(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Send(&extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_RequestHeaders{
		RequestHeaders: &extprocv3.HttpHeaders{Headers: headerMap(":method", "CONNECT", ":authority", "db:5432")},
	}}); err != nil {
		t.Fatal(err)
	}
	p, err := st.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := show(p), "headers"+receipt; got != want {
		t.Errorf("answered %q, want %q", got, want)
	}
	if got := a.log(); !slices.Equal(got, []string{"admit CONNECT"}) {
		t.Errorf("asked %q", got)
	}
}

// TestClientLeavesWhileParked: Envoy resets the stream, the Admitter's context ends, and the decision that nobody hears any
// more gets its outcome from us: no access log entry will carry its id.
func TestClientLeavesWhileParked(t *testing.T) {
	parked := make(chan struct{})
	for name, d := range map[string]policy.Decision{
		"the admitter gives up":               {ID: testID, Class: policy.W1, Reason: policy.ReasonClientGone, Status: 499},
		"the admitter admits all the same":    pass,
		"the admitter could record nothing":   {Reason: policy.ReasonClientGone},
		"the admitter returns nothing at all": {},
	} {
		t.Run(name, func(t *testing.T) {
			a := &admitter{admit: func(ctx context.Context, _ *policy.Request) policy.Decision {
				parked <- struct{}{}
				<-ctx.Done()
				return d
			}}
			h := serve(t, Config{Admitter: a})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			st, err := h.client.Process(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if err := st.Send(request(none, true)); err != nil {
				t.Fatal(err)
			}
			<-parked
			cancel()
			if err := <-h.ended; err == nil {
				t.Error("call ended clean")
			}
			want := []string{"admit POST /x"}
			if d.ID != "" {
				want = append(want, "finish "+testID+" aborted 0/0 answer_not_delivered final=true")
			}
			if got := a.log(); !slices.Equal(got, want) {
				t.Errorf("asked %q, want %q", got, want)
			}
			if ev := h.seen(); slices.Contains(ev, "undelivered") != (d.ID != "") {
				t.Errorf("counted %v", ev)
			}
		})
	}
}

// rawClient sends frames that are no messages.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }
func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*[]byte))}, nil
}
func (rawCodec) Unmarshal(d mem.BufferSlice, v any) error { *v.(*[]byte) = d.Materialize(); return nil }

func TestMalformedFrame(t *testing.T) {
	a := &admitter{}
	h := serve(t, Config{Admitter: a})
	st, err := h.conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true},
		"/envoy.service.ext_proc.v3.ExternalProcessor/Process", grpc.ForceCodecV2(rawCodec{}))
	if err != nil {
		t.Fatal(err)
	}
	frame := []byte{0x12, 0x05, 0xff}
	if err := st.SendMsg(&frame); err != nil {
		t.Fatal(err)
	}
	var got []byte
	if err := st.RecvMsg(&got); err != nil {
		t.Fatal(err)
	}
	var p extprocv3.ProcessingResponse
	if err := proto.Unmarshal(got, &p); err != nil {
		t.Fatal(err)
	}
	if show(&p) != "refuse 503 knhk_internal" {
		t.Errorf("answered %q", show(&p))
	}
	if calls := a.log(); len(calls) != 0 {
		t.Errorf("asked %q about a frame that does not parse", calls)
	}
}

func TestCaptureMismatch(t *testing.T) {
	h := serve(t, Config{Admitter: &admitter{}, Capture: "lean"})
	st, err := h.client.Process(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range (messages{request(none, true), response(true, "200", "via_upstream")}) {
		if err := st.Send(m); err != nil {
			t.Fatal(err)
		}
		if _, err := st.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	if got := h.seen(); !slices.Equal(got, []string{"admitted", "capture_mismatch"}) {
		t.Errorf("counted %v", got)
	}
}

// TestPlanPanics: not even the plan is known, so that Allow is not either: refused.
func TestPlanPanics(t *testing.T) {
	a := &admitter{plan: func(string) Plan { panic("as asked") }}
	h := serve(t, Config{Admitter: a})
	st, err := h.client.Process(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Send(request(none, true)); err != nil {
		t.Fatal(err)
	}
	p, err := st.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if show(p) != "refuse 503 knhk_internal" {
		t.Errorf("answered %q", show(p))
	}
}

// fakeStream is Envoy's side of a stream without a network: it gives frames, then err, and keeps the answers.
type fakeStream struct {
	grpc.ServerStream
	ctx     context.Context
	frames  [][]byte
	err     error
	sendErr error
	panics  bool // RecvMsg panics at the end
	answers [][]byte
}

func (f *fakeStream) Context() context.Context { return f.ctx }

func (f *fakeStream) RecvMsg(m any) error {
	if len(f.frames) == 0 {
		if f.panics {
			panic("as asked")
		}
		return f.err
	}
	b := f.frames[0]
	f.frames = f.frames[1:]
	return envoywire.Codec{}.Unmarshal(mem.BufferSlice{mem.SliceBuffer(b)}, m)
}

func (f *fakeStream) SendMsg(m any) error {
	if f.sendErr != nil {
		return f.sendErr
	}
	b, err := envoywire.Codec{}.Marshal(m)
	f.answers = append(f.answers, b.Materialize())
	return err
}

// TestNeverEndsClean: Envoy lets a request pass when the call ends with OK before it was answered.
func TestNeverEndsClean(t *testing.T) {
	s, err := New(Config{Admitter: &admitter{}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	frame, err := proto.Marshal(request(none, true))
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]*fakeStream{
		"end of stream":           {err: io.EOF},
		"reset":                   {err: status.Error(codes.Canceled, "reset")},
		"too large a message":     {err: status.Error(codes.ResourceExhausted, "too large")},
		"an error of no kind":     {err: errors.New("?")},
		"answer cannot be sent":   {frames: [][]byte{frame}, sendErr: io.ErrClosedPipe, err: io.EOF},
		"panic in the transport":  {panics: true},
		"answered, then the end":  {frames: [][]byte{frame}, err: io.EOF},
		"answered, then a reset":  {frames: [][]byte{frame}, err: status.Error(codes.Canceled, "reset")},
		"answered, then an error": {frames: [][]byte{frame}, err: errors.New("?")},
	} {
		t.Run(name, func(t *testing.T) {
			f.ctx = t.Context()
			if f.err == nil && !f.panics {
				f.err = io.EOF
			}
			if err := s.process(f); status.Code(err) == codes.OK {
				t.Errorf("call ended with %v", err)
			}
		})
	}
}

// TestTalksTooMuch: a stream has a bounded number of messages, whatever they are.
func TestTalksTooMuch(t *testing.T) {
	s, err := New(Config{Admitter: &admitter{}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeStream{ctx: t.Context(), frames: make([][]byte, 10*maxMessages), err: io.EOF}
	if err := s.process(f); status.Code(err) != codes.ResourceExhausted || len(f.answers) != maxMessages {
		t.Errorf("call ended with %v after %d answers", err, len(f.answers))
	}
}

// TestPanicOwesARecord: a request that waited for its body when the stream broke in our hands is still accounted for.
func TestPanicOwesARecord(t *testing.T) {
	frame, err := proto.Marshal(request(buffered, false, "content-length", "3"))
	if err != nil {
		t.Fatal(err)
	}
	a := &admitter{plan: func(string) Plan { return classified }}
	s, err := New(Config{Admitter: a, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.process(&fakeStream{ctx: t.Context(), frames: [][]byte{frame}, panics: true}); status.Code(err) != codes.Internal {
		t.Errorf("call ended with %v, want Internal", err)
	}
	if got := a.log(); !slices.Equal(got, []string{"abandon POST /x"}) {
		t.Errorf("asked %q", got)
	}
}

// TestAnyStream sends random messages, broken ones included, to Admitters that do anything they can, and holds the service
// to its promises: one answer per message, no clean end, and no answer that lets a request go on without a decision for it.
func TestAnyStream(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	var frames [][]byte
	for _, c := range append(append(slices.Clone(leanShapes), bodyShapes...), fullShapes...) {
		for _, m := range c.send {
			b, err := proto.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			frames = append(frames, b)
		}
	}
	frames = append(frames, []byte{0xff}, nil)
	decisions := []policy.Decision{pass, noCredit, {}, {Excluded: true}, {Gap: true, Reason: policy.ReasonLogFull}, {Verdict: policy.Admit}}
	for range 5_000 {
		var plan Plan
		if rng.IntN(2) == 0 {
			plan = classified
		}
		plan.Allow = rng.IntN(8) == 0
		plan.Exclude = rng.IntN(8) == 0
		passed := plan.Exclude
		a := &admitter{plan: func(string) Plan {
			if rng.IntN(20) == 0 {
				panic("plan")
			}
			return plan
		}, admit: func(context.Context, *policy.Request) policy.Decision {
			d := decisions[rng.IntN(len(decisions))]
			if rng.IntN(5) == 0 {
				passed = passed || plan.Allow
				panic("admit")
			}
			passed = passed || d.Passes() && (d.ID != "" || d.Excluded || d.Gap)
			return d
		}}
		s, err := New(Config{Admitter: a, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		f := &fakeStream{ctx: t.Context(), err: io.EOF}
		for range rng.IntN(5) {
			f.frames = append(f.frames, frames[rng.IntN(len(frames))])
		}
		sent := slices.Clone(f.frames)
		if err := s.process(f); status.Code(err) == codes.OK {
			t.Fatalf("call ended with %v after %x", err, sent)
		}
		if len(f.answers) != len(sent) {
			t.Fatalf("%d answers to %d messages %x", len(f.answers), len(sent), sent)
		}
		waiting := false // headers were let through to wait for the body
		for i, b := range f.answers {
			var p extprocv3.ProcessingResponse
			if err := proto.Unmarshal(b, &p); err != nil {
				t.Fatal(err)
			}
			got := show(&p)
			switch {
			case strings.HasPrefix(got, "refuse"), strings.HasPrefix(got, "response-"):
			case passed:
			case got == "headers" && plan.ClassifyBody && !waiting:
				waiting = true
			default:
				t.Fatalf("message %d of %x answered %q without a decision that passes", i, sent, got)
			}
		}
	}
}

func TestEvents(t *testing.T) {
	names := map[string]bool{}
	for e := range numEvents {
		if e.String() == "" || e.String() == "unknown" || names[e.String()] {
			t.Errorf("event %d has the name %q", e, e)
		}
		names[e.String()] = true
	}
	if numEvents.String() != "unknown" {
		t.Error("an event that does not exist has a name")
	}
}

// BenchmarkStream is one lean stream without gRPC, which costs a good ten microseconds more.
func BenchmarkStream(b *testing.B) {
	s, err := New(Config{Admitter: quick{}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	frame, err := proto.Marshal(requestMessage())
	if err != nil {
		b.Fatal(err)
	}
	end := status.Error(codes.Canceled, "reset")
	f := &benchStream{ctx: metadata.NewIncomingContext(b.Context(), metadata.MD{}), frame: mem.BufferSlice{mem.SliceBuffer(frame)}, err: end}
	b.ReportAllocs()
	for b.Loop() {
		f.sent = false
		if err := s.process(f); err == nil {
			b.Fatal("clean end")
		}
	}
}

// BenchmarkGRPC is one lean stream over an in-memory connection, with a stock client, whose cost is in it.
func BenchmarkGRPC(b *testing.B) {
	h := serve(b, Config{Admitter: quick{}})
	m := requestMessage()
	b.ReportAllocs()
	for b.Loop() {
		ctx, cancel := context.WithCancel(b.Context())
		st, err := h.client.Process(ctx)
		if err != nil {
			b.Fatal(err)
		}
		if err := st.Send(m); err != nil {
			b.Fatal(err)
		}
		if _, err := st.Recv(); err != nil {
			b.Fatal(err)
		}
		cancel()
		<-h.ended
	}
}

// quick admits everything.
type quick struct{}

func (quick) Plan(string) Plan                                       { return Plan{} }
func (quick) Admit(context.Context, *policy.Request) policy.Decision { return pass }
func (quick) Abandon(*policy.Request)                                {}
func (quick) Finish(string, policy.Outcome, bool)                    {}

// benchStream is a fakeStream that gives the same frame once per round and throws the answer away.
type benchStream struct {
	grpc.ServerStream
	ctx   context.Context
	frame mem.BufferSlice
	err   error
	sent  bool
}

func (f *benchStream) Context() context.Context { return f.ctx }

func (f *benchStream) RecvMsg(m any) error {
	if f.sent {
		return f.err
	}
	f.sent = true
	return envoywire.Codec{}.Unmarshal(f.frame, m)
}

func (f *benchStream) SendMsg(m any) error {
	_, err := envoywire.Codec{}.Marshal(m)
	return err
}
