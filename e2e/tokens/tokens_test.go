package tokens

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/hsm/softhsm"
	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/fault"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
	"github.com/knhk/sidecar/e2e/steady"
)

const (
	maxUnsigned = 4 * time.Second
	// site's load is admitted unless records go unsigned for too long.
	site = `
log: {seal_every: 200ms, max_unsigned: 4s}
beat:
  cycle: 800ms
  w1: {capacity: 4096, max_wait: 800ms}
routes:
- {name: pages, prefix: /p, cluster: up}
envoy:
  access_log_flush: 50ms
  clusters:
  - {name: up, endpoints: ["UPSTREAM"]}
`
	// recovery is how soon records are signed again when the token is back. It is judged in the full run alone.
	recovery = 5 * time.Second
	// overdue is what may come on top of max_unsigned before requests are refused: knhk looks twice a second, the metric counts whole
	// seconds. Judged in the full run alone.
	overdue = 2 * time.Second
)

// full says whether this is the full fault run, the only one that judges how long things take: it has the machine to itself.
var full = os.Getenv(fault.EnvFull) == "1"

type world struct {
	*audited.World
	t           *testing.T
	run         *fault.Run
	rng         *rand.Rand
	load        *steady.Load
	token, away string // directories: where the token is, and where it goes
}

// present reports whether SoftHSM's own tool sees the token.
func (w *world) present() bool {
	w.t.Helper()
	tool, err := exec.LookPath("softhsm2-util")
	if err != nil {
		w.t.Fatal(err)
	}
	cmd := exec.CommandContext(w.t.Context(), tool, "--show-slots")
	cmd.Env = append(os.Environ(), softhsm.ConfEnv+"="+filepath.Join(w.token, "softhsm2.conf"))
	out, err := cmd.CombinedOutput()
	return err == nil && strings.Contains(string(out), "knhk")
}

func (w *world) move(from, to string) {
	w.t.Helper()
	if err := os.Rename(from, to); err != nil {
		w.t.Fatal(err)
	}
}

func admitted(r *steady.Request) bool { return r.Status == http.StatusOK && r.ID != "" }

// refused is how a request is answered when records have gone unsigned for too long.
func refused(r *steady.Request) bool {
	return r.Status == http.StatusServiceUnavailable && r.ID == "" && r.Body == "refused: unsigned_too_long\n"
}

// unsigned is the age of the oldest record that no signature covers, as knhk tells it.
func (w *world) unsigned() time.Duration {
	w.t.Helper()
	return time.Duration(w.Metric("knhk_log_unsigned_seconds") * float64(time.Second))
}

// rotate asks for another daily key.
func (w *world) rotate(ctx context.Context) error {
	_, err := w.Run(ctx, nil, "keys", "rotate", "--config", w.ConfigFile)
	return err
}

// resources are what a process must not have more and more of.
type resources struct{ goroutines, threads, files int }

func (w *world) resources() (r resources, err error) {
	m, err := w.Metrics()
	if err != nil {
		return r, err
	}
	r.goroutines = int(m.Sum("go_goroutines"))
	proc := fmt.Sprintf("/proc/%d/", w.Knhk.PID())
	threads, err := os.ReadDir(proc + "task")
	if err != nil {
		return r, err
	}
	files, err := os.ReadDir(proc + "fd")
	r.threads, r.files = len(threads), len(files)
	return r, err
}

