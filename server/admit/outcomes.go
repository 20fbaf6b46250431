package admit

import (
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/region/receiptlog"
)

// holdFor is how long an outcome that the access log knows better waits for it: several flush intervals.
const holdFor = 3 * time.Second

// held keeps outcomes that an ext_proc stream could not tell for certain.
type held struct {
	mu sync.Mutex
	m  map[string]heldOutcome
}

type heldOutcome struct {
	policy.Outcome
	until time.Time
}

func (h *held) put(id string, o policy.Outcome, now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.m == nil {
		h.m = map[string]heldOutcome{}
	}
	h.m[id] = heldOutcome{o, now.Add(holdFor)}
}

func (h *held) take(id string) (policy.Outcome, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	o, ok := h.m[id]
	delete(h.m, id)
	return o.Outcome, ok
}

// expire gives those whose time is over to report.
func (h *held) expire(now time.Time, report func(id string, o *policy.Outcome)) {
	h.mu.Lock()
	var due map[string]policy.Outcome
	for id, o := range h.m {
		if now.After(o.until) {
			if due == nil {
				due = map[string]policy.Outcome{}
			}
			due[id] = o.Outcome
			delete(h.m, id)
		}
	}
	h.mu.Unlock()
	for id, o := range due {
		report(id, &o)
	}
}

// recent remembers for 5 to 10 seconds which transactions their stream has finished, so that their access log entry, which
// follows, is known to be a repetition without a look into the log.
type recent struct {
	mu       sync.Mutex
	now, old map[string]struct{}
	turned   time.Time
}

const recentTurn = 5 * time.Second

func (r *recent) add(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.now == nil {
		r.now = map[string]struct{}{}
	}
	r.now[id] = struct{}{}
}

func (r *recent) has(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, ok := r.now[id]
	if !ok {
		_, ok = r.old[id]
	}
	return ok
}

func (r *recent) turn(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now.Sub(r.turned) >= recentTurn {
		r.old, r.now, r.turned = r.now, nil, now
	}
}

// reasonOf says in a word why a decision could not be recorded.
func reasonOf(err error) policy.Reason {
	switch {
	case errors.Is(err, receiptlog.ErrFull):
		return policy.ReasonLogFull
	case errors.Is(err, receiptlog.ErrUnsigned):
		return policy.ReasonUnsigned
	case errors.Is(err, receiptlog.ErrTooLarge):
		return policy.ReasonTooLarge
	case errors.Is(err, receiptlog.ErrSealed):
		return policy.ReasonSealed
	case errors.Is(err, receiptlog.ErrStopping):
		return policy.ReasonStopping
	}
	return policy.ReasonLogUnavailable
}

// localReplies are the answers that Envoy gives by itself before it asks us, by the beginning of their response_code_details.
var localReplies = []struct{ prefix, kind string }{
	{"missing_host_header", "missing_host"},
	{"request_headers_too_large", "headers_too_large"},
	{"http1.headers_too_large", "headers_too_large"},
	{"http1.too_many_headers", "headers_too_large"},
	{"http2.header_overflow", "headers_too_large"},
	{"route_not_found", "no_route"},
	{"direct_response", "direct_response"},
	{"upgrade_failed", "upgrade_refused"},
	{"ext_proc", "ext_proc_failed"},
	{"ext_authz_error", "ext_authz_failed"},
	{"ext_authz_denied", "refused_unrecorded"},
	{"knhk_", "refused_unrecorded"},
	{"http1.", "protocol_error"},
	{"http2.remote_re", "client_abort"}, // remote_reset, remote_refuse
	{"http3.remote_re", "client_abort"},
	{"http2.", "protocol_error"},
	{"http3.", "protocol_error"},
	{"http.", "protocol_error"},
	{"low_version", "protocol_error"},
	{"missing_path", "protocol_error"},
	{"invalid_", "protocol_error"},
	{"path_normalization_failed", "bad_path"},
	{"absolute_path_rejected", "bad_path"},
	{"unescaped_slashes", "bad_path"},
	{"downstream_", "client_abort"},
	{"request_overall_timeout", "timeout"},
	{"stream_idle_timeout", "timeout"},
	{"request_header_timeout", "timeout"},
	{"overload", "overload"},
}

// localReply names the kind of an answer of Envoy's own, "other" if it is none of those listed.
func localReply(details string) string {
	for _, l := range localReplies {
		if strings.HasPrefix(details, l.prefix) {
			return l.kind
		}
	}
	return "other"
}
