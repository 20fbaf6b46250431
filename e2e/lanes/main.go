// Command lanes runs the project's tests lane by lane and ends with a line for each: how many passed, failed and were skipped,
// and why those were skipped. `make test` calls it.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"
)

// lane is one run of go test.
type lane struct {
	name string
	args []string
}

// The race lane holds the packages whose code many goroutines share. End-to-end tests run one after the other: they measure
// nothing, but each starts an Envoy.
var lanes = []lane{
	{"packages", []string{"-timeout", "10m", "PACKAGES"}},
	{"race", []string{"-race", "-short", "-timeout", "10m", "./crypto/hsm/...", "./crypto/soft/...", "./policy/beat/...", "./region/...",
		"./server/admit/...", "./server/extproc/...", "./server/accesslog/..."}},
	{"envoy", []string{"-timeout", "12m", "-p", "1", "./e2e/..."}},
}

type result struct {
	name                    string
	passed, failed, skipped int
	took                    time.Duration
	reasons                 []string
	broken                  bool // go test itself failed: a build error, say
}

func main() {
	only := os.Args[1:]
	var results []result
	for _, l := range lanes {
		if len(only) > 0 && !contains(only, l.name) {
			continue
		}
		fmt.Printf("--- lane %s\n", l.name)
		results = append(results, run(l))
	}
	fmt.Println()
	ok := true
	for _, r := range results {
		fmt.Printf("%s: %d passed, %d failed, %d skipped\n", r.name, r.passed, r.failed, r.skipped)
		for _, why := range r.reasons {
			fmt.Printf("    skipped %s\n", why)
		}
		fmt.Printf("    in %v\n", r.took.Round(time.Second))
		ok = ok && r.failed == 0 && !r.broken && r.passed > 0
	}
	if !ok {
		fmt.Println("FAILED")
		os.Exit(1)
	}
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

// packages lists everything but the end-to-end tests.
func packages() []string {
	out, err := exec.Command("go", "list", "./...").Output()
	if err != nil {
		fmt.Fprintln(os.Stderr, "go list:", err)
		os.Exit(1)
	}
	var list []string
	for _, p := range strings.Fields(string(out)) {
		if !strings.Contains(p, "/e2e") {
			list = append(list, p)
		}
	}
	return list
}

func run(l lane) result {
	args := []string{"test", "-json"}
	for _, a := range l.args {
		if a == "PACKAGES" {
			args = append(args, packages()...)
			continue
		}
		args = append(args, a)
	}
	start := time.Now()
	cmd := exec.Command("go", args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "go test:", err)
		os.Exit(1)
	}
	r := result{name: l.name}
	logs := map[string][]string{} // output by test, until it is known to be worth showing
	sc := bufio.NewScanner(out)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		var e struct{ Action, Package, Test, Output string }
		if json.Unmarshal(sc.Bytes(), &e) != nil {
			continue
		}
		key := e.Package + " " + e.Test
		switch e.Action {
		case "output", "build-output":
			logs[key] = append(logs[key], e.Output)
			if e.Action == "build-output" {
				fmt.Print(e.Output)
			}
		case "pass":
			if e.Test == "" {
				fmt.Printf("ok   %s\n", e.Package)
			} else {
				r.passed++
			}
			delete(logs, key)
		case "skip":
			if e.Test != "" {
				r.skipped++
				r.reasons = append(r.reasons, e.Test+": "+reason(logs[key]))
			}
		case "fail":
			fmt.Printf("FAIL %s\n%s", key, strings.Join(logs[key], ""))
			if e.Test != "" {
				r.failed++
			}
		}
	}
	r.broken = cmd.Wait() != nil
	r.took = time.Since(start)
	return r
}

// reason finds what a skipped test said.
func reason(lines []string) string {
	for i := len(lines) - 1; i >= 0; i-- {
		if l := strings.TrimSpace(lines[i]); l != "" && !strings.HasPrefix(l, "---") && !strings.HasPrefix(l, "===") {
			return l
		}
	}
	return "no reason given"
}
