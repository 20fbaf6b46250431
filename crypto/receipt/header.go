package receipt

import (
	"cmp"
	"fmt"
)

// AppendHeader appends the leaf of h in canonical form. LostFrom and LostTo are written only when they differ. It does not
// check h: what Validate refuses becomes a leaf that ParseHeader refuses.
func AppendHeader(dst []byte, h *Header) []byte {
	dst = append(dst, HeaderPrefix+`{"origin":`...)
	dst = appendText(dst, h.Origin)
	dst = append(dst, `,"log_id":`...)
	dst = appendBytes(dst, h.LogID[:])
	dst = append(dst, `,"instance":`...)
	dst = appendText(dst, h.Instance)
	dst = append(dst, `,"incarnation":`...)
	dst = appendBytes(dst, h.Incarnation[:])
	dst = append(dst, `,"seq":`...)
	dst = appendUint(dst, h.Seq)
	dst = append(dst, `,"kind":`...)
	dst = appendText(dst, h.Kind)
	dst = append(dst, `,"key":`...)
	dst = appendUint(dst, h.Key)
	dst = append(dst, `,"prev":`...)
	dst = appendBytes(dst, h.Prev[:])
	dst = append(dst, `,"time":`...)
	dst = appendTime(dst, h.Time)
	dst = append(dst, `,"count":`...)
	dst = appendUint(dst, h.Count)
	dst = append(dst, `,"root":`...)
	dst = appendBytes(dst, h.Root[:])
	dst = append(dst, `,"first":`...)
	dst = appendUint(dst, h.First)
	dst = append(dst, `,"last":`...)
	dst = appendUint(dst, h.Last)
	dst = optFlag(dst, `,"recovered":true`, h.Recovered)
	if h.LostFrom != h.LostTo {
		dst = append(dst, `,"lost_from":`...)
		dst = appendUint(dst, h.LostFrom)
		dst = append(dst, `,"lost_to":`...)
		dst = appendUint(dst, h.LostTo)
	}
	return append(dst, '}')
}

var headerMembers = []member[Header]{
	{"origin", false, func(h *Header, r reader) error { return r.text(&h.Origin) }},
	{"log_id", false, func(h *Header, r reader) error { return r.fixed(h.LogID[:]) }},
	{"instance", false, func(h *Header, r reader) error { return r.text(&h.Instance) }},
	{"incarnation", false, func(h *Header, r reader) error { return r.fixed(h.Incarnation[:]) }},
	{"seq", false, func(h *Header, r reader) error { return r.uint64(&h.Seq) }},
	{"kind", false, func(h *Header, r reader) error { return r.text(&h.Kind) }},
	{"key", false, func(h *Header, r reader) error { return r.uint64(&h.Key) }},
	{"prev", false, func(h *Header, r reader) error { return r.fixed(h.Prev[:]) }},
	{"time", false, func(h *Header, r reader) error { return r.time(&h.Time) }},
	{"count", false, func(h *Header, r reader) error { return r.uint64(&h.Count) }},
	{"root", false, func(h *Header, r reader) error { return r.fixed(h.Root[:]) }},
	{"first", false, func(h *Header, r reader) error { return r.uint64(&h.First) }},
	{"last", false, func(h *Header, r reader) error { return r.uint64(&h.Last) }},
	{"recovered", true, func(h *Header, r reader) error { return r.flag(&h.Recovered) }},
	{"lost_from", true, func(h *Header, r reader) error { return r.uint64(&h.LostFrom) }},
	{"lost_to", true, func(h *Header, r reader) error { return r.uint64(&h.LostTo) }},
}

// ParseHeader is the inverse of AppendHeader. The time comes back in UTC. Errors name the field.
func ParseHeader(leaf []byte) (*Header, error) {
	h := new(Header)
	if err := parseLeaf(leaf, HeaderPrefix, headerMembers, h, (*Header).Validate, AppendHeader); err != nil {
		return nil, fmt.Errorf("parse header: %w", err)
	}
	return h, nil
}

// Validate says what ParseHeader would refuse in h. A header with sequence number 0 is of kind open and only that is; only
// such a one may have a zero Prev. Open and heartbeat headers commit to no records, block headers to at least one, final
// headers to any number. Count 0 goes with EmptyRoot and ordinals 0; else First..Last has room for Count increasing
// ordinals. LostFrom and LostTo are both zero, or LostFrom is less, and the records stand on one side of the lost range.
func (h *Header) Validate() error {
	if err := ValidInstance(h.Instance); err != nil {
		return fmt.Errorf("field %q: %w", "instance", err)
	}
	err := cmp.Or(
		validOrigin(h.Origin),
		validTime("time", h.Time),
		validOneOf("kind", h.Kind, HeaderOpen, HeaderBlock, HeaderHeartbeat, HeaderFinal),
	)
	switch {
	case err != nil:
		return err
	case (h.Seq == 0) != (h.Kind == HeaderOpen):
		return fmt.Errorf("field %q: %d in a header of kind %s", "seq", h.Seq, h.Kind)
	case h.Prev == Hash{} && h.Kind != HeaderOpen:
		return fmt.Errorf("field %q: zero in a header of kind %s", "prev", h.Kind)
	case h.Count == 0 && h.Kind == HeaderBlock, h.Count != 0 && (h.Kind == HeaderOpen || h.Kind == HeaderHeartbeat):
		return fmt.Errorf("field %q: %d records in a header of kind %s", "count", h.Count, h.Kind)
	case h.Count == 0 && h.Root != EmptyRoot:
		return fmt.Errorf("field %q: not the root of no records", "root")
	case h.Count == 0 && (h.First != 0 || h.Last != 0):
		return fmt.Errorf("field %q: ordinals without records", "first")
	case h.Count != 0 && (h.Last < h.First || h.Last-h.First < h.Count-1):
		return fmt.Errorf("field %q: %d records do not fit into ordinals %d to %d", "last", h.Count, h.First, h.Last)
	case h.LostFrom > h.LostTo, h.LostFrom == h.LostTo && h.LostFrom != 0:
		return fmt.Errorf("field %q: lost range %d to %d", "lost_from", h.LostFrom, h.LostTo)
	case h.Count != 0 && h.LostFrom != h.LostTo && h.First < h.LostTo && h.Last >= h.LostFrom:
		return fmt.Errorf("field %q: records %d to %d are declared lost", "lost_from", h.First, h.Last)
	}
	return nil
}
