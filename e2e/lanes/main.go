// Command lanes runs the project's tests lane by lane and ends with a line for each: how many passed, failed and were skipped,
// and why those were skipped. `make test` calls it.
//
// It promises to end, whatever the tests do: every lane has a hard limit, at which everything it started is first asked for its
// goroutines and then killed, and a line of output may be as long as it likes. What failed stands last: the output of each failed
// test (cut in the middle when it is long), then a list of their names as the very last lines.
//
// A package that failed is run once more, alone. If it passes then, it is named FLAKY, its first output is shown all the same, and
// the lane passes; a data race, a crash and a package that does not build are never called flaky, and when more than a few packages
// fail, none is tried again.
package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/knhk/sidecar/e2e/witnesses"
)

// lane is one run of go test.
type lane struct {
	name  string
	args  []string
	limit time.Duration // hard, for the first run; a package's own limit is go test's -timeout
}

// packageLimit bounds one package: generous, since a package that hangs would else take its lane's limit.
const packageLimit = 15 * time.Minute

// retries is how many failed packages of a lane may be tried once more.
const retries = 4

// The race lane holds the packages whose code many goroutines share. End-to-end tests run one after the other: they measure
// nothing, but each starts an Envoy.
var lanes = []lane{
	{"packages", []string{"PACKAGES"}, 30 * time.Minute},
	{"race", []string{"-race", "-short", "./crypto/hsm/...", "./crypto/kms/...", "./crypto/rotation/...", "./crypto/soft/...", "./crypto/spiffe/...", "./policy/beat/...",
		"./region/...", "./server/access/...", "./server/admit/...", "./server/control/...", "./server/extauthz/...", "./server/extproc/...", "./server/accesslog/..."}, 30 * time.Minute},
	{"envoy", []string{"-p", "1", "./e2e/..."}, 40 * time.Minute},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	only := os.Args[1:]
	for _, name := range only {
		if !slices.ContainsFunc(lanes, func(l lane) bool { return l.name == name }) {
			fmt.Fprintf(os.Stderr, "lanes: no lane %q\n", name)
			os.Exit(2)
		}
	}
	prepare(ctx)
	var results []*result
	for _, l := range lanes {
		if len(only) > 0 && !slices.Contains(only, l.name) || ctx.Err() != nil {
			continue
		}
		fmt.Printf("--- lane %s\n", l.name)
		results = append(results, run(ctx, l))
	}
	ok := report(os.Stdout, results)
	if ctx.Err() != nil {
		fmt.Println("FAILED: interrupted")
		ok = false
	}
	if !ok {
		os.Exit(1)
	}
}

// prepare builds the programs that tests build and run. Here it takes as long as it takes; in a test, with a cold cache and a busy
// machine, it would count against that package's limit. What cannot be built here says so again in the test that needs it.
func prepare(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Minute)
	defer cancel()
	if _, err := witnesses.Build(ctx); err != nil {
		fmt.Printf("--- %v\n", err)
	}
	for _, b := range []struct {
		dir, pkg string
		env      []string
	}{
		{".", "./server/knhk", nil},
		{".", "./server/knhk", []string{"CGO_ENABLED=0"}},
		{"e2e/tools/witness", ".", nil},
	} {
		begun := time.Now()
		cmd := exec.CommandContext(ctx, "go", "build", "-o", os.DevNull, b.pkg)
		cmd.Dir, cmd.Env = b.dir, append(os.Environ(), b.env...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			fmt.Printf("--- build %s/%s %v: %v\n%s", b.dir, b.pkg, b.env, err, out)
			continue
		}
		fmt.Printf("--- built %s/%s %v in %v\n", b.dir, b.pkg, b.env, time.Since(begun).Round(time.Second))
	}
}

// packages lists everything but the end-to-end tests.
func packages() ([]string, error) {
	out, err := exec.Command("go", "list", "./...").Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	var list []string
	for _, p := range strings.Fields(string(out)) {
		if !strings.Contains(p, "/e2e") {
			list = append(list, p)
		}
	}
	return list, nil
}

// run runs a lane, and what failed in it once more.
func run(ctx context.Context, l lane) *result {
	var flags, targets []string
	for i, a := range l.args {
		switch {
		case a == "PACKAGES":
			list, err := packages()
			if err != nil {
				return &result{name: l.name, broken: err.Error()}
			}
			targets = append(targets, list...)
		case strings.HasPrefix(a, "-") || i > 0 && l.args[i-1] == "-p":
			flags = append(flags, a)
		default:
			targets = append(targets, a)
		}
	}
	flags = append(flags, "-timeout", packageLimit.String())
	r := &result{name: l.name}
	begun := time.Now()
	defer func() { r.took = time.Since(begun) }()
	r.broken = r.goTest(ctx, l.limit, append(flags, targets...))
	failed := r.failedPackages()
	if ctx.Err() != nil || r.broken != "" || len(failed) == 0 || len(failed) > retries {
		return r
	}
	for _, p := range failed {
		if why := p.certain(); why != "" {
			fmt.Printf("not tried again: %s: %s\n", p.name, why)
			continue
		}
		fmt.Printf("once more, alone: %s\n", p.name)
		again := &result{name: l.name}
		broken := again.goTest(ctx, packageLimit+time.Minute, append(flags, "-count=1", p.name))
		if broken == "" && len(again.failedPackages()) == 0 && again.passed > 0 {
			p.flaky = true
			continue
		}
		p.again = again.packages[p.name]
	}
	return r
}

// goTest runs go test and takes in what it says. It returns what is wrong with the run itself, beside tests that failed.
func (r *result) goTest(ctx context.Context, limit time.Duration, args []string) string {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not done after %v, the lane's limit", limit))
	defer cancel()
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	// A process group of its own, so that what the tests started ends with them.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return fmt.Sprintf("go test: %v", err)
	}
	done := make(chan struct{})
	killed := make(chan struct{})
	go func() {
		defer close(killed)
		select {
		case <-done:
		case <-ctx.Done():
			fmt.Printf("--- %v: ending everything\n", context.Cause(ctx))
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGQUIT) // Go programs show their goroutines
			select {
			case <-done:
			case <-time.After(20 * time.Second):
			}
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		}
	}()
	r.read(out)
	close(done)
	err = cmd.Wait()
	<-killed
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx).Error()
	case err != nil && len(r.failedPackages()) == 0:
		return fmt.Sprintf("go test: %v", err)
	}
	return ""
}
