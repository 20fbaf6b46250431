// Package audited runs a stack for one test and audits it when the test has done with it: every receipt is exported and verified
// offline, everything is stopped, and `knhk fsck` must find nothing wrong with the state directory.
//
// It promises that what it starts is ended and removed whatever becomes of the test, and that waiting is polling with a bound.
// It says nothing about which receipts there must be: Audit returns them. Only tests call it.
package audited

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
	"github.com/knhk/sidecar/policy"
)

// Captures are the two ways of learning outcomes; most of what is promised must hold in both.
var Captures = []string{"lean", "full"}

// Both runs a test once for each capture mode, at the same time.
func Both(t *testing.T, f func(t *testing.T, capture string)) {
	t.Parallel()
	for _, c := range Captures {
		t.Run(c, func(t *testing.T) {
			t.Parallel()
			f(t, c)
		})
	}
}

// World is a running stack that is audited when its test ends.
type World struct {
	*stack.Stack
	t       *testing.T
	stopped bool

	// IDs are the receipt ids in the responses that Send and Get have read, by case; empty for a response without one.
	IDs map[string][]string
}

// Prepare makes a stack of which nothing but the upstream runs yet.
func Prepare(t *testing.T, cfg stack.Config) *World {
	t.Helper()
	harness.RequireEnvoy(t)
	if cfg.Dir == "" {
		cfg.Dir = harness.Directory(t, "")
	}
	s, err := stack.New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	w := &World{Stack: s, t: t, IDs: map[string][]string{}}
	t.Cleanup(w.end)
	return w
}

// Start makes a stack and starts all of it.
func Start(t *testing.T, cfg stack.Config) *World {
	t.Helper()
	w := Prepare(t, cfg)
	if err := w.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w
}

// end stops what still runs. A test that has come to its end has called Audit before.
func (w *World) end() {
	if !w.stopped {
		w.stopped = true
		if w.Envoy != nil {
			w.Envoy.Kill()
		}
		if w.Knhk != nil {
			w.Knhk.Kill()
		}
		w.Upstream.Close()
	}
	if w.t.Failed() {
		if w.Knhk != nil {
			w.t.Logf("log of knhk:\n%s", w.Knhk.LogTail(6000))
		}
		if w.Envoy != nil {
			w.t.Logf("log of envoy:\n%s", w.Envoy.LogTail(3000))
		}
	}
}

// Audit waits until every decision has its outcome under a signed checkpoint, verifies every receipt, stops everything in
// order and checks the state directory. It returns the receipts as they were exported.
func (w *World) Audit() Transcript {
	w.t.Helper()
	tr := w.Settle()
	w.stopped = true
	if err := w.Stop(w.t.Context()); err != nil {
		w.t.Errorf("stop: %v", err)
	}
	w.Fsck()
	return tr
}

// Fsck checks the state directory of a stopped knhk.
func (w *World) Fsck() {
	w.t.Helper()
	out, err := w.Run(w.t.Context(), nil, "fsck", w.StateDir)
	if err != nil || !bytes.Contains(out, []byte("0 problems")) {
		w.t.Errorf("fsck: %v\n%s", err, out)
	}
}

// Settle waits until nothing is pending and everything is signed, exports every receipt and verifies them.
func (w *World) Settle() Transcript {
	w.t.Helper()
	file := filepath.Join(w.Dir, "receipts.jsonl")
	var tr Transcript
	w.Eventually("every outcome is under a signed checkpoint", func() error {
		m, err := w.Metrics()
		if err != nil {
			return err
		}
		if n := m.Sum("knhk_receipts_pending"); n != 0 {
			return fmt.Errorf("%v pending", n)
		}
		if age := m.Sum("knhk_log_unsigned_seconds"); age != 0 {
			return fmt.Errorf("unsigned for %v s", age)
		}
		if _, err := w.Run(w.t.Context(), nil, "receipts", "export", "--evidence", "--file", file); err != nil {
			return err
		}
		raw, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		tr, err = ReadTranscript(raw)
		return err
	})
	out, err := w.Run(w.t.Context(), nil, "verify", "--quiet", "--policy", filepath.Join(w.StateDir, "policy"), file)
	if err != nil || !bytes.Contains(out, fmt.Appendf(nil, "%d verified, 0 refused", len(tr.List))) {
		w.t.Fatalf("verify of %d receipts: %v\n%s", len(tr.List), err, out)
	}
	return tr
}

