// Package tunednoop is the floor of the benchmark: the same answers as stocknoop with every saving that knhk makes
// around its own work, so that what knhk costs above it is knhk's own.
//
// It promises the settings of knhk's server (codec of server/envoywire, 64 stream workers, 128 KiB buffers, fixed
// windows, GOGC=400)
// and nothing else: no decision, no record, no look at a header. Only e2e/bench runs it.
package tunednoop

import (
	"context"
	"errors"
	"net"
	"runtime/debug"

	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/knhk/sidecar/server/envoywire"
)

// What knhk's server uses.
const (
	streamWorkers = 64
	ioBuffer      = 128 << 10
	streamWindow  = 64 << 10
	connWindow    = 1 << 20
	gcPercent     = 400
)

// Field numbers of the oneof in envoy.service.ext_proc.v3.ProcessingRequest.
const (
	fieldRequestHeaders  protowire.Number = 2
	fieldResponseHeaders protowire.Number = 3
	fieldResponseTrailer protowire.Number = 7
)

// Serve answers on l until ctx ends, which is no error, or l fails.
func Serve(ctx context.Context, l net.Listener) error {
	debug.SetGCPercent(gcPercent)
	replies, err := encodeReplies()
	if err != nil {
		return err
	}
	s := grpc.NewServer(
		grpc.ForceServerCodecV2(envoywire.Codec{}), grpc.NumStreamWorkers(streamWorkers),
		grpc.ReadBufferSize(ioBuffer), grpc.WriteBufferSize(ioBuffer),
		grpc.StaticStreamWindowSize(streamWindow), grpc.StaticConnWindowSize(connWindow),
	)
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: extprocv3.ExternalProcessor_ServiceDesc.ServiceName,
		Streams: []grpc.StreamDesc{{
			StreamName: "Process", ServerStreams: true, ClientStreams: true,
			Handler: func(_ any, stream grpc.ServerStream) error { return process(stream, replies) },
		}},
	}, nil)
	defer context.AfterFunc(ctx, s.Stop)()
	return s.Serve(l)
}

// reply is a message that is already encoded.
type reply []byte

// EncodeFrame returns the bytes as they are.
func (r reply) EncodeFrame() []byte { return r }

// encodeReplies returns the answer to each phase that may come.
func encodeReplies() (map[protowire.Number]reply, error) {
	headers := &extprocv3.HeadersResponse{Response: &extprocv3.CommonResponse{}}
	out := map[protowire.Number]reply{}
	for phase, m := range map[protowire.Number]*extprocv3.ProcessingResponse{
		fieldRequestHeaders:  {Response: &extprocv3.ProcessingResponse_RequestHeaders{RequestHeaders: headers}},
		fieldResponseHeaders: {Response: &extprocv3.ProcessingResponse_ResponseHeaders{ResponseHeaders: headers}},
		fieldResponseTrailer: {Response: &extprocv3.ProcessingResponse_ResponseTrailers{
			ResponseTrailers: &extprocv3.TrailersResponse{}}},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			return nil, err
		}
		out[phase] = b
	}
	return out, nil
}

func process(stream grpc.ServerStream, replies map[protowire.Number]reply) error {
	var f envoywire.Frame
	defer f.Free()
	for {
		if err := stream.RecvMsg(&f); err != nil {
			return err
		}
		phase, err := kind(f.Bytes())
		if err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
		r, ok := replies[phase]
		if !ok {
			return status.Error(codes.InvalidArgument, "only header phases are expected")
		}
		if err := stream.SendMsg(r); err != nil {
			return err
		}
	}
}

// kind returns the field number of the oneof that is set, by the tags alone.
func kind(b []byte) (protowire.Number, error) {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return 0, protowire.ParseError(n)
		}
		if num >= fieldRequestHeaders && num <= fieldResponseTrailer {
			return num, nil
		}
		m := protowire.ConsumeFieldValue(num, typ, b[n:])
		if m < 0 {
			return 0, protowire.ParseError(m)
		}
		b = b[n+m:]
	}
	return 0, errors.New("message without a request")
}
