package replicas

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/knhk/sidecar/e2e/fault"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// meeting lets the worlds of a test count their rounds as one: a round is observed and done once it is in every world.
type meeting struct {
	run *fault.Run
	mu  sync.Mutex
	at  map[string]int
}

func (m *meeting) observed(round int, how string) {
	if m.last(fmt.Sprint("observed", round)) {
		m.run.Observed(how)
	}
}

func (m *meeting) done(rounds int) {
	if m.last("done") {
		for range rounds {
			m.run.Done()
		}
	}
}

func (m *meeting) last(what string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.at[what]++
	return m.at[what] == 2 // lean and full
}

// underLoad runs rounds of a fault in a world of each capture while requests keep coming, and audits the worlds; audited, which
// may be nil, gets the receipts.
func underLoad(t *testing.T, name string, round func(w *world, m *meeting, n int), audited func(w *world, all map[string]*entry)) {
	m := &meeting{run: fault.Begin(t, name), at: map[string]int{}}
	t.Run("with", func(t *testing.T) {
		both(t, func(t *testing.T, capture string) {
			w := start(t, capture)
			l := w.begin()
			for _, r := range w.All() {
				w.decides(r)
			}
			for n := range m.run.Rounds() {
				round(w, m, n)
			}
			sent := l.end()
			m.run.Add("retries of Envoy", float64(w.stat("cluster.knhk.upstream_rq_retry")))
			m.run.Add("requests", float64(len(sent)))
			all := w.audit(sent)
			if audited != nil {
				audited(w, all)
			}
			if !t.Failed() {
				m.done(m.run.Rounds())
			}
		})
	})
}

