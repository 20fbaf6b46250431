package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

const (
	showFirst = 80   // lines of a failed test that are shown: so many of its first
	showLast  = 120  // and of its last
	showWidth = 4000 // bytes of a line
	keepLines = 4000 // of a test, until it is known to be worth showing: its first showFirst and the last of the others
)

// result is what a lane came to.
type result struct {
	name                    string
	passed, failed, skipped int // tests
	took                    time.Duration
	reasons                 []string
	broken                  string // why the run itself failed, or ""
	packages                map[string]*pkg
}

// pkg is one package's run.
type pkg struct {
	name   string
	ended  bool
	failed bool
	build  bool // it does not build
	flaky  bool // failed, passed when it was run once more
	again  *pkg // the second run, when that failed too
	tests  map[string]*test
}

// test is one test's run; the name "" stands for what belongs to no test.
type test struct {
	name   string
	failed bool
	ended  bool
	log    lines
}

// lines keeps a test's output within bounds.
type lines struct {
	kept    []string
	dropped int
}

func (l *lines) add(s string) {
	if len(s) > showWidth {
		s = fmt.Sprintf("%s... (%d bytes more)\n", s[:showWidth], len(s)-showWidth)
	}
	if len(l.kept) >= keepLines {
		n := keepLines / 2
		l.kept = slices.Delete(l.kept, showFirst, showFirst+n)
		l.dropped += n
	}
	l.kept = append(l.kept, s)
}

// show writes at most showFirst + showLast lines.
func (l *lines) show(w io.Writer) {
	for i, s := range l.kept {
		left := len(l.kept) - showFirst - showLast
		if left > 0 && i == showFirst {
			fmt.Fprintf(w, "    ... %d lines ...\n", left+l.dropped)
		}
		if left <= 0 || i < showFirst || i >= showFirst+left {
			fmt.Fprint(w, s)
			if !strings.HasSuffix(s, "\n") && i == len(l.kept)-1 {
				fmt.Fprintln(w)
			}
		}
	}
}

func (r *result) pkg(name string) *pkg {
	if r.packages == nil {
		r.packages = map[string]*pkg{}
	}
	p := r.packages[name]
	if p == nil {
		p = &pkg{name: name, tests: map[string]*test{}}
		r.packages[name] = p
	}
	return p
}

func (p *pkg) test(name string) *test {
	t := p.tests[name]
	if t == nil {
		t = &test{name: name}
		p.tests[name] = t
	}
	return t
}

// event is a line of go test -json (cmd/test2json, and cmd/go for builds).
type event struct {
	Action, Package, ImportPath, Test, Output, FailedBuild string
	Elapsed                                                float64
}

// read takes in the output of go test -json to its end. A line may have any length: a reader that gave up on a long one would
// leave go test waiting for it for ever.
func (r *result) read(out io.Reader) {
	b := bufio.NewReaderSize(out, 1<<16)
	for {
		line, err := b.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) == nil {
				r.take(&e)
			} else {
				fmt.Printf("%s", line)
			}
		}
		if err != nil {
			return
		}
	}
}

func (r *result) take(e *event) {
	if e.Action == "build-output" {
		fmt.Print(e.Output) // at once: it is short, and what does not build is all there is to know
		return
	}
	if e.Package == "" {
		return
	}
	p := r.pkg(e.Package)
	t := p.test(e.Test)
	switch e.Action {
	case "output":
		t.log.add(e.Output)
	case "pass", "skip":
		t.ended = true
		switch {
		case e.Test == "":
			p.ended = true
			if e.Action == "pass" {
				fmt.Printf("ok   %s %.1fs\n", e.Package, e.Elapsed)
			}
		case e.Action == "pass":
			r.passed++
		default:
			r.skipped++
			r.reasons = append(r.reasons, e.Test+": "+reason(t.log.kept))
		}
		t.log = lines{}
	case "fail":
		t.ended, t.failed = true, true
		if e.Test != "" {
			r.failed++
			fmt.Printf("FAIL %s %s %.1fs\n", e.Package, e.Test, e.Elapsed)
			return
		}
		p.ended, p.failed, p.build = true, true, e.FailedBuild != ""
		fmt.Printf("FAIL %s %.1fs\n", e.Package, e.Elapsed)
	}
}

