package accesslog

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/knhk/sidecar/server/envoywire/wiretest"
)

// sawEntry is what an HTTPAccessLogEntry says to us, by whichever decoder.
type sawEntry struct {
	remote, cluster, flags, receipt, gap, route string
	attempts                                    uint32
	intermediate                                bool
	logType, method                             int32
	seconds, durationSeconds                    int64
	nanos, durationNanos                        int32
	authority, path, requestID, cache, details  string
	requestBytes, responseBytes                 uint64
	status                                      uint32
}

func scannedEntry(e *record) sawEntry {
	return sawEntry{
		remote: fmt.Sprintf("%d %q %d %q", e.remote.kind, e.remote.host, e.remote.port, e.remote.namedPort), cluster: string(e.cluster),
		flags: e.flags.String(), receipt: receipts(e), gap: string(e.gap()), route: string(e.route), attempts: e.attempts,
		intermediate: e.intermediate, logType: e.logType, method: e.method, seconds: e.lastByte.seconds, nanos: e.lastByte.nanos,
		durationSeconds: e.duration.seconds, durationNanos: e.duration.nanos,
		authority: string(e.authority), path: string(e.path), requestID: string(e.requestID), cache: string(e.cacheStatus),
		details: string(e.details), requestBytes: e.requestBytes, responseBytes: e.responseBytes, status: e.status,
	}
}

// receipts are the ids in all namespaces.
func receipts(e *record) (out string) {
	for i := range e.told {
		out += string(e.told[i].receipt) + " "
	}
	return out
}

func decodedEntry(p *datav3.HTTPAccessLogEntry) sawEntry {
	c, req, resp := p.GetCommonProperties(), p.GetRequest(), p.GetResponse()
	remote := `0 "" 0 ""`
	switch a := c.GetUpstreamRemoteAddress().GetAddress().(type) {
	case *corev3.Address_SocketAddress:
		remote = fmt.Sprintf("1 %q %d %q", a.SocketAddress.GetAddress(), a.SocketAddress.GetPortValue(), a.SocketAddress.GetNamedPort())
	case *corev3.Address_Pipe:
		remote = fmt.Sprintf(`2 %q 0 ""`, a.Pipe.GetPath())
	case *corev3.Address_EnvoyInternalAddress:
		remote = fmt.Sprintf(`3 %q 0 ""`, a.EnvoyInternalAddress.GetServerListenerName())
	}
	var receipt, gap string
	for _, ns := range []string{"envoy.filters.http.ext_authz", "knhk", "envoy.filters.network.ext_authz"} {
		meta := c.GetMetadata().GetFilterMetadata()[ns].GetFields()
		receipt += meta[keyReceipt].GetStringValue() + " "
		if gap == "" {
			gap = meta[keyGap].GetStringValue()
		}
	}
	d := c.GetTimeToLastDownstreamTxByte()
	s := sawEntry{
		remote: remote, cluster: c.GetUpstreamCluster(), route: c.GetRouteName(), attempts: c.GetUpstreamRequestAttemptCount(),
		receipt: receipt, gap: gap,
		intermediate: c.GetIntermediateLogEntry(), logType: int32(c.GetAccessLogType()), method: int32(req.GetRequestMethod()),
		seconds: d.GetSeconds(), nanos: d.GetNanos(), durationSeconds: c.GetDuration().GetSeconds(), durationNanos: c.GetDuration().GetNanos(),
		authority: req.GetAuthority(), path: req.GetPath(), requestID: req.GetRequestId(),
		cache: resp.GetResponseHeaders()["cache-status"], details: resp.GetResponseCodeDetails(),
		requestBytes: req.GetRequestBodyBytes(), responseBytes: resp.GetResponseBodyBytes(), status: resp.GetResponseCode().GetValue(),
	}
	var flags []string
	f := c.GetResponseFlags().ProtoReflect()
	for i := range f.Descriptor().Fields().Len() {
		fd := f.Descriptor().Fields().Get(i)
		if f.IsValid() && f.Has(fd) {
			flags = append(flags, shortNames[fd.Name()])
		}
	}
	s.flags = strings.Join(flags, ",")
	return s
}

