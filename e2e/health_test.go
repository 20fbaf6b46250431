package e2e

import (
	"net"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/envoy/bootstrap"
)

// The health check must never be what lets a request pass: serving, not serving, gone, back.
func TestHealthNeverOpens(t *testing.T) {
	w := start(t, nil)
	healthy := func(want uint64) func() bool {
		return func() bool {
			n, err := w.envoy.Stat(t.Context(), "cluster.knhk.membership_healthy")
			return err == nil && n == want
		}
	}
	harness.Eventually(t, "healthy", healthy(1))
	if resp := w.do(t, receipt("id"), harness.Request{}); resp.Status != 200 || resp.Header.Get("X-Knhk-Receipt") != "id" {
		t.Errorf("serving: %d, %v", resp.Status, resp.Header)
	}

	// The only replica announces that it leaves: Envoy's panic mode goes on asking it, and its answer holds.
	w.side.health.SetServingStatus(bootstrap.HealthService, healthv1.HealthCheckResponse_NOT_SERVING)
	harness.Eventually(t, "unhealthy", healthy(0))
	if resp := w.do(t, receipt("id"), harness.Request{}); resp.Status != 200 || resp.Header.Get("X-Knhk-Receipt") != "id" {
		t.Errorf("not serving, but answering: %d, %v", resp.Status, resp.Header)
	}
	if resp := w.do(t, refuse("id"), harness.Request{}); resp.Status != 429 {
		t.Errorf("not serving, but refusing: %d", resp.Status)
	}

	w.side.server.Stop()
	for _, target := range []string{"/", "/body/"} {
		if resp := w.do(t, receipt("id"), harness.Request{Target: target}); resp.Status != 503 || len(w.up.Seen()) != 0 {
			t.Errorf("gone, %s: %d, upstream saw %v", target, resp.Status, w.up.Seen())
		}
	}
	if resp := w.do(t, receipt("id"), harness.Request{Target: "/allow/"}); resp.Status != 200 || resp.Header.Get("X-Knhk-Receipt") != "" {
		t.Errorf("gone, the route allows: %d, %v", resp.Status, resp.Header)
	}

	back := runSidecar(t, w.side.addr)
	back.set(receipt("again"))
	harness.Eventually(t, "healthy again", healthy(1))
	if resp := w.do(t, receipt("id"), harness.Request{}); resp.Status != 200 || resp.Header.Get("X-Knhk-Receipt") != "again" {
		t.Errorf("back: %d, %v", resp.Status, resp.Header)
	}
}

// A replica that cannot be reached is not the end while there is another: ext_proc asks again, elsewhere.
func TestDeadReplicaIsSkipped(t *testing.T) {
	dead, err := harness.FreeAddr()
	if err != nil {
		t.Fatal(err)
	}
	w := start(t, nil, func(b *bootstrapv3.Bootstrap) {
		c := b.GetStaticResources().GetClusters()[0]
		c.HealthChecks = nil // else the dead one would not be tried at all
		eps := c.GetLoadAssignment().GetEndpoints()[0]
		second := proto.Clone(eps.GetLbEndpoints()[0]).(*endpointv3.LbEndpoint)
		_, port, _ := net.SplitHostPort(dead)
		n, _ := strconv.ParseUint(port, 10, 16)
		second.GetEndpoint().GetAddress().GetSocketAddress().PortSpecifier = &corev3.SocketAddress_PortValue{PortValue: uint32(n)}
		eps.LbEndpoints = append(eps.LbEndpoints, second)
	})
	for i := range 40 {
		if resp := w.do(t, receipt("id"), harness.Request{}); resp.Status != 200 {
			t.Fatalf("request %d: %d", i, resp.Status)
		}
	}
	if n, err := w.envoy.Stat(t.Context(), "cluster.knhk.upstream_rq_retry"); err != nil || n == 0 {
		t.Errorf("%d retries, %v: the dead replica was never tried", n, err)
	}
}

// A replica that is draining may refuse a stream with UNAVAILABLE: Envoy asks again, three times, before it gives up.
func TestUnavailableIsRetried(t *testing.T) {
	w := start(t, nil)
	for _, c := range []struct{ refusals, status, asked int }{
		{2, 200, 3},
		{100, 503, 4}, // fails closed
	} {
		var asked atomic.Int32
		resp := w.do(t, func(m *extprocv3.ProcessingRequest) (*extprocv3.ProcessingResponse, error) {
			if int(asked.Add(1)) <= c.refusals {
				return nil, status.Error(codes.Unavailable, "draining")
			}
			return receipt("late")(m)
		}, harness.Request{})
		if resp.Status != c.status || int(asked.Load()) != c.asked || (c.status == 200) != (len(w.up.Seen()) == 1) {
			t.Errorf("%d refusals: %d after %d tries, upstream saw %v", c.refusals, resp.Status, asked.Load(), w.up.Seen())
		}
	}
}

// A socket that nobody listens on is a knhk that is away: closed, and open again when it is there.
func TestUnixSocket(t *testing.T) {
	path := filepath.Join(harness.Directory(t, ""), "knhk.sock")
	w := start(t, func(c *configv1.Config) { c.Listeners.Envoy = "unix:" + path })
	if resp := w.do(t, receipt("id"), harness.Request{}); resp.Status != 503 {
		t.Errorf("nobody listens on the socket: %d", resp.Status)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	w.side.serve(t, l)
	harness.Eventually(t, "a receipt over the socket", func() bool {
		return w.do(t, receipt("id"), harness.Request{}).Header.Get("X-Knhk-Receipt") == "id"
	})
}
