package envoywire

import (
	"context"
	"encoding/hex"

	"google.golang.org/grpc/metadata"
)

// TraceParent is the caller's span as Envoy tells it: in the metadata of the gRPC call, not in the forwarded headers,
// which carry whatever the client sent. Both are zero without a valid traceparent.
func TraceParent(ctx context.Context) (trace [16]byte, span [8]byte) {
	v := metadata.ValueFromIncomingContext(ctx, "traceparent")
	if len(v) != 1 {
		return trace, span
	}
	return parseTraceParent(v[0])
}

// parseTraceParent reads version 00 of a W3C traceparent (Trace Context section 3.2.2): lower-case hex, exact length,
// no all-zero id. Anything else gives zeroes.
func parseTraceParent(s string) (trace [16]byte, span [8]byte) {
	const size = 2 + 1 + 32 + 1 + 16 + 1 + 2
	if len(s) != size || s[:3] != "00-" || s[35] != '-' || s[52] != '-' {
		return trace, span
	}
	for i := range len(s) {
		c := s[i]
		if i != 2 && i != 35 && i != 52 && (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return trace, span
		}
	}
	var t [16]byte
	var p [8]byte
	_, errT := hex.Decode(t[:], []byte(s[3:35]))
	_, errP := hex.Decode(p[:], []byte(s[36:52]))
	if errT != nil || errP != nil || t == trace || p == span {
		return trace, span
	}
	return t, p
}
