package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/knhk/sidecar/e2e/bench/load"
)

// sizingRates are requests per second.
var sizingRates = []float64{100, 1000, 10_000}

// Prices for the cost of a million requests; what a cloud's list price is about. Take your own.
const (
	pricePerCPUHour = 0.04 // dollars
	pricePerGBMonth = 0.08 // dollars, for a month of a disk volume
)

// sized is one rate with one class. What one request a second needs of a core grows as the rate falls: fewer requests share an fsync,
// a wake-up, a block.
type sized struct {
	Case    string  `json:"case"`
	Rate    float64 `json:"req_per_s"`
	CPU     float64 `json:"service_cpu_us"` // per request, what the idle service takes included
	Cores   float64 `json:"service_cores"`
	RSS     float64 `json:"rss_mb"`
	P50     float64 `json:"p50_ms"`
	P99     float64 `json:"p99_ms"`
	DiskDay float64 `json:"disk_gb_per_day"`
	Cost    float64 `json:"dollars_per_million"` // processor time of the service, and a month of the receipts' disk
}

// measureSizing runs knhk at fixed rates and makes the README's sizing table of it; bytes per receipt come from volume.json.
func measureSizing(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	flags := flag.NewFlagSet("bench sizing", flag.ContinueOnError)
	flags.SetOutput(stderr)
	seconds := flags.Float64("seconds", 10, "length of each rate, in seconds")
	volumeFile := flags.String("volume", "volume.json", "what `bench volume` has written")
	out := flags.String("out", "sizing.json", "file for the figures")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *seconds < 1 || flags.NArg() > 0 {
		return errors.New("sizing: want at least one second and no further arguments")
	}
	var v volume
	b, err := os.ReadFile(*volumeFile)
	if err == nil {
		err = json.Unmarshal(b, &v)
	}
	if err != nil {
		return fmt.Errorf("%w: run `bench volume` first", err)
	}
	dir, err := os.MkdirTemp("", "knhk-sizing-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	knhk, err := build(ctx, dir, "./server/knhk")
	if err != nil {
		return err
	}
	var all []sized
	for _, name := range []string{"r1-lean", "w1-lean"} {
		for _, rate := range sizingRates {
			fmt.Fprintf(stderr, "%s at %.0f requests a second\n", name, rate)
			s, err := sizeAt(ctx, filepath.Join(dir, fmt.Sprintf("%s-%.0f", name, rate)), knhk, name, rate, *seconds)
			if err != nil {
				return err
			}
			s.DiskDay = round(rate * 86400 * (v.BlockBytes + v.LogBytes) / 1e9)
			s.Cost = round(s.CPU/3600*pricePerCPUHour + (v.BlockBytes+v.LogBytes)*1e6/1e9*pricePerGBMonth)
			all = append(all, s)
		}
	}
	t := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "case\treq/s\tservice us/req\tcores\tRSS MB\tp50 ms\tp99 ms\tdisk GB/day\t$ per million\t")
	for _, s := range all {
		fmt.Fprintf(t, "%s\t%.0f\t%.1f\t%.3f\t%.0f\t%.2f\t%.2f\t%.2f\t%.3f\t\n", s.Case, s.Rate, s.CPU, s.Cores, s.RSS, s.P50, s.P99, s.DiskDay, s.Cost)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	j, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(*out, append(j, '\n'), 0o644)
}

// sizeAt measures one rate, with a fresh knhk and Envoy.
func sizeAt(ctx context.Context, dir, knhk, name string, rate, seconds float64) (s sized, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return s, err
	}
	cases, envoy, err := startAll(ctx, options{cases: []string{name}, knhk: knhk}, dir)
	defer func() { err = errors.Join(err, stopAll(cases, envoy)) }()
	if err != nil {
		return s, err
	}
	c := cases[0]
	cfg := load.Config{Addr: c.addr, Request: request, Conns: 64, Length: 2 * time.Second, Rate: rate}
	if _, err := load.Run(ctx, cfg); err != nil { // the first segments, the first block
		return s, err
	}
	cfg.Length = time.Duration(seconds * float64(time.Second))
	before, err := c.cpu(envoy)
	if err != nil {
		return s, err
	}
	r, err := load.Run(ctx, cfg)
	if err != nil {
		return s, err
	}
	after, err := c.cpu(envoy)
	if err != nil {
		return s, err
	}
	n := len(r.Latencies)
	if n == 0 || float64(r.Failed) > maxFailed*float64(n) {
		return s, fmt.Errorf("%s at %.0f/s: %d of %d requests failed", name, rate, r.Failed, n+r.Failed)
	}
	rss, err := c.process.RSS()
	if err != nil {
		return s, err
	}
	cpu := micros(after[1]-before[1]) / float64(n)
	return sized{
		Case: name, Rate: rate, CPU: round(cpu), Cores: round(cpu * rate / 1e6), RSS: round(float64(rss) / (1 << 20)),
		P50: round(millis(r.Quantile(0.5))), P99: round(millis(r.Quantile(0.99))),
	}, nil
}
