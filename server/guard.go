package server

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/knhk/sidecar/server/access"
	"github.com/knhk/sidecar/server/envoywire"
)

// What peers of the Envoy-facing listener may take. An Envoy stays far below all of it: it holds a connection for each worker (more
// above maxStreams requests under way), sends a stream's first message with the stream, and sends messages whole.
//
// What they can make knhk hold at worst, beside what it needs itself (maxConns, maxOpen and maxHeld are added up over all peers):
//
//	connections       256 x 0.3 MiB of buffers                                              77 MiB
//	open streams      16,384 x about 20 KiB (a goroutine, gRPC's stream, header fields)    320 MiB
//	unread bytes      48 MiB, and 0.25 MiB of every connection, before one is closed       112 MiB
//	TLS handshakes    256 x at most 0.3 MiB of a client's certificates, while they last      77 MiB
//
// Bytes are counted as they come off the socket, decrypted where there is TLS, and taken off when a message is complete, so that unfinished messages, unread windows,
// endless header blocks and floods of control frames count alike. DATA frames of one byte cost gRPC some ten times what they
// count, and what a peer finishes earns it credit: one that mixes many small messages with unfinished ones is held by flow control
// alone, 64 MiB a connection. The garbage collector is told to work harder from memoryLimit on.
const (
	maxConns     = 256
	maxOpen      = 16_384    // streams
	maxHeldConn  = 16 << 20  // bytes of one connection
	maxHeld      = 48 << 20  // bytes of all; above, whoever holds more than fairHeld and sends more is closed
	fairHeld     = 256 << 10 // bytes
	manyMute     = 64        // streams without a message that make a connection the one to blame for maxOpen
	streamCredit = 512       // bytes of a stream that are no message: header block, window updates, reset
	muteTicks    = 16        // guardTicks in which a stream's first message has to come
	guardTick    = time.Second
	forget       = 7 // of what a connection holds, 1/128 is forgotten each tick: bytes that were lost with cancelled streams
)

var errHeld = errors.New("peer sends much and finishes nothing")

// guard bounds what the peers of the Envoy-facing listener can take. On the way of a request it costs a few atomic additions.
type guard struct {
	log  *slog.Logger
	tick atomic.Uint32
	open atomic.Int64 // streams
	held atomic.Int64 // bytes; summed up anew each tick

	refusedConns, refusedStreams, closed, mute atomic.Int64 // told of and zeroed each tick

	mu    sync.Mutex
	conns map[*peerConn]struct{}
}

func newGuard(log *slog.Logger) *guard { return &guard{log: log, conns: map[*peerConn]struct{}{}} }

// guardedListener hands out connections of the guard.
type guardedListener struct {
	net.Listener
	g *guard
}

// Accept gives the next connection. Above maxConns it makes room by closing the oldest that never sent a message, first among those whose
// handshake is not done: anybody can begin one. If there is none the newcomer is closed: to wait instead would leave an Envoy in the
// queue without a word.
func (l guardedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if p := l.g.admit(c); p != nil {
			return p, nil
		}
		c.Close()
	}
}

func (g *guard) admit(c net.Conn) *peerConn {
	p := &peerConn{Conn: c, g: g, born: time.Now()}
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.conns) >= maxConns {
		var oldest *peerConn
		for o := range g.conns {
			if !o.spoke.Load() && (oldest == nil || o.sooner(oldest)) {
				oldest = o
			}
		}
		g.refusedConns.Add(1)
		if oldest == nil {
			return nil
		}
		oldest.Conn.Close()
		delete(g.conns, oldest)
	}
	g.conns[p] = struct{}{}
	return p
}

// peerConn is a connection of a peer; it is the peer's address too, by which a stream finds its connection.
type peerConn struct {
	net.Conn
	g     *guard
	born  time.Time
	who   atomic.Pointer[access.Who] // nil until the handshake is done
	spoke atomic.Bool                // a whole message came
	held  atomic.Int64               // bytes that came and are not accounted for by a message or a stream's end; may be below 0 for a tick
	mutes [muteTicks]atomic.Int64    // streams without a message, by the tick in which they began
}

// Network and String make the connection its own remote address.
func (c *peerConn) Network() string      { return c.Conn.RemoteAddr().Network() }
func (c *peerConn) String() string       { return c.Conn.RemoteAddr().String() }
func (c *peerConn) RemoteAddr() net.Addr { return c }

// Read counts, and ends the connection when it is too much.
func (c *peerConn) Read(b []byte) (int, error) {
	return c.count(c.Conn.Read(b))
}

// count counts n bytes that were read: off the socket, or decrypted.
func (c *peerConn) count(n int, err error) (int, error) {
	held, all := c.held.Add(int64(n)), c.g.held.Add(int64(n))
	if held > maxHeldConn || held > fairHeld && all > maxHeld {
		c.g.closed.Add(1)
		c.Close()
		return 0, errHeld
	}
	return n, err
}

func (c *peerConn) settle(n int) {
	c.held.Add(int64(-n))
	c.g.held.Add(int64(-n))
}

// Close closes it and gives up its place. TLS or not, the connection below is closed: nothing is waited for.
func (c *peerConn) Close() error {
	c.leave()
	return c.Conn.Close()
}

