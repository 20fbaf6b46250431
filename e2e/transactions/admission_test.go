package transactions

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// TestAdmission changes the configuration of a running knhk, under load, from room for everything to one request a tick, to a
// dry run, and back, and watches what is decided.
func TestAdmission(t *testing.T) {
	audited.Both(t, func(t *testing.T, capture string) {
		w := start(t, stack.Config{YAML: edited(), Capture: capture})
		reloadUnderLoad(w)
		refusals(w)
		leaveWhileParked(w)
		dryRun(w)
		tr := w.Audit()
		checkRefusals(w, tr)
		checkParked(w, tr)
		checkDryRun(w, tr)
		checkLoad(w, tr)
	})
}

// load sends requests one after another on several connections until stop is called, which returns how many were answered
// with 200 and the first that was not.
func (w *world) load(name string, targets ...string) (stop func() (int64, error)) {
	ctx, cancel := context.WithCancel(w.t.Context())
	var wg sync.WaitGroup
	var ok atomic.Int64
	var once sync.Once
	var failure error
	for _, target := range targets {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				resp, err := w.Do(context.WithoutCancel(ctx), harness.Request{Host: name + audited.CaseSuffix, Target: fmt.Sprintf("%s?%d", target, i)})
				if err == nil && resp.Status != 200 {
					err = fmt.Errorf("%s: status %d: %s", target, resp.Status, resp.Body)
				}
				if err != nil {
					once.Do(func() { failure = err })
					return
				}
				ok.Add(1)
			}
		})
	}
	return func() (int64, error) {
		cancel()
		wg.Wait()
		return ok.Load(), failure
	}
}

// reloadUnderLoad reloads by file change and by SIGHUP while requests run, and offers a broken file and one that cannot be
// taken over: no request fails.
func reloadUnderLoad(w *world) {
	w.t.Helper()
	stop := w.load("load", "/p", "/hot", "/search")
	// The class of a route.
	w.wantClass("reload-before", "/p", "W1")
	w.Configure(strings.Replace(edited(), "prefix: /p, cluster: up}", "prefix: /p, cluster: up, policy: {class: R1}}", 1))
	w.wantClass("reload-after", "/p", "R1")
	// The same file again, by SIGHUP.
	applied := w.Metric("knhk_config_reloads_total", `knhk_result="applied"`)
	w.Hup()
	w.AwaitMetric(applied+1, "knhk_config_reloads_total", `knhk_result="applied"`)
	// A broken file, and one that a running knhk cannot take over.
	for i, bad := range []string{
		strings.Replace(edited(), "class: R1}", "class: R9}", 1),
		strings.Replace(edited(), "seal_every: 200ms", "seal_every: 300ms", 1),
	} {
		if err := w.WriteConfig(bad); err != nil {
			w.t.Fatal(err)
		}
		w.AwaitMetric(float64(i+1), "knhk_config_reloads_total", `knhk_result="refused"`)
		w.wantClass(fmt.Sprintf("reload-refused-%d", i), "/p", "R1")
	}
	w.Hup()
	w.AwaitMetric(3, "knhk_config_reloads_total", `knhk_result="refused"`)
	w.Configure(edited())
	w.wantClass("reload-back", "/p", "W1")
	n, err := stop()
	if err != nil || n == 0 {
		w.t.Errorf("load during reloads: %d answered, %v", n, err)
	}
	w.IDs["load"] = make([]string, n)
}

func checkLoad(w *world, tr audited.Transcript) {
	w.t.Helper()
	if n, want := len(tr.ByCase["load"]), len(w.IDs["load"]); n != want {
		w.t.Errorf("%d receipts for %d requests under load", n, want)
	}
	for _, e := range tr.ByCase["load"] {
		if e.Decision.Verdict == "refuse" || e.Outcomes[0].Result != "complete" || len(e.Outcomes) != 1 {
			w.t.Errorf("under load: %v", e)
		}
	}
}

func (w *world) wantClass(name, target, class string) {
	w.t.Helper()
	resp := w.Get(name, target)
	if w.wantStatus(name, resp, 200); resp.Header.Get("X-Knhk-Class") != class {
		w.t.Errorf("%s: class %q, want %s", name, resp.Header.Get("X-Knhk-Class"), class)
	}
}

// refusals leaves one credit for each tick of 100 ms: a hot request beyond it is refused, a warm one is parked if the next
// tick is free, or refused.
func refusals(w *world) {
	w.t.Helper()
	w.Configure(edited("R1CAP", "1", "W1CAP", "1", "W1WAIT", "100ms"))
	seen := map[string]bool{}
	w.Eventually("hot and warm requests are refused, warm ones parked", func() error {
		var wg sync.WaitGroup
		var mu sync.Mutex
		var fault error
		for i := range 8 {
			name, target := "burst-r1", "/hot"
			if i%2 == 1 {
				name, target = "burst-w1", "/p"
			}
			wg.Go(func() {
				resp, err := w.Do(w.t.Context(), harness.Request{Host: name + audited.CaseSuffix, Target: target})
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					fault = err
					return
				}
				w.IDs[name] = append(w.IDs[name], resp.Header.Get("X-Knhk-Receipt"))
				seen[fmt.Sprintf("%s %d", name, resp.Status)] = true
				after, _ := strconv.Atoi(resp.Header.Get("Retry-After"))
				if (after > 0) != (resp.Status == 429) || resp.Status != 200 && resp.Status != 429 {
					w.t.Errorf("%s: status %d, retry-after %q", name, resp.Status, resp.Header.Get("Retry-After"))
				}
			})
		}
		wg.Wait()
		if fault != nil {
			return fault
		}
		if w.Metric("knhk_decisions_total", `knhk_verdict="park"`) == 0 || !seen["burst-r1 429"] || !seen["burst-w1 429"] {
			return fmt.Errorf("seen so far: %v", seen)
		}
		return nil
	})
}

