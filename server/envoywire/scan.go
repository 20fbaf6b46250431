// Package envoywire reads Envoy's gRPC messages from their protobuf wire bytes, carries raw messages through gRPC, and knows
// what Envoy's words for the end of a request mean.
//
// Decoding a whole ProcessingRequest or access log entry costs more than everything else we do for a request, and we
// need a dozen fields of it. Reader walks over the fields of one message without allocating; MapEntry reads one entry of
// a protobuf map; Codec hands raw frames to the services that scan them and leaves all other messages to grpc's own codec.
//
// Promises: what a scan accepts is what google.golang.org/protobuf accepts, as far as the fields read go: the last value
// of a singular field wins, messages that come in pieces are merged by their reader, unknown fields and known fields
// of a wrong wire type are skipped, text that is not UTF-8 is an error. The fuzz tests of server/extproc and
// server/accesslog hold it to the generated decoder. Not promised: that bytes inside fields nobody reads are valid.
//
// Callers are server/extproc and server/accesslog; package server installs Codec in the gRPC server.
package envoywire

import (
	"errors"
	"math"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// Errors of a Reader. They carry no position: a frame that does not parse is refused whole.
var (
	ErrMalformed = errors.New("read protobuf: malformed message")
	ErrUTF8      = errors.New("read protobuf: string field is not UTF-8")
)

// Reader walks over the fields of one message. Its zero value reads an empty message. It keeps no bytes of its own: all
// slices it gives are parts of the buffer it was made with.
type Reader struct {
	buf []byte
	err error

	// Num and Type describe the field that Next stopped at.
	Num  protowire.Number
	Type protowire.Type
	// Bytes is its value when Type is BytesType; nil otherwise.
	Bytes []byte
	// Scalar is its value when Type is VarintType, Fixed64Type or Fixed32Type.
	Scalar uint64
}

// NewReader reads the message in b.
func NewReader(b []byte) Reader { return Reader{buf: b} }

// Next goes to the next field. It returns false at the end and after an error; Err tells which. Groups are stepped over.
func (r *Reader) Next() bool {
	if r.err != nil || len(r.buf) == 0 {
		return false
	}
	var tag uint64
	if c := r.buf[0]; c < 0x80 {
		tag, r.buf = uint64(c), r.buf[1:]
	} else {
		v, n := protowire.ConsumeVarint(r.buf)
		if n < 0 {
			return r.fail()
		}
		tag, r.buf = v, r.buf[n:]
	}
	num := tag >> 3
	if num < uint64(protowire.MinValidNumber) || num > uint64(protowire.MaxValidNumber) {
		return r.fail()
	}
	r.Num, r.Type, r.Bytes, r.Scalar = protowire.Number(num), protowire.Type(tag&7), nil, 0
	var n int
	switch r.Type {
	case protowire.VarintType:
		r.Scalar, n = protowire.ConsumeVarint(r.buf)
	case protowire.BytesType:
		r.Bytes, n = protowire.ConsumeBytes(r.buf)
	case protowire.Fixed64Type:
		r.Scalar, n = protowire.ConsumeFixed64(r.buf)
	case protowire.Fixed32Type:
		var v uint32
		v, n = protowire.ConsumeFixed32(r.buf)
		r.Scalar = uint64(v)
	default:
		n = protowire.ConsumeFieldValue(r.Num, r.Type, r.buf)
	}
	if n < 0 {
		return r.fail()
	}
	r.buf = r.buf[n:]
	return true
}

func (r *Reader) fail() bool {
	r.err = ErrMalformed
	return false
}

// Err is nil, ErrMalformed, ErrUTF8 or what Fail was given.
func (r *Reader) Err() error { return r.err }

// Fail ends the walk with err, unless err is nil or the walk has already failed. For readers of nested messages.
func (r *Reader) Fail(err error) {
	if r.err == nil {
		r.err = err
	}
}

// IsMessage reports whether the current field is num in the wire type of messages, strings and bytes.
func (r *Reader) IsMessage(num protowire.Number) bool {
	return r.Num == num && r.Type == protowire.BytesType
}

// Text stores the current field in dst if it has the wire type of a string, and fails if it is not UTF-8. The slice is
// never nil, so that a field that was sent empty can be told from one that was not sent.
func (r *Reader) Text(dst *[]byte) {
	if r.Type != protowire.BytesType {
		return
	}
	if !utf8.Valid(r.Bytes) {
		r.Fail(ErrUTF8)
		return
	}
	*dst = r.Bytes
}

// Raw stores the current field in dst if it has the wire type of bytes.
func (r *Reader) Raw(dst *[]byte) {
	if r.Type == protowire.BytesType {
		*dst = r.Bytes
	}
}

// Bool stores the current field in dst if it has the wire type of a bool.
func (r *Reader) Bool(dst *bool) {
	if r.Type == protowire.VarintType {
		*dst = r.Scalar != 0
	}
}

// Int32 stores the current field in dst if it has the wire type of an int32 or an enum; more bits are cut off.
func (r *Reader) Int32(dst *int32) {
	if r.Type == protowire.VarintType {
		*dst = int32(r.Scalar)
	}
}

// Uint32 stores the current field in dst if it has the wire type of a uint32; more bits are cut off.
func (r *Reader) Uint32(dst *uint32) {
	if r.Type == protowire.VarintType {
		*dst = uint32(r.Scalar)
	}
}

// Int64 stores the current field in dst if it has the wire type of an int64.
func (r *Reader) Int64(dst *int64) {
	if r.Type == protowire.VarintType {
		*dst = int64(r.Scalar)
	}
}

// Uint64 stores the current field in dst if it has the wire type of a uint64.
func (r *Reader) Uint64(dst *uint64) {
	if r.Type == protowire.VarintType {
		*dst = r.Scalar
	}
}

// Double stores the current field in dst if it has the wire type of a double.
func (r *Reader) Double(dst *float64) {
	if r.Type == protowire.Fixed64Type {
		*dst = math.Float64frombits(r.Scalar)
	}
}

// MapEntry reads one entry of a map with string keys. values is the entry's value when it came in one piece, which is
// what encoders write. When it came in n > 1 pieces, Values walks over them; n == 0 is an entry without value, whose
// value is empty.
func MapEntry(b []byte) (key, value []byte, n int, err error) {
	r := NewReader(b)
	for r.Next() {
		switch r.Num {
		case 1:
			r.Text(&key)
		case 2:
			if r.Type == protowire.BytesType {
				value = r.Bytes
				n++
			}
		}
	}
	return key, value, n, r.Err()
}

// EachValue calls f for the pieces of a map entry's value, in order, and stops at the first error.
func EachValue(entry []byte, f func(piece []byte) error) error {
	r := NewReader(entry)
	for r.Next() {
		if r.IsMessage(2) {
			r.Fail(f(r.Bytes))
		}
	}
	return r.Err()
}