// failedPackages are those that failed or did not come to their end, by name.
func (r *result) failedPackages() []*pkg {
	var list []*pkg
	for _, p := range r.packages {
		if p.failed || !p.ended {
			list = append(list, p)
		}
	}
	slices.SortFunc(list, func(a, b *pkg) int { return strings.Compare(a.name, b.name) })
	return list
}

// failedTests are the package's tests that failed or did not end, then what belongs to no test; a test whose subtest failed comes
// after that.
func (p *pkg) failedTests() []*test {
	var list []*test
	for _, t := range p.tests {
		if t.name != "" && (t.failed || !t.ended) {
			list = append(list, t)
		}
	}
	slices.SortFunc(list, func(a, b *test) int {
		if n := strings.Count(b.name, "/") - strings.Count(a.name, "/"); n != 0 {
			return n
		}
		return strings.Compare(a.name, b.name)
	})
	if t := p.tests[""]; t != nil {
		list = append(list, t)
	}
	return list
}

// certain says why a failure is not to be tried again: what the machine's speed cannot bring about.
func (p *pkg) certain() string {
	if p.build {
		return "it does not build"
	}
	for _, t := range p.failedTests() {
		for _, l := range t.log.kept {
			for _, sign := range []string{"WARNING: DATA RACE", "fatal error: ", "SIGSEGV", "panic: "} {
				if strings.Contains(l, sign) && !strings.Contains(l, "panic: test timed out") {
					return strings.TrimSpace(l)
				}
			}
		}
	}
	return ""
}

// report writes what the lanes came to, failures last, and says whether all is well.
func report(w io.Writer, results []*result) bool {
	ok := len(results) > 0
	var names []string
	for _, r := range results {
		for _, p := range r.failedPackages() {
			word := "FAIL"
			if p.flaky {
				word = "FLAKY"
			} else {
				ok = false
			}
			for run, q := range []*pkg{p, p.again} {
				if q == nil {
					continue
				}
				for _, t := range q.failedTests() {
					what := strings.TrimSuffix(q.name+" "+t.name, " ")
					if !t.ended {
						what += " (did not end)"
					}
					if run == 1 {
						what += " (again)"
					}
					if len(t.log.kept) > 0 {
						fmt.Fprintf(w, "\n=== %s %s: %s\n", word, r.name, what)
						t.log.show(w)
					}
					if t.name != "" || len(q.failedTests()) == 1 {
						names = append(names, fmt.Sprintf("%-5s %s: %s", word, r.name, what))
					}
				}
				if len(q.tests) == 0 {
					names = append(names, fmt.Sprintf("%-5s %s: %s", word, r.name, q.name))
				}
			}
		}
		if r.broken != "" {
			ok = false
			names = append(names, fmt.Sprintf("FAIL  %s: %s", r.name, r.broken))
		}
		if r.passed == 0 {
			ok = false
			names = append(names, fmt.Sprintf("FAIL  %s: no test passed", r.name))
		}
	}
	fmt.Fprintln(w)
	for _, r := range results {
		fmt.Fprintf(w, "%s: %d passed, %d failed, %d skipped\n", r.name, r.passed, r.failed, r.skipped)
		for _, why := range r.reasons {
			fmt.Fprintf(w, "    skipped %s\n", why)
		}
		fmt.Fprintf(w, "    in %v\n", r.took.Round(time.Second))
	}
	if !ok {
		fmt.Fprintln(w, "FAILED")
	}
	for _, n := range names {
		fmt.Fprintln(w, n)
	}
	return ok
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
