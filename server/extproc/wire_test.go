package extproc

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	filterv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/knhk/sidecar/server/envoywire/wiretest"
)

// seen is what a ProcessingRequest says to us, by whichever decoder.
type seen struct {
	phase                           phase
	observability, end              bool
	mode                            int32
	headers                         [8]string // "-" in front: was there
	cache, body                     string
	route, cluster, source, spiffe  string
	upstream, details, attemptsBits string
	decided                         string
	gap                             bool
}

func mark(b []byte) string {
	if b == nil {
		return ""
	}
	return "-" + string(b)
}

// scanned is what our scanner saw.
func scanned(m *message) seen {
	a := &m.attrs
	return seen{
		phase: m.phase, observability: m.observability, end: m.endOfStream, mode: m.requestBodyMode,
		headers: [8]string{mark(m.method), mark(m.scheme), mark(m.authority), mark(m.path), mark(m.requestID),
			mark(m.contentLength), mark(m.status), mark(m.parent)},
		cache: string(m.cacheStatus), body: string(m.body),
		route: string(a.route), cluster: string(a.cluster), source: string(a.source), spiffe: string(a.spiffeID),
		upstream: string(a.upstream), details: string(a.details),
		attemptsBits: fmt.Sprint(math.Float64bits(a.attempts)),
		decided:      string(m.decided.id()), gap: m.decided.gap(),
	}
}

// decoded is what the generated decoder saw, by the rules that message states.
func decoded(p *extprocv3.ProcessingRequest) seen {
	s := seen{observability: p.GetObservabilityMode(), mode: int32(p.GetProtocolConfig().GetRequestBodyMode())}
	var headers *extprocv3.HttpHeaders
	switch r := p.GetRequest().(type) {
	case *extprocv3.ProcessingRequest_RequestHeaders:
		s.phase, headers = phaseRequestHeaders, r.RequestHeaders
	case *extprocv3.ProcessingRequest_ResponseHeaders:
		s.phase, headers = phaseResponseHeaders, r.ResponseHeaders
	case *extprocv3.ProcessingRequest_RequestBody:
		s.phase, s.body, s.end = phaseRequestBody, string(r.RequestBody.GetBody()), r.RequestBody.GetEndOfStream()
	case *extprocv3.ProcessingRequest_ResponseBody:
		s.phase = phaseResponseBody
	case *extprocv3.ProcessingRequest_RequestTrailers:
		s.phase = phaseRequestTrailers
	case *extprocv3.ProcessingRequest_ResponseTrailers:
		s.phase = phaseResponseTrailers
	}
	s.end = s.end || headers.GetEndOfStream()
	names := []string{":method", ":scheme", ":authority", ":path", "x-request-id", "content-length", ":status", HeaderParent}
	var cache []byte
	for _, h := range headers.GetHeaders().GetHeaders() {
		value := h.GetValue()
		if len(h.GetRawValue()) > 0 {
			value = string(h.GetRawValue())
		}
		for i, n := range names {
			switch {
			case n != h.GetKey():
			case s.headers[i] == "":
				s.headers[i] = "-" + value
			case n == HeaderParent:
				s.headers[i] = "-"
			}
		}
		if h.GetKey() == "cache-status" {
			if len(cache) > 0 {
				cache = append(cache, ", "...)
			}
			cache = append(cache, value...)
			cache = cache[:min(len(cache), maxCacheStatus)]
		}
	}
	s.cache = string(cache)
	a := p.GetAttributes()[attributesKey].GetFields()
	s.route, s.cluster = a["xds.route_name"].GetStringValue(), a["xds.cluster_name"].GetStringValue()
	s.source, s.spiffe = a["source.address"].GetStringValue(), a["connection.uri_san_peer_certificate"].GetStringValue()
	s.upstream, s.details = a["upstream.address"].GetStringValue(), a["response.code_details"].GetStringValue()
	s.attemptsBits = fmt.Sprint(math.Float64bits(a["upstream.request_attempt_count"].GetNumberValue()))
	for _, ns := range []string{NamespaceAuthz, Namespace} {
		if s.decided == "" {
			s.decided = p.GetMetadataContext().GetFilterMetadata()[ns].GetFields()[KeyReceipt].GetStringValue()
		}
		s.gap = s.gap || p.GetMetadataContext().GetFilterMetadata()[ns].GetFields()[KeyGap].GetStringValue() != ""
	}
	return s
}