// shortNames is written out from Envoy's documentation of %RESPONSE_FLAGS%, apart from the table under test.
var shortNames = map[protoreflect.Name]string{
	"failed_local_healthcheck": "LH", "no_healthy_upstream": "UH", "upstream_request_timeout": "UT", "local_reset": "LR",
	"upstream_remote_reset": "UR", "upstream_connection_failure": "UF", "upstream_connection_termination": "UC",
	"upstream_overflow": "UO", "no_route_found": "NR", "delay_injected": "DI", "fault_injected": "FI", "rate_limited": "RL",
	"unauthorized_details": "UAEX", "rate_limit_service_error": "RLSE", "downstream_connection_termination": "DC",
	"upstream_retry_limit_exceeded": "URX", "stream_idle_timeout": "SI", "invalid_envoy_request_headers": "IH",
	"downstream_protocol_error": "DPE", "upstream_max_stream_duration_reached": "UMSDR", "response_from_cache_filter": "RFCF",
	"no_filter_config_found": "NFCF", "duration_timeout": "DT", "upstream_protocol_error": "UPE", "no_cluster_found": "NC",
	"overload_manager": "OM", "dns_resolution_failure": "DF", "downstream_remote_reset": "DR",
}

// What the scanners read, for wiretest.Trim. Maps are opaque beyond the keys that are looked for.
var (
	readEntry = wiretest.Keep{
		1: {12: {1: nil, 2: nil}, 13: {1: {2: nil, 3: nil, 4: nil}, 2: {1: nil}, 3: {1: nil}}, 15: nil, 16: {1: nil, 13: nil},
			17: {1: {1: nil, 2: nil}}, 19: nil, 24: nil, 27: nil, 33: nil},
		3: {1: nil, 3: nil, 5: nil, 9: nil, 12: nil},
		4: {1: {1: nil}, 3: nil, 4: {1: nil, 2: nil}, 6: nil},
	}
	readBatch = wiretest.Keep{1: {1: {1: nil}}, 2: {1: nil}, 3: {1: nil}}
)

