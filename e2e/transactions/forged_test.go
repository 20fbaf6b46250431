package transactions

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// forgery stands in every header and trailer that a client or an upstream makes up here.
const forgery = "forged"

// forgedHeaders are what a client might claim.
var forgedHeaders = map[string]string{
	"x-knhk-receipt": forgery + "-1", "X-Knhk-Class": forgery + "-2", "x-knhk-anything": forgery + "-3",
}

// TestForgedHeaders has clients and upstreams make up headers of ours: nobody ever gets to see them, whoever answers, and
// whether knhk is there or not.
func TestForgedHeaders(t *testing.T) {
	audited.Both(t, func(t *testing.T, capture string) {
		log := filepath.Join(t.TempDir(), "access.log")
		w := start(t, stack.Config{YAML: edited("R1CAP", "1"), Capture: capture,
			EditBootstrap: func(b []byte) []byte { return logHeaders(t, b, log) }})
		echoes := 0
		try := func(name string, code int, r harness.Request) {
			t.Helper()
			r.Header = forgedHeaders
			resp := w.Send(name, r)
			w.wantStatus(name, resp, code)
			if code == 200 && strings.Contains(r.Target, "/do/echo") {
				echoes++
			}
			clean(t, name, resp)
		}
		try("forge-echo", 200, harness.Request{Target: "/p/do/echo"})
		try("forge-upload", 200, harness.Request{Method: "POST", Target: "/p/do/echo", Chunks: []string{"abc"}, Trailer: forgedHeaders})
		try("forge-delta", 200, harness.Request{Method: "POST", Target: "/delta/do/echo", Body: hotDelta})
		try("forge-by-upstream", 200, harness.Request{Target: "/p/do/forge"})
		try("forge-trailers", 200, harness.Request{Target: "/p/do/trailers"})
		try("forge-excluded", 200, harness.Request{Target: "/probe/do/forge"})
		try("forge-redirect", 200, harness.Request{Target: "/hop/do/redirect/302/p/do/forge"})
		try("forge-404", 404, harness.Request{Target: "/nowhere"})
		try("forge-500", 500, harness.Request{Target: "/p/do/status/500"})
		try("forge-503", 503, harness.Request{Target: "/broken"})
		try("forge-504", 504, harness.Request{Target: "/slow/do/never"})
		try("forge-rule", 503, harness.Request{Target: "/celfail"})
		w.Until("a hot request is refused", func() bool {
			r := harness.Request{Target: "/hot", Header: forgedHeaders}
			resp := w.Send("forge-429", r)
			clean(t, "forge-429", resp)
			return resp.Status == 429
		})
		tr := w.Settle()
		for name, ids := range w.IDs {
			for _, id := range ids {
				if known := tr.Has(name, id); known != (name != "forge-excluded") {
					t.Errorf("%s: the response said x-knhk-receipt: %q", name, id)
				}
			}
		}
		if n := w.Metric("knhk_outcomes_foreign_total"); n != 0 {
			t.Errorf("%v outcomes of unknown receipts: something made up reached the access log", n)
		}
		w.KillKnhk()
		for _, target := range []string{"/p/do/echo", "/nowhere"} {
			r := harness.Request{Host: "forge-dead" + audited.CaseSuffix, Target: target, Header: forgedHeaders}
			resp, err := w.Do(t.Context(), r)
			if err != nil || resp.Status != 503 || resp.Header.Get("X-Knhk-Receipt") != "" {
				t.Fatalf("%s, knhk dead: %v, %v", target, resp, err)
			}
			clean(t, "forge-dead", resp)
		}
		if n := w.Reached("forge-dead"); n != 0 {
			t.Errorf("the upstream saw %d requests while knhk was dead", n)
		}
		resp, err := w.Do(t.Context(), harness.Request{Host: "forge-gap" + audited.CaseSuffix, Target: "/allow/do/echo", Header: forgedHeaders})
		if err != nil || resp.Status != 200 {
			t.Fatalf("the route allows, knhk dead: %v, %v", resp, err)
		}
		clean(t, "forge-gap", resp)
		if err := w.StartKnhk(t.Context()); err != nil {
			t.Fatal(err)
		}
		tr = w.Audit()
		if bytes.Contains(tr.Raw, []byte(forgery)) {
			t.Error("a receipt quotes a made-up header")
		}
		for _, s := range w.Upstream.Seen() {
			if s.Receipt != "" {
				t.Errorf("the upstream got x-knhk-receipt: %q: %+v", s.Receipt, s)
			}
		}
		raw, err := os.ReadFile(log)
		if err != nil || bytes.Count(raw, []byte("\n")) < len(w.IDs) {
			t.Fatalf("Envoy's access log: %v\n%s", err, raw)
		}
		if bytes.Contains(raw, []byte(forgery)) || !bytes.Contains(raw, []byte(tr.ByCase["forge-echo"][0].Decision.ID)) {
			t.Errorf("Envoy's access log:\n%s", raw)
		}
		if echoes < 3 {
			t.Errorf("%d echoes", echoes)
		}
	})
}

// clean wants nothing made up in a response, nor in what the upstream says that it got.
func clean(t *testing.T, name string, resp *harness.Response) {
	t.Helper()
	all := fmt.Sprintf("%v %v %s", resp.Header, resp.Trailer, bytes.ReplaceAll(resp.Body, []byte("forged\n"), nil))
	if strings.Contains(all, forgery) {
		t.Errorf("%s: something made up came through: %s", name, all)
	}
	if id := resp.Header.Get("X-Knhk-Receipt"); id != "" {
		if _, _, err := receipt.ParseID(id); err != nil || len(resp.Header["X-Knhk-Receipt"]) != 1 {
			t.Errorf("%s: x-knhk-receipt: %q: %v", name, resp.Header["X-Knhk-Receipt"], err)
		}
	}
}

// logHeaders adds a text access log with our headers, as an operator might write one.
func logHeaders(t *testing.T, bootstrap []byte, file string) []byte {
	t.Helper()
	var tree map[string]any
	if err := yaml.Unmarshal(bootstrap, &tree); err != nil {
		t.Fatal(err)
	}
	dig := func(v any, path ...any) any {
		for _, p := range path {
			switch p := p.(type) {
			case string:
				v = v.(map[string]any)[p]
			case int:
				v = v.([]any)[p]
			}
		}
		return v
	}
	hcm := dig(tree, "static_resources", "listeners", 0, "filter_chains", 0, "filters", 0, "typed_config").(map[string]any)
	hcm["access_log"] = append(hcm["access_log"].([]any), map[string]any{
		"name": "envoy.access_loggers.file",
		"typed_config": map[string]any{
			"@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
			"path":  file,
			"log_format": map[string]any{"text_format_source": map[string]any{"inline_string": "%RESPONSE_CODE% %REQ(X-KNHK-RECEIPT)% " +
				"%REQ(X-KNHK-CLASS)% %REQ(X-KNHK-ANYTHING)% %RESP(X-KNHK-RECEIPT)% %RESP(X-KNHK-CLASS)% %RESP(X-KNHK-OTHER)% " +
				"%TRAILER(X-KNHK-RECEIPT)% %DYNAMIC_METADATA(knhk)%\n"}},
		},
	})
	out, err := yaml.Marshal(tree)
	if err != nil {
		t.Fatal(err)
	}
	return out
}
