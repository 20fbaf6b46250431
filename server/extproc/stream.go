package extproc

import (
	"context"
	"errors"
	"io"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/server/envoywire"
)

// How a call ends. Envoy has ended the stream by then and hears neither; if it has not, it takes both as a failure of ours
// and refuses (Envoy 1.40: ext_proc_error_gRPC_error_1, status_on_error).
var (
	errEnded = status.Error(codes.Canceled, "stream ended by Envoy")
	errFault = status.Error(codes.Internal, "internal fault")
)

// maxMessages is how many messages a stream may have. Envoy sends six at most, one for each phase; who sends more and does not read the
// answers would have us keep them.
const maxMessages = 64

var errTalk = status.Error(codes.ResourceExhausted, "too many messages in a stream")

// errSend stands for a stream that ended before our answer could be sent.
var errSend = errors.New("answer not sent")

// state is how far a stream has got with its decision.
type state uint8

const (
	stateNew      state = iota // nothing seen yet
	stateBody                  // headers seen, the decision waits for the body
	statePassed                // decided: goes on; or excluded
	stateRefused               // decided: does not
	stateResponse              // a response came without a request
)

// stream is one call of Process.
type stream struct {
	srv   *Server
	in    envoywire.Frame
	msg   message
	out   reply
	req   policy.Request
	plan  Plan
	state state
	mode  int32 // request_body_mode of the first message

	id       string // receipt id, once decided
	answered bool   // the reply that carries the decision was handed to gRPC
	response bool   // response headers were seen
	complete bool   // nothing more was to come of the response: its last part was seen
	outcome  policy.Outcome
}

// process serves one stream. It never returns nil.
func (s *Server) process(ss grpc.ServerStream) (err error) {
	st := s.streams.Get().(*stream)
	cache := st.msg.cacheStatus
	*st = stream{srv: s}
	st.msg.cacheStatus = cache
	ctx := ss.Context()
	defer func() {
		if p := recover(); p != nil { // st is left to the garbage collector: who knows what it is in the middle of
			s.panicked(ctx, "stream", p)
			st.end(ctx, errSend)
			err = errFault
			return
		}
		st.in.Free()
		st.req = policy.Request{}
		s.streams.Put(st)
	}()
	for n := 0; ; n++ {
		err := errTalk
		if n < maxMessages {
			err = ss.RecvMsg(&st.in)
		}
		if err != nil {
			st.end(ctx, err)
			if errors.Is(err, io.EOF) || status.Code(err) == codes.Canceled {
				return errEnded
			}
			return err
		}
		st.out = st.answer(ctx)
		if err := ss.SendMsg(&st.out); err != nil {
			st.end(ctx, errSend)
			return errEnded
		}
		st.answered = st.id != ""
	}
}

// answer makes the one reply to the message in st.in. Whatever panics in it, the reply is a refusal.
func (st *stream) answer(ctx context.Context) (r reply) {
	defer func() {
		if p := recover(); p != nil {
			st.srv.panicked(ctx, "message", p)
			r = st.fault()
		}
	}()
	m := &st.msg
	if err := m.scan(st.in.Bytes()); err != nil {
		st.srv.complain(ctx, EventMalformed, "a message of Envoy does not parse, refused", "error", err)
		return st.fault()
	}
	if m.observability {
		st.srv.complain(ctx, EventObservability,
			"Envoy runs ext_proc in observability_mode: requests go on without a receipt; remove it from Envoy's configuration")
	}
	switch m.phase {
	case phaseRequestHeaders:
		return st.requestHeaders(ctx)
	case phaseRequestBody:
		return st.requestBody(ctx)
	case phaseRequestTrailers:
		return st.requestTrailers(ctx)
	case phaseResponseHeaders:
		return st.responseHeaders(ctx)
	case phaseResponseBody, phaseResponseTrailers:
		st.complete = st.complete || m.phase == phaseResponseTrailers
		return proceed(m.phase)
	}
	return st.unexpected(ctx)
}

// fault gives the zero reply, the refusal. A stream that has asked for nothing yet is over with it; one that waits for a
// body still owes a record of its end.
func (st *stream) fault() reply {
	if st.state == stateNew {
		st.state = stateRefused
	}
	return reply{}
}

