package server

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/knhk/sidecar/server/envoywire"
)

// sink is a connection that gives endless bytes.
type sink struct {
	net.Conn
	closed bool
}

func (s *sink) Read(b []byte) (int, error) { return len(b), nil }
func (s *sink) Close() error               { s.closed = true; return nil }

// fakeStream is a stream of a connection whose messages come as told.
type fakeStream struct {
	grpc.ServerStream
	ctx  context.Context
	recv func(m any) error
}

func (f *fakeStream) Context() context.Context { return f.ctx }
func (f *fakeStream) RecvMsg(m any) error      { return f.recv(m) }

func streamOf(c *peerConn, recv func(any) error) *fakeStream {
	return &fakeStream{ctx: peer.NewContext(context.Background(), &peer.Peer{Addr: c.RemoteAddr()}), recv: recv}
}

// TestGuardConns: room is made by who never spoke, the oldest first; without such a one the newcomer goes.
func TestGuardConns(t *testing.T) {
	g := newGuard(slog.New(slog.DiscardHandler))
	var all []*peerConn
	for range maxConns {
		all = append(all, g.admit(&sink{}))
	}
	all[3].born = all[3].born.Add(-time.Hour)
	if g.admit(&sink{}) == nil || !all[3].Conn.(*sink).closed || len(g.conns) != maxConns {
		t.Errorf("the oldest silent connection did not make room: %d connections", len(g.conns))
	}
	for c := range g.conns {
		c.spoke.Store(true)
	}
	if g.admit(&sink{}) != nil {
		t.Error("a connection above the bound")
	}
	all[7].Close()
	if g.admit(&sink{}) == nil {
		t.Error("no connection where there is room")
	}
}

// TestGuardBytes: what is finished does not count, what is not ends the connection, alone or together with others.
func TestGuardBytes(t *testing.T) {
	g := newGuard(slog.New(slog.DiscardHandler))
	b := make([]byte, 64<<10)
	read := func(c *peerConn, bytes int) (err error) {
		for n := 0; n < bytes && err == nil; n += len(b) {
			_, err = c.Read(b)
		}
		return err
	}
	good := g.admit(&sink{})
	for range 10_000 { // 640 MB in finished messages
		if err := read(good, len(b)); err != nil {
			t.Fatal(err)
		}
		good.settle(len(b))
	}
	if err := read(g.admit(&sink{}), maxHeldConn+len(b)); !errors.Is(err, errHeld) {
		t.Errorf("much from one: %v", err)
	}
	g.sweep(t.Context())
	var err error
	n := 0
	for ; err == nil && n < 100; n++ {
		err = read(g.admit(&sink{}), 1<<20)
	}
	if !errors.Is(err, errHeld) || n < 40 || n > 52 {
		t.Errorf("1 MiB from each of %d: %v", n, err)
	}
	if err := read(good, fairHeld/2); err != nil {
		t.Errorf("who holds little: %v", err)
	}
	// A few lost bytes a second are forgotten.
	for range 10_000 {
		good.held.Add(10 << 10)
		g.sweep(t.Context())
	}
	if h := good.held.Load(); h > maxHeldConn/4 {
		t.Errorf("%d bytes are held against a connection that loses 10 KiB a tick", h)
	}
}

// TestGuardSilence: a stream without a message ends its connection after muteTicks, one that spoke does not.
func TestGuardSilence(t *testing.T) {
	var out bytes.Buffer
	g := newGuard(slog.New(slog.NewTextHandler(&out, nil)))
	mute, spoken := g.admit(&sink{}), g.admit(&sink{})
	stop, said := make(chan struct{}), make(chan struct{})
	done := make(chan error, 2)
	go func() {
		first := true
		done <- g.stream(nil, streamOf(spoken, func(any) error {
			if first {
				first = false
				return nil
			}
			close(said)
			<-stop
			return io.EOF
		}), nil, func(_ any, ss grpc.ServerStream) error {
			for {
				if err := ss.RecvMsg(&envoywire.Frame{}); err != nil {
					return err
				}
			}
		})
	}()
	go func() {
		done <- g.stream(nil, streamOf(mute, func(any) error { <-stop; return io.EOF }), nil, func(_ any, ss grpc.ServerStream) error {
			return ss.RecvMsg(&envoywire.Frame{})
		})
	}()
	<-said
	for mute.silent() == 0 {
		time.Sleep(time.Millisecond)
	}
	for i := range muteTicks - 1 {
		if g.sweep(t.Context()); mute.Conn.(*sink).closed {
			t.Fatalf("closed after %d ticks", i+1)
		}
	}
	if g.sweep(t.Context()); !mute.Conn.(*sink).closed || spoken.Conn.(*sink).closed {
		t.Errorf("silent one closed: %v, other: %v", mute.Conn.(*sink).closed, spoken.Conn.(*sink).closed)
	}
	if !strings.Contains(out.String(), "closed_for_silent_streams=1") {
		t.Errorf("not told: %s", out.String())
	}
	close(stop)
	<-done
	<-done
	if g.open.Load() != 0 || mute.silent() != 0 {
		t.Errorf("%d open, %d silent after the end", g.open.Load(), mute.silent())
	}
}

// TestGuardStreams: above maxOpen a connection full of silent streams makes room; where there is none, a stream is refused.
func TestGuardStreams(t *testing.T) {
	g := newGuard(slog.New(slog.DiscardHandler))
	c, full := g.admit(&sink{}), g.admit(&sink{})
	g.open.Store(maxOpen)
	pass := func(any, grpc.ServerStream) error { return nil }
	if err := g.stream(nil, streamOf(c, nil), nil, pass); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a stream too many: %v", err)
	}
	full.mutes[0].Store(manyMute + 1)
	if err := g.stream(nil, streamOf(full, nil), nil, pass); err == nil || !full.Conn.(*sink).closed {
		t.Errorf("a stream of the connection to blame: %v", err)
	}
	full = g.admit(&sink{})
	full.mutes[0].Store(manyMute + 1)
	if err := g.stream(nil, streamOf(c, nil), nil, pass); err != nil || !full.Conn.(*sink).closed {
		t.Errorf("a stream of another: %v", err)
	}
	if g.open.Load() != maxOpen {
		t.Errorf("%d streams counted", g.open.Load()-maxOpen)
	}
}

// BenchmarkGuard is what the guard adds to a request: a stream, a message, and the reads they came with.
func BenchmarkGuard(b *testing.B) {
	g := newGuard(slog.New(slog.DiscardHandler))
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		c := g.admit(&sink{})
		buf, f := make([]byte, 512), &envoywire.Frame{}
		ss := streamOf(c, func(any) error { return nil })
		recv := func(_ any, ss grpc.ServerStream) error { return ss.RecvMsg(f) }
		for pb.Next() {
			if _, err := c.Read(buf); err != nil {
				b.Error(err)
			}
			if err := g.stream(nil, ss, nil, recv); err != nil {
				b.Error(err)
			}
		}
	})
}
