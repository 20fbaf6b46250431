package failclosed

import (
	"fmt"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	"golang.org/x/sys/unix"

	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
	"github.com/knhk/sidecar/envoy/bootstrap"
)

// Where Envoy says what it did about a knhk that does not answer.
const (
	connectFailed = "cluster.knhk.upstream_cx_connect_fail"
	spurious      = "http.knhk.ext_proc.spurious_msgs_received"
)

// unknown wants the interval named in which nobody heard Envoy's access log, once it is over. gaps passed in it: what knhk
// itself counts is at most that, and Envoy's own count is exact.
func (w *site) unknown(mark int64) string {
	w.t.Helper()
	w.AwaitMetric(1, "knhk_accesslog_unheard_total")
	line := w.logged(mark, "unknown interval", "since=", "until=")
	if n := w.stat(w.failedOpen); n != float64(w.gaps) {
		w.t.Errorf("Envoy counts %v gaps of %d", n, w.gaps)
	}
	if n := w.Metric("knhk_gaps_total"); n > float64(w.gaps) {
		w.t.Errorf("knhk counts %v gaps of %d", n, w.gaps)
	}
	return line
}

// TestDead sends requests before knhk was ever started, and after it has ended.
func TestDead(t *testing.T) {
	t.Parallel()
	each(t, "service-dead", stack.Config{}, func(w *site) {
		w.startEnvoy()
		w.refuses("never-started", refusal{503, ""})
		w.passes("gap-never-started", 4)
		if n := w.stat(connectFailed); n == 0 {
			t.Error("Envoy could connect to nobody's port")
		}
		w.startKnhk("started")
		w.unknown(0)

		mark := w.mark()
		if err := w.Knhk.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		before := w.stat(connectFailed)
		refused := w.refuses("ended", refusal{503, ""})
		w.passes("gap-ended", 4)
		n := w.stat(connectFailed) - before
		if n == 0 {
			t.Error("Envoy could connect to a port that is closed")
		} else {
			w.observed("Envoy's %s", connectFailed)
		}
		for _, name := range w.refusing {
			if n := w.stat(name); n < float64(refused) {
				t.Errorf("Envoy counts %v of %s for %d refused requests", n, name, refused)
			}
		}
		w.startKnhk("restarted")
		line := w.unknown(mark)
		tr := w.complete(0)
		for _, name := range []string{"never-started", "gap-never-started", "ended", "gap-ended"} {
			if n := len(tr.ByCase[name]); n != 0 {
				t.Errorf("%s: %d receipts", name, n)
			}
		}
		w.row("service dead", refusal{503, ""}.String(), envoyExact, "Envoy "+w.failed+", "+connectFailed, line)
	})
}

// TestHung freezes knhk: requests are refused or pass when Envoy's message_timeout is over. What knhk finds in its socket when it is
// thawed it decides about, too late: the record says so.
func TestHung(t *testing.T) {
	t.Parallel()
	each(t, "service-hung", stack.Config{}, func(w *site) {
		w.startEnvoy()
		w.startKnhk("started")
		mark := w.mark()
		w.Freeze()
		before := w.stat(w.timedOut)
		begin := time.Now()
		refused := w.refuses("frozen", w.hung)
		passed := w.passes("gap-frozen", 4)
		t.Logf("answered in %v", time.Since(begin).Round(time.Millisecond))
		if n := w.stat(w.timedOut) - before; n >= 4 {
			w.observed("Envoy's %s, every thread of knhk in state T", w.timedOut)
		} else {
			t.Errorf("Envoy counts %v timeouts", n)
		}
		if err := w.Knhk.Thaw(); err != nil {
			t.Fatal(err)
		}
		w.serves("thawed")
		// Its access log stream has outlived the frost: what Envoy wrote to it was in the socket.
		w.Eventually("Envoy's access log has come", func() error {
			if n := w.Metric("knhk_gaps_total", `knhk_source="accesslog"`); n != float64(w.gaps) {
				return fmt.Errorf("%v gaps of %d", n, w.gaps)
			}
			return nil
		})
		if n := w.stat(w.failedOpen); n != float64(w.gaps) {
			t.Errorf("Envoy counts %v gaps of %d", n, w.gaps)
		}
		w.AwaitMetric(float64(refused), "knhk_unreceipted_total", `knhk_kind="`+w.kind+`"`)
		line := ""
		if w.letting {
			line = w.logged(mark, "a request reached the upstream without a decision", "route=")
		}
		tr := w.complete(passed)
		for _, name := range []string{"frozen", "gap-frozen"} {
			for _, e := range tr.ByCase[name] {
				o := e.Outcomes[0]
				switch told := fmt.Sprintf("%s %s %s", o.Source, o.Result, o.Details); told {
				case w.source + " local_reply knhk_log_unavailable", w.source + " aborted answer_not_delivered",
					w.source + " client_abort knhk_client_gone", "recovery unknown outcome_timeout":
				default:
					t.Errorf("%s: %v", name, e)
				}
				if len(e.Outcomes) != 1 {
					t.Errorf("%s: %d outcomes: %v", name, len(e.Outcomes), e)
				}
			}
		}
		w.row("service hung", w.hung.String()+" after message_timeout", "pass after message_timeout; access log and Envoy exact",
			"Envoy "+w.timedOut+"; knhk_unreceipted_total{"+w.kind+"} when thawed", line)
	})
}

