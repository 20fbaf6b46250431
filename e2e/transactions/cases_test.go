package transactions

import (
	"bufio"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// site is the configuration of most tests: room for everything, a route for every behaviour, and none for /nowhere. When a client leaves
// at the very moment at which its request is decided, Envoy's access log may not know the receipt: its outcome is unknown in the end.
const site = `
log: {seal_every: 200ms, outcome_timeout: 30s}
beat:
  cycle: 800ms
  r1: {capacity: R1CAP}
  w1: {capacity: W1CAP, max_wait: W1WAIT}
default_route: {class: W1}
class_rules:
- {name: search-is-hot, when: 'path.startsWith("/search")', class: R1}
- {name: fails, when: 'path.startsWith("/celfail") && int(path) > 0', class: R1}
routes:
- {name: health, prefix: /healthz, cluster: up, policy: {exclude: true}}
- {name: probe, prefix: /probe/do/forge, cluster: up, policy: {exclude: true}}
- {name: hot, prefix: /hot, cluster: up, policy: {class: R1, tenant: shop}}
- {name: pages, prefix: /p, cluster: up}
- {name: search, prefix: /search, cluster: up}
- {name: celfail, prefix: /celfail, cluster: up}
- {name: delta, prefix: /delta, cluster: up, policy: {classify_body: true}}
- {name: broken, prefix: /broken, cluster: dead}
- {name: stubborn, prefix: /stubborn, cluster: dead, retries: 2}
- {name: flaky, prefix: /flaky, cluster: flaky, retries: 2}
- {name: slow, prefix: /slow, cluster: up, timeout: 0.3s}
- {name: hop, prefix: /hop, cluster: up, internal_redirects: 2}
- {name: ws, prefix: /ws, cluster: up, websocket: true}
- {name: allow, prefix: /allow, cluster: up, policy: {on_receipt_failure: ALLOW}}
- {name: rpc, prefix: /grpc.testing.TestService/, cluster: rpc}
dry_run: DRYRUN
envoy:
  access_log_flush: 50ms
  clusters:
  - {name: up, endpoints: ["UPSTREAM"]}
  - {name: dead, endpoints: ["DEAD"]}
  - {name: flaky, endpoints: ["DEAD", "UPSTREAM"]}
  - {name: rpc, endpoints: ["GRPC"], http2: true}
`

// edited is site with other values for its settings in capitals.
func edited(replace ...string) string {
	s := strings.NewReplacer(replace...).Replace(site)
	return strings.NewReplacer("R1CAP", "4096", "W1CAP", "4096", "W1WAIT", "800ms", "DRYRUN", "false").Replace(s)
}

// transaction is one case: what a client does, and the receipts that must come of it.
type transaction struct {
	name string
	// send does what the client does and checks what it gets. Its requests bear name in their authority.
	send func(w *world, name string)
	// want is the receipts as entry.String tells them, in order of admission, none for a transaction that has none. They
	// are as in lean capture. In full capture an outcome may also be told by ext_proc, which knows no response flags: the
	// access log and the end of the ext_proc stream race, and whoever comes first has told it.
	want []string
	// reached is how many requests the upstream sees.
	reached int
}

// answers sends a GET and wants this status, and the receipt id and class in the response if and only if there is a receipt.
func answers(code int, target string) func(*world, string) {
	return func(w *world, name string) {
		w.t.Helper()
		w.wantStatus(name, w.Get(name, target), code)
	}
}

func (w *world) wantStatus(name string, resp *harness.Response, code int) {
	w.t.Helper()
	if resp.Status != code {
		w.t.Errorf("%s: status %d, want %d; %v\n%s", name, resp.Status, code, resp.Header, resp.Body)
	}
}

// ok200 is the end of a line of transaction.want when all went well.
const ok200 = " | als complete 200 up=200 via_upstream"

// ordinary are the transactions of HTTP/1.1.
var ordinary = []transaction{
	{name: "admitted-r1", send: answers(200, "/hot/do/bytes/3"), reached: 1,
		want: []string{"R1 admit ok by route:hot" + ok200}},
	{name: "admitted-w1", send: answers(200, "/p"), reached: 1,
		want: []string{"W1 admit ok by route:pages" + ok200}},
	{name: "class-by-rule", send: answers(200, "/search?q=x"), reached: 1,
		want: []string{"R1 admit ok by search-is-hot" + ok200}},
	// A rule that cannot be evaluated gives no class, and without a class nothing passes.
	{name: "class-rule-fails", send: answers(503, "/celfail"),
		want: []string{"unknown refuse class_rule_error by fails 503 | als local_reply 503 knhk_class_rule_error"}},
	{name: "head", reached: 1, send: func(w *world, name string) {
		w.wantStatus(name, w.Send(name, harness.Request{Method: "HEAD", Target: "/p/do/bytes/9"}), 200)
	}, want: []string{"W1 admit ok by route:pages" + ok200}},
	{name: "upstream-500", send: answers(500, "/p/do/status/500"), reached: 1,
		want: []string{"W1 admit ok by route:pages | als complete 500 up=500 via_upstream"}},
	{name: "upstream-404", send: answers(404, "/p/do/status/404"), reached: 1,
		want: []string{"W1 admit ok by route:pages | als complete 404 up=404 via_upstream"}},
	{name: "unreachable", send: answers(503, "/broken"),
		want: []string{"W1 admit ok by route:broken | als upstream 503 [UF] upstream_reset_before_response_started"}},
	{name: "unreachable-retried", send: answers(503, "/stubborn"),
		want: []string{"W1 admit ok by route:stubborn | als upstream 503 [UF,URX] upstream_reset_before_response_started attempts=3"}},
	{name: "reset-before-headers", send: answers(503, "/p/do/reset"), reached: 1,
		want: []string{"W1 admit ok by route:pages | als upstream 503 [UC] upstream_reset_before_response_started"}},
	{name: "reset-mid-body", reached: 1, send: cutMidBody,
		want: []string{"W1 admit ok by route:pages | als upstream 200 up=200 [UPE] upstream_reset_after_response_started"}},
	{name: "route-timeout", send: answers(504, "/slow/do/never"), reached: 1,
		want: []string{"W1 admit ok by route:slow | als timeout 504 [UT] response_timeout"}},
	{name: "client-leaves-before-response", reached: 1, send: func(w *world, name string) {
		r := harness.Request{Host: name + audited.CaseSuffix, Target: "/p/do/never"}
		if err := harness.AbortBeforeResponse(w.t.Context(), w.Listener, r, w.SentUpstream(name)); err != nil {
			w.t.Error(err)
		}
	}, want: []string{"W1 admit ok by route:pages | als client_abort [DC] downstream_remote_disconnect"}},
	{name: "client-leaves-mid-body", reached: 1, send: func(w *world, name string) {
		r := harness.Request{Host: name + audited.CaseSuffix, Target: "/p/do/drip/2000/20"}
		if _, err := harness.AbortMidBody(w.t.Context(), w.Listener, r); err != nil {
			w.t.Error(err)
		}
	}, want: []string{"W1 admit ok by route:pages | als client_abort 200 [DC] downstream_remote_disconnect"}},
	{name: "client-leaves-mid-upload", reached: 1, send: func(w *world, name string) {
		r := harness.Request{Host: name + audited.CaseSuffix, Method: "POST", Target: "/p/do/echo", Body: strings.Repeat("u", 1<<20)}
		if err := harness.AbortUpload(w.t.Context(), w.Listener, r, 1000, w.SentUpstream(name)); err != nil {
			w.t.Error(err)
		}
	}, want: []string{"W1 admit ok by route:pages | als client_abort [DC] downstream_remote_disconnect"}},
	{name: "chunked-upload-with-trailers", reached: 1, send: func(w *world, name string) {
		r := harness.Request{Method: "POST", Target: "/p/do/echo", Chunks: []string{"abc", "defg"}, Trailer: map[string]string{"X-Sum": "7"}}
		e := w.echo(name, w.Send(name, r))
		if e.Body != 7 || e.Trailer.Get("X-Sum") != "7" {
			w.t.Errorf("%s: the upstream got %+v", name, e)
		}
	}, want: []string{"W1 admit ok by route:pages" + ok200}},
	{name: "response-trailers", reached: 1, send: func(w *world, name string) {
		resp := w.Get(name, "/p/do/trailers")
		if w.wantStatus(name, resp, 200); resp.Trailer.Get("X-Sum") != "1" || len(resp.Trailer["X-Knhk-Receipt"]) > 0 {
			w.t.Errorf("%s: trailers %v", name, resp.Trailer)
		}
	}, want: []string{"W1 admit ok by route:pages" + ok200}},
	{name: "informational-103", send: answers(200, "/p/do/early"), reached: 1,
		want: []string{"W1 admit ok by route:pages" + ok200}},
	{name: "expect-continue", reached: 1, send: func(w *world, name string) {
		r := harness.Request{Method: "POST", Target: "/p/do/echo", Header: map[string]string{"Expect": "100-continue"}, Body: "12345"}
		if e := w.echo(name, w.Send(name, r)); e.Body != 5 {
			w.t.Errorf("%s: the upstream got %+v", name, e)
		}
	}, want: []string{"W1 admit ok by route:pages" + ok200}},
	{name: "pipelined", reached: 3, send: pipelined, want: []string{
		"W1 admit ok by route:pages | als complete 201 up=201 via_upstream",
		"R1 admit ok by route:hot | als complete 202 up=202 via_upstream",
		"W1 admit ok by route:pages | als complete 203 up=203 via_upstream"}},
	// Envoy follows the redirect itself: two transactions of one request, so two receipts.
	{name: "internal-redirect", reached: 2, send: answers(200, "/hop/do/redirect/302/hot/do/bytes/5"), want: []string{
		"W1 admit ok by route:hop | als complete 302 up=302 internal_redirect",
		"R1 admit ok by route:hot" + ok200}},
	{name: "excluded", send: answers(200, "/healthz"), reached: 1},
	// What only begins like an excluded path is not excluded: upstreams read what follows in their own ways.
	{name: "beside-excluded", send: answers(404, "/healthz;x/hot"),
		want: []string{"W1 admit ok by route:* | als local_reply 404 [NR] route_not_found"}},
	{name: "no-route", send: answers(404, "/nowhere"),
		want: []string{"W1 admit ok by route:* | als local_reply 404 [NR] route_not_found"}},
	{name: "options", reached: 1, send: func(w *world, name string) {
		w.wantStatus(name, w.Send(name, harness.Request{Method: "OPTIONS", Target: "/p"}), 200)
	}, want: []string{"W1 admit ok by route:pages" + ok200}},
	{name: "websocket", reached: 1, send: websocketEcho,
		want: []string{"W1 admit ok by route:ws | als client_abort 101 [DC] downstream_remote_disconnect"}},
	{name: "connect", send: func(w *world, name string) {
		c := w.Dial()
		defer c.Close()
		authority := name + audited.CaseSuffix + ":443"
		resp, err := c.Do(harness.Request{Method: "CONNECT", Host: authority, Target: authority})
		if err != nil {
			w.t.Fatal(err)
		}
		w.wantStatus(name, resp, 404)
	}, want: []string{"W1 admit ok by route:* | als local_reply 404 [NR] route_not_found"}},
}

func (w *world) echo(name string, resp *harness.Response) (e harness.Echo) {
	w.t.Helper()
	w.wantStatus(name, resp, 200)
	if err := json.Unmarshal(resp.Body, &e); err != nil {
		w.t.Errorf("%s: %v: %s", name, err, resp.Body)
	}
	return e
}

// cutMidBody has the upstream break its response off once the client has begun to read it.
func cutMidBody(w *world, name string) {
	w.t.Helper()
	c, err := net.DialTimeout("tcp", w.Listener, harness.Patience)
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(harness.Patience)); err != nil {
		w.t.Fatal(err)
	}
	r := harness.Request{Method: "POST", Host: name + audited.CaseSuffix, Target: "/p/do/cut/1000", Open: true}
	if _, err := c.Write(r.Bytes()); err != nil {
		w.t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: r.Method})
	if err != nil || resp.StatusCode != 200 {
		w.t.Fatalf("%s: %v, %v", name, resp, err)
	}
	if _, err := io.ReadFull(resp.Body, make([]byte, 1)); err != nil {
		w.t.Fatal(err)
	}
	if _, err := io.WriteString(c, "0\r\n\r\n"); err != nil { // the end of the request's body
		w.t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, resp.Body); err == nil {
		w.t.Errorf("%s: the body had an end", name)
	}
}

