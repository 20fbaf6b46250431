package e2e

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	alsdatav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/knhk/sidecar/envoy/bootstrap"
)

// answer is what the stand-in does with one message: a reply, or the end of the stream with an error.
type answer func(*extprocv3.ProcessingRequest) (*extprocv3.ProcessingResponse, error)

// sidecar stands in for knhk: it answers ext_proc as the test tells it and keeps everything Envoy sent. It is no model of
// knhk: these tests are about what Envoy does with the configuration from envoy/bootstrap.
type sidecar struct {
	extprocv3.UnimplementedExternalProcessorServer
	alsv3.UnimplementedAccessLogServiceServer

	addr   string
	server *grpc.Server
	health *health.Server

	mu      sync.Mutex
	answer  answer
	streams [][]*extprocv3.ProcessingRequest
	ends    []error // how each stream's Recv ended, in the order of ending
	entries []*alsdatav3.HTTPAccessLogEntry
	names   []string // log_name of each access log stream
}

// runSidecar starts the stand-in on addr; "" is a free loopback port. The zero answer is pass.
func runSidecar(t *testing.T, addr string) *sidecar {
	t.Helper()
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	s := &sidecar{addr: l.Addr().String(), server: grpc.NewServer(), health: health.NewServer(), answer: pass}
	extprocv3.RegisterExternalProcessorServer(s.server, s)
	alsv3.RegisterAccessLogServiceServer(s.server, s)
	healthv1.RegisterHealthServer(s.server, s.health)
	s.health.SetServingStatus(bootstrap.HealthService, healthv1.HealthCheckResponse_SERVING)
	s.serve(t, l)
	return s
}

// serve answers on one more listener until the test ends.
func (s *sidecar) serve(t *testing.T, l net.Listener) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.server.Serve(l) })
	t.Cleanup(func() {
		s.server.Stop()
		wg.Wait()
	})
}

func (s *sidecar) set(a answer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = a
}

// reset forgets what was seen and answers with a from now on.
func (s *sidecar) reset(a answer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer, s.streams, s.ends, s.entries = a, nil, nil, nil
}

// seen returns the messages of every stream so far.
func (s *sidecar) seen() [][]*extprocv3.ProcessingRequest {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([][]*extprocv3.ProcessingRequest, len(s.streams))
	for i, m := range s.streams {
		out[i] = append([]*extprocv3.ProcessingRequest(nil), m...)
	}
	return out
}

func (s *sidecar) ended() []error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]error(nil), s.ends...)
}

func (s *sidecar) logged() []*alsdatav3.HTTPAccessLogEntry {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*alsdatav3.HTTPAccessLogEntry(nil), s.entries...)
}

// Process keeps each message and answers it.
func (s *sidecar) Process(stream extprocv3.ExternalProcessor_ProcessServer) error {
	s.mu.Lock()
	n := len(s.streams)
	s.streams = append(s.streams, nil)
	s.mu.Unlock()
	for {
		req, err := stream.Recv()
		if err != nil {
			s.mu.Lock()
			s.ends = append(s.ends, err)
			s.mu.Unlock()
			return err
		}
		s.mu.Lock()
		if n < len(s.streams) {
			s.streams[n] = append(s.streams[n], proto.Clone(req).(*extprocv3.ProcessingRequest))
		}
		a := s.answer
		s.mu.Unlock()
		resp, err := a(req)
		if err != nil {
			return err
		}
		if resp == nil {
			continue
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
	}
}

// StreamAccessLogs keeps each entry.
func (s *sidecar) StreamAccessLogs(stream alsv3.AccessLogService_StreamAccessLogsServer) error {
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) || errors.Is(err, context.Canceled) || status.Code(err) == codes.Canceled {
			return nil
		}
		if err != nil {
			return err
		}
		s.mu.Lock()
		if id := msg.GetIdentifier(); id != nil {
			s.names = append(s.names, id.GetLogName()+"@"+id.GetNode().GetId())
		}
		s.entries = append(s.entries, msg.GetHttpLogs().GetLogEntry()...)
		s.mu.Unlock()
	}
}

// pass lets everything go on and sets no metadata.
func pass(req *extprocv3.ProcessingRequest) (*extprocv3.ProcessingResponse, error) {
	switch req.GetRequest().(type) {
	case *extprocv3.ProcessingRequest_RequestHeaders:
		return &extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_RequestHeaders{
			RequestHeaders: &extprocv3.HeadersResponse{}}}, nil
	case *extprocv3.ProcessingRequest_RequestBody:
		return &extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_RequestBody{
			RequestBody: &extprocv3.BodyResponse{}}}, nil
	case *extprocv3.ProcessingRequest_RequestTrailers:
		return &extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_RequestTrailers{
			RequestTrailers: &extprocv3.TrailersResponse{}}}, nil
	case *extprocv3.ProcessingRequest_ResponseHeaders:
		return &extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_ResponseHeaders{
			ResponseHeaders: &extprocv3.HeadersResponse{}}}, nil
	case *extprocv3.ProcessingRequest_ResponseTrailers:
		return &extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_ResponseTrailers{
			ResponseTrailers: &extprocv3.TrailersResponse{}}}, nil
	}
	return nil, status.Error(codes.InvalidArgument, "unexpected message")
}

// receipt is pass with an id and a class in the dynamic metadata of the request phase.
func receipt(id string) answer {
	return func(req *extprocv3.ProcessingRequest) (*extprocv3.ProcessingResponse, error) {
		resp, err := pass(req)
		if err == nil && (req.GetRequestHeaders() != nil || req.GetRequestBody() != nil) {
			resp.DynamicMetadata = metadataOf(id)
		}
		return resp, err
	}
}

// refuse answers 429 with Retry-After and an id.
func refuse(id string) answer {
	return func(*extprocv3.ProcessingRequest) (*extprocv3.ProcessingResponse, error) {
		return &extprocv3.ProcessingResponse{
			DynamicMetadata: metadataOf(id),
			Response: &extprocv3.ProcessingResponse_ImmediateResponse{ImmediateResponse: &extprocv3.ImmediateResponse{
				Status: &typev3.HttpStatus{Code: typev3.StatusCode_TooManyRequests},
				Headers: &extprocv3.HeaderMutation{SetHeaders: []*corev3.HeaderValueOption{{
					Header: &corev3.HeaderValue{Key: "retry-after", RawValue: []byte("1")}}}},
				Details: "no_credit",
			}},
		}, nil
	}
}

// fail ends the stream with a gRPC error.
func fail(*extprocv3.ProcessingRequest) (*extprocv3.ProcessingResponse, error) {
	return nil, status.Error(codes.Internal, "told to fail")
}

// silent never answers.
func silent(*extprocv3.ProcessingRequest) (*extprocv3.ProcessingResponse, error) { return nil, nil }

func metadataOf(id string) *structpb.Struct {
	return &structpb.Struct{Fields: map[string]*structpb.Value{
		bootstrap.MetadataNamespace: structpb.NewStructValue(&structpb.Struct{Fields: map[string]*structpb.Value{
			bootstrap.MetadataReceipt: structpb.NewStringValue(id),
			bootstrap.MetadataClass:   structpb.NewStringValue("W1"),
		}}),
	}}
}
