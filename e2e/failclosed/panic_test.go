package failclosed

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/envoy/bootstrap"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/server/envoywire"
	"github.com/knhk/sidecar/server/extauthz"
	"github.com/knhk/sidecar/server/extproc"
)

// panicker is an Admitter that panics where it is told to.
type panicker struct {
	allow string       // the route that lets pass what cannot be recorded; "*": every one
	where atomic.Value // string
	n     atomic.Int64
}

func (p *panicker) at(where string) {
	if p.where.Load() == where {
		p.n.Add(1)
		panic("on purpose: " + where)
	}
}

func (p *panicker) Plan(route string) extproc.Plan {
	p.at("plan")
	return extproc.Plan{ClassifyBody: route == "body", BodyLimit: 8 << 10, Allow: p.allow == "*" || route == p.allow}
}

func (p *panicker) Admit(context.Context, *policy.Request) policy.Decision {
	p.at("admit")
	return policy.Decision{ID: "01932c5e-8a4b-7c3d-9e2f-112233445566.a", Class: policy.W1, Verdict: policy.Admit, Reason: policy.ReasonOK}
}

func (p *panicker) Abandon(*policy.Request)             { p.at("abandon") }
func (p *panicker) Finish(string, policy.Outcome, bool) { p.at("finish") }

// TestPanic has everything behind the services that Envoy asks panic, in this process: Envoy's client gets a refusal, the upstream
// nothing, and the service goes on.
func TestPanic(t *testing.T) {
	t.Parallel()
	for _, r := range []turn{
		{door: processor, capture: "lean", denying: true, letting: true}, {door: processor, capture: "full", denying: true, letting: true},
		{door: authorizer, capture: "lean", denying: true}, {door: authorizer, capture: "lean", letting: true},
	} {
		t.Run(r.String(), func(t *testing.T) {
			t.Parallel()
			testPanic(t, r)
		})
	}
}

// serve has the service that is asked through r's door answer in this process, and gives its address.
func (p *panicker) serve(t *testing.T, r turn) string {
	t.Helper()
	g := grpc.NewServer(grpc.ForceServerCodecV2(envoywire.Codec{}), grpc.NumStreamWorkers(2))
	quiet := slog.New(slog.DiscardHandler)
	if r.door == processor {
		srv, err := extproc.New(extproc.Config{Admitter: p, Capture: r.capture, Log: quiet})
		if err != nil {
			t.Fatal(err)
		}
		srv.Register(g)
	} else {
		srv, err := extauthz.New(extauthz.Config{Admitter: p, Log: quiet})
		if err != nil {
			t.Fatal(err)
		}
		srv.Register(g)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() { _ = g.Serve(l) })
	t.Cleanup(func() {
		g.Stop()
		serving.Wait()
	})
	return l.Addr().String()
}

func testPanic(t *testing.T, r turn) {
	harness.RequireEnvoy(t)
	up := harness.RunUpstream(t)
	deny, allow := configv1.OnReceiptFailure_DENY, configv1.OnReceiptFailure_ALLOW
	p := &panicker{allow: "allow"}
	switch {
	case !r.letting:
		p.allow, allow = "", deny
	case !r.denying:
		p.allow, deny = "*", allow
	}
	mode := configv1.Capture_LEAN
	if r.capture == "full" {
		mode = configv1.Capture_FULL
	}
	b, err := bootstrap.Bootstrap(&configv1.Config{
		Instance: "a", Listeners: &configv1.Listeners{Envoy: p.serve(t, r)},
		Envoy: &configv1.Envoy{
			Listener: "127.0.0.1:0", Admin: "127.0.0.1:0", Capture: mode, Filter: configv1.Filter(configv1.Filter_value[r.filter]),
			Clusters: []*configv1.Cluster{{Name: "up", Endpoints: []string{up.HTTP()}}},
		},
		DefaultRoute: &configv1.RoutePolicy{OnReceiptFailure: deny},
		Routes: []*configv1.Route{
			{Name: "all", Cluster: "up", Policy: &configv1.RoutePolicy{OnReceiptFailure: deny}},
			{Name: "body", Cluster: "up", Prefix: "/body", Policy: &configv1.RoutePolicy{ClassifyBody: true, OnReceiptFailure: deny}},
			{Name: "allow", Cluster: "up", Prefix: "/allow", Policy: &configv1.RoutePolicy{OnReceiptFailure: allow}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	b.GetStaticResources().GetClusters()[0].HealthChecks = nil // this server has no health service
	y, err := bootstrap.YAML(b)
	if err != nil {
		t.Fatal(err)
	}
	envoy := harness.RunEnvoy(t, harness.EnvoyConfig{Bootstrap: y})
	addr, err := envoy.Listener(t.Context(), bootstrap.ListenerName)
	if err != nil {
		t.Fatal(err)
	}
	get := harness.Request{Target: "/"}
	body := harness.Request{Method: http.MethodPost, Target: "/body", Body: delta}
	pass := harness.Request{Target: "/allow"}
	denied, allowed := 503, 200 // of a request about which the Admitter panics
	if !r.denying {
		denied = 200
	}
	if !r.letting {
		allowed = 503
	}
	for _, c := range []struct {
		where  string
		r      harness.Request
		status int // 200: the request has to pass
	}{
		{"", get, 200}, {"", body, 200},
		{"plan", get, 503}, {"plan", body, 503},
		{"admit", get, denied}, {"admit", body, denied},
		{"admit", pass, allowed}, // the route says so
		{"plan", pass, 503},      // nobody knows what the route says
		{"finish", get, 200},     // the exchange is over by then
		{"", get, 200}, {"", body, 200},
	} {
		p.where.Store(c.where)
		up.Forget()
		before := p.n.Load()
		resp, err := harness.Do(t.Context(), addr, c.r)
		if err != nil || resp.Status != c.status {
			t.Errorf("panic in %q, %s: %v, %v", c.where, c.r.Target, resp, err)
			continue
		}
		if n := len(up.Seen()); (n == 1) != (c.status == 200) || n > 1 {
			t.Errorf("panic in %q, %s: the upstream saw %d requests", c.where, c.r.Target, n)
		}
		// Outcomes are told when Envoy has ended the stream; lean ones are not told here at all.
		if c.where == "finish" {
			if r.capture == "full" {
				harness.Eventually(t, "Finish panics", func() bool { return p.n.Load() > before })
			}
		} else if p.n.Load() != before+min(1, int64(len(c.where))) {
			t.Errorf("panic in %q, %s: it did not panic", c.where, c.r.Target)
		}
	}
}