// TestTokenComesAndGoes removes the token and returns it, again and again, while requests keep coming.
func TestTokenComesAndGoes(t *testing.T) {
	harness.RequireEnvoy(t)
	if _, ok := softhsm.Find(); !ok {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs SoftHSM")
		}
		t.Skip("needs SoftHSM")
	}
	run := fault.Begin(t, "keys/token")
	w := &world{World: audited.Start(t, stack.Config{YAML: site, Race: full}), t: t, run: run, rng: run.Rand()}
	w.token, w.away = filepath.Join(w.Dir, "token"), filepath.Join(w.Dir, "token-away")
	policy := filepath.Join(w.Dir, "pinned-policy")
	text, err := os.ReadFile(filepath.Join(w.StateDir, "policy"))
	if err == nil {
		err = os.WriteFile(policy, text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	w.Serves("warm", "/p")
	spacing := 25 * time.Millisecond
	if full {
		spacing *= 4 // everything is audited in the end
	}
	w.load = steady.Begin(t.Context(), steady.Config{Addr: w.Listener, Clients: 6, Spacing: spacing,
		Targets: []string{"/p", "/p/do/slow/100", "/p/do/bytes/2000"}})
	defer w.load.End()
	w.Until("requests are answered", func() bool { return w.load.Count(admitted) > 50 })
	if err := w.rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	usual, err := w.resources()
	if err != nil {
		t.Fatal(err)
	}
	for i := range run.Rounds() {
		w.round(i)
		if t.Failed() {
			return
		}
	}
	w.Until("requests are answered at the end", func() bool { return w.load.Latest(admitted) != nil })
	if err := w.rotate(t.Context()); err != nil {
		t.Errorf("a change of the key when all is over: %v", err)
	}
	sent := w.load.End()
	w.Eventually("goroutines, threads and files are as before", func() error {
		now, err := w.resources()
		// Go keeps a thread that was in a system call, and a store its files, for a while.
		if err == nil && (now.goroutines > usual.goroutines+20 || now.threads > usual.threads+20 || now.files > usual.files+20) {
			err = fmt.Errorf("%+v, before %+v", now, usual)
		}
		return err
	})
	w.judge(sent, policy)
	if !t.Failed() {
		for range run.Rounds() {
			run.Done()
		}
	}
}

// round removes the token and returns it. Every other round it stays away until requests are refused, else for as long as chance
// wants; the daily key is changed right before, while it is away, or right after.
func (w *world) round(i int) {
	w.t.Helper()
	w.Until("everything is signed", func() bool { return w.unsigned() < maxUnsigned/2 })
	change := w.rng.IntN(4)
	changing := make(chan error, 1)
	ctx, cancel := context.WithTimeout(w.t.Context(), harness.Patience)
	defer cancel()
	if change == 0 { // the token goes in the midst of it
		go func() { changing <- w.rotate(ctx) }()
		time.Sleep(time.Duration(w.rng.IntN(100_000)) * time.Microsecond) // the moment is the fault
	}
	w.move(w.token, w.away)
	gone := time.Now()
	if w.present() {
		w.t.Fatal("softhsm2-util still sees the token")
	}
	w.run.Observed("softhsm2-util sees no token")
	if change == 1 {
		go func() { changing <- w.rotate(ctx) }()
	}
	if i%2 == 0 {
		w.Until("requests are refused", func() bool {
			return w.load.Latest(func(r *steady.Request) bool { return refused(r) && r.Began.After(gone) }) != nil
		})
		age := w.unsigned()
		w.run.Max("longest unsigned when refused, s", age.Seconds())
		if age < maxUnsigned/2 || full && age > maxUnsigned+overdue {
			w.t.Errorf("round %d: refused with records unsigned for %v, limit %v", i, age, maxUnsigned)
		}
		// From now on, until the token is back, nothing is admitted: what had been asked before may still come in.
		since := time.Now()
		w.Until("more requests are refused", func() bool {
			return w.load.Count(func(r *steady.Request) bool { return refused(r) && r.Began.After(since) }) >= 20
		})
		if r := w.load.Latest(func(r *steady.Request) bool { return admitted(r) && r.Began.After(since) }); r != nil {
			w.t.Errorf("round %d: %s was admitted with records unsigned for too long", i, r.Target)
		}
		if code, text := w.Ready(); code != http.StatusServiceUnavailable {
			w.t.Errorf("round %d: readyz: %d %s", i, code, text)
		}
		w.run.Add("rounds with refusals", 1)
	} else {
		time.Sleep(time.Duration(w.rng.IntN(int(2 * maxUnsigned)))) // the length is the fault
	}
	last := w.load.Latest(func(r *steady.Request) bool { return admitted(r) && r.Began.After(gone) })
	w.move(w.away, w.token)
	back := time.Now()
	// Signed again: what was admitted while the token was away is under a signature.
	if last != nil {
		if _, err := w.Run(ctx, nil, "receipts", "get", "--wait", "2m", last.ID); err != nil {
			w.t.Fatalf("round %d: not signed when the token is back: %v", i, err)
		}
		took := time.Since(back)
		w.run.Max("longest recovery, ms", float64(took.Milliseconds()))
		if full && took > recovery {
			w.t.Errorf("round %d: signed again %v after the token was back", i, took)
		}
	}
	w.Until("requests are admitted again", func() bool {
		return w.load.Latest(func(r *steady.Request) bool { return admitted(r) && r.Began.After(back) }) != nil
	})
	if change < 2 {
		// It has failed with a reason, or has been done: never neither.
		if err := <-changing; errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
			w.t.Fatalf("round %d: a change of the key neither succeeds nor fails: %v", i, err)
		} else if err != nil {
			w.run.Add("key changes refused without a token", 1)
		}
	}
	if change <= 2 {
		w.Eventually("the key can be changed when the token is back", func() error { return w.rotate(ctx) })
	}
	select {
	case <-w.Knhk.Exited():
		w.t.Fatalf("round %d: knhk has ended", i)
	default:
	}
}

