package sidecars

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/knhk/sidecar/crypto/spiffe/spiffetest"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// TestRules has rules over the client's SPIFFE ID decide who may pass: whoever is refused gets 403 and a receipt with the reason, and the
// upstream hears nothing. What a client says of itself in headers changes nothing.
func TestRules(t *testing.T) {
	t.Parallel()
	harness.RequireEnvoy(t)
	for _, c := range []struct{ filter, capture string }{{"EXT_PROC", "lean"}, {"EXT_PROC", "full"}, {"EXT_AUTHZ", "lean"}, {"BOTH", "lean"}} {
		t.Run(c.filter+"-"+c.capture, func(t *testing.T) { testRules(t, c.filter, c.capture) })
	}
}

func testRules(t *testing.T, filter, capture string) {
	ca := spiffetest.NewCA(t, "knhk.test")
	w := prepare(t, "a", patient+fmt.Sprintf(`
authz_rules:
- {name: never, routes: [secret], effect: FORBID}
- {name: fails, routes: [broken], when: "int(path) > 0", effect: PERMIT}
- {name: shop, methods: [GET], when: "spiffe_id == '%s'", effect: PERMIT}
- {name: anybody-late, routes: [open], effect: PERMIT}
routes:
- {name: secret, prefix: /secret, cluster: up}
- {name: broken, prefix: /broken, cluster: up}
- {name: open, prefix: /open, cluster: up, policy: {on_receipt_failure: DENY}}
- {name: all, prefix: /, cluster: up}
envoy:
  filter: %s
  tls:
    spiffe_id: %s
    files: %s
    clients: ["spiffe://knhk.test/*"]
  clusters:
  - {name: up, endpoints: ["UPSTREAM"]}
`, shopID, filter, inboundID, envoyFiles(t, ca, inboundID)), stack.Config{Capture: capture, UnixSocket: capture == "full"})
	start(t, w)
	shop, job := clientOf(t, w, ca.Issue(shopID)), clientOf(t, w, ca.Issue(jobID))
	shop.serves(t)
	claims := http.Header{
		"X-Forwarded-Client-Cert": {"By=x;URI=" + shopID}, "X-Spiffe-Id": {shopID}, "X-Forwarded-For": {"127.0.0.1"},
	}
	for _, c := range []struct {
		name, target string
		client       client
		header       http.Header
		reason       string // empty: passes
		rule         string
	}{
		{"shop", "/do/echo", shop, nil, "", "shop"},
		{"job", "/do/echo", job, nil, "authz_no_rule", ""},
		{"job-claims", "/do/echo", job, claims, "authz_no_rule", ""},
		{"job-open", "/open/do/echo", job, nil, "", "anybody-late"},
		{"shop-secret", "/secret/do/echo", shop, nil, "authz_forbidden", "never"},
		{"job-secret", "/secret/do/echo", job, claims, "authz_forbidden", "never"},
		{"shop-broken", "/broken/do/echo", shop, nil, "authz_rule_error", "fails"},
	} {
		a, err := c.client.get(t.Context(), c.name, c.target, c.header)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		w.IDs[c.name] = []string{a.receipt, c.reason, c.rule}
		if a.receipt == "" {
			t.Errorf("%s: no receipt", c.name)
		}
		if c.reason == "" {
			if a.status != 200 || w.Reached(c.name) != 1 {
				t.Errorf("%s: %d %q, the upstream saw %d requests", c.name, a.status, a.body, w.Reached(c.name))
			}
			continue
		}
		if a.status != 403 || a.body != "refused: "+c.reason+", receipt "+a.receipt+"\n" || w.Reached(c.name) != 0 {
			t.Errorf("%s: %d %q, want 403 for %s; the upstream saw %d requests", c.name, a.status, a.body, c.reason, w.Reached(c.name))
		}
	}
	tr := w.Settle()
	for name, want := range w.IDs {
		e := one(t, tr, name)
		status := int64(403)
		if want[1] == "" {
			want[1], status = "ok", 0
		}
		d := e.Decision
		if d.ID != want[0] || d.Reason != want[1] || d.Authz != want[2] || int64(d.Status) != status {
			t.Errorf("%s: %s %s by %q, %d; want %v", name, d.ID, d.Reason, d.Authz, d.Status, want)
		}
		if strings.HasPrefix(name, "job") && d.SPIFFEID != jobID {
			t.Errorf("%s: the receipt is of %q", name, d.SPIFFEID)
		}
	}
	if told := story(t, w, w.IDs["job"][0]); !strings.Contains(told, "no authorisation rule permits it") {
		t.Errorf("the story of a refusal:\n%s", told)
	}
	w.Audit()
}