func checkRefusals(w *world, tr audited.Transcript) {
	w.t.Helper()
	got := map[string]int{}
	for _, name := range []string{"burst-r1", "burst-w1"} {
		if len(tr.ByCase[name]) != len(w.IDs[name]) {
			w.t.Errorf("%s: %d receipts for %d requests", name, len(tr.ByCase[name]), len(w.IDs[name]))
		}
		passed := 0
		for _, e := range tr.ByCase[name] {
			got[strings.Replace(e.String(), "| ext_proc", "| als", 1)]++
			if e.Decision.Verdict != "refuse" {
				passed++
			}
			if (e.Decision.WaitedNS > 0) != (e.Decision.Verdict == "park") {
				w.t.Errorf("%s: waited %d ns: %v", name, e.Decision.WaitedNS, e)
			}
		}
		if n := w.Reached(name); n != passed {
			w.t.Errorf("%s: the upstream saw %d requests of %d that passed", name, n, passed)
		}
	}
	for _, want := range []string{
		"R1 admit ok by route:hot | als complete 200 up=200 via_upstream",
		"R1 refuse no_credit by route:hot 429 | als local_reply 429 knhk_no_credit",
		"W1 admit ok by route:pages | als complete 200 up=200 via_upstream",
		"W1 park waited by route:pages | als complete 200 up=200 via_upstream",
		"W1 refuse no_credit by route:pages 429 | als local_reply 429 knhk_no_credit",
	} {
		if got[want] == 0 {
			w.t.Errorf("no receipt says %q", want)
		}
		delete(got, want)
	}
	for line := range got {
		w.t.Errorf("a receipt says %q", line)
	}
}

// leaveWhileParked has clients leave while their requests wait for a tick, up to 800 ms away.
func leaveWhileParked(w *world) {
	w.t.Helper()
	w.Configure(edited("R1CAP", "4096", "W1CAP", "1", "W1WAIT", "800ms"))
	w.Eventually("a client leaves while its request is parked", func() error {
		var conns []*harness.Conn
		before := w.Reached("parked")
		for i := range 8 {
			c := w.Dial()
			conns = append(conns, c)
			if err := c.Write(harness.Request{Host: "parked" + audited.CaseSuffix, Target: fmt.Sprintf("/p?%d", i)}.Bytes()); err != nil {
				return err
			}
		}
		// Those that come after the first wait for a tick each.
		w.Until("the upstream sees the first", func() bool { return w.Reached("parked") > before })
		for _, c := range conns {
			if err := c.Abort(); err != nil {
				return err
			}
		}
		if w.Metric("knhk_decisions_total", `knhk_reason="client_gone"`) == 0 {
			return fmt.Errorf("none yet")
		}
		return nil
	})
	w.Configure(edited())
}

func checkParked(w *world, tr audited.Transcript) {
	w.t.Helper()
	gone, passed := 0, 0
	for _, e := range tr.ByCase["parked"] {
		switch {
		case e.Decision.Reason == "client_gone":
			gone++
			if e.String() != "W1 refuse client_gone by route:pages 499 | ext_proc aborted answer_not_delivered" || e.Decision.WaitedNS == 0 {
				w.t.Errorf("%v, waited %d ns", e, e.Decision.WaitedNS)
			}
		case e.Outcomes[0].Details != "answer_not_delivered" && e.Decision.Verdict != "refuse":
			passed++
		}
	}
	if n := w.Reached("parked"); gone == 0 || n > passed {
		w.t.Errorf("%d left while parked, %d passed, the upstream saw %d", gone, passed, n)
	}
}

// dryRun refuses on paper only.
func dryRun(w *world) {
	w.t.Helper()
	w.Configure(edited("R1CAP", "1", "W1CAP", "1", "W1WAIT", "0s", "DRYRUN", "true"))
	w.Eventually("requests without a credit pass", func() error {
		for range 4 {
			for name, target := range map[string]string{"dry-r1": "/hot", "dry-w1": "/p"} {
				w.wantStatus(name, w.Get(name, target), 200)
			}
		}
		for _, class := range []string{`knhk_class="R1"`, `knhk_class="W1"`} {
			if w.Metric("knhk_decisions_total", class, `knhk_reason="no_credit"`, `knhk_verdict="admit"`) == 0 {
				return fmt.Errorf("none with %s", class)
			}
		}
		return nil
	})
	w.wantStatus("dry-rule", w.Get("dry-rule", "/celfail"), 200)
	w.Configure(edited())
}

func checkDryRun(w *world, tr audited.Transcript) {
	w.t.Helper()
	got := map[string]int{}
	for _, name := range []string{"dry-r1", "dry-w1", "dry-rule"} {
		if n := len(tr.ByCase[name]); n != len(w.IDs[name]) || n != w.Reached(name) {
			w.t.Errorf("%s: %d receipts, %d requests, the upstream saw %d", name, n, len(w.IDs[name]), w.Reached(name))
		}
		for _, e := range tr.ByCase[name] {
			got[strings.Replace(e.String(), "| ext_proc", "| als", 1)]++
		}
	}
	for _, want := range []string{
		"R1 refuse no_credit by route:hot 429 dry | als complete 200 up=200 via_upstream",
		"W1 refuse no_credit by route:pages 429 dry | als complete 200 up=200 via_upstream",
		"unknown refuse class_rule_error by fails 503 dry | als complete 200 up=200 via_upstream",
	} {
		if got[want] == 0 {
			w.t.Errorf("no receipt says %q, but %v", want, got)
		}
	}
}
