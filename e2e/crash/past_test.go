package crash

import (
	"math/rand/v2"
	"net/http"
	"testing"

	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// TestReplyPastFilters lets knhk hang, or die, while the upstream's response waits for it, which is in full capture: Envoy then
// replies directly to the client, past its filters. The client must get the id all the same: the upstream has run the request.
func TestReplyPastFilters(t *testing.T) {
	harness.RequireEnvoy(t)
	t.Parallel()
	ctx := t.Context()
	v := prepare(t, nil, stack.Config{Capture: "full", YAML: site}, rand.New(rand.NewPCG(0, 0)))
	if err := v.Start(ctx); err != nil {
		t.Fatal(err)
	}
	answered := func() uint64 {
		n, err := v.Envoy.Stat(ctx, "cluster.up.upstream_rq_200")
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for _, c := range []struct {
		name, path string
		die        bool
		status     int
	}{
		{"hang", "/p/do/slow/300?hang", false, http.StatusGatewayTimeout},
		{"die", "/p/do/slow/300?die", true, http.StatusServiceUnavailable},
	} {
		before := answered()
		conn, err := harness.Dial(ctx, v.Listener)
		if err != nil {
			t.Fatal(err)
		}
		if err := conn.Write(harness.Request{Target: c.path}.Bytes()); err != nil {
			t.Fatal(err)
		}
		harness.Eventually(t, "the upstream sees the request", func() bool { return v.Upstream.CountPath(c.path) == 1 })
		if err := v.Knhk.Freeze(); err != nil {
			t.Fatal(err)
		}
		harness.Eventually(t, "Envoy has the upstream's response", func() bool { return answered() > before })
		if c.die {
			v.Knhk.Kill() // ends a stopped process too
		}
		resp, err := conn.Read(http.MethodGet)
		conn.Close()
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.Header.Values("X-Knhk-Receipt")) != 1 || resp.Header.Get("X-Knhk-Receipt") == "" || resp.Header.Get("X-Knhk-Class") != "W1" ||
			resp.Status != c.status {
			t.Errorf("%s: %d %v", c.name, resp.Status, resp.Header)
		}
		if !c.die {
			if err := v.Knhk.Thaw(); err != nil {
				t.Fatal(err)
			}
			harness.Eventually(t, "requests are admitted", func() bool {
				resp, err := v.Do(ctx, harness.Request{Target: "/p/page"})
				return err == nil && resp.Status == http.StatusOK
			})
		}
	}
}
