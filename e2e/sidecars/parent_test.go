package sidecars

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/knhk/sidecar/crypto/spiffe/spiffetest"
	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// pair is a workload's Envoy and the one before the upstream, with a knhk each.
type pair struct {
	ca      *spiffetest.CA
	out, in *audited.World
}

func startPair(t *testing.T, outFilter, inFilter, inCapture string) *pair {
	t.Helper()
	p := &pair{ca: spiffetest.NewCA(t, "knhk.test")}
	p.in = prepare(t, "in", patient+fmt.Sprintf(`
parents: ["spiffe://knhk.test/envoy/*"]
routes:
- {name: off, prefix: /off/do/echo, cluster: up, policy: {exclude: true}}
- {name: hot, prefix: /hot, cluster: up, policy: {class: R1}}
- {name: all, prefix: /, cluster: up}
envoy:
  filter: %s
  tls:
    spiffe_id: %s
    files: %s
    clients: ["spiffe://knhk.test/envoy/*", "%s"]
  clusters:
  - {name: up, endpoints: ["UPSTREAM"]}
`, inFilter, inboundID, envoyFiles(t, p.ca, inboundID), shopID), stack.Config{Capture: inCapture})
	p.out = prepare(t, "out", patient+fmt.Sprintf(`
parents: ["spiffe://knhk.test/*"]
routes:
- {name: quiet, prefix: /quiet, cluster: quiet}
- {name: off-out, prefix: /passed/do/echo, cluster: next, policy: {exclude: true}}
- {name: all, prefix: /, cluster: next}
envoy:
  filter: %s
  tls:
    spiffe_id: %s
    files: %s
  clusters:
  - {name: next, endpoints: ["%s"], spiffe_ids: ["%s"], send_parent: true}
  - {name: quiet, endpoints: ["%s"], spiffe_ids: ["%s"]}
`, outFilter, outboundID, envoyFiles(t, p.ca, outboundID), p.in.Listener, inboundID, p.in.Listener, inboundID), stack.Config{UnixSocket: true})
	start(t, p.in)
	clientOf(t, p.in, p.ca.Issue(shopID)).serves(t)
	start(t, p.out)
	p.out.Serves("serves", "/do/echo")
	return p
}

// call has the workload ask its Envoy.
func (p *pair) call(t *testing.T, name, target string, header map[string]string) *answer {
	t.Helper()
	resp, err := p.out.Do(t.Context(), harness.Request{Host: name + audited.CaseSuffix, Target: target, Header: header})
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return read(resp.Status, resp.Header, resp.Body)
}

// one gives the receipt of a case, of which there must be exactly one.
func one(t *testing.T, tr audited.Transcript, name string) *audited.Entry {
	t.Helper()
	if n := len(tr.ByCase[name]); n != 1 {
		t.Fatalf("%s: %d receipts: %v", name, n, tr.ByCase[name])
	}
	return tr.ByCase[name][0]
}

// TestParent has one call decided twice, before it leaves and before it arrives: the second receipt names the first. Nobody else can
// have that said: not the workload, not a client whose ID is not among the parents, not a parent with words that are no receipt.
func TestParent(t *testing.T) {
	t.Parallel()
	harness.RequireEnvoy(t)
	for _, c := range []struct{ out, in, capture string }{
		{"EXT_PROC", "EXT_AUTHZ", "lean"}, {"EXT_AUTHZ", "EXT_PROC", "full"}, {"BOTH", "BOTH", "lean"},
	} {
		t.Run(c.out+"-"+c.in, func(t *testing.T) { testParent(t, startPair(t, c.out, c.in, c.capture)) })
	}
}