// unexpected refuses a message that makes no sense where it stands.
func (st *stream) unexpected(ctx context.Context) reply {
	st.srv.complain(ctx, EventUnexpected, "a message of Envoy makes no sense here, refused", "phase", st.msg.phase, "state", st.state)
	return st.fault()
}

// requestHeaders decides, or says that the decision waits for the body.
func (st *stream) requestHeaders(ctx context.Context) reply {
	if st.state != stateNew {
		return st.unexpected(ctx)
	}
	m := &st.msg
	st.fillRequest(ctx)
	st.mode = m.requestBodyMode
	ended := m.endOfStream
	length, known := parseUint(m.contentLength)
	st.in.Free() // all that is needed was copied

	st.plan = st.srv.admitter.Plan(st.req.Route)
	switch {
	case st.plan.Exclude:
		st.state = statePassed
		st.srv.count(EventExcluded)
		return proceed(phaseRequestHeaders)
	case !st.plan.ClassifyBody || ended || known && length == 0:
	case st.mode != bodyBuffered && st.mode != bodyBufferedPartial:
		st.req.BodyMissing = true
		st.srv.complain(ctx, EventBodyMissing,
			"a route is classified by body but Envoy does not send it buffered: its requests are refused",
			"route", st.req.Route, "request_body_mode", st.mode)
	case !known || length > int64(st.plan.BodyLimit):
		// Without a length nobody can be sure of ever seeing a body: Envoy 1.40 sends no body message for an HTTP/2 request
		// that has trailers but no data, and lets it pass although the body was to be waited for (seen). With a length of 1
		// or more its codec rejects such a request.
		st.req.BodyLarge = true
	default:
		st.state = stateBody
		return proceed(phaseRequestHeaders)
	}
	return st.decide(ctx, phaseRequestHeaders)
}

// requestBody decides if the decision waits for the body. A body that comes after it is let through.
func (st *stream) requestBody(ctx context.Context) reply {
	switch st.state {
	case stateBody:
	case statePassed:
		return proceed(phaseRequestBody)
	default:
		return st.unexpected(ctx)
	}
	m := &st.msg
	// BUFFERED bodies are whole; end_of_stream is false on them when trailers follow. Of a BUFFERED_PARTIAL body without
	// end_of_stream nobody knows whether it is whole.
	if len(m.body) > st.plan.BodyLimit || st.mode == bodyBufferedPartial && !m.endOfStream {
		st.req.BodyLarge = true
	} else {
		st.req.HasBody, st.req.Body = true, m.body
	}
	r := st.decide(ctx, phaseRequestBody)
	st.req.Body = nil
	return r
}

// requestTrailers decides if trailers came where the body was expected: there is none.
func (st *stream) requestTrailers(ctx context.Context) reply {
	switch st.state {
	case stateBody:
		return st.decide(ctx, phaseRequestTrailers)
	case statePassed:
		return proceed(phaseRequestTrailers)
	}
	return st.unexpected(ctx)
}

// responseHeaders notes what the response is.
func (st *stream) responseHeaders(ctx context.Context) reply {
	m := &st.msg
	switch st.state {
	case stateNew:
		st.state = stateResponse
		st.srv.count(EventResponseFirst)
	case statePassed:
		if st.srv.lean {
			st.srv.complain(ctx, EventCaptureMismatch, "capture is lean, but Envoy sends response phases: it runs another configuration")
		}
	}
	st.response = true
	st.complete = m.endOfStream
	st.fillOutcome()
	return proceed(phaseResponseHeaders)
}

// decide asks the Admitter and turns its decision into the reply to phase p.
func (st *stream) decide(ctx context.Context, p phase) reply {
	st.state = stateRefused // until told otherwise
	d := st.admit(ctx)
	st.id = d.ID
	switch {
	case d.Excluded:
		st.state = statePassed
		st.id = ""
		st.srv.count(EventExcluded)
		return proceed(p)
	case !d.Passes():
		st.srv.count(EventRefused)
		return refuse(d)
	case d.Gap:
		st.state = statePassed
		st.srv.count(EventGap)
		return proceedWith(p, d)
	case d.ID == "":
		st.srv.complain(ctx, EventRefused, "admitted without a receipt, refused")
		return reply{}
	}
	st.state = statePassed
	st.srv.count(EventAdmitted)
	return proceedWith(p, d)
}

