package extauthz

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/e2e/harness"
)

// ask sends a request and wants a status; it returns the response with its receipt id, empty for none.
func (w *world) ask(r harness.Request, want int) (*harness.Response, string) {
	w.t.Helper()
	resp, err := w.Do(w.t.Context(), r)
	if err != nil {
		w.t.Fatal(err)
	}
	if resp.Status != want {
		w.t.Errorf("%s: status %d, want %d: %s", r.Target, resp.Status, want, resp.Body)
	}
	ids := resp.Header["X-Knhk-Receipt"]
	if len(ids) > 1 {
		w.t.Errorf("%s: receipts %q", r.Target, ids)
	}
	return resp, strings.Join(ids, "")
}

// connect sends a request over the TCP listener and returns what came back until the end of the connection.
func (w *world) connect() string {
	w.t.Helper()
	var d net.Dialer
	c, err := d.DialContext(w.t.Context(), "tcp", w.tcp)
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(harness.Patience)); err != nil {
		w.t.Fatal(err)
	}
	_, _ = io.WriteString(c, "GET /tcp HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") // the other end may be gone already
	b, err := io.ReadAll(c)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		w.t.Fatal(err)
	}
	return string(b)
}

// records are the decisions and outcomes by receipt id.
func (w *world) records(n int) map[string]string {
	w.t.Helper()
	w.Settle()
	list, err := w.List(w.t.Context(), 1000)
	if err != nil {
		w.t.Fatal(err)
	}
	out := map[string]string{}
	for _, r := range list {
		d, o := r.Decision, r.Outcome
		out[r.ID] = fmt.Sprint(d["route"], " ", d["class"], " ", d["verdict"], " ", d["reason"], " dry_run=", d["dry_run"], " ", o["result"], " ", o["status"],
			" ", o["details"], " ", o["source"])
	}
	if len(out) != n {
		w.t.Errorf("%d records, want %d: %v", len(out), n, out)
	}
	return out
}

// TestDecides: ext_authz alone, every kind of transaction once.
func TestDecides(t *testing.T) {
	t.Parallel()
	w := start(t, "EXT_AUTHZ", nil, authz)
	want := map[string]string{}
	_, id := w.ask(harness.Request{Target: "/w1/x", Header: map[string]string{"x-knhk-receipt": "forged", "x-odd": "\xff"}}, 200)
	want[id] = "w1 W1 admit ok dry_run=<nil> complete 200 via_upstream als"
	resp, id := w.ask(harness.Request{Target: "/do/forge"}, 200) // a route that names nothing is judged as default_route
	want[id] = "<nil> R1 admit ok dry_run=<nil> complete 200 via_upstream als"
	if got := strings.Join(resp.Header["X-Knhk-Class"], ","); got != "R1" {
		t.Errorf("class %q beside a forged one, want R1", got)
	}
	_, id = w.ask(harness.Request{Target: "/w1/do/status/503"}, 503) // retried twice by the router, decided once
	want[id] = "w1 W1 admit ok dry_run=<nil> complete 503 via_upstream als"
	if _, id = w.ask(harness.Request{Target: "/none"}, 200); id != "" {
		t.Errorf("receipt %q on an excluded route", id)
	}
	_, id = w.ask(harness.Request{Target: "/forgot"}, 503) // classified by body, which Envoy does not send
	want[id] = "body unknown refuse body_mode_mismatch dry_run=<nil> local_reply 503 ext_authz_denied als"
	for _, n := range []int{0, 10, 8192, 8193, 30_000} {
		_, id = w.ask(harness.Request{Target: "/body/x", Method: "POST", Body: strings.Repeat("x", n)}, 200)
		want[id] = "body W1 admit ok dry_run=<nil> complete 200 via_upstream als"
	}
	_, second := w.ask(harness.Request{Target: "/w1/do/redirect/302/w1/x"}, 200)
	if got := w.connect(); !strings.HasPrefix(got, "HTTP/1.1 200") {
		t.Errorf("connection: %q", got)
	}
	got := w.records(len(want) + 3)
	for id, text := range want {
		if got[id] != text {
			t.Errorf("%s: %s, want %s", id, got[id], text)
		}
		delete(got, id)
	}
	rest := map[string]int{}
	for _, text := range got {
		rest[text]++
	}
	if rest["w1 W1 admit ok dry_run=<nil> complete 302 internal_redirect als"] != 1 || rest["<nil> R1 admit ok dry_run=<nil> complete <nil> <nil> als"] != 1 ||
		got[second] != "w1 W1 admit ok dry_run=<nil> complete 200 via_upstream als" {
		t.Errorf("a redirect followed by Envoy is two decisions, a connection is one: %v", got)
	}
	w.Audit()
}

