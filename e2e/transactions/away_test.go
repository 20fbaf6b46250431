package transactions

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// shut wants a request on every kind of route refused with 5xx, and the upstream to see none of them.
func (w *world) shut(name string) {
	w.t.Helper()
	requests := []harness.Request{
		{Target: "/p"}, {Target: "/hot"}, {Target: "/nowhere"}, {Target: "/hop/do/redirect/302/p"},
		{Method: http.MethodPost, Target: "/p/do/echo", Body: "x"},
		{Method: http.MethodPost, Target: "/delta/do/echo", Body: hotDelta},
		{Method: http.MethodPost, Target: "/delta/do/echo", Chunks: []string{hotDelta}},
	}
	type answer struct {
		resp *harness.Response
		err  error
	}
	// At the same time: a frozen knhk costs each of them Envoy's message_timeout.
	answers := make(chan answer)
	for _, r := range requests {
		r.Host = name + caseSuffix
		go func() {
			resp, err := w.Do(w.t.Context(), r)
			answers <- answer{resp, err}
		}()
	}
	for range requests {
		a := <-answers
		if a.err != nil {
			w.t.Errorf("%s: %v", name, a.err)
		} else if a.resp.Status != 503 && a.resp.Status != 504 || a.resp.Header.Get("X-Knhk-Receipt") != "" {
			w.t.Errorf("%s: %d %v", name, a.resp.Status, a.resp.Header)
		}
	}
	if n := w.reached(name); n != 0 {
		w.t.Errorf("%s: the upstream saw %d requests", name, n)
	}
}

// gap sends requests to the route that lets them pass without a receipt, and returns how many.
func (w *world) gap(name string, n int) int {
	w.t.Helper()
	for i := range n {
		resp, err := w.Do(w.t.Context(), harness.Request{Host: name + caseSuffix, Target: fmt.Sprintf("/allow?%d", i)})
		if err != nil || resp.Status != 200 || resp.Header.Get("X-Knhk-Receipt") != "" {
			w.t.Errorf("%s: %v, %v", name, resp, err)
		}
	}
	if got := w.reached(name); got != n {
		w.t.Errorf("%s: the upstream saw %d requests of %d", name, got, n)
	}
	return n
}

// serves waits until requests are answered with receipts again.
func (w *world) serves(name string) {
	w.t.Helper()
	w.until("requests are admitted: "+name, func() bool {
		resp, err := w.Do(w.t.Context(), harness.Request{Host: name + caseSuffix, Target: "/p"})
		return err == nil && resp.Status == 200 && resp.Header.Get("X-Knhk-Receipt") != ""
	})
}

// freeze stops knhk and waits until every thread of it has stopped: the signal takes a moment to reach those that run.
func (w *world) freeze() {
	w.t.Helper()
	if err := w.Knhk.Freeze(); err != nil {
		w.t.Fatal(err)
	}
	w.eventually("every thread of knhk is stopped", 10*time.Second, func() error {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", w.Knhk.PID()))
		if err != nil || len(threads) == 0 {
			return fmt.Errorf("%d threads, %w", len(threads), err)
		}
		for _, file := range threads {
			stat, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			if _, state, ok := strings.Cut(string(stat), ") "); !ok || state[0] != 'T' { // proc_pid_stat(5)
				return fmt.Errorf("%s: %s", file, stat)
			}
		}
		return nil
	})
}

// TestKnhkAway runs Envoy without knhk: not started yet, killed, frozen. Nothing passes without a decision, but on the route
// that says so, and what passes there is counted.
func TestKnhkAway(t *testing.T) {
	both(t, func(t *testing.T, capture string) {
		w := prepare(t, stack.Config{Capture: capture, UnixSocket: capture == "full",
			YAML: strings.Replace(logOf("seal_every: 200ms, outcome_timeout: 15s"), "envoy:\n", "envoy:\n  message_timeout: 1.4s\n", 1)})
		if err := w.StartEnvoy(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.shut("not-started")
		gaps := w.gap("gap-not-started", 3)
		if err := w.StartKnhk(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.serves("started")

		// A request is at the upstream when knhk dies: its decision was recorded before it went on.
		c := w.dial()
		if err := c.Write(harness.Request{Host: "in-flight" + caseSuffix, Target: "/p/do/slow/1000"}.Bytes()); err != nil {
			t.Fatal(err)
		}
		if err := w.sentUpstream("in-flight")(); err != nil {
			t.Fatal(err)
		}
		w.kill()
		resp, err := c.Read("GET")
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		t.Logf("the request in flight when knhk was killed got %d", resp.Status)
		w.shut("killed")
		gaps += w.gap("gap-killed", 4)
		if err := w.StartKnhk(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.serves("restarted")

		w.freeze()
		begin := time.Now()
		w.shut("frozen")
		t.Logf("refused in %v while knhk was frozen", time.Since(begin).Round(time.Millisecond))
		gaps += w.gap("gap-frozen", 2)
		if err := w.Knhk.Thaw(); err != nil {
			t.Fatal(err)
		}
		w.serves("thawed")
		// Envoy itself counts every one. What it logged while nobody listened is lost: the access log sees some at most.
		if n, err := w.Envoy.Stat(t.Context(), "http.knhk.ext_proc.failure_mode_allowed"); err != nil || n != uint64(gaps) {
			t.Errorf("Envoy counts %d gaps of %d, %v", n, gaps, err)
		}
		if n := w.metric("knhk_gaps_total"); n > float64(gaps) {
			t.Errorf("%v gaps counted of %d", n, gaps)
		}
		tr := w.audit()
		if list := tr.byCase["in-flight"]; len(list) != 1 || list[0].d.Verdict != "admit" {
			t.Errorf("in-flight: %v", list)
		} else {
			t.Logf("in-flight: %v", list[0])
		}
		for _, name := range []string{"not-started", "killed", "gap-not-started", "gap-killed"} {
			if n := len(tr.byCase[name]); n != 0 {
				t.Errorf("%s: %d receipts", name, n)
			}
		}
		// The frozen one had the requests in hand or in its socket: it decides when it is thawed. Then the decision has taken too
		// long, or nobody waits for it any more, or it was sent off before that was heard of: the outcome is unknown, because
		// Envoy's access log has no id for it.
		for _, name := range []string{"frozen", "gap-frozen"} {
			for _, e := range tr.byCase[name] {
				o := e.outcomes[0]
				switch told := fmt.Sprintf("%s %s %s", o.Source, o.Result, o.Details); told {
				case "ext_proc local_reply knhk_log_unavailable", "ext_proc aborted answer_not_delivered",
					"ext_proc client_abort knhk_client_gone", "recovery unknown outcome_timeout":
				default:
					t.Errorf("%s: %v", name, e)
				}
				if len(e.outcomes) != 1 {
					t.Errorf("%s: %d outcomes: %v", name, len(e.outcomes), e)
				}
			}
		}
	})
}