// Transcript is an export, read.
type Transcript struct {
	Raw    []byte
	List   []*Entry
	ByCase map[string][]*Entry
}

// Has reports whether a case has a receipt with this id.
func (tr Transcript) Has(name, id string) bool {
	return slices.ContainsFunc(tr.ByCase[name], func(e *Entry) bool { return e.Decision.ID == id })
}

// Entry is one receipt.
type Entry struct {
	Decision *receipt.Decision
	Outcomes []*receipt.Outcome
	Evidence map[string]string // by name: path, authority, request_id, ...
}

// ReadTranscript reads an export; a decision without outcome is an error.
func ReadTranscript(raw []byte) (Transcript, error) {
	tr := Transcript{Raw: raw, ByCase: map[string][]*Entry{}}
	for line := range bytes.Lines(raw) {
		b, err := receipt.ParseBundle(line)
		if err != nil {
			return tr, err
		}
		e := &Entry{Evidence: map[string]string{}}
		for i, r := range b.Records {
			if i == 0 {
				if e.Decision, err = receipt.ParseDecision(r.Leaf); err != nil {
					return tr, err
				}
				continue
			}
			o, err := receipt.ParseOutcome(r.Leaf)
			if err != nil {
				return tr, err
			}
			e.Outcomes = append(e.Outcomes, o)
		}
		for _, f := range b.Evidence.Fields {
			e.Evidence[f.Name] = f.Value
		}
		if len(e.Outcomes) == 0 {
			return tr, fmt.Errorf("%s (%s) has no outcome yet", e.Decision.ID, e.Evidence["path"])
		}
		tr.List = append(tr.List, e)
		name, _, _ := strings.Cut(e.Evidence["authority"], CaseSuffix)
		tr.ByCase[name] = append(tr.ByCase[name], e)
	}
	return tr, nil
}

// CaseSuffix ends the authority of every test request; what stands before it names the case. The authority is what survives
// everything: redirects, CONNECT, gRPC.
const CaseSuffix = ".case"

// String tells a receipt in one line.
func (e *Entry) String() string {
	d := e.Decision
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %s", d.Class, d.Verdict, d.Reason)
	if d.Rule != "" {
		fmt.Fprintf(&b, " by %s", d.Rule)
	}
	if d.Status != 0 {
		fmt.Fprintf(&b, " %d", d.Status)
	}
	if d.DryRun {
		b.WriteString(" dry")
	}
	for _, o := range e.Outcomes {
		fmt.Fprintf(&b, " | %s %s", o.Source, o.Result)
		if o.Status != 0 {
			fmt.Fprintf(&b, " %d", o.Status)
		}
		// Of a response that the client has left, only the ext_proc stream knows the upstream's status: it may have come first.
		if o.UpstreamStatus != 0 && o.Result != string(policy.ResultClientAbort) {
			fmt.Fprintf(&b, " up=%d", o.UpstreamStatus)
		}
		if o.Flags != "" {
			fmt.Fprintf(&b, " [%s]", o.Flags)
		}
		details, _, _ := strings.Cut(o.Details, "{") // what follows depends on the machine
		fmt.Fprintf(&b, " %s", details)
		if o.Attempts > 1 {
			fmt.Fprintf(&b, " attempts=%d", o.Attempts)
		}
		if o.Late {
			b.WriteString(" late")
		}
	}
	return b.String()
}

