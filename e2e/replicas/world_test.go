package replicas

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// site has room for everything that load sends. TENANT changes with each reload.
const site = `
log: {seal_every: 200ms, wal_segment_mib: 8, wal_max_mib: 64}
beat:
  cycle: 800ms
  r1: {capacity: 4096}
  w1: {capacity: 4096, max_wait: 800ms}
class_rules:
- {name: fails, when: 'path.startsWith("/celfail") && int(path) > 0', class: R1}
routes:
- {name: health, prefix: /healthz, cluster: up, policy: {exclude: true}}
- {name: hot, prefix: /hot, cluster: up, policy: {class: R1, tenant: TENANT}}
- {name: pages, prefix: /p, cluster: up, policy: {tenant: TENANT}}
- {name: celfail, prefix: /celfail, cluster: up}
envoy:
  access_log_flush: 50ms
  clusters:
  - {name: up, endpoints: ["UPSTREAM"]}
`

func configured(tenant string) string { return strings.ReplaceAll(site, "TENANT", tenant) }

// both runs a test for each capture mode, at the same time.
func both(t *testing.T, f func(t *testing.T, capture string)) {
	for _, capture := range []string{"lean", "full"} {
		t.Run(capture, func(t *testing.T) {
			t.Parallel()
			f(t, capture)
		})
	}
}

// world is two replicas behind an Envoy, audited at the end.
type world struct {
	*stack.Stack
	t        *testing.T
	stopped  bool
	reloaded int // configurations that were put in force since the start
}

func start(t *testing.T, capture string) *world {
	t.Helper()
	harness.RequireEnvoy(t)
	dir := harness.Directory(t, "")
	s, err := stack.New(t.Context(), stack.Config{Dir: dir, YAML: configured("t0"), Capture: capture, Replicas: 2})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Stack: s, t: t}
	t.Cleanup(w.end)
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.settled()
	return w
}

// end stops what still runs. A test that has come to its end has called audit before.
func (w *world) end() {
	if !w.stopped {
		if w.Envoy != nil {
			w.Envoy.Kill()
		}
		for _, r := range w.All() {
			if r.Knhk != nil {
				r.Knhk.Kill()
			}
		}
		w.Upstream.Close()
	}
	if w.t.Failed() {
		for _, r := range w.All() {
			if r.Knhk != nil {
				w.t.Logf("log of replica %s:\n%s", r.Instance, r.Knhk.LogTail(6000))
			}
		}
		if w.Envoy != nil {
			w.t.Logf("log of envoy:\n%s", w.Envoy.LogTail(3000))
		}
	}
}

