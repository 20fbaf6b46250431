package transactions

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.yaml.in/yaml/v3"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/stack"
)

// h2conn is an HTTP/2 connection whose frames the test writes itself. One goroutine may use it.
type h2conn struct {
	w    *world
	tcp  net.Conn
	fr   *http2.Framer
	out  bytes.Buffer // frames that flush sends in one write
	head bytes.Buffer
	enc  *hpack.Encoder
	next uint32
}

func (w *world) h2conn() *h2conn {
	w.t.Helper()
	c := &h2conn{w: w, tcp: w.TCP(), next: 1}
	c.out.WriteString(http2.ClientPreface)
	c.fr = http2.NewFramer(&c.out, c.tcp)
	c.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	c.enc = hpack.NewEncoder(&c.head)
	c.must(c.fr.WriteSettings())
	return c
}

func (c *h2conn) must(err error) {
	c.w.t.Helper()
	if err != nil {
		c.w.t.Fatal(err)
	}
}

// open writes a request's headers, given as name, value, name, value, and returns its stream.
func (c *h2conn) open(ended bool, fields ...string) uint32 {
	c.w.t.Helper()
	c.head.Reset()
	for i := 0; i < len(fields); i += 2 {
		c.must(c.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}))
	}
	id := c.next
	c.next += 2
	c.must(c.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: c.head.Bytes(), EndStream: ended, EndHeaders: true}))
	return id
}

// flush sends what was written, in one write.
func (c *h2conn) flush() {
	c.w.t.Helper()
	_, err := c.tcp.Write(c.out.Bytes())
	c.out.Reset()
	c.must(err)
}

// until reads frames until ok, which sees each, says so.
func (c *h2conn) until(ok func(http2.Frame) bool) {
	c.w.t.Helper()
	for {
		f, err := c.fr.ReadFrame()
		c.must(err)
		if ok(f) {
			return
		}
	}
}

// answer reads until the stream has ended and returns its status, "reset" if it was reset or "closed" if the connection ended,
// the receipt id and the body.
func (c *h2conn) answer(id uint32) (status, receipt string, body []byte) {
	c.w.t.Helper()
	for {
		f, err := c.fr.ReadFrame()
		if err != nil {
			if status == "" {
				status = "closed"
			}
			return status, receipt, body
		}
		if f.Header().StreamID != id {
			continue
		}
		ended := false
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			if status == "" {
				status = f.PseudoValue("status")
			}
			for _, h := range f.RegularFields() {
				if h.Name == "x-knhk-receipt" {
					receipt = h.Value
				}
			}
			ended = f.StreamEnded()
		case *http2.DataFrame:
			body = append(body, f.Data()...)
			ended = f.StreamEnded()
		case *http2.RSTStreamFrame:
			status, ended = "reset", true
		}
		if ended {
			return status, receipt, body
		}
	}
}

// parallelStreams has many requests under way at once on one connection, and wants each answered with its own receipt.
func parallelStreams(w *world) {
	w.t.Helper()
	const n = 60
	c := h2(w)
	defer c.CloseIdleConnections()
	var wg sync.WaitGroup
	var mu sync.Mutex
	ids := map[string]bool{}
	for i := range n {
		wg.Go(func() {
			r := h2Request(w, "h2-parallel", "POST", fmt.Sprintf("/p/do/slow/%d", i), strings.NewReader("x"))
			resp, err := c.Do(r)
			if err != nil {
				w.t.Error(err)
				return
			}
			defer resp.Body.Close()
			_, err = io.Copy(io.Discard, resp.Body)
			mu.Lock()
			defer mu.Unlock()
			if ids[resp.Header.Get("X-Knhk-Receipt")] = true; err != nil || resp.StatusCode != 200 {
				w.t.Errorf("stream %d: %s, %v", i, resp.Status, err)
			}
		})
	}
	wg.Wait()
	list := w.Settle().ByCase["h2-parallel"]
	if len(list) != n || len(ids) != n {
		w.t.Errorf("%d receipts, %d ids for %d streams", len(list), len(ids), n)
	}
	for _, e := range list {
		if !ids[e.Decision.ID] || len(e.Outcomes) != 1 || e.Outcomes[0].Result != "complete" {
			w.t.Errorf("a parallel stream: %v", e)
		}
	}
}

