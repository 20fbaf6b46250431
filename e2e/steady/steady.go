// Package steady sends a steady stream of requests through Envoy, for tests of what must not disturb it, and keeps what came back.
//
// It promises one journal entry for each request that was sent, and that a load ends when it is told to, once every answer has been
// read. It judges nothing. Only tests call it.
package steady

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/knhk/sidecar/e2e/harness"
)

// keepFor is how long a connection is used: harness.Conn ends after harness.Patience.
const keepFor = 10 * time.Second

// Config says what is sent.
type Config struct {
	Addr    string        // of Envoy, host:port
	Clients int           // connections, each with one request at a time
	Spacing time.Duration // from one request of a client to the next, at least
	Targets []string      // taken in turn; each gets a query that makes it unique
	Host    string        // default "steady.case"
	// OnSend, which may be nil, is called before each request.
	OnSend func()
}

// Request is one request and its answer.
type Request struct {
	Target       string
	Began, Ended time.Time
	Status       int
	ID           string // of the receipt; empty when the answer had none
	Body         string // of an answer that is not 200
	Err          error
}

// Load is a stream under way. Its methods may be called from several goroutines.
type Load struct {
	cfg  Config
	stop func()
	wg   sync.WaitGroup

	mu   sync.Mutex
	sent []*Request
}

// Begin starts a stream; End must be called. The end of ctx ends the stream too, after the answers to what has been sent.
func Begin(ctx context.Context, cfg Config) *Load {
	if cfg.Host == "" {
		cfg.Host = "steady.case"
	}
	ctx, cancel := context.WithCancel(ctx)
	l := &Load{cfg: cfg, stop: cancel}
	for i := range cfg.Clients {
		l.wg.Go(func() { l.client(ctx, i) })
	}
	return l
}

// End stops the stream, waits for the last answers and returns every request. It may be called again.
func (l *Load) End() []*Request {
	l.stop()
	l.wg.Wait()
	return l.sent
}

// Count is how many of the requests answered so far satisfy ok.
func (l *Load) Count(ok func(*Request) bool) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.sent {
		if ok(r) {
			n++
		}
	}
	return n
}

// Latest is the request answered last that satisfies ok, or nil.
func (l *Load) Latest(ok func(*Request) bool) *Request {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := len(l.sent) - 1; i >= 0; i-- {
		if ok(l.sent[i]) {
			return l.sent[i]
		}
	}
	return nil
}

func (l *Load) client(ctx context.Context, number int) {
	var conn *harness.Conn
	var dialed time.Time
	defer func() {
		if conn != nil {
			conn.Close()
		}
	}()
	for n := 0; ctx.Err() == nil; n++ {
		r := &Request{Target: fmt.Sprintf("%s?%d-%d", l.cfg.Targets[(number+n)%len(l.cfg.Targets)], number, n), Began: time.Now()}
		if l.cfg.OnSend != nil {
			l.cfg.OnSend()
		}
		if conn != nil && time.Since(dialed) > keepFor {
			conn.Close()
			conn = nil
		}
		if conn == nil {
			dialed = r.Began
			conn, r.Err = harness.Dial(context.WithoutCancel(ctx), l.cfg.Addr)
		}
		if conn != nil {
			resp, err := conn.Do(harness.Request{Method: http.MethodPost, Host: l.cfg.Host, Target: r.Target, Body: "x"})
			if err != nil {
				r.Err = err
				conn.Close()
				conn = nil
			} else if r.Status, r.ID = resp.Status, resp.Header.Get("X-Knhk-Receipt"); resp.Status != http.StatusOK {
				r.Body = string(resp.Body)
			}
		}
		r.Ended = time.Now()
		l.mu.Lock()
		l.sent = append(l.sent, r)
		l.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(l.cfg.Spacing - time.Since(r.Began)):
		}
	}
}
