package admit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/region/receiptlog"
	"github.com/knhk/sidecar/region/wal"
	"github.com/knhk/sidecar/server/accesslog"
	"github.com/knhk/sidecar/server/config"
)

// recorder keeps what it is told, and fails as a test wants.
type recorder struct {
	mu       sync.Mutex
	err      error // of Decide
	refusing error
	appended bool // Decide fails after it has given an id
	hang     bool // Decide waits for its context
	real     bool // ids have the form of receipt ids
	n        int
	levels   []receiptlog.Level
	decided  []receipt.Decision
	outcomes map[string][]policy.Outcome
}

func (r *recorder) Refusing() error { return r.refusing }

func (r *recorder) Decide(ctx context.Context, level receiptlog.Level, d *receipt.Decision, _ *receipt.Request) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.n++
	if r.err == nil || r.appended {
		d.ID = fmt.Sprintf("id-%d", r.n)
		if r.real {
			d.ID = fmt.Sprintf("01932c5e-8a4b-7c3d-9e2f-%012d.a", r.n)
		}
		r.decided, r.levels = append(r.decided, *d), append(r.levels, level)
	}
	if r.hang {
		<-ctx.Done()
		return fmt.Errorf("%w: %w", receiptlog.ErrUnavailable, ctx.Err())
	}
	return r.err
}

func (r *recorder) Outcome(_ context.Context, id string, o *policy.Outcome) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.outcomes == nil {
		r.outcomes = map[string][]policy.Outcome{}
	}
	r.outcomes[id] = append(r.outcomes[id], *o)
	return nil
}

func (r *recorder) last() receipt.Decision {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.decided[len(r.decided)-1]
}

// told returns the outcomes of id.
func (r *recorder) told(id string) []policy.Outcome {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.outcomes[id]
}

// meter counts by kind.
type meter struct {
	mu          sync.Mutex
	unreceipted map[string]int
	gaps        map[string]int
	decided     int
}

func (m *meter) Decided(policy.Decision, time.Duration) { m.add(nil, "") }
func (m *meter) Outcome(*policy.Outcome)                {}
func (m *meter) Unreceipted(kind string)                { m.add(&m.unreceipted, kind) }
func (m *meter) Gap(source string)                      { m.add(&m.gaps, source) }
func (m *meter) AccessLog(int64)                        {}
func (m *meter) Unheard()                               { m.add(&m.unreceipted, "unheard") }

func (m *meter) add(to *map[string]int, kind string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if to == nil {
		m.decided++
		return
	}
	if *to == nil {
		*to = map[string]int{}
	}
	(*to)[kind]++
}

const testConfig = `origin: example.com/test
instance: a
state_dir: state
listeners: {envoy: "127.0.0.1:9002", admin: "127.0.0.1:9003"}
insecure_loopback: true
keys: {identity: {uri: "soft:keys"}, daily: {uri: "soft:keys"}}
beat:
  cycle: 0.08s
  r1: {capacity: 2}
  w1: {capacity: 1, max_wait: 0.02s}
class_rules:
- {name: hot, when: 'path.startsWith("/hot")', class: R1}
- {name: broken, when: 'path == "/broken" && int(method) > 0', class: R1}
routes:
- {name: health, policy: {exclude: true}}
- {name: open, policy: {on_receipt_failure: ALLOW, tenant: shop}}
- {name: body, policy: {classify_body: true}}
`

