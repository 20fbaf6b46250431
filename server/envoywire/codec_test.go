package envoywire_test

import (
	"bytes"
	"context"
	"net"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/test/bufconn"

	"github.com/knhk/sidecar/server/envoywire"
)

// echo sends every frame back as it came.
var echo = grpc.ServiceDesc{
	ServiceName: "test.Echo", HandlerType: (*any)(nil),
	Streams: []grpc.StreamDesc{{StreamName: "Echo", ServerStreams: true, ClientStreams: true,
		Handler: func(_ any, ss grpc.ServerStream) error {
			var f envoywire.Frame
			defer f.Free()
			for {
				if err := ss.RecvMsg(&f); err != nil {
					return err
				}
				if err := ss.SendMsg(raw(bytes.Clone(f.Bytes()))); err != nil {
					return err
				}
			}
		}}},
}

type raw []byte

func (r raw) EncodeFrame() []byte { return r }

// TestCodecOnServer: frames of any size pass unchanged, and services with generated messages work beside them.
func TestCodecOnServer(t *testing.T) {
	srv := grpc.NewServer(grpc.ForceServerCodecV2(envoywire.Codec{}))
	srv.RegisterService(&echo, struct{}{})
	h := health.NewServer()
	h.SetServingStatus("x", healthv1.HealthCheckResponse_NOT_SERVING)
	healthv1.RegisterHealthServer(srv, h)
	l := bufconn.Listen(1 << 16)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:///b", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		srv.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	resp, err := healthv1.NewHealthClient(conn).Check(t.Context(), &healthv1.HealthCheckRequest{Service: "x"})
	if err != nil || resp.GetStatus() != healthv1.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health check: %v, %v", resp, err)
	}
	st, err := conn.NewStream(t.Context(), &echo.Streams[0], "/test.Echo/Echo", grpc.ForceCodecV2(envoywire.Codec{}))
	if err != nil {
		t.Fatal(err)
	}
	var got envoywire.Frame
	for _, n := range []int{0, 1, 100, 1 << 10, 1<<10 + 1, 1 << 14, 100_000, 3 << 20, 5} { // below and above gRPC's pooling and frame sizes
		want := raw(bytes.Repeat([]byte{byte(n), 7}, n/2+n%2)[:n])
		if err := st.SendMsg(want); err != nil {
			t.Fatal(err)
		}
		if err := st.RecvMsg(&got); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Bytes(), want) {
			t.Errorf("a frame of %d bytes came back as %d other bytes", n, len(got.Bytes()))
		}
	}
	got.Free()
	got.Free() // may be freed again
	if got.Bytes() != nil {
		t.Error("a freed frame still has bytes")
	}
	if err := st.CloseSend(); err != nil {
		t.Error(err)
	}
}

// counted is a pool that knows what is out.
type counted struct{ out int }

func (c *counted) Get(n int) *[]byte { c.out++; b := make([]byte, n); return &b }
func (c *counted) Put(*[]byte)       { c.out-- }

// TestFrameOwnsItsBuffer: gRPC frees its references when Unmarshal returns; the frame's own lasts until Free or the next
// message, and not longer.
func TestFrameOwnsItsBuffer(t *testing.T) {
	var pool counted
	message := func(fill byte) mem.BufferSlice {
		b := pool.Get(4096)
		for i := range *b {
			(*b)[i] = fill
		}
		return mem.BufferSlice{mem.NewBuffer(b, &pool)}
	}
	var f envoywire.Frame
	for _, fill := range []byte{1, 2} {
		m := message(fill)
		if err := (envoywire.Codec{}).Unmarshal(m, &f); err != nil {
			t.Fatal(err)
		}
		m.Free()
		if pool.out != 1 {
			t.Errorf("message %d: %d buffers held, want 1", fill, pool.out)
		}
		if b := f.Bytes(); len(b) != 4096 || b[0] != fill || b[4095] != fill {
			t.Errorf("message %d: other bytes", fill)
		}
	}
	f.Free()
	if pool.out != 0 {
		t.Errorf("%d buffers held after Free, want none", pool.out)
	}
	// Two buffers are joined in a copy; gRPC's own go back at once.
	m := append(message(3), message(4)...)
	if err := (envoywire.Codec{}).Unmarshal(m, &f); err != nil {
		t.Fatal(err)
	}
	m.Free()
	if b := f.Bytes(); pool.out != 0 || len(b) != 8192 || b[0] != 3 || b[8191] != 4 {
		t.Errorf("joined: %d bytes, %d buffers held", len(f.Bytes()), pool.out)
	}
	f.Free()
}

func TestCodecRejectsOthers(t *testing.T) {
	if _, err := (envoywire.Codec{}).Marshal(17); err == nil {
		t.Error("Marshal takes a number")
	}
	if err := (envoywire.Codec{}).Unmarshal(nil, new(int)); err == nil {
		t.Error("Unmarshal takes a number")
	}
}
