package envoywire

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec that Codec falls back to
	"google.golang.org/grpc/mem"
)

// Frame receives one gRPC message as it stood on the wire, without decoding it. Its zero value is empty and ready. It
// holds a reference to gRPC's buffer until Free or until the next message is received into it.
type Frame struct{ buf mem.Buffer }

// Bytes is the message. It is valid until Free or the next receive, and must not be written to.
func (f *Frame) Bytes() []byte {
	if f.buf == nil {
		return nil
	}
	return f.buf.ReadOnlyData()
}

// Free gives the buffer back to gRPC. An empty frame may be freed again.
func (f *Frame) Free() {
	if f.buf != nil {
		f.buf.Free()
		f.buf = nil
	}
}

// Encoder is a message that is sent as the bytes it gives: the whole encoded message, never written to again.
type Encoder interface{ EncodeFrame() []byte }

// Codec is the codec of the Envoy-facing gRPC server: install it with grpc.ForceServerCodecV2. It moves Frame and Encoder
// as they are; everything else (health, reflection) goes through grpc's own protobuf codec. Its zero value is ready and safe for
// concurrent use.
type Codec struct{}

var fallback = encoding.GetCodecV2("proto")

// Name is "proto": the messages are protobuf, whoever encodes them.
func (Codec) Name() string { return "proto" }

// Marshal gives the bytes of an Encoder, or encodes a protobuf message.
func (Codec) Marshal(v any) (mem.BufferSlice, error) {
	if e, ok := v.(Encoder); ok {
		return mem.BufferSlice{mem.SliceBuffer(e.EncodeFrame())}, nil
	}
	b, err := fallback.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode grpc message: %w", err)
	}
	return b, nil
}

// Unmarshal keeps data in a *Frame, or decodes it into a protobuf message.
func (Codec) Unmarshal(data mem.BufferSlice, v any) error {
	if f, ok := v.(*Frame); ok {
		f.Free()
		// gRPC frees data when we return. One buffer: take our own reference; several: copy them into one.
		f.buf = data.MaterializeToBuffer(mem.DefaultBufferPool())
		return nil
	}
	if err := fallback.Unmarshal(data, v); err != nil {
		return fmt.Errorf("decode grpc message: %w", err)
	}
	return nil
}
