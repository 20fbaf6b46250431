package extproc

import (
	"context"

	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"

	"github.com/knhk/sidecar/policy"
)

type messages = []*extprocv3.ProcessingRequest

// classified is the plan of a route that is classified by body.
var classified = Plan{ClassifyBody: true, BodyLimit: 8}

// bodyMode is what an Admitter decides when nobody can classify a request.
var bodyMode = policy.Decision{ID: testID, Class: policy.W1, Reason: policy.ReasonBodyMode}

var leanShapes = []shape{
	{
		name: "admitted", send: messages{request(none, true)}, want: []string{"headers" + receipt},
		calls: []string{"admit POST /x"}, events: []string{"admitted"},
	},
	{
		name: "refused", admit: always(noCredit), send: messages{request(none, true)},
		want: []string{"refuse 429 knhk_no_credit" + receipt}, calls: []string{"admit POST /x"}, events: []string{"refused"},
	},
	{
		name: "excluded route: nobody is asked", plan: Plan{Exclude: true}, send: messages{request(none, true)},
		want: []string{"headers"}, events: []string{"excluded"},
	},
	{
		name: "excluded by decision", admit: always(policy.Decision{Excluded: true, ID: "ignored"}),
		send: messages{request(none, true)}, want: []string{"headers"}, calls: []string{"admit POST /x"}, events: []string{"excluded"},
	},
	{
		name: "gap: passes and says so", admit: always(policy.Decision{Gap: true, Reason: policy.ReasonLogFull}),
		send: messages{request(none, true)}, want: []string{"headers gap=log_full"}, calls: []string{"admit POST /x"}, events: []string{"gap"},
	},
	{
		name: "the zero decision refuses", admit: always(policy.Decision{}), send: messages{request(none, true)},
		want: []string{"refuse 503 knhk_internal"}, calls: []string{"admit POST /x"}, events: []string{"refused"},
	},
	{
		name: "admitted without a receipt is refused", admit: always(policy.Decision{Verdict: policy.Admit, Class: policy.R1}),
		send: messages{request(none, true)}, want: []string{"refuse 503 knhk_internal"},
		calls: []string{"admit POST /x"}, events: []string{"refused"},
	},
	{
		name: "Admit panics", admit: func(context.Context, *policy.Request) policy.Decision { panic("as asked") },
		send: messages{request(none, true)}, want: []string{"refuse 503 knhk_internal"},
		calls: []string{"admit POST /x"}, events: []string{"panic", "refused"},
	},
	{
		name: "Admit panics on a route that allows", plan: Plan{Allow: true},
		admit: func(context.Context, *policy.Request) policy.Decision { panic("as asked") },
		send:  messages{request(none, true)}, want: []string{"headers gap=internal"},
		calls: []string{"admit POST /x"}, events: []string{"panic", "gap"},
	},
	{
		name: "a stream that says nothing", end: byHalfClose, events: []string{"empty"},
	},
	{
		name: "a stream that begins with a response: Envoy's own reply to a broken request",
		send: messages{response(true, "400", "missing_host_header")}, want: []string{"response-headers"},
		events: []string{"response_first"},
	},
	{
		name: "a message without a phase", send: messages{{}}, want: []string{"refuse 503 knhk_internal"},
		events: []string{"unexpected"},
	},
	{
		name: "request headers twice: the second is refused", send: messages{request(none, true), request(none, true)},
		want: []string{"headers" + receipt, "refuse 503 knhk_internal"}, calls: []string{"admit POST /x"},
		events: []string{"admitted", "unexpected"},
	},
	{
		name: "a body out of nowhere", send: messages{body("b", true)}, want: []string{"refuse 503 knhk_internal"},
		events: []string{"unexpected"},
	},
	{
		name: "trailers out of nowhere", send: messages{requestTrailers()}, want: []string{"refuse 503 knhk_internal"},
		events: []string{"unexpected"},
	},
	{
		name: "observability_mode is answered all the same",
		send: messages{func() *extprocv3.ProcessingRequest {
			m := request(none, true)
			m.ObservabilityMode = true
			return m
		}()}, want: []string{"headers" + receipt}, calls: []string{"admit POST /x"}, events: []string{"observability", "admitted"},
	},
}

