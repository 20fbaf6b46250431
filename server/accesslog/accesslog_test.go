package accesslog

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/server/envoywire"
)

// sink writes down what it hears. It panics on receipts that say so, and holds others up until they are let go.
type sink struct {
	heard chan string
	hold  chan struct{}
}

func newSink() *sink { return &sink{heard: make(chan string, 64), hold: make(chan struct{})} }

func (s *sink) Finish(id string, o policy.Outcome, final bool) {
	switch id {
	case "panic":
		panic("as asked")
	case "hold":
		s.heard <- "holding"
		<-s.hold
	}
	s.heard <- fmt.Sprintf("finish %s %s %d final=%v", id, o.Result, o.Status, final)
}

func (s *sink) Unreceipted(e Entry) {
	s.heard <- fmt.Sprintf("unreceipted %s route=%s reached=%v gap=%s %s", e.Node, e.Route, e.Reached, e.Gap, e.Outcome.Details)
}

func (s *sink) LogStream(node string, ev StreamEvent) {
	if node == "panic" {
		panic("as asked")
	}
	s.heard <- fmt.Sprintf("%s %s", node, ev)
}

func (s *sink) want(t *testing.T, lines ...string) {
	t.Helper()
	for _, want := range lines {
		if got := <-s.heard; got != want {
			t.Errorf("heard %q, want %q", got, want)
		}
	}
}

type harness struct {
	srv    *Server
	client alsv3.AccessLogServiceClient

	mu     sync.Mutex
	events []string
}

func serve(t *testing.T, s Sink) *harness {
	t.Helper()
	h := &harness{}
	var err error
	h.srv, err = New(Config{Sink: s, Log: slog.New(slog.DiscardHandler), Count: func(e Event) {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.events = append(h.events, e.String())
	}})
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(grpc.ForceServerCodecV2(envoywire.Codec{}))
	h.srv.Register(srv)
	l := bufconn.Listen(1 << 20)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:///b", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		srv.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	h.client = alsv3.NewAccessLogServiceClient(conn)
	return h
}

func (h *harness) counted() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.events)
}

func (h *harness) open(
	t *testing.T, ctx context.Context, send ...*alsv3.StreamAccessLogsMessage,
) alsv3.AccessLogService_StreamAccessLogsClient {
	t.Helper()
	st, err := h.client.StreamAccessLogs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range send {
		if err := st.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	return st
}

func withID(id string) *datav3.HTTPAccessLogEntry {
	e := logEntry()
	e.CommonProperties.Metadata.FilterMetadata[Namespace].Fields[keyReceipt] = structpb.NewStringValue(id)
	return e
}

func without() *datav3.HTTPAccessLogEntry {
	e := logEntry()
	e.CommonProperties.Metadata = nil
	return e
}

func TestStream(t *testing.T) {
	s := newSink()
	h := serve(t, s)
	local := without()
	local.CommonProperties.UpstreamRemoteAddress, local.CommonProperties.RouteName = nil, ""
	local.Response.ResponseCodeDetails = "missing_host_header"
	gap := without()
	gap.CommonProperties.Metadata = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
		Namespace: {Fields: map[string]*structpb.Value{keyGap: structpb.NewStringValue("log_full")}},
	}}
	running := logEntry()
	running.CommonProperties.AccessLogType = datav3.AccessLogType_DownstreamPeriodic
	old := logEntry()
	old.CommonProperties.IntermediateLogEntry = true // deprecated, but older Envoys send it
	attempt := logEntry()
	attempt.CommonProperties.AccessLogType = datav3.AccessLogType_UpstreamEnd
	both := logEntry()
	both.CommonProperties.Metadata.FilterMetadata[NamespaceAuthz] = both.CommonProperties.Metadata.FilterMetadata[Namespace]
	twice := withID("c")
	twice.CommonProperties.Metadata.FilterMetadata[NamespaceAuthz] = logEntry().CommonProperties.Metadata.FilterMetadata[Namespace]
	begun := tcpEntry()
	begun.CommonProperties.AccessLogType = datav3.AccessLogType_TcpUpstreamConnected
	denied := &datav3.AccessLogCommon{ResponseFlags: &datav3.ResponseFlags{UnauthorizedDetails: &datav3.ResponseFlags_Unauthorized{}}}
	st := h.open(t, t.Context(),
		identified(httpLogs(logEntry(), running, old, attempt, withID("panic"), withID("b")), "n1"),
		&alsv3.StreamAccessLogsMessage{LogEntries: &alsv3.StreamAccessLogsMessage_TcpLogs{
			TcpLogs: &alsv3.StreamAccessLogsMessage_TCPAccessLogEntries{LogEntry: []*datav3.TCPAccessLogEntry{tcpEntry(), begun, {}, {CommonProperties: denied}}},
		}},
		httpLogs(local, without(), gap), httpLogs(both, twice))
	s.want(t, "n1 opened", "finish "+testID+" complete 200 final=true", "finish b complete 200 final=true",
		"finish "+testID+" complete 0 final=true", "unreceipted n1 route= reached=false gap= ", "unreceipted n1 route= reached=false gap= ",
		"unreceipted n1 route= reached=false gap= missing_host_header", "unreceipted n1 route=cart reached=true gap= via_upstream",
		"unreceipted n1 route=cart reached=true gap=log_full via_upstream",
		// The same id in two namespaces is one transaction; two ids are two decisions about it.
		"finish "+testID+" complete 200 final=true", "finish "+testID+" complete 200 final=true", "finish c complete 200 final=true")
	if _, err := st.CloseAndRecv(); err != nil {
		t.Errorf("a stream that Envoy closes: %v", err)
	}
	s.want(t, "n1 ended")
	want := []string{"receipted", "intermediate", "intermediate", "intermediate", "receipted", "panic", "receipted",
		"receipted", "intermediate", "unreceipted", "unreceipted", "unreceipted", "unreceipted", "unreceipted", "receipted", "receipted", "receipted"}
	if got := h.counted(); !slices.Equal(got, want) {
		t.Errorf("counted %v, want %v", got, want)
	}
}

