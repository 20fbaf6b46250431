// Command soak lets one knhk behind one Envoy work for a long time at half of what it can do, and says whether anything grows that
// should not: goroutines, memory, open files, files on disk. `make soak` calls it.
//
// It prints a line for each minute, writes soak.json, and exits with 1 if something did grow. It is honest about what a run can
// tell: a trend of memory has a confidence interval, and where that holds both "flat" and "grows" the verdict is "undecided",
// with the slope that a run of this length could have told. It measures on the machine it runs on, the load generator beside.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"syscall"
	"time"

	"github.com/knhk/sidecar/e2e/bench/load"
	"github.com/knhk/sidecar/e2e/stack"
)

// site has one route of each class, and everything else as it is by default.
const site = `
routes:
- {name: hot, prefix: /hot, cluster: up, policy: {class: R1}}
- {name: pages, prefix: /, cluster: up}
envoy:
  clusters:
  - {name: up, endpoints: ["UPSTREAM"]}
`

// What is stated about files. The write-ahead log has its setting; Pebble closes memtables of 16 MiB into tables of at least
// 1 MiB on average and keeps a few files beside them; of a log of n leaves there are n/256 full tiles and as many bundles, and
// the partial ones of the last tile on each level.
const (
	walMost      = 1 << 30 // log.wal_max_mib
	storeFiles   = 64
	storePerFile = 1 << 20
	tileWidth    = 256
	tablesOpen   = 1000 // Pebble's MaxOpenFiles
	othersOpen   = 200  // listeners, connections, segments, key stores
)

// slack is by how many a count may differ at the end: a connection that is just being replaced has a few goroutines.
const (
	slackGoroutines = 16
	slackFiles      = 16
	maxFailed       = 0.001 // of the requests
)

type options struct {
	length   time.Duration
	interval time.Duration
	rate     float64
	conns    int
	capture  string
	dir      string
	out      string
	soft     bool
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "soak:", err)
		}
		stop()
		os.Exit(1)
	}
}

