package receipt

import (
	"bytes"
	"encoding/json/jsontext"
	"errors"
	"fmt"
	"slices"
)

// Bounds of a bundle.
const (
	MaxBundle   = 1 << 20 // bytes of its JSON
	MaxOutcomes = 2       // an outcome recorded as unknown, and the late one
	MaxHeaders  = 8
	MaxKeys     = 64
)

const bundleMark = "knhk/bundle/v1"

// Bundle is a receipt with all that is needed to verify it under a policy. It is not trusted until Verify says so.
type Bundle struct {
	// Records holds the decision first, then its outcomes in the order they were recorded; without outcomes the receipt is
	// pending.
	Records []Record
	// Headers holds the headers of the blocks the records are in, each once and each in use.
	Headers []Proof
	// Keys begins with the statement of the daily key that signed the checkpoint. Any others follow in a chain, each the
	// statement of the predecessor of the one before.
	Keys []Proof
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
		dst = append(dst, `,"path":[`...)
		for k := range r.Path {
			dst = separate(dst, k)
			dst = appendBytes(dst, r.Path[k][:])
		}
		dst = append(dst, `]}`...)
	}
	dst = append(dst, `],"headers":[`...)
	dst = appendProofs(dst, b.Headers)
	dst = append(dst, `],"keys":[`...)
	dst = appendProofs(dst, b.Keys)
	dst = append(dst, ']')
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
	for i, p := range proofs {
		dst = separate(dst, i)
		dst = append(dst, `{"leaf":`...)
		dst = appendText(dst, string(p.Leaf))
		dst = append(dst, `,"proof":`...)
		dst = appendText(dst, string(p.Text))
		dst = append(dst, '}')
	}
	return dst
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
		return array(r, maxPath, func() error {
			var h Hash
			err := r.fixed(h[:])
			x.Path = append(x.Path, h)
			return err
		})
	}},
}

var proofMembers = []member[Proof]{
	{"leaf", false, func(p *Proof, r reader) error { return r.bytes(&p.Leaf) }},
	{"proof", false, func(p *Proof, r reader) error { return r.bytes(&p.Text) }},
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
	if b.Evidence != nil {
		e := *b.Evidence
		e.Fields = slices.Clone(e.Fields)
		c.Evidence = &e
	}
	return c
}
