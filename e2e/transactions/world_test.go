package transactions

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
	"github.com/knhk/sidecar/policy"
)

// captures are the two ways of learning outcomes; most of what is promised must hold in both.
var captures = []string{"lean", "full"}

// both runs a test once for each capture mode, at the same time.
func both(t *testing.T, f func(t *testing.T, capture string)) {
	t.Parallel()
	for _, c := range captures {
		t.Run(c, func(t *testing.T) {
			t.Parallel()
			f(t, c)
		})
	}
}

// world is a running stack that is audited when its test ends.
type world struct {
	*stack.Stack
	t       *testing.T
	stopped bool
	ids     map[string][]string // receipt ids in the responses that do has read, by case
}

// directory makes a directory for a stack, kept when the test fails. Not t.TempDir: its path is too long for a unix socket.
func directory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "knhk-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("files are kept in %s", dir)
			return
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// prepare makes a stack of which nothing but the upstream runs yet.
func prepare(t *testing.T, cfg stack.Config) *world {
	t.Helper()
	harness.RequireEnvoy(t)
	if cfg.Dir == "" {
		cfg.Dir = directory(t)
	}
	s, err := stack.New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Stack: s, t: t, ids: map[string][]string{}}
	t.Cleanup(w.end)
	return w
}

// start makes a stack and starts all of it.
func start(t *testing.T, cfg stack.Config) *world {
	t.Helper()
	w := prepare(t, cfg)
	if err := w.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w
}

