package sidecars

import (
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	extauthzv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_authz/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/faultfs"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

const delta = `{"additions":[{"subject":"s","predicate":"p","object":"o"}],"removals":[]}`

// chained has ext_authz and then ext_proc ask about every request.
func chained(failure string) string {
	return patient + strings.ReplaceAll(`
default_route: {on_receipt_failure: FAILURE}
authz_rules:
- {name: never, routes: [secret], effect: FORBID}
- {name: rest, effect: PERMIT}
routes:
- {name: off, prefix: /off/do/echo, cluster: up, policy: {exclude: true, on_receipt_failure: FAILURE}}
- {name: secret, prefix: /secret, cluster: up, policy: {on_receipt_failure: FAILURE}}
- {name: hot, prefix: /hot, cluster: up, policy: {class: R1, on_receipt_failure: FAILURE}}
- {name: delta, prefix: /delta, cluster: up, policy: {classify_body: true, on_receipt_failure: FAILURE}}
- {name: hop, prefix: /hop, cluster: up, internal_redirects: 2, policy: {on_receipt_failure: FAILURE}}
- {name: pages, prefix: /p, cluster: up, policy: {on_receipt_failure: FAILURE}}
envoy:
  filter: BOTH
  clusters:
  - {name: up, endpoints: ["UPSTREAM"]}
`, "FAILURE", failure)
}

// The two filters.
const (
	filterAuthz = "envoy.filters.http.ext_authz"
	filterProc  = "envoy.filters.http.ext_proc"
)

// filters has the HTTP filters of the listener changed.
func filters(t *testing.T, change func([]*hcmv3.HttpFilter)) func([]byte) []byte {
	return stack.EditResources(t, func(r *bootstrapv3.Bootstrap_StaticResources) {
		for _, l := range r.GetListeners() {
			for _, chain := range l.GetFilterChains() {
				repack(t, chain.GetFilters()[0].GetTypedConfig(), func(h *hcmv3.HttpConnectionManager) { change(h.GetHttpFilters()) })
			}
		}
	})
}

// repack changes the message in an Any.
func repack[M proto.Message](t *testing.T, a *anypb.Any, change func(M)) {
	t.Helper()
	m, err := a.UnmarshalNew()
	if err != nil {
		t.Fatal(err)
	}
	change(m.(M))
	if err := a.MarshalFrom(m); err != nil {
		t.Fatal(err)
	}
}

// nobody has one filter ask a cluster that is not there.
func nobody(t *testing.T, name string) func([]byte) []byte {
	return filters(t, func(all []*hcmv3.HttpFilter) {
		f := all[slices.IndexFunc(all, func(f *hcmv3.HttpFilter) bool { return f.GetName() == name })]
		lost := func(s *corev3.GrpcService) { s.GetEnvoyGrpc().ClusterName = "nobody" }
		if name == filterAuthz {
			repack(t, f.GetTypedConfig(), func(c *extauthzv3.ExtAuthz) { lost(c.GetGrpcService()) })
		} else {
			repack(t, f.GetTypedConfig(), func(c *extprocv3.ExternalProcessor) { lost(c.GetGrpcService()) })
		}
	})
}

// reversed has ext_proc ask first, as somebody might write it by hand: ext_authz is told what ext_proc got.
func reversed(t *testing.T) func([]byte) []byte {
	return filters(t, func(all []*hcmv3.HttpFilter) {
		find := func(name string) int {
			return slices.IndexFunc(all, func(f *hcmv3.HttpFilter) bool { return f.GetName() == name })
		}
		a, p := find(filterAuthz), find(filterProc)
		repack(t, all[a].GetTypedConfig(), func(c *extauthzv3.ExtAuthz) { c.MetadataContextNamespaces = []string{"knhk"} })
		repack(t, all[p].GetTypedConfig(), func(c *extprocv3.ExternalProcessor) { c.MetadataOptions.ForwardingNamespaces = nil })
		all[a], all[p] = all[p], all[a]
	})
}

// TestChain has two filters ask about each request: one decision is made, one receipt is given, whatever the class is, whatever is read of
// the body, in whichever order they ask.
func TestChain(t *testing.T) {
	t.Parallel()
	harness.RequireEnvoy(t)
	for _, c := range []struct {
		name, capture string
		reverse       bool
	}{{"lean", "lean", false}, {"full", "full", false}, {"reversed", "full", true}} {
		t.Run(c.name, func(t *testing.T) {
			cfg := stack.Config{Capture: c.capture, UnixSocket: c.capture == "full"}
			if c.reverse {
				cfg.EditBootstrap = reversed(t)
			}
			testChain(t, prepare(t, "a", chained("DENY"), cfg), c.reverse)
		})
	}
}

func testChain(t *testing.T, w *audited.World, reverse bool) {
	start(t, w)
	w.Serves("serves", "/p/do/echo")
	large := `{"additions":[],"removals":[],"pad":"` + strings.Repeat("x", 20<<10) + `"}`
	post := func(body string, chunks ...string) harness.Request {
		return harness.Request{Method: http.MethodPost, Target: "/delta/do/echo", Body: body, Chunks: chunks}
	}
	chunked := "R1"
	if reverse {
		chunked = "W1" // ext_proc is not told how long such a body is
	}
	cases := map[string]struct {
		r       harness.Request
		status  int
		records int
		class   string // of the last
	}{
		"w1":            {harness.Request{Target: "/p/do/echo"}, 200, 1, "W1"},
		"w1-body":       {harness.Request{Method: http.MethodPost, Target: "/p/do/echo", Body: "x"}, 200, 1, "W1"},
		"r1":            {harness.Request{Target: "/hot/do/echo"}, 200, 1, "R1"},
		"delta":         {post(delta), 200, 1, "R1"},
		"delta-chunked": {post("", delta[:20], delta[20:]), 200, 1, chunked},
		"delta-large":   {post(large), 200, 1, "W1"},
		"delta-empty":   {harness.Request{Target: "/delta/do/echo"}, 200, 1, "W1"},
		"excluded":      {harness.Request{Target: "/off/do/echo"}, 200, 0, ""},
		"forbidden":     {harness.Request{Target: "/secret/do/echo"}, 403, 1, "W1"},
		"forged":        {harness.Request{Target: "/p/do/forge"}, 200, 1, "W1"},
		"failing":       {harness.Request{Target: "/p/do/reset"}, 503, 1, "W1"},
		"hop":           {harness.Request{Target: "/hop/do/redirect/302/p"}, 200, 2, "W1"}, // Envoy asks about each hop
	}
	const times = 3
	ids := map[string][]string{}
	for range times {
		for name, c := range cases {
			c.r.Host = name + audited.CaseSuffix
			resp, err := w.Do(t.Context(), c.r)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			got := resp.Header.Values("X-Knhk-Receipt")
			if resp.Status != c.status || len(got) != min(c.records, 1) {
				t.Errorf("%s: %d with receipts %q, want %d", name, resp.Status, got, c.status)
			}
			ids[name] = append(ids[name], got...)
		}
	}
	tr := w.Settle()
	for name, c := range cases {
		list := tr.ByCase[name]
		if len(list) != times*c.records {
			t.Errorf("%s: %d receipts for %d requests of %d decisions each", name, len(list), times, c.records)
		}
		for _, id := range ids[name] {
			if !tr.Has(name, id) {
				t.Errorf("%s: no receipt %s", name, id)
			}
		}
		for _, e := range list {
			if len(e.Outcomes) != 1 || c.records == 1 && !strings.EqualFold(fmt.Sprint(e.Decision.Class), c.class) {
				t.Errorf("%s: %v, want one outcome and class %s", name, e, c.class)
			}
		}
	}
	if n := w.Metric("knhk_gaps_total"); n != 0 {
		t.Errorf("%v gaps", n)
	}
	w.Audit()
}

// TestHalfAChain has one of the two filters get no answer. Where it denies, the request is refused; where it lets pass, the decision of the
// other one counts, and there is no gap.
func TestHalfAChain(t *testing.T) {
	t.Parallel()
	harness.RequireEnvoy(t)
	for _, c := range []struct {
		name, failure, lost string
		status, records     int
		receipt             bool // in the response
	}{
		{"authz-deny", "DENY", filterAuthz, 503, 0, false},
		{"authz-allow", "ALLOW", filterAuthz, 200, 1, true},
		{"proc-deny", "DENY", filterProc, 503, 1, true},
		{"proc-allow", "ALLOW", filterProc, 200, 1, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := prepare(t, "a", chained(c.failure), stack.Config{EditBootstrap: nobody(t, c.lost)})
			start(t, w)
			// The first request may find Envoy before it has found knhk.
			w.Eventually("requests are answered as they are to be", func() error {
				resp, err := w.Do(t.Context(), harness.Request{Host: "first" + audited.CaseSuffix, Target: "/p/do/echo"})
				if err != nil || resp.Status != c.status || (resp.Header.Get("X-Knhk-Receipt") != "") != c.receipt {
					return fmt.Errorf("%v: %v", err, resp)
				}
				return nil
			})
			gaps := w.Metric("knhk_gaps_total")
			targets := []string{"/p/do/echo", "/hot/do/echo", "/delta/do/echo"}
			for _, target := range targets {
				resp := w.Get("half", target)
				if resp.Status != c.status || (resp.Header.Get("X-Knhk-Receipt") != "") != c.receipt {
					t.Errorf("%s: %d %v", target, resp.Status, resp.Header)
				}
			}
			want := 0
			if c.status == 200 {
				want = len(targets)
			}
			if n := w.Reached("half"); n != want {
				t.Errorf("the upstream saw %d requests of %d", n, want)
			}
			if c.records == 0 {
				if list, err := w.List(t.Context(), 10); err != nil || len(list) != 0 {
					t.Errorf("receipts of what nobody decided: %v, %v", list, err)
				}
				return // there is nothing to audit
			}
			tr := w.Settle()
			if n := len(tr.ByCase["half"]); n != c.records*len(targets) {
				t.Errorf("%d receipts for %d requests: %v", n, len(targets), tr.ByCase["half"])
			}
			for _, e := range tr.ByCase["half"] {
				if o := e.Outcomes[0]; len(e.Outcomes) != 1 || (o.Result == "complete") != (c.status == 200) {
					t.Errorf("%v", e)
				}
			}
			if n := w.Metric("knhk_gaps_total") - gaps; n != 0 {
				t.Errorf("%v gaps", n)
			}
			w.Audit()
		})
	}
}

