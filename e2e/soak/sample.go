package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// Sample is what one interval of the run came to. What counts things was read between two intervals, with no request under way.
type Sample struct {
	At       time.Duration `json:"at_ns"` // since the load began
	Requests int           `json:"requests"`
	Failed   int           `json:"failed"` // other status than 200
	Unsent   int           `json:"unsent"` // due, but every connection was busy
	P50      float64       `json:"p50_ms"`
	P99      float64       `json:"p99_ms"`

	Goroutines float64 `json:"goroutines"`
	RSS        float64 `json:"rss_bytes"`       // of knhk, mean over the interval
	EnvoyRSS   float64 `json:"envoy_rss_bytes"` // likewise
	Live       float64 `json:"live_heap_bytes"` // of knhk, after a garbage collection, when all that was asked is signed
	Open       float64 `json:"open_files"`      // descriptors of knhk
	EnvoyOpen  float64 `json:"envoy_open_files"`
	CPU        float64 `json:"cpu_us_per_request"`
	EnvoyCPU   float64 `json:"envoy_cpu_us_per_request"`

	WAL    harness.Files `json:"wal"`
	Store  harness.Files `json:"blocks"`
	Tiles  harness.Files `json:"log"`
	Blocks float64       `json:"blocks_closed"`
	Leaves float64       `json:"leaves"` // under the signed checkpoint

	Decisions float64 `json:"decisions"`
	Pending   float64 `json:"pending"`
	Unknown   float64 `json:"unknown"`
}

func openFiles(pid int) (float64, error) {
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	return float64(len(list)), err
}

// watch adds up the resident memory of two processes until it is told to stop.
type watch struct {
	stop chan struct{}
	done chan struct{}

	n           int
	knhk, envoy float64
	err         error
}

const watchEvery = 250 * time.Millisecond

// begin starts to watch. The upstream's journal is emptied meanwhile: it would be the one thing that grows for sure.
func begin(s *stack.Stack) *watch {
	w := &watch{stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		tick := time.NewTicker(watchEvery)
		defer tick.Stop()
		for {
			knhk, err := s.Knhk.RSS()
			var envoy uint64
			if err == nil {
				envoy, err = s.Envoy.RSS()
			}
			if err != nil {
				w.err = err
				return
			}
			w.n++
			w.knhk += float64(knhk)
			w.envoy += float64(envoy)
			s.Upstream.Forget()
			select {
			case <-w.stop:
				return
			case <-tick.C:
			}
		}
	}()
	return w
}

// end stops watching and returns the means.
func (w *watch) end() (knhk, envoy float64, err error) {
	close(w.stop)
	<-w.done
	return w.knhk / float64(w.n), w.envoy / float64(w.n), w.err
}

// cpu is the processor time of knhk and of Envoy so far.
func cpu(s *stack.Stack) (knhk, envoy time.Duration, err error) {
	if knhk, err = s.Knhk.CPU(); err != nil {
		return 0, 0, err
	}
	envoy, err = s.Envoy.CPU()
	return knhk, envoy, err
}

// calm waits until knhk has nothing left to do, and then has it collect its garbage, so that what is counted afterwards does not
// depend on when it is counted. Outcomes that never come end the wait, not the run.
func calm(ctx context.Context, s *stack.Stack) error {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		m, err := harness.Metrics(ctx, s.Admin)
		if err != nil {
			return err
		}
		if m.Sum("knhk_receipts_pending") == 0 && m.Sum("knhk_log_unsigned_seconds") == 0 || time.Now().After(deadline) {
			break
		}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.Admin+"/debug/pprof/heap?gc=1", nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("collect garbage: %w", err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != http.StatusOK {
		return fmt.Errorf("collect garbage: status %d: %w", resp.StatusCode, err)
	}
	return nil
}

// read fills in what counts things.
func (sm *Sample) read(ctx context.Context, s *stack.Stack) error {
	if err := calm(ctx, s); err != nil {
		return err
	}
	m, err := harness.Metrics(ctx, s.Admin)
	if err != nil {
		return err
	}
	for _, f := range []struct {
		to   *float64
		name string
	}{
		{&sm.Goroutines, "go_goroutines"}, {&sm.Blocks, "knhk_log_blocks_total"}, {&sm.Leaves, "knhk_log_checkpoint"},
		{&sm.Live, "go_memstats_heap_alloc_bytes"}, {&sm.Decisions, "knhk_decisions_total"}, {&sm.Pending, "knhk_receipts_pending"}, {&sm.Unknown, "knhk_outcomes_unknown_total"},
	} {
		if !m.Has(f.name) {
			return fmt.Errorf("metrics: no %s", f.name)
		}
		*f.to = m.Sum(f.name)
	}
	for _, d := range []struct {
		to   *harness.Files
		name string
	}{{&sm.WAL, "wal"}, {&sm.Store, "blocks"}, {&sm.Tiles, "log"}} {
		if *d.to, err = harness.FilesIn(filepath.Join(s.StateDir, d.name)); err != nil {
			return err
		}
	}
	for _, p := range []struct {
		to  *float64
		pid *harness.Process
	}{{&sm.Open, s.Knhk}, {&sm.EnvoyOpen, s.Envoy.Process}} {
		if *p.to, err = openFiles(p.pid.PID()); err != nil {
			return err
		}
	}
	return nil
}
