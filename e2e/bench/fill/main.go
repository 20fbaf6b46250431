// Command fill makes a knhk state directory with many receipts, through the log that `knhk serve` runs, in this process: DIR gets
// knhk.yaml, keys and state. It prints what processor time a receipt took, as JSON. `bench volume` builds and starts it; it is no test,
// and the receipts are of requests that never were.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/region/wal"
	"github.com/knhk/sidecar/server"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: fill DIR ADMIN-ADDRESS RECEIPTS")
		os.Exit(2)
	}
	n, err := strconv.Atoi(os.Args[3])
	if err == nil {
		err = run(context.Background(), os.Args[1], os.Args[2], n, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "fill:", err)
		os.Exit(1)
	}
}

// knhkYAML is the configuration of the log: development keys, room for every decision.
const knhkYAML = `origin: "bench.local/knhk/volume"
instance: volume
state_dir: %[1]s
listeners: {envoy: "%[2]s", admin: "%[3]s"}
insecure_loopback: true
keys:
  identity: {uri: "soft:%[4]s"}
  daily: {uri: "soft:%[4]s"}
default_route: {class: R1}
`

// filled is what this program tells, in microseconds of processor time per receipt.
type filled struct {
	CPU  float64 `json:"cpu_us"`      // all but the first tenth
	Last float64 `json:"cpu_us_last"` // over the last tenth
}

func run(ctx context.Context, dir, admin string, n int, stdout io.Writer) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	envoy, err := harness.FreeAddr()
	if err != nil {
		return err
	}
	keys := filepath.Join(dir, "keys")
	text := fmt.Sprintf(knhkYAML, strconv.Quote(filepath.Join(dir, "state")), envoy, admin, keys)
	file := filepath.Join(dir, "knhk.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return err
	}
	s, err := server.New(ctx, file, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	var f filled
	if err := record(ctx, s, n/10, 0); err != nil { // starting up is not what is measured
		return err
	}
	idle := func() time.Duration { // what the process takes in a second without requests is not the receipts' either
		begun := ownCPU()
		time.Sleep(time.Second)
		return ownCPU() - begun
	}()
	part := func(n, from int) (time.Duration, error) {
		start, begun := time.Now(), ownCPU()
		err := record(ctx, s, n, from)
		return ownCPU() - begun - time.Duration(time.Since(start).Seconds()*float64(idle)), err
	}
	first, err := part(n*8/10, n)
	if err != nil {
		return err
	}
	last, err := part(n/10, 2*n)
	if err != nil {
		return err
	}
	f.CPU, f.Last = micros(first+last)/float64(n*9/10), micros(last)/float64(n/10)
	stop()
	if err := <-done; err != nil {
		return err
	}
	return json.NewEncoder(stdout).Encode(f)
}

// fillRate is how many receipts a second are made: about what one Envoy worker can bring.
const fillRate = 20_000

// record takes n receipts from decision to a sealed outcome, from 16 callers,
// at most fillRate a second.
func record(ctx context.Context, s *server.Server, n, from int) error {
	start := time.Now()
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, 16)
	for i := range errs {
		wg.Go(func() {
			for k := next.Add(1); k <= int64(n) && errs[i] == nil; k = next.Add(1) {
				errs[i] = recordOne(ctx, s, int(k)+from)
				if k%256 == 0 { // blocks of a size that occurs
					time.Sleep(time.Until(start.Add(time.Duration(k) * time.Second / fillRate)))
				}
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	sealed := s.Receipts().Stats().Blocks
	for s.Receipts().Stats().Blocks < sealed+2 { // the block that is cut next holds the last of them
		if err := recordOne(ctx, s, 0); err != nil {
			return err
		}
		time.Sleep(50 * time.Millisecond)
	}
	return nil
}

func recordOne(ctx context.Context, s *server.Server, k int) error {
	d := receipt.Decision{Class: "R1", Verdict: "admit", Reason: "ok", Rule: "route:default", Capture: "lean", Route: "all", Cluster: "app", Tick: uint64(k)}
	err := s.Receipts().Decide(ctx, wal.Written, &d, &receipt.Request{
		Method: "GET", Scheme: "http", Authority: "shop.example.com", Path: fmt.Sprintf("/items/%d?lang=en", k),
		RequestID: fmt.Sprintf("6f1c0a52-7c1e-4b02-9a53-%012x", k), Source: "10.1.2.3:40000",
	})
	if err != nil {
		return err
	}
	return s.Receipts().Outcome(ctx, d.ID, &policy.Outcome{
		Source: "als", Result: policy.ResultComplete, Status: 200, UpstreamStatus: 200, Details: "via_upstream", Cluster: "app",
		UpstreamHost: "127.0.0.1:8080", Attempts: 1, BytesIn: 120, BytesOut: 2048, Duration: time.Duration(k%977) * 1237,
	})
}

func ownCPU() time.Duration {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		panic(err) // it cannot fail with these arguments
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
