// Package policy holds the words in which a transaction is judged: what is known of a request (Request), how much
// certainty it buys before it goes on (Class), what was decided (Verdict, Reason, Decision) and what became of it
// (Outcome).
//
// It promises to be pure: no clock, disk or network of its own. Every package below policy/ keeps the same promise, so
// that a decision can be replayed from its inputs. It does not decide anything itself: policy/class and policy/beat
// hold rules, server/admit puts them in order.
package policy

import (
	"fmt"
	"time"
)

// Class says what must be true of a decision before the request goes on. The zero value is no class and is refused.
type Class uint8

// The classes, from the cheapest promise to the strongest. C1 needs peers and is not configurable yet.
const (
	ClassUnknown Class = iota
	R1                 // decision written to the page cache: survives the death of the process, not of the machine
	W1                 // decision durable (fsync) before the request goes on
)

var classNames = [...]string{"unknown", "R1", "W1"}

// String returns the class's name as it stands in records and configuration.
func (c Class) String() string {
	if int(c) < len(classNames) {
		return classNames[c]
	}
	return fmt.Sprintf("class(%d)", uint8(c))
}

// ParseClass is the inverse of Class.String for R1 and W1; any other name is an error.
func ParseClass(s string) (Class, error) {
	switch s {
	case "R1":
		return R1, nil
	case "W1":
		return W1, nil
	}
	return ClassUnknown, fmt.Errorf("unknown class %q: want R1 or W1", s)
}

// Verdict is what was decided. The zero value refuses, so that a forgotten branch cannot admit.
type Verdict uint8

// The verdicts.
const (
	Refuse Verdict = iota // answered by us, the upstream never saw it
	Admit                 // went on at once
	Park                  // waited for a later tick, then went on
)

var verdictNames = [...]string{"refuse", "admit", "park"}

// String returns the verdict's name as it stands in records.
func (v Verdict) String() string {
	if int(v) < len(verdictNames) {
		return verdictNames[v]
	}
	return fmt.Sprintf("verdict(%d)", uint8(v))
}

// ParseVerdict is the inverse of Verdict.String.
func ParseVerdict(s string) (Verdict, error) {
	for i, n := range verdictNames {
		if n == s {
			return Verdict(i), nil
		}
	}
	return Refuse, fmt.Errorf("unknown verdict %q: want refuse, admit or park", s)
}

// Reason says in one stable word why a verdict was given. Its values are part of the record format and of metrics.
type Reason string

// The reasons. The comment says which HTTP status a refusal with that reason carries.
const (
	ReasonOK             Reason = "ok"                 // admitted with a credit of the current tick
	ReasonWaited         Reason = "waited"             // admitted with a credit of a later tick
	ReasonNoCredit       Reason = "no_credit"          // 429: no tick within the class's max_wait had a credit left
	ReasonAuthzForbid    Reason = "authz_forbidden"    // 403: an authorisation rule forbids it
	ReasonAuthzNone      Reason = "authz_no_rule"      // 403: there are authorisation rules, and none permits it
	ReasonAuthzError     Reason = "authz_rule_error"   // 403: an authorisation rule failed or exceeded its cost
	ReasonUnknownClass   Reason = "unknown_class"      // 503: no rule or route gave a class
	ReasonClassRule      Reason = "class_rule_error"   // 503: a CEL rule failed or exceeded its cost
	ReasonBodyMode       Reason = "body_mode_mismatch" // 503: the route is classified by body, Envoy does not send it
	ReasonClientGone     Reason = "client_gone"        // 499: the client left before there was a verdict
	ReasonLogUnavailable Reason = "log_unavailable"    // 503: the receipt log cannot take the decision
	ReasonLogFull        Reason = "log_full"           // 503: no room reserved for this decision and its outcome
	ReasonTooLarge       Reason = "request_too_large"  // 431: more than 96 KiB of method, host, path, request id
	ReasonUnsigned       Reason = "unsigned_too_long"  // 503: checkpoints have gone unsigned for more than max_unsigned
	ReasonSealed         Reason = "log_sealed"         // 503: the receipt log has ended, its identity key was compromised
	ReasonStopping       Reason = "stopping"           // 503: the service is draining
	ReasonInternal       Reason = "internal"           // 503: a fault of ours, a recovered panic included
)

