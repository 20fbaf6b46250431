package receipt

import (
	"bytes"
	"encoding/json/jsontext"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/mod/sumdb/tlog"
)

// Bounds of a bundle.
const (
	MaxBundle   = 1 << 20 // bytes of its JSON
	MaxOutcomes = 2       // an outcome recorded as unknown, and the late one
	MaxHeaders  = 8
	MaxKeys     = 64
	MaxPins     = 64
)

const bundleMark = "knhk/bundle/v1"

// Bundle is a receipt with all that is needed to verify it under a policy. It is not trusted until Verify says so.
type Bundle struct {
	// Records holds the decision first, then its outcomes in the order they were recorded; without outcomes the receipt is
	// pending.
	Records []Record
	// Headers holds the headers of the blocks the records are in, each once and each in use.
	Headers []Proof
	// Keys begins with the statement of the daily key that signed the checkpoint, which is the one in force for its size. Any
	// others follow in a chain, each the statement of the predecessor of the one before.
	Keys []Proof
	// Tail is the last leaf below the checkpoint, at index size-1: a header, which names the statement in force, or a seal,
	// which does so too, or that statement itself. It may stand in Headers or Keys as well.
	Tail Proof
	// Pins are proofs that the checkpoint is consistent with the trees that revocations pin, in the order of their sizes. A log
	// puts in all it knows; verification wants those of the revocations it was given.
	Pins []PinProof
	// Evidence opens the decision's commitment; nil when it is not shown or erased.
	Evidence *Evidence
}

// Record is a record and its place in its block.
type Record struct {
	Leaf   []byte
	Header int    // index into Bundle.Headers
	Index  uint64 // position in the block, from 0
	Size   uint64 // records in the block
	Path   []Hash // audit path, nearest sibling first
}

// Proof is a log leaf with its C2SP tlog-proof (c2sp.org/tlog-proof@v1, as torchwood.FormatProof writes it). All proofs of
// a bundle end in the same signed checkpoint.
type Proof struct {
	Leaf []byte
	Text []byte
}

// Pin is a tree that a revocation or a seal pins.
type Pin struct {
	Size uint64
	Root Hash
}

// PinProof is a consistency proof of RFC 6962 section 2.1.2 between a pin and the bundle's checkpoint, from the smaller to the
// larger of the two; it is empty when both have one size.
type PinProof struct {
	Pin
	Proof []Hash
}

// ProvePin makes the proof between pin and a tree of size leaves, in whichever direction. hashes must have the larger of the two
// trees; the roots are not looked at.
func ProvePin(pin Pin, size uint64, hashes tlog.HashReader) (PinProof, error) {
	small, large := min(pin.Size, size), max(pin.Size, size)
	if small == 0 || large > maxTree {
		return PinProof{}, fmt.Errorf("prove pin: between %d and %d leaves there is no proof", small, large)
	}
	proof, err := tlog.ProveTree(int64(large), int64(small), hashes)
	if err != nil {
		return PinProof{}, fmt.Errorf("prove pin: %w", err)
	}
	out := PinProof{Pin: pin}
	for _, h := range proof {
		out.Proof = append(out.Proof, Hash(h))
	}
	return out, nil
}

// Marshal returns the bundle as JSON for people and programs: indented, members in fixed order, leaves and proofs as text.
// It fails when ParseBundle would not read the result.
func (b *Bundle) Marshal() ([]byte, error) {
	dst := append([]byte(nil), `{"bundle":"`+bundleMark+`","records":[`...)
	for i, r := range b.Records {
		dst = separate(dst, i)
		dst = append(dst, `{"leaf":`...)
		dst = appendText(dst, string(r.Leaf))
		dst = append(dst, `,"header":`...)
		dst = fmt.Append(dst, r.Header)
		dst = append(dst, `,"index":`...)
		dst = appendUint(dst, r.Index)
		dst = append(dst, `,"size":`...)
		dst = appendUint(dst, r.Size)
		dst = append(dst, `,"path":`...)
		dst = appendHashes(dst, r.Path)
		dst = append(dst, '}')
	}
	dst = append(dst, `],"headers":[`...)
	dst = appendProofs(dst, b.Headers)
	dst = append(dst, `],"keys":[`...)
	dst = appendProofs(dst, b.Keys)
	dst = append(dst, `],"tail":`...)
	dst = appendProof(dst, &b.Tail)
	if len(b.Pins) > 0 {
		dst = append(dst, `,"pins":[`...)
		for i := range b.Pins {
			p := &b.Pins[i]
			dst = separate(dst, i)
			dst = append(dst, `{"size":`...)
			dst = appendUint(dst, p.Size)
			dst = append(dst, `,"root":`...)
			dst = appendBytes(dst, p.Root[:])
			dst = append(dst, `,"proof":`...)
			dst = appendHashes(dst, p.Proof)
			dst = append(dst, '}')
		}
		dst = append(dst, ']')
	}
	if b.Evidence != nil {
		dst = append(dst, `,"evidence":`...)
		dst = AppendEvidence(dst, b.Evidence)
	}
	dst = append(dst, '}')
	v := jsontext.Value(dst)
	if err := v.Indent(jsontext.WithIndent("  ")); err != nil {
		return nil, fmt.Errorf("marshal bundle: %w", err)
	}
	v = append(v, '\n')
	if _, err := ParseBundle(v); err != nil {
		return nil, fmt.Errorf("marshal bundle: %w", err)
	}
	return v, nil
}

func appendProofs(dst []byte, proofs []Proof) []byte {
	for i := range proofs {
		dst = appendProof(separate(dst, i), &proofs[i])
	}
	return dst
}

