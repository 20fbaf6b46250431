package receipt

import (
	"cmp"
	"fmt"
)

// AppendOutcome appends the leaf of o in canonical form and allocates nothing when dst has room. It does not check o: what
// Validate refuses becomes a leaf that ParseOutcome refuses.
func AppendOutcome(dst []byte, o *Outcome) []byte {
	dst = append(dst, OutcomePrefix+`{"id":`...)
	dst = appendText(dst, o.ID)
	dst = append(dst, `,"nonce":`...)
	dst = appendBytes(dst, o.Nonce[:])
	dst = append(dst, `,"ordinal":`...)
	dst = appendUint(dst, o.Ordinal)
	dst = append(dst, `,"origin":`...)
	dst = appendText(dst, o.Origin)
	dst = append(dst, `,"time":`...)
	dst = appendTime(dst, o.Time)
	dst = append(dst, `,"source":`...)
	dst = appendText(dst, o.Source)
	dst = append(dst, `,"result":`...)
	dst = appendText(dst, o.Result)
	dst = optUint32(dst, `,"status":`, o.Status)
	dst = optUint32(dst, `,"upstream_status":`, o.UpstreamStatus)
	dst = optText(dst, `,"flags":`, o.Flags)
	dst = optText(dst, `,"details":`, o.Details)
	dst = optText(dst, `,"cluster":`, o.Cluster)
	dst = optText(dst, `,"upstream_host":`, o.UpstreamHost)
	dst = optUint32(dst, `,"attempts":`, o.Attempts)
	dst = optUint(dst, `,"bytes_in":`, o.BytesIn)
	dst = optUint(dst, `,"bytes_out":`, o.BytesOut)
	dst = optUint(dst, `,"duration_ns":`, o.DurationNS)
	dst = optText(dst, `,"cache_status":`, o.CacheStatus)
	dst = optFlag(dst, `,"late":true`, o.Late)
	return append(dst, '}')
}

var outcomeMembers = []member[Outcome]{
	{"id", false, func(o *Outcome, r reader) error { return r.text(&o.ID) }},
	{"nonce", false, func(o *Outcome, r reader) error { return r.fixed(o.Nonce[:]) }},
	{"ordinal", false, func(o *Outcome, r reader) error { return r.uint64(&o.Ordinal) }},
	{"origin", false, func(o *Outcome, r reader) error { return r.text(&o.Origin) }},
	{"time", false, func(o *Outcome, r reader) error { return r.time(&o.Time) }},
	{"source", false, func(o *Outcome, r reader) error { return r.text(&o.Source) }},
	{"result", false, func(o *Outcome, r reader) error { return r.text(&o.Result) }},
	{"status", true, func(o *Outcome, r reader) error { return r.uint32(&o.Status) }},
	{"upstream_status", true, func(o *Outcome, r reader) error { return r.uint32(&o.UpstreamStatus) }},
	{"flags", true, func(o *Outcome, r reader) error { return r.text(&o.Flags) }},
	{"details", true, func(o *Outcome, r reader) error { return r.text(&o.Details) }},
	{"cluster", true, func(o *Outcome, r reader) error { return r.text(&o.Cluster) }},
	{"upstream_host", true, func(o *Outcome, r reader) error { return r.text(&o.UpstreamHost) }},
	{"attempts", true, func(o *Outcome, r reader) error { return r.uint32(&o.Attempts) }},
	{"bytes_in", true, func(o *Outcome, r reader) error { return r.uint64(&o.BytesIn) }},
	{"bytes_out", true, func(o *Outcome, r reader) error { return r.uint64(&o.BytesOut) }},
	{"duration_ns", true, func(o *Outcome, r reader) error { return r.uint64(&o.DurationNS) }},
	{"cache_status", true, func(o *Outcome, r reader) error { return r.text(&o.CacheStatus) }},
	{"late", true, func(o *Outcome, r reader) error { return r.flag(&o.Late) }},
}

// ParseOutcome is the inverse of AppendOutcome. Times come back in UTC. Errors name the field.
func ParseOutcome(leaf []byte) (*Outcome, error) {
	o := new(Outcome)
	if err := parseLeaf(leaf, OutcomePrefix, outcomeMembers, o, (*Outcome).Validate, AppendOutcome); err != nil {
		return nil, fmt.Errorf("parse outcome: %w", err)
	}
	return o, nil
}

// Validate says what ParseOutcome would refuse in o. Source must be als, ext_proc, ext_authz or recovery; Result a word of a-z, 0-9
// and "_"; Status and UpstreamStatus 0 or 100 to 999.
func (o *Outcome) Validate() error {
	if _, _, err := ParseID(o.ID); err != nil {
		return fmt.Errorf("field %q: %w", "id", err)
	}
	return cmp.Or(
		validOrigin(o.Origin),
		validTime("time", o.Time),
		validOneOf("source", o.Source, "als", "ext_proc", "ext_authz", "recovery"),
		validWord("result", o.Result),
		validStatus("status", o.Status),
		validStatus("upstream_status", o.UpstreamStatus),
	)
}
