//go:build linux

package storage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/knhk/sidecar/e2e/fault"
	"github.com/knhk/sidecar/e2e/faultfs"
	"github.com/knhk/sidecar/e2e/harness"
)

// phase is a part of knhk's life.
type phase string

const (
	birth   phase = "birth"   // the first start in an empty directory
	serving phase = "serving" // under load
	ending  phase = "ending"  // from SIGTERM on
	restart phase = "restart" // after kill -9
)

// site is a place in the program that changes the disk, as the disk sees it.
type callSite struct {
	phase phase
	call  faultfs.Call
	calls int // in the dry run
}

func (s callSite) String() string { return fmt.Sprintf("%s: %v", s.phase, s.call) }

// crux is 1 for the syncs under load by which W1 decisions and blocks become durable: they come first, in every run.
func (s callSite) crux() int {
	if s.phase == serving && s.call.Op == faultfs.OpSync && (s.call.Class == "life-#/state/wal/#.wal" || s.call.Class == "life-#/state/blocks/#.log") {
		return 1
	}
	return 0
}

// TestFailingCalls has every call that writes or syncs fail in turn, with EIO and with ENOSPC: requests are denied or nothing is
// wrong, nothing is signed over a fault, and after a restart everything that was acknowledged is there.
func TestFailingCalls(t *testing.T) {
	t.Parallel()
	runs := []*fault.Run{fault.Begin(t, "storage/eio"), fault.Begin(t, "storage/enospc")}
	errnos := []syscall.Errno{syscall.EIO, syscall.ENOSPC}
	rng := runs[0].Rand()
	w := newWorld(t)
	sites := w.callSites()
	t.Logf("%d call sites", len(sites))
	for i, run := range runs {
		rng.Shuffle(len(sites), func(i, j int) { sites[i], sites[j] = sites[j], sites[i] })
		slices.SortStableFunc(sites, func(a, b callSite) int { return cmp.Compare(b.crux(), a.crux()) })
		unreached := map[callSite]bool{}
		for next, done := 0, 0; done < run.Rounds(); next++ {
			if next > 3*len(sites)+3*run.Rounds() {
				t.Fatal("too many call sites cannot be reached")
			}
			s := sites[next%len(sites)]
			hits, how := w.failing(s, errnos[i], rng)
			if hits == 0 {
				unreached[s] = true // it depends on what the log looked like
				continue
			}
			delete(unreached, s)
			run.Observed("the file system's count of calls it failed")
			run.Add(how, 1)
			run.Add("calls_failed", float64(hits))
			run.Done()
			done++
		}
		run.Max("call_sites", float64(len(sites)))
		run.Max("call_sites_not_reached", float64(len(unreached)))
		for s := range unreached {
			t.Logf("%v: not reached with %v", s, errnos[i])
		}
	}
}

// callSites runs through all phases without faults and returns which calls there are.
func (w *world) callSites() (sites []callSite) {
	w.t.Helper()
	note := func(p phase) {
		for call, n := range w.disk.Calls() {
			if slices.Contains(faultfs.Changes, call.Op) && strings.HasPrefix(call.Class, "life-#/") { // what stands above is the test's
				sites = append(sites, callSite{p, call, n})
			}
		}
		w.disk.ResetCalls()
	}
	w.must(w.StartKnhk(w.t.Context()))
	note(birth)
	w.kill()
	w.must(w.start())
	w.disk.ResetCalls()
	stop := w.load(mixes[0]...)
	time.Sleep(2500 * time.Millisecond) // some segments, some seconds of log, no promise rests on it
	note(serving)
	w.kill()
	stop()
	w.disk.ResetCalls()
	w.must(w.StartKnhk(w.t.Context()))
	note(restart)
	_, err := w.settle()
	w.must(err)
	w.disk.ResetCalls()
	w.must(w.stop())
	note(ending)
	slices.SortFunc(sites, func(a, b callSite) int { return strings.Compare(a.String(), b.String()) })
	return sites
}