func newPipeline(t *testing.T, edit func(string) string) (*Pipeline, *recorder, *meter) {
	t.Helper()
	yaml := testConfig
	if edit != nil {
		yaml = edit(yaml)
	}
	cfg, err := config.Parse("test.yaml", []byte(yaml))
	if err != nil {
		t.Fatal(err)
	}
	rec, m := &recorder{}, &meter{}
	p, err := New(Config{Recorder: rec, Policy: cfg, Meter: m, Log: slog.New(slog.DiscardHandler), Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	return p, rec, m
}

// running runs the pipeline in a synctest bubble: time moves only when everybody waits.
func running(t *testing.T, edit func(string) string, f func(t *testing.T, p *Pipeline, r *recorder, m *meter)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		p, r, m := newPipeline(t, edit)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- p.Run(ctx) }()
		time.Sleep(10 * time.Millisecond) // the first whole tick
		synctest.Wait()
		f(t, p, r, m)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func get(path string) *policy.Request { return &policy.Request{Method: "GET", Path: path, Route: "r"} }

func TestVerdicts(t *testing.T) {
	running(t, nil, func(t *testing.T, p *Pipeline, r *recorder, _ *meter) {
		check := func(what string, d policy.Decision, v policy.Verdict, reason policy.Reason, status int) {
			t.Helper()
			if d.Verdict != v || d.Reason != reason || d.Status != status || d.ID == "" {
				t.Errorf("%s: %+v, want %v %s %d", what, d, v, reason, status)
			}
			if l := r.last(); l.Verdict != v.String() || l.Reason != string(reason) || int(l.Status) != status {
				t.Errorf("%s: recorded %+v", what, l)
			}
		}
		check("hot by rule", p.Admit(t.Context(), get("/hot")), policy.Admit, policy.ReasonOK, 0)
		if r.levels[0] != wal.Written {
			t.Errorf("R1 waits for level %v", r.levels[0])
		}
		check("warm by default", p.Admit(t.Context(), get("/")), policy.Admit, policy.ReasonOK, 0)
		if r.levels[1] != wal.Durable {
			t.Errorf("W1 waits for level %v", r.levels[1])
		}
		start := time.Now()
		check("no credit left in this tick", p.Admit(t.Context(), get("/")), policy.Park, policy.ReasonWaited, 0)
		if w := time.Since(start); w <= 0 || w > 20*time.Millisecond || r.last().WaitedNS == 0 {
			t.Errorf("waited %v, recorded %d ns", w, r.last().WaitedNS)
		}
		check("a rule that fails", p.Admit(t.Context(), get("/broken")), policy.Refuse, policy.ReasonClassRule, http.StatusServiceUnavailable)
		check("a body that Envoy does not send", p.Admit(t.Context(), &policy.Request{Route: "body", BodyMissing: true}),
			policy.Refuse, policy.ReasonBodyMode, http.StatusServiceUnavailable)
		// Everything within max_wait is promised by now: somebody is refused before the window is through.
		var wg sync.WaitGroup
		got := make([]policy.Decision, 10)
		for i := range got {
			wg.Go(func() { got[i] = p.Admit(t.Context(), get("/")) })
		}
		wg.Wait()
		refused := 0
		for _, d := range got {
			if d.Verdict == policy.Refuse {
				refused++
				if d.Status != http.StatusTooManyRequests || d.Reason != policy.ReasonNoCredit || d.RetryAfter <= 0 || d.Passes() {
					t.Errorf("refused as %+v", d)
				}
			}
		}
		if refused == 0 || refused == len(got) {
			t.Errorf("%d of %d refused", refused, len(got))
		}
		if d := p.Admit(t.Context(), &policy.Request{Route: "health"}); !d.Excluded || !d.Passes() {
			t.Errorf("excluded route: %+v", d)
		}
	})
}

// TestFirstTick: there is no credit before there is a tick, and Advance makes one before Run does.
func TestFirstTick(t *testing.T) {
	p, _, _ := newPipeline(t, nil)
	if d := p.Admit(t.Context(), get("/hot")); d.Verdict != policy.Refuse || d.Reason != policy.ReasonNoCredit {
		t.Errorf("before the first tick: %+v", d)
	}
	p.Advance()
	if d := p.Admit(t.Context(), get("/hot")); d.Verdict != policy.Admit {
		t.Errorf("after it: %+v", d)
	}
}

func TestParkedClientLeaves(t *testing.T) {
	running(t, nil, func(t *testing.T, p *Pipeline, r *recorder, _ *meter) {
		p.Admit(t.Context(), get("/"))
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if d := p.Admit(ctx, get("/")); d.Passes() || d.Reason != policy.ReasonClientGone || d.ID == "" {
			t.Errorf("%+v", d)
		}
		if l := r.last(); l.Verdict != "refuse" || l.Reason != "client_gone" {
			t.Errorf("recorded %+v", l)
		}
	})
}

// TestUnrecorded is the table of what happens when a decision cannot be recorded.
func TestUnrecorded(t *testing.T) {
	for _, c := range []struct {
		err    error
		reason policy.Reason
		status int
		allow  bool // on_receipt_failure: allow lets it pass
	}{
		{fmt.Errorf("x: %w", receiptlog.ErrFull), policy.ReasonLogFull, 503, true},
		{fmt.Errorf("x: %w", receiptlog.ErrUnsigned), policy.ReasonUnsigned, 503, true},
		{receiptlog.ErrSealed, policy.ReasonSealed, 503, true},
		{receiptlog.ErrStopping, policy.ReasonStopping, 503, true},
		{receiptlog.ErrUnavailable, policy.ReasonLogUnavailable, 503, true},
		{errors.New("anything else"), policy.ReasonLogUnavailable, 503, true},
		{receiptlog.ErrTooLarge, policy.ReasonTooLarge, 431, false},
	} {
		for _, early := range []bool{true, false} {
			running(t, nil, func(t *testing.T, p *Pipeline, r *recorder, m *meter) {
				if early {
					r.refusing = c.err
				} else {
					r.err = c.err
				}
				if d := p.Admit(t.Context(), get("/")); d.Passes() || d.Reason != c.reason || d.Status != c.status || d.ID != "" {
					t.Errorf("%v, early %v: %+v", c.err, early, d)
				}
				if d := p.Admit(t.Context(), &policy.Request{Route: "open"}); d.Passes() != c.allow || d.Gap != c.allow || m.gaps["service"] != map[bool]int{true: 1}[c.allow] {
					t.Errorf("%v, early %v, route that allows: %+v, gaps %v", c.err, early, d, m.gaps)
				}
				before := m.gaps["service"]
				if d := p.Admit(t.Context(), &policy.Request{Route: "open", GapCounted: true}); d.Gap != c.allow || m.gaps["service"] != before {
					t.Errorf("%v, early %v, told to two filters: %+v, gaps %v", c.err, early, d, m.gaps)
				}
				if d := p.Admit(t.Context(), &policy.Request{Route: "health"}); !d.Passes() {
					t.Errorf("%v: excluded route is refused: %+v", c.err, d)
				}
			})
		}
	}
}

// TestTooSlow has the disk take longer than commit_timeout: the request is refused, and the decision, should it reach the log after
// all, has an outcome that says so.
func TestTooSlow(t *testing.T) {
	running(t, nil, func(t *testing.T, p *Pipeline, r *recorder, _ *meter) {
		r.hang = true
		start := time.Now()
		d := p.Admit(t.Context(), get("/"))
		if took := time.Since(start); d.Passes() || d.Reason != policy.ReasonLogUnavailable || took != 500*time.Millisecond {
			t.Errorf("%+v after %v", d, took)
		}
		o := r.told("id-1")
		if len(o) != 1 || o[0].Result != policy.ResultLocalReply || o[0].Status != 503 || o[0].Details != "knhk_log_unavailable" || o[0].Source != "ext_proc" {
			t.Errorf("outcome %+v", o)
		}
		d = p.Admit(t.Context(), &policy.Request{Route: "open", Filter: "ext_authz"})
		if o := r.told("id-2"); !d.Gap || len(o) != 1 || o[0].Result != policy.ResultUnknown || o[0].Source != "ext_authz" {
			t.Errorf("route that allows: %+v, outcome %+v", d, o)
		}
	})
}

func TestDryRun(t *testing.T) {
	running(t, func(s string) string { return s + "dry_run: true\n" }, func(t *testing.T, p *Pipeline, r *recorder, _ *meter) {
		for range 20 {
			if d := p.Admit(t.Context(), get("/")); !d.Passes() || d.Gap {
				t.Fatalf("%+v", d)
			}
		}
		verdicts := map[string]int{}
		for _, d := range r.decided {
			verdicts[d.Verdict]++
			if !d.DryRun || d.WaitedNS != 0 {
				t.Errorf("recorded %+v", d)
			}
		}
		if verdicts["admit"] == 0 || verdicts["park"] == 0 || verdicts["refuse"] == 0 {
			t.Errorf("verdicts %v: want what would have been decided", verdicts)
		}
		r.err = receiptlog.ErrFull
		if d := p.Admit(t.Context(), get("/")); !d.Passes() || !d.Gap {
			t.Errorf("full log in a dry run: %+v", d)
		}
	})
}

// TestOutcomes gives outcomes from streams and from the access log in every order.
func TestOutcomes(t *testing.T) {
	running(t, nil, func(t *testing.T, p *Pipeline, r *recorder, _ *meter) {
		stream := policy.Outcome{Source: "ext_proc", Result: policy.ResultAborted, UpstreamStatus: 206}
		als := policy.Outcome{Source: "als", Result: policy.ResultClientAbort}

		p.Finish("lean", als, true)
		p.Finish("full", stream, true)
		p.Finish("full", als, true) // the stream has told: a repetition
		p.Finish("refined", stream, false)
		p.Finish("refined", als, true)
		p.Finish("alone", stream, false)
		if n := len(r.told("alone")); n != 0 {
			t.Errorf("not waited for the access log: %d", n)
		}
		time.Sleep(holdFor + time.Second)
		synctest.Wait()
		for id, want := range map[string]policy.Outcome{
			"lean": als, "full": stream, "alone": stream,
			"refined": {Source: "als", Result: policy.ResultClientAbort, UpstreamStatus: 206},
		} {
			if got := r.told(id); len(got) != 1 || got[0] != want {
				t.Errorf("%s: %+v, want %+v", id, got, want)
			}
		}
		p.Finish("last", stream, false) // held when the pipeline stops: told then
	})
}

// TestHeldAtStop loses no outcome that is held when the pipeline stops.
func TestHeldAtStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, r, _ := newPipeline(t, nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- p.Run(ctx) }()
		p.Finish("id", policy.Outcome{Source: "ext_proc"}, false)
		cancel()
		<-done
		if len(r.told("id")) != 1 {
			t.Errorf("outcomes %v", r.told("id-1"))
		}
	})
}