// Request is what is known of a request when it is judged. Every field came from Envoy; headers are the client's word.
// Strings are empty when Envoy did not send the field (CONNECT has no Path).
type Request struct {
	Method    string
	Scheme    string
	Authority string
	Path      string // :path with its query, as Envoy forwards it
	RequestID string // x-request-id
	Route     string // xds.route_name; empty when no route matched
	Cluster   string // xds.cluster_name
	Source    string // source.address of the downstream connection, host:port
	SPIFFEID  string // URI SAN of the client's certificate, from the connection, never from a header
	TraceID   [16]byte
	SpanID    [8]byte // the caller's span; TraceID and SpanID are zero without a traceparent in the gRPC metadata
	TCP       bool    // a connection, not an HTTP request: only Authority (the address it goes to), Source and SPIFFEID are known
	// Parent is the knhk-parent header: the receipt id that the Envoy before this one has for the request. A claim of whoever has
	// SPIFFEID.
	Parent string
	// Decided is the receipt id that an earlier filter of the same Envoy got for this request, from its dynamic metadata; see
	// server/admit. Empty when this is the first to ask.
	Decided string
	// Filter is who asks, "ext_proc" or "ext_authz": the source of an outcome that is known with the answer. Empty: ext_proc.
	Filter string
	// GapCounted: an earlier filter of the same Envoy let this request pass without a receipt, and that was counted then.
	GapCounted bool
	HasBody    bool   // Body was buffered and is complete
	Body       []byte // only on routes classified by body; borrowed until the decision is made
	BodyLarge  bool   // the body exceeds the route's limit, or may: it was sent without a length; Body is nil
	// BodyMissing: the route is classified by body, but Envoy is not set up to send it, so nobody can classify this request.
	// It is refused with ReasonBodyMode.
	BodyMissing bool
}

// Decision is a verdict with what it rests on. The zero Decision refuses.
type Decision struct {
	ID         string // receipt id; empty if nothing could be recorded
	Class      Class
	Verdict    Verdict
	Reason     Reason
	Rule       string        // name of the class rule or route that gave the class
	Authz      string        // name of the authorisation rule that decided; empty when none did
	Status     int           // HTTP status of a refusal: 403, 429 or 503; 0 when admitted
	RetryAfter time.Duration // when a refused request may find a free tick; 0 for "do not say"
	Excluded   bool          // the route is excluded: passes, no record
	Gap        bool          // passes without a record because the route says on_receipt_failure: allow
}

// Passes reports whether the request goes on to the upstream.
func (d Decision) Passes() bool { return d.Excluded || d.Gap || d.Verdict != Refuse }

// Result says in one word how a transaction ended.
type Result string

// The results.
const (
	ResultComplete    Result = "complete"     // the response reached its end
	ResultLocalReply  Result = "local_reply"  // Envoy or we answered; Details says why
	ResultUpstream    Result = "upstream"     // the upstream reset or could not be reached; Details says how
	ResultClientAbort Result = "client_abort" // the client left before the end
	ResultTimeout     Result = "timeout"      // a route, stream or filter timeout
	ResultAborted     Result = "aborted"      // ended before its end; which side did it is not known
	ResultUnknown     Result = "unknown"      // nobody told us; Details says what is known about why
)

// Outcome is what became of a transaction, as Envoy told it.
type Outcome struct {
	Source         string // who told: "als", "ext_proc", "ext_authz" or "recovery"
	Result         Result
	Status         int           // response code sent downstream; 0 when none was
	UpstreamStatus int           // status the upstream gave, when known apart from Status; else 0
	Flags          string        // Envoy's response flags, short names joined by commas (UF, DC, UR, ...)
	Details        string        // Envoy's response_code_details, at most 128 bytes
	Cluster        string        // upstream cluster that served it
	UpstreamHost   string        // host:port that served it
	Attempts       uint32        // upstream attempts, 0 when not told
	BytesIn        uint64        // request body bytes
	BytesOut       uint64        // response body bytes
	Duration       time.Duration // from the first downstream byte to the last sent; 0 when not told
	CacheStatus    string        // Cache-Status response header, at most 256 bytes
}
