//go:build linux

package storage

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"github.com/knhk/sidecar/e2e/fault"
	"github.com/knhk/sidecar/e2e/harness"
)

// roundsPerLog bounds what one log gathers: every round audits all of it.
const roundsPerLog = 40

// mixes are the loads: both levels at once, and each alone. Without W1 nobody asks for a sync.
var mixes = [][]string{{"/p", "/hot", "/p", "/hot"}, {"/hot", "/hot", "/hot"}, {"/p", "/p", "/p"}}

// TestPowerLoss takes the power away under load, again and again: everything promised durable is there, what R1 lost is
// declared, no fork.
func TestPowerLoss(t *testing.T) {
	t.Parallel()
	run := fault.Begin(t, "storage/power-loss")
	rng := run.Rand()
	for done := 0; done < run.Rounds(); done += roundsPerLog {
		t.Run(fmt.Sprintf("log%d", done/roundsPerLog), func(t *testing.T) {
			w := newWorld(t)
			w.must(w.start())
			for round := range min(roundsPerLog, run.Rounds()-done) {
				w.powerLoss(run, rng, done+round)
			}
		})
		if t.Failed() {
			return
		}
	}
}

func (w *world) powerLoss(run *fault.Run, rng *rand.Rand, round int) {
	w.t.Helper()
	levels := mixes[rng.IntN(len(mixes))]
	stop := w.load(levels...)
	before := w.ackedCount()
	w.must(w.eventually(harness.Patience, func() error {
		if n := w.ackedCount() - before; n < 20 {
			return fmt.Errorf("%d requests answered", n)
		}
		return nil
	}))
	time.Sleep(time.Duration(rng.IntN(400)) * time.Millisecond) // the moment is the fault
	w.kill()
	stop()
	chance := rng
	if round%roundsPerLog == 0 {
		chance = nil // a log in its first seconds loses all that was not synced: the names of its directories were
	}
	loss, err := w.disk.PowerLoss(chance)
	w.must(err)
	w.reboot()
	if rng.IntN(3) == 0 { // and once more, in the middle of the recovery
		p, err := harness.StartProcess(w.t.Context(), harness.ProcessConfig{Name: "knhk", Path: w.Bin,
			Args: []string{"serve", "--config", w.ConfigFile}, Dir: w.Dir, Log: filepath.Join(w.Dir, "knhk.log")})
		w.must(err)
		time.Sleep(time.Duration(rng.IntN(300)) * time.Millisecond)
		p.Kill()
		again, err := w.disk.PowerLoss(rng)
		w.must(err)
		w.reboot()
		w.t.Logf("round %d: power lost in the recovery: %v", round, again)
		loss.Sectors, loss.Kept = loss.Sectors+again.Sectors, loss.Kept+again.Kept
	}
	// knhk is gone, the file system has unmounted without anybody holding a file, and says what it had not synced.
	run.Observed("the file system's count of unsynced sectors and names")
	run.Add("sectors_lost", float64(loss.Sectors-loss.Kept))
	run.Add("names_lost", float64(loss.Names-loss.NamesKept))
	if err := w.start(); err != nil {
		w.t.Fatalf("round %d: after %v: %v", round, loss, err)
	}
	tr, err := w.audit()
	if err != nil {
		w.t.Fatalf("round %d: after %v: %v", round, loss, err)
	}
	w.t.Logf("round %d: %v, %v; %d receipts, %d R1 of clients lost, %d ranges declared", round, levels, loss, len(tr.list), tr.missing, len(tr.declared))
	run.Max("receipts", float64(len(tr.list)))
	run.Add("r1_lost_and_declared", float64(tr.missing))
	w.must(w.start())
	run.Done()
}
