package tunednoop

import (
	"context"
	"net"
	"testing"

	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/knhk/sidecar/e2e/bench/stocknoop"
)

// Both servers must give the same answers, or the one is no floor for the other.
func TestSameAnswersAsStock(t *testing.T) {
	ask := []*extprocv3.ProcessingRequest{
		{Request: &extprocv3.ProcessingRequest_RequestHeaders{RequestHeaders: &extprocv3.HttpHeaders{EndOfStream: true}}},
		{Request: &extprocv3.ProcessingRequest_ResponseHeaders{ResponseHeaders: &extprocv3.HttpHeaders{}}},
	}
	stock, tuned := answers(t, stocknoop.Serve, ask), answers(t, Serve, ask)
	for i := range ask {
		if !proto.Equal(stock[i], tuned[i]) {
			t.Errorf("message %d: stock %v, tuned %v", i, stock[i], tuned[i])
		}
	}
}

func answers(t *testing.T, serve func(context.Context, net.Listener) error,
	ask []*extprocv3.ProcessingRequest) []*extprocv3.ProcessingResponse {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- serve(ctx, l) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	}()
	cc, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	stream, err := extprocv3.NewExternalProcessorClient(cc).Process(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var out []*extprocv3.ProcessingResponse
	for _, m := range ask {
		if err := stream.Send(m); err != nil {
			t.Fatal(err)
		}
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, resp)
	}
	// What was not agreed is an error, never an answer.
	if err := stream.Send(&extprocv3.ProcessingRequest{}); err != nil {
		t.Fatal(err)
	}
	if resp, err := stream.Recv(); err == nil {
		t.Errorf("an empty message was answered with %v", resp)
	}
	return out
}

// kind reads tags alone; the generated decoder is the oracle.
func FuzzKind(f *testing.F) {
	for _, m := range []*extprocv3.ProcessingRequest{
		{Request: &extprocv3.ProcessingRequest_RequestHeaders{RequestHeaders: &extprocv3.HttpHeaders{EndOfStream: true}}},
		{ObservabilityMode: true, Request: &extprocv3.ProcessingRequest_ResponseHeaders{ResponseHeaders: &extprocv3.HttpHeaders{}}},
		{},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var m extprocv3.ProcessingRequest
		num, err := kind(b)
		if proto.Unmarshal(b, &m) != nil || err == nil && num > fieldResponseTrailer {
			return // kind stops at the first tag, the decoder reads all
		}
		var want protowire.Number
		if d := m.ProtoReflect().WhichOneof(m.ProtoReflect().Descriptor().Oneofs().ByName("request")); d != nil {
			want = d.Number()
		}
		if want != 0 && err != nil {
			t.Errorf("%x: %v, the decoder found field %d", b, err, want)
		}
	})
}
