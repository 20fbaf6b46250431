package accesslog

import (
	"bytes"
	"math"
	"strconv"
	"time"
	"unicode/utf8"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/server/envoywire"
)

// Bounds of what is kept of an entry, in bytes.
const (
	maxDetails     = 128
	maxCacheStatus = 256
	maxPath        = 256
	maxNode        = 256
)

// ended reports whether the entry is about a transaction that is over. Envoy can be set to write entries at the begin of a
// transaction and while it runs, and the router has a log of its own about every upstream attempt.
func (e *record) ended() bool {
	if e.intermediate {
		return false
	}
	switch accesslogv3.AccessLogType(e.logType) {
	case accesslogv3.AccessLogType_NotSet:
		return true
	case accesslogv3.AccessLogType_DownstreamEnd:
		return !e.tcp
	case accesslogv3.AccessLogType_TcpConnectionEnd:
		return e.tcp
	}
	return false
}

// names keeps the few names that stand in most entries of a stream, so that each entry does not make its own copies.
type names map[string]string

// maxNames bounds what is kept: names that come from clients must not fill the memory.
const maxNames = 512

// of gives b as a string.
func (n names) of(b []byte) string {
	if s, ok := n[string(b)]; ok {
		return s
	}
	if len(n) >= maxNames {
		clear(n)
	}
	s := string(b)
	n[s] = s
	return s
}

// outcome gives what became of it. Strings are copied, or kept in n.
func (e *record) outcome(n names) (o policy.Outcome) {
	details := n.of(clip(e.details, maxDetails))
	o = policy.Outcome{
		Source:       "als",
		Result:       envoywire.Result(details, e.flags),
		Status:       int(min(e.status, 999)),
		Flags:        e.flags.String(),
		Details:      details,
		Cluster:      n.of(e.cluster),
		UpstreamHost: n.host(&e.remote),
		Attempts:     e.attempts,
		BytesIn:      e.requestBytes,
		BytesOut:     e.responseBytes,
		Duration:     e.lastByte.Duration(),
		CacheStatus:  string(clip(e.cacheStatus, maxCacheStatus)),
	}
	if e.tcp {
		o.Result, o.Duration = envoywire.ConnectionResult(details, e.flags), e.duration.Duration()
		return o
	}
	if envoywire.ServedByUpstream(details) {
		o.UpstreamStatus = o.Status
	}
	if e.lastByte == (duration{}) { // the response did not reach its end, or there was none
		o.Duration = e.duration.Duration()
		// Envoy 1.40 says nothing else of an HTTP/3 client that leaves: no flag, and no details but those of the upstream's answer.
		if e.flags == 0 && e.duration != (duration{}) && (details == "" || details == "via_upstream") {
			o.Result = policy.ResultAborted
		}
	}
	return o
}

// unreceipted gives an entry without receipt id. Strings are copied.
func (e *record) unreceipted(node string, n names) Entry {
	o := e.outcome(n)
	return Entry{
		Node:      node,
		Route:     n.of(e.route),
		Gap:       n.of(e.gap()),
		Reached:   o.UpstreamHost != "",
		Method:    methodName(e.method),
		Authority: string(e.authority),
		Path:      string(clip(e.path, maxPath)),
		RequestID: string(e.requestID),
		Outcome:   o,
	}
}

// methodName gives the method's name; "" when it is none that Envoy has a number for.
func methodName(m int32) string {
	if m == int32(corev3.RequestMethod_METHOD_UNSPECIFIED) {
		return ""
	}
	return corev3.RequestMethod_name[m]
}

// clip gives at most n bytes of b, never half a character of it.
func clip(b []byte, n int) []byte {
	if len(b) > n {
		for n > 0 && !utf8.RuneStart(b[n]) {
			n--
		}
		b = b[:n]
	}
	return b
}

// host is host:port of a socket, the path of a pipe, the name of an internal listener; "" for none.
func (n names) host(a *address) string {
	if a.kind != 1 {
		return n.of(a.host)
	}
	var buf [64]byte
	b := buf[:0]
	if bytes.IndexByte(a.host, ':') >= 0 { // IPv6, as net.JoinHostPort writes it
		b = append(append(append(b, '['), a.host...), ']')
	} else {
		b = append(b, a.host...)
	}
	b = append(b, ':')
	if len(a.namedPort) > 0 {
		b = append(b, a.namedPort...)
	} else {
		b = strconv.AppendUint(b, uint64(a.port), 10)
	}
	return n.of(b)
}

// Duration is d as a Go duration; what is negative or does not fit counts as not told.
func (d duration) Duration() time.Duration {
	if d.seconds < 0 || d.nanos < 0 || d.seconds > math.MaxInt64/int64(time.Second)-1 || d.nanos >= 1e9 {
		return 0
	}
	return time.Duration(d.seconds)*time.Second + time.Duration(d.nanos)
}