// read lists what the scanner reads, for wiretest.Trim. Maps are opaque beyond their keys: what stands under a key that
// nobody asks for is not read.
var read = func() wiretest.Keep {
	headers := wiretest.Keep{1: {1: {1: nil, 2: nil, 3: nil}}, 3: nil}
	return wiretest.Keep{
		2: headers, 3: headers, 4: {1: nil, 2: nil}, 5: nil, 6: nil, 7: nil, 8: {1: {1: nil, 2: nil}}, 9: {1: nil, 2: nil}, 10: nil, 11: {1: nil},
	}
}()

// differ compares our scanner with the generated decoder on b.
func differ(t *testing.T, m *message, trimmed func([]byte) error, b []byte) {
	t.Helper()
	var p extprocv3.ProcessingRequest
	wantErr := proto.Unmarshal(b, &p)
	err := m.scan(b)
	switch {
	case wantErr == nil && err != nil:
		t.Fatalf("scan: %v; the generated decoder accepts %x", err, b)
	case wantErr == nil:
		if got, want := scanned(m), decoded(&p); got != want {
			t.Fatalf("scan of %x:\n got %+v\nwant %+v", b, got, want)
		}
	case err == nil: // then what is wrong must be something we do not read
		if err := trimmed(b); err != nil {
			t.Fatalf("scan accepts %x, but what it reads is broken: %v", b, err)
		}
	}
}

// trimmed fails on what is wrong with what the scanner reads, the attributes under our key included.
func trimmed(t testing.TB) func([]byte) error {
	t.Helper()
	trim := func(m proto.Message, keep wiretest.Keep) func([]byte) error {
		t.Helper()
		f, err := wiretest.Trim(m.ProtoReflect().Descriptor(), keep)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	message := trim(&extprocv3.ProcessingRequest{}, read)
	fields := trim(&structpb.Struct{}, wiretest.Keep{1: {1: nil, 2: nil}})
	value := trim(&structpb.Value{}, wiretest.Keep{1: nil, 2: nil, 3: nil, 4: nil, 5: nil, 6: nil})
	ours := []string{"xds.route_name", "xds.cluster_name", "source.address", "connection.uri_san_peer_certificate",
		"upstream.address", "response.code_details", "upstream.request_attempt_count"}
	return func(b []byte) error {
		if err := message(b); err != nil {
			return err
		}
		inside := func(entry []byte, names ...string) error {
			for _, st := range pieces(entry, 2) {
				if err := fields(st); err != nil {
					return err
				}
				for _, field := range pieces(st, 1) {
					if !slices.Contains(names, mapKey(field)) {
						continue
					}
					for _, v := range pieces(field, 2) {
						if err := value(v); err != nil {
							return err
						}
					}
				}
			}
			return nil
		}
		for _, meta := range pieces(b, 8) {
			for _, entry := range pieces(meta, 1) {
				if k := mapKey(entry); k != NamespaceAuthz && k != Namespace {
					continue
				}
				if err := inside(entry, KeyReceipt, KeyGap); err != nil {
					return err
				}
			}
		}
		for _, entry := range pieces(b, 9) {
			if mapKey(entry) != attributesKey {
				continue
			}
			if err := inside(entry, ours...); err != nil {
				return err
			}
		}
		return nil
	}
}

// pieces lists the values of a field of the wire type of messages.
func pieces(b []byte, want protowire.Number) (out [][]byte) {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return out
		}
		b = b[n:]
		if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
			return out
		}
		if num == want && typ == protowire.BytesType {
			v, _ := protowire.ConsumeBytes(b)
			out = append(out, v)
		}
		b = b[n:]
	}
	return out
}

// mapKey is the key of a map entry: the last one counts.
func mapKey(entry []byte) string {
	if keys := pieces(entry, 1); len(keys) > 0 {
		return string(keys[len(keys)-1])
	}
	return ""
}

