package extproc

import (
	"bytes"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/knhk/sidecar/server/envoywire"
)

// phase is the part of an HTTP exchange that a ProcessingRequest carries: the field number in its oneof, 0 for none.
type phase uint8

// The phases, by their field numbers in envoy.service.ext_proc.v3.ProcessingRequest.
const (
	phaseNone             phase = 0
	phaseRequestHeaders   phase = 2
	phaseResponseHeaders  phase = 3
	phaseRequestBody      phase = 4
	phaseResponseBody     phase = 5
	phaseRequestTrailers  phase = 6
	phaseResponseTrailers phase = 7
)

// Body modes of envoy.extensions.filters.http.ext_proc.v3.ProcessingMode.BodySendMode that we can decide on.
const (
	bodyBuffered        = 2
	bodyBufferedPartial = 3
)

// attributesKey is the key under which Envoy sends the attributes, whatever the filter is called in its configuration.
const attributesKey = "envoy.filters.http.ext_proc"

// maxCacheStatus bounds the joined Cache-Status values, in bytes.
const maxCacheStatus = 256

// message is what we read of one ProcessingRequest. Its slices point into the frame it was scanned from, except
// cacheStatus. A nil slice means that the field was not there.
//
// Headers that stand more than once: the first counts, for pseudo-headers as for the others. Envoy rejects repeated
// pseudo-headers and joins repeated x-request-id values itself, so that this only decides what a broken sender gets. The
// exceptions are cache-status, a list by RFC 9211, whose values are joined with ", " up to maxCacheStatus bytes, and the parent, of which
// several are none.
type message struct {
	phase         phase
	observability bool

	// protocol_config, sent with the first message of a stream.
	requestBodyMode int32

	// HttpHeaders
	method, scheme, authority, path []byte
	requestID, contentLength        []byte
	parent                          []byte
	status                          []byte
	cacheStatus                     []byte
	// HttpHeaders and HttpBody
	endOfStream bool
	// HttpBody
	body []byte

	attrs   attributes
	decided decided
}

// decided are the receipt ids in the dynamic metadata that filters before this one left: Envoy sends them if their namespaces stand in
// metadata_options.forwarding_namespaces.
type decided struct {
	authz, own receiptID // by ext_authz; by another ext_proc
}

// id is the one that counts: on a redirect that Envoy follows itself nothing stays of the first request's (Envoy 1.40), but if it did it
// would be our own.
func (d *decided) id() []byte {
	if len(d.authz.text) > 0 {
		return d.authz.text
	}
	return d.own.text
}

// gap: one of them let the request pass without a receipt.
func (d *decided) gap() bool { return d.authz.gap || d.own.gap }

// attributes are the values that `knhk bootstrap` has Envoy send, request and response side together.
type attributes struct {
	route, cluster, source, spiffeID []byte
	upstream, details                []byte // upstream.address, response.code_details
	attempts                         float64
}

// reset empties m for the next scan and keeps its buffer.
func (m *message) reset() { *m = message{cacheStatus: m.cacheStatus[:0]} }

// clearPart forgets the phase's content: another member of the oneof was set after it.
func (m *message) clearPart() {
	attrs, dec, obs, mode := m.attrs, m.decided, m.observability, m.requestBodyMode
	m.reset()
	m.attrs, m.decided, m.observability, m.requestBodyMode = attrs, dec, obs, mode
}

// scan reads one ProcessingRequest. After an error m holds what was read until then and must not be used.
func (m *message) scan(b []byte) error {
	m.reset()
	r := envoywire.NewReader(b)
	for r.Next() {
		switch r.Num {
		case 2, 3, 4, 5, 6, 7:
			if r.IsMessage(r.Num) {
				if p := phase(r.Num); m.phase != p {
					m.clearPart()
					m.phase = p
				}
				r.Fail(m.scanPart(r.Bytes))
			}
		case 8:
			if r.IsMessage(8) {
				r.Fail(m.decided.scan(r.Bytes))
			}
		case 9:
			if r.IsMessage(9) {
				r.Fail(m.scanAttributes(r.Bytes))
			}
		case 10:
			r.Bool(&m.observability)
		case 11:
			if r.IsMessage(11) {
				c := envoywire.NewReader(r.Bytes)
				for c.Next() {
					if c.Num == 1 {
						c.Int32(&m.requestBodyMode)
					}
				}
				r.Fail(c.Err())
			}
		}
	}
	return r.Err()
}