// failing makes calls of a site fail, from a random one on, and audits what is left. It returns how many calls failed and what
// knhk did about it: went on, refused, died. No hits: the site was not reached.
func (w *world) failing(s callSite, errno syscall.Errno, rng *rand.Rand) (hits int, how string) {
	w.t.Helper()
	f := faultfs.Fault{Op: s.call.Op, Path: "*", Class: s.call.Class, Errno: errno, Skip: rng.IntN(s.calls), Times: rng.IntN(2)}
	lossAfter := rng.IntN(3) == 0
	if s.phase == birth {
		w.newborn()
	} else {
		w.must(w.start())
	}
	if s.phase == restart { // with records in the WAL, and decisions without outcome
		for range 5 {
			w.must(w.admits())
		}
		w.kill()
	}
	arm := func() *faultfs.Injected { return w.disk.Fail(f) }
	var in *faultfs.Injected
	switch s.phase {
	case birth, restart:
		in = arm()
		how = w.startFails(s)
	case serving:
		stop := w.load(mixes[0]...)
		in = arm()
		err := w.eventually(3*time.Second, func() error { return reached(in, s) })
		if err != nil { // fewer calls than in the dry run: the first one then
			in.Clear()
			f.Skip = 0
			in = arm()
			_ = w.eventually(3*time.Second, func() error { return reached(in, s) })
		}
		how = w.underFault(in)
		stop()
	case ending:
		in = arm()
		how = "went on"
		if err := w.stop(); err != nil {
			how = "said so at its end"
		}
	}
	hits = in.Hits()
	if hits > 0 && s.crux() == 1 && how != "refused until restarted" && how != "died" {
		w.t.Fatalf("%v, %v: it %s over a failed sync", s, errno, how)
	}
	where := fmt.Sprintf("%v, %v after %d calls, %d failed, %s", s, errno, f.Skip, hits, how)
	w.disk.ClearFaults() // there is space again, and the disk works
	if how == "refused for a while" {
		if err := w.eventually(harness.Patience, w.admits); err != nil {
			w.t.Fatalf("%s: does not admit when the fault is over: %v", where, err)
		}
	}
	if w.Knhk != nil {
		w.kill()
	}
	if lossAfter {
		loss, err := w.disk.PowerLoss(rng)
		w.must(err)
		w.reboot()
		where += ", then power lost, " + loss.String()
	}
	if err := w.start(); err != nil {
		w.t.Fatalf("%s: does not start again: %v", where, err)
	}
	tr, err := w.audit()
	if err != nil {
		w.t.Fatalf("%s: %v", where, err)
	}
	if !lossAfter && (tr.missing > 0) {
		w.t.Fatalf("%s: %d R1 receipts are gone, and the machine did not crash", where, tr.missing)
	}
	w.t.Logf("%s", where)
	return hits, strings.ReplaceAll(how, " ", "_")
}

func reached(in *faultfs.Injected, s callSite) error {
	if in.Hits() == 0 {
		return fmt.Errorf("%v: not reached", s)
	}
	return nil
}

// startFails starts knhk while a fault is armed, and says what became of it.
func (w *world) startFails(s callSite) string {
	w.t.Helper()
	how := "went on"
	var err error
	w.Knhk, err = harness.StartProcess(w.t.Context(), harness.ProcessConfig{
		Name: "knhk", Path: w.Bin, Args: []string{"serve", "--config", w.ConfigFile}, Dir: w.Dir, Log: filepath.Join(w.Dir, "knhk.log"),
		Ready: func(ctx context.Context) error {
			_, err := harness.Get(ctx, "http://"+w.Admin+"/readyz")
			if err != nil && strings.Contains(err.Error(), "until restarted") { // it serves, and refuses everything
				how = "refused until restarted"
				return nil
			}
			return err
		},
	})
	if err != nil {
		w.Knhk = nil
		if !strings.Contains(err.Error(), "ended before it was ready") {
			w.t.Fatalf("%v: knhk neither starts nor says why: %v", s, err)
		}
		return "did not start"
	}
	if w.Envoy == nil {
		w.must(w.StartEnvoy(w.t.Context()))
	}
	return how
}

// admits says whether a W1 request passes.
func (w *world) admits() error {
	status, err := w.send("/p")
	if err == nil && status != 200 {
		err = fmt.Errorf("status %d", status)
	}
	return err
}

// underFault watches a knhk under load that has met a fault, and says what it does about it. While it refuses because of a failed
// write, it must not sign anything.
func (w *world) underFault(in *faultfs.Injected) string {
	w.t.Helper()
	if in.Hits() == 0 {
		return "was not reached"
	}
	refused := false
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		select {
		case <-w.Knhk.Exited():
			var exit *exec.ExitError
			if err := w.Knhk.Wait(w.t.Context()); !errors.As(err, &exit) {
				w.t.Fatalf("knhk ended by itself with %v", err)
			}
			w.Knhk = nil
			return "died"
		default:
		}
		_, err := harness.Get(w.t.Context(), "http://"+w.Admin+"/readyz")
		if err != nil && strings.Contains(err.Error(), "until restarted") {
			return w.signsNothing()
		}
		refused = refused || err != nil
	}
	if refused {
		return "refused for a while"
	}
	return "went on"
}

// signsNothing holds that a log that has failed signs no further checkpoint, and lets no request pass.
func (w *world) signsNothing() string {
	w.t.Helper()
	url := "http://" + w.Tiles + "/checkpoint"
	before, err := harness.Get(w.t.Context(), url)
	if err != nil {
		return "refused until restarted" // it is ending
	}
	resp, err := w.send("/p")
	if err == nil && resp == 200 {
		w.t.Fatal("a request passed after the log has failed")
	}
	time.Sleep(600 * time.Millisecond) // several seals and checkpoints, if there were any
	if after, err := harness.Get(w.t.Context(), url); err == nil && string(after) != string(before) {
		w.t.Fatalf("a log that has failed signed\n%s\nafter\n%s", after, before)
	}
	return "refused until restarted"
}