var bodyShapes = []shape{
	{
		name: "body decides", plan: classified, send: messages{request(buffered, false, "content-length", "3"), body("abc", true)},
		want: []string{"headers", "body" + receipt}, calls: []string{`admit POST /x body="abc"`}, events: []string{"admitted"},
	},
	{
		name: "body decides: refused", plan: classified, admit: always(noCredit),
		send: messages{request(buffered, false, "content-length", "3"), body("abc", true)},
		want: []string{"headers", "refuse 429 knhk_no_credit" + receipt}, calls: []string{`admit POST /x body="abc"`},
		events: []string{"refused"},
	},
	{
		name: "a buffered body is whole, also when trailers follow", plan: classified,
		send:  messages{request(buffered, false, "content-length", "3"), body("abc", false), requestTrailers()},
		want:  []string{"headers", "body" + receipt, "trailers"},
		calls: []string{`admit POST /x body="abc"`}, events: []string{"admitted"},
	},
	{
		name: "a partially buffered body without its end may not be whole", plan: classified,
		send:  messages{request(partial, false, "content-length", "6"), body("abc", false)},
		want:  []string{"headers", "body" + receipt},
		calls: []string{`admit POST /x large`}, events: []string{"admitted"},
	},
	{
		name: "a partially buffered body with its end", plan: classified,
		send:  messages{request(partial, false, "content-length", "3"), body("abc", true)},
		want:  []string{"headers", "body" + receipt},
		calls: []string{`admit POST /x body="abc"`}, events: []string{"admitted"},
	},
	{
		name: "at the limit", plan: classified, send: messages{request(buffered, false, "content-length", "8"), body("12345678", true)},
		want: []string{"headers", "body" + receipt}, calls: []string{`admit POST /x body="12345678"`}, events: []string{"admitted"},
	},
	{
		name: "a length over the limit decides at once", plan: classified,
		send:  messages{request(buffered, false, "content-length", "9"), body("123456789", true)},
		want:  []string{"headers" + receipt, "body"},
		calls: []string{`admit POST /x large`}, events: []string{"admitted"},
	},
	{
		name: "a body over the limit against its length", plan: classified,
		send:  messages{request(buffered, false, "content-length", "3"), body("123456789", true)},
		want:  []string{"headers", "body" + receipt},
		calls: []string{`admit POST /x large`}, events: []string{"admitted"},
	},
	{
		name: "without a length there may be no body message: decided at once", plan: classified,
		send:  messages{request(buffered, false), body("abc", true)},
		want:  []string{"headers" + receipt, "body"},
		calls: []string{`admit POST /x large`}, events: []string{"admitted"},
	},
	{
		name: "a length that is none", plan: classified, send: messages{request(buffered, false, "content-length", "3, 3")},
		want: []string{"headers" + receipt}, calls: []string{`admit POST /x large`}, events: []string{"admitted"},
	},
	{
		name: "a length of 0 is no body", plan: classified, send: messages{request(buffered, false, "content-length", "0")},
		want: []string{"headers" + receipt}, calls: []string{`admit POST /x`}, events: []string{"admitted"},
	},
	{
		name: "no body", plan: classified, send: messages{request(buffered, true)},
		want: []string{"headers" + receipt}, calls: []string{`admit POST /x`}, events: []string{"admitted"},
	},
	{
		name: "trailers where the body was expected", plan: classified,
		send:  messages{request(buffered, false, "content-length", "3"), requestTrailers()},
		want:  []string{"headers", "trailers" + receipt},
		calls: []string{`admit POST /x`}, events: []string{"admitted"},
	},
	{
		name: "Envoy sends no body", plan: classified, admit: always(bodyMode),
		send: messages{request(none, false, "content-length", "3")}, want: []string{"refuse 503 knhk_body_mode_mismatch" + receipt},
		calls: []string{`admit POST /x missing`}, events: []string{"body_missing", "refused"},
	},
	{
		name: "Envoy streams the body", plan: classified, admit: always(bodyMode),
		send: messages{request(streamed, false, "content-length", "3")}, want: []string{"refuse 503 knhk_body_mode_mismatch" + receipt},
		calls: []string{`admit POST /x missing`}, events: []string{"body_missing", "refused"},
	},
	{
		name: "the client leaves before its body is there", plan: classified, end: byHalfClose,
		send: messages{request(buffered, false, "content-length", "3")}, want: []string{"headers"},
		calls: []string{`abandon POST /x`}, events: []string{"abandoned"},
	},
	{
		name: "Envoy's own 413 while the body was waited for", plan: classified,
		send:  messages{request(buffered, false, "content-length", "3"), response(false, "413", "request_payload_too_large")},
		want:  []string{"headers", "response-headers"},
		calls: []string{`abandon POST /x`}, events: []string{"abandoned"},
	},
	{
		name: "body of a route that is not classified by it", send: messages{request(buffered, false), body("abc", true), requestTrailers()},
		want: []string{"headers" + receipt, "body", "trailers"}, calls: []string{`admit POST /x`}, events: []string{"admitted"},
	},
	{
		name: "body after a refusal", admit: always(noCredit), send: messages{request(buffered, false), body("abc", true)},
		want: []string{"refuse 429 knhk_no_credit" + receipt, "refuse 503 knhk_internal"}, calls: []string{`admit POST /x`},
		events: []string{"refused", "unexpected"},
	},
	{
		name: "Admit panics over the body", plan: classified,
		admit: func(context.Context, *policy.Request) policy.Decision { panic("as asked") },
		send:  messages{request(buffered, false, "content-length", "3"), body("abc", true)},
		want:  []string{"headers", "refuse 503 knhk_internal"}, calls: []string{`admit POST /x body="abc"`},
		events: []string{"panic", "refused"},
	},
}

