package receipt

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// AppendDecision appends the leaf of d in canonical form and allocates nothing when dst has room (about 600 bytes and the
// strings). It does not check d: what Validate refuses becomes a leaf that ParseDecision refuses.
func AppendDecision(dst []byte, d *Decision) []byte {
	dst = append(dst, DecisionPrefix+`{"id":`...)
	dst = appendText(dst, d.ID)
	dst = append(dst, `,"nonce":`...)
	dst = appendBytes(dst, d.Nonce[:])
	dst = append(dst, `,"ordinal":`...)
	dst = appendUint(dst, d.Ordinal)
	dst = append(dst, `,"origin":`...)
	dst = appendText(dst, d.Origin)
	dst = append(dst, `,"time":`...)
	dst = appendTime(dst, d.Time)
	dst = optText(dst, `,"tenant":`, d.Tenant)
	dst = append(dst, `,"class":`...)
	dst = appendText(dst, d.Class)
	dst = append(dst, `,"verdict":`...)
	dst = appendText(dst, d.Verdict)
	dst = append(dst, `,"reason":`...)
	dst = appendText(dst, d.Reason)
	dst = optText(dst, `,"rule":`, d.Rule)
	dst = optText(dst, `,"authz":`, d.Authz)
	dst = optUint32(dst, `,"status":`, d.Status)
	dst = optUint(dst, `,"tick":`, d.Tick)
	dst = optUint(dst, `,"waited_ns":`, d.WaitedNS)
	dst = optFlag(dst, `,"dry_run":true`, d.DryRun)
	dst = append(dst, `,"policy":`...)
	dst = appendBytes(dst, d.PolicyDigest[:])
	dst = append(dst, `,"capture":`...)
	dst = appendText(dst, d.Capture)
	dst = optText(dst, `,"spiffe_id":`, d.SPIFFEID)
	dst = optText(dst, `,"route":`, d.Route)
	dst = optText(dst, `,"cluster":`, d.Cluster)
	if d.TraceID != [16]byte{} {
		dst = append(dst, `,"trace_id":`...)
		dst = appendBytes(dst, d.TraceID[:])
	}
	if d.SpanID != [8]byte{} {
		dst = append(dst, `,"span_id":`...)
		dst = appendBytes(dst, d.SpanID[:])
	}
	dst = optText(dst, `,"parent":`, d.Parent)
	dst = append(dst, `,"request":`...)
	dst = appendBytes(dst, d.Request[:])
	return append(dst, '}')
}

func optText(dst []byte, name, s string) []byte {
	if s == "" {
		return dst
	}
	return appendText(append(dst, name...), s)
}

func optUint(dst []byte, name string, n uint64) []byte {
	if n == 0 {
		return dst
	}
	return appendUint(append(dst, name...), n)
}

func optUint32(dst []byte, name string, n uint32) []byte {
	if n == 0 {
		return dst
	}
	dst = append(dst, name...)
	return strconv.AppendUint(dst, uint64(n), 10)
}

func optFlag(dst []byte, member string, on bool) []byte {
	if !on {
		return dst
	}
	return append(dst, member...)
}

var decisionMembers = []member[Decision]{
	{"id", false, func(d *Decision, r reader) error { return r.text(&d.ID) }},
	{"nonce", false, func(d *Decision, r reader) error { return r.fixed(d.Nonce[:]) }},
	{"ordinal", false, func(d *Decision, r reader) error { return r.uint64(&d.Ordinal) }},
	{"origin", false, func(d *Decision, r reader) error { return r.text(&d.Origin) }},
	{"time", false, func(d *Decision, r reader) error { return r.time(&d.Time) }},
	{"tenant", true, func(d *Decision, r reader) error { return r.text(&d.Tenant) }},
	{"class", false, func(d *Decision, r reader) error { return r.text(&d.Class) }},
	{"verdict", false, func(d *Decision, r reader) error { return r.text(&d.Verdict) }},
	{"reason", false, func(d *Decision, r reader) error { return r.text(&d.Reason) }},
	{"rule", true, func(d *Decision, r reader) error { return r.text(&d.Rule) }},
	{"authz", true, func(d *Decision, r reader) error { return r.text(&d.Authz) }},
	{"status", true, func(d *Decision, r reader) error { return r.uint32(&d.Status) }},
	{"tick", true, func(d *Decision, r reader) error { return r.uint64(&d.Tick) }},
	{"waited_ns", true, func(d *Decision, r reader) error { return r.uint64(&d.WaitedNS) }},
	{"dry_run", true, func(d *Decision, r reader) error { return r.flag(&d.DryRun) }},
	{"policy", false, func(d *Decision, r reader) error { return r.fixed(d.PolicyDigest[:]) }},
	{"capture", false, func(d *Decision, r reader) error { return r.text(&d.Capture) }},
	{"spiffe_id", true, func(d *Decision, r reader) error { return r.text(&d.SPIFFEID) }},
	{"route", true, func(d *Decision, r reader) error { return r.text(&d.Route) }},
	{"cluster", true, func(d *Decision, r reader) error { return r.text(&d.Cluster) }},
	{"trace_id", true, func(d *Decision, r reader) error { return r.fixed(d.TraceID[:]) }},
	{"span_id", true, func(d *Decision, r reader) error { return r.fixed(d.SpanID[:]) }},
	{"parent", true, func(d *Decision, r reader) error { return r.text(&d.Parent) }},
	{"request", false, func(d *Decision, r reader) error { return r.fixed(d.Request[:]) }},
}

