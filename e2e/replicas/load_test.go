package replicas

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/knhk/sidecar/e2e/harness"
)

const (
	clients = 12
	patient = 4                     // of the clients, whose every request takes the upstream a while
	spacing = 20 * time.Millisecond // at least, of one client's requests
	keepFor = 10 * time.Second      // a connection: harness.Conn ends after 30 s
)

// request is one request that load has sent, and what came back.
type request struct {
	target string
	class  string
	status int
	id     string
	err    error
}

// judge says what is wrong with a request, or with its receipt e.
func (r *request) judge(e *entry) error {
	switch {
	case r.err != nil:
		return fmt.Errorf("%s: %w", r.target, r.err)
	case r.status != http.StatusOK:
		return fmt.Errorf("%s: status %d", r.target, r.status)
	case e == nil:
		return fmt.Errorf("%s: no receipt %s", r.target, r.id)
	case !strings.HasSuffix(r.id, "."+e.replica):
		return fmt.Errorf("%s: receipt %s is in the log of replica %s", r.target, r.id, e.replica)
	case e.path != r.target || e.d.Class != r.class || e.d.Verdict != "admit":
		return fmt.Errorf("%s: receipt %s is of %s, %s %s", r.target, r.id, e.path, e.d.Class, e.d.Verdict)
	case len(e.outcomes) != 1:
		return fmt.Errorf("%s: %d outcomes of %s", r.target, len(e.outcomes), r.id)
	}
	if o := e.outcomes[0]; o.Result != "complete" || o.Status != http.StatusOK || o.Late {
		return fmt.Errorf("%s: outcome of %s is %s %s %d, late %v", r.target, r.id, o.Source, o.Result, o.Status, o.Late)
	}
	return nil
}

// load is a steady stream of requests, half R1 and half W1, some of them slow.
type load struct {
	stop func()
	wg   sync.WaitGroup

	mu   sync.Mutex
	sent []request
}

// begin starts load; end ends it.
func (w *world) begin() *load {
	ctx, cancel := context.WithCancel(context.WithoutCancel(w.t.Context()))
	l := &load{stop: cancel}
	for i := range clients {
		l.wg.Go(func() { l.client(ctx, w.Listener, i) })
	}
	w.t.Cleanup(func() { l.end() })
	return l
}

// end waits for the last answers and returns all requests that were sent.
func (l *load) end() []request {
	l.stop()
	l.wg.Wait()
	return l.sent
}

// client sends requests until ctx ends.
func (l *load) client(ctx context.Context, addr string, number int) {
	var conn *harness.Conn
	var dialed time.Time
	due := time.Now().Add(spacing * time.Duration(number) / clients)
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			if conn != nil {
				conn.Close()
			}
			return
		case <-time.After(time.Until(due)):
		}
		if due = due.Add(spacing); due.Before(time.Now()) {
			due = time.Now()
		}
		r := request{class: "W1", target: "/p"}
		if n%2 == 0 {
			r.class, r.target = "R1", "/hot"
		}
		if number < patient {
			r.target += "/do/slow/250"
		}
		r.target += fmt.Sprintf("?%d-%d", number, n)
		if conn != nil && time.Since(dialed) > keepFor {
			conn.Close()
			conn = nil
		}
		if conn == nil {
			dialed = time.Now()
			conn, r.err = harness.Dial(context.WithoutCancel(ctx), addr)
		}
		if conn != nil {
			resp, err := conn.Do(harness.Request{Method: http.MethodPost, Target: r.target, Body: "x"})
			switch {
			case err != nil:
				r.err = err
				conn.Close()
				conn = nil
			default:
				r.status, r.id = resp.Status, resp.Header.Get("X-Knhk-Receipt")
				if r.id == "" {
					r.err = errors.New("no x-knhk-receipt")
				}
			}
		}
		l.mu.Lock()
		l.sent = append(l.sent, r)
		l.mu.Unlock()
	}
}