// resetStreams has the client reset streams at various moments, many at each: every one is a receipt with one outcome that says
// so, or, when Envoy had not asked yet, an entry of the access log without one.
func resetStreams(w *world) {
	w.t.Helper()
	const n = 20
	for _, m := range []struct {
		name    string
		target  string
		before  func(c *h2conn, id uint32) // what happens between the headers and the reset
		decided bool                       // the decision is certain to have been made
		reached int                        // at least so many are at the upstream
	}{
		{"h2-reset-at-once", "/p/do/never", func(*h2conn, uint32) {}, false, 0},
		{"h2-reset-mid-upload", "/p/do/echo", func(c *h2conn, id uint32) { c.must(c.fr.WriteData(id, false, []byte("abc"))) }, false, 0},
		{"h2-reset-mid-delta", "/delta/do/echo", func(c *h2conn, id uint32) { c.must(c.fr.WriteData(id, false, []byte("abc"))) }, false, 0},
		{"h2-reset-after-upstream", "/p/do/never", func(c *h2conn, _ uint32) {
			c.flush()
			seen := w.Reached("h2-reset-after-upstream")
			w.Until("the upstream sees it", func() bool { return w.Reached("h2-reset-after-upstream") > seen })
		}, true, n},
		{"h2-reset-mid-response", "/p/do/drip/2000/20", func(c *h2conn, id uint32) {
			c.flush()
			c.until(func(f http2.Frame) bool { return f.Header().StreamID == id && f.Header().Type == http2.FrameData })
		}, true, n},
	} {
		// Counted where the access log tells of them.
		before := w.Metric("knhk_unreceipted_total", `knhk_kind="client_abort"`)
		c := w.h2conn()
		for range n {
			fields := []string{":method", "POST", ":scheme", "http", ":path", m.target, ":authority", m.name + audited.CaseSuffix}
			if strings.HasPrefix(m.target, "/delta") {
				fields = append(fields, "content-length", "100")
			}
			// Where the upstream answers the request must have ended: Go's server waits for the end of an HTTP/1.1 body.
			id := c.open(strings.Contains(m.target, "/drip"), fields...)
			m.before(c, id)
			c.must(c.fr.WriteRSTStream(id, http2.ErrCodeCancel))
			c.flush()
		}
		var list []*audited.Entry
		w.Eventually(m.name+": every stream is accounted for", func() error {
			all, err := w.Metrics()
			if err != nil {
				return err
			}
			list = w.Settle().ByCase[m.name]
			// A decision whose answer Envoy no longer took is in both: its entry in the access log has no id.
			if k := int(all.Sum("knhk_unreceipted_total", `knhk_kind="client_abort"`) - before); len(list)+k < n || len(list) > n || k > n {
				return fmt.Errorf("%d streams: %d receipts, %d entries without", n, len(list), k)
			}
			return nil
		})
		c.tcp.Close()
		results := []string{"client_abort", "aborted"}
		for _, e := range list {
			if len(e.Outcomes) != 1 || !slices.Contains(results, e.Outcomes[0].Result) {
				w.t.Errorf("%s: %v", m.name, e)
			}
		}
		if m.decided && len(list) != n || w.Reached(m.name) < m.reached || w.Reached(m.name) > len(list) {
			w.t.Errorf("%s: %d receipts, the upstream saw %d", m.name, len(list), w.Reached(m.name))
		}
		w.t.Logf("%s: %d of %d had been decided", m.name, len(list), n)
	}
}

// withoutAuthority sends HTTP/2 requests that name their host in a Host header, or not at all. Envoy may serve, answer or close the
// connection: what reaches the upstream has a receipt, what does not has none.
func withoutAuthority(w *world) {
	w.t.Helper()
	const name = "h2-host-header"
	for _, host := range []string{name + audited.CaseSuffix, ""} {
		before, seen := w.Metric("knhk_unreceipted_total"), len(w.Upstream.Seen())
		c := w.h2conn()
		fields := []string{":method", "GET", ":scheme", "http", ":path", "/p"}
		if host != "" {
			fields = append(fields, "host", host)
		}
		id := c.open(true, fields...)
		c.flush()
		status, receipt, _ := c.answer(id)
		c.tcp.Close()
		reached := len(w.Upstream.Seen()) > seen
		if reached != (receipt != "") || reached != (status == "200") || reached && host == "" {
			w.t.Errorf("host %q without :authority: %s, receipt %q, upstream %v", host, status, receipt, reached)
		}
		if !reached {
			w.AwaitMetric(before+1, "knhk_unreceipted_total")
		}
		w.t.Logf("host %q without :authority: %s", host, status)
	}
	if got, n := w.Settle().ByCase[name], w.Reached(name); len(got) != n || n > 0 && got[0].String() != pages200 {
		w.t.Errorf("%s: %v", name, got)
	}
}

