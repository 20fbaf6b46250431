package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// leg is one side of connections: whose certificates were shown there.
type leg struct {
	mu      sync.Mutex
	serials map[string]bool
	expired int           // uses of a certificate past its end
	least   time.Duration // that a certificate had still to live when it was used
}

func (l *leg) use(serial string, left time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.serials == nil {
		l.serials, l.least = map[string]bool{}, left
	}
	l.serials[serial] = true
	l.least = min(l.least, left)
	if left <= 0 {
		l.expired++
	}
}

// judge wants certificates of several generations and none that had expired.
func (l *leg) judge(t *testing.T, name string) {
	t.Helper()
	t.Logf("%s: %d certificates, the oldest had %v to live when it was last used", name, len(l.serials), l.least.Round(time.Millisecond))
	if l.expired > 0 {
		t.Errorf("%s: %d uses of a certificate that had expired", name, l.expired)
	}
	if len(l.serials) < 2 {
		t.Errorf("%s: %d certificates: it was not renewed", name, len(l.serials))
	}
}

// traffic is clients that each keep a connection for as long as Envoy lets them.
type traffic struct {
	sent, failed atomic.Int64
	dials        atomic.Int64
	envoy        leg // Envoy's certificates as clients see them
	own          leg // those of the clients, on the connections that their requests took

	shown sync.Map // certificates of clients by their connections' addresses

	mu       sync.Mutex
	receipts map[string]bool
	problems []string
}

func (tr *traffic) problem(format string, args ...any) {
	tr.failed.Add(1)
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if len(tr.problems) < 5 {
		tr.problems = append(tr.problems, time.Now().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
	}
}

// client sends a request every pause until end, over HTTP/2 or HTTP/1.1. A connection is kept until its server ends it, and each new one
// shows the SVID that the client has by then.
func (tr *traffic) client(ctx context.Context, w *world, http2 bool, end time.Time, pause time.Duration) {
	transport := &http.Transport{MaxConnsPerHost: 1, MaxIdleConnsPerHost: 1, IdleConnTimeout: 0}
	defer transport.CloseIdleConnections()
	transport.Protocols = new(http.Protocols)
	transport.Protocols.SetHTTP1(!http2)
	transport.Protocols.SetHTTP2(http2)
	transport.DialTLSContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		tr.dials.Add(1)
		v, err := w.Client(ctx)
		if err != nil {
			return nil, err
		}
		cfg := v.TLS(stack.EnvoyID)
		cfg.NextProtos = []string{"http/1.1"}
		if http2 {
			cfg.NextProtos = []string{"h2"}
		}
		d := tls.Dialer{Config: cfg}
		c, err := d.DialContext(ctx, network, addr)
		if err == nil {
			tr.shown.Store(c.LocalAddr().String(), v.Certificates[0])
		}
		return c, err
	}
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for time.Now().Before(end) {
		tr.sent.Add(1)
		tr.one(ctx, transport, w.Listener)
		<-tick.C
	}
}

func (tr *traffic) one(ctx context.Context, transport *http.Transport, addr string) {
	ctx, cancel := context.WithTimeout(ctx, harness.Patience)
	defer cancel()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) {
		if c, ok := tr.shown.Load(i.Conn.LocalAddr().String()); ok {
			tr.own.use(serial(c.(*x509.Certificate)), time.Until(c.(*x509.Certificate).NotAfter))
		}
	}})
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+addr+"/load", nil)
	if err != nil {
		tr.problem("%v", err)
		return
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		tr.problem("%v", err)
		return
	}
	defer resp.Body.Close()
	id := resp.Header.Get("X-Knhk-Receipt")
	if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusOK || id == "" {
		tr.problem("status %d, receipt %q, %v: %.80s", resp.StatusCode, id, err, body)
		return
	}
	cert := resp.TLS.PeerCertificates[0]
	tr.envoy.use(serial(cert), time.Until(cert.NotAfter))
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if tr.receipts[id] {
		tr.problems = append(tr.problems, "two answers with receipt "+id)
	}
	tr.receipts[id] = true
}

func serial(c *x509.Certificate) string { return fmt.Sprintf("%x", c.SerialNumber) }

// connection is what knhk says of each of its connections at debug level.
var connection = regexp.MustCompile(`time=(\S+) level=DEBUG msg="tls connection" peer=(\S+) peer_serial=(\S+) peer_not_after=(\S+) own_serial=(\S+) own_not_after=(\S+)`)

