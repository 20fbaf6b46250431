package receipt

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
)

const (
	evidenceMark  = "knhk/evidence/v1"
	commitmentTag = "knhk/commitment/v1\n"
	maxFields     = 64
)

// Commit commits to fields, in their order, under a salt that must be random, fresh and kept with the evidence: the hash
// of guessable values without it would give them away. It is SHA-256 over
//
//	"knhk/commitment/v1\n"
//	salt                                  32 bytes
//	number of fields                      8 bytes, big endian
//	then for each field
//	  0x01, length of the name (8 bytes, big endian), name
//	  0x02, length of the value (8 bytes, big endian), value
//
// so that no two lists of fields have the same input. It allocates nothing up to about 1 KiB of fields.
func Commit(salt *[32]byte, fields []Field) Hash {
	var scratch [1280]byte
	b := append(scratch[:0], commitmentTag...)
	b = append(b, salt[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(len(fields)))
	for i := range fields {
		b = append(b, 1)
		b = binary.BigEndian.AppendUint64(b, uint64(len(fields[i].Name)))
		b = append(b, fields[i].Name...)
		b = append(b, 2)
		b = binary.BigEndian.AppendUint64(b, uint64(len(fields[i].Value)))
		b = append(b, fields[i].Value...)
	}
	return sha256.Sum256(b)
}

// Request is what a decision commits to instead of showing it: exactly the bytes Envoy sent, empty what it did not send.
type Request struct {
	Method    string
	Scheme    string
	Authority string
	Path      string // with its query
	RequestID string // x-request-id
	Source    string // address of the client's connection
}

// fields lists r's fields in the order they are committed to.
func (r *Request) fields() [6]Field {
	return [6]Field{
		{"method", r.Method},
		{"scheme", r.Scheme},
		{"authority", r.Authority},
		{"path", r.Path},
		{"request_id", r.RequestID},
		{"source", r.Source},
	}
}

// Commit returns the commitment for Decision.Request: Commit over the fields method, scheme, authority, path, request_id
// and source, in this order, empty ones included.
func (r *Request) Commit(salt *[32]byte) Hash {
	f := r.fields()
	return Commit(salt, f[:])
}

// EvidenceFor returns the evidence that opens r.Commit(salt) in the decision with this id.
func EvidenceFor(id string, salt *[32]byte, r *Request) *Evidence {
	f := r.fields()
	return &Evidence{ID: id, Salt: *salt, Fields: f[:]}
}

// AppendEvidence appends e as one JSON object in the form the package comment calls canonical:
// {"evidence":"knhk/evidence/v1","id":...,"salt":...,"fields":[{"name":...,"value":...},...]}.
func AppendEvidence(dst []byte, e *Evidence) []byte {
	dst = append(dst, `{"evidence":"`+evidenceMark+`","id":`...)
	dst = appendText(dst, e.ID)
	dst = append(dst, `,"salt":`...)
	dst = appendBytes(dst, e.Salt[:])
	dst = append(dst, `,"fields":[`...)
	for i, f := range e.Fields {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(dst, `{"name":`...)
		dst = appendText(dst, f.Name)
		dst = append(dst, `,"value":`...)
		dst = appendText(dst, f.Value)
		dst = append(dst, '}')
	}
	return append(dst, `]}`...)
}

var evidenceMembers = []member[Evidence]{
	{"evidence", false, func(_ *Evidence, r reader) error { return r.mark(evidenceMark) }},
	{"id", false, func(e *Evidence, r reader) error { return r.text(&e.ID) }},
	{"salt", false, func(e *Evidence, r reader) error { return r.fixed(e.Salt[:]) }},
	{"fields", false, func(e *Evidence, r reader) error {
		return array(r, maxFields, func() error {
			var f Field
			if err := object(r, fieldMembers, &f); err != nil {
				return err
			}
			e.Fields = append(e.Fields, f)
			return nil
		})
	}},
}

var fieldMembers = []member[Field]{
	{"name", false, func(f *Field, r reader) error { return r.text(&f.Name) }},
	{"value", false, func(f *Field, r reader) error { return r.text(&f.Value) }},
}

// mark reads a string that must be exactly want.
func (r reader) mark(want string) error {
	var got string
	if err := r.text(&got); err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("%.64q instead of %q", got, want)
	}
	return nil
}

// ParseEvidence is the inverse of AppendEvidence, for evidence of 1 to 64 fields with distinct names and at most MaxEvidence bytes.
func ParseEvidence(b []byte) (*Evidence, error) {
	e := new(Evidence)
	if err := parseLeaf(b, "", evidenceMembers, e, (*Evidence).validate, AppendEvidence); err != nil {
		return nil, fmt.Errorf("parse evidence: %w", err)
	}
	return e, nil
}

func (e *Evidence) validate() error {
	if _, _, err := ParseID(e.ID); err != nil {
		return fmt.Errorf("field %q: %w", "id", err)
	}
	if len(e.Fields) == 0 || len(e.Fields) > maxFields {
		return fmt.Errorf("field %q: %d fields, want 1 to %d", "fields", len(e.Fields), maxFields)
	}
	for i, f := range e.Fields {
		for _, g := range e.Fields[:i] {
			if f.Name == g.Name {
				return fmt.Errorf("field %q: two named %.64q", "fields", f.Name)
			}
		}
	}
	return nil
}

// CheckEvidence checks that e opens the commitment of d.
func CheckEvidence(d *Decision, e *Evidence) error {
	if err := e.validate(); err != nil {
		return fmt.Errorf("check evidence: %w", err)
	}
	if e.ID != d.ID {
		return fmt.Errorf("check evidence: it is for receipt %.80q", e.ID)
	}
	if Commit(&e.Salt, e.Fields) != d.Request {
		return errors.New("check evidence: it does not open the decision's commitment")
	}
	return nil
}