// oddHTTP2 sends header values and paths that are not UTF-8 as they are, and a connection's worth of requests with 58 KiB each.
func oddHTTP2(w *world) {
	w.t.Helper()
	const name = "h2-odd"
	c := w.h2conn()
	defer c.tcp.Close()
	id := c.open(true, ":method", "GET", ":scheme", "http", ":path", "/p", ":authority", name+audited.CaseSuffix,
		"x-odd", obsText, "x-request-id", obsText, "content-type", obsText, "x-forwarded-for", obsText)
	c.flush()
	if status, receipt, _ := c.answer(id); status != "200" || receipt == "" {
		w.t.Errorf("%s: %s, receipt %q", name, status, receipt)
	}
	if got := w.Settle().ByCase[name]; len(got) != 1 || got[0].String() != pages200 {
		w.t.Errorf("%s: %v", name, got)
	}
	// Where Envoy takes such a path, what was decided about is what the upstream gets; where it does not, nobody gets it.
	seen := w.Reached(name)
	id = c.open(true, ":method", "GET", ":scheme", "http", ":path", "/p/"+obsText, ":authority", name+audited.CaseSuffix)
	c.flush()
	status, receipt, _ := c.answer(id)
	if reached := w.Reached(name) > seen; reached != (receipt != "") || reached != (status == "200") {
		w.t.Errorf("%s: path in obs-text: %s, receipt %q, upstream %v", name, status, receipt, reached)
	}
	w.t.Logf("path in obs-text: %s, receipt %q", status, receipt)
}

func TestHTTP2(t *testing.T) {
	audited.Both(t, func(t *testing.T, capture string) {
		w := start(t, stack.Config{YAML: edited(), Capture: capture})
		parallelStreams(w)
		resetStreams(w)
		withoutAuthority(w)
		oddHTTP2(w)
		for _, kind := range []string{"panic", "malformed", "unexpected"} {
			if n := w.Metric("knhk_extproc_events_total", fmt.Sprintf("knhk_event=%q", kind)); n != 0 {
				t.Errorf("%v ext_proc events %s", n, kind)
			}
		}
		w.Audit()
	})
}