// TestKilledAfterAdmitting kills knhk while the upstream works: the decision is there after the restart, with the outcome unknown.
func TestKilledAfterAdmitting(t *testing.T) {
	t.Parallel()
	each(t, "killed-after-admitting", stack.Config{}, func(w *site) {
		w.startEnvoy()
		w.startKnhk("started")
		targets := map[string]string{"flight-w1": "/p/do/slow/6000", "flight-r1": "/hot/do/slow/6000", "flight-allow": "/allow/do/slow/6000"}
		conns := map[string]*harness.Conn{}
		for name, target := range targets {
			c := w.Dial()
			defer c.Close()
			if err := c.Write(harness.Request{Host: name + audited.CaseSuffix, Target: target}.Bytes()); err != nil {
				t.Fatal(err)
			}
			conns[name] = c
		}
		for name := range targets {
			if err := w.SentUpstream(name)(); err != nil {
				t.Fatal(err)
			}
		}
		mark := w.mark()
		killed := w.Knhk
		w.KillKnhk()
		if exit, ok := killed.Wait(t.Context()).(*exec.ExitError); !ok || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Errorf("knhk was to be killed: %v", exit)
		} else {
			w.observed("knhk's exit status")
		}
		ids, status := map[string]string{}, map[string]int{}
		for name, c := range conns {
			resp, err := c.Read(http.MethodGet)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			ids[name], status[name] = resp.Header.Get("X-Knhk-Receipt"), resp.Status
			want := 200
			if w.capture == "full" && name != "flight-allow" {
				want = 503
			}
			if resp.Status != want || ids[name] == "" {
				t.Errorf("%s: %d %v, want %d", name, resp.Status, resp.Header, want)
			}
		}
		w.refuses("killed", refusal{503, ""})
		w.passes("gap-killed", 4)
		w.startKnhk("restarted")
		allowed := w.gaps
		if w.capture == "full" {
			allowed++ // the response phase of the one in flight failed too: Envoy counts it, though it has its receipt
		}
		if n := w.stat(w.failedOpen); n != float64(allowed) {
			t.Errorf("Envoy counts %v failures allowed, want %d", n, allowed)
		}
		line := w.logged(mark, "unknown interval", "since=", "until=")
		w.AwaitMetric(float64(len(ids)), "knhk_outcomes_unknown_total")
		tr := w.complete(0)
		for name, id := range ids {
			list := tr.ByCase[name]
			if len(list) != 1 || list[0].Decision.ID != id || list[0].Decision.Verdict != "admit" {
				t.Errorf("%s: %v, want one receipt, %s", name, list, id)
				continue
			}
			o := list[0].Outcomes
			if o[0].Result != "unknown" || o[0].Source != "recovery" || len(o) > 2 || len(o) == 2 && !o[1].Late {
				t.Errorf("%s: outcomes %v", name, list[0])
			}
			t.Logf("%s: %d, %v", name, status[name], list[0])
		}
		w.row("killed after admitting", fmt.Sprintf("%d with id, then 503, empty", status["flight-w1"]),
			fmt.Sprintf("%d with id, then pass; Envoy exact, interval named", status["flight-allow"]), "knhk_outcomes_unknown_total", line)
	})
}

