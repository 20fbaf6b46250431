package envoywire

import (
	"strings"

	"github.com/knhk/sidecar/policy"
)

// Result says how a transaction ended, from Envoy's response_code_details and response flags (Envoy's documentation,
// "Response code details", and what 1.40 was seen to send). It is pure. What it does not know it gives as what the flags
// say, else as a local reply: Envoy's filters name their own replies as they like, while upstream responses, resets and
// disconnects have fixed names. No details at all is unknown.
func Result(details string, f Flags) policy.Result {
	name := details
	// Some names carry a cause: upstream_reset_before_response_started{connection_termination}, downstream_local_disconnect(...)
	if i := strings.IndexAny(name, "{(|"); i >= 0 {
		name = name[:i]
	}
	if r, ok := detailResults[name]; ok {
		if r == policy.ResultComplete {
			return interrupted(f, r)
		}
		return r
	}
	for _, p := range codecPrefixes { // the client's side of the codec: it broke the rules or reset the stream
		if strings.HasPrefix(name, p) {
			return codecResult(name, f)
		}
	}
	if details == "" {
		return interrupted(f, policy.ResultUnknown)
	}
	return interrupted(f, policy.ResultLocalReply)
}

// detailResults are the details with one meaning. Everything not listed is a local reply, the two at the end for being
// asked about most.
var detailResults = map[string]policy.Result{
	"via_upstream": policy.ResultComplete,
	// Envoy followed the upstream's redirect itself: this transaction's response was used up, another one follows.
	"internal_redirect": policy.ResultComplete,

	"upstream_reset_before_response_started": policy.ResultUpstream,
	"upstream_reset_after_response_started":  policy.ResultUpstream,
	"no_healthy_upstream":                    policy.ResultUpstream,
	"early_connect_data":                     policy.ResultUpstream,
	"websocket_handshake_unsuccessful":       policy.ResultUpstream,
	"upstream_response_too_large":            policy.ResultUpstream,

	"downstream_remote_disconnect": policy.ResultClientAbort,
	"downstream_remote_reset":      policy.ResultClientAbort,

	// Envoy closed the client's connection: draining, its age, a ping that got no answer, a broken protocol.
	"downstream_local_disconnect": policy.ResultAborted,

	"response_timeout":                     policy.ResultTimeout,
	"upstream_response_timeout":            policy.ResultTimeout,
	"upstream_per_try_timeout":             policy.ResultTimeout,
	"upstream_per_try_idle_timeout":        policy.ResultTimeout,
	"upstream_max_stream_duration_reached": policy.ResultTimeout,
	"stream_idle_timeout":                  policy.ResultTimeout,
	"max_duration_timeout":                 policy.ResultTimeout,
	"duration_timeout":                     policy.ResultTimeout,
	"request_overall_timeout":              policy.ResultTimeout,
	"request_header_timeout":               policy.ResultTimeout,
	"downstream_header_timeout":            policy.ResultTimeout,
	"idle_timeout":                         policy.ResultTimeout,
	// We did not answer within ext_proc's message_timeout.
	"ext_proc_error_per-message_timeout_exceeded": policy.ResultTimeout,

	"route_not_found": policy.ResultLocalReply,
	"direct_response": policy.ResultLocalReply,
}

// codecPrefixes begin the details of Envoy's HTTP codecs.
var codecPrefixes = [...]string{"http1.", "http2.", "http3.", "codec_error", "codec error"}

// codecResult tells a reset by the client, or by the upstream, from a request that Envoy's codec answered.
func codecResult(name string, f Flags) policy.Result {
	if strings.HasSuffix(name, ".remote_reset") || strings.HasSuffix(name, ".remote_refuse") {
		if f.has(FlagUpstreamRemoteReset | FlagUpstreamProtocolError) {
			return policy.ResultUpstream
		}
		return policy.ResultClientAbort
	}
	return interrupted(f, policy.ResultLocalReply)
}

// interrupted corrects r by the flags that say that the response did not reach its end. The client's leaving weighs most:
// what broke off after it broke off because of it.
func interrupted(f Flags, r policy.Result) policy.Result {
	switch {
	case f.has(FlagDownstreamClosed | FlagDownstreamReset):
		return policy.ResultClientAbort
	case f.has(FlagUpstreamTimeout | FlagStreamIdleTimeout | FlagMaxStreamDuration | FlagDurationTimeout):
		return policy.ResultTimeout
	case f.has(FlagUpstreamRemoteReset | FlagUpstreamConnectFailure | FlagUpstreamConnectionClosed | FlagUpstreamProtocolError):
		return policy.ResultUpstream
	}
	return r
}

// ConnectionResult is Result for a TCP connection, from its connection_termination_details. One that ended without a word or a flag is
// complete: TCP does not tell more.
func ConnectionResult(details string, f Flags) policy.Result {
	switch {
	case f.has(FlagUnauthorized):
		return policy.ResultLocalReply
	case f.has(FlagNoHealthyUpstream | FlagNoRoute | FlagNoCluster | FlagUpstreamOverflow):
		return policy.ResultUpstream
	case details != "":
		return interrupted(f, policy.ResultLocalReply)
	}
	return interrupted(f, policy.ResultComplete)
}

// ServedByUpstream reports whether the response code that came with these details was given by the upstream.
func ServedByUpstream(details string) bool {
	return details == "via_upstream" || details == "internal_redirect" ||
		strings.HasPrefix(details, "upstream_reset_after_response_started")
}
