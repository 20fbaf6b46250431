package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/knhk/sidecar/e2e/bench/load"
	"github.com/knhk/sidecar/e2e/harness"
)

const (
	warmUp      = 500 * time.Millisecond
	openFactor  = 0.5 // of the closed loop's rate
	syncBytes   = 512 // what one record of a small group takes in a log
	syncFile    = 8 << 20
	syncLimit   = time.Second
	maxFailed   = 0.001 // more failed requests than this and the figures are of something else
	quickFailed = 0.5   // with --quick, which shows no figures worth keeping: on a busy machine knhk refuses, as it must
	connsFactor = 4
)

// request is small but not bare: a client that sends fewer headers than this is a benchmark.
var request = []byte("GET /bench HTTP/1.1\r\nHost: bench\r\nUser-Agent: bench/1\r\nAccept: */*\r\nAccept-Encoding: gzip\r\n\r\n")

// sample is one case in one round.
type sample struct {
	perSecond        float64
	serviceCPU       float64 // us per request of the closed loop; 0 without a service
	envoyCPU         float64
	rssMB            float64
	openRate         float64
	p50, p99, p999   float64 // ms, open loop
	closedP50        float64
	closedP99        float64
	failed, unsent   int
	syncP50, syncP99 float64 // ms, append and fdatasync right after a W1 case
}

// measure runs the rounds.
func measure(ctx context.Context, opt options, progress io.Writer) (_ *report, err error) {
	dir := opt.dir
	if dir == "" {
		if dir, err = os.MkdirTemp("", "knhk-bench-"); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	} else if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	cases, envoy, err := startAll(ctx, opt, dir)
	defer func() { err = errors.Join(err, stopAll(cases, envoy)) }()
	if err != nil {
		return nil, err
	}
	samples := map[string][]sample{}
	for round := range opt.rounds {
		for _, i := range rand.Perm(len(cases)) {
			c := cases[i]
			fmt.Fprintf(progress, "round %d of %d: %s\n", round+1, opt.rounds, c.name)
			s, err := c.sample(ctx, opt, envoy, dir)
			if err != nil {
				return nil, fmt.Errorf("round %d, case %s: %w", round+1, c.name, err)
			}
			samples[c.name] = append(samples[c.name], s)
		}
	}
	m, err := machine(dir)
	if err != nil {
		return nil, err
	}
	return newReport(cases, samples, opt, m), nil
}

// sample measures a case once.
func (c *benchCase) sample(ctx context.Context, opt options, envoy *harness.Envoy, dir string) (sample, error) {
	var s sample
	cfg := load.Config{Addr: c.addr, Request: request, Conns: opt.conns, Length: warmUp}
	if _, err := load.Run(ctx, cfg); err != nil {
		return s, err
	}
	cfg.Length = time.Duration(opt.seconds * float64(time.Second))
	before, err := c.cpu(envoy)
	if err != nil {
		return s, err
	}
	closed, err := load.Run(ctx, cfg)
	if err != nil {
		return s, err
	}
	after, err := c.cpu(envoy)
	if err != nil {
		return s, err
	}
	n := len(closed.Latencies)
	if float64(closed.Failed) > opt.maxFailed*float64(n) || n == 0 {
		return s, fmt.Errorf("%d of %d requests failed", closed.Failed, n+closed.Failed)
	}
	s.perSecond = closed.PerSecond()
	s.envoyCPU = micros(after[0]-before[0]) / float64(n)
	s.serviceCPU = micros(after[1]-before[1]) / float64(n)
	s.closedP50, s.closedP99 = millis(closed.Quantile(0.5)), millis(closed.Quantile(0.99))

	cfg.Conns *= connsFactor
	cfg.Rate = s.perSecond * openFactor
	open, err := load.Run(ctx, cfg)
	if err != nil {
		return s, err
	}
	if float64(open.Failed) > opt.maxFailed*float64(len(open.Latencies)) || len(open.Latencies) == 0 {
		return s, fmt.Errorf("open loop: %d of %d requests failed", open.Failed, len(open.Latencies)+open.Failed)
	}
	s.openRate = cfg.Rate
	s.p50, s.p99, s.p999 = millis(open.Quantile(0.5)), millis(open.Quantile(0.99)), millis(open.Quantile(0.999))
	s.failed, s.unsent = closed.Failed+open.Failed, open.Unsent
	if c.process != nil {
		rss, err := c.process.RSS()
		if err != nil {
			return s, err
		}
		s.rssMB = float64(rss) / (1 << 20)
	}
	if strings.HasPrefix(c.name, "w1") {
		if s.syncP50, s.syncP99, err = syncTimes(ctx, dir); err != nil {
			return s, err
		}
	}
	return s, nil
}

// cpu returns the processor time of Envoy and of the case's service so far.
func (c *benchCase) cpu(envoy *harness.Envoy) (t [2]time.Duration, err error) {
	if t[0], err = envoy.CPU(); err != nil || c.process == nil {
		return t, err
	}
	t[1], err = c.process.CPU()
	return t, err
}

// syncTimes is what the disk alone costs: appends of one small record, each followed by fdatasync, into a file that was
// filled with zeros before, as the WAL's segments are. In milliseconds.
func syncTimes(ctx context.Context, dir string) (p50, p99 float64, err error) {
	f, err := os.Create(filepath.Join(dir, "fdatasync"))
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	if _, err := f.Write(make([]byte, syncFile)); err != nil {
		return 0, 0, err
	}
	if err := f.Sync(); err != nil {
		return 0, 0, err
	}
	record := make([]byte, syncBytes)
	for i := range record {
		record[i] = byte(i)
	}
	var times []time.Duration
	for start, off := time.Now(), int64(0); time.Since(start) < syncLimit && off < syncFile && ctx.Err() == nil; off += syncBytes {
		t := time.Now()
		if _, err := f.WriteAt(record, off); err != nil {
			return 0, 0, err
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return 0, 0, fmt.Errorf("fdatasync: %w", err)
		}
		times = append(times, time.Since(t))
	}
	if len(times) == 0 {
		return 0, 0, errors.New("fdatasync: no time for one")
	}
	slices.Sort(times)
	return millis(times[len(times)/2]), millis(times[len(times)*99/100]), nil
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
