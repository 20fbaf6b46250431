package transactions

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// TestDrain ends knhk with SIGTERM while slow requests are under way: they complete, new ones are refused, and after the next
// start every receipt is there.
func TestDrain(t *testing.T) {
	both(t, func(t *testing.T, capture string) {
		w := start(t, stack.Config{YAML: edited(), Capture: capture})
		const slow = 8
		var conns []*harness.Conn
		for i := range slow {
			c := w.dial()
			defer c.Close()
			conns = append(conns, c)
			target := fmt.Sprintf("/p/do/slow/1500?%d", i)
			if i%2 == 1 {
				target = fmt.Sprintf("/hot/do/slow/1500?%d", i)
			}
			if err := c.Write(harness.Request{Host: "slow" + caseSuffix, Target: target}.Bytes()); err != nil {
				t.Fatal(err)
			}
		}
		w.until("the upstream sees all of them", func() bool { return w.reached("slow") == slow })
		if err := w.Knhk.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		w.until("requests are refused", func() bool {
			resp, err := w.Do(t.Context(), harness.Request{Host: "late" + caseSuffix, Target: "/p"})
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
		w.fsck()
		if err := w.StartKnhk(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.serves("restarted")
		tr := w.audit()
		if n := len(tr.byCase["slow"]); n != slow {
			t.Errorf("%d receipts for %d slow requests", n, slow)
		}
		for _, e := range tr.byCase["slow"] {
			if o := e.outcomes; e.d.Verdict != "admit" || len(o) != 1 || o[0].Result != "complete" || o[0].Status != 200 {
				t.Errorf("slow: %v", e)
			}
		}
		for _, e := range tr.byCase["late"] {
			if e.outcomes[0].Status != 200 && e.outcomes[0].Status != 503 {
				t.Errorf("late: %v", e)
			}
		}
	})
}
