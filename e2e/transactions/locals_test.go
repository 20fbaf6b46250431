package transactions

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/harness"
)

// localReplies are Envoy's own answers to what never became a request, or is not ours: no receipt, but counted by name from
// the access log.
func localReplies(w *world) {
	w.t.Helper()
	many := map[string]string{}
	for i := range 200 {
		many[fmt.Sprintf("X-Many-%03d", i)] = "1"
	}
	for _, c := range []struct {
		name   string
		send   harness.Request
		status int
		kind   string
		// cut: Envoy's codec gives up on the connection. In full capture it closes it before the answer has come back from
		// ext_proc (seen: unexpected EOF), in lean the answer may be lost behind what the client still sends (RST).
		cut bool
	}{
		{"missing-host", harness.MissingHost(), 400, "missing_host", false},
		{"oversized-headers", harness.OversizedHeaders(96), 431, "headers_too_large", true},
		{"too-many-headers", harness.Request{Header: many}, 431, "headers_too_large", true},
		{"underscore", harness.Request{Header: map[string]string{"X_Knhk_Receipt": "1"}}, 400, "protocol_error", true},
		{"escaped-slash", harness.Request{Target: "/p/a%2Fb"}, 400, "bad_path", false},
		{"upgrade", harness.Request{Target: "/p/do/ws", Header: map[string]string{"Connection": "Upgrade", "Upgrade": "websocket",
			"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version": "13"}}, 403, "upgrade_refused", false},
		{"excluded", harness.Request{Target: "/healthz"}, 200, "excluded", false},
	} {
		label := fmt.Sprintf("knhk_kind=%q", c.kind)
		before := w.Metric("knhk_unreceipted_total", label)
		if c.send.Host == "" {
			c.send.Host = "unreceipted-" + c.name + audited.CaseSuffix
		}
		resp, err := w.Do(w.t.Context(), c.send)
		switch {
		case err != nil && !c.cut:
			w.t.Errorf("%s: %v", c.name, err)
		case err == nil:
			if w.wantStatus(c.name, resp, c.status); resp.Header.Get("X-Knhk-Receipt") != "" {
				w.t.Errorf("%s: %v", c.name, resp.Header)
			}
		}
		w.AwaitMetric(before+1, "knhk_unreceipted_total", label)
		if n := w.Metric("knhk_unreceipted_total", label); n != before+1 {
			w.t.Errorf("%s: counted %v times", c.name, n-before)
		}
	}
	if n := w.Metric("knhk_gaps_total"); n != 0 {
		w.t.Errorf("%v gaps", n)
	}
	if n := w.Metric("knhk_unreceipted_total", `knhk_kind="other"`); n != 0 {
		w.t.Errorf("%v unreceipted transactions without a name", n)
	}
}

// flaky sends requests to a cluster one of whose two endpoints is dead: one receipt each, some after a second attempt.
func flaky(w *world) {
	w.t.Helper()
	for i := range 2 {
		name := fmt.Sprintf("flaky-%d", i)
		w.wantStatus(name, w.Get(name, "/flaky/do/bytes/1"), 200)
	}
	tr := w.Settle()
	attempts := uint32(0)
	for i := range 2 {
		list := tr.ByCase[fmt.Sprintf("flaky-%d", i)]
		if len(list) != 1 || len(list[0].Outcomes) != 1 || list[0].Outcomes[0].Result != "complete" {
			w.t.Errorf("flaky-%d: %v", i, list)
			continue
		}
		attempts = max(attempts, list[0].Outcomes[0].Attempts)
	}
	if attempts != 2 {
		w.t.Errorf("at most %d attempts, want 2", attempts)
	}
}

// redirected follows one client request that Envoy has turned into two transactions by its x-request-id.
func redirected(w *world) {
	w.t.Helper()
	name := "redirect-by-request-id"
	w.wantStatus(name, w.Get(name, "/hop/do/redirect/302/hot/do/bytes/5"), 200)
	seen := w.Upstream.Seen()
	id := seen[len(seen)-1].RequestID
	tr := w.Settle()
	list, err := w.List(w.t.Context(), 10, "--request-id", id)
	if err != nil || len(list) != 2 || len(tr.ByCase[name]) != 2 {
		w.t.Fatalf("x-request-id %s: %d receipts listed, %d exported, %v", id, len(list), len(tr.ByCase[name]), err)
	}
	for i, e := range tr.ByCase[name] {
		if e.Evidence["request_id"] != id || list[1-i].ID != e.Decision.ID {
			w.t.Errorf("receipt %d: %v, listed %v", i, e.Evidence, list[1-i])
		}
	}
	if !strings.HasPrefix(tr.ByCase[name][1].Evidence["path"], "/hot/") {
		w.t.Errorf("the second transaction is about %v", tr.ByCase[name][1].Evidence)
	}
}

// pathless sends an HTTP/2 request without :path, which no client library would. Envoy's codec resets the stream or answers;
// either way nothing is decided, nothing reaches the upstream, and the access log has it counted.
func pathless(w *world) {
	w.t.Helper()
	const label = `knhk_kind="protocol_error"`
	before, seen := w.Metric("knhk_unreceipted_total", label), len(w.Upstream.Seen())
	tcp := w.TCP()
	defer tcp.Close()
	var head bytes.Buffer
	enc := hpack.NewEncoder(&head)
	for _, f := range [][2]string{{":method", "GET"}, {":scheme", "http"}, {":authority", "unreceipted-pathless" + audited.CaseSuffix}} {
		if err := enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}); err != nil {
			w.t.Fatal(err)
		}
	}
	if _, err := io.WriteString(tcp, http2.ClientPreface); err != nil {
		w.t.Fatal(err)
	}
	fr := http2.NewFramer(tcp, tcp)
	fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if err := errors.Join(fr.WriteSettings(), fr.WriteHeaders(http2.HeadersFrameParam{
		StreamID: 1, BlockFragment: head.Bytes(), EndStream: true, EndHeaders: true,
	})); err != nil {
		w.t.Fatal(err)
	}
	for ended := false; !ended; {
		f, err := fr.ReadFrame()
		if err != nil {
			break // Envoy has closed the connection
		}
		switch f := f.(type) {
		case *http2.MetaHeadersFrame:
			if status := f.PseudoValue("status"); status != "400" && status != "404" {
				w.t.Errorf("without :path: status %s", status)
			}
			ended = f.StreamEnded()
		case *http2.RSTStreamFrame, *http2.GoAwayFrame:
			ended = true
		case *http2.DataFrame:
			ended = f.StreamEnded()
		}
	}
	w.AwaitMetric(before+1, "knhk_unreceipted_total", label)
	if n := len(w.Upstream.Seen()); n != seen {
		w.t.Errorf("the upstream saw %d requests without :path", n-seen)
	}
}
