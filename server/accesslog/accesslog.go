// Package accesslog is Envoy's gRPC access log service (ALS): it reads what became of every request and tells a Sink.
//
// It is where the outcomes of lean capture come from, and the audit of completeness: entries without a receipt id are told
// too, so that requests which reached an upstream undecided are seen. Promises: every complete HTTP entry of a message that
// arrived, and every TCP entry, is told exactly once, in order per stream; an entry that does not parse, or whose Sink panics, is counted and does
// not cost its neighbours. Not promised: that Envoy sends everything. It drops entries when its buffers are full and takes
// the last flush interval's along when it dies; the end of a stream is therefore told as well. Entries about transactions and
// connections still running are passed over.
//
// server.New wires it; server/admit is its Sink. The gRPC server must use envoywire.Codec.
package accesslog

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/server/envoywire"
)

// The dynamic metadata namespaces in which Envoy keeps the receipt id, by the filter that asked.
const (
	Namespace          = "knhk"                            // server/extproc
	NamespaceAuthz     = "envoy.filters.http.ext_authz"    // server/extauthz
	NamespaceAuthzConn = "envoy.filters.network.ext_authz" // server/extauthz, TCP
)

// Keys in each namespace; see server/extproc.
const (
	keyReceipt = "receipt"
	keyGap     = "gap"
)

// StreamEvent is the begin or end of an access log stream.
type StreamEvent uint8

// The stream events.
const (
	StreamOpened StreamEvent = iota // an Envoy worker has connected and said who it is
	StreamEnded                     // its stream is gone: Envoy ended, reconnects, or we drain
	StreamAged                      // it was ended here because of its age, right after a message: Envoy opens another with the next entry
)

// String is the event's name.
func (e StreamEvent) String() string {
	switch e {
	case StreamOpened:
		return "opened"
	case StreamAged:
		return "aged"
	}
	return "ended"
}

// Sink hears of outcomes. Its methods are called from one goroutine per stream, and hold that stream up while they run.
type Sink interface {
	// Finish reports the outcome of the transaction with receipt id. final is always true: nobody knows better.
	Finish(id string, o policy.Outcome, final bool)
	// Unreceipted reports a transaction without a receipt id.
	Unreceipted(e Entry)
	// LogStream reports the begin and the end of the access log stream of an Envoy worker. node is the id that Envoy
	// claims, unauthenticated; an Envoy has one stream per worker thread.
	LogStream(node string, ev StreamEvent)
}

// Entry is a transaction that has no receipt id: refused by Envoy before we were asked, on a route that is excluded,
// answered by us without being able to record, or a gap. Strings are the client's or Envoy's word; of a TCP connection only Node, Gap,
// Reached and Outcome are known.
type Entry struct {
	Node      string // node id of the Envoy
	Route     string // name of the route; empty when none matched
	Gap       string // reason why we let it pass without a receipt (on_receipt_failure: allow); empty if we did not
	Reached   bool   // an upstream host was chosen: if neither excluded nor a Gap, it went on undecided
	Method    string
	Authority string
	Path      string // at most 256 bytes
	RequestID string // x-request-id
	Outcome   policy.Outcome
}

// Event is something worth counting.
type Event uint8

// The events. Their names are values of a metric label.
const (
	EventReceipted    Event = iota // an entry with a receipt id
	EventUnreceipted               // an entry without
	EventIntermediate              // an entry about a transaction that still runs, passed over
	EventMalformed                 // a message or an entry that does not parse
	EventPanic                     // a panic of the Sink
	numEvents
)

var eventNames = [numEvents]string{"receipted", "unreceipted", "intermediate", "malformed", "panic"}

// String is the event's name as it stands in metrics.
func (e Event) String() string {
	if e < numEvents {
		return eventNames[e]
	}
	return "unknown"
}

// Config is what New needs.
type Config struct {
	// Sink hears of outcomes. Required.
	Sink Sink
	// MaxStreamAge ends a stream: in the last quarter of it at the first good moment, right after a message that was waited for, so
	// that none is on its way; when it is over in any case. Envoy goes on with a new stream, on a new connection if the old one has been told
	// to go away. 0: never.
	MaxStreamAge time.Duration
	// Log gets faults. Required.
	Log *slog.Logger
	// Count is called for everything worth counting. It must be quick and safe for concurrent use. Optional.
	Count func(Event)
}

// Server is the service. Its methods are safe for concurrent use.
type Server struct {
	sink      Sink
	log       *slog.Logger
	count     func(Event)
	age       time.Duration
	malformed atomic.Bool // complained of
	drain     chan struct{}
	drainOnce sync.Once
}

// New checks cfg and makes a Server. It starts nothing.
func New(cfg Config) (*Server, error) {
	switch {
	case cfg.Sink == nil:
		return nil, errors.New("new access log server: no sink")
	case cfg.Log == nil:
		return nil, errors.New("new access log server: no logger")
	case cfg.MaxStreamAge < 0:
		return nil, errors.New("new access log server: a stream's age below 0")
	}
	s := &Server{age: cfg.MaxStreamAge, sink: cfg.Sink, log: cfg.Log, count: cfg.Count, drain: make(chan struct{})}
	if s.count == nil {
		s.count = func(Event) {}
	}
	return s, nil
}

// ServiceDesc is the descriptor of envoy.service.accesslog.v3.AccessLogService over raw frames.
var ServiceDesc = grpc.ServiceDesc{
	ServiceName: "envoy.service.accesslog.v3.AccessLogService",
	HandlerType: (*any)(nil),
	Streams: []grpc.StreamDesc{{
		StreamName:    "StreamAccessLogs",
		Handler:       func(srv any, ss grpc.ServerStream) error { return srv.(*Server).serve(ss) },
		ClientStreams: true,
	}},
	Metadata: "envoy/service/accesslog/v3/als.proto",
}