// admit guards the Admitter's verdict. If it panics the request is refused, or passes as a gap where the route says so.
func (st *stream) admit(ctx context.Context) (d policy.Decision) {
	defer func() {
		if p := recover(); p != nil {
			st.srv.panicked(ctx, "admit", p)
			d = policy.Decision{Reason: policy.ReasonInternal, Gap: st.plan.Allow}
		}
	}()
	return st.srv.admitter.Admit(ctx, &st.req)
}

// end accounts for a stream that has ended with err. It never panics.
func (st *stream) end(ctx context.Context, err error) {
	defer func() {
		if p := recover(); p != nil {
			st.srv.panicked(ctx, "end", p)
		}
	}()
	switch {
	case st.state == stateNew:
		st.srv.count(EventEmpty)
	case st.state == stateBody:
		st.srv.count(EventAbandoned)
		st.srv.admitter.Abandon(&st.req)
	case st.id == "":
	case !st.answered:
		st.srv.count(EventUndelivered)
		st.srv.admitter.Finish(st.id, policy.Outcome{
			Source: "ext_proc", Result: policy.ResultAborted, Details: "answer_not_delivered",
		}, true)
	case st.response:
		o, final := st.result(err)
		st.srv.admitter.Finish(st.id, o, final)
	}
}

// result is the outcome of a full stream. Envoy resets the stream when the exchange is over (Canceled here), a reply of its
// own in place of the upstream's included, and half-closes it when the client, the upstream or a timeout has broken off a
// response that had begun (io.EOF here; the access log knows which).
func (st *stream) result(err error) (o policy.Outcome, final bool) {
	o = st.outcome
	if errors.Is(err, io.EOF) || errors.Is(err, errSend) {
		o.Result = policy.ResultAborted
		return o, false
	}
	o.Result = policy.ResultComplete
	if o.Details != "" {
		o.Result = envoywire.Result(o.Details, 0)
	}
	return o, st.complete
}

// fillRequest copies what the headers say into st.req, all strings in one allocation.
func (st *stream) fillRequest(ctx context.Context) {
	m, a := &st.msg, &st.msg.attrs
	parts := [...]struct {
		src []byte
		dst *string
	}{
		{m.method, &st.req.Method}, {m.scheme, &st.req.Scheme}, {m.authority, &st.req.Authority}, {m.path, &st.req.Path},
		{m.requestID, &st.req.RequestID}, {a.route, &st.req.Route}, {a.cluster, &st.req.Cluster}, {a.source, &st.req.Source},
		{a.spiffeID, &st.req.SPIFFEID}, {m.parent, &st.req.Parent}, {m.decided.id(), &st.req.Decided},
	}
	total := 0
	for i := range parts {
		total += len(parts[i].src)
	}
	var sb strings.Builder
	sb.Grow(total)
	for i := range parts {
		sb.Write(parts[i].src)
	}
	all := sb.String()
	for i := range parts {
		n := len(parts[i].src)
		*parts[i].dst, all = all[:n], all[n:]
	}
	st.req.GapCounted = m.decided.gap()
	st.req.TraceID, st.req.SpanID = envoywire.TraceParent(ctx)
}

// maxDetails bounds policy.Outcome.Details, in bytes.
const maxDetails = 128

// fillOutcome copies what the response headers say into st.outcome.
func (st *stream) fillOutcome() {
	m, a := &st.msg, &st.msg.attrs
	st.outcome = policy.Outcome{
		Source:       "ext_proc",
		Status:       statusCode(m.status),
		Details:      string(a.details[:min(len(a.details), maxDetails)]),
		Cluster:      string(a.cluster),
		UpstreamHost: string(a.upstream),
		Attempts:     uint32(max(0, min(a.attempts, 1<<31))),
		CacheStatus:  string(m.cacheStatus),
	}
	if envoywire.ServedByUpstream(st.outcome.Details) {
		st.outcome.UpstreamStatus = st.outcome.Status
	}
}