// end stops what still runs. A test that has come to its end has called audit before.
func (w *world) end() {
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

// audit waits until every decision has its outcome under a signed checkpoint, verifies every receipt, stops everything in
// order and checks the state directory. It returns the receipts as they were exported.
func (w *world) audit() transcript {
	w.t.Helper()
	tr := w.settle()
	w.stopped = true
	if err := w.Stop(w.t.Context()); err != nil {
		w.t.Errorf("stop: %v", err)
	}
	w.fsck()
	return tr
}

// fsck checks the state directory of a stopped knhk.
func (w *world) fsck() {
	w.t.Helper()
	out, err := w.Run(w.t.Context(), nil, "fsck", w.StateDir)
	if err != nil || !bytes.Contains(out, []byte("0 problems")) {
		w.t.Errorf("fsck: %v\n%s", err, out)
	}
}

// settle waits until nothing is pending and everything is signed, exports every receipt and verifies them.
func (w *world) settle() transcript {
	w.t.Helper()
	file := filepath.Join(w.Dir, "receipts.jsonl")
	var tr transcript
	w.eventually("every outcome is under a signed checkpoint", 30*time.Second, func() error {
		m, err := w.metrics()
		if err != nil {
			return err
		}
		if n := m.sum("knhk_receipts_pending"); n != 0 {
			return fmt.Errorf("%v pending", n)
		}
		if age := m.sum("knhk_log_unsigned_seconds"); age != 0 {
			return fmt.Errorf("unsigned for %v s", age)
		}
		if _, err := w.Run(w.t.Context(), nil, "receipts", "export", "--evidence", "--file", file); err != nil {
			return err
		}
		raw, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		tr, err = readTranscript(raw)
		return err
	})
	out, err := w.Run(w.t.Context(), nil, "verify", "--quiet", "--policy", filepath.Join(w.StateDir, "policy"), file)
	if err != nil || !bytes.Contains(out, fmt.Appendf(nil, "%d verified, 0 refused", len(tr.list))) {
		w.t.Fatalf("verify of %d receipts: %v\n%s", len(tr.list), err, out)
	}
	return tr
}

// transcript is an export, read.
type transcript struct {
	raw    []byte
	list   []*entry
	byCase map[string][]*entry
}

// entry is one receipt.
type entry struct {
	d        *receipt.Decision
	outcomes []*receipt.Outcome
	evidence map[string]string
}

func readTranscript(raw []byte) (transcript, error) {
	tr := transcript{raw: raw, byCase: map[string][]*entry{}}
	for line := range bytes.Lines(raw) {
		b, err := receipt.ParseBundle(line)
		if err != nil {
			return tr, err
		}
		e := &entry{evidence: map[string]string{}}
		for i, r := range b.Records {
			if i == 0 {
				if e.d, err = receipt.ParseDecision(r.Leaf); err != nil {
					return tr, err
				}
				continue
			}
			o, err := receipt.ParseOutcome(r.Leaf)
			if err != nil {
				return tr, err
			}
			e.outcomes = append(e.outcomes, o)
		}
		for _, f := range b.Evidence.Fields {
			e.evidence[f.Name] = f.Value
		}
		if len(e.outcomes) == 0 {
			return tr, fmt.Errorf("%s (%s) has no outcome yet", e.d.ID, e.evidence["path"])
		}
		tr.list = append(tr.list, e)
		name, _, _ := strings.Cut(e.evidence["authority"], caseSuffix)
		tr.byCase[name] = append(tr.byCase[name], e)
	}
	return tr, nil
}

// caseSuffix ends the authority of every test request; what stands before it names the case. The authority is what survives
// everything: redirects, CONNECT, gRPC.
const caseSuffix = ".case"

// String tells a receipt in one line.
func (e *entry) String() string {
	d := e.d
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
	for _, o := range e.outcomes {
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

// eventually polls ok until it returns nil; its last error fails the test.
func (w *world) eventually(what string, limit time.Duration, ok func() error) {
	w.t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("not within %v: %s: %v", limit, what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// until is eventually for a condition.
func (w *world) until(what string, ok func() bool) {
	w.t.Helper()
	w.eventually(what, 20*time.Second, func() error {
		if ok() {
			return nil
		}
		return errors.New("not yet")
	})
}

// series is /metrics, by name and labels as they stand there.
type series map[string]float64

// sum adds every series of a metric that has all labels; a label is name="value".
func (m series) sum(name string, labels ...string) (total float64) {
next:
	for k, v := range m {
		n, rest, _ := strings.Cut(k, "{")
		if n != name {
			continue
		}
		for _, l := range labels {
			if !strings.Contains(rest, l) {
				continue next
			}
		}
		total += v
	}
	return total
}

// metrics reads knhk's /metrics.
func (w *world) metrics() (series, error) {
	code, body, err := httpGet(w.t.Context(), "http://"+w.Admin+"/metrics")
	if err != nil || code != http.StatusOK {
		return nil, fmt.Errorf("metrics: %d: %w", code, err)
	}
	m := series{}
	for sc := bufio.NewScanner(bytes.NewReader(body)); sc.Scan(); {
		line := sc.Text()
		i := strings.LastIndexByte(line, ' ')
		if i < 0 || strings.HasPrefix(line, "#") {
			continue
		}
		v, err := strconv.ParseFloat(line[i+1:], 64)
		if err != nil {
			return nil, fmt.Errorf("metrics: %q: %w", line, err)
		}
		m[line[:i]] = v
	}
	return m, nil
}

// metric is one sum of metrics now; the test fails if it cannot be read.
func (w *world) metric(name string, labels ...string) float64 {
	w.t.Helper()
	m, err := w.metrics()
	if err != nil {
		w.t.Fatal(err)
	}
	return m.sum(name, labels...)
}

// awaitMetric waits until a sum of metrics is at least n.
func (w *world) awaitMetric(n float64, name string, labels ...string) {
	w.t.Helper()
	w.eventually(fmt.Sprintf("%s%v reaches %v", name, labels, n), 20*time.Second, func() error {
		m, err := w.metrics()
		if err != nil {
			return err
		}
		if v := m.sum(name, labels...); v < n {
			return fmt.Errorf("it is %v", v)
		}
		return nil
	})
}

// ready is the status of /readyz and what it says.
func (w *world) ready() (int, string) {
	code, body, err := httpGet(w.t.Context(), "http://"+w.Admin+"/readyz")
	if err != nil {
		return 0, err.Error()
	}
	return code, string(body)
}

var plain = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}

func httpGet(ctx context.Context, url string) (int, []byte, error) {
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

// configure puts another knhk.yaml in force; knhk notices the changed file by itself.
func (w *world) configure(yaml string) {
	w.t.Helper()
	before := w.metric("knhk_config_reloads_total", `knhk_result="applied"`)
	if err := w.WriteConfig(yaml); err != nil {
		w.t.Fatal(err)
	}
	w.awaitMetric(before+1, "knhk_config_reloads_total", `knhk_result="applied"`)
}

// get sends a GET in the name of a case and returns the response.
func (w *world) get(name, target string) *harness.Response {
	w.t.Helper()
	return w.do(name, harness.Request{Target: target})
}

// do sends a request in the name of a case, notes the receipt id in the response and returns the response.
func (w *world) do(name string, r harness.Request) *harness.Response {
	w.t.Helper()
	r.Host = name + caseSuffix
	resp, err := w.Do(w.t.Context(), r)
	if err != nil {
		w.t.Fatalf("%s: %v", name, err)
	}
	w.ids[name] = append(w.ids[name], resp.Header.Get("X-Knhk-Receipt"))
	return resp
}

// dial opens a connection to Envoy.
func (w *world) dial() *harness.Conn {
	w.t.Helper()
	c, err := harness.Dial(w.t.Context(), w.Listener)
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

// reached is how many requests of a case the upstream has seen.
func (w *world) reached(name string) (n int) {
	for _, s := range w.Upstream.Seen() {
		if strings.HasPrefix(s.Host, name+caseSuffix) {
			n++
		}
	}
	return n
}

// sentUpstream waits until the upstream has seen a case.
func (w *world) sentUpstream(name string) func() error {
	return func() error {
		w.until("the upstream sees "+name, func() bool { return w.reached(name) > 0 })
		return nil
	}
}

// kill ends knhk at once.
func (w *world) kill() {
	w.t.Helper()
	w.Knhk.Kill()
	w.Knhk = nil
}

// hup sends SIGHUP.
func (w *world) hup() {
	w.t.Helper()
	if err := w.Knhk.Signal(syscall.SIGHUP); err != nil {
		w.t.Fatal(err)
	}
}

// tcp opens a bare connection to Envoy that ends after 20 seconds at the latest.
func (w *world) tcp() net.Conn {
	w.t.Helper()
	tcp, err := net.DialTimeout("tcp", w.Listener, 5*time.Second)
	if err == nil {
		err = tcp.SetDeadline(time.Now().Add(20 * time.Second))
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return tcp
}

// serves waits until requests are answered with receipts again.
func (w *world) serves(name string) {
	w.t.Helper()
	w.until("requests are admitted: "+name, func() bool {
		resp, err := w.Do(w.t.Context(), harness.Request{Host: name + caseSuffix, Target: "/p"})
		return err == nil && resp.Status == 200 && resp.Header.Get("X-Knhk-Receipt") != ""
	})
}
