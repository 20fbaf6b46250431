package extproc

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	filterv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/server/envoywire"
)

// admitter is an Admitter that does as it is told and writes down what it was asked.
type admitter struct {
	plan  func(route string) Plan
	admit func(ctx context.Context, req *policy.Request) policy.Decision

	mu    sync.Mutex
	calls []string
}

func (a *admitter) note(format string, args ...any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.calls = append(a.calls, strings.TrimSpace(fmt.Sprintf(format, args...)))
}

func (a *admitter) log() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.calls)
}

func describe(r *policy.Request) string {
	s := r.Method + " " + r.Path
	if r.HasBody {
		s += fmt.Sprintf(" body=%q", r.Body)
	}
	if r.BodyLarge {
		s += " large"
	}
	if r.BodyMissing {
		s += " missing"
	}
	return s
}

func (a *admitter) Plan(route string) Plan {
	if a.plan == nil {
		return Plan{}
	}
	return a.plan(route)
}

func (a *admitter) Admit(ctx context.Context, req *policy.Request) policy.Decision {
	a.note("admit %s", describe(req))
	if a.admit == nil {
		return pass
	}
	return a.admit(ctx, req)
}

func (a *admitter) Abandon(req *policy.Request) { a.note("abandon %s", describe(req)) }

func (a *admitter) Finish(id string, o policy.Outcome, final bool) {
	a.note("finish %s %s %d/%d %s final=%v", id, o.Result, o.Status, o.UpstreamStatus, o.Details, final)
}

// Decisions that the tests have made.
var (
	pass     = policy.Decision{ID: testID, Class: policy.W1, Verdict: policy.Admit, Reason: policy.ReasonOK}
	noCredit = policy.Decision{
		ID: testID, Class: policy.W1, Reason: policy.ReasonNoCredit, Status: 429, RetryAfter: 1500 * time.Millisecond,
	}
)

func always(d policy.Decision) func(context.Context, *policy.Request) policy.Decision {
	return func(context.Context, *policy.Request) policy.Decision { return d }
}

// harness is the service on a real gRPC server, and a stock client.
type harness struct {
	client extprocv3.ExternalProcessorClient
	conn   *grpc.ClientConn
	ended  chan error // what each call of Process returned

	mu     sync.Mutex
	events []string
}

func (h *harness) seen() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.events)
}

func serve(t testing.TB, cfg Config) *harness {
	t.Helper()
	h := &harness{ended: make(chan error, 16)}
	cfg.Log = slog.New(slog.DiscardHandler)
	cfg.Count = func(e Event) {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.events = append(h.events, e.String())
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(grpc.ForceServerCodecV2(envoywire.Codec{}),
		grpc.StreamInterceptor(func(x any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			err := next(x, ss)
			h.ended <- err
			return err
		}))
	s.Register(srv)
	l := bufconn.Listen(1 << 20)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	h.conn, err = grpc.NewClient("passthrough:///bufconn", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.conn.Close(); err != nil {
			t.Error(err)
		}
		srv.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	h.client = extprocv3.NewExternalProcessorClient(h.conn)
	return h
}

// Messages as Envoy sends them.

func headerMap(kv ...string) *corev3.HeaderMap {
	m := &corev3.HeaderMap{}
	for i := 0; i < len(kv); i += 2 {
		m.Headers = append(m.Headers, &corev3.HeaderValue{Key: kv[i], RawValue: []byte(kv[i+1])})
	}
	return m
}

func attrs(kv ...string) map[string]*structpb.Struct {
	f := map[string]*structpb.Value{}
	for i := 0; i < len(kv); i += 2 {
		f[kv[i]] = structpb.NewStringValue(kv[i+1])
	}
	return map[string]*structpb.Struct{attributesKey: {Fields: f}}
}

func request(mode filterv3.ProcessingMode_BodySendMode, end bool, kv ...string) *extprocv3.ProcessingRequest {
	return &extprocv3.ProcessingRequest{
		Request: &extprocv3.ProcessingRequest_RequestHeaders{RequestHeaders: &extprocv3.HttpHeaders{
			Headers: headerMap(append([]string{":method", "POST", ":path", "/x"}, kv...)...), EndOfStream: end,
		}},
		Attributes:     attrs("xds.route_name", "r"),
		ProtocolConfig: &extprocv3.ProtocolConfiguration{RequestBodyMode: mode},
	}
}

func body(b string, end bool) *extprocv3.ProcessingRequest {
	return &extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_RequestBody{
		RequestBody: &extprocv3.HttpBody{Body: []byte(b), EndOfStream: end},
	}}
}

func requestTrailers() *extprocv3.ProcessingRequest {
	return &extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_RequestTrailers{
		RequestTrailers: &extprocv3.HttpTrailers{Trailers: headerMap("x-t", "1")},
	}}
}

