package identity

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	adminv1 "github.com/knhk/sidecar/api/knhk/admin/v1"
	"github.com/knhk/sidecar/api/knhk/admin/v1/adminv1connect"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/spire"
	"github.com/knhk/sidecar/e2e/stack"
)

// config is a stack with one upstream that proves who it is.
const config = `default_route: {class: W1}
log: {seal_every: 100ms}
routes:
- {name: all, prefix: /, cluster: up}
envoy:
  clusters:
  - {name: up, endpoints: ["UPSTREAM"], spiffe_ids: ["` + stack.UpstreamID + `"]}
`

// operator is a program that has the commands' ID.
var operator = stack.Workload{Name: "operator", ID: stack.OperatorID}

// withSPIRE says whether a real SPIRE issues: `make test-spire`.
func withSPIRE() bool { return os.Getenv("KNHK_ISSUER") == "spire" }

type world struct {
	*stack.Stack
	t *testing.T
}

// start starts a stack in which everybody has an identity, of the development issuer or of SPIRE.
func start(t *testing.T, ttl time.Duration, workloads ...stack.Workload) *world {
	t.Helper()
	harness.RequireEnvoy(t)
	id := &stack.Identity{TTL: ttl, Workloads: append(workloads, operator)}
	if withSPIRE() {
		var err error
		if id.SPIRE, err = spire.Build(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	s, err := stack.New(t.Context(), stack.Config{Dir: harness.Directory(t, ""), Soft: true, Identity: id, YAML: config, Args: []string{"--log-level", "debug"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), harness.Patience)
		defer cancel()
		if err := s.Stop(ctx); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("knhk:\n%s\nEnvoy:\n%s", s.Knhk.LogTail(4096), s.Envoy.LogTail(4096))
		}
	})
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	w := &world{s, t}
	// Envoy is ready before its secrets are used for the first time.
	harness.Eventually(t, "a request that passes", func() bool {
		r, err := s.Do(t.Context(), harness.Request{Target: "/first"})
		return err == nil && r.Status == http.StatusOK
	})
	return w
}

// svid is what a program of that name gets.
func (w *world) svid(name string) *stack.SVID {
	w.t.Helper()
	v, err := w.SVID(w.t.Context(), name, stack.TrustDomain)
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

// shows is TLS that shows v, nil for nothing, and takes every server: whether it is let in is the server's to say.
func shows(v *stack.SVID, protocols ...string) *tls.Config {
	if v == nil {
		return &tls.Config{InsecureSkipVerify: true, NextProtos: protocols}
	}
	c := clientTLS(v.SVID)
	c.NextProtos = protocols
	return c
}

// passes sends a request of the client that must pass.
func (w *world) passes(r harness.Request) *harness.Response {
	w.t.Helper()
	resp, err := w.Do(w.t.Context(), r)
	if err != nil || resp.Status != http.StatusOK {
		w.t.Fatalf("a request of the client: %+v, %v", resp, err)
	}
	return resp
}

// admin calls the admin API as an operator.
func (w *world) admin() (adminv1connect.ReceiptServiceClient, func()) {
	tr := &http.Transport{TLSClientConfig: w.svid(operator.Name).TLS(stack.KnhkID), DisableKeepAlives: true}
	return adminv1connect.NewReceiptServiceClient(&http.Client{Transport: tr, Timeout: harness.Patience}, "https://"+w.Admin, connect.WithReadMaxBytes(64<<20)), tr.CloseIdleConnections
}

// record is a receipt as the admin API gives it.
type record struct {
	id, state string
	decision  map[string]any
	outcome   map[string]any // empty while it is awaited
}

type statusRequest = adminv1.StatusRequest

// receipts are all there are, newest first.
func (w *world) receipts() (all []record) {
	w.t.Helper()
	c, done := w.admin()
	defer done()
	before := ""
	for {
		resp, err := c.List(w.t.Context(), &adminv1.ListRequest{Limit: 1000, Before: before})
		if err != nil {
			w.t.Fatal(err)
		}
		for _, r := range resp.GetReceipts() {
			one := record{id: r.GetId(), state: r.GetState(), decision: map[string]any{}}
			if err := json.Unmarshal([]byte(r.GetDecision()), &one.decision); err != nil {
				w.t.Fatal(err)
			}
			if o := r.GetOutcome(); o != "" {
				if err := json.Unmarshal([]byte(o), &one.outcome); err != nil {
					w.t.Fatal(err)
				}
			}
			all = append(all, one)
			before = one.id
		}
		if len(resp.GetReceipts()) == 0 {
			return all
		}
	}
}

// decisions is how many there are.
func (w *world) decisions() uint64 {
	w.t.Helper()
	c, done := w.admin()
	defer done()
	st, err := c.Status(w.t.Context(), &adminv1.StatusRequest{})
	if err != nil {
		w.t.Fatal(err)
	}
	return st.GetDecisions()
}

var failVerify = regexp.MustCompile(`(?m)^listener\.[^:]*\.ssl\.fail_verify_(?:san|error|no_cert): (\d+)$`)

// refusals is how many clients Envoy has refused for their certificate, or for having none.
func (w *world) refusals() (n int) {
	w.t.Helper()
	b, err := harness.Get(w.t.Context(), "http://"+w.EnvoyAdmin+"/stats")
	if err != nil {
		w.t.Fatal(err)
	}
	for _, m := range failVerify.FindAllSubmatch(b, -1) {
		var one int
		fmt.Sscan(string(m[1]), &one)
		n += one
	}
	return n
}

// https asks a listener for a path and returns the status.
func https(ctx context.Context, addr, path string, c *tls.Config) (int, error) {
	tr := &http.Transport{TLSClientConfig: c, DisableKeepAlives: true}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+addr+path, nil)
	if err != nil {
		return 0, err
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, err
}

// suffix makes a path that no other request has.
func suffix(name string) string { return "/refused/" + strings.ReplaceAll(name, " ", "-") }