func testParent(t *testing.T, p *pair) {
	const forged = "01932c5e-8a4b-7c3d-9e2f-112233445566.out"
	unheard := func(a *answer, name string) {
		t.Helper()
		if a.status != http.StatusOK || a.echo == nil {
			t.Fatalf("%s: %d %q", name, a.status, a.body)
		}
		if got := a.echo.Header.Values("Knhk-Parent"); len(got) != 0 {
			t.Errorf("%s: the upstream hears of the parent %q", name, got)
		}
	}
	// What arrives of the workload's calls, and whether the second receipt is to name the first.
	calls := map[string]bool{"plain": true, "claims": true, "quiet": false, "excluded": false}
	ids := map[string]string{}
	for name := range calls {
		header, target := map[string]string{}, "/do/echo"
		if name != "plain" {
			header["Knhk-Parent"], header["knhk-parent"] = forged, forged
		}
		switch name {
		case "quiet":
			target = "/quiet/do/echo"
		case "excluded":
			target = "/passed/do/echo"
		}
		a := p.call(t, name, target, header)
		unheard(a, name)
		ids[name] = a.receipt
		if (a.receipt == "") != (name == "excluded") {
			t.Errorf("%s: receipt %q", name, a.receipt)
		}
	}
	a := p.call(t, "off", "/off/do/echo", map[string]string{"knhk-parent": forged}) // nobody asks at the second
	unheard(a, "off")

	direct := map[string]struct {
		id      string
		parents []string
		want    string
	}{
		"parent":          {outboundID, []string{forged}, forged}, // so that the others would be seen
		"no-parent-of":    {shopID, []string{forged}, ""},
		"no-parent-real":  {shopID, []string{ids["plain"]}, ""},
		"malformed":       {outboundID, []string{"nonsense"}, ""},
		"malformed-tail":  {outboundID, []string{forged + " "}, forged}, // HTTP: a value has no white space at its ends
		"malformed-long":  {outboundID, []string{forged + strings.Repeat("x", 8000)}, ""},
		"malformed-upper": {outboundID, []string{strings.ToUpper(forged)}, ""},
		"empty":           {outboundID, []string{""}, ""},
		"two":             {outboundID, []string{forged, ids["plain"]}, ""},
		"two-equal":       {outboundID, []string{forged, forged}, ""},
		"list":            {outboundID, []string{forged + "," + forged}, ""},
	}
	for name, d := range direct {
		a, err := clientOf(t, p.in, p.ca.Issue(d.id)).get(t.Context(), name, "/do/echo", http.Header{"Knhk-Parent": d.parents})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		unheard(a, name)
		if a.receipt == "" {
			t.Errorf("%s: no receipt", name)
		}
	}
	if _, err := clientOf(t, p.in, nil).get(t.Context(), "nobody", "/do/echo", http.Header{"Knhk-Parent": {forged}}); err == nil {
		t.Error("a client without a certificate is served")
	}

	// The receipt is in the log once its outcome is known.
	first, second := p.out.Settle(), p.in.Settle()
	if n := p.out.Reached("plain"); n != 0 {
		t.Errorf("the first upstream, which nobody is to ask, saw %d requests", n)
	}
	for name, names := range calls {
		if name == "excluded" {
			if n := len(first.ByCase[name]); n != 0 {
				t.Errorf("%s: %d receipts at the first", name, n)
			}
		} else if e := one(t, first, name); e.Decision.ID != ids[name] || e.Decision.Parent != "" {
			t.Errorf("%s: the first receipt is %s with parent %q, the client saw %s", name, e.Decision.ID, e.Decision.Parent, ids[name])
		}
		want := ""
		if names {
			want = ids[name]
		}
		if e := one(t, second, name); e.Decision.Parent != want {
			t.Errorf("%s: the second receipt names %q, want %q", name, e.Decision.Parent, want)
		}
		if n := p.in.Reached(name); n != 1 {
			t.Errorf("%s: the upstream saw %d requests", name, n)
		}
	}
	for name, d := range direct {
		if e := one(t, second, name); e.Decision.Parent != d.want {
			t.Errorf("%s: the receipt names %q, want %q", name, e.Decision.Parent, d.want)
		}
	}
	if n := len(second.ByCase["off"]) + len(second.ByCase["nobody"]); n != 0 {
		t.Errorf("%d receipts of what is not to have any", n)
	}
	plain := one(t, second, "plain")
	if told := story(t, p.in, plain.Decision.ID); !strings.Contains(told, ids["plain"]) || !strings.Contains(told, "caused by") {
		t.Errorf("the story does not tell of the parent:\n%s", told)
	}
	p.out.Audit()
	p.in.Audit()
}