// TestChainOfGaps has the log fail on routes that let pass what cannot be recorded: both filters are told so, and it is one gap.
func TestChainOfGaps(t *testing.T) {
	t.Parallel()
	harness.RequireEnvoy(t)
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root: it mounts a file system")
		}
		t.Skip("needs root: it mounts a file system")
	}
	w := prepare(t, "a", chained("ALLOW"), stack.Config{})
	if err := os.MkdirAll(w.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	disk := faultfs.Mount(t, w.StateDir)
	t.Cleanup(func() { // before the mount goes
		if w.Knhk != nil {
			w.Knhk.Kill()
		}
	})
	start(t, w)
	w.Serves("before", "/p/do/echo")
	failed := disk.Fail(faultfs.Fault{Op: faultfs.OpSync, Path: "wal/*", Errno: syscall.EIO, Times: 1})
	gaps := 0
	ask := func(target string) (receipt string) {
		resp := w.Get("gap", target)
		if resp.Status != 200 {
			t.Fatalf("%s: %d %q", target, resp.Status, resp.Body)
		}
		if receipt = resp.Header.Get("X-Knhk-Receipt"); receipt == "" {
			gaps++
		}
		return receipt
	}
	w.Until("the log has failed", func() bool { return ask("/p/do/echo") == "" && failed.Hits() == 1 })
	for _, target := range []string{"/p/do/echo", "/hot/do/echo", "/delta/do/echo"} {
		if id := ask(target); id != "" {
			t.Errorf("%s: receipt %s of a log that has failed", target, id)
		}
	}
	for _, source := range []string{"service", "accesslog"} {
		w.Eventually("the gaps are counted", func() error {
			if n := w.Metric("knhk_gaps_total", `knhk_source="`+source+`"`); n != float64(gaps) {
				return fmt.Errorf("%s: %v of %d", source, n, gaps)
			}
			return nil
		})
	}
}