// Register adds the service to a gRPC server that uses envoywire.Codec.
func (s *Server) Register(r grpc.ServiceRegistrar) { r.RegisterService(&ServiceDesc, s) }

// Drain ends the streams, now and from now on, with Unavailable: Envoy never ends them itself, so that a graceful stop of the
// gRPC server would wait for ever. A message that is being told is told to its end; what Envoy sends after, it keeps and
// sends to the server it finds next. Call it when the ext_proc streams are over and an access log flush interval has passed.
// It does not wait.
func (s *Server) Drain() { s.drainOnce.Do(func() { close(s.drain) }) }

var (
	errDraining = status.Error(codes.Unavailable, "draining")
	errAged     = status.Error(codes.Unavailable, "stream has reached its age")
)

// quiet is how long a message must have been waited for to say that Envoy had nothing more to send: its next one comes a flush interval or
// a full buffer later.
const quiet = 2 * time.Millisecond

// serve serves one stream: one goroutine reads, this one waits for it or for Drain.
func (s *Server) serve(ss grpc.ServerStream) error {
	done := make(chan error, 1)
	st := &stream{srv: s, idle: make(chan struct{}, 1), names: names{}}
	st.idle <- struct{}{}
	var over <-chan time.Time
	if s.age > 0 {
		st.aging = time.Now().Add(s.age - s.age/4)
		t := time.NewTimer(s.age)
		defer t.Stop()
		over = t.C
	}
	go func() { done <- st.read(ss) }()
	why := errDraining
	select {
	case err := <-done:
		return err
	case <-over:
		why = errAged
	case <-s.drain:
	}
	select {
	case <-st.idle: // a message the reader is in the middle of is told first
		st.end(StreamEnded)
		return why
	case err := <-done:
		return err
	}
}

// stream is one call of StreamAccessLogs.
type stream struct {
	srv    *Server
	idle   chan struct{} // a token: held while a message is told, or for good once the stream has ended
	in     envoywire.Frame
	batch  batch
	entry  record
	names  names
	node   string
	opened bool
	aging  time.Time // from then on the stream ends at a good moment; zero: never
}

// ack is the empty StreamAccessLogsResponse.
type ack struct{}

// EncodeFrame gives the empty message.
func (ack) EncodeFrame() []byte { return nil }

// read tells every message of the stream, until it ends.
func (st *stream) read(ss grpc.ServerStream) error {
	for {
		asked := time.Now()
		err := ss.RecvMsg(&st.in)
		waited := time.Since(asked)
		select {
		case <-st.idle:
		default: // drained
			return errDraining
		}
		if err != nil {
			st.in.Free()
			st.end(StreamEnded)
			if errors.Is(err, io.EOF) {
				return ss.SendMsg(ack{})
			}
			return err
		}
		st.message(ss.Context())
		st.in.Free()
		if !st.aging.IsZero() && waited >= quiet && time.Now().After(st.aging) {
			st.end(StreamAged) // and keeps the token
			return errAged
		}
		st.idle <- struct{}{}
	}
}

// end tells that the stream is over. The caller holds the token of st.idle.
func (st *stream) end(how StreamEvent) {
	if st.opened {
		st.guard(context.Background(), func() { st.srv.sink.LogStream(st.node, how) })
	}
}

// guard keeps a panic of the Sink from taking the process along.
func (st *stream) guard(ctx context.Context, f func()) {
	defer func() {
		if p := recover(); p != nil {
			st.srv.count(EventPanic)
			st.srv.log.ErrorContext(ctx, "recovered panic", "where", "access log sink", "panic", p, "stack", string(debug.Stack()))
		}
	}()
	f()
}

// message tells one message.
func (st *stream) message(ctx context.Context) {
	if err := st.batch.scan(st.in.Bytes()); err != nil {
		st.srv.broken(ctx, "message", err)
		return
	}
	if st.batch.identified && !st.opened {
		st.node, st.opened = string(clip(st.batch.node, maxNode)), true
		st.guard(ctx, func() { st.srv.sink.LogStream(st.node, StreamOpened) })
	}
	for _, b := range st.batch.entries {
		scan := st.entry.scan
		if st.batch.tcp {
			scan = st.entry.scanTCP
		}
		if err := scan(b); err != nil {
			st.srv.broken(ctx, "entry", err)
			continue
		}
		st.guard(ctx, st.tell)
	}
}

// broken counts what does not parse and complains of it once.
func (s *Server) broken(ctx context.Context, what string, err error) {
	s.count(EventMalformed)
	if s.malformed.CompareAndSwap(false, true) {
		s.log.WarnContext(ctx, "an access log "+what+" of Envoy does not parse, passed over", "error", err)
	}
}

// tell tells st.entry.
func (st *stream) tell() {
	e := &st.entry
	switch {
	case !e.ended():
		st.srv.count(EventIntermediate)
	case e.receipted():
		o := e.outcome(st.names)
		// Chained filters get one decision; if they got two all the same, each has its outcome.
		for i := range e.told {
			if id := e.told[i].receipt; len(id) > 0 && !e.toldBefore(i) {
				st.srv.count(EventReceipted)
				st.srv.sink.Finish(string(id), o, true)
			}
		}
	default:
		st.srv.count(EventUnreceipted)
		st.srv.sink.Unreceipted(e.unreceipted(st.node, st.names))
	}
}