// decides waits until a replica has its share of the requests, each class of it.
func (w *world) decides(r *stack.Stack) {
	w.t.Helper()
	w.eventually("replica "+r.Instance+" decides", func() error {
		for _, class := range []string{"R1", "W1"} {
			n, err := sum(w.t.Context(), r, "knhk_decisions_total", fmt.Sprintf("knhk_class=%q", class))
			if err == nil && n < 20 {
				err = fmt.Errorf("%v decisions %s", n, class)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// restart ends a replica with SIGTERM, starts it again and waits until it has its share of the requests.
func (w *world) restart(r *stack.Stack) error {
	w.t.Helper()
	pid := r.Knhk.PID()
	if err := r.Knhk.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(w.t.Context(), harness.Patience)
	defer cancel()
	if err := r.Knhk.Wait(ctx); err != nil {
		return fmt.Errorf("replica %s after SIGTERM: %w", r.Instance, err)
	}
	if err := r.StartKnhk(w.t.Context()); err != nil {
		return err
	}
	if r.Knhk.PID() == pid {
		return errors.New("the same process")
	}
	w.settled()
	w.decides(r)
	return nil
}

const restartSeen = "exit status 0, another pid, its metrics from zero"

func TestSigtermOne(t *testing.T) {
	underLoad(t, "restart/sigterm-one", func(w *world, m *meeting, n int) {
		if err := w.restart(w.All()[n%2]); err != nil {
			w.t.Fatal(err)
		}
		m.observed(n, restartSeen)
	}, nil)
}

func TestRolling(t *testing.T) {
	underLoad(t, "restart/rolling", func(w *world, m *meeting, n int) {
		for _, r := range w.All() {
			if err := w.restart(r); err != nil {
				w.t.Fatal(err)
			}
		}
		m.observed(n, restartSeen+", both replicas")
	}, nil)
}

const reloads = 100 // of each replica in a round

// TestReload changes the tenant of every route with each reload. That reloads come into force, and in their order, is seen in
// the records. Requests come less often than reloads, so not every tenant has one.
func TestReload(t *testing.T) {
	const name = "knhk_config_reloads_total"
	underLoad(t, "restart/reload", func(w *world, m *meeting, n int) {
		before := w.everywhere(name, `knhk_result="applied"`)
		for i := range reloads {
			for _, r := range w.All() {
				was, err := sum(w.t.Context(), r, name, `knhk_result="applied"`)
				if err == nil {
					err = r.WriteConfig(configured(fmt.Sprintf("t%d", n*reloads+i+1)))
				}
				if err == nil && i%10 != 0 { // every tenth is noticed by the change of the file alone
					err = r.Knhk.Signal(syscall.SIGHUP)
				}
				if err != nil {
					w.t.Fatal(err)
				}
				w.eventually("the configuration is reloaded", func() error {
					now, err := sum(w.t.Context(), r, name, `knhk_result="applied"`)
					if err == nil && now == was {
						err = errors.New("not yet")
					}
					return err
				})
			}
		}
		if refused := w.everywhere(name, `knhk_result="refused"`); refused != 0 {
			w.t.Errorf("%v reloads were refused", refused)
		}
		if applied := w.everywhere(name, `knhk_result="applied"`) - before; applied < float64(reloads*len(w.All())) {
			w.t.Fatalf("%v reloads", applied)
		}
		m.observed(n, fmt.Sprintf("%s: %d of each replica", name, reloads))
		w.reloaded += reloads
	}, func(w *world, all map[string]*entry) {
		for _, r := range w.All() {
			var mine []*entry
			for _, e := range all {
				if e.replica == r.Instance {
					mine = append(mine, e)
				}
			}
			slices.SortFunc(mine, func(a, b *entry) int { return cmp.Compare(a.d.Ordinal, b.d.Ordinal) })
			changes, last := 0, 0
			for _, e := range mine {
				n, err := strconv.Atoi(strings.TrimPrefix(e.d.Tenant, "t"))
				// A decision that was being made while the next reloads came is behind by as much: few, unless nobody got a processor.
				if err != nil || n < last-20 || n > w.reloaded {
					w.t.Errorf("replica %s: tenant %q after t%d", r.Instance, e.d.Tenant, last)
				}
				if n > last {
					changes, last = changes+1, n
				}
			}
			if changes < w.reloaded/10 || last < w.reloaded-20 {
				w.t.Errorf("replica %s: records of %d tenants, the last t%d, after %d reloads", r.Instance, changes, last, w.reloaded)
			}
		}
	})
}

// TestOutcomesFindTheirReplica sends what is admitted, refused and never decided through both replicas: every receipt has its
// outcome where its decision is, and what has no receipt is told to one of them, once.
func TestOutcomesFindTheirReplica(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, capture string) {
		w := start(t, capture)
		const each = 30
		ids := map[string]int{}
		for range each {
			for target, status := range map[string]int{"/p": 200, "/hot": 200, "/celfail": 503, "/healthz": 200} {
				resp, err := w.Do(t.Context(), harness.Request{Target: target})
				if err != nil || resp.Status != status {
					t.Fatalf("%s: %v, %v", target, resp, err)
				}
				id := resp.Header.Get("X-Knhk-Receipt")
				if (id == "") != (target == "/healthz") {
					t.Fatalf("%s: receipt %q", target, id)
				}
				if id != "" {
					ids[id] = status
				}
			}
			if resp, err := w.Do(t.Context(), harness.Request{Host: "-"}); err != nil || resp.Status != 400 {
				t.Fatalf("no host: %v, %v", resp, err)
			}
		}
		all := w.settle()
		if len(all) != 3*each || len(ids) != 3*each {
			t.Errorf("%d receipts, %d ids, want %d", len(all), len(ids), 3*each)
		}
		held := map[string]int{}
		for id, status := range ids {
			e := all[id]
			if e == nil || len(e.outcomes) != 1 || int(e.outcomes[0].Status) != status || e.outcomes[0].Result == "unknown" {
				t.Errorf("%s: %+v, want one outcome with status %d", id, e, status)
				continue
			}
			held[e.replica]++
		}
		if held["a"] == 0 || held["b"] == 0 {
			t.Errorf("receipts by replica: %v", held)
		}
		for kind, label := range map[string]string{"excluded": `knhk_kind="excluded"`, "no host": `knhk_kind="missing_host"`} {
			w.eventually(kind, func() error {
				if n := w.everywhere("knhk_unreceipted_total", label); n < each {
					return fmt.Errorf("%v are told, of %d", n, each)
				}
				return nil
			})
		}
		if n := w.everywhere("knhk_unreceipted_total"); n != 2*each {
			t.Errorf("%v entries without receipt were told, of %d", n, 2*each)
		}
		if n := w.everywhere("knhk_outcomes_foreign_total"); n != 0 {
			t.Errorf("%v outcomes went to the wrong replica", n)
		}
		w.finish()
	})
}

// TestOutlivesItsReplica restarts a replica while requests that it has admitted are at the upstream for longer than it may drain:
// they are answered, and their outcomes find the replica that is back.
func TestOutlivesItsReplica(t *testing.T) {
	t.Parallel()
	w := start(t, "lean")
	const slow = 8
	var conns []*harness.Conn
	for i := range slow {
		c, err := harness.Dial(t.Context(), w.Listener)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.Write(harness.Request{Target: fmt.Sprintf("/p/do/slow/12000?%d", i)}.Bytes()); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	w.eventually("the upstream has them", func() error {
		if n := len(w.Upstream.Seen()); n < slow {
			return fmt.Errorf("%d of %d", n, slow)
		}
		return nil
	})
	r := w.Others[0]
	if n, err := sum(t.Context(), r, "knhk_receipts_pending"); err != nil || n == 0 {
		t.Fatalf("replica %s waits for %v outcomes, %v", r.Instance, n, err)
	}
	if err := r.Knhk.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := r.Knhk.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := r.StartKnhk(t.Context()); err != nil {
		t.Fatal(err)
	}
	var sent []request
	for i, c := range conns {
		resp, err := c.Read("GET")
		if err != nil {
			t.Fatal(err)
		}
		sent = append(sent, request{target: fmt.Sprintf("/p/do/slow/12000?%d", i), class: "W1", status: resp.Status,
			id: resp.Header.Get("X-Knhk-Receipt")})
	}
	w.audit(sent)
}