// TestStreamEnds: however a stream ends, it is told once; one that never said who it is is not.
func TestStreamEnds(t *testing.T) {
	t.Run("reset", func(t *testing.T) {
		s := newSink()
		h := serve(t, s)
		ctx, cancel := context.WithCancel(t.Context())
		h.open(t, ctx, identified(httpLogs(), "n1"))
		s.want(t, "n1 opened")
		cancel()
		s.want(t, "n1 ended")
	})
	t.Run("a second identifier changes nothing", func(t *testing.T) {
		s := newSink()
		h := serve(t, s)
		st := h.open(t, t.Context(), identified(httpLogs(), "n1"), identified(httpLogs(logEntry()), "n2"))
		s.want(t, "n1 opened", "finish "+testID+" complete 200 final=true")
		if _, err := st.CloseAndRecv(); err != nil {
			t.Error(err)
		}
		s.want(t, "n1 ended")
	})
	t.Run("unidentified", func(t *testing.T) {
		s := newSink()
		h := serve(t, s)
		st := h.open(t, t.Context(), httpLogs(without()))
		s.want(t, "unreceipted  route=cart reached=true gap= via_upstream")
		if _, err := st.CloseAndRecv(); err != nil {
			t.Error(err)
		}
		if len(s.heard) != 0 {
			t.Errorf("heard %q", <-s.heard)
		}
	})
	t.Run("the sink panics over it", func(t *testing.T) {
		s := newSink()
		h := serve(t, s)
		st := h.open(t, t.Context(), identified(httpLogs(logEntry()), "panic"))
		s.want(t, "finish "+testID+" complete 200 final=true")
		if _, err := st.CloseAndRecv(); err != nil {
			t.Error(err)
		}
	})
}

// TestDrain: a message in hand is told to its end, then the stream ends with Unavailable, and so do later ones.
func TestDrain(t *testing.T) {
	s := newSink()
	h := serve(t, s)
	st := h.open(t, t.Context(), identified(httpLogs(withID("hold"), withID("b")), "n1"))
	s.want(t, "n1 opened", "holding")
	h.srv.Drain()
	h.srv.Drain()
	close(s.hold)
	s.want(t, "finish hold complete 200 final=true", "finish b complete 200 final=true", "n1 ended")
	if err := st.RecvMsg(new(alsv3.StreamAccessLogsResponse)); status.Code(err) != codes.Unavailable {
		t.Errorf("stream ended with %v, want Unavailable", err)
	}
	late := h.open(t, t.Context())
	if err := late.RecvMsg(new(alsv3.StreamAccessLogsResponse)); status.Code(err) != codes.Unavailable {
		t.Errorf("a stream begun while draining ended with %v, want Unavailable", err)
	}
}

// heldStream is Envoy's side of a stream without a network: one message, then silence until the call is over.
type heldStream struct {
	grpc.ServerStream
	ctx   context.Context
	frame mem.BufferSlice
}

func (f *heldStream) Context() context.Context { return f.ctx }

func (f *heldStream) RecvMsg(m any) error {
	if f.frame == nil {
		<-f.ctx.Done()
		return f.ctx.Err()
	}
	b := f.frame
	f.frame = nil
	return envoywire.Codec{}.Unmarshal(b, m)
}