var cutOff = regexp.MustCompile(`(?m)^.*tls connection closed: a certificate expired.*$`)

// TestRotation has certificates live shortly and be renewed several times under load: no request fails, none is without a receipt, and
// nobody uses a certificate that has expired, on any leg.
func TestRotation(t *testing.T) {
	// The margins are thirds and halves of the lifetime: with less of it a slow machine would be late for reasons of its own.
	ttl, duration, clients := 20*time.Second, time.Minute, 4
	if withSPIRE() || os.Getenv("KNHK_FAULT_FULL") == "1" {
		ttl, duration, clients = time.Minute, 3*time.Minute, 6
	}
	if testing.Short() {
		t.Skip("it takes as long as certificates live")
	}
	w := start(t, ttl)
	before := w.decisions()
	w.Upstream.Forget()
	tr := &traffic{receipts: map[string]bool{}}
	end := time.Now().Add(duration)
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() { tr.client(t.Context(), w, i%2 == 0, end, 50*time.Millisecond) })
	}
	wg.Wait()

	sent := tr.sent.Load()
	t.Logf("%d requests in %v over %d connections, SVIDs of %v: %d failed", sent, duration, tr.dials.Load(), ttl, tr.failed.Load())
	if n := tr.failed.Load(); n > 0 || len(tr.problems) > 0 {
		t.Errorf("%d of %d requests failed: %s", n, sent, strings.Join(tr.problems, "\n"))
	}
	if n := tr.dials.Load(); n <= int64(clients) {
		t.Errorf("%d connections of %d clients: Envoy did not end any in time", n, clients)
	}
	tr.envoy.judge(t, "Envoy as clients see it")
	tr.own.judge(t, "clients as Envoy sees them")

	var upstream, served leg
	for _, s := range w.Upstream.Seen() {
		upstream.use(serial(s.Peer), s.PeerLeft)
		served.use(serial(s.Own), s.OwnLeft)
	}
	upstream.judge(t, "Envoy as the upstream sees it")
	served.judge(t, "the upstream as Envoy sees it")
	if n := int64(len(w.Upstream.Seen())); n != sent {
		t.Errorf("the upstream has seen %d requests of %d", n, sent)
	}

	// Every request has one receipt. What became of it is known but for the entries that were on their way in the moment in which an access
	// log stream ended for its age, which a machine that is short of time can lose: they stay pending, which is told, not hidden.
	var pending int64
	harness.Eventually(t, "almost no outcome is awaited", func() bool {
		c, done := w.admin()
		defer done()
		st, err := c.Status(t.Context(), &statusRequest{})
		pending = int64(st.GetPendingOutcomes())
		return err == nil && pending <= sent/100
	})
	if n := w.decisions() - before; n != uint64(sent) {
		t.Errorf("%d receipts of %d requests", n, sent)
	}
	known := 0
	results := map[any]int{}
	for _, r := range w.receipts() {
		if tr.receipts[r.id] {
			known++
			results[r.outcome["result"]]++
		}
	}
	t.Logf("%d outcomes are known, %d are not", results["complete"], known-results["complete"])
	if results["complete"]+results[nil] != known || int64(results[nil]) > sent/100 {
		t.Errorf("outcomes %v: every request was answered whole", results)
	}
	if known != len(tr.receipts) || int64(known) != sent {
		t.Errorf("%d of %d receipts that clients have are there, of %d requests", known, len(tr.receipts), sent)
	}

	log, err := os.ReadFile(w.Dir + "/knhk.log")
	if err != nil {
		t.Fatal(err)
	}
	var own, envoy leg
	for _, m := range connection.FindAllStringSubmatch(string(log), -1) {
		if m[2] != stack.EnvoyID {
			continue
		}
		at := instant(t, m[1])
		envoy.use(m[3], instant(t, m[4]).Sub(at))
		own.use(m[5], instant(t, m[6]).Sub(at))
	}
	envoy.judge(t, "Envoy as knhk sees it, at handshakes")
	own.judge(t, "knhk as Envoy sees it, at handshakes")
	// And after the handshake knhk itself ends a connection when the first certificate does; it had to for none.
	if late := cutOff.FindAllString(string(log), 5); len(late) > 0 {
		t.Errorf("knhk had to end connections because a certificate expired, which Envoy should have left before: %s", strings.Join(late, "\n"))
	}
}

func instant(t *testing.T, s string) time.Time {
	t.Helper()
	at, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		t.Fatal(err)
	}
	return at
}
