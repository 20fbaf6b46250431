// Package extauthz is Envoy's external authorisation service (envoy.service.auth.v3.Authorization): it reads what Envoy says of a
// request or of a TCP connection, has an Admitter decide, and answers.
//
// Promises: it never fails open. A gRPC error is what Envoy's failure_mode_allow lets pass, so that everything that can be answered is
// answered: a message that does not parse, attributes that make no sense, a panic of the Admitter are denials (503). A call ends with
// status OK only after an answer, and a request goes on only after Admit has returned a decision that passes. Not promised: that an
// answer reached Envoy, or that an upstream saw the request; the access log (server/accesslog) tells that, and is where every outcome
// comes from. Finish is called only for a decision whose answer could not be sent because Envoy had ended the call.
//
// Seen with Envoy 1.40 (e2e/extauthz): dynamic metadata is taken from denials too, and in shadow mode; it does not outlive a redirect that
// Envoy follows itself, so that each pass is decided; of a TCP connection it stands in envoy.filters.network.ext_authz, and a denial closes
// the connection with flag UAEX. A route is named by nothing but its context extensions. An access log entry says ext_authz_denied for our
// denials, whatever the reason, and ext_authz_error when the call failed.
//
// What a check of Envoy 1.40 carries is stated in request.go; what `knhk bootstrap` must set for it, at the constants Context*.
//
// server.New wires it; server/admit is its Admitter. The gRPC server must use envoywire.Codec.
package extauthz

import (
	"context"
	"errors"
	"log/slog"
	"runtime/debug"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/server/envoywire"
	"github.com/knhk/sidecar/server/extproc"
)

// Admitter decides about requests and records them. Its methods are called from many goroutines at once; server/extproc's Admitter
// says more of them.
type Admitter interface {
	// Plan says how requests of an Envoy route are judged. It must not block.
	Plan(route string) extproc.Plan
	// Admit decides and records. It blocks while the request is parked and until the decision has reached its class's level; ctx ends
	// when Envoy gives up. A decision that passes needs an ID, or Gap, or Excluded.
	Admit(ctx context.Context, req *policy.Request) policy.Decision
	// Finish reports that the answer with a receipt id could not be sent.
	Finish(id string, o policy.Outcome, final bool)
}

// Config is what New needs.
type Config struct {
	// Admitter decides. Required.
	Admitter Admitter
	// Log gets faults: a panic each time, with its stack, any other kind once in the Server's life. Required.
	Log *slog.Logger
	// Count is called for everything worth counting. It must be quick and safe for concurrent use. Optional.
	Count func(Event)
}

// Event is something that happened to a check.
type Event uint8

// The events. Their names are values of a metric label.
const (
	EventAdmitted    Event = iota // a request or connection went on with a receipt
	EventRefused                  // one was refused by decision
	EventExcluded                 // one went on because its route is excluded
	EventGap                      // one went on without a receipt (on_receipt_failure: allow)
	EventEmpty                    // a call without a message
	EventUndelivered              // a decision was made, but Envoy had ended the call by then
	EventBodyMissing              // a route is classified by body, but Envoy does not send it
	EventMalformed                // a message that does not parse
	EventUnexpected               // a message that makes no sense: no attributes, no method, no address
	EventPanic                    // a recovered panic
	numEvents
)

var eventNames = [numEvents]string{
	"admitted", "refused", "excluded", "gap", "empty", "undelivered", "body_missing", "malformed", "unexpected", "panic",
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
	log      *slog.Logger
	count    func(Event)
	said     [numEvents]atomic.Bool // complaints that were made
}

// New checks cfg and makes a Server. It starts nothing.
func New(cfg Config) (*Server, error) {
	switch {
	case cfg.Admitter == nil:
		return nil, errors.New("new ext_authz server: no admitter")
	case cfg.Log == nil:
		return nil, errors.New("new ext_authz server: no logger")
	}
	s := &Server{admitter: cfg.Admitter, log: cfg.Log, count: cfg.Count}
	if s.count == nil {
		s.count = func(Event) {}
	}
	return s, nil
}

// ServiceDesc is the descriptor of envoy.service.auth.v3.Authorization over raw frames. Check is unary on the wire and a stream to
// gRPC, for three reasons: calls that send nothing are counted and ended like ext_proc's, an answer that could not be sent is known, and a
// message that does not decode is ours to deny instead of gRPC's to fail.
var ServiceDesc = grpc.ServiceDesc{
	ServiceName: "envoy.service.auth.v3.Authorization",
	HandlerType: (*any)(nil),
	Streams: []grpc.StreamDesc{{
		StreamName: "Check",
		Handler:    func(srv any, ss grpc.ServerStream) error { return srv.(*Server).serve(ss) },
	}},
	Metadata: "envoy/service/auth/v3/external_auth.proto",
}

