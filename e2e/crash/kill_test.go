package crash

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/hsm/softhsm"
	"github.com/knhk/sidecar/e2e/fault"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// site has a route of each class. Outcomes that a crash or a broken access log stream took along are soon unknown.
const site = `
log: {seal_every: 100ms, outcome_timeout: 2s}
beat:
  cycle: 800ms
  r1: {capacity: 4096}
  w1: {capacity: 4096, max_wait: 800ms}
routes:
- {name: hot, prefix: /hot, cluster: up, timeout: 1.5s, policy: {class: R1}}
- {name: pages, prefix: /p, cluster: up, timeout: 1.5s, policy: {class: W1}}
envoy:
  access_log_flush: 50ms
  clusters:
  - {name: up, endpoints: ["UPSTREAM"]}
`

// lapRounds is how many crashes one state directory lives through at most: what is audited as a whole stays bounded.
const lapRounds = 100

// TestKill9 kills knhk under load, again and again, in both capture modes at the same time.
func TestKill9(t *testing.T) {
	harness.RequireEnvoy(t)
	run := fault.Begin(t, "crash/kill-9")
	rng := run.Rand()
	for i, capture := range []string{"lean", "full"} {
		rounds := (run.Rounds() + 1 - i) / 2
		seed := rng.Uint64()
		t.Run(capture, func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewPCG(seed, 0))
			for n := 0; rounds > 0; n++ {
				k := min(rounds, lapRounds)
				rounds -= k
				t.Run(fmt.Sprintf("lap-%d", n), func(t *testing.T) { lap(t, run, capture, k, rng) })
				if t.Failed() {
					return
				}
			}
		})
	}
}

// victim is a stack whose knhk is killed.
type victim struct {
	*stack.Stack
	t    *testing.T
	run  *fault.Run
	rng  *rand.Rand
	a    *auditor
	next atomic.Uint64 // numbers requests

	token     []byte        // the token's own object, as SoftHSM keeps it
	plain     bool          // rounds neither audit the whole directory nor kill during start or stop
	restarted time.Duration // from the last exec to ready
}

// lap runs rounds over one state directory, and then audits all of it.
func lap(t *testing.T, run *fault.Run, capture string, rounds int, rng *rand.Rand) {
	ctx := t.Context()
	v := prepare(t, run, stack.Config{Capture: capture, UnixSocket: capture == "full", YAML: site}, rng)
	if err := v.Start(ctx); err != nil {
		t.Fatal(err)
	}
	var err error
	if v.a, err = newAuditor(ctx, v.Stack); err != nil {
		t.Fatal(err)
	}
	if _, v.token, err = v.readToken(); err != nil {
		t.Fatal(err)
	}
	for i := 1; i <= rounds; i++ {
		if err := v.round(ctx, i); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		run.Done()
	}
	if err := v.whole(ctx, rounds); err != nil {
		t.Fatal(err)
	}
}

// prepare makes a stack, of which only the upstream runs, and cleans up after it.
func prepare(t *testing.T, run *fault.Run, cfg stack.Config, rng *rand.Rand) *victim {
	t.Helper()
	cfg.Dir = harness.Directory(t, "")
	s, err := stack.New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	v := &victim{Stack: s, t: t, run: run, rng: rng}
	t.Cleanup(func() {
		if v.Envoy != nil {
			v.Envoy.Kill()
		}
		if v.Knhk != nil {
			v.Knhk.Kill()
		}
		v.Upstream.Close()
		if t.Failed() && v.Knhk != nil {
			t.Logf("log of knhk:\n%s", v.Knhk.LogTail(6000))
		}
	})
	return v
}

// round lives through one crash. i counts from 1.
func (v *victim) round(ctx context.Context, i int) error {
	watching, stopWatch := context.WithCancel(ctx)
	watched := make(chan error, 1)
	go func() { watched <- v.a.log.watch(watching) }()
	l := startLoad(ctx, v.Listener, &v.next, v.rng.Uint64())
	early, err := v.crash(ctx, i, l)
	journal, lerr := l.stop()
	stopWatch()
	if err := errors.Join(err, lerr, <-watched); err != nil {
		return err
	}
	if err := v.a.round(ctx, journal); err != nil {
		return err
	}
	for _, raw := range early {
		if _, err := v.a.verify(raw); err != nil {
			return fmt.Errorf("a bundle from before the crash: %w", err)
		}
	}
	return nil
}