func TestUnreceipted(t *testing.T) {
	p, _, m := newPipeline(t, nil)
	for _, c := range []struct {
		e    accesslog.Entry
		kind string // of unreceipted; "" is a gap
	}{
		{accesslog.Entry{Route: "health", Reached: true}, "excluded"},
		{accesslog.Entry{Route: "open", Reached: true, Gap: "log_full"}, ""},
		{accesslog.Entry{Route: "r", Reached: true}, ""},
		{accesslog.Entry{Outcome: policy.Outcome{Details: "missing_host_header"}}, "missing_host"},
		{accesslog.Entry{Outcome: policy.Outcome{Details: "request_headers_too_large"}}, "headers_too_large"},
		{accesslog.Entry{Outcome: policy.Outcome{Details: "route_not_found"}}, "no_route"},
		{accesslog.Entry{Outcome: policy.Outcome{Details: "ext_proc_error_gRPC_error_14"}}, "ext_proc_failed"},
		{accesslog.Entry{Outcome: policy.Outcome{Details: "knhk_log_full"}}, "refused_unrecorded"},
		{accesslog.Entry{Outcome: policy.Outcome{Details: "something Envoy invents tomorrow"}}, "other"},
	} {
		gaps := m.gaps["accesslog"]
		n := m.unreceipted[c.kind]
		p.Unreceipted(c.e)
		if c.kind == "" && m.gaps["accesslog"] != gaps+1 || c.kind != "" && m.unreceipted[c.kind] != n+1 {
			t.Errorf("%+v: gaps %v, kinds %v", c.e, m.gaps, m.unreceipted)
		}
	}
}

func TestAbandon(t *testing.T) {
	p, r, _ := newPipeline(t, nil)
	p.Abandon(&policy.Request{Route: "body", Path: "/x"})
	if l := r.last(); l.Verdict != "refuse" || l.Reason != "client_gone" || len(r.told("id-1")) != 1 {
		t.Errorf("%+v, %v", l, r.told("id-1"))
	}
}
