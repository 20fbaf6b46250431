package spiffe

import (
	"errors"
	"log/slog"
	"net"
	"runtime"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxTimer bounds one wait: timers follow the monotonic clock, certificates the wall clock, which may be set or have slept.
const maxTimer = time.Minute

// connections closes connections when a certificate expires. Nobody tells it that one was closed before: its handle is dropped by the
// garbage collector together with the tls.Conn, and the entry with it. One timer stands for all.
type connections struct {
	now func() time.Time
	log *slog.Logger

	mu     sync.Mutex
	open   map[uint64]connection
	next   uint64
	timer  *time.Timer // nil when nothing is open
	due    time.Time   // when it is wanted to fire
	closed bool
}

type connection struct {
	conn net.Conn
	peer spiffeid.ID
	end  time.Time
}

// handle is kept by the TLS configuration of one connection, and so by its tls.Conn.
type handle struct {
	conns *connections
	conn  net.Conn
}

func newConnections(now func() time.Time, log *slog.Logger) *connections {
	return &connections{now: now, log: log, open: map[uint64]connection{}}
}

// closeAt sees to it that h's connection is closed at end.
func (h *handle) closeAt(end time.Time, peer spiffeid.ID) {
	c := h.conns
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		h.conn.Close()
		return
	}
	n := c.next
	c.next++
	c.open[n] = connection{h.conn, peer, end}
	c.arm(end)
	c.mu.Unlock()
	// The collector's goroutine must not touch the timer: in tests it is outside the bubble that the timer belongs to.
	runtime.AddCleanup(h, c.forget, n)
}

func (c *connections) forget(n uint64) {
	c.mu.Lock()
	delete(c.open, n)
	c.mu.Unlock()
}

// arm sees to it that sweep runs at end at the latest. c.mu is held.
func (c *connections) arm(end time.Time) {
	if c.timer != nil && !end.Before(c.due) {
		return
	}
	c.due = end
	d := min(max(end.Sub(c.now()), time.Millisecond), maxTimer)
	if c.timer == nil {
		c.timer = time.AfterFunc(d, c.sweep)
		return
	}
	c.timer.Reset(d)
}

// sweep closes what has expired and waits for what expires next.
func (c *connections) sweep() {
	var expired []connection
	c.mu.Lock()
	if c.closed || c.timer == nil {
		c.mu.Unlock()
		return
	}
	now := c.now()
	var next time.Time
	for n, e := range c.open {
		switch {
		case !now.Before(e.end):
			expired = append(expired, e)
			delete(c.open, n)
		case next.IsZero() || e.end.Before(next):
			next = e.end
		}
	}
	c.timer.Stop()
	c.timer = nil
	if !next.IsZero() {
		c.arm(next)
	}
	c.mu.Unlock()
	for _, e := range expired {
		// One that was closed and is not collected yet says so here, and is nothing to warn of.
		if err := e.conn.Close(); !errors.Is(err, net.ErrClosed) {
			c.log.Warn("tls connection closed: a certificate expired", "peer", e.peer.String(), "not_after", stamp(e.end))
		}
	}
}

// close closes all.
func (c *connections) close() {
	c.mu.Lock()
	c.closed = true
	if c.timer != nil {
		c.timer.Stop()
	}
	open := c.open
	c.open = nil
	c.mu.Unlock()
	for _, e := range open {
		e.conn.Close()
	}
}