func parse(args []string, stderr io.Writer) (options, error) {
	var opt options
	var minutes, seconds float64
	fs := flag.NewFlagSet("soak", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Float64Var(&minutes, "minutes", 30, "length of the run")
	fs.Float64Var(&seconds, "seconds", 0, "length of the run in seconds instead, with ten measurements: to see that it works, not to measure")
	fs.Float64Var(&opt.rate, "rate", 0, "requests a second (default: half of what a closed loop reaches in the first minute)")
	fs.IntVar(&opt.conns, "conns", 32, "connections of the open loop for each of the two classes")
	fs.StringVar(&opt.capture, "capture", "lean", "lean or full")
	fs.StringVar(&opt.dir, "dir", "", "directory for everything; kept (default: a temporary one, removed)")
	fs.StringVar(&opt.out, "out", "soak.json", "file for the figures")
	fs.BoolVar(&opt.soft, "soft", false, "software keys even where SoftHSM is there")
	if err := fs.Parse(args); err != nil {
		return opt, err
	}
	opt.length, opt.interval = time.Duration(minutes*float64(time.Minute)), time.Minute
	if seconds > 0 {
		opt.length = time.Duration(seconds * float64(time.Second))
		opt.interval = opt.length / 10
	}
	if fs.NArg() > 0 || opt.length < 5*opt.interval || opt.interval < 500*time.Millisecond || opt.conns < 1 || opt.rate < 0 ||
		opt.capture != "lean" && opt.capture != "full" {
		return opt, errors.New("want at least 5 minutes or 5 seconds, at least one connection, lean or full, and no further arguments")
	}
	return opt, nil
}

// report is soak.json.
type report struct {
	Machine  string    `json:"machine"`
	Capture  string    `json:"capture"`
	Keys     string    `json:"keys"`
	Capacity float64   `json:"capacity_per_s,omitempty"`
	Rate     float64   `json:"rate_per_s"`
	WarmUp   float64   `json:"warm_up_s"`
	Samples  []Sample  `json:"samples"`
	RSS      *Trend    `json:"rss,omitempty"`
	EnvoyRSS *Trend    `json:"envoy_rss,omitempty"`
	Live     *Trend    `json:"live_heap,omitempty"`
	Verdicts []Verdict `json:"verdicts"`
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	opt, err := parse(args, stderr)
	if err != nil {
		return err
	}
	dir := opt.dir
	if dir == "" {
		if dir, err = os.MkdirTemp("", "knhk-soak-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	}
	s, err := stack.New(ctx, stack.Config{Dir: dir, Soft: opt.soft, YAML: site, Capture: opt.capture})
	if err != nil {
		return err
	}
	stopped := false
	defer func() {
		if !stopped {
			err = errors.Join(err, s.Stop(context.WithoutCancel(ctx)))
		}
	}()
	if err := s.Start(ctx); err != nil {
		return err
	}
	r := &report{Machine: fmt.Sprintf("%d CPUs, %s", runtime.NumCPU(), runtime.Version()), Capture: opt.capture, Keys: s.Custody, Rate: opt.rate}
	if err := r.measure(ctx, s, opt, stdout); err != nil {
		return err
	}
	stopped = true
	if err := s.Stop(ctx); err != nil {
		return err
	}
	begun := time.Now()
	v := Verdict{What: "the state is sound after the stop", Result: ok}
	if out, err := s.Run(ctx, nil, "fsck", s.StateDir); err != nil {
		v.Result, v.Why = failed, fmt.Sprintf("%v %s", err, out)
	} else {
		v.Why = fmt.Sprintf("fsck, %v", time.Since(begun).Round(time.Second))
	}
	r.judge()
	r.Verdicts = append(r.Verdicts, v)
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(opt.out, append(b, '\n'), 0o644); err != nil {
		return err
	}
	return r.tell(stdout)
}

// tell prints the verdicts; an error if one is failed.
func (r *report) tell(w io.Writer) error {
	bad := 0
	fmt.Fprintln(w)
	for _, v := range r.Verdicts {
		fmt.Fprintf(w, "%-9s  %s: %s\n", v.Result, v.What, v.Why)
		if v.Result == failed {
			bad++
		}
	}
	if bad > 0 {
		return fmt.Errorf("%d of %d promises did not hold", bad, len(r.Verdicts))
	}
	return nil
}

// measure finds the capacity and then samples the run.
func (r *report) measure(ctx context.Context, s *stack.Stack, opt options, w io.Writer) error {
	begun := time.Now()
	if opt.rate == 0 {
		results, err := both(ctx, s, load.Config{Conns: 8, Length: opt.interval})
		if err != nil {
			return err
		}
		for _, l := range results {
			r.Capacity += l.PerSecond()
		}
		r.Rate = math.Floor(r.Capacity / 2)
		s.Upstream.Forget()
	}
	fmt.Fprintf(w, "%s; %s capture, %s\n%.0f requests/s, half R1 and half W1, for %v; closed loop %.0f requests/s\n\n",
		r.Machine, r.Capture, r.Keys, r.Rate, opt.length, r.Capacity)
	fmt.Fprintf(w, "%7s %9s %5s %6s %6s %6s %6s %7s %6s %5s %5s %6s %7s %6s %7s %6s %6s %6s %6s\n",
		"time", "requests", "fail", "unsent", "p50ms", "p99ms", "gorout", "rssMB", "liveMB", "files", "walMB", "blocks", "storeMB", "tables", "tilesMB", "tiles", "us/req", "envoy", "envMB")
	for time.Since(begun) < opt.length-opt.interval/2 {
		sm, err := r.interval(ctx, s, opt)
		if err != nil {
			return err
		}
		sm.At = time.Since(begun)
		r.Samples = append(r.Samples, sm)
		fmt.Fprintf(w, "%7s %9d %5d %6d %6.2f %6.2f %6.0f %7.1f %6.1f %5.0f %5.0f %6.0f %7.1f %6.0f %7.1f %6.0f %6.1f %6.1f %6.1f\n",
			sm.At.Round(time.Second), sm.Requests, sm.Failed, sm.Unsent, sm.P50, sm.P99, sm.Goroutines, sm.RSS/(1<<20), sm.Live/(1<<20), sm.Open,
			sm.WAL.Bytes/(1<<20), sm.Blocks, sm.Store.Bytes/(1<<20), sm.Store.Count, sm.Tiles.Bytes/(1<<20), sm.Tiles.Count, sm.CPU, sm.EnvoyCPU,
			sm.EnvoyRSS/(1<<20))
	}
	return nil
}

// both sends R1 and W1 at once, half of the rate each.
func both(ctx context.Context, s *stack.Stack, cfg load.Config) (results [2]*load.Result, err error) {
	if cfg.Addr, err = netip.ParseAddrPort(s.Listener); err != nil {
		return results, err
	}
	cfg.Rate /= 2
	var errs [2]error
	done := make(chan struct{})
	send := func(i int, path string) {
		c := cfg
		c.Request = fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: soak\r\nUser-Agent: soak/1\r\nAccept: */*\r\n\r\n", path)
		results[i], errs[i] = load.Run(ctx, c)
	}
	go func() {
		defer close(done)
		send(0, "/hot/soak")
	}()
	send(1, "/soak")
	<-done
	return results, errors.Join(errs[:]...)
}

// interval sends requests for one interval and measures.
func (r *report) interval(ctx context.Context, s *stack.Stack, opt options) (sm Sample, err error) {
	knhk, envoy, err := cpu(s)
	if err != nil {
		return sm, err
	}
	memory := begin(s)
	results, err := both(ctx, s, load.Config{Conns: opt.conns, Rate: r.Rate, Length: opt.interval})
	var werr error
	sm.RSS, sm.EnvoyRSS, werr = memory.end()
	if err = errors.Join(err, werr); err != nil {
		return sm, err
	}
	knhk2, envoy2, err := cpu(s)
	if err != nil {
		return sm, err
	}
	var latencies []time.Duration
	for _, l := range results {
		latencies = append(latencies, l.Latencies...)
		sm.Failed += l.Failed
		sm.Unsent += l.Unsent
	}
	slices.Sort(latencies)
	all := load.Result{Latencies: latencies}
	sm.Requests = len(latencies) + sm.Failed
	if sm.Requests == 0 {
		return sm, errors.New("no request was answered")
	}
	sm.P50, sm.P99 = millis(all.Quantile(0.5)), millis(all.Quantile(0.99))
	sm.CPU = float64((knhk2 - knhk).Microseconds()) / float64(sm.Requests)
	sm.EnvoyCPU = float64((envoy2 - envoy).Microseconds()) / float64(sm.Requests)
	return sm, sm.read(ctx, s)
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// judge compares the samples after warm-up, a third of the run, with what is promised; what has a hard bound, all of them.
func (r *report) judge() {
	calm := r.Samples[len(r.Samples)/3:]
	r.WarmUp = r.Samples[len(r.Samples)/3].At.Seconds()
	over := calm[len(calm)-1].At - calm[0].At
	pick := func(from []Sample, f func(Sample) float64) (y []float64) {
		for _, s := range from {
			y = append(y, f(s))
		}
		return y
	}
	var at []time.Duration
	for _, s := range calm {
		at = append(at, s.At)
	}
	line := func(f func(Sample) float64) *Trend {
		t := trend(at, pick(calm, f))
		if math.IsInf(t.High, 0) {
			return nil // JSON has no infinity
		}
		return &t
	}
	grows := func(what string, t *Trend) Verdict {
		if t == nil {
			return growth(what, trend(nil, nil), 0)
		}
		return growth(what, *t, over)
	}
	r.RSS = line(func(s Sample) float64 { return s.RSS })
	r.EnvoyRSS = line(func(s Sample) float64 { return s.EnvoyRSS })
	r.Live = line(func(s Sample) float64 { return s.Live })

	requests, bad := 0, 0
	for _, s := range r.Samples {
		requests += s.Requests
		bad += s.Failed
	}
	v := Verdict{What: fmt.Sprintf("less than %.1f %% of the requests fail", maxFailed*100), Result: ok}
	v.Why = fmt.Sprintf("%d of %d", bad, requests)
	if float64(bad) > maxFailed*float64(requests) {
		v.Result = failed
	}
	last := r.Samples[len(r.Samples)-1]
	told := Verdict{What: "every outcome is told", Result: ok, Why: fmt.Sprintf("%.0f decisions, %.0f unknown", last.Decisions, last.Unknown)}
	if last.Unknown > 0 {
		told.Result = failed
	}
	r.Verdicts = append(r.Verdicts, v, told,
		level("goroutines", pick(calm, func(s Sample) float64 { return s.Goroutines }), slackGoroutines),
		level("Envoy's open files", pick(calm, func(s Sample) float64 { return s.EnvoyOpen }), slackFiles),
		grows("resident memory of knhk", r.RSS), grows("resident memory of Envoy", r.EnvoyRSS), grows("live heap of knhk", r.Live),
		bounded("bytes of the write-ahead log", pick(r.Samples, func(s Sample) float64 { return s.WAL.Bytes }),
			pick(r.Samples, func(Sample) float64 { return walMost })),
		bounded("files of the block store", pick(r.Samples, func(s Sample) float64 { return s.Store.Count }),
			pick(r.Samples, func(s Sample) float64 { return storeFiles + s.Store.Bytes/storePerFile })),
		bounded("files of the log", pick(r.Samples, func(s Sample) float64 { return s.Tiles.Count }),
			pick(r.Samples, func(s Sample) float64 { return 2*math.Floor(s.Leaves/tileWidth) + 4*tileWidth })),
		bounded("open files of knhk", pick(r.Samples, func(s Sample) float64 { return s.Open }),
			pick(r.Samples, func(s Sample) float64 { return othersOpen + min(s.Store.Count, tablesOpen) })),
	)
}