// scanPart reads the HttpHeaders, HttpBody or HttpTrailers of m.phase, or a further piece of it. Of trailers, and of
// bodies of responses, nothing is needed.
func (m *message) scanPart(b []byte) error {
	r := envoywire.NewReader(b)
	switch m.phase {
	case phaseRequestHeaders, phaseResponseHeaders:
		for r.Next() {
			switch r.Num {
			case 1:
				if r.IsMessage(1) {
					r.Fail(m.scanHeaderMap(r.Bytes))
				}
			case 3:
				r.Bool(&m.endOfStream)
			}
		}
	case phaseRequestBody:
		for r.Next() {
			switch r.Num {
			case 1:
				r.Raw(&m.body)
			case 2:
				r.Bool(&m.endOfStream)
			}
		}
	}
	return r.Err()
}

// scanHeaderMap reads an envoy.config.core.v3.HeaderMap.
func (m *message) scanHeaderMap(b []byte) error {
	r := envoywire.NewReader(b)
	for r.Next() {
		if !r.IsMessage(1) {
			continue
		}
		var key, value, raw []byte
		h := envoywire.NewReader(r.Bytes)
		for h.Next() {
			switch h.Num {
			case 1:
				h.Text(&key)
			case 2:
				h.Text(&value)
			case 3:
				h.Raw(&raw)
			}
		}
		r.Fail(h.Err())
		if len(raw) > 0 { // Envoy sends raw_value; value is for senders with older habits
			value = raw
		}
		m.header(key, value)
	}
	return r.Err()
}

// header keeps one header if it is one of ours. Names are matched as Envoy sends them, in lower case.
func (m *message) header(key, value []byte) {
	var dst *[]byte
	switch string(key) {
	case ":method":
		dst = &m.method
	case ":scheme":
		dst = &m.scheme
	case ":authority":
		dst = &m.authority
	case ":path":
		dst = &m.path
	case ":status":
		dst = &m.status
	case "x-request-id":
		dst = &m.requestID
	case "content-length":
		dst = &m.contentLength
	case HeaderParent:
		if dst = &m.parent; m.parent != nil { // several: nobody can say which is meant
			m.parent = []byte{}
		}
	case "cache-status":
		if len(m.cacheStatus) > 0 {
			m.cacheStatus = append(m.cacheStatus, ", "...)
		}
		m.cacheStatus = append(m.cacheStatus, value...)
		m.cacheStatus = m.cacheStatus[:min(len(m.cacheStatus), maxCacheStatus)]
		return
	default:
		return
	}
	if *dst == nil {
		if value == nil {
			value = []byte{}
		}
		*dst = value
	}
}

// scan reads an envoy.config.core.v3.Metadata, or a further piece of one. A later entry of a namespace replaces an earlier one.
func (d *decided) scan(b []byte) error {
	r := envoywire.NewReader(b)
	for r.Next() {
		if !r.IsMessage(1) {
			continue
		}
		key, value, n, err := envoywire.MapEntry(r.Bytes)
		if err != nil {
			return err
		}
		var id receiptID
		var dst *receiptID
		switch string(key) {
		case NamespaceAuthz:
			dst = &d.authz
		case Namespace:
			dst = &d.own
		default:
			continue
		}
		if n == 1 {
			err = id.scan(value)
		} else {
			err = envoywire.EachValue(r.Bytes, id.scan)
		}
		r.Fail(err)
		*dst = id
	}
	return r.Err()
}

