package class

import (
	"bytes"
	"encoding/json/jsontext"
	"errors"
	"io"
	"sync"

	"github.com/knhk/sidecar/policy"
)

// Bounds of a hot delta.
const (
	MaxBody  = 8 << 10 // bytes of a body that is looked at
	MaxItems = 8       // additions and removals of a hot delta, together
)

// Delta classifies a body as a KNHK delta and says which of the Delta constants applies.
//
// A delta is one JSON object (RFC 8259, no duplicate names, valid UTF-8) with the members "additions" and "removals",
// either of which may be absent; both are arrays of items. An item is an object of the strings "subject", "predicate",
// "object" and, if wanted, "graph", or an array of three or four strings in that order. A blank node is a string that
// begins with "_:", a variable one that begins with "?" or "$"; white space before them does not hide them.
//
// When several things are wrong the first of these is told: large, malformed, items, blank. The whole body is read, so
// that the answer does not depend on the order of its parts.
func Delta(body []byte) (policy.Class, string) {
	if len(body) > MaxBody {
		return policy.W1, DeltaLarge
	}
	s := scanners.Get().(*scanner)
	defer scanners.Put(s)
	items, blank, err := s.scan(body)
	switch {
	case err != nil:
		return policy.W1, DeltaMalformed
	case items > MaxItems:
		return policy.W1, DeltaItems
	case blank:
		return policy.W1, DeltaBlank
	}
	return policy.R1, DeltaHot
}

var scanners = sync.Pool{New: func() any {
	return &scanner{dec: jsontext.NewDecoder(bytes.NewReader(nil)), src: bytes.NewReader(nil)}
}}

// errShape is the error of valid JSON that is no delta.
var errShape = errors.New("not a delta")

type scanner struct {
	dec   *jsontext.Decoder
	src   *bytes.Reader
	text  []byte // an unquoted string
	items int
	blank bool
}

func (s *scanner) scan(body []byte) (items int, blank bool, err error) {
	s.src.Reset(body)
	s.dec.Reset(s.src)
	s.items, s.blank = 0, false
	defer s.src.Reset(nil) // the pool must not keep the body
	if err := s.delta(); err != nil {
		return 0, false, err
	}
	if _, err := s.dec.ReadToken(); err != io.EOF {
		return 0, false, errShape // something stands behind the object
	}
	return s.items, s.blank, nil
}

// open reads the beginning of an object or array.
func (s *scanner) open(want jsontext.Kind) error {
	if s.dec.PeekKind() != want {
		return errShape
	}
	_, err := s.dec.ReadToken()
	return err
}

// more reports whether another element stands before the end of kind end, and reads that end if not.
func (s *scanner) more(end jsontext.Kind) (bool, error) {
	if s.dec.PeekKind() != end {
		return true, nil // an element, or an error that reading it tells
	}
	_, err := s.dec.ReadToken()
	return false, err
}

// str reads a string; it is valid until the next call.
func (s *scanner) str() ([]byte, error) {
	if s.dec.PeekKind() != jsontext.KindString {
		return nil, errShape
	}
	raw, err := s.dec.ReadValue()
	if err != nil {
		return nil, err
	}
	s.text, err = jsontext.AppendUnquote(s.text[:0], raw)
	return s.text, err
}

func (s *scanner) delta() error {
	if err := s.open(jsontext.KindBeginObject); err != nil {
		return err
	}
	for {
		if more, err := s.more(jsontext.KindEndObject); !more || err != nil {
			return err
		}
		name, err := s.str()
		if err != nil {
			return err
		}
		if n := string(name); n != "additions" && n != "removals" {
			return errShape
		}
		if err := s.list(); err != nil {
			return err
		}
	}
}

func (s *scanner) list() error {
	if err := s.open(jsontext.KindBeginArray); err != nil {
		return err
	}
	for {
		if more, err := s.more(jsontext.KindEndArray); !more || err != nil {
			return err
		}
		var err error
		if s.dec.PeekKind() == jsontext.KindBeginArray {
			err = s.array()
		} else {
			err = s.object()
		}
		if err != nil {
			return err
		}
		s.items++
	}
}

func (s *scanner) array() error {
	if err := s.open(jsontext.KindBeginArray); err != nil {
		return err
	}
	for n := 0; ; n++ {
		more, err := s.more(jsontext.KindEndArray)
		if err != nil {
			return err
		}
		if !more {
			if n != 3 && n != 4 {
				return errShape
			}
			return nil
		}
		if err := s.term(); err != nil {
			return err
		}
	}
}

func (s *scanner) object() error {
	if err := s.open(jsontext.KindBeginObject); err != nil {
		return err
	}
	var subject, predicate, object bool // the decoder refuses a name that comes twice
	for {
		more, err := s.more(jsontext.KindEndObject)
		if err != nil {
			return err
		}
		if !more {
			if !subject || !predicate || !object {
				return errShape
			}
			return nil
		}
		name, err := s.str()
		if err != nil {
			return err
		}
		switch string(name) {
		case "subject":
			subject = true
		case "predicate":
			predicate = true
		case "object":
			object = true
		case "graph":
		default:
			return errShape
		}
		if err := s.term(); err != nil {
			return err
		}
	}
}

func (s *scanner) term() error {
	text, err := s.str()
	if err != nil {
		return err
	}
	text = bytes.TrimLeft(text, " \t\r\n")
	if len(text) > 0 && (text[0] == '?' || text[0] == '$') || len(text) > 1 && text[0] == '_' && text[1] == ':' {
		s.blank = true
	}
	return nil
}