// ParseDecision is the inverse of AppendDecision. Times come back in UTC. Errors name the field.
func ParseDecision(leaf []byte) (*Decision, error) {
	d := new(Decision)
	if err := parseLeaf(leaf, DecisionPrefix, decisionMembers, d, (*Decision).Validate, AppendDecision); err != nil {
		return nil, fmt.Errorf("parse decision: %w", err)
	}
	return d, nil
}

// Validate says what ParseDecision would refuse in d. Class must be R1, W1, C1 or unknown; Verdict admit, park or refuse;
// Capture lean, full or observe; Reason a word of a-z, 0-9 and "_"; Status 0 or 100 to 999; Parent a receipt id or empty.
func (d *Decision) Validate() error {
	if _, _, err := ParseID(d.ID); err != nil {
		return fmt.Errorf("field %q: %w", "id", err)
	}
	if d.Parent != "" {
		if _, _, err := ParseID(d.Parent); err != nil {
			return fmt.Errorf("field %q: %w", "parent", err)
		}
		if d.Parent == d.ID {
			return fmt.Errorf("field %q: the receipt itself", "parent")
		}
	}
	return cmp.Or(
		validOrigin(d.Origin),
		validTime("time", d.Time),
		validOneOf("class", d.Class, "R1", "W1", "C1", "unknown"),
		validOneOf("verdict", d.Verdict, "admit", "park", "refuse"),
		validWord("reason", d.Reason),
		validStatus("status", d.Status),
		validOneOf("capture", d.Capture, "lean", "full", "observe"),
	)
}

// validOrigin is the rule of C2SP signed notes for key names, and a bound.
func validOrigin(s string) error {
	plain := len(s) > 0 && len(s) <= 255
	for i := 0; plain && i < len(s); i++ {
		plain = s[i] > ' ' && s[i] < 0x7f && s[i] != '+'
	}
	if plain {
		return nil
	}
	if s == "" || len(s) > 255 || !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsSpace) || strings.Contains(s, "+") {
		return fmt.Errorf("field %q: %.64q cannot name a log: want 1 to 255 bytes of UTF-8 without white space and +", "origin", s)
	}
	return nil
}

// validTime bounds t to what 63 bits of nanoseconds since 1970 hold.
func validTime(name string, t time.Time) error {
	if t.Before(time.Unix(0, 0)) || t.After(time.Unix(0, 1<<63-1)) {
		return fmt.Errorf("field %q: %v is not between 1970 and 2262", name, t)
	}
	return nil
}

func validOneOf(name, s string, words ...string) error {
	for _, w := range words {
		if s == w {
			return nil
		}
	}
	return fmt.Errorf("field %q: %.64q is none of %s", name, s, strings.Join(words, ", "))
}

func validWord(name, s string) error {
	ok := s != "" && len(s) <= 64
	for i := 0; ok && i < len(s); i++ {
		c := s[i]
		ok = c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '_'
	}
	if !ok {
		return fmt.Errorf("field %q: %.64q is not a word of a-z, 0-9 and _", name, s)
	}
	return nil
}

func validStatus(name string, n uint32) error {
	if n != 0 && (n < 100 || n > 999) {
		return fmt.Errorf("field %q: %d is no status", name, n)
	}
	return nil
}
