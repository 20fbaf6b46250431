package failclosed

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/fault"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// routes has a route of every kind: both classes, one that is classified by its body, and both classes on routes that let pass
// what cannot be recorded. What does not stand here has its default.
const routes = `
default_route: {on_receipt_failure: DENY}
routes:
- {name: hot, prefix: /hot, cluster: up, policy: {class: R1, on_receipt_failure: DENY}}
- {name: delta, prefix: /delta, cluster: up, policy: {classify_body: true, on_receipt_failure: DENY}}
- {name: allow-hot, prefix: /allow/hot, cluster: up, policy: {class: R1, on_receipt_failure: ALLOW}}
- {name: allow, prefix: /allow, cluster: up, policy: {on_receipt_failure: ALLOW}}
- {name: hop, prefix: /hop, cluster: up, internal_redirects: 2, policy: {on_receipt_failure: DENY}}
- {name: pages, prefix: /p, cluster: up, policy: {on_receipt_failure: DENY}}
envoy:
  clusters:
  - {name: up, endpoints: ["UPSTREAM"]}
`

const delta = `{"additions":[{"subject":"s","predicate":"p","object":"o"}],"removals":[]}`

// door is a filter by which Envoy asks, and where it says what it did about a knhk that does not answer.
type door struct {
	filter     string   // envoy.filter
	failedOpen string   // Envoy's own count of requests that it let pass because the filter had failed
	failed     string   // its count of calls that failed
	refusing   []string // counters that each grow by one at least with a request that is refused because a call failed
	timedOut   string   // its count of calls that were not answered in time
	hung       refusal  // of a request that knhk does not answer in time
	kind       string   // of knhk_unreceipted_total, for requests that the filter refused
	source     string   // of outcomes that the service tells
}

var (
	processor = &door{
		filter: "EXT_PROC", failedOpen: "http.knhk.ext_proc.failure_mode_allowed", failed: "http.knhk.ext_proc.streams_failed",
		refusing: []string{"http.knhk.ext_proc.streams_failed", "http.knhk.ext_proc.immediate_responses_sent"},
		timedOut: "http.knhk.ext_proc.message_timeouts", hung: refusal{504, ""}, kind: "ext_proc_failed", source: "ext_proc",
	}
	authorizer = &door{
		filter: "EXT_AUTHZ", failedOpen: "http.knhk.ext_authz.failure_mode_allowed", failed: "http.knhk.ext_authz.error",
		refusing: []string{"http.knhk.ext_authz.error"},
		timedOut: "cluster.knhk.upstream_rq_timeout", hung: refusal{503, ""}, kind: "ext_authz_failed", source: "ext_authz",
	}
)

// site is a world with a fault in it, and the account of what passed.
type site struct {
	*audited.World
	turn
	t    *testing.T
	gaps int // responses of the upstream without a receipt id
}

// turn is one round of a fault.
type turn struct {
	*door
	capture string
	socket  bool         // Envoy reaches knhk over a unix socket
	denying bool         // it has routes that deny what cannot be recorded
	letting bool         // it has routes that let it pass
	runs    []*fault.Run // the lines of the table that it shows
}

func (r *turn) String() string {
	switch {
	case r.door == processor:
		return r.capture
	case r.denying:
		return "authz-deny"
	}
	return "authz-allow"
}

// yaml is the configuration for a turn. ext_authz has one on_receipt_failure for all routes.
func (r *turn) yaml(s string) string {
	s = strings.Replace(s, "envoy:\n", "envoy:\n  filter: "+r.filter+"\n", 1)
	switch {
	case !r.letting:
		s = strings.ReplaceAll(s, "ALLOW", "DENY")
	case !r.denying:
		s = strings.ReplaceAll(s, "DENY", "ALLOW")
	}
	return s
}

// turns are the rounds of a fault: with ext_proc by turns in lean capture over TCP and in full capture over a unix socket, which show
// both what is denied and what is counted; with ext_authz, which has no capture, on routes that all deny and on routes that all allow.
func turns(t *testing.T, name string) (all []turn) {
	t.Helper()
	closed, open := fault.Begin(t, "fail-closed/"+name), fault.Begin(t, "fail-open/"+name)
	for i := range max(closed.Rounds(), open.Rounds()) {
		capture := audited.Captures[i%len(audited.Captures)]
		all = append(all, turn{processor, capture, capture == "full", true, true, []*fault.Run{closed, open}})
	}
	for _, line := range []string{"authz-closed/" + name, "authz-open/" + name} {
		if f, ok := fault.Find(line); ok && f.Test == 0 && os.Getenv(fault.EnvFull) != "1" {
			continue // in `make fault` alone
		}
		run := fault.Begin(t, line)
		deny := strings.HasPrefix(line, "authz-closed/")
		for i := range run.Rounds() {
			all = append(all, turn{authorizer, "lean", (i%2 == 0) != deny, deny, !deny, []*fault.Run{run}})
		}
	}
	return all
}

