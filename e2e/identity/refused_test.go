package identity

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// TestWhoIsLetIn: the client's ID is in its receipts; whoever is not the client gets to nobody, past Envoy neither, and leaves no trace but in
// what Envoy and knhk count.
func TestWhoIsLetIn(t *testing.T) {
	const briefly = 8 * time.Second
	w := start(t, time.Minute,
		stack.Workload{Name: "stranger", ID: "spiffe://knhk.test/stranger"},
		stack.Workload{Name: "below", ID: stack.ClientID + "/below"},
		stack.Workload{Name: "elsewhere", ID: "spiffe://other.test/client"},
		stack.Workload{Name: "brief", ID: stack.BriefID, TTL: briefly},
		stack.Workload{Name: "envoy-too", ID: stack.EnvoyID},
	)
	elsewhere, err := w.SVID(t.Context(), "elsewhere", "other.test")
	if err != nil {
		t.Fatal(err)
	}
	brief, client := w.svid("brief"), w.svid("client")
	if left := time.Until(brief.Certificates[0].NotAfter); left > briefly {
		t.Fatalf("the SVID that was to be brief lives for %v", left)
	}

	t.Run("the client", func(t *testing.T) {
		id := w.passes(harness.Request{Target: "/mine"}).Header.Get("X-Knhk-Receipt")
		for _, r := range w.receipts() {
			if r.id == id {
				if r.decision["spiffe_id"] != stack.ClientID {
					t.Errorf("the receipt says spiffe_id %v", r.decision["spiffe_id"])
				}
				return
			}
		}
		t.Errorf("no receipt %q", id)
	})

	t.Run("an SVID that has expired", func(t *testing.T) {
		c, err := harness.DialTLS(t.Context(), w.Listener, shows(brief))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		resp, err := c.Do(harness.Request{Target: "/brief"})
		if time.Now().After(brief.Certificates[0].NotAfter) {
			t.Skip("so slow a machine that it expired before it could be shown")
		}
		if err != nil || resp.Status != http.StatusOK {
			t.Fatalf("while it lives: %+v, %v", resp, err)
		}
		time.Sleep(time.Until(brief.Certificates[0].NotAfter) + 1100*time.Millisecond) // Envoy counts in seconds
		w.refusedByEnvoy(t, "expired", shows(brief))
		// The issuer has given the program another one meanwhile.
		if code, err := https(t.Context(), w.Listener, "/brief", shows(w.svid("brief"))); err != nil || code != http.StatusOK {
			t.Errorf("renewed: %d, %v", code, err)
		}
	})

	for name, c := range map[string]*tls.Config{
		"no certificate":       shows(nil),
		"another id":           shows(w.svid("stranger")),
		"an id below":          shows(w.svid("below")),
		"another trust domain": shows(elsewhere),
		"Envoy itself":         shows(w.svid("envoy-too")),
	} {
		t.Run(name, func(t *testing.T) { w.refusedByEnvoy(t, name, c) })
	}

	t.Run("a program that nobody knows", func(t *testing.T) {
		if v, err := w.SVID(t.Context(), "nobody", stack.TrustDomain); !errors.Is(err, stack.ErrNoIdentity) {
			t.Errorf("it got %v, %v", v, err)
		}
	})

	t.Run("past Envoy to the upstream", func(t *testing.T) {
		before := w.decisions()
		path := suffix("past Envoy")
		for name, call := range map[string]func() error{
			"plain text": func() error {
				return answered(harness.Do(t.Context(), w.Upstream.HTTP(), harness.Request{Target: path}))
			},
			"no certificate": func() error { _, err := https(t.Context(), w.Upstream.HTTP(), path, shows(nil)); return err },
			"the client": func() error {
				_, err := https(t.Context(), w.Upstream.HTTP(), path, client.TLS(stack.UpstreamID))
				return err
			},
		} {
			if err := call(); err == nil {
				t.Errorf("%s: an answer", name)
			}
		}
		w.nothingOf(t, path, before)
		if _, err := https(t.Context(), w.Upstream.HTTP(), "/envoy", w.svid("envoy-too").TLS(stack.UpstreamID)); err != nil {
			t.Errorf("with Envoy's ID, to see that it is the ID that counts: %v", err)
		}
	})

	t.Run("knhk's listener for Envoy", func(t *testing.T) {
		before := w.decisions()
		for name, v := range map[string]*stack.SVID{"the client": client, "an operator": w.svid(operator.Name), "another trust domain": elsewhere} {
			if err := process(t, w.Sidecar, shows(v, "h2")); err == nil {
				t.Errorf("%s had a request decided", name)
			}
		}
		if err := process(t, w.Sidecar, shows(nil, "h2")); err == nil {
			t.Error("nobody had a request decided")
		}
		w.nothingOf(t, suffix("ext_proc"), before)
		if err := healthy(t, w.Sidecar, w.svid("envoy-too").TLS(stack.KnhkID)); err != nil {
			t.Errorf("with Envoy's ID, to see that it is the ID that counts: %v", err)
		}
	})

	t.Run("knhk's other listeners", func(t *testing.T) {
		for _, c := range []struct {
			addr, path string
		}{{w.Admin, "/metrics"}, {w.Admin, "/readyz"}, {w.Tiles, "/checkpoint"}} {
			for name, v := range map[string]*stack.SVID{"Envoy": w.svid("envoy-too"), "the client": client, "another trust domain": elsewhere, "nobody": nil} {
				if code, err := https(t.Context(), c.addr, c.path, shows(v)); err == nil && code != http.StatusForbidden {
					t.Errorf("%s gets %d for %s", name, code, c.path)
				}
			}
			if code, err := https(t.Context(), c.addr, c.path, w.svid(operator.Name).TLS(stack.KnhkID)); err != nil || code != http.StatusOK {
				t.Errorf("an operator gets %d, %v for %s", code, err, c.path)
			}
		}
	})

	t.Run("forged headers", func(t *testing.T) { w.forged(t) })

	// In the end: every receipt is of somebody who may.
	for _, r := range w.receipts() {
		if id := r.decision["spiffe_id"]; id != stack.ClientID && id != stack.BriefID {
			t.Errorf("receipt %s is of %v", r.id, id)
		}
	}
}