// Register adds the service to a gRPC server that uses envoywire.Codec.
func (s *Server) Register(r grpc.ServiceRegistrar) { r.RegisterService(&ServiceDesc, s) }

// How a call ends that has no answer. Envoy has ended it by then; if it has not, it takes both as a failure of ours.
var (
	errEnded = status.Error(codes.Canceled, "call ended by Envoy")
	errFault = status.Error(codes.Internal, "internal fault")
)

// serve serves one call. It returns nil only after an answer was sent.
func (s *Server) serve(ss grpc.ServerStream) (err error) {
	ctx := ss.Context()
	var a answer
	defer func() {
		if p := recover(); p != nil { // outside of what answer guards: gRPC's own
			s.panicked(ctx, "call", p)
			err = errFault
		}
	}()
	var in envoywire.Frame
	defer in.Free()
	if err := ss.RecvMsg(&in); err != nil {
		s.count(EventEmpty)
		if status.Code(err) == codes.Unknown { // io.EOF: half-closed without a message
			return errEnded
		}
		return err
	}
	a = s.answer(ctx, in.Bytes())
	if ctx.Err() == nil {
		err = ss.SendMsg(&a)
	}
	// Envoy uses the answer to a unary call when the call's end arrives. If it has ended the call before, it will not.
	if err != nil || ctx.Err() != nil {
		s.undelivered(ctx, a.id)
		return errEnded
	}
	return nil
}

// undelivered tells what became of a decision that Envoy no longer waited for: its access log entry will not carry the id.
func (s *Server) undelivered(ctx context.Context, id string) {
	defer func() {
		if p := recover(); p != nil {
			s.panicked(ctx, "finish", p)
		}
	}()
	if id == "" {
		return
	}
	s.count(EventUndelivered)
	s.admitter.Finish(id, policy.Outcome{Source: "ext_authz", Result: policy.ResultAborted, Details: "answer_not_delivered"}, true)
}

// answer makes the reply to one CheckRequest. Whatever panics in it, the reply is a denial.
func (s *Server) answer(ctx context.Context, b []byte) (a answer) {
	defer func() {
		if p := recover(); p != nil {
			s.panicked(ctx, "check", p)
			a = answer{id: a.id}
		}
	}()
	var c check
	switch err := c.parse(b); {
	case errors.Is(err, errUnexpected):
		s.complain(ctx, EventUnexpected, "a check of Envoy makes no sense, denied", "error", err)
		return answer{}
	case err != nil:
		s.complain(ctx, EventMalformed, "a check of Envoy does not parse, denied", "error", err)
		return answer{}
	}
	c.req.TraceID, c.req.SpanID = envoywire.TraceParent(ctx)
	plan := s.admitter.Plan(c.req.Route)
	if plan.Exclude {
		s.count(EventExcluded)
		return passes(&c.req, policy.Decision{Excluded: true})
	}
	if plan.ClassifyBody && !c.req.TCP && !c.body(plan.BodyLimit) {
		s.complain(ctx, EventBodyMissing, "a route is classified by body but Envoy does not send it: its requests are refused", "route", c.req.Route)
	}
	d := s.admit(ctx, &c.req, plan)
	switch {
	case d.Excluded:
		s.count(EventExcluded)
		return passes(&c.req, d)
	case !d.Passes():
		s.count(EventRefused)
		return denies(d)
	case d.Gap:
		s.count(EventGap)
		return passes(&c.req, d)
	case d.ID == "":
		s.complain(ctx, EventRefused, "admitted without a receipt, denied")
		return answer{}
	}
	s.count(EventAdmitted)
	return passes(&c.req, d)
}

// admit guards the Admitter's verdict. If it panics the request is denied, or passes as a gap where the route says so.
func (s *Server) admit(ctx context.Context, req *policy.Request, plan extproc.Plan) (d policy.Decision) {
	defer func() {
		if p := recover(); p != nil {
			s.panicked(ctx, "admit", p)
			d = policy.Decision{Reason: policy.ReasonInternal, Gap: plan.Allow}
		}
	}()
	return s.admitter.Admit(ctx, req)
}

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