// TestChained: both filters on one route get one decision, in either order, for each pass of a redirect too.
func TestChained(t *testing.T) {
	t.Parallel()
	for name, filters := range map[string][]string{"authz first": {authz, proc}, "proc first": {proc, authz}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := start(t, "BOTH", nil, filters...)
			var ids []string
			for _, target := range []string{"/w1/x", "/rest", "/w1/do/status/500", "/w1/x"} {
				want := 200
				if strings.Contains(target, "500") {
					want = 500
				}
				_, id := w.ask(harness.Request{Target: target}, want)
				ids = append(ids, id)
			}
			_, id := w.ask(harness.Request{Target: "/w1/do/redirect/302/w1/x"}, 200)
			got := w.records(len(ids) + 2)
			for _, id := range append(ids, id) {
				if !strings.Contains(got[id], " admit ok ") || !strings.HasSuffix(got[id], " als") {
					t.Errorf("receipt %q: %q", id, got[id])
				}
			}
			m, err := w.Metrics()
			if err != nil {
				t.Fatal(err)
			}
			if n := m.Sum("knhk_unreceipted_total"); n != 0 {
				t.Errorf("%v entries of the access log without a receipt", n)
			}
			w.Audit()
		})
	}
}

// before tells the upstream what dynamic metadata there is before any filter has asked.
const before = `
          - name: envoy.filters.http.header_mutation
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation
              mutations:
                request_mutations:
                - append:
                    header: {key: x-before, value: "[%DYNAMIC_METADATA(envoy.filters.http.ext_authz:receipt)%]"}
                    append_action: OVERWRITE_IF_EXISTS_OR_ADD`

// TestRedirectForgets: dynamic metadata does not outlive a redirect that Envoy follows itself. If it did, a second pass could be taken for
// decided where another replica has decided the first.
func TestRedirectForgets(t *testing.T) {
	t.Parallel()
	w := start(t, "BOTH", nil, before, authz, proc)
	resp, id := w.ask(harness.Request{Target: "/w1/do/redirect/302/w1/do/echo"}, 200)
	var echo harness.Echo
	if err := json.Unmarshal(resp.Body, &echo); err != nil {
		t.Fatal(err)
	}
	if got := echo.Header.Get("X-Before"); got != "[-]" && got != "[]" {
		t.Errorf("before the second pass there is %q, after it %q", got, id)
	}
	w.Audit()
}

// few leaves one credit for each second.
func few(yaml string) string {
	return yaml + "beat: {cycle: 8s, r1: {capacity: 1}, w1: {max_wait: 0s}}\n"
}

// TestDenied: a denial is an answer with a receipt; a connection is closed, and the upstream hears of neither.
func TestDenied(t *testing.T) {
	t.Parallel()
	w := start(t, "EXT_AUTHZ", few, authz)
	denied := ""
	for range 5 {
		resp, err := w.Do(t.Context(), harness.Request{Target: "/denied"})
		if err != nil {
			t.Fatal(err)
		}
		if resp.Status == 429 {
			denied = resp.Header.Get("X-Knhk-Receipt")
			if resp.Header.Get("Retry-After") == "" || string(resp.Body) != "refused: no_credit, receipt "+denied+"\n" {
				t.Errorf("denied with %v %q", resp.Header, resp.Body)
			}
		}
	}
	passed, closed := 0, 0
	for range 5 {
		if w.connect() == "" {
			closed++
		} else {
			passed++
		}
	}
	if denied == "" || closed == 0 {
		t.Fatalf("receipt %q of a denial, %d connections closed; want some of both", denied, closed)
	}
	got := w.records(10)
	if want := "<nil> R1 refuse no_credit dry_run=<nil> local_reply 429 ext_authz_denied als"; got[denied] != want {
		t.Errorf("%s: %s, want %s", denied, got[denied], want)
	}
	kinds := map[string]int{}
	for _, text := range got {
		kinds[text]++
	}
	t.Log(kinds)
	seen := 0
	for _, s := range w.Upstream.Seen() {
		if s.Path == "/tcp" {
			seen++
		}
	}
	if seen != passed {
		t.Errorf("the upstream saw %d connections, %d passed", seen, passed)
	}
	w.Audit()
}

// TestShadow: in shadow mode everything passes, and records say what would have become of it.
func TestShadow(t *testing.T) {
	t.Parallel()
	w := start(t, "EXT_AUTHZ\n  shadow_mode: true", nil, strings.ReplaceAll(authz, "EXTRA", "shadow_mode: true"))
	_, id := w.ask(harness.Request{Target: "/forgot"}, 200)
	got := w.records(1)
	if want := "body unknown refuse body_mode_mismatch dry_run=true complete 200 via_upstream als"; got[id] != want {
		t.Errorf("receipt %q: %v, want %s", id, got, want)
	}
	w.Audit()
}

// TestAway: without knhk nothing passes.
func TestAway(t *testing.T) {
	t.Parallel()
	w := start(t, "EXT_AUTHZ", nil, authz)
	w.Knhk.Kill()
	w.ask(harness.Request{Target: "/w1/x"}, 503)
	w.ask(harness.Request{Target: "/body/x", Method: "POST", Body: "x"}, 503)
	if got := w.connect(); got != "" {
		t.Errorf("a connection passed: %q", got)
	}
	if seen := w.Upstream.Seen(); len(seen) != 0 {
		t.Errorf("the upstream saw %v", seen)
	}
}