func appendProof(dst []byte, p *Proof) []byte {
	dst = append(dst, `{"leaf":`...)
	dst = appendText(dst, string(p.Leaf))
	dst = append(dst, `,"proof":`...)
	dst = appendText(dst, string(p.Text))
	return append(dst, '}')
}

func appendHashes(dst []byte, hashes []Hash) []byte {
	dst = append(dst, '[')
	for i := range hashes {
		dst = appendBytes(separate(dst, i), hashes[i][:])
	}
	return append(dst, ']')
}

func separate(dst []byte, i int) []byte {
	if i == 0 {
		return dst
	}
	return append(dst, ',')
}

var bundleMembers = []member[Bundle]{
	{"bundle", false, func(_ *Bundle, r reader) error { return r.mark(bundleMark) }},
	{"records", false, func(b *Bundle, r reader) error {
		return array(r, 1+MaxOutcomes, func() error { return grow(&b.Records, r, recordMembers) })
	}},
	{"headers", false, func(b *Bundle, r reader) error {
		return array(r, MaxHeaders, func() error { return grow(&b.Headers, r, proofMembers) })
	}},
	{"keys", false, func(b *Bundle, r reader) error {
		return array(r, MaxKeys, func() error { return grow(&b.Keys, r, proofMembers) })
	}},
	{"tail", false, func(b *Bundle, r reader) error { return object(r, proofMembers, &b.Tail) }},
	{"pins", true, func(b *Bundle, r reader) error {
		err := array(r, MaxPins, func() error { return grow(&b.Pins, r, pinMembers) })
		if err == nil && len(b.Pins) == 0 {
			return errors.New("no element")
		}
		return err
	}},
	{"evidence", true, func(b *Bundle, r reader) error {
		b.Evidence = new(Evidence)
		if err := object(r, evidenceMembers, b.Evidence); err != nil {
			return err
		}
		return b.Evidence.validate()
	}},
}

var recordMembers = []member[Record]{
	{"leaf", false, func(x *Record, r reader) error { return r.bytes(&x.Leaf) }},
	{"header", false, func(x *Record, r reader) error {
		var n uint32
		err := r.uint32(&n)
		if err == nil && n >= MaxHeaders {
			return errors.New("no such header")
		}
		x.Header = int(n)
		return err
	}},
	{"index", false, func(x *Record, r reader) error { return r.uint64(&x.Index) }},
	{"size", false, func(x *Record, r reader) error { return r.uint64(&x.Size) }},
	{"path", false, func(x *Record, r reader) error {
		return r.hashes(&x.Path, maxPath)
	}},
}

var pinMembers = []member[PinProof]{
	{"size", false, func(p *PinProof, r reader) error { return r.uint64(&p.Size) }},
	{"root", false, func(p *PinProof, r reader) error { return r.fixed(p.Root[:]) }},
	{"proof", false, func(p *PinProof, r reader) error { return r.hashes(&p.Proof, maxConsistency) }},
}

var proofMembers = []member[Proof]{
	{"leaf", false, func(p *Proof, r reader) error { return r.bytes(&p.Leaf) }},
	{"proof", false, func(p *Proof, r reader) error { return r.bytes(&p.Text) }},
}

func (r reader) hashes(to *[]Hash, limit int) error {
	return array(r, limit, func() error {
		var h Hash
		err := r.fixed(h[:])
		*to = append(*to, h)
		return err
	})
}

func grow[T any](to *[]T, r reader, members []member[T]) error {
	var x T
	err := object(r, members, &x)
	*to = append(*to, x)
	return err
}

// bytes reads text that is never empty and always UTF-8.
func (r reader) bytes(to *[]byte) error {
	raw, err := r.dec.ReadValue()
	if err != nil {
		return err
	}
	if raw.Kind() != '"' || len(raw) == 2 {
		return errors.New("want a string that is not empty")
	}
	*to, err = jsontext.AppendUnquote(make([]byte, 0, len(raw)), raw)
	return err
}

// ParseBundle is the inverse of Bundle.Marshal, except that white space between tokens does not matter. It is strict about
// all else, looks at the bundle's own form only and trusts nothing: Verify does the rest.
func ParseBundle(data []byte) (*Bundle, error) {
	if len(data) > MaxBundle {
		return nil, fmt.Errorf("parse bundle: %d bytes: at most %d are read", len(data), MaxBundle)
	}
	b := new(Bundle)
	r := newReader(data)
	if err := object(r, bundleMembers, b); err != nil {
		return nil, fmt.Errorf("parse bundle: %w", err)
	}
	if err := r.end(); err != nil {
		return nil, fmt.Errorf("parse bundle: %w", err)
	}
	return b, nil
}

// Clone returns a deep copy.
func (b *Bundle) Clone() *Bundle {
	c := &Bundle{Records: slices.Clone(b.Records), Headers: slices.Clone(b.Headers), Keys: slices.Clone(b.Keys)}
	for i := range c.Records {
		c.Records[i].Leaf = bytes.Clone(c.Records[i].Leaf)
		c.Records[i].Path = slices.Clone(c.Records[i].Path)
	}
	for _, proofs := range [][]Proof{c.Headers, c.Keys} {
		for i := range proofs {
			proofs[i] = Proof{bytes.Clone(proofs[i].Leaf), bytes.Clone(proofs[i].Text)}
		}
	}
	c.Tail = Proof{bytes.Clone(b.Tail.Leaf), bytes.Clone(b.Tail.Text)}
	c.Pins = slices.Clone(b.Pins)
	for i := range c.Pins {
		c.Pins[i].Proof = slices.Clone(c.Pins[i].Proof)
	}
	if b.Evidence != nil {
		e := *b.Evidence
		e.Fields = slices.Clone(e.Fields)
		c.Evidence = &e
	}
	return c
}