// pipelined sends three requests in one write.
func pipelined(w *world, name string) {
	w.t.Helper()
	c := w.Dial()
	defer c.Close()
	var all []byte
	for _, target := range []string{"/p/do/status/201", "/hot/do/status/202", "/p/do/status/203"} {
		all = append(all, harness.Request{Host: name + audited.CaseSuffix, Target: target}.Bytes()...)
	}
	if err := c.Write(all); err != nil {
		w.t.Fatal(err)
	}
	for code := 201; code <= 203; code++ {
		resp, err := c.Read("GET")
		if err != nil {
			w.t.Fatal(err)
		}
		w.wantStatus(name, resp, code)
	}
}

// play runs every case, waits for the receipts and compares.
func play(t *testing.T, w *world, list []transaction) audited.Transcript {
	t.Helper()
	for _, c := range list {
		c.send(w, c.name)
	}
	tr := w.Settle()
	for _, c := range list {
		t.Run(c.name, func(t *testing.T) {
			var got, want []string
			for i, e := range tr.ByCase[c.name] {
				if len(e.Outcomes) != 1 {
					t.Errorf("%d outcomes", len(e.Outcomes))
				}
				got = append(got, e.String())
				if i < len(c.want) && w.Capture == "full" && e.Outcomes[0].Source == "ext_proc" {
					want = append(want, toldByStream(c.want[i]))
				} else if i < len(c.want) {
					want = append(want, c.want[i])
				}
			}
			want = append(want, c.want[len(want):]...)
			if g, x := strings.Join(got, "\n"), strings.Join(want, "\n"); g != x {
				t.Errorf("receipts\n%s\nwant\n%s", g, x)
			}
			for _, id := range w.IDs[c.name] {
				if known := tr.Has(c.name, id); known != (len(c.want) > 0) {
					t.Errorf("the response said x-knhk-receipt: %q", id)
				}
			}
			if n := w.Reached(c.name); n != c.reached {
				t.Errorf("the upstream saw %d requests, want %d", n, c.reached)
			}
		})
	}
	return tr
}

// responseFlags are the flags in a line of entry.String.
var responseFlags = regexp.MustCompile(` \[[A-Z,]+\]`)

// toldByStream is a line of transaction.want as it stands when ext_proc has told the outcome.
func toldByStream(line string) string {
	return responseFlags.ReplaceAllString(strings.Replace(line, "| als ", "| ext_proc ", 1), "")
}

func TestTransactions(t *testing.T) {
	audited.Both(t, func(t *testing.T, capture string) {
		w := start(t, stack.Config{YAML: edited(), Capture: capture})
		play(t, w, slices.Concat(ordinary, protocols, bodies))
		localReplies(w)
		pathless(w)
		flaky(w)
		redirected(w)
		if n := w.Metric("knhk_outcomes_total", `knhk_source="ext_proc"`); (n > 1) != (capture == "full") {
			t.Errorf("%v outcomes told by ext_proc", n) // in lean capture the one of a client that left before the decision
		}
		tr := w.Audit()
		for name := range tr.ByCase {
			if strings.HasPrefix(name, "unreceipted-") {
				t.Errorf("a receipt for %s", name)
			}
		}
	})
}