func trimmed(t testing.TB, m proto.Message, keep wiretest.Keep) func([]byte) error {
	t.Helper()
	f, err := wiretest.Trim(m.ProtoReflect().Descriptor(), keep)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// differ compares our scanners with the generated decoder: b as an entry, and as a message.
func differ(t *testing.T, trimEntry, trimBatch func([]byte) error, b []byte) {
	t.Helper()
	var p datav3.HTTPAccessLogEntry
	var e record
	wantErr, err := proto.Unmarshal(b, &p), e.scan(b)
	switch {
	case wantErr == nil && err != nil:
		t.Fatalf("entry: %v; the generated decoder accepts %x", err, b)
	case wantErr == nil:
		if got, want := scannedEntry(&e), decodedEntry(&p); got != want {
			t.Fatalf("entry %x:\n got %+v\nwant %+v", b, got, want)
		}
	case err == nil:
		if err := trimEntry(b); err != nil {
			t.Fatalf("entry %x is accepted, but what is read of it is broken: %v", b, err)
		}
	}

	var m alsv3.StreamAccessLogsMessage
	var s batch
	wantErr, err = proto.Unmarshal(b, &m), s.scan(b)
	switch {
	case wantErr == nil && err != nil:
		t.Fatalf("message: %v; the generated decoder accepts %x", err, b)
	case wantErr == nil:
		got := fmt.Sprintf("%v %q %v %d", s.identified, s.node, s.tcp, len(s.entries))
		want := fmt.Sprintf("%v %q %v %d", m.GetIdentifier() != nil, m.GetIdentifier().GetNode().GetId(),
			m.GetTcpLogs() != nil, len(m.GetHttpLogs().GetLogEntry())+len(m.GetTcpLogs().GetLogEntry()))
		if got != want {
			t.Fatalf("message %x:\n got %s\nwant %s", b, got, want)
		}
		for i, entry := range m.GetTcpLogs().GetLogEntry() {
			if err := e.scanTCP(s.entries[i]); err != nil {
				t.Fatalf("entry %d of %x: %v", i, b, err)
			}
			want := decodedEntry(&datav3.HTTPAccessLogEntry{CommonProperties: entry.GetCommonProperties()})
			want.requestBytes, want.responseBytes = entry.GetConnectionProperties().GetReceivedBytes(), entry.GetConnectionProperties().GetSentBytes()
			want.details = entry.GetCommonProperties().GetConnectionTerminationDetails()
			if got := scannedEntry(&e); got != want {
				t.Fatalf("entry %d of %x:\n got %+v\nwant %+v", i, b, got, want)
			}
		}
		for i, entry := range m.GetHttpLogs().GetLogEntry() {
			if err := e.scan(s.entries[i]); err != nil {
				t.Fatalf("entry %d of %x: %v", i, b, err)
			}
			if got, want := scannedEntry(&e), decodedEntry(entry); got != want {
				t.Fatalf("entry %d of %x:\n got %+v\nwant %+v", i, b, got, want)
			}
		}
	case err == nil:
		if err := trimBatch(b); err != nil {
			t.Fatalf("message %x is accepted, but what is read of it is broken: %v", b, err)
		}
	}
}

// logEntry is an entry as Envoy sends it.
func logEntry() *datav3.HTTPAccessLogEntry {
	socket := func(host string, port uint32) *corev3.Address {
		return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
			Address: host, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
		}}}
	}
	return &datav3.HTTPAccessLogEntry{
		CommonProperties: &datav3.AccessLogCommon{
			DownstreamRemoteAddress: socket("10.0.0.7", 53150), DownstreamLocalAddress: socket("10.0.0.1", 443),
			TimeToLastRxByte: durationpb.New(time.Microsecond), TimeToLastDownstreamTxByte: durationpb.New(1500 * time.Microsecond),
			Duration:              durationpb.New(1600 * time.Microsecond),
			UpstreamRemoteAddress: socket("10.1.1.1", 8080), UpstreamLocalAddress: socket("10.0.0.1", 40000), UpstreamCluster: "cart-v2",
			ResponseFlags: &datav3.ResponseFlags{UpstreamRetryLimitExceeded: true},
			Metadata: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
				Namespace: {Fields: map[string]*structpb.Value{
					keyReceipt: structpb.NewStringValue(testID), "class": structpb.NewStringValue("W1"),
				}},
				"other": {Fields: map[string]*structpb.Value{keyReceipt: structpb.NewStringValue("not this one")}},
			}},
			RouteName: "cart", UpstreamRequestAttemptCount: 2, AccessLogType: datav3.AccessLogType_DownstreamEnd,
		},
		Request: &datav3.HTTPRequestProperties{
			RequestMethod: corev3.RequestMethod_GET, Authority: "shop.example.com", Path: "/cart", RequestId: "rid", RequestBodyBytes: 3,
		},
		Response: &datav3.HTTPResponseProperties{
			ResponseCode: wrapperspb.UInt32(200), ResponseBodyBytes: 5, ResponseCodeDetails: "via_upstream",
			ResponseHeaders: map[string]string{"cache-status": "c; hit"},
		},
	}
}

// tcpEntry is the entry of a connection that ext_authz let pass.
func tcpEntry() *datav3.TCPAccessLogEntry {
	c := logEntry().GetCommonProperties()
	c.Metadata.FilterMetadata = map[string]*structpb.Struct{NamespaceAuthzConn: {Fields: map[string]*structpb.Value{
		keyReceipt: structpb.NewStringValue(testID)}}}
	c.RouteName, c.ResponseFlags, c.AccessLogType = "", nil, datav3.AccessLogType_TcpConnectionEnd
	return &datav3.TCPAccessLogEntry{CommonProperties: c, ConnectionProperties: &datav3.ConnectionProperties{ReceivedBytes: 7, SentBytes: 9}}
}

const testID = "01932c5e-8a4b-7c3d-9e2f-112233445566.a"

func httpLogs(entries ...*datav3.HTTPAccessLogEntry) *alsv3.StreamAccessLogsMessage {
	return &alsv3.StreamAccessLogsMessage{LogEntries: &alsv3.StreamAccessLogsMessage_HttpLogs{
		HttpLogs: &alsv3.StreamAccessLogsMessage_HTTPAccessLogEntries{LogEntry: entries},
	}}
}

func identified(m *alsv3.StreamAccessLogsMessage, node string) *alsv3.StreamAccessLogsMessage {
	m.Identifier = &alsv3.StreamAccessLogsMessage_Identifier{Node: &corev3.Node{Id: node, Cluster: "c"}, LogName: "k"}
	return m
}

