package receipt

import (
	"bytes"
	"encoding/base64"
	"encoding/json/jsontext"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"
	"unicode/utf8"
)

// MaxLeaf is the greatest length of a leaf that is parsed. Appenders do not check it: whoever fills a record bounds the
// strings it takes from outside.
const MaxLeaf = 64 << 10

// MaxEvidence is the greatest length of an encoded Evidence that is parsed. It holds any fields of up to 96 KiB together,
// however they have to be escaped.
const MaxEvidence = 640 << 10

var (
	urlEncoding = base64.RawURLEncoding.Strict()
	stdEncoding = base64.StdEncoding.Strict()
)

// plain marks the bytes that stand for themselves in a JSON string; all above 0x7f need a look at their UTF-8.
var plain = func() (t [256]bool) {
	for c := 0x20; c < 0x80; c++ {
		t[c] = c != '"' && c != '\\'
	}
	return t
}()

// appendText appends s in canonical form: a JSON string, or {"b64":"..."} when s is not valid UTF-8.
func appendText(dst []byte, s string) []byte {
	for i := range len(s) {
		if !plain[s[i]] {
			return appendHardText(dst, s, i)
		}
	}
	dst = append(dst, '"')
	dst = append(dst, s...)
	return append(dst, '"')
}

func appendHardText(dst []byte, s string, from int) []byte {
	if !utf8.ValidString(s[from:]) {
		dst = append(dst, `{"b64":"`...)
		dst = appendBase64String(dst, s)
		return append(dst, `"}`...)
	}
	dst = append(dst, '"')
	dst = append(dst, s[:from]...)
	for i := from; i < len(s); i++ {
		switch c := s[i]; {
		case plain[c] || c >= 0x80:
			dst = append(dst, c)
		case c == '"' || c == '\\':
			dst = append(dst, '\\', c)
		case c == '\b':
			dst = append(dst, `\b`...)
		case c == '\t':
			dst = append(dst, `\t`...)
		case c == '\n':
			dst = append(dst, `\n`...)
		case c == '\f':
			dst = append(dst, `\f`...)
		case c == '\r':
			dst = append(dst, `\r`...)
		default:
			const digits = "0123456789abcdef"
			dst = append(dst, `\u00`...)
			dst = append(dst, digits[c>>4], digits[c&15])
		}
	}
	return append(dst, '"')
}

// appendBase64String is urlEncoding.AppendEncode for a string, three bytes at a time so that nothing is copied to the heap.
func appendBase64String(dst []byte, s string) []byte {
	var chunk [48]byte
	for len(s) > 0 {
		n := copy(chunk[:], s)
		dst = urlEncoding.AppendEncode(dst, chunk[:n])
		s = s[n:]
	}
	return dst
}

func appendBytes(dst, b []byte) []byte {
	dst = append(dst, '"')
	dst = urlEncoding.AppendEncode(dst, b)
	return append(dst, '"')
}

func appendUint(dst []byte, n uint64) []byte {
	dst = append(dst, '"')
	dst = strconv.AppendUint(dst, n, 10)
	return append(dst, '"')
}

func appendTime(dst []byte, t time.Time) []byte {
	dst = append(dst, '"')
	dst = strconv.AppendInt(dst, t.UnixNano(), 10)
	return append(dst, '"')
}

// member describes one member of an object of type T, in the order the canonical form has them.
type member[T any] struct {
	name     string
	optional bool
	read     func(x *T, r reader) error
}

// reader reads one value. Its methods accept canonical spellings only and consume the value.
type reader struct{ dec *jsontext.Decoder }

// newReader reads data, which it does not keep. Duplicate names are found by object, which knows the order of names.
func newReader(data []byte) reader {
	return reader{jsontext.NewDecoder(bytes.NewBuffer(data), jsontext.AllowDuplicateNames(true))}
}

// end fails unless everything has been read.
func (r reader) end() error {
	switch _, err := r.dec.ReadToken(); {
	case err == io.EOF:
		return nil
	case err != nil:
		return fmt.Errorf("after the object: %w", err)
	}
	return errors.New("something follows the object")
}

// object reads one JSON object into x: the members in their order, none twice, none unknown, none missing but the optional.
func object[T any](r reader, members []member[T], x *T) error {
	if err := r.open('{'); err != nil {
		return err
	}
	next := 0
	for r.dec.PeekKind() != '}' {
		raw, err := r.dec.ReadValue()
		if err != nil {
			return err
		}
		i := next
		for i < len(members) && !isName(raw, members[i].name) {
			i++
		}
		if i == len(members) {
			for _, m := range members[:next] {
				if isName(raw, m.name) {
					return fmt.Errorf("field %q: twice or out of order", m.name)
				}
			}
			return fmt.Errorf("unknown field %.64s", raw)
		}
		for ; next < i; next++ {
			if !members[next].optional {
				return fmt.Errorf("field %q is missing", members[next].name)
			}
		}
		if err := members[i].read(x, r); err != nil {
			return fmt.Errorf("field %q: %w", members[i].name, err)
		}
		next = i + 1
	}
	for ; next < len(members); next++ {
		if !members[next].optional {
			return fmt.Errorf("field %q is missing", members[next].name)
		}
	}
	_, err := r.dec.ReadToken()
	return err
}

