package envoywire_test

import (
	"testing"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/server/envoywire"
)

const (
	complete = policy.ResultComplete
	local    = policy.ResultLocalReply
	upstream = policy.ResultUpstream
	client   = policy.ResultClientAbort
	timeout  = policy.ResultTimeout
	aborted  = policy.ResultAborted
	unknown  = policy.ResultUnknown
)

// TestResult: rows marked "seen" are what Envoy 1.40.0 sent for that case; the others are from its documentation and source.
func TestResult(t *testing.T) {
	for _, c := range []struct {
		details string
		flags   envoywire.Flags
		want    policy.Result
	}{
		{"via_upstream", 0, complete},      // seen
		{"internal_redirect", 0, complete}, // seen: the first of two transactions
		{"via_upstream", envoywire.FlagDownstreamClosed, client},
		{"via_upstream", envoywire.FlagDownstreamReset, client},
		{"via_upstream", envoywire.FlagStreamIdleTimeout, timeout},
		{"via_upstream", envoywire.FlagUpstreamRemoteReset, upstream},
		{"via_upstream", envoywire.FlagDownstreamClosed | envoywire.FlagUpstreamRemoteReset, client}, // the client's leaving weighs most

		{"upstream_reset_before_response_started{connection_termination}", envoywire.FlagUpstreamConnectionClosed, upstream},         // seen
		{"upstream_reset_before_response_started{remote_connection_failure|delayed_connect_error:_Connection_refused}", 0, upstream}, // seen
		{"upstream_reset_before_response_started", 0, upstream},
		{"upstream_reset_after_response_started{protocol_error}", envoywire.FlagUpstreamProtocolError, upstream}, // seen
		{"upstream_reset_after_response_started{remote_reset}", envoywire.FlagUpstreamRemoteReset, upstream},     // seen
		{"no_healthy_upstream", 1 << 2, upstream},
		{"websocket_handshake_unsuccessful", 0, upstream}, // seen

		{"downstream_remote_disconnect", envoywire.FlagDownstreamClosed, client}, // seen: before, while and after parking
		{"downstream_remote_reset", envoywire.FlagDownstreamReset, client},
		{"http2.remote_reset", envoywire.FlagDownstreamReset, client},
		{"http2.remote_refuse", 0, client},
		{"http2.remote_reset", envoywire.FlagUpstreamRemoteReset, upstream},
		{"downstream_local_disconnect(max_connection_duration_reached)", 0, aborted},
		{"downstream_local_disconnect", 0, aborted},

		{"response_timeout", envoywire.FlagUpstreamTimeout, timeout}, // seen, before and after the response began
		{"upstream_response_timeout", envoywire.FlagUpstreamTimeout, timeout},
		{"upstream_per_try_timeout", envoywire.FlagUpstreamTimeout, timeout},
		{"upstream_per_try_idle_timeout", 0, timeout},
		{"upstream_max_stream_duration_reached", envoywire.FlagMaxStreamDuration, timeout},
		{"stream_idle_timeout", envoywire.FlagStreamIdleTimeout, timeout},
		{"max_duration_timeout", 0, timeout},
		{"duration_timeout", envoywire.FlagDurationTimeout, timeout},
		{"request_overall_timeout", 0, timeout},
		{"request_header_timeout", 0, timeout},
		{"ext_proc_error_per-message_timeout_exceeded", 0, timeout}, // seen: we did not answer in time

		{"route_not_found", 1 << 9, local}, // seen
		{"direct_response", 0, local},      // seen
		{"cluster_not_found", 0, local},
		{"knhk_no_credit", 0, local},                // seen
		{"knhk_internal", 0, local},                 // seen
		{"missing_host_header", 0, local},           // seen
		{"low_version", 1 << 19, local},             // seen
		{"http1.codec_error", 1 << 19, local},       // seen
		{"http1.headers_too_large", 1 << 19, local}, // seen: 431
		{"http2.violation.of.messaging.rule", 1 << 19, local},
		{"request_headers_too_large", 0, local},
		{"request_payload_too_large", 0, local}, // seen: 413
		{"ext_proc_error_gRPC_error_14", 0, local},
		{"ext_authz_denied", 1 << 13, local},
		{"rbac_access_denied_matched_policy[none]", 0, local},
		{"maintenance_mode", 0, local},
		{"a_filter_of_tomorrow", 0, local},
		{"a_filter_of_tomorrow", envoywire.FlagDownstreamClosed, client},

		{"", 0, unknown},
		{"", envoywire.FlagDownstreamClosed, client},
		{"", envoywire.FlagUpstreamConnectFailure, upstream},
	} {
		if got := envoywire.Result(c.details, c.flags); got != c.want {
			t.Errorf("Result(%q, %q) = %s, want %s", c.details, c.flags, got, c.want)
		}
	}
}