func seeds(t testing.TB) [][]byte {
	t.Helper()
	enc := func(m proto.Message) []byte {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	entry := enc(logEntry())
	logs := enc(identified(httpLogs(logEntry(), logEntry()), "n1"))
	tcp := enc(&alsv3.StreamAccessLogsMessage{LogEntries: &alsv3.StreamAccessLogsMessage_TcpLogs{
		TcpLogs: &alsv3.StreamAccessLogsMessage_TCPAccessLogEntries{LogEntry: []*datav3.TCPAccessLogEntry{{}, tcpEntry()}},
	}})
	out := [][]byte{nil, entry, append(append([]byte(nil), entry...), entry...), logs, tcp, entry[:len(entry)-2], {0x0b, 0x0c}, {0x14}}
	return append(out, append(append([]byte(nil), logs...), tcp...), append(append([]byte(nil), tcp...), logs...))
}

// TestScanAgreesWithGenerated runs the scanners and the generated decoder over many nearly valid entries and messages.
func TestScanAgreesWithGenerated(t *testing.T) {
	trimEntry := trimmed(t, &datav3.HTTPAccessLogEntry{}, readEntry)
	trimBatch := trimmed(t, &alsv3.StreamAccessLogsMessage{}, readBatch)
	for _, b := range seeds(t) {
		differ(t, trimEntry, trimBatch, b)
	}
	g := wiretest.Generator{
		Rand: rand.New(rand.NewPCG(5, 6)),
		Words: []string{"", "a", Namespace, Namespace, NamespaceAuthz, NamespaceAuthzConn, keyReceipt, keyReceipt, keyGap, "cache-status", "other",
			"via_upstream", strings.Repeat("long", 40)},
		Prefer: map[protoreflect.FullName][]protoreflect.FieldNumber{
			"envoy.data.accesslog.v3.HTTPAccessLogEntry":         {1, 1, 1, 3, 4},
			"envoy.data.accesslog.v3.AccessLogCommon":            {12, 13, 13, 15, 16, 17, 17, 17, 19, 24, 27, 33},
			"envoy.data.accesslog.v3.HTTPRequestProperties":      {1, 3, 5, 9, 12},
			"envoy.data.accesslog.v3.HTTPResponseProperties":     {1, 3, 4, 6},
			"envoy.config.core.v3.Metadata":                      {1},
			"google.protobuf.Value":                              {3},
			"envoy.service.accesslog.v3.StreamAccessLogsMessage": {1, 2, 2, 3, 3},
			"envoy.config.core.v3.Node":                          {1},
		},
	}
	n := 25_000
	if testing.Short() {
		n = 2_000
	}
	entry := (&datav3.HTTPAccessLogEntry{}).ProtoReflect().Descriptor()
	message := (&alsv3.StreamAccessLogsMessage{}).ProtoReflect().Descriptor()
	for range n {
		differ(t, trimEntry, trimBatch, g.Message(entry))
		differ(t, trimEntry, trimBatch, g.Message(message))
	}
}

func FuzzScan(f *testing.F) {
	for _, b := range seeds(f) {
		f.Add(b)
	}
	trimEntry := trimmed(f, &datav3.HTTPAccessLogEntry{}, readEntry)
	trimBatch := trimmed(f, &alsv3.StreamAccessLogsMessage{}, readBatch)
	f.Fuzz(func(t *testing.T, b []byte) { differ(t, trimEntry, trimBatch, b) })
}

func BenchmarkScan(b *testing.B) {
	frame, err := proto.Marshal(logEntry())
	if err != nil {
		b.Fatal(err)
	}
	b.Run("scanner", func(b *testing.B) {
		b.ReportAllocs()
		var e record
		for b.Loop() {
			if err := e.scan(frame); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("scanner and outcome", func(b *testing.B) {
		b.ReportAllocs()
		var e record
		kept := names{}
		for b.Loop() {
			if err := e.scan(frame); err != nil {
				b.Fatal(err)
			}
			if o := e.outcome(kept); !e.receipted() || o.Status == 0 {
				b.Fatal("no id")
			}
		}
	})
	b.Run("generated", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var p datav3.HTTPAccessLogEntry
			if err := proto.Unmarshal(frame, &p); err != nil {
				b.Fatal(err)
			}
		}
	})
}