// eventually polls ok until it returns nil; its last error fails the test.
func (w *world) eventually(what string, ok func() error) {
	w.t.Helper()
	deadline := time.Now().Add(harness.Patience)
	for {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("not within %v: %s: %v", harness.Patience, what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// settled waits until Envoy takes every replica for healthy.
func (w *world) settled() {
	w.t.Helper()
	w.eventually("Envoy sees every replica", func() error {
		n, err := w.Envoy.Stat(w.t.Context(), "cluster.knhk.membership_healthy")
		if err == nil && n != uint64(len(w.All())) {
			err = fmt.Errorf("it sees %d", n)
		}
		return err
	})
}

// stat is one counter of Envoy's.
func (w *world) stat(name string) uint64 {
	w.t.Helper()
	n, err := w.Envoy.Stat(w.t.Context(), name)
	if err != nil {
		w.t.Fatal(err)
	}
	return n
}

// sum adds every series of a metric of one replica that has all labels; a label is name="value".
func sum(ctx context.Context, r *stack.Stack, name string, labels ...string) (float64, error) {
	m, err := harness.Metrics(ctx, r.Admin)
	return m.Sum(name, labels...), err
}

// everywhere adds a metric over all replicas.
func (w *world) everywhere(name string, labels ...string) (total float64) {
	w.t.Helper()
	for _, r := range w.All() {
		n, err := sum(w.t.Context(), r, name, labels...)
		if err != nil {
			w.t.Fatal(err)
		}
		total += n
	}
	return total
}

// entry is one exported receipt.
type entry struct {
	d        *receipt.Decision
	outcomes []*receipt.Outcome
	path     string
	replica  string // whose log holds it
}

// settle waits until no replica has a decision without outcome or a record without signature, exports and verifies all receipts
// of all replicas, and returns them by id.
func (w *world) settle() map[string]*entry {
	w.t.Helper()
	all := map[string]*entry{}
	for _, r := range w.All() {
		file := filepath.Join(r.Dir, "receipts.jsonl")
		var list []*entry
		w.eventually("every outcome at replica "+r.Instance+" is under a signed checkpoint", func() error {
			for _, name := range []string{"knhk_receipts_pending", "knhk_log_unsigned_seconds"} {
				n, err := sum(w.t.Context(), r, name)
				if err == nil && n != 0 {
					err = fmt.Errorf("%s is %v", name, n)
				}
				if err != nil {
					return err
				}
			}
			if _, err := r.Run(w.t.Context(), nil, "receipts", "export", "--evidence", "--file", file); err != nil {
				return err
			}
			raw, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			list, err = readReceipts(raw, r.Instance)
			return err
		})
		out, err := r.Run(w.t.Context(), nil, "verify", "--quiet", "--policy", filepath.Join(r.StateDir, "policy"), file)
		if err != nil || !bytes.Contains(out, fmt.Appendf(nil, "%d verified, 0 refused", len(list))) {
			w.t.Fatalf("verify of %d receipts of replica %s: %v\n%s", len(list), r.Instance, err, out)
		}
		for _, e := range list {
			if all[e.d.ID] != nil {
				w.t.Errorf("%s is in a log twice", e.d.ID)
			}
			all[e.d.ID] = e
		}
	}
	return all
}

func readReceipts(raw []byte, replica string) ([]*entry, error) {
	var list []*entry
	for line := range bytes.Lines(raw) {
		b, err := receipt.ParseBundle(line)
		if err != nil {
			return nil, err
		}
		e := &entry{replica: replica}
		if e.d, err = receipt.ParseDecision(b.Records[0].Leaf); err != nil {
			return nil, err
		}
		for _, r := range b.Records[1:] {
			o, err := receipt.ParseOutcome(r.Leaf)
			if err != nil {
				return nil, err
			}
			e.outcomes = append(e.outcomes, o)
		}
		for _, f := range b.Evidence.Fields {
			if f.Name == "path" {
				e.path = f.Value
			}
		}
		if len(e.outcomes) == 0 {
			return nil, fmt.Errorf("%s (%s) has no outcome yet", e.d.ID, e.path)
		}
		list = append(list, e)
	}
	return list, nil
}

// finish stops everything in order and checks every state directory.
func (w *world) finish() {
	w.t.Helper()
	w.stopped = true
	if err := w.Stop(w.t.Context()); err != nil {
		w.t.Errorf("stop: %v", err)
	}
	for _, r := range w.All() {
		out, err := r.Run(w.t.Context(), nil, "fsck", r.StateDir)
		if err != nil || !bytes.Contains(out, []byte("0 problems")) {
			w.t.Errorf("fsck of replica %s: %v\n%s", r.Instance, err, out)
		}
	}
}

// audit ends a world whose only requests were load's: it wants every request answered, and one whole receipt for each at the
// replica that its id names, no more and no less.
func (w *world) audit(sent []request) map[string]*entry {
	w.t.Helper()
	for _, name := range []string{"http.knhk.downstream_rq_4xx", "http.knhk.downstream_rq_5xx"} {
		if n := w.stat(name); n != 0 {
			w.t.Errorf("%s is %d", name, n)
		}
	}
	var bad []error
	all := w.settle()
	targets := map[string]int{}
	held := map[string]int{}
	for _, s := range sent {
		if err := s.judge(all[s.id]); err != nil {
			bad = append(bad, err)
		}
		targets[s.target]++
		if e := all[s.id]; e != nil {
			held[e.replica]++
		}
	}
	if len(all) != len(sent) {
		bad = append(bad, fmt.Errorf("%d receipts for %d requests", len(all), len(sent)))
	}
	for _, s := range w.Upstream.Seen() {
		targets[s.Path]--
	}
	for target, n := range targets {
		if n != 0 {
			bad = append(bad, fmt.Errorf("the upstream saw %s %d times", target, 1-n))
		}
	}
	for _, r := range w.All() {
		if held[r.Instance] == 0 {
			bad = append(bad, fmt.Errorf("replica %s decided nothing", r.Instance))
		}
	}
	for _, name := range []string{"knhk_outcomes_foreign_total", "knhk_outcomes_unknown_total", "knhk_outcomes_late_total",
		"knhk_unreceipted_total", "knhk_gaps_total"} {
		if n := w.everywhere(name); n != 0 {
			bad = append(bad, fmt.Errorf("%s is %v", name, n))
		}
	}
	w.finish()
	if len(bad) > 0 {
		w.t.Errorf("%d of %d requests and counters are not as promised; the first: %v", len(bad), len(sent), errors.Join(bad[:min(len(bad), 8)]...))
	}
	w.t.Logf("%d requests, receipts by replica: %v", len(sent), held)
	return all
}