// Eventually polls ok until it returns nil; after harness.Patience its last error fails the test.
func (w *World) Eventually(what string, ok func() error) {
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

// Until is Eventually for a condition.
func (w *World) Until(what string, ok func() bool) {
	w.t.Helper()
	w.Eventually(what, func() error {
		if ok() {
			return nil
		}
		return errors.New("not yet")
	})
}

// Metrics reads knhk's /metrics.
func (w *World) Metrics() (harness.Series, error) { return harness.Metrics(w.t.Context(), w.Admin) }

// Metric is one sum of metrics now; the test fails if it cannot be read.
func (w *World) Metric(name string, labels ...string) float64 {
	w.t.Helper()
	m, err := w.Metrics()
	if err != nil {
		w.t.Fatal(err)
	}
	return m.Sum(name, labels...)
}

// AwaitMetric waits until a sum of metrics is at least n.
func (w *World) AwaitMetric(n float64, name string, labels ...string) {
	w.t.Helper()
	w.Eventually(fmt.Sprintf("%s%v reaches %v", name, labels, n), func() error {
		m, err := w.Metrics()
		if err != nil {
			return err
		}
		if v := m.Sum(name, labels...); v < n {
			return fmt.Errorf("it is %v", v)
		}
		return nil
	})
}

// Ready is the status of /readyz and what it says.
func (w *World) Ready() (int, string) {
	code, body, err := HTTPGet(w.t.Context(), "http://"+w.Admin+"/readyz")
	if err != nil {
		return 0, err.Error()
	}
	return code, string(body)
}

var plain = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: harness.Patience}

// HTTPGet returns status and body of what is at url, on a connection of its own.
func HTTPGet(ctx context.Context, url string) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, nil, err
	}
	resp, err := plain.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, body, err
}

// Configure puts another knhk.yaml in force; knhk notices the changed file by itself.
func (w *World) Configure(yaml string) {
	w.t.Helper()
	before := w.Metric("knhk_config_reloads_total", `knhk_result="applied"`)
	if err := w.WriteConfig(yaml); err != nil {
		w.t.Fatal(err)
	}
	w.AwaitMetric(before+1, "knhk_config_reloads_total", `knhk_result="applied"`)
}

// Get sends a GET in the name of a case and returns the response.
func (w *World) Get(name, target string) *harness.Response {
	w.t.Helper()
	return w.Send(name, harness.Request{Target: target})
}

// Send sends a request in the name of a case, notes the receipt id in the response and returns the response.
func (w *World) Send(name string, r harness.Request) *harness.Response {
	w.t.Helper()
	r.Host = name + CaseSuffix
	resp, err := w.Do(w.t.Context(), r)
	if err != nil {
		w.t.Fatalf("%s: %v", name, err)
	}
	w.IDs[name] = append(w.IDs[name], resp.Header.Get("X-Knhk-Receipt"))
	return resp
}

// Dial opens a connection to Envoy.
func (w *World) Dial() *harness.Conn {
	w.t.Helper()
	c, err := harness.Dial(w.t.Context(), w.Listener)
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

// Reached is how many requests of a case the upstream has seen.
func (w *World) Reached(name string) (n int) {
	for _, s := range w.Upstream.Seen() {
		if strings.HasPrefix(s.Host, name+CaseSuffix) {
			n++
		}
	}
	return n
}

// SentUpstream waits until the upstream has seen a case.
func (w *World) SentUpstream(name string) func() error {
	return func() error {
		w.Until("the upstream sees "+name, func() bool { return w.Reached(name) > 0 })
		return nil
	}
}

// KillKnhk ends knhk at once.
func (w *World) KillKnhk() {
	w.t.Helper()
	w.Knhk.Kill()
	w.Knhk = nil
}

// Hup sends SIGHUP.
func (w *World) Hup() {
	w.t.Helper()
	if err := w.Knhk.Signal(syscall.SIGHUP); err != nil {
		w.t.Fatal(err)
	}
}

// TCP opens a bare connection to Envoy that ends after harness.Patience at the latest.
func (w *World) TCP() net.Conn {
	w.t.Helper()
	tcp, err := net.DialTimeout("tcp", w.Listener, harness.Patience)
	if err == nil {
		err = tcp.SetDeadline(time.Now().Add(harness.Patience))
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return tcp
}

// Freeze stops knhk and waits until every thread of it has stopped: the signal takes a moment to reach those that run.
func (w *World) Freeze() {
	w.t.Helper()
	if err := w.Knhk.Freeze(); err != nil {
		w.t.Fatal(err)
	}
	w.Eventually("every thread of knhk is stopped", func() error {
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

// Serves waits until requests to target are answered with receipts.
func (w *World) Serves(name, target string) {
	w.t.Helper()
	w.Until("requests are admitted: "+name, func() bool {
		resp, err := w.Do(w.t.Context(), harness.Request{Host: name + CaseSuffix, Target: target})
		return err == nil && resp.Status == 200 && resp.Header.Get("X-Knhk-Receipt") != ""
	})
}
