package transactions

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// TestDrain ends knhk with SIGTERM while slow requests are under way: they complete, new ones are refused, and after the next
// start every receipt is there.
func TestDrain(t *testing.T) {
	audited.Both(t, func(t *testing.T, capture string) {
		w := start(t, stack.Config{YAML: edited(), Capture: capture})
		const slow = 8
		var conns []*harness.Conn
		for i := range slow {
			c := w.Dial()
			defer c.Close()
			conns = append(conns, c)
			target := fmt.Sprintf("/p/do/slow/1500?%d", i)
			if i%2 == 1 {
				target = fmt.Sprintf("/hot/do/slow/1500?%d", i)
			}
			if err := c.Write(harness.Request{Host: "slow" + audited.CaseSuffix, Target: target}.Bytes()); err != nil {
				t.Fatal(err)
			}
		}
		w.Until("the upstream sees all of them", func() bool { return w.Reached("slow") == slow })
		if err := w.Knhk.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		w.Until("requests are refused", func() bool {
			resp, err := w.Do(t.Context(), harness.Request{Host: "late" + audited.CaseSuffix, Target: "/p"})
			return err == nil && resp.Status == 503
		})
		for _, c := range conns {
			resp, err := c.Read("GET")
			if err != nil || resp.Status != 200 || string(resp.Body) != "late\n" {
				t.Errorf("a request under way at SIGTERM: %v, %v", resp, err)
			}
		}
		begin := time.Now()
		if err := w.Knhk.Wait(t.Context()); err != nil {
			t.Errorf("knhk ended: %v", err)
		}
		t.Logf("knhk ended %v after the last answer", time.Since(begin).Round(time.Millisecond))
		w.Fsck()
		if err := w.StartKnhk(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.Serves("restarted", "/p")
		tr := w.Audit()
		if n := len(tr.ByCase["slow"]); n != slow {
			t.Errorf("%d receipts for %d slow requests", n, slow)
		}
		for _, e := range tr.ByCase["slow"] {
			if o := e.Outcomes; e.Decision.Verdict != "admit" || len(o) != 1 || o[0].Result != "complete" || o[0].Status != 200 {
				t.Errorf("slow: %v", e)
			}
		}
		for _, e := range tr.ByCase["late"] {
			if e.Outcomes[0].Status != 200 && e.Outcomes[0].Status != 503 {
				t.Errorf("late: %v", e)
			}
		}
	})
}