// TestDrainWaits: a call is not over while its message is being told.
func TestDrainWaits(t *testing.T) {
	frame, err := proto.Marshal(identified(httpLogs(withID("hold")), "n1"))
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		s := newSink()
		srv, err := New(Config{Sink: s, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- srv.serve(&heldStream{ctx: ctx, frame: mem.BufferSlice{mem.SliceBuffer(frame)}}) }()
		s.want(t, "n1 opened", "holding")
		srv.Drain()
		synctest.Wait()
		if len(ended) != 0 || len(s.heard) != 0 {
			t.Error("the call ended in the middle of a message")
		}
		close(s.hold)
		s.want(t, "finish hold complete 200 final=true", "n1 ended")
		if err := <-ended; status.Code(err) != codes.Unavailable {
			t.Errorf("call ended with %v, want Unavailable", err)
		}
		cancel() // as gRPC does when a call is over: the reader ends too
		synctest.Wait()
	})
}

// silent is Envoy's side of a stream without a network, whose messages come when a test sends them.
type silent struct {
	grpc.ServerStream
	ctx    context.Context
	frames chan []byte
}

func (f *silent) Context() context.Context { return f.ctx }

func (f *silent) RecvMsg(m any) error {
	select {
	case <-f.ctx.Done():
		return f.ctx.Err()
	case b := <-f.frames:
		return envoywire.Codec{}.Unmarshal(mem.BufferSlice{mem.SliceBuffer(b)}, m)
	}
}

// TestAge: in the last quarter of its age a stream ends right after a message that was waited for, not in the middle of many; without one
// it ends with its age.
func TestAge(t *testing.T) {
	frame, err := proto.Marshal(identified(httpLogs(logEntry()), "n1"))
	if err != nil {
		t.Fatal(err)
	}
	told := "finish " + testID + " complete 200 final=true"
	for name, c := range map[string]struct {
		sent []time.Duration // when messages come
		want []string
		at   time.Duration
	}{
		"a message in the last quarter": {[]time.Duration{time.Minute, 50 * time.Minute}, []string{"n1 opened", told, told, "n1 aged"}, 50 * time.Minute},
		"none in the last quarter":      {[]time.Duration{time.Minute}, []string{"n1 opened", told, "n1 ended"}, time.Hour},
		"one that was not waited for": {
			[]time.Duration{45*time.Minute - 1, 45*time.Minute + 1, 50 * time.Minute},
			[]string{"n1 opened", told, told, told, "n1 aged"}, 50 * time.Minute,
		},
		"silence": {nil, nil, time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSink()
				srv, err := New(Config{Sink: s, Log: slog.New(slog.DiscardHandler), MaxStreamAge: time.Hour})
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithCancel(t.Context())
				st := &silent{ctx: ctx, frames: make(chan []byte, 8)}
				ended := make(chan error, 1)
				start := time.Now()
				go func() { ended <- srv.serve(st) }()
				go func() {
					for _, at := range c.sent {
						time.Sleep(at - time.Since(start))
						st.frames <- frame
					}
				}()
				if err := <-ended; status.Code(err) != codes.Unavailable || time.Since(start) != c.at {
					t.Errorf("ended after %v with %v, want %v and Unavailable", time.Since(start), err, c.at)
				}
				s.want(t, c.want...)
				cancel()
				synctest.Wait()
			})
		})
	}
	if _, err := New(Config{Sink: newSink(), Log: slog.New(slog.DiscardHandler), MaxStreamAge: -1}); err == nil {
		t.Error("a stream's age below 0 is accepted")
	}
}

func TestMalformed(t *testing.T) {
	s := newSink()
	h := serve(t, s)
	st := h.open(t, t.Context())
	// A field that cannot be an identifier, kept by the client as it is: the message does not parse here.
	bad := &alsv3.StreamAccessLogsMessage{}
	bad.ProtoReflect().SetUnknown(protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), []byte{0xff}))
	if err := st.Send(bad); err != nil {
		t.Fatal(err)
	}
	// An entry that does not parse between two that do.
	good, err := proto.Marshal(logEntry())
	if err != nil {
		t.Fatal(err)
	}
	var logs []byte
	for _, e := range [][]byte{good, {0x0a, 0x05}, good} {
		logs = protowire.AppendBytes(protowire.AppendTag(logs, 1, protowire.BytesType), e)
	}
	mixed := &alsv3.StreamAccessLogsMessage{}
	mixed.ProtoReflect().SetUnknown(protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), logs))
	if err := st.Send(mixed); err != nil {
		t.Fatal(err)
	}
	s.want(t, "finish "+testID+" complete 200 final=true", "finish "+testID+" complete 200 final=true")
	if got, want := h.counted(), []string{"malformed", "receipted", "malformed", "receipted"}; !slices.Equal(got, want) {
		t.Errorf("counted %v, want %v", got, want)
	}
}

