// Command bench measures what knhk adds to an Envoy: requests per second, latency, processor time and memory, against
// no filter at all, a stock no-op ext_proc server and a tuned one.
//
//	go run ./e2e/bench [--rounds 5] [--seconds 3] [--cases none,stock-noop,...] [--quick] [--out bench.json]
//	go run ./e2e/bench volume [--receipts 1000000] [--out volume.json]
//	go run ./e2e/bench sizing [--seconds 10] [--out sizing.json]
//
// One real Envoy with one worker has a listener per case; every listener has the same HTTP settings and answers from a
// direct_response route, so that no upstream adds noise (xds.cluster_name is then absent). A round runs the cases one
// after another: warm-up, closed loop on --conns connections (requests per second, processor time per request), open
// loop at half the rate just measured (latency, counted from the moment a request was due). Rounds repeat, each with the
// cases in another order; figures are medians over rounds with their lowest and highest, ratios are taken within a
// round. Absolute figures of a shared machine say little, the ratios of interleaved rounds do.
//
// It promises loopback only, a bounded time, and that it ends every process it started. It is not a test: it fails only
// when it cannot measure.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/knhk/sidecar/e2e/bench/stocknoop"
	"github.com/knhk/sidecar/e2e/bench/tunednoop"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "bench:", err)
		}
		stop()
		os.Exit(1)
	}
}

// options are the flags.
type options struct {
	rounds  int
	seconds float64
	cases   []string
	conns   int
	dir     string
	out     string
	knhk    string

	maxFailed float64 // share of the requests
}

// run is the program; args[0] may be one of the servers that the bench starts as processes of their own.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) == 2 {
		servers := map[string]func(context.Context, net.Listener) error{
			"stocknoop": stocknoop.Serve, "tunednoop": tunednoop.Serve,
		}
		if serve, ok := servers[args[0]]; ok {
			l, err := net.Listen("tcp", args[1])
			if err != nil {
				return err
			}
			return serve(ctx, l)
		}
	}
	switch {
	case len(args) > 0 && args[0] == "volume":
		return measureVolume(ctx, args[1:], stdout, stderr)
	case len(args) > 0 && args[0] == "sizing":
		return measureSizing(ctx, args[1:], stdout, stderr)
	}
	opt, err := parseFlags(args, stderr)
	if err != nil {
		return err
	}
	// Twice what the rounds should take, and time to build and start.
	limit := time.Duration(float64(opt.rounds*len(opt.cases))*(opt.seconds*2+3)*2)*time.Second + 15*time.Minute
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not done after %s", limit))
	defer cancel()
	report, err := measure(ctx, opt, stderr)
	if err != nil {
		return err
	}
	report.Command = "go run ./e2e/bench " + strings.Join(args, " ")
	if err := report.print(stdout); err != nil {
		return err
	}
	return report.save(opt.out)
}

func parseFlags(args []string, stderr io.Writer) (options, error) {
	var opt options
	var cases string
	var quick bool
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.IntVar(&opt.rounds, "rounds", 5, "rounds over all cases")
	fs.Float64Var(&opt.seconds, "seconds", 3, "length of each of the two loops of a case, in seconds")
	fs.StringVar(&cases, "cases", strings.Join(caseNames(), ","), "cases to run, joined by commas")
	fs.IntVar(&opt.conns, "conns", 16, "connections of the closed loop; the open loop may use four times as many")
	fs.StringVar(&opt.dir, "dir", "", "directory for logs and state; the disk under it decides W1 (default a temporary one, removed)")
	fs.StringVar(&opt.out, "out", "bench.json", "file for the figures")
	fs.StringVar(&opt.knhk, "knhk", "", "knhk program to measure (default: built from this tree)")
	fs.BoolVar(&quick, "quick", false, "one round of one second: to see that everything works, not to measure")
	if err := fs.Parse(args); err != nil {
		return opt, err
	}
	opt.maxFailed = maxFailed
	if quick {
		opt.rounds, opt.seconds, opt.maxFailed = 1, 1, quickFailed
	}
	for name := range strings.SplitSeq(cases, ",") {
		if !slices.Contains(caseNames(), name) {
			return opt, fmt.Errorf("--cases: %q is none of %s", name, strings.Join(caseNames(), ", "))
		}
		opt.cases = append(opt.cases, name)
	}
	if opt.rounds < 1 || opt.seconds < 0.2 || opt.conns < 1 || fs.NArg() > 0 {
		return opt, errors.New("want at least one round of 0.2 seconds on one connection, and no further arguments")
	}
	return opt, nil
}