// judge holds what clients and the upstream saw against the log.
func (w *world) judge(sent []*steady.Request, policy string) {
	w.t.Helper()
	seen := w.Upstream.Seen()
	tr := w.Audit()
	decided, asked := map[string]bool{}, map[string]bool{}
	for _, e := range tr.List {
		if v := e.Decision.Verdict; v == "admit" || v == "park" {
			decided[e.Decision.ID], asked[e.Evidence["request_id"]] = true, true
		}
	}
	admits, refusals := 0, 0
	var bad []error
	for _, r := range sent {
		switch {
		case r.Err != nil:
			bad = append(bad, fmt.Errorf("%s: %w", r.Target, r.Err))
		case admitted(r) && !decided[r.ID]:
			bad = append(bad, fmt.Errorf("%s: no receipt %s in the log", r.Target, r.ID))
		case admitted(r):
			admits++
		case refused(r):
			refusals++
		default:
			bad = append(bad, fmt.Errorf("%s: status %d, receipt %q: %s", r.Target, r.Status, r.ID, r.Body))
		}
	}
	for _, s := range seen {
		if !asked[s.RequestID] {
			bad = append(bad, fmt.Errorf("the upstream saw %s, but there is no decision", s.Path))
		}
	}
	if len(bad) > 0 {
		w.t.Errorf("%d of %d requests are not as promised; the first: %v", len(bad), len(sent), errors.Join(bad[:min(len(bad), 8)]...))
	}
	if refusals == 0 {
		w.t.Error("no request was refused")
	}
	out, err := w.Run(w.t.Context(), nil, "verify", "--quiet", "--policy", policy, filepath.Join(w.Dir, "receipts.jsonl"))
	if err != nil || !bytes.Contains(out, fmt.Appendf(nil, "%d verified, 0 refused", len(tr.List))) {
		w.t.Errorf("verify under the first policy: %v\n%s", err, out)
	}
	log, err := os.ReadFile(filepath.Join(w.Dir, "knhk.log"))
	if err != nil || bytes.Contains(log, []byte("DATA RACE")) || bytes.Contains(log, []byte("goroutine ")) {
		w.t.Errorf("knhk's log tells of a race or a crash: %v", err)
	}
	w.run.Add("admitted", float64(admits))
	w.run.Add("refused", float64(refusals))
	w.t.Logf("%d admitted, %d refused, %d receipts", admits, refusals, len(tr.List))
}