// receiptID is the text under KeyReceipt of a Struct, and whether there is one under KeyGap.
type receiptID struct {
	text []byte
	gap  bool
}

// scan reads a google.protobuf.Struct, or a further piece of one.
func (id *receiptID) scan(b []byte) error {
	r := envoywire.NewReader(b)
	for r.Next() {
		if !r.IsMessage(1) {
			continue
		}
		key, value, n, err := envoywire.MapEntry(r.Bytes)
		if err != nil {
			return err
		}
		if string(key) != KeyReceipt && string(key) != KeyGap {
			continue
		}
		var v structValue
		if n == 1 {
			err = v.scan(value)
		} else {
			err = envoywire.EachValue(r.Bytes, v.scan)
		}
		r.Fail(err)
		if string(key) == KeyGap {
			id.gap = len(v.text) > 0
			continue
		}
		id.text = v.text
	}
	return r.Err()
}

// scanAttributes reads one entry of ProcessingRequest.attributes, a map from filter name to Struct. A later entry with
// the same key replaces an earlier one.
func (m *message) scanAttributes(entry []byte) error {
	key, value, n, err := envoywire.MapEntry(entry)
	if err != nil || string(key) != attributesKey {
		return err
	}
	m.attrs = attributes{}
	if n == 1 {
		return m.attrs.scan(value)
	}
	return envoywire.EachValue(entry, m.attrs.scan)
}

// scan reads a google.protobuf.Struct, or a further piece of one.
func (a *attributes) scan(b []byte) error {
	r := envoywire.NewReader(b)
	for r.Next() {
		if r.IsMessage(1) {
			r.Fail(a.field(r.Bytes))
		}
	}
	return r.Err()
}

// field reads one entry of Struct.fields.
func (a *attributes) field(entry []byte) error {
	key, value, n, err := envoywire.MapEntry(entry)
	if err != nil {
		return err
	}
	var text *[]byte
	var number *float64
	switch string(key) {
	case "xds.route_name":
		text = &a.route
	case "xds.cluster_name":
		text = &a.cluster
	case "source.address":
		text = &a.source
	case "connection.uri_san_peer_certificate":
		text = &a.spiffeID
	case "upstream.address":
		text = &a.upstream
	case "response.code_details":
		text = &a.details
	case "upstream.request_attempt_count":
		number = &a.attempts
	default:
		return nil
	}
	var v structValue
	if n == 1 {
		err = v.scan(value)
	} else {
		err = envoywire.EachValue(entry, v.scan)
	}
	if text != nil {
		*text = v.text
	} else {
		*number = v.number
	}
	return err
}

// structValue is a google.protobuf.Value as far as we need it: a string or a number, else neither.
type structValue struct {
	text   []byte
	number float64
}

// scan reads a Value, or a further piece of one: the member of its oneof that was set last counts.
func (v *structValue) scan(b []byte) error {
	r := envoywire.NewReader(b)
	for r.Next() {
		switch {
		case r.Num == 2:
			if r.Type == protowire.Fixed64Type {
				*v = structValue{}
				r.Double(&v.number)
			}
		case r.IsMessage(3):
			*v = structValue{}
			r.Text(&v.text)
		case (r.Num == 1 || r.Num == 4) && r.Type == protowire.VarintType, r.IsMessage(5), r.IsMessage(6):
			*v = structValue{}
		}
	}
	return r.Err()
}

// parseUint parses decimal digits, at most 18 of them; ok is false for anything else, the empty text included.
func parseUint(b []byte) (n int64, ok bool) {
	if len(b) == 0 || len(b) > 18 {
		return 0, false
	}
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	return n, true
}

// statusCode parses a :status header; 0 when it is not a number of three digits.
func statusCode(b []byte) int {
	if len(b) != 3 || bytes.IndexFunc(b, func(r rune) bool { return r < '0' || r > '9' }) >= 0 {
		return 0
	}
	return int(b[0]-'0')*100 + int(b[1]-'0')*10 + int(b[2]-'0')
}