// crash waits until the load is answered, kills knhk, looks at what Envoy does without it, and starts it again. It returns bundles
// that were taken before.
func (v *victim) crash(ctx context.Context, i int, l *load) (early [][]byte, err error) {
	for _, class := range []string{"R1", "W1"} {
		if err := v.await(l, class+" is admitted", 3, func(r *request) bool { return r.class == class && r.status == 200 }); err != nil {
			return nil, err
		}
	}
	// Every other round takes bundles before, which needs a signed checkpoint; in the others the incarnation dies younger.
	if i%2 == 1 {
		if early, err = v.takeEarly(ctx, l); err != nil {
			return nil, err
		}
	}
	time.Sleep(time.Duration(v.rng.IntN(200_000)) * time.Microsecond) // the random moment
	if v.rng.IntN(2) == 0 {
		v.arrival() // or the next one at which a decision has just been promised
	}
	begun := time.Now()
	if err := v.kill(ctx); err != nil {
		return nil, err
	}
	dead := time.Now()
	v.a.deaths = append(v.a.deaths, [2]time.Time{begun, dead})

	// Nobody decides now: everything is refused, and goes no further (the audit compares with the upstream's journal).
	away := func(r *request) bool { return r.begun.After(dead) }
	if err := v.await(l, "requests are refused without knhk", clients, away); err != nil {
		return nil, err
	}
	n, err := l.count(func(r *request) bool { return away(r) && (r.status != http.StatusServiceUnavailable || r.id != "") })
	if err != nil {
		return nil, err
	}
	if n > 0 {
		return nil, fmt.Errorf("%d requests got something else than 503 without receipt while there was no knhk", n)
	}
	if n, err = l.count(away); err != nil {
		return nil, err
	}
	v.run.Add("refused while dead", float64(n))
	flying, _ := l.count(func(r *request) bool { return r.begun.Before(begun) && r.ended.After(begun) })
	v.run.Add("in flight at the kill", float64(flying))

	if i&(i-1) == 0 && !v.plain { // rounds 1, 2, 4, 8...: each audits everything
		if _, err := fsck(ctx, v.Stack); err != nil {
			return nil, fmt.Errorf("right after the crash: %w", err)
		}
	}
	switch more := v.rng.IntN(6); {
	case v.plain:
	case more < 2:
		if err := v.killStarting(ctx); err != nil {
			return nil, err
		}
	case more == 2:
		if err := v.killStopping(ctx); err != nil {
			return nil, err
		}
	}
	begun = time.Now()
	if err := v.StartKnhk(ctx); err != nil {
		return nil, err
	}
	v.restarted = time.Since(begun)
	v.run.Max("longest restart, ms", float64(v.restarted.Milliseconds()))
	rss, err := v.Knhk.RSS()
	if err != nil {
		return nil, err
	}
	cpu, err := v.Knhk.CPU()
	if err != nil {
		return nil, err
	}
	v.run.Max("CPU until ready, ms", float64(cpu.Milliseconds()))
	v.run.Max("RSS when ready, MiB", float64(rss>>20))
	ready := time.Now()
	for _, class := range []string{"R1", "W1"} {
		if err := v.await(l, class+" is admitted again", 3, func(r *request) bool {
			return r.begun.After(ready) && r.class == class && r.status == 200
		}); err != nil {
			return nil, err
		}
	}
	return early, nil
}

// arrival waits, a second at most, until one more request arrives at the upstream: what has been promised about it is as fresh as can be.
func (v *victim) arrival() {
	before := len(v.Upstream.Seen())
	for end := time.Now().Add(time.Second); len(v.Upstream.Seen()) == before && time.Now().Before(end); {
		time.Sleep(20 * time.Microsecond)
	}
}

// takeEarly takes the bundles of some receipts that clients have got.
func (v *victim) takeEarly(ctx context.Context, l *load) (early [][]byte, err error) {
	var ids []string
	if _, err := l.count(func(r *request) bool {
		if r.id != "" {
			ids = append(ids, r.id)
		}
		return false
	}); err != nil {
		return nil, err
	}
	for range 2 {
		raw, err := v.a.keep(ctx, ids[v.rng.IntN(len(ids))])
		if err != nil {
			return nil, err
		}
		early = append(early, raw)
	}
	return early, nil
}

// kill sends SIGKILL and sees by the exit status that it was what ended knhk.
func (v *victim) kill(ctx context.Context) error {
	if err := v.Knhk.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, harness.Patience)
	defer cancel()
	err := v.Knhk.Wait(ctx)
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		return fmt.Errorf("knhk after SIGKILL: %w", err)
	}
	if ws, ok := exit.Sys().(syscall.WaitStatus); !ok || !ws.Signaled() || ws.Signal() != syscall.SIGKILL {
		return fmt.Errorf("knhk after SIGKILL: %w", err)
	}
	v.Knhk = nil
	v.run.Observed("exit status: signal 9")
	return nil
}