// requestMessage is a request as Envoy sends it.
func requestMessage() *extprocv3.ProcessingRequest {
	var headers []*corev3.HeaderValue
	for _, h := range [][2]string{
		{":authority", "shop.example.com"}, {":path", "/cart/items?id=17"}, {":method", "GET"}, {":scheme", "https"},
		{"user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"}, {"accept", "*/*"},
		{"accept-encoding", "gzip, deflate, br, zstd"}, {"cookie", "session=" + strings.Repeat("s", 120)},
		{"x-forwarded-for", "10.0.0.7"}, {"x-forwarded-proto", "https"},
		{"x-request-id", "55bd02a2-cbe4-4285-8ead-9f4268d68d32"}, {"x-envoy-expected-rq-timeout-ms", "15000"},
	} {
		headers = append(headers, &corev3.HeaderValue{Key: h[0], RawValue: []byte(h[1])})
	}
	return &extprocv3.ProcessingRequest{
		Request: &extprocv3.ProcessingRequest_RequestHeaders{RequestHeaders: &extprocv3.HttpHeaders{
			Headers: &corev3.HeaderMap{Headers: headers}, EndOfStream: true,
		}},
		Attributes: map[string]*structpb.Struct{attributesKey: {Fields: map[string]*structpb.Value{
			"xds.route_name":                      structpb.NewStringValue("cart"),
			"xds.cluster_name":                    structpb.NewStringValue("cart-v2"),
			"source.address":                      structpb.NewStringValue("10.0.0.7:53150"),
			"connection.uri_san_peer_certificate": structpb.NewStringValue("spiffe://example.com/ns/shop/sa/web"),
		}}},
		ProtocolConfig: &extprocv3.ProtocolConfiguration{RequestBodyMode: filterv3.ProcessingMode_BUFFERED},
	}
}

// seeds are wire bytes with a point to them.
func seeds(t testing.TB) [][]byte {
	t.Helper()
	enc := func(m proto.Message) []byte {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	req := enc(requestMessage())
	resp := enc(&extprocv3.ProcessingRequest{
		Request: &extprocv3.ProcessingRequest_ResponseHeaders{ResponseHeaders: &extprocv3.HttpHeaders{Headers: &corev3.HeaderMap{
			Headers: []*corev3.HeaderValue{{Key: ":status", Value: "200"}, {Key: "cache-status", RawValue: []byte("a; hit")},
				{Key: "cache-status", RawValue: []byte("b; fwd=miss")}},
		}}},
		Attributes: map[string]*structpb.Struct{attributesKey: {Fields: map[string]*structpb.Value{
			"upstream.request_attempt_count": structpb.NewNumberValue(2), "upstream.address": structpb.NewStringValue("10.1.1.1:80"),
			"response.code_details": structpb.NewStringValue("via_upstream"),
		}}},
	})
	body := enc(&extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_RequestBody{
		RequestBody: &extprocv3.HttpBody{Body: []byte("\xffbytes"), EndOfStream: true},
	}})
	meta := enc(&extprocv3.ProcessingRequest{MetadataContext: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
		NamespaceAuthz: {Fields: map[string]*structpb.Value{KeyReceipt: structpb.NewStringValue(testID), "class": structpb.NewStringValue("W1")}},
		Namespace:      {Fields: map[string]*structpb.Value{KeyReceipt: structpb.NewStringValue("x"), KeyGap: structpb.NewStringValue("log_full")}},
	}}})
	join := func(parts ...[]byte) []byte {
		var out []byte
		for _, p := range parts {
			out = append(out, p...)
		}
		return out
	}
	// attribute is a message with one attribute of ours, whose map entry ends with rest.
	attribute := func(rest string) []byte {
		field := append(protowire.AppendString([]byte{0x0a}, "source.address"), rest...)
		fields := protowire.AppendBytes([]byte{0x0a}, field)
		entry := protowire.AppendString([]byte{0x0a}, attributesKey)
		entry = protowire.AppendBytes(append(entry, 0x12), fields)
		return protowire.AppendBytes([]byte{0x4a}, entry)
	}
	return [][]byte{
		nil, req, resp, body,
		meta, join(req, meta), join(meta, meta, req, body), meta[:len(meta)-1],
		join(req, req),                    // the same member twice: merged
		join(req, body, req),              // another member between: forgotten
		join(req, resp),                   // last member wins, attributes of the last
		req[:len(req)-1],                  // cut off
		{0x12, 0x00},                      // empty headers
		{0x10, 0x01, 0x12, 0x00},          // the member's number with the wire type of a varint first
		{0x50, 0x80, 0x80, 0x80, 0x10},    // observability_mode by a long varint
		attribute("\x12\x01\x1a"),         // one of ours is cut off inside
		attribute("\x12\x03\x1a\x01\xff"), // one of ours is not UTF-8
		{0x0b, 0x0c},                      // an empty group
		{0x14},                            // the end of a group that never began
		{0xfa, 0xff, 0xff, 0xff, 0x7f, 0}, // a field number beyond the last valid one
	}
}