// each does the rounds of a fault; f is the story.
func each(t *testing.T, name string, cfg stack.Config, f func(w *site)) {
	t.Helper()
	harness.RequireEnvoy(t)
	if cfg.YAML == "" {
		cfg.YAML = logOf("seal_every: 1s")
	}
	for i, r := range turns(t, name) {
		cfg := cfg
		cfg.Capture = r.capture
		cfg.UnixSocket = cfg.UnixSocket || r.socket
		t.Run(fmt.Sprintf("%s-%d", &r, i), func(t *testing.T) {
			cfg.YAML = r.yaml(cfg.YAML)
			f(&site{World: audited.Prepare(t, cfg), turn: r, t: t})
			if !t.Failed() {
				for _, run := range r.runs {
					run.Done()
				}
			}
		})
	}
}

// observed says what saw the fault.
func (w *site) observed(format string, args ...any) {
	for _, run := range w.runs {
		run.Observed(fmt.Sprintf(format, args...))
	}
}

// startEnvoy starts Envoy.
func (w *site) startEnvoy() {
	w.t.Helper()
	if err := w.StartEnvoy(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

// startKnhk starts knhk and waits until requests are admitted, if Envoy is there.
func (w *site) startKnhk(name string) {
	w.t.Helper()
	if err := w.StartKnhk(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	if w.Envoy != nil {
		w.serves(name)
	}
}

// serves waits until requests are admitted. Where nothing is denied, those before are gaps.
func (w *site) serves(name string) {
	w.t.Helper()
	w.Until("requests are admitted: "+name, func() bool {
		resp, err := w.Do(w.t.Context(), harness.Request{Host: name + audited.CaseSuffix, Target: "/p"})
		if err != nil || resp.Status != 200 {
			return false
		}
		if resp.Header.Get("X-Knhk-Receipt") == "" {
			w.gap()
			return false
		}
		return true
	})
}

// gap counts a response of the upstream without a receipt, on a route that denies if any does.
func (w *site) gap() {
	w.t.Helper()
	w.gaps++
	if w.denying {
		w.t.Error("a request passed without a receipt on a route that denies")
	}
}

// refusal is how a request is refused: its status, and the reason in the body, empty for an answer of Envoy's own.
type refusal struct {
	status int
	reason string
}

func (r refusal) String() string {
	if r.reason == "" {
		return fmt.Sprintf("%d, empty", r.status)
	}
	return fmt.Sprintf("%d `refused: %s`", r.status, r.reason)
}

// check says how a response differs from the refusal.
func (r refusal) check(resp *harness.Response) error {
	body := ""
	if r.reason != "" {
		body = "refused: " + r.reason + "\n"
	}
	retry := resp.Header.Get("Retry-After")
	if resp.Status != r.status || string(resp.Body) != body || (retry == "1") != (r.reason != "") || resp.Header.Get("X-Knhk-Receipt") != "" {
		return fmt.Errorf("%d %v %q, want %v", resp.Status, resp.Header, resp.Body, r)
	}
	return nil
}

type answer struct {
	r    harness.Request
	resp *harness.Response
	err  error
}

// send sends requests at the same time (one that is not answered costs Envoy's message_timeout) and returns the answers.
func (w *site) send(name string, requests []harness.Request) []answer {
	answers := make(chan answer)
	for _, r := range requests {
		r.Host = name + audited.CaseSuffix
		go func() {
			resp, err := w.Do(w.t.Context(), r)
			answers <- answer{r, resp, err}
		}()
	}
	out := make([]answer, len(requests))
	for i := range out {
		out[i] = <-answers
	}
	return out
}

// refuses sends a request to every kind of route that denies, and wants all of them refused and none at the upstream. It returns how
// many there were: none where no route denies.
func (w *site) refuses(name string, want refusal) int {
	w.t.Helper()
	if !w.denying {
		return 0
	}
	requests := []harness.Request{
		{Target: "/p"}, {Target: "/hot"}, {Target: "/hop/do/redirect/302/p"},
		{Method: http.MethodPost, Target: "/p/do/echo", Body: "x"},
		{Method: http.MethodPost, Target: "/delta/do/echo", Body: delta},
		{Method: http.MethodPost, Target: "/delta/do/echo", Chunks: []string{delta}},
	}
	if w.door == processor { // ext_authz is not asked about what has no route: Envoy's 404
		requests = append(requests, harness.Request{Target: "/nowhere"})
	}
	for _, a := range w.send(name, requests) {
		if a.err != nil {
			w.t.Errorf("%s: %s %s: %v", name, a.r.Method, a.r.Target, a.err)
		} else if err := want.check(a.resp); err != nil {
			w.t.Errorf("%s: %s %s: %v", name, a.r.Method, a.r.Target, err)
		}
	}
	if n := w.Reached(name); n != 0 {
		w.t.Errorf("%s: the upstream saw %d requests", name, n)
	}
	return len(requests)
}

// passes sends n requests to routes that let pass what cannot be recorded, and wants each to reach the upstream once, without a receipt.
// It returns how many there were: none where every route denies.
func (w *site) passes(name string, n int) int {
	w.t.Helper()
	if !w.letting {
		return 0
	}
	kinds := []harness.Request{{Target: "/allow"}, {Target: "/allow/hot"}}
	if !w.denying {
		kinds = append(kinds, harness.Request{Method: http.MethodPost, Target: "/delta/do/echo", Body: delta},
			harness.Request{Method: http.MethodPost, Target: "/delta/do/echo", Chunks: []string{delta}})
	}
	requests := make([]harness.Request, n)
	for i := range requests {
		requests[i] = kinds[i%len(kinds)]
	}
	for _, a := range w.send(name, requests) {
		if a.err != nil || a.resp.Status != 200 || a.resp.Header.Get("X-Knhk-Receipt") != "" {
			w.t.Errorf("%s: %s: %v, %v", name, a.r.Target, a.resp, a.err)
		}
	}
	if got := w.Reached(name); got != n {
		w.t.Errorf("%s: the upstream saw %d requests of %d", name, got, n)
	}
	w.gaps += n
	return n
}

// stat is a counter of Envoy now.
func (w *site) stat(name string) float64 {
	w.t.Helper()
	n, err := w.Envoy.Stat(w.t.Context(), name)
	if err != nil {
		w.t.Fatal(err)
	}
	return float64(n)
}

// counted wants the counters of gaps to come to these values and to stay no higher: what knhk's service let pass, what it saw in
// the access log, what Envoy let pass.
func (w *site) counted(service, accesslog, envoy int) {
	w.t.Helper()
	w.Eventually("the gaps are counted", func() error {
		m, err := w.Metrics()
		if err != nil {
			return err
		}
		s, a := m.Sum("knhk_gaps_total", `knhk_source="service"`), m.Sum("knhk_gaps_total", `knhk_source="accesslog"`)
		if e := w.stat(w.failedOpen); s != float64(service) || a != float64(accesslog) || e != float64(envoy) {
			return fmt.Errorf("service %v of %d, access log %v of %d, Envoy %v of %d", s, service, a, accesslog, e, envoy)
		}
		return nil
	})
}

// mark is where knhk's log ends now.
func (w *site) mark() int64 {
	fi, err := os.Stat(filepath.Join(w.Dir, "knhk.log"))
	if err != nil {
		return 0
	}
	return fi.Size()
}

// logged waits for a line in knhk's log behind mark that has all of these words, and returns it without its time.
func (w *site) logged(mark int64, words ...string) (line string) {
	w.t.Helper()
	w.Eventually(fmt.Sprintf("knhk logs %q", words), func() error {
		b, err := os.ReadFile(filepath.Join(w.Dir, "knhk.log"))
		if err != nil {
			return err
		}
	next:
		for l := range strings.Lines(string(b[min(mark, int64(len(b))):])) {
			for _, word := range words {
				if !strings.Contains(l, word) {
					continue next
				}
			}
			_, line, _ = strings.Cut(strings.TrimSpace(l), "level=")
			return nil
		}
		return fmt.Errorf("the log: %s", w.Knhk.LogTail(1000))
	})
	return line
}

// What rows of the matrix say of gaps and of refusals.
const (
	knhkExact  = "pass; service and access log exact"
	envoyExact = "pass; Envoy's failure_mode_allowed is exact, interval named"
	unrecorded = "knhk_unreceipted_total{refused_unrecorded}, knhk_gaps_total"
)

// row logs a row of the matrix.
func (w *site) row(fault, denied, allowed, metric, line string) {
	if !w.denying {
		denied = ""
	}
	if !w.letting {
		allowed = ""
	}
	w.t.Logf("matrix: | %s (%s) | %s | %s | %s | %s |", fault, strings.ToUpper(w.turn.String()), denied, allowed, metric, line)
}

// complete audits the world and compares the upstream's journal with the receipts: every request that the upstream saw has a
// decision that let it go on, but for as many as passed without a receipt, on routes that say so. Of those at most late have a
// decision all the same, made when Envoy had gone on.
func (w *site) complete(late int) audited.Transcript {
	w.t.Helper()
	seen := w.Upstream.Seen()
	tr := w.Audit()
	decided := map[string]int{}
	for _, e := range tr.List {
		if v := e.Decision.Verdict; v == "admit" || v == "park" {
			decided[e.Evidence["request_id"]]++
		}
	}
	undecided := 0
	for _, s := range seen {
		switch {
		case decided[s.RequestID] > 0:
			decided[s.RequestID]--
		case w.letting && (!w.denying || strings.HasPrefix(s.Path, "/allow")):
			undecided++
		default:
			w.t.Errorf("%s %s of %s reached the upstream without a decision", s.Method, s.Path, s.Host)
		}
	}
	if undecided > w.gaps || undecided < w.gaps-late {
		w.t.Errorf("%d requests reached the upstream without a decision, %d gaps were seen by the client", undecided, w.gaps)
	}
	return tr
}
