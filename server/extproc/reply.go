package extproc

import (
	"math"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/knhk/sidecar/policy"
)

// Namespace is the dynamic metadata namespace of our replies. Envoy takes them only if it stands in the filter's
// metadata_options.receiving_namespaces.
const Namespace = "knhk"

// NamespaceAuthz is where Envoy keeps the dynamic metadata that an ext_authz filter of the same chain got from server/extauthz, under the
// same keys.
const NamespaceAuthz = "envoy.filters.http.ext_authz"

// HeaderParent is the request header in which the Envoy before this one gives its receipt id for the request.
const HeaderParent = "knhk-parent"

// Keys in Namespace.
const (
	KeyReceipt = "receipt" // receipt id
	KeyClass   = "class"   // class by its name, such as W1
	KeyGap     = "gap"     // reason why the request passes without a receipt; only on routes with on_receipt_failure: allow
)

// DetailsPrefix begins Envoy's response_code_details of every refusal; the reason follows.
const DetailsPrefix = "knhk_"

// reply is the answer to one message. Its zero value is a refusal, so that a path nobody thought of refuses: Envoy lets a
// request pass if its server ends the stream without an answer.
type reply struct{ wire []byte }

// EncodeFrame gives the ProcessingResponse.
func (r *reply) EncodeFrame() []byte {
	if len(r.wire) == 0 {
		return internalRefusal
	}
	return r.wire
}

var internalRefusal = appendRefusal(nil, policy.Decision{Reason: policy.ReasonInternal})

// Field numbers of the oneof in ProcessingResponse, by the phase they answer.
var answers = [...]protowire.Number{
	phaseRequestHeaders: 1, phaseResponseHeaders: 2, phaseRequestBody: 3, phaseResponseBody: 4,
	phaseRequestTrailers: 5, phaseResponseTrailers: 6,
}

// continues are the ready replies that say CONTINUE and nothing else: an empty HeadersResponse, BodyResponse or
// TrailersResponse. Nothing writes to them.
var continues = func() (out [len(answers)]reply) {
	for p, field := range answers {
		if field != 0 {
			out[p].wire = protowire.AppendVarint(protowire.AppendTag(nil, field, protowire.BytesType), 0)
		}
	}
	return out
}()

// proceed is the reply that lets a phase go on without a word; a refusal when there is no such phase.
func proceed(p phase) reply {
	if int(p) >= len(continues) {
		return reply{}
	}
	return continues[p]
}

// template is the reply to request headers for ids of one length and one class: the id has to be filled in at at.
type template struct {
	wire []byte
	at   int
}

// maxTemplateID bounds the ids that have templates, in bytes; receipt ids are at most 69.
const maxTemplateID = 96

// templates are made when first needed: an instance's ids all have one length.
var templates [policy.W1 + 1][maxTemplateID + 1]atomic.Pointer[template]

// templateFor gives the template of a class that is in templates, for ids of n bytes.
func templateFor(c policy.Class, n int) *template {
	if t := templates[c][n].Load(); t != nil {
		return t
	}
	encode := func(fill string) []byte {
		b := append([]byte(nil), continues[phaseRequestHeaders].wire...)
		return appendMetadata(b, policy.Decision{ID: strings.Repeat(fill, n), Class: c})
	}
	t := &template{wire: encode("a")}
	for b := encode("b"); t.wire[t.at] == b[t.at]; t.at++ {
	}
	templates[c][n].Store(t)
	return t
}

// proceedWith lets a request phase go on and has Envoy remember what was decided.
func proceedWith(p phase, d policy.Decision) reply {
	if n := len(d.ID); p == phaseRequestHeaders && n > 0 && n <= maxTemplateID && int(d.Class) < len(templates) && utf8.ValidString(d.ID) {
		t := templateFor(d.Class, n)
		b := make([]byte, len(t.wire))
		copy(b, t.wire)
		copy(b[t.at:], d.ID)
		return reply{wire: b}
	}
	r := proceed(p)
	if len(r.wire) == 0 {
		return r
	}
	b := make([]byte, 0, 48+len(Namespace)+len(d.ID)+len(d.Reason))
	b = append(b, r.wire...)
	return reply{wire: appendMetadata(b, d)}
}

// refuse answers in the upstream's stead.
func refuse(d policy.Decision) reply { return reply{wire: appendRefusal(make([]byte, 0, 384), d)} }

// RefusalStatus is the HTTP status of a refusal: the decision's own if it is an error status, else by its reason.
func RefusalStatus(d policy.Decision) int {
	switch {
	case d.Status >= 400 && d.Status <= 599:
		return d.Status
	case d.Reason == policy.ReasonNoCredit:
		return 429
	}
	return 503
}