var fullShapes = []shape{
	{
		name:   "response without trailers: the access log knows how its body ended",
		send:   messages{request(none, true), response(false, "200", "via_upstream")},
		want:   []string{"headers" + receipt, "response-headers"},
		calls:  []string{"admit POST /x", "finish " + testID + " complete 200/200 via_upstream final=false"},
		events: []string{"admitted"},
	},
	{
		name:   "response without a body",
		send:   messages{request(none, true), response(true, "204", "via_upstream")},
		want:   []string{"headers" + receipt, "response-headers"},
		calls:  []string{"admit POST /x", "finish " + testID + " complete 204/204 via_upstream final=true"},
		events: []string{"admitted"},
	},
	{
		name:   "trailers",
		send:   messages{request(none, true), response(false, "200", "via_upstream"), responseTrailers()},
		want:   []string{"headers" + receipt, "response-headers", "response-trailers"},
		calls:  []string{"admit POST /x", "finish " + testID + " complete 200/200 via_upstream final=true"},
		events: []string{"admitted"},
	},
	{
		name:   "trailers-only, as gRPC servers answer errors",
		send:   messages{request(none, true), response(true, "200", "via_upstream")},
		want:   []string{"headers" + receipt, "response-headers"},
		calls:  []string{"admit POST /x", "finish " + testID + " complete 200/200 via_upstream final=true"},
		events: []string{"admitted"},
	},
	{
		name: "broken off after it began", end: byHalfClose,
		send:   messages{request(none, true), response(false, "200", "via_upstream")},
		want:   []string{"headers" + receipt, "response-headers"},
		calls:  []string{"admit POST /x", "finish " + testID + " aborted 200/200 via_upstream final=false"},
		events: []string{"admitted"},
	},
	{
		name: "broken off before it began: only the access log hears", end: byHalfClose,
		send: messages{request(none, true)}, want: []string{"headers" + receipt},
		calls: []string{"admit POST /x"}, events: []string{"admitted"},
	},
	{
		name: "the upstream was not reached",
		send: messages{request(none, true), response(false, "503", "upstream_reset_before_response_started{connection_failure}")},
		want: []string{"headers" + receipt, "response-headers"},
		calls: []string{"admit POST /x",
			"finish " + testID + " upstream 503/0 upstream_reset_before_response_started{connection_failure} final=false"},
		events: []string{"admitted"},
	},
	{
		name:   "no route",
		send:   messages{request(none, true), response(true, "404", "route_not_found")},
		want:   []string{"headers" + receipt, "response-headers"},
		calls:  []string{"admit POST /x", "finish " + testID + " local_reply 404/0 route_not_found final=true"},
		events: []string{"admitted"},
	},
	{
		name: "excluded: no outcome", plan: Plan{Exclude: true},
		send: messages{request(none, true), response(true, "200", "via_upstream")}, want: []string{"headers", "response-headers"},
		events: []string{"excluded"},
	},
}