func (c *peerConn) leave() {
	c.g.mu.Lock()
	delete(c.g.conns, c)
	c.g.mu.Unlock()
}

// sooner says whether c goes before o where room is needed.
func (c *peerConn) sooner(o *peerConn) bool {
	if known := c.who.Load() != nil; known != (o.who.Load() != nil) {
		return !known
	}
	return c.born.Before(o.born)
}

// expel closes the connections of those who may do nothing here any more.
func (g *guard) expel(knows func(access.Who) bool) {
	var out []*peerConn
	g.mu.Lock()
	for c := range g.conns {
		if who := c.who.Load(); who != nil && !knows(*who) {
			out = append(out, c)
		}
	}
	g.mu.Unlock()
	for _, c := range out {
		g.log.Warn("connection of an Envoy closed: its role was taken away", "peer", c.who.Load().String())
		c.Close()
	}
}

func (c *peerConn) silent() (n int64) {
	for i := range c.mutes {
		n += c.mutes[i].Load()
	}
	return n
}

// stream is a gRPC interceptor: it counts streams, and which of them have said something.
func (g *guard) stream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
	p, ok := peer.FromContext(ss.Context())
	c, isConn := (*peerConn)(nil), false
	if ok {
		c, isConn = p.Addr.(*peerConn)
	}
	if !isConn { // a listener that is not ours
		return h(srv, ss)
	}
	defer g.open.Add(-1)
	if g.open.Add(1) > maxOpen && !g.blame(c) {
		g.refusedStreams.Add(1)
		c.settle(streamCredit)
		return status.Error(codes.ResourceExhausted, "too many streams")
	}
	s := guarded{ServerStream: ss, c: c, tick: g.tick.Load() % muteTicks}
	c.mutes[s.tick].Add(1)
	defer s.end()
	return h(srv, &s)
}

// blame says whether a stream of c may open although there are too many: a connection full of silent ones is closed for it.
func (g *guard) blame(c *peerConn) bool {
	g.mu.Lock()
	worst, most := (*peerConn)(nil), int64(manyMute)
	for o := range g.conns {
		if n := o.silent(); n > most {
			worst, most = o, n
		}
	}
	g.mu.Unlock()
	if worst == nil {
		return false
	}
	g.closed.Add(1)
	worst.Close()
	return worst != c
}

// guarded is a stream that is counted.
type guarded struct {
	grpc.ServerStream
	c     *peerConn
	tick  uint32
	spoke atomic.Bool // at a drain the access log's reader may still be at it when its stream ends
}

func (s *guarded) RecvMsg(m any) error {
	err := s.ServerStream.RecvMsg(m)
	if err != nil {
		return err
	}
	n := 64 // framing, and messages that are not Envoy's
	if f, ok := m.(*envoywire.Frame); ok {
		n += len(f.Bytes())
	}
	s.c.settle(n)
	if !s.spoke.Load() && s.spoke.CompareAndSwap(false, true) {
		s.c.mutes[s.tick].Add(-1)
		if !s.c.spoke.Load() {
			s.c.spoke.Store(true)
		}
	}
	return nil
}

func (s *guarded) end() {
	s.c.settle(streamCredit)
	if s.spoke.CompareAndSwap(false, true) {
		s.c.mutes[s.tick].Add(-1)
	}
}

// unary counts the message of a unary call (health) as one.
func (g *guard) unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if c, ok := p.Addr.(*peerConn); ok {
			c.spoke.Store(true)
			c.settle(streamCredit)
		}
	}
	return h(ctx, req)
}

// run closes connections on which a stream stays silent, and tells of what was refused; until ctx ends.
func (g *guard) run(ctx context.Context) error {
	tick := time.NewTicker(guardTick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			g.sweep(ctx)
		}
	}
}

func (g *guard) sweep(ctx context.Context) {
	// The slot that comes round again holds streams that began muteTicks ago. It is looked at before new ones are counted there.
	next := (g.tick.Load() + 1) % muteTicks
	var sum int64
	var silent []*peerConn
	g.mu.Lock()
	for c := range g.conns {
		h := c.held.Load()
		switch {
		case h < 0:
			c.held.Add(-h)
			h = 0
		case h > 0:
			c.held.Add(-(h>>forget + 1))
		}
		sum += h
		if c.mutes[next].Load() > 0 {
			silent = append(silent, c)
		}
	}
	n := len(g.conns)
	g.mu.Unlock()
	for _, c := range silent {
		g.mute.Add(1)
		c.Close()
	}
	g.held.Store(sum)
	g.tick.Add(1)
	conns, streams, closed, mute := g.refusedConns.Swap(0), g.refusedStreams.Swap(0), g.closed.Swap(0), g.mute.Swap(0)
	if conns+streams+closed+mute > 0 {
		g.log.WarnContext(ctx, "peers of the Envoy-facing listener take too much", "refused_connections", conns, "refused_streams", streams,
			"closed_for_unfinished_messages_or_streams", closed, "closed_for_silent_streams", mute, "connections", n, "streams", g.open.Load(),
			"held_bytes", sum)
	}
}