// RetryAfter is the value of a Retry-After header: whole seconds, rounded up, at least 1; 0 for no header.
func RetryAfter(d time.Duration) int64 {
	if d <= 0 {
		return 0
	}
	return int64(math.Ceil(d.Seconds()))
}

// appendRefusal encodes a ProcessingResponse with an ImmediateResponse.
func appendRefusal(b []byte, d policy.Decision) []byte {
	if d.Reason == "" {
		d.Reason = policy.ReasonInternal
	}
	reason := Text(string(d.Reason))
	b, im := open(b, 7)

	b, at := open(b, 1) // HttpStatus
	b = protowire.AppendTag(b, 1, protowire.VarintType)
	b = protowire.AppendVarint(b, uint64(RefusalStatus(d)))
	b = shut(b, at)

	b, at = open(b, 2) // HeaderMutation
	b = appendHeader(b, "content-type", "text/plain")
	if s := RetryAfter(d.RetryAfter); s > 0 {
		var num [20]byte
		b = appendHeader(b, "retry-after", string(strconv.AppendInt(num[:0], s, 10)))
	}
	b = shut(b, at)

	b = appendText(b, 3, RefusalBody(d))

	b, at = open(b, 5) // details
	b = append(b, DetailsPrefix...)
	b = append(b, reason...)
	b = shut(b, at)

	b = shut(b, im)
	return appendMetadata(b, d)
}

// RefusalBody is what the client of a refused request reads: one line of text.
func RefusalBody(d policy.Decision) string {
	if d.ID == "" {
		return "refused: " + Text(string(d.Reason)) + "\n"
	}
	return "refused: " + Text(string(d.Reason)) + ", receipt " + Text(d.ID) + "\n"
}

// appendHeader encodes HeaderMutation.set_headers with OVERWRITE_IF_EXISTS_OR_ADD.
func appendHeader(b []byte, key, value string) []byte {
	b, opt := open(b, 1)
	b, hv := open(b, 1)
	b = appendText(b, 1, key)
	b = appendText(b, 3, value)
	b = shut(b, hv)
	b = protowire.AppendTag(b, 3, protowire.VarintType)
	b = protowire.AppendVarint(b, 2)
	return shut(b, opt)
}

// appendMetadata encodes ProcessingResponse.dynamic_metadata: {knhk: {receipt: ID, class: CLASS}} or {knhk: {gap: REASON}};
// nothing when there is neither an id nor a gap.
func appendMetadata(b []byte, d policy.Decision) []byte {
	if d.ID == "" && !d.Gap {
		return b
	}
	b, meta := open(b, 8)
	b, entry := open(b, 1)
	b = appendText(b, 1, Namespace)
	b, value := open(b, 2)
	b, st := open(b, 5)
	if d.ID != "" {
		b = appendField(b, KeyReceipt, Text(d.ID))
		if d.Class != policy.ClassUnknown || !d.Passes() { // not known here: decided by another replica
			b = appendField(b, KeyClass, d.Class.String())
		}
	} else {
		b = appendField(b, KeyGap, Text(string(d.Reason)))
	}
	b = shut(b, st)
	b = shut(b, value)
	b = shut(b, entry)
	return shut(b, meta)
}

// appendField encodes an entry of Struct.fields with a string value.
func appendField(b []byte, key, value string) []byte {
	b, entry := open(b, 1)
	b = appendText(b, 1, key)
	b, v := open(b, 2)
	b = appendText(b, 3, value)
	b = shut(b, v)
	return shut(b, entry)
}

// appendText encodes a field of the wire type of strings.
func appendText(b []byte, num protowire.Number, s string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, num, protowire.BytesType), s)
}

// Text keeps Envoy's protobuf decoder from rejecting a reply for a string that is not UTF-8.
func Text(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	return "invalid"
}

// open begins a nested message of unknown length in field num: one byte is set aside for it. at is for shut.
func open(b []byte, num protowire.Number) (out []byte, at int) {
	b = append(protowire.AppendTag(b, num, protowire.BytesType), 0)
	return b, len(b)
}

// shut writes the length of the message that began at at. Lengths over one byte move the message.
func shut(b []byte, at int) []byte {
	n := len(b) - at
	if n < 0x80 {
		b[at-1] = byte(n)
		return b
	}
	more := protowire.SizeVarint(uint64(n)) - 1
	for range more {
		b = append(b, 0)
	}
	copy(b[at+more:], b[at:len(b)-more])
	protowire.AppendVarint(b[:at-1], uint64(n))
	return b
}