// tunnels adds to the generated configuration a route for CONNECT that opens a tunnel to the upstream, as an operator might,
// and has HTTP/2 take CONNECT with a protocol (RFC 8441).
func tunnels(t *testing.T, bootstrap []byte) []byte {
	t.Helper()
	var tree map[string]any
	if err := yaml.Unmarshal(bootstrap, &tree); err != nil {
		t.Fatal(err)
	}
	listener := tree["static_resources"].(map[string]any)["listeners"].([]any)[0].(map[string]any)
	chain := listener["filter_chains"].([]any)[0].(map[string]any)
	hcm := chain["filters"].([]any)[0].(map[string]any)["typed_config"].(map[string]any)
	hcm["http2_protocol_options"].(map[string]any)["allow_connect"] = true
	host := hcm["route_config"].(map[string]any)["virtual_hosts"].([]any)[0].(map[string]any)
	host["routes"] = append([]any{map[string]any{
		"name":  "tunnel",
		"match": map[string]any{"connect_matcher": map[string]any{}},
		"route": map[string]any{"cluster": "up", "upgrade_configs": []any{map[string]any{
			"upgrade_type": "CONNECT", "connect_config": map[string]any{}}}},
	}}, host["routes"].([]any)...)
	out, err := yaml.Marshal(tree)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestConnect sends CONNECT, which has no :path, over HTTP/1.1 and HTTP/2, to the generated configuration, which has no route for
// it, and to one that opens tunnels: each is decided once, or is answered by Envoy and reaches nobody.
func TestConnect(t *testing.T) {
	audited.Both(t, func(t *testing.T, capture string) {
		w := start(t, stack.Config{YAML: edited(), Capture: capture})
		none := []string{"W1 admit ok by route:* | als local_reply 404 [NR] route_not_found"}
		play(t, w, []transaction{{name: "connect-h2", want: none, send: func(w *world, name string) {
			c := w.h2conn()
			defer c.tcp.Close()
			id := c.open(false, ":method", "CONNECT", ":authority", name+audited.CaseSuffix+":443")
			c.flush()
			if status, _, _ := c.answer(id); status != "404" {
				w.t.Errorf("%s: %s", name, status)
			}
		}}})
		if n := len(w.Upstream.Seen()); n != 0 {
			t.Errorf("the upstream saw %d requests", n)
		}
		w.Audit()
	})
}

func TestTunnels(t *testing.T) {
	audited.Both(t, func(t *testing.T, capture string) {
		w := start(t, stack.Config{YAML: edited(), Capture: capture, EditBootstrap: func(b []byte) []byte { return tunnels(t, b) }})
		inner := []byte("GET /hot/do/bytes/5000 HTTP/1.1\r\nHost: inside\r\nConnection: close\r\n\r\n")
		// Each opens a tunnel, speaks to the upstream through it and leaves.
		play(t, w, []transaction{
			{name: "tunnel-http1", want: []string{"W1 admit ok by route:*" + ok200},
				send: func(w *world, name string) {
					c := w.TCP()
					defer c.Close()
					authority := name + audited.CaseSuffix + ":443"
					_, err := io.WriteString(c, "CONNECT "+authority+" HTTP/1.1\r\nHost: "+authority+"\r\n\r\n")
					if err == nil {
						_, err = c.Write(inner)
					}
					var all []byte
					if err == nil {
						all, err = io.ReadAll(c)
					}
					if err != nil || !bytes.HasPrefix(all, []byte("HTTP/1.1 200")) || len(all) < 5000 || !bytes.Contains(bytes.ToLower(all), []byte("x-knhk-receipt")) {
						w.t.Errorf("%s: %v: %d bytes, %.300q", name, err, len(all), all)
					}
				}},
			{name: "tunnel-http2", want: []string{"W1 admit ok by route:*" + ok200}, send: func(w *world, name string) {
				c := w.h2conn()
				defer c.tcp.Close()
				id := c.open(false, ":method", "CONNECT", ":authority", name+audited.CaseSuffix+":443")
				c.must(c.fr.WriteData(id, false, inner))
				c.flush()
				status, receipt, body := c.answer(id)
				w.IDs[name] = append(w.IDs[name], receipt)
				if status != "200" || len(body) < 5000 {
					w.t.Errorf("%s: %s, %d bytes", name, status, len(body))
				}
			}},
		})
		inside := 0
		for _, s := range w.Upstream.Seen() {
			if s.Host == "inside" {
				inside++
			}
		}
		if inside != 2 {
			t.Errorf("the upstream saw %d requests out of tunnels", inside)
		}
		// A websocket over HTTP/2 has a path and is decided about like any other.
		c := w.h2conn()
		id := c.open(false, ":method", "CONNECT", ":protocol", "websocket", ":scheme", "http", ":path", "/ws/do/ws",
			":authority", "h2-websocket"+audited.CaseSuffix, "origin", "http://h2-websocket"+audited.CaseSuffix, "sec-websocket-version", "13", "sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
		c.flush()
		c.until(func(f http2.Frame) bool {
			m, ok := f.(*http2.MetaHeadersFrame)
			if ok && m.StreamID == id && m.PseudoValue("status") != "200" {
				t.Errorf("websocket over HTTP/2: %v", m.Fields)
			}
			return ok && m.StreamID == id
		})
		c.must(c.fr.WriteRSTStream(id, http2.ErrCodeCancel))
		c.flush()
		w.Until("its outcome is told", func() bool { return w.Metric("knhk_receipts_pending") == 0 })
		c.tcp.Close()
		tr := w.Audit()
		if got := tr.ByCase["h2-websocket"]; len(got) != 1 || got[0].Outcomes[0].Result != "client_abort" {
			t.Errorf("websocket over HTTP/2: %v", got)
		}
	})
}

// TestLongWebsocket keeps a websocket open: while it is, its decision stands and its outcome is pending; when it is closed, the
// outcome says how many bytes went through, over the whole time.
func TestLongWebsocket(t *testing.T) {
	audited.Both(t, func(t *testing.T, capture string) {
		w := start(t, stack.Config{YAML: edited(), Capture: capture})
		const name, size = "long-websocket", 200 << 10
		ws, tcp := openWebsocket(w, name)
		buf := make([]byte, size/10)
		for range 10 {
			if _, err := ws.Write(buf); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(ws, buf); err != nil {
				t.Fatal(err)
			}
		}
		// Sealed without an outcome, though others have come and gone.
		for range 3 {
			w.wantStatus("beside", w.Get("beside", "/p"), http.StatusOK)
		}
		w.Until("only the websocket is pending", func() bool { return w.Metric("knhk_receipts_pending") == 1 })
		w.Eventually("sealed", func() error {
			list, err := w.List(t.Context(), 10)
			if err != nil {
				return err
			}
			for _, r := range list {
				if r.Outcome == nil && r.State != "pending" {
					return nil
				}
			}
			return fmt.Errorf("%+v", list)
		})
		tcp.Close()
		tr := w.Audit()
		list := tr.ByCase[name]
		if len(list) != 1 || len(list[0].Outcomes) != 1 {
			t.Fatalf("%v", list)
		}
		o := list[0].Outcomes[0]
		if o.Status != 101 || o.Source == "als" && (o.BytesIn < size || o.BytesOut < size || o.DurationNS == 0) {
			t.Errorf("%v: %d bytes in, %d out, %d ns", list[0], o.BytesIn, o.BytesOut, o.DurationNS)
		}
	})
}