// TestOutcome checks every field of an outcome, and its bounds.
func TestOutcome(t *testing.T) {
	read := func(e *datav3.HTTPAccessLogEntry) (string, policy.Outcome) {
		t.Helper()
		b, err := proto.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		var r record
		if err := r.scan(b); err != nil {
			t.Fatal(err)
		}
		return string(r.told[1].receipt), r.outcome(names{})
	}
	id, got := read(logEntry())
	want := policy.Outcome{
		Source: "als", Result: policy.ResultComplete, Status: 200, UpstreamStatus: 200, Flags: "URX", Details: "via_upstream",
		Cluster: "cart-v2", UpstreamHost: "10.1.1.1:8080", Attempts: 2, BytesIn: 3, BytesOut: 5, Duration: 1500 * time.Microsecond,
		CacheStatus: "c; hit",
	}
	if id != testID || got != want {
		t.Errorf("got %s %+v\nwant %s %+v", id, got, testID, want)
	}
	// A response whose last byte was never sent: so an HTTP/3 client that leaves looks, before the response too.
	e := logEntry()
	e.CommonProperties.TimeToLastDownstreamTxByte, e.CommonProperties.ResponseFlags = nil, nil
	if _, got = read(e); got.Result != policy.ResultAborted || got.Duration != 1600*time.Microsecond {
		t.Errorf("without an end: %+v", got)
	}
	e.Response.ResponseCodeDetails = ""
	if _, got = read(e); got.Result != policy.ResultAborted {
		t.Errorf("without a response: %+v", got)
	}
	// Where details or flags say how it ended, they are right; an Envoy that tells no times tells nothing by leaving them out.
	e.CommonProperties.ResponseFlags = &datav3.ResponseFlags{DownstreamConnectionTermination: true}
	if _, got = read(e); got.Result != policy.ResultClientAbort {
		t.Errorf("with a flag: %+v", got)
	}
	e.CommonProperties.ResponseFlags, e.CommonProperties.Duration = nil, nil
	if _, got = read(e); got.Result != policy.ResultUnknown {
		t.Errorf("without times: %+v", got)
	}
	e = logEntry()
	e.Response.ResponseCodeDetails = strings.Repeat("d", 127) + "é"
	e.Response.ResponseHeaders["cache-status"] = strings.Repeat("é", 200)
	e.CommonProperties.TimeToLastDownstreamTxByte = &durationpb.Duration{Seconds: -1}
	e.CommonProperties.UpstreamRemoteAddress = &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: "fd00::1", PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 80},
	}}}
	_, got = read(e)
	if len(got.Details) != 127 || len(got.CacheStatus) != 256 || got.Duration != 0 || got.UpstreamHost != "[fd00::1]:80" {
		t.Errorf("bounds: details %d bytes, cache status %d, duration %v, host %q",
			len(got.Details), len(got.CacheStatus), got.Duration, got.UpstreamHost)
	}
	e.CommonProperties.UpstreamRemoteAddress = &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: "/run/up.sock"}}}
	if _, got = read(e); got.UpstreamHost != "/run/up.sock" {
		t.Errorf("host of a pipe: %q", got.UpstreamHost)
	}
}

func TestDuration(t *testing.T) {
	for _, c := range []struct {
		in   duration
		want time.Duration
	}{
		{duration{}, 0}, {duration{1, 5}, time.Second + 5}, {duration{0, 999_999_999}, 999_999_999}, {duration{-1, 0}, 0}, {duration{0, -1}, 0},
		{duration{0, 1_000_000_000}, 0}, {duration{1 << 40, 0}, 0},
	} {
		if got := c.in.Duration(); got != c.want {
			t.Errorf("%+v is %v, want %v", c.in, got, c.want)
		}
	}
}

func TestNewChecks(t *testing.T) {
	for name, cfg := range map[string]Config{
		"no sink": {Log: slog.New(slog.DiscardHandler)}, "no logger": {Sink: newSink()},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: New accepts it", name)
		}
	}
	seen := map[string]bool{}
	for e := range numEvents {
		if e.String() == "unknown" || seen[e.String()] {
			t.Errorf("event %d has the name %q", e, e)
		}
		seen[e.String()] = true
	}
}

// TestNamesAreBounded: names that clients make up do not stay.
func TestNamesAreBounded(t *testing.T) {
	n := names{}
	for i := range 10 * maxNames {
		if s := fmt.Sprint(i); n.of([]byte(s)) != s {
			t.Fatalf("%s became another name", s)
		}
	}
	if len(n) > maxNames {
		t.Errorf("%d names kept, at most %d may be", len(n), maxNames)
	}
}