// killStarting starts knhk and kills it again before, or just when, it is ready: recovery must bear a crash too.
func (v *victim) killStarting(ctx context.Context) error {
	begun := time.Now()
	ctx, cancel := context.WithTimeout(ctx, time.Duration(1+v.rng.IntN(150))*time.Millisecond)
	defer cancel()
	if err := v.StartKnhk(ctx); err == nil {
		v.Knhk.Kill()
	} else {
		v.run.Add("killed again while starting", 1)
	}
	v.Knhk = nil
	v.a.deaths = append(v.a.deaths, [2]time.Time{begun, time.Now()})
	return v.mendToken()
}

// readToken returns the token's own object in SoftHSM's directory, nil with software keys.
func (v *victim) readToken() (file string, content []byte, err error) {
	found, err := filepath.Glob(filepath.Join(softhsm.TokenDir(filepath.Join(v.Dir, "token")), "*", "token.object"))
	if err != nil || len(found) == 0 {
		return "", nil, err
	}
	content, err = os.ReadFile(found[0])
	return found[0], content, err
}

// mendToken puts the token's object back if SoftHSM has lost it: at each login SoftHSM truncates that file and writes it anew, and who
// is killed in between leaves an empty one (about one start in 400 here). No HSM does that, and knhk can do nothing about it.
func (v *victim) mendToken() error {
	file, content, err := v.readToken()
	if err != nil || len(content) == len(v.token) {
		return err
	}
	v.run.Add("tokens torn by SoftHSM", 1)
	return os.WriteFile(file, v.token, 0o600)
}

// killStopping starts knhk, asks it to stop and kills it while it drains, seals its last block or closes the log.
func (v *victim) killStopping(ctx context.Context) error {
	if err := v.StartKnhk(ctx); err != nil {
		return err
	}
	begun := time.Now()
	if err := v.Knhk.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-v.Knhk.Exited():
	case <-time.After(time.Duration(v.rng.IntN(800)) * time.Millisecond):
		v.run.Add("killed again while stopping", 1)
	}
	v.Knhk.Kill()
	v.Knhk = nil
	v.a.deaths = append(v.a.deaths, [2]time.Time{begun, time.Now()})
	return nil
}

// await waits until n requests of the load satisfy ok.
func (v *victim) await(l *load, what string, n int, ok func(*request) bool) error {
	deadline := time.Now().Add(harness.Patience)
	for {
		got, err := l.count(ok)
		if err != nil || got >= n {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not within %v: %s: %d of %d", harness.Patience, what, got, n)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// whole audits everything at the end of a lap: export, verification, an orderly stop, fsck.
func (v *victim) whole(ctx context.Context, rounds int) error {
	e, err := v.a.export(ctx)
	if err != nil {
		return err
	}
	if err := errors.Join(v.a.judge(e), v.a.earlier(ctx), v.a.blind(ctx, e)); err != nil {
		return err
	}
	if err := v.Stop(ctx); err != nil {
		return err
	}
	if err := v.a.log.read(ctx); err != nil { // the final header too
		return err
	}
	r, err := fsck(ctx, v.Stack)
	if err != nil {
		return err
	}
	if r.Decisions != uint64(e.receipts) || r.Decisions+r.Outcomes != uint64(e.records) || r.Unlogged != 0 {
		return fmt.Errorf("fsck counts %+v, the export %d records of %d receipts", *r, e.records, e.receipts)
	}
	if n := len(v.a.log.incarnations); uint64(n) != r.Incarnations || n < rounds+1 || v.a.log.recovered < rounds {
		return fmt.Errorf("%d incarnations, %d ended by a crash, after %d crashes; fsck counts %d", n, v.a.log.recovered, rounds, r.Incarnations)
	}
	v.t.Logf("%d crashes: %d receipts, %d at the upstream, %d unknown, %d late, %d decided twice, %d bundles from before a crash, %d leaves",
		rounds, e.receipts, len(v.a.reached), e.unknown, e.late, e.twice, v.a.earlyN, v.a.log.tree.N)
	for name, n := range map[string]int{"receipts": e.receipts, "at the upstream": len(v.a.reached), "outcome unknown": e.unknown,
		"outcome late": e.late, "decided twice": e.twice, "bundles from before": v.a.earlyN} {
		v.run.Add(name, float64(n))
	}
	return nil
}
