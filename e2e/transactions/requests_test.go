package transactions

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

const (
	pages200 = "W1 admit ok by route:pages" + ok200
	obsText  = "caf\xe9\xff\x80" // RFC 9110 obs-text: bytes that are no UTF-8
)

// unusual are requests that clients really send and that are easily forgotten: large, not in UTF-8, said twice, cut off.
var unusual = []transaction{
	// Just below the 60 KiB at which Envoy answers itself.
	{name: "large-headers", reached: 1, send: func(w *world, name string) {
		r := harness.OversizedHeaders(58)
		r.Target = "/p"
		w.wantStatus(name, w.Send(name, r), 200)
	}, want: []string{pages200}},
	{name: "large-path", reached: 1, send: answers(200, "/p?"+strings.Repeat("q", 57<<10)), want: []string{pages200}},
	{name: "many-headers", reached: 1, send: func(w *world, name string) {
		h := map[string]string{}
		for i := range 80 {
			h[fmt.Sprintf("X-Many-%d", i)] = strings.Repeat("m", 600)
		}
		w.wantStatus(name, w.Send(name, harness.Request{Target: "/p", Header: h}), 200)
	}, want: []string{pages200}},
	{name: "obs-text-values", reached: 1, send: func(w *world, name string) {
		h := map[string]string{"X-Odd": obsText, "Content-Type": obsText, "X-Request-Id": obsText, "Cookie": obsText, "User-Agent": obsText,
			"Referer": obsText, "X-Forwarded-For": obsText, "Traceparent": obsText}
		e := w.echo(name, w.Send(name, harness.Request{Target: "/p/do/echo", Header: h}))
		if e.Header.Get("User-Agent") == "" {
			w.t.Errorf("%s: the upstream got %v", name, e.Header)
		}
	}, want: []string{pages200}},
	{name: "encoded-obs-text-path", reached: 1, send: answers(200, "/p/%e9%ff%80?%ff=%80"), want: []string{pages200}},
	// README, Authorisation rules: which spellings of a path are one.
	{name: "path-in-other-words", reached: 1, send: func(w *world, name string) {
		if e := w.echo(name, w.Send(name, harness.Request{Target: "/x/%2e%2e/p//%64o/./echo"})); e.URL != "/p/do/echo" {
			w.t.Errorf("%s: the upstream got %s", name, e.URL)
		}
	}, want: []string{pages200}},
	{name: "path-as-it-is", reached: 1, send: func(w *world, name string) {
		const path = "/p/%2564o;a/DO/a;b"
		w.wantStatus(name, w.Send(name, harness.Request{Target: path}), 200)
		if seen := w.Upstream.Seen(); seen[len(seen)-1].Path != path {
			w.t.Errorf("%s: the upstream got %s", name, seen[len(seen)-1].Path)
		}
	}, want: []string{pages200}},
	{name: "unreceipted-slash", send: answers(400, "/p%2Fdo/echo")},
	{name: "unreceipted-nul", send: answers(400, "/p/%00")},
	{name: "obs-text-by-upstream", reached: 1, send: func(w *world, name string) {
		resp := w.Get(name, "/p/do/odd")
		if w.wantStatus(name, resp, 200); resp.Header.Get("X-Odd") != obsText || len(resp.Header["X-Twice"]) != 2 {
			w.t.Errorf("%s: %v", name, resp.Header)
		}
	}, want: []string{pages200}},
	{name: "said-twice", reached: 1, send: func(w *world, name string) {
		resp := w.raw(name, "POST", "POST /p/do/echo HTTP/1.1\r\nHost: "+name+audited.CaseSuffix+"\r\nX-Request-Id: a\r\nX-Request-Id: b\r\n"+
			"Content-Type: text/a\r\nContent-Type: text/b\r\nX-Forwarded-Host: c\r\nX-Forwarded-Host: d\r\nX-Forwarded-For: 1.2.3.4\r\n"+
			"X-Forwarded-For: 5.6.7.8\r\nX-Knhk-Receipt: e\r\nX-Knhk-Receipt: f\r\nAge: 1\r\nAge: 2\r\nContent-Length: 2\r\n\r\nhi")
		if e := w.echo(name, resp); e.Body != 2 || len(e.Header["X-Request-Id"]) != 1 || len(e.Header["X-Knhk-Receipt"]) != 0 {
			w.t.Errorf("%s: the upstream got %v", name, e.Header)
		}
	}, want: []string{pages200}},
	{name: "trailers-both-ways", reached: 1, send: func(w *world, name string) {
		resp := w.Send(name, harness.Request{Method: "POST", Target: "/p/do/trailers", Chunks: []string{"a"}, Trailer: map[string]string{"X-Sum": "1"}})
		if w.wantStatus(name, resp, 200); resp.Trailer.Get("X-Sum") != "1" {
			w.t.Errorf("%s: trailers %v", name, resp.Trailer)
		}
	}, want: []string{pages200}},
	{name: "head-404", reached: 1, send: func(w *world, name string) {
		w.wantStatus(name, w.Send(name, harness.Request{Method: "HEAD", Target: "/p/do/status/404"}), 404)
	}, want: []string{"W1 admit ok by route:pages | als complete 404 up=404 via_upstream"}},
	{name: "status-204", reached: 1, send: answers(204, "/p/do/status/204"),
		want: []string{"W1 admit ok by route:pages | als complete 204 up=204 via_upstream"}},
	{name: "status-304", reached: 1, send: answers(304, "/p/do/status/304"),
		want: []string{"W1 admit ok by route:pages | als complete 304 up=304 via_upstream"}},
	// The client keeps its body back until it is told to go on.
	{name: "continue-awaited", reached: 1, send: func(w *world, name string) {
		c := w.Dial()
		defer c.Close()
		w.send(c, "POST /p/do/echo HTTP/1.1\r\nHost: "+name+audited.CaseSuffix+"\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
		if resp, err := c.ReadHead("POST"); err != nil || resp.Status != 100 {
			w.t.Fatalf("%s: %v, %v", name, resp, err)
		}
		w.send(c, "12345")
		if e := w.echo(name, w.read(c, name, "POST")); e.Body != 5 {
			w.t.Errorf("%s: the upstream got %+v", name, e)
		}
	}, want: []string{pages200}},
	{name: "pipelined-mixed", reached: 3, send: func(w *world, name string) {
		c := w.Dial()
		defer c.Close()
		host := name + audited.CaseSuffix
		w.send(c, string(bytes.Join([][]byte{
			harness.Request{Host: host, Target: "/hot/do/echo", Method: "POST", Body: "12345"}.Bytes(),
			harness.Request{Host: host, Target: "/nowhere"}.Bytes(),
			harness.Request{Host: host, Target: "/p/do/bytes/5", Method: "HEAD"}.Bytes(),
			harness.Request{Host: host, Target: "/p/do/slow/30", Method: "POST", Chunks: []string{"a", "b"}}.Bytes(),
		}, nil)))
		for _, want := range []struct {
			method string
			code   int
		}{{"POST", 200}, {"GET", 404}, {"HEAD", 200}, {"POST", 200}} {
			w.wantStatus(name, w.read(c, name, want.method), want.code)
		}
	}, want: []string{"R1 admit ok by route:hot" + ok200, "W1 admit ok by route:* | als local_reply 404 [NR] route_not_found", pages200, pages200}},
	{name: "upstream-resets-mid-upload", reached: 1, send: func(w *world, name string) {
		c := w.Dial()
		defer c.Close()
		w.send(c, string(harness.Request{Host: name + audited.CaseSuffix, Method: "POST", Target: "/p/do/reset", Chunks: []string{"abc"}, Open: true}.Bytes()))
		w.wantStatus(name, w.read(c, name, "POST"), 503)
	}, want: []string{"W1 admit ok by route:pages | als upstream 503 [UC] upstream_reset_before_response_started"}},
	// The upstream answers while the client is still sending.
	{name: "answered-mid-upload", reached: 1, send: func(w *world, name string) {
		c := w.Dial()
		defer c.Close()
		w.send(c, string(harness.Request{Host: name + audited.CaseSuffix, Method: "POST", Target: "/p/do/hasty/400", Chunks: []string{"abc"}, Open: true}.Bytes()))
		w.wantStatus(name, w.read(c, name, "POST"), 400)
	}, want: []string{"W1 admit ok by route:pages | als complete 400 up=400 via_upstream"}},
	// Envoy joins them or takes one: what is decided about is what the upstream gets.
	{name: "host-twice", reached: 1, send: func(w *world, name string) {
		w.wantStatus(name, w.raw(name, "GET", "GET /p HTTP/1.1\r\nHost: "+name+audited.CaseSuffix+"\r\nHost: other\r\n\r\n"), 200)
	}, want: []string{pages200}},
	{name: "absolute-target", reached: 1, send: func(w *world, name string) {
		w.wantStatus(name, w.raw(name, "GET", "GET http://"+name+audited.CaseSuffix+"/p HTTP/1.1\r\nHost: other\r\n\r\n"), 200)
	}, want: []string{pages200}},
	{name: "http2-head", reached: 1, send: func(w *world, name string) {
		c := h2(w)
		defer c.CloseIdleConnections()
		resp, err := c.Do(h2Request(w, name, "HEAD", "/p/do/bytes/5", nil))
		if err != nil {
			w.t.Fatal(err)
		}
		if resp.Body.Close(); resp.StatusCode != 200 {
			w.t.Errorf("%s: %s", name, resp.Status)
		}
	}, want: []string{pages200}},
	{name: "http2-trailers-both-ways", reached: 1, send: func(w *world, name string) {
		c := h2(w)
		defer c.CloseIdleConnections()
		r := h2Request(w, name, "POST", "/p/do/trailers", io.MultiReader(strings.NewReader("abc")))
		r.Trailer = http.Header{"X-Sum": {"1"}}
		resp, err := c.Do(r)
		if err != nil {
			w.t.Fatal(err)
		}
		defer resp.Body.Close()
		if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != 200 || resp.Trailer.Get("X-Sum") != "1" {
			w.t.Errorf("%s: %s, trailers %v, %v", name, resp.Status, resp.Trailer, err)
		}
	}, want: []string{pages200}},
	{name: "http2-upstream-resets-mid-body", reached: 1, send: func(w *world, name string) {
		c := h2(w)
		defer c.CloseIdleConnections()
		body, end := io.Pipe() // the upstream cuts when it ends
		resp, err := c.Do(h2Request(w, name, "POST", "/two/do/cut/1000", body))
		if err != nil {
			w.t.Fatal(err)
		}
		defer resp.Body.Close()
		if _, err := io.ReadFull(resp.Body, make([]byte, 1)); err != nil {
			w.t.Fatal(err)
		}
		end.Close()
		if _, err := io.Copy(io.Discard, resp.Body); err == nil {
			w.t.Errorf("%s: the body had an end", name)
		}
	}, want: []string{"W1 admit ok by route:two | als upstream 200 up=200 [UR] upstream_reset_after_response_started"}},
}

// refusedByEnvoy are ambiguous requests that Envoy answers before it asks: they reach nobody.
var refusedByEnvoy = []struct{ name, request string }{
	{"http1.0", "GET /p HTTP/1.0\r\nHost: HOST\r\n\r\n"},
	{"unknown-upgrade", "GET /p HTTP/1.1\r\nHost: HOST\r\nConnection: upgrade\r\nUpgrade: other\r\n\r\n"},
	{"length-twice", "POST /p HTTP/1.1\r\nHost: HOST\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"},
	{"length-and-chunked", "POST /p HTTP/1.1\r\nHost: HOST\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
	{"obs-text-host", "GET /p HTTP/1.1\r\nHost: HOST" + obsText + "\r\n\r\n"},
	{"obs-text-path", "GET /p/" + obsText + " HTTP/1.1\r\nHost: HOST\r\n\r\n"},
	{"obs-text-method", "G" + obsText + " /p HTTP/1.1\r\nHost: HOST\r\n\r\n"},
	{"nul-in-value", "GET /p HTTP/1.1\r\nHost: HOST\r\nX-A: a\x00b\r\n\r\n"},
	{"http2-in-http1", "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n"},
}

// ambiguous sends refusedByEnvoy: whatever Envoy says to it, no 2xx, no receipt, nothing at the upstream.
func ambiguous(w *world) {
	w.t.Helper()
	seen := len(w.Upstream.Seen())
	for _, c := range refusedByEnvoy {
		conn := w.Dial()
		w.send(conn, strings.ReplaceAll(c.request, "HOST", "unreceipted-"+c.name+audited.CaseSuffix))
		resp, err := conn.Read("GET") // in full capture the codec may close the connection before the answer is back from ext_proc
		if err == nil && (resp.Status < 400 || resp.Header.Get("X-Knhk-Receipt") != "") {
			w.t.Errorf("%s: %d %v", c.name, resp.Status, resp.Header)
		}
		conn.Close()
	}
	if n := len(w.Upstream.Seen()); n != seen {
		w.t.Errorf("the upstream saw %d ambiguous requests", n-seen)
	}
}

func (w *world) send(c *harness.Conn, s string) {
	w.t.Helper()
	if err := c.Write([]byte(s)); err != nil {
		w.t.Fatal(err)
	}
}

// read reads a response and notes its receipt id.
func (w *world) read(c *harness.Conn, name, method string) *harness.Response {
	w.t.Helper()
	resp, err := c.Read(method)
	if err != nil {
		w.t.Fatalf("%s: %v", name, err)
	}
	w.IDs[name] = append(w.IDs[name], resp.Header.Get("X-Knhk-Receipt"))
	return resp
}

// raw sends bytes on a connection of their own and reads the response.
func (w *world) raw(name, method, request string) *harness.Response {
	w.t.Helper()
	c := w.Dial()
	defer c.Close()
	w.send(c, request)
	return w.read(c, name, method)
}

// twoHops is the site with a route whose upstream is spoken to in HTTP/2.
func twoHops() string {
	s := strings.Replace(edited(), "- {name: rpc, prefix", "- {name: two, prefix: /two, cluster: up2}\n- {name: rpc, prefix", 1)
	return strings.Replace(s, "  - {name: dead,", "  - {name: up2, endpoints: [\"UPSTREAM\"], http2: true}\n  - {name: dead,", 1)
}

// TestUnusualRequests sends what clients really send, however odd: one receipt each, with the right outcome, or an answer of
// Envoy's own and nothing at the upstream.
func TestUnusualRequests(t *testing.T) {
	audited.Both(t, func(t *testing.T, capture string) {
		w := start(t, stack.Config{YAML: twoHops(), Capture: capture})
		play(t, w, unusual)
		ambiguous(w)
		for _, kind := range []string{"panic", "malformed", "unexpected"} {
			if n := w.Metric("knhk_extproc_events_total", fmt.Sprintf("knhk_event=%q", kind)); n != 0 {
				t.Errorf("%v ext_proc events %s", n, kind)
			}
		}
		if n := w.Metric("knhk_unreceipted_total", `knhk_kind="other"`); n != 0 {
			t.Errorf("%v unreceipted transactions without a name", n)
		}
		tr := w.Audit()
		host := ""
		for _, s := range w.Upstream.Seen() {
			if strings.HasPrefix(s.Host, "host-twice") {
				host = s.Host
			}
		}
		if twice := tr.ByCase["host-twice"]; len(twice) != 1 || twice[0].Evidence["authority"] != host {
			t.Errorf("decided about %v, the upstream got %q", twice, host)
		}
		for name := range tr.ByCase {
			if strings.HasPrefix(name, "unreceipted-") {
				t.Errorf("a receipt for %s", name)
			}
		}
	})
}
