package crash

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/knhk/sidecar/e2e/harness"
)

// clients is how many keep-alive connections the load comes over.
const clients = 8

// request is one request as its client saw it.
type request struct {
	path         string // with a query that no other request has
	class        string // of its route
	begun, ended time.Time
	status       int
	id           string // of the receipt; empty when the response had none
}

// kinds are the requests of the load: half of each class, some long enough at the upstream to be there when knhk dies.
var kinds = []struct{ class, method, target, body string }{
	{"R1", http.MethodGet, "/hot/page", ""},
	{"R1", http.MethodGet, "/hot/do/slow/15", ""},
	{"R1", http.MethodGet, "/hot/do/bytes/2000", ""},
	{"W1", http.MethodGet, "/p/page", ""},
	{"W1", http.MethodGet, "/p/do/slow/15", ""},
	{"W1", http.MethodPost, "/p/do/echo", "some body"},
}

// load sends requests over clients connections until it is stopped, and keeps the journal of what came back.
type load struct {
	addr   string
	next   *atomic.Uint64 // numbers requests, over all loads of a stack
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	journal []*request
	err     error
}

// startLoad begins a load; seed gives its choices.
func startLoad(ctx context.Context, addr string, next *atomic.Uint64, seed uint64) *load {
	ctx, cancel := context.WithCancel(ctx)
	l := &load{addr: addr, next: next, cancel: cancel}
	for i := range clients {
		l.wg.Go(func() {
			if err := l.client(ctx, rand.New(rand.NewPCG(seed, uint64(i)))); err != nil {
				l.mu.Lock()
				l.err = errors.Join(l.err, err)
				l.mu.Unlock()
			}
		})
	}
	return l
}

// client sends one request after the other. Envoy lives, so the connection must too: its end is an error.
func (l *load) client(ctx context.Context, rng *rand.Rand) error {
	c, err := harness.Dial(context.WithoutCancel(ctx), l.addr)
	if err != nil {
		return err
	}
	defer c.Close()
	for ctx.Err() == nil {
		k := kinds[rng.IntN(len(kinds))]
		r := &request{path: fmt.Sprintf("%s?n=%d", k.target, l.next.Add(1)), class: k.class, begun: time.Now()}
		resp, err := c.Do(harness.Request{Method: k.method, Target: r.path, Body: k.body})
		if err != nil {
			return fmt.Errorf("%s: %w", r.path, err)
		}
		r.ended, r.status, r.id = time.Now(), resp.Status, resp.Header.Get("X-Knhk-Receipt")
		l.mu.Lock()
		l.journal = append(l.journal, r)
		l.mu.Unlock()
		// The pace bounds how much there is to audit. It is slower when there is nothing but refusals.
		pause := time.Duration(rng.IntN(4)) * time.Millisecond
		if r.id == "" {
			pause = 10 * time.Millisecond
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
	return nil
}

// count is how many journalled requests satisfy ok, and what has gone wrong so far.
func (l *load) count(ok func(*request) bool) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, r := range l.journal {
		if ok(r) {
			n++
		}
	}
	return n, l.err
}

// stop ends the load once every response has been read and returns the journal.
func (l *load) stop() ([]*request, error) {
	l.cancel()
	l.wg.Wait()
	return l.journal, l.err
}
