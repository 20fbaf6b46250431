// Package stocknoop is the yardstick of the benchmark: an ext_proc server as anyone writes it on a first day, from the
// generated code and grpc's defaults, that lets everything pass.
//
// It promises to stay untuned: figures are ratios against it. Only e2e/bench runs it.
package stocknoop

import (
	"context"
	"net"

	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Serve answers on l until ctx ends, which is no error, or l fails.
func Serve(ctx context.Context, l net.Listener) error {
	s := grpc.NewServer()
	extprocv3.RegisterExternalProcessorServer(s, server{})
	defer context.AfterFunc(ctx, s.Stop)()
	return s.Serve(l)
}

type server struct {
	extprocv3.UnimplementedExternalProcessorServer
}

// Process answers both header phases with an empty CommonResponse.
func (server) Process(stream extprocv3.ExternalProcessor_ProcessServer) error {
	for {
		req, err := stream.Recv()
		if err != nil {
			return err // Canceled is how every ordinary stream ends
		}
		resp := &extprocv3.ProcessingResponse{}
		switch req.GetRequest().(type) {
		case *extprocv3.ProcessingRequest_RequestHeaders:
			resp.Response = &extprocv3.ProcessingResponse_RequestHeaders{
				RequestHeaders: &extprocv3.HeadersResponse{Response: &extprocv3.CommonResponse{}}}
		case *extprocv3.ProcessingRequest_ResponseHeaders:
			resp.Response = &extprocv3.ProcessingResponse_ResponseHeaders{
				ResponseHeaders: &extprocv3.HeadersResponse{Response: &extprocv3.CommonResponse{}}}
		default:
			return status.Error(codes.InvalidArgument, "only header phases are expected")
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
	}
}