// TestScanAgreesWithGenerated runs the scanner and the generated decoder over many nearly valid messages.
func TestScanAgreesWithGenerated(t *testing.T) {
	trim := trimmed(t)
	var m message
	for _, b := range seeds(t) {
		differ(t, &m, trim, b)
	}
	md := (&extprocv3.ProcessingRequest{}).ProtoReflect().Descriptor()
	g := wiretest.Generator{
		Rand: rand.New(rand.NewPCG(1, 2)),
		Words: []string{"", "a", ":method", ":path", ":scheme", ":authority", ":status", "x-request-id", "content-length",
			"cache-status", HeaderParent, NamespaceAuthz, Namespace, KeyReceipt, KeyGap, attributesKey, attributesKey, attributesKey, "xds.route_name", "xds.cluster_name", "source.address",
			"connection.uri_san_peer_certificate", "upstream.address", "response.code_details", "upstream.request_attempt_count",
			strings.Repeat("long", 40)},
		Prefer: map[protoreflect.FullName][]protoreflect.FieldNumber{
			md.FullName():                           {2, 3, 4, 7, 8, 8, 9, 9, 9, 10, 11},
			"envoy.config.core.v3.Metadata":         {1},
			"envoy.service.ext_proc.v3.HttpHeaders": {1, 1, 3},
			"google.protobuf.Value":                 {2, 3, 3},
		},
	}
	n := 100_000
	if testing.Short() {
		n = 20_000
	}
	for range n {
		differ(t, &m, trim, g.Message(md))
	}
}

func FuzzScan(f *testing.F) {
	for _, b := range seeds(f) {
		f.Add(b)
	}
	trim := trimmed(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		var m message
		differ(t, &m, trim, b)
	})
}

// TestScanAllocatesNothing keeps the scanner off the heap once its buffers have grown.
func TestScanAllocatesNothing(t *testing.T) {
	b, err := proto.Marshal(requestMessage())
	if err != nil {
		t.Fatal(err)
	}
	var m message
	if n := testing.AllocsPerRun(100, func() {
		if err := m.scan(b); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("scan: %v allocations, want none", n)
	}
}

func TestNumbers(t *testing.T) {
	for _, c := range []struct {
		in   string
		want int64
		ok   bool
	}{
		{"0", 0, true}, {"17", 17, true}, {"999999999999999999", 999999999999999999, true},
		{"", 0, false}, {"-1", 0, false}, {"+1", 0, false}, {"1 ", 0, false}, {"1e3", 0, false}, {"1,1", 0, false},
		{"1000000000000000000", 0, false}, // 19 digits: no body is that long
	} {
		if got, ok := parseUint([]byte(c.in)); ok != c.ok || ok && got != c.want {
			t.Errorf("parseUint(%q) = %d, %v, want %d, %v", c.in, got, ok, c.want, c.ok)
		}
	}
	for in, want := range map[string]int{"200": 200, "503": 503, "": 0, "20": 0, "2000": 0, "2x0": 0, "-20": 0} {
		if got := statusCode([]byte(in)); got != want {
			t.Errorf("statusCode(%q) = %d, want %d", in, got, want)
		}
	}
}

func BenchmarkScan(b *testing.B) {
	frame, err := proto.Marshal(requestMessage())
	if err != nil {
		b.Fatal(err)
	}
	b.Run("scanner", func(b *testing.B) {
		b.ReportAllocs()
		var m message
		for b.Loop() {
			if err := m.scan(frame); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("generated", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var p extprocv3.ProcessingRequest
			if err := proto.Unmarshal(frame, &p); err != nil {
				b.Fatal(err)
			}
		}
	})
}
