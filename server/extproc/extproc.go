// Package extproc is the ext_proc service that Envoy asks before a request goes on: it reads what Envoy says of the
// request, has an Admitter decide, and answers.
//
// Promises: every message of a stream gets exactly one answer; whatever goes wrong in here, a panic of the Admitter
// included, the answer is a refusal (503, details knhk_internal) or the call ends with a gRPC error, which Envoy takes as a
// refusal unless the route says failure_mode_allow. The call never ends with status OK: Envoy lets a request pass
// unprocessed when its server closes the stream without an answer. A request goes on only after Admit has returned a
// decision that passes. Not promised: that an answer reached Envoy, or that an upstream saw the request; the access log
// (server/accesslog) tells that.
//
// How much of an exchange is captured shows in what Envoy sends, not in our configuration. A lean stream has the request
// headers (and the body, on routes classified by body); its outcome comes from the access log. A full stream has response
// headers too, and trailers; Finish is called when it ends. Of either kind, Finish is called for a decision whose answer
// could not be sent because Envoy had ended the stream: no access log entry will carry its id. A response without a request is
// Envoy's own reply to something it could not make sense of (400, 431): it is answered and counted, nothing is recorded.
// observability_mode is not supported: Envoy would not wait for us. Such streams are answered as usual and complained of.
//
// server.New wires it; server/admit is its Admitter. The gRPC server must use envoywire.Codec.
package extproc

import (
	"context"
	"errors"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"

	"github.com/knhk/sidecar/policy"
)

// Plan says how the transactions of a route are captured. The zero Plan decides on the headers and denies.
type Plan struct {
	Exclude      bool // pass without asking anybody, no record
	ClassifyBody bool // the decision needs the request body; Envoy must be set to send it buffered
	BodyLimit    int  // bytes of body the decision can use; a longer one is not given, only its being too long
	Allow        bool // on_receipt_failure: allow; a request whose decision panicked passes as a gap
}

// Admitter decides about transactions and records them. Its methods are called from many goroutines at once. The Request
// given is borrowed: it may not be kept after the method returned, its strings may; its Body may not.
type Admitter interface {
	// Plan says how transactions of an Envoy route are captured; called once per stream with the route's name, "" if no
	// route matched. It must not block.
	Plan(route string) Plan
	// Admit decides and records. It blocks while the request is parked and until the decision has reached its class's
	// level; ctx ends when Envoy ends the stream. A decision that passes needs an ID, or Gap, or Excluded.
	Admit(ctx context.Context, req *policy.Request) policy.Decision
	// Abandon records that a request ended before there was enough of it to decide: refused, client_gone. Nobody hears
	// the answer.
	Abandon(req *policy.Request)
	// Finish reports the outcome of a transaction with a receipt id as the stream saw it, at most once. final=false: the access log
	// knows better, wait for it a while. It must not block for long: Envoy has ended the stream, but drain waits for it.
	Finish(id string, o policy.Outcome, final bool)
}

// Config is what New needs.
type Config struct {
	// Admitter decides. Required.
	Admitter Admitter
	// Capture is what Envoy was set to by `knhk bootstrap`, "lean" or "full"; a stream that shows otherwise is counted as
	// EventCaptureMismatch and complained of once. Empty: not compared.
	Capture string
	// Log gets faults: a panic each time, with its stack, any other kind once in the Server's life. Required.
	Log *slog.Logger
	// Count is called for everything worth counting. It must be quick and safe for concurrent use. Optional.
	Count func(Event)
}

// Event is something that happened to a stream.
type Event uint8

// The events. Their names are values of a metric label.
const (
	EventAdmitted        Event = iota // a request went on with a receipt
	EventRefused                      // a request was refused by decision
	EventExcluded                     // a request went on because its route is excluded
	EventGap                          // a request went on without a receipt (on_receipt_failure: allow)
	EventResponseFirst                // a response without a request: Envoy's own reply to a broken request
	EventEmpty                        // a stream without any message
	EventAbandoned                    // a stream ended before the body it was to be decided by
	EventUndelivered                  // a decision was made, but Envoy had ended the stream by then
	EventBodyMissing                  // a route is classified by body, but Envoy does not send it
	EventMalformed                    // a message that does not parse
	EventUnexpected                   // a message that makes no sense where it stands
	EventObservability                // a stream in observability_mode
	EventCaptureMismatch              // response phases although Config.Capture is lean
	EventPanic                        // a recovered panic
	numEvents
)

var eventNames = [numEvents]string{
	"admitted", "refused", "excluded", "gap", "response_first", "empty", "abandoned", "undelivered", "body_missing",
	"malformed", "unexpected", "observability", "capture_mismatch", "panic",
}

// String is the event's name as it stands in metrics.
func (e Event) String() string {
	if e < numEvents {
		return eventNames[e]
	}
	return "unknown"
}

// Server is the service. Its methods are safe for concurrent use.
type Server struct {
	admitter Admitter
	lean     bool
	log      *slog.Logger
	count    func(Event)
	streams  sync.Pool
	said     [numEvents]atomic.Bool // complaints that were made
}

// New checks cfg and makes a Server. It starts nothing.
func New(cfg Config) (*Server, error) {
	switch {
	case cfg.Admitter == nil:
		return nil, errors.New("new ext_proc server: no admitter")
	case cfg.Log == nil:
		return nil, errors.New("new ext_proc server: no logger")
	case cfg.Capture != "" && cfg.Capture != "lean" && cfg.Capture != "full":
		return nil, errors.New("new ext_proc server: capture must be lean or full")
	}
	s := &Server{admitter: cfg.Admitter, lean: cfg.Capture == "lean", log: cfg.Log, count: cfg.Count}
	if s.count == nil {
		s.count = func(Event) {}
	}
	s.streams.New = func() any { return new(stream) }
	return s, nil
}

// ServiceDesc is the descriptor of envoy.service.ext_proc.v3.ExternalProcessor over raw frames.
var ServiceDesc = grpc.ServiceDesc{
	ServiceName: "envoy.service.ext_proc.v3.ExternalProcessor",
	HandlerType: (*any)(nil),
	Streams: []grpc.StreamDesc{{
		StreamName:    "Process",
		Handler:       func(srv any, ss grpc.ServerStream) error { return srv.(*Server).process(ss) },
		ServerStreams: true,
		ClientStreams: true,
	}},
	Metadata: "envoy/service/ext_proc/v3/external_processor.proto",
}

// Register adds the service to a gRPC server that uses envoywire.Codec.
func (s *Server) Register(r grpc.ServiceRegistrar) { r.RegisterService(&ServiceDesc, s) }

// panicked tells of a recovered panic. It is logged every time: there must be none.
func (s *Server) panicked(ctx context.Context, where string, p any) {
	s.count(EventPanic)
	s.log.ErrorContext(ctx, "recovered panic", "where", where, "panic", p, "stack", string(debug.Stack()))
}

// complain counts ev and logs it the first time it happens.
func (s *Server) complain(ctx context.Context, ev Event, msg string, args ...any) {
	s.count(ev)
	if s.said[ev].CompareAndSwap(false, true) {
		s.log.WarnContext(ctx, msg, append(args, "event", ev.String())...)
	}
}