// refusedByEnvoy wants a request refused in the handshake, and nobody to have heard of it.
func (w *world) refusedByEnvoy(t *testing.T, name string, c *tls.Config) {
	t.Helper()
	before, refused, path := w.decisions(), w.refusals(), suffix(name)
	if code, err := https(t.Context(), w.Listener, path, c); err == nil {
		t.Errorf("an answer, %d", code)
	}
	if n := w.refusals(); n != refused+1 {
		t.Errorf("Envoy counts %d refused certificates more, want 1", n-refused)
	}
	w.nothingOf(t, path, before)
	w.passes(harness.Request{Target: "/after"}) // it was not Envoy that was ill
}

// nothingOf wants that the upstream has not seen a path, and that no receipt was written since there were so many.
func (w *world) nothingOf(t *testing.T, path string, before uint64) {
	t.Helper()
	if n := w.Upstream.CountPath(path); n != 0 {
		t.Errorf("the upstream has seen %s %d times", path, n)
	}
	if now := w.decisions(); now != before {
		t.Errorf("%d receipts were written", now-before)
	}
}

// answered is an error unless the answer is one of the upstream's handler: 400 is what net/http says to plain text on TLS.
func answered(r *harness.Response, err error) error {
	if err == nil && r.Status == http.StatusBadRequest {
		return errors.New("400")
	}
	return err
}

func dialGRPC(t *testing.T, addr string, c *tls.Config) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:"+addr, grpc.WithTransportCredentials(credentials.NewTLS(c)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// process has a request decided, as Envoy does.
func process(t *testing.T, addr string, c *tls.Config) error {
	ctx, cancel := context.WithTimeout(t.Context(), harness.Patience)
	defer cancel()
	s, err := extprocv3.NewExternalProcessorClient(dialGRPC(t, addr, c)).Process(ctx)
	if err != nil {
		return err
	}
	if err := s.Send(&extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_RequestHeaders{RequestHeaders: &extprocv3.HttpHeaders{EndOfStream: true}}}); err != nil {
		_, err = s.Recv()
		return err
	}
	_, err = s.Recv()
	return err
}

func healthy(t *testing.T, addr string, c *tls.Config) error {
	ctx, cancel := context.WithTimeout(t.Context(), harness.Patience)
	defer cancel()
	_, err := grpc_health_v1.NewHealthClient(dialGRPC(t, addr, c)).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	return err
}

// forged has the client say that it is somebody else, and that others have decided already: the upstream and the receipt know better.
func (w *world) forged(t *testing.T) {
	known := w.passes(harness.Request{Target: "/do/echo"})
	resp := w.passes(harness.Request{Target: "/do/echo", Header: map[string]string{
		"X-Forwarded-Client-Cert": "By=" + stack.EnvoyID + ";URI=" + stack.OperatorID,
		"X-Knhk-Receipt":          known.Header.Get("X-Knhk-Receipt"),
		"X-Knhk-Class":            "R1",
		"X-Knhk-Anything":         "forged",
		"Knhk-Parent":             known.Header.Get("X-Knhk-Receipt"),
	}})
	var echo harness.Echo
	if err := json.Unmarshal(resp.Body, &echo); err != nil {
		t.Fatal(err)
	}
	for name, values := range echo.Header {
		switch {
		case name == "X-Forwarded-Client-Cert":
			if len(values) != 1 || !strings.Contains(values[0], "URI="+stack.ClientID) || strings.Contains(values[0], stack.OperatorID) {
				t.Errorf("the upstream sees %s: %q", name, values)
			}
		case strings.HasPrefix(name, "X-Knhk-") || name == "Knhk-Parent":
			t.Errorf("the upstream sees %s: %q", name, values)
		}
	}
	if echo.Header.Get("X-Forwarded-Client-Cert") == "" {
		t.Error("the upstream is not told who the client is")
	}
	got := map[string]map[string]any{}
	for _, r := range w.receipts() {
		got[r.id] = r.decision
	}
	honest, forged := got[known.Header.Get("X-Knhk-Receipt")], got[resp.Header.Get("X-Knhk-Receipt")]
	if honest == nil || forged == nil {
		t.Fatalf("receipts of %v and %v are not there", known.Header, resp.Header)
	}
	for _, k := range []string{"spiffe_id", "class", "rule", "verdict", "reason", "tenant", "route", "cluster", "parent"} {
		if honest[k] != forged[k] {
			t.Errorf("forged headers make %s %v, was %v", k, forged[k], honest[k])
		}
	}
	if forged["spiffe_id"] != stack.ClientID || forged["parent"] != nil {
		t.Errorf("the receipt says spiffe_id %v, parent %v", forged["spiffe_id"], forged["parent"])
	}
}