func TestServedByUpstream(t *testing.T) {
	for details, want := range map[string]bool{
		"via_upstream": true, "internal_redirect": true, "upstream_reset_after_response_started{remote_reset}": true,
		"upstream_reset_before_response_started{remote_reset}": false, "direct_response": false, "": false, "knhk_internal": false,
	} {
		if got := envoywire.ServedByUpstream(details); got != want {
			t.Errorf("ServedByUpstream(%q) = %v, want %v", details, got, want)
		}
	}
}

// TestFlagsKnowAllFields: every flag that go-control-plane knows has a short name, and each bool reads as one flag.
func TestFlagsKnowAllFields(t *testing.T) {
	fields := (&accesslogv3.ResponseFlags{}).ProtoReflect().Descriptor().Fields()
	seen := map[string]bool{}
	for i := range fields.Len() {
		f := fields.Get(i)
		var b []byte
		if f.Kind() == protoreflect.MessageKind {
			b = protowire.AppendBytes(protowire.AppendTag(nil, f.Number(), protowire.BytesType), nil)
		} else {
			b = protowire.AppendVarint(protowire.AppendTag(nil, f.Number(), protowire.VarintType), 1)
		}
		var flags envoywire.Flags
		if err := flags.Scan(b); err != nil {
			t.Fatal(err)
		}
		if name := flags.String(); name == "" || seen[name] {
			t.Errorf("%s (%d) has the name %q", f.Name(), f.Number(), name)
		} else {
			seen[name] = true
		}
	}
}

func TestFlagsString(t *testing.T) {
	flags := envoywire.FlagUpstreamConnectFailure | envoywire.FlagDownstreamClosed | 1<<16
	if got, want := flags.String(), "UF,DC,URX"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	// A flag that is taken back in a later piece is not set.
	var f envoywire.Flags
	if err := f.Scan([]byte{6 << 3, 1, 6 << 3, 0, 0xfa, 0x07, 0x00}); err != nil || f != 0 {
		t.Errorf("got %q, %v", f, err)
	}
}

func TestConnectionResult(t *testing.T) {
	for _, c := range []struct {
		details string
		flags   envoywire.Flags
		want    policy.Result
	}{
		{"", 0, policy.ResultComplete}, // TCP does not say who closed first
		{"", envoywire.FlagUnauthorized, policy.ResultLocalReply},
		{"", envoywire.FlagNoHealthyUpstream, policy.ResultUpstream},
		{"", envoywire.FlagUpstreamConnectFailure, policy.ResultUpstream},
		{"", envoywire.FlagDownstreamClosed, policy.ResultClientAbort},
		{"", envoywire.FlagUpstreamRemoteReset, policy.ResultUpstream},
		{"", envoywire.FlagStreamIdleTimeout, policy.ResultTimeout},
		{"rbac_access_denied", 0, policy.ResultLocalReply},
	} {
		if got := envoywire.ConnectionResult(c.details, c.flags); got != c.want {
			t.Errorf("%q, flags %v: %v, want %v", c.details, c.flags, got, c.want)
		}
	}
}