func response(end bool, code, details string) *extprocv3.ProcessingRequest {
	return &extprocv3.ProcessingRequest{
		Request: &extprocv3.ProcessingRequest_ResponseHeaders{ResponseHeaders: &extprocv3.HttpHeaders{
			Headers: headerMap(":status", code), EndOfStream: end,
		}},
		Attributes: attrs("response.code_details", details, "upstream.address", "10.0.0.1:80"),
	}
}

func responseTrailers() *extprocv3.ProcessingRequest {
	return &extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_ResponseTrailers{
		ResponseTrailers: &extprocv3.HttpTrailers{Trailers: headerMap("grpc-status", "0")},
	}}
}

// show says in a word or two what a reply does.
func show(p *extprocv3.ProcessingResponse) string {
	s := "nothing"
	switch r := p.GetResponse().(type) {
	case *extprocv3.ProcessingResponse_RequestHeaders:
		s = "headers"
	case *extprocv3.ProcessingResponse_RequestBody:
		s = "body"
	case *extprocv3.ProcessingResponse_RequestTrailers:
		s = "trailers"
	case *extprocv3.ProcessingResponse_ResponseHeaders:
		s = "response-headers"
	case *extprocv3.ProcessingResponse_ResponseTrailers:
		s = "response-trailers"
	case *extprocv3.ProcessingResponse_ImmediateResponse:
		s = fmt.Sprintf("refuse %d %s", r.ImmediateResponse.GetStatus().GetCode(), r.ImmediateResponse.GetDetails())
	}
	meta := p.GetDynamicMetadata().GetFields()[Namespace].GetStructValue().GetFields()
	for _, k := range []string{KeyReceipt, KeyClass, KeyGap} {
		if v, ok := meta[k]; ok {
			s += " " + k + "=" + v.GetStringValue()
		}
	}
	return s
}

// How Envoy ends a stream.
const (
	byReset     = iota // normal
	byHalfClose        // client, upstream or timeout broke it off
)

const (
	none     = filterv3.ProcessingMode_NONE
	streamed = filterv3.ProcessingMode_STREAMED
	buffered = filterv3.ProcessingMode_BUFFERED
	partial  = filterv3.ProcessingMode_BUFFERED_PARTIAL
)

const receipt = " receipt=" + testID + " class=W1"

// shape is one stream: messages and answers in turn, and what must have been asked and counted at its end.
type shape struct {
	name   string
	plan   Plan
	admit  func(context.Context, *policy.Request) policy.Decision
	send   []*extprocv3.ProcessingRequest
	want   []string
	end    int
	calls  []string
	events []string
}

func TestStreams(t *testing.T) {
	for _, c := range append(append(leanShapes, bodyShapes...), fullShapes...) {
		t.Run(c.name, func(t *testing.T) { runShape(t, c) })
	}
}

func runShape(t *testing.T, c shape) {
	a := &admitter{plan: func(string) Plan { return c.plan }, admit: c.admit}
	h := serve(t, Config{Admitter: a, Capture: "full"})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	st, err := h.client.Process(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for i, m := range c.send {
		if err := st.Send(m); err != nil {
			t.Fatal(err)
		}
		p, err := st.Recv()
		if err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
		if got := show(p); got != c.want[i] {
			t.Errorf("message %d: answered %q, want %q", i, got, c.want[i])
		}
	}
	if c.end == byReset {
		if len(c.send) == 0 { // or the server never hears of the stream
			if err := st.Send(response(true, "400", "")); err != nil {
				t.Fatal(err)
			}
			if _, err := st.Recv(); err != nil {
				t.Fatal(err)
			}
		}
		cancel()
	} else if err := st.CloseSend(); err != nil {
		t.Fatal(err)
	}
	err = <-h.ended
	if status.Code(err) != codes.Canceled {
		t.Errorf("call ended with %v, want Canceled", err)
	}
	if c.end == byHalfClose { // Envoy would take a clean end for leave to go on
		if _, err := st.Recv(); status.Code(err) != codes.Canceled {
			t.Errorf("client saw the call end with %v, want Canceled", err)
		}
	}
	if got := a.log(); !slices.Equal(got, c.calls) {
		t.Errorf("asked\n %s\nwant\n %s", strings.Join(got, "\n "), strings.Join(c.calls, "\n "))
	}
	if got := h.seen(); !slices.Equal(got, c.events) {
		t.Errorf("counted %v, want %v", got, c.events)
	}
}