// TestMissingCluster gives Envoy a configuration in which the cluster of knhk has another name, or is not there. Envoy starts with it
// (1.40) and has nobody to ask, and nobody to send its access log to.
func TestMissingCluster(t *testing.T) {
	t.Parallel()
	each(t, "missing-cluster", stack.Config{}, func(w *site) {
		w.startKnhk("")
		seen := 0
		for name, change := range map[string]func(*bootstrapv3.Bootstrap_StaticResources){
			"renamed": func(r *bootstrapv3.Bootstrap_StaticResources) {
				for _, c := range r.GetClusters() {
					if c.GetName() == bootstrap.SidecarCluster {
						c.Name = "elsewhere"
					}
				}
			},
			"removed": func(r *bootstrapv3.Bootstrap_StaticResources) {
				r.Clusters = slices.DeleteFunc(r.Clusters, func(c *clusterv3.Cluster) bool { return c.GetName() == bootstrap.SidecarCluster })
			},
		} {
			w.EditBootstrap = stack.EditResources(t, change)
			w.startEnvoy()
			w.refuses(name, refusal{503, ""})
			passed := w.passes("gap-"+name, 4)
			if n := w.stat(w.failedOpen); n != float64(passed) {
				t.Errorf("Envoy counts %v gaps of %d", n, passed)
			}
			if names, err := w.Envoy.Stats(t.Context(), `^cluster\.knhk\.membership_total$`); err != nil || len(names) != 0 {
				t.Errorf("Envoy has a cluster of that name: %v, %v", names, err)
			} else {
				seen++
			}
			if n := w.Metric("knhk_accesslog_streams"); n != 0 {
				t.Errorf("%v access log streams", n)
			}
			w.Envoy.Kill()
		}
		if seen == 2 {
			w.observed("Envoy's stats know no cluster knhk")
		}
		w.EditBootstrap = nil
		mark := w.mark()
		w.startEnvoy()
		w.serves("found")
		line := w.logged(mark, "unknown interval", "since=", "until=")
		w.complete(0)
		w.row("missing cluster", refusal{503, ""}.String(), envoyExact, "knhk_accesslog_streams 0", line)
	})
}

// TestSocketWithoutPermission has Envoy reach knhk through a unix socket that it may not open.
func TestSocketWithoutPermission(t *testing.T) {
	t.Parallel()
	each(t, "socket-without-permission", stack.Config{UnixSocket: true, EnvoyLog: "warning,connection:debug"}, func(w *site) {
		w.startKnhk("")
		socket := strings.TrimPrefix(w.Sidecar, "unix:")
		if err := unix.Chmod(socket, 0); err != nil {
			t.Fatal(err)
		}
		w.startEnvoyUnprivileged()
		w.refuses("no-permission", refusal{503, ""})
		w.passes("gap-no-permission", 4)
		if log := w.Envoy.LogTail(1 << 20); !strings.Contains(log, "Permission denied") {
			t.Error("Envoy's log does not say that it has no permission")
		} else if n := w.stat(connectFailed); n == 0 {
			t.Error("Envoy has opened the socket")
		} else {
			w.observed("EACCES in Envoy's log, %s", connectFailed)
		}
		if n := w.Metric("knhk_accesslog_streams"); n != 0 {
			t.Errorf("%v access log streams came through", n)
		}
		mark := w.mark()
		if err := unix.Chmod(socket, 0o600); err != nil {
			t.Fatal(err)
		}
		w.serves("permitted")
		line := w.unknown(mark)
		tr := w.complete(0)
		for _, name := range []string{"no-permission", "gap-no-permission"} {
			if n := len(tr.ByCase[name]); n != 0 {
				t.Errorf("%s: %d receipts", name, n)
			}
		}
		w.row("socket without permission", refusal{503, ""}.String(), envoyExact,
			"Envoy "+connectFailed+"; knhk_accesslog_streams 0", line)
	})
}
