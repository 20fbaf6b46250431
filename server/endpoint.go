package server

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/knhk/sidecar/server/access"
	"github.com/knhk/sidecar/server/admin"
	"github.com/knhk/sidecar/server/config"
	"github.com/knhk/sidecar/server/control"
)

// What the HTTP listeners hold at most. Somebody who never shows a certificate is gone after httpHeaderTime, and before that where his
// place is needed: anybody can begin a handshake.
//
// Of handshakes a listener holds fewer than of connections: a client's certificates may take 0.3 MiB until they are refused, so that
// both listeners together hold 77 MiB for people whom nobody knows.
const (
	maxHTTPConns  = 512
	maxHandshakes = 128
	maxProbeConns = 64
	probeTime     = 5 * time.Second
)

// endpoint is an HTTP server and its listener.
type endpoint struct {
	*http.Server
	ln     net.Listener
	on     access.Listener
	served http.Handler // what is behind the rules
}

// serve blocks until the server is shut down.
func (e endpoint) serve() error {
	serve := func() error { return e.Serve(e.ln) }
	if e.TLSConfig != nil {
		serve = func() error { return e.ServeTLS(e.ln, "", "") }
	}
	if err := serve(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// listen binds every listener, so that a taken port is told before anything runs.
func (s *Server) listen(ctx context.Context, cfg *config.Config) error {
	identity, daily := s.keys.custody(roleIdentity), s.keys.custody(roleDaily)
	ln, err := s.bind(ctx, "envoy", cfg.Listeners.Envoy)
	if err != nil {
		return err
	}
	if s.plain(cfg.Listeners.Envoy) {
		ln = access.PlainListener{Listener: ln, Authority: s.access, On: access.OnEnvoy, Insecure: cfg.InsecureLoopback}
	}
	s.envoy = guardedListener{ln, s.guard}

	for _, h := range []struct {
		on      access.Listener
		addr    config.Address
		handler http.Handler
	}{
		{access.OnAdmin, cfg.Listeners.Admin, admin.New(admin.Config{
			Log: s.receipts, Metrics: s.metrics.Handler(), Ready: s.Ready, IdentityCustody: identity, DailyCustody: daily,
		})},
		{access.OnTiles, cfg.Listeners.Tiles, tiles(filepath.Join(cfg.StateDir, "log"))},
	} {
		if h.addr.IsZero() {
			continue
		}
		ln, err := s.bind(ctx, string(h.on), h.addr)
		if err != nil {
			return err
		}
		var secure *tls.Config
		if s.plain(h.addr) {
			ln = access.PlainListener{Listener: ln, Authority: s.access, On: h.on, Insecure: cfg.InsecureLoopback}
		} else {
			secure = s.tlsFor(h.on, "h2", "http/1.1")
		}
		full := func() { s.access.Refuse(h.on, access.Full, errors.New("too many connections are open")) }
		b := &bounded{Listener: ln, most: maxHTTPConns, mostNew: maxHTTPConns, full: full}
		if secure != nil {
			b.mostNew, b.makeRoom = maxHandshakes, true
		}
		s.addHTTP(h.on, b, h.handler, secure)
	}
	if addr := cfg.Listeners.Probes; !addr.IsZero() {
		ln, err := s.bind(ctx, "probes", addr)
		if err != nil {
			return err
		}
		s.addProbes(&bounded{Listener: ln, most: maxProbeConns, mostNew: maxProbeConns, makeRoom: true})
	}
	// Last, and only now that the log's lock is ours: see control.Listen.
	own, err := control.Listen(ctx, cfg.StateDir, s.log)
	if err != nil {
		return err
	}
	s.listeners = append(s.listeners, own)
	keys := &keyService{keys: s.receipts, log: s.log, identityCustody: identity, dailyCustody: daily}
	s.addHTTP(access.OnControl, own, keys.handler(), nil)
	// The socket lets in root and the user that knhk runs as, nobody else.
	s.http[len(s.http)-1].ConnContext = func(ctx context.Context, _ net.Conn) context.Context {
		return access.WithWho(ctx, access.Who{UID: os.Geteuid(), User: true})
	}
	return nil
}

func (s *Server) bind(ctx context.Context, name string, addr config.Address) (net.Listener, error) {
	ln, err := listen(ctx, addr)
	if err != nil {
		return nil, fmt.Errorf("listeners.%s: %w", name, err)
	}
	s.listeners = append(s.listeners, ln)
	return ln, nil
}

// addHTTP serves h to those who may, over TLS if there is a configuration for it.
func (s *Server) addHTTP(on access.Listener, ln net.Listener, h http.Handler, secure *tls.Config) {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(secure != nil)
	protocols.SetUnencryptedHTTP2(secure == nil)
	s.http = append(s.http, endpoint{&http.Server{
		Handler: s.access.Handler(on, h), Protocols: &protocols, TLSConfig: secure, ConnContext: access.ConnContext,
		ReadHeaderTimeout: httpHeaderTime, IdleTimeout: httpIdle, MaxHeaderBytes: maxHeaderList,
		ErrorLog: log.New(handshakeErrors{s, on}, "", 0), ConnState: keepProven,
	}, ln, on, h})
}

// keepProven has a bounded listener keep a TLS connection whose handshake is done: until then http.Server calls it new.
func keepProven(c net.Conn, state http.ConnState) {
	if t, ok := c.(*tls.Conn); ok && (state == http.StateActive || state == http.StateIdle) {
		if b, ok := t.NetConn().(*boundedConn); ok {
			b.keep()
		}
	}
}

// addProbes serves /livez and /readyz to anyone: two words, and never why.
func (s *Server) addProbes(ln net.Listener) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if s.Ready() != nil {
			http.Error(w, "not ready", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	srv := &http.Server{
		Handler: mux, ReadTimeout: probeTime, WriteTimeout: probeTime, IdleTimeout: probeTime, MaxHeaderBytes: maxMetadata,
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	srv.SetKeepAlivesEnabled(false)
	s.http = append(s.http, endpoint{srv, ln, "probes", mux})
}

// bounded holds at most so many connections open, and at most mostNew that nobody said to keep. One too many is closed at once or, to
// makeRoom, the oldest that is not kept is.
type bounded struct {
	net.Listener
	most     int
	mostNew  int
	makeRoom bool
	full     func() // told of each that was closed for want of room; may be nil

	mu   sync.Mutex
	kept int       // of those that are open
	open list.List // of *boundedConn, those that are not kept, the oldest first
}

// Accept gives the next connection for which there is room.
func (b *bounded) Accept() (net.Conn, error) {
	for {
		c, err := b.Listener.Accept()
		if err != nil {
			return nil, err
		}
		bc := &boundedConn{Conn: c, b: b}
		var out net.Conn
		b.mu.Lock()
		if b.kept+b.open.Len() >= b.most || b.open.Len() >= b.mostNew {
			out = c
			if oldest := b.open.Front(); b.makeRoom && oldest != nil {
				o := b.open.Remove(oldest).(*boundedConn)
				out, o.at = o.Conn, nil
			}
		}
		if out != c {
			bc.at = b.open.PushBack(bc)
		}
		b.mu.Unlock()
		if out != nil {
			out.Close()
			if b.full != nil {
				b.full()
			}
		}
		if out != c {
			return bc, nil
		}
	}
}

// boundedConn gives up its place when it is closed.
type boundedConn struct {
	net.Conn
	b    *bounded
	at   *list.Element // in b.open; nil when it is kept or has no place any more
	kept bool
}

// keep has the listener make no room at this connection's cost.
func (c *boundedConn) keep() {
	c.b.mu.Lock()
	defer c.b.mu.Unlock()
	if c.at != nil {
		c.b.open.Remove(c.at)
		c.b.kept++
		c.at, c.kept = nil, true
	}
}

// Close closes it.
func (c *boundedConn) Close() error {
	c.b.mu.Lock()
	if c.at != nil {
		c.b.open.Remove(c.at)
		c.at = nil
	}
	if c.kept {
		c.b.kept--
		c.kept = false
	}
	c.b.mu.Unlock()
	return c.Conn.Close()
}

// Who is at the other end, as the listener below knows.
func (c *boundedConn) Who() access.Who {
	if k, ok := c.Conn.(interface{ Who() access.Who }); ok {
		return k.Who()
	}
	return access.Who{}
}