// array reads a JSON array of at most limit elements.
func array(r reader, limit int, element func() error) error {
	if err := r.open('['); err != nil {
		return err
	}
	for n := 0; r.dec.PeekKind() != ']'; n++ {
		if n == limit {
			return fmt.Errorf("more than %d elements", limit)
		}
		if err := element(); err != nil {
			return fmt.Errorf("element %d: %w", n, err)
		}
	}
	_, err := r.dec.ReadToken()
	return err
}

func (r reader) open(kind jsontext.Kind) error {
	if got := r.dec.PeekKind(); got != kind && got != 0 {
		return fmt.Errorf("want %q, got %s", byte(kind), got)
	}
	_, err := r.dec.ReadToken()
	return err
}

func isName(raw jsontext.Value, name string) bool {
	return len(raw) == len(name)+2 && string(raw[1:len(raw)-1]) == name
}

// quoted reads a JSON string without escapes: integers and base64.
func (r reader) quoted() ([]byte, error) {
	raw, err := r.dec.ReadValue()
	if err != nil {
		return nil, err
	}
	if raw[0] != '"' {
		return nil, fmt.Errorf("want a string, got %s", raw.Kind())
	}
	if raw = raw[1 : len(raw)-1]; bytes.IndexByte(raw, '\\') >= 0 {
		return nil, errors.New("escapes may not stand here")
	}
	return raw, nil
}

// text reads what appendText writes.
func (r reader) text(to *string) error {
	switch kind := r.dec.PeekKind(); kind {
	case '"', 0:
		raw, err := r.dec.ReadValue()
		if err != nil {
			return err
		}
		if bytes.IndexByte(raw, '\\') < 0 {
			*to = string(raw[1 : len(raw)-1])
			return nil
		}
		b, err := jsontext.AppendUnquote(make([]byte, 0, len(raw)), raw)
		if err != nil {
			return err
		}
		*to = string(b)
		return nil
	case '{':
		return r.base64Text(to)
	default:
		return fmt.Errorf("want a string, got %s", kind)
	}
}

func (r reader) base64Text(to *string) error {
	err := object(r, []member[string]{{"b64", false, func(s *string, r reader) error {
		raw, err := r.quoted()
		if err != nil {
			return err
		}
		b, err := urlEncoding.AppendDecode(nil, raw)
		if err != nil {
			return errors.New("not unpadded base64url")
		}
		*s = string(b)
		return nil
	}}}, to)
	if err == nil && utf8.ValidString(*to) {
		return errors.New("base64 of text that is valid UTF-8")
	}
	return err
}

// fixed reads exactly len(to) bytes in base64url.
func (r reader) fixed(to []byte) error {
	raw, err := r.quoted()
	if err != nil {
		return err
	}
	if len(raw) != urlEncoding.EncodedLen(len(to)) {
		return fmt.Errorf("want %d bytes in unpadded base64url", len(to))
	}
	if _, err := urlEncoding.Decode(to, raw); err != nil {
		return errors.New("not unpadded base64url")
	}
	return nil
}

func (r reader) uint64(to *uint64) error {
	raw, err := r.quoted()
	if err != nil {
		return err
	}
	n, err := parseUint(string(raw), 64)
	*to = n
	return err
}

// uint32 reads a JSON number.
func (r reader) uint32(to *uint32) error {
	raw, err := r.dec.ReadValue()
	if err != nil {
		return err
	}
	n, err := parseUint(string(raw), 32)
	*to = uint32(n)
	return err
}

// parseUint accepts what strconv.FormatUint writes and no other spelling.
func parseUint(s string, bits int) (uint64, error) {
	n, err := strconv.ParseUint(s, 10, bits)
	if err != nil || s[0] == '+' || (s[0] == '0' && len(s) > 1) {
		return 0, fmt.Errorf("%.24q is not a plain decimal of at most %d bits", s, bits)
	}
	return n, nil
}

func (r reader) time(to *time.Time) error {
	raw, err := r.quoted()
	if err != nil {
		return err
	}
	n, err := parseUint(string(raw), 63)
	*to = time.Unix(0, int64(n)).UTC()
	return err
}

// flag reads true, the only value an optional boolean is written with.
func (r reader) flag(to *bool) error {
	raw, err := r.dec.ReadValue()
	if err != nil {
		return err
	}
	if raw.Kind() != 't' {
		return errors.New("want true or nothing")
	}
	*to = true
	return nil
}

// parseLeaf parses prefix and one object into x, which again must turn into the same bytes.
func parseLeaf[T any](leaf []byte, prefix string, members []member[T], x *T, valid func(*T) error, again func([]byte, *T) []byte) error {
	most := MaxLeaf
	if prefix == "" {
		most = MaxEvidence
	}
	if len(leaf) > most {
		return fmt.Errorf("%d bytes: at most %d are read", len(leaf), most)
	}
	if len(leaf) < len(prefix) || string(leaf[:len(prefix)]) != prefix {
		return fmt.Errorf("does not begin with %q", prefix)
	}
	r := newReader(leaf[len(prefix):])
	if err := object(r, members, x); err != nil {
		return err
	}
	if err := r.end(); err != nil {
		return err
	}
	if err := valid(x); err != nil {
		return err
	}
	return sameBytes(leaf, again(make([]byte, 0, len(leaf)+64), x))
}

// sameBytes is the check of the canonical form.
func sameBytes(got, want []byte) error {
	if bytes.Equal(got, want) {
		return nil
	}
	n := 0
	for n < len(got) && n < len(want) && got[n] == want[n] {
		n++
	}
	return fmt.Errorf("not in canonical form from byte %d on", n)
}
