// Command mutants tests the tests. It copies the tree, changes one line of the product at a time (takes out an fsync, a lock, a
// check), and runs the one test that must then fail. It prints a line for each mutation, writes mutants.json, and fails when a
// mutation survives, no longer fits the source, does not compile, or names a test that fails without it. `make mutants` calls it.
//
// The table is table.go. A mutation is killed only by a failure of the test that it names, never by one of the compiler. Each
// call in the product that makes something durable has a mutation; the package's own test counts them. What Pebble and Tessera
// sync on their own (their logs, manifests, tables, tiles and checkpoints) stands in dependencies and is not ours to take out: that we
// ask them for it is (pebble.Sync, the wait for an added leaf).
//
// It changes nothing in the tree it is started in, but for mutants.json.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"
)

// testTimeout bounds one run of a named test. A mutant may well make one hang; that is a failure too.
const testTimeout = 3 * time.Minute

func main() {
	only := flag.String("run", "", "run only the mutations whose name matches this regular expression")
	jobs := flag.Int("jobs", 2, "how many are tried at once; each job has its own copy of the tree")
	out := flag.String("out", "mutants.json", "file for the rows")
	list := flag.Bool("list", false, "list the mutations and the tests that must fail, and run nothing")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: mutants [--run REGEXP] [--jobs N] [--out FILE] [--list]\n\n"+
			"Takes out one safeguard of the product at a time and runs the test that must then fail.")
		flag.PrintDefaults()
	}
	flag.Parse()
	re, err := regexp.Compile(*only)
	if err != nil || flag.NArg() > 0 || *jobs < 1 {
		flag.Usage()
		os.Exit(2)
	}
	var chosen []mutation
	for _, m := range mutations {
		if re.MatchString(m.name) {
			chosen = append(chosen, m)
		}
	}
	if *list {
		for _, m := range chosen {
			fmt.Printf("%-36s %-26s %s\n", m.name, m.pkg, m.test)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err = run(ctx, chosen, *jobs, *out)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

// row is what became of one mutation.
type row struct {
	Mutation string  `json:"mutation"`
	File     string  `json:"file"`
	Test     string  `json:"test"` // package and name
	Result   string  `json:"result"`
	Seconds  float64 `json:"seconds"`
	Detail   string  `json:"detail,omitempty"`

	output string
}

// What can become of a mutation. Only the first is good.
const (
	killed   = "killed"
	survived = "SURVIVED"
	broken   = "BROKEN" // says nothing about the test
)

func run(ctx context.Context, chosen []mutation, jobs int, out string) error {
	if len(chosen) == 0 {
		return errors.New("--run matches no mutation")
	}
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "knhk-mutants-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }() // in the temporary folder, whatever is left
	begin := time.Now()
	// One compilation serves neighbours: jobs take whole packages.
	slices.SortStableFunc(chosen, func(a, b mutation) int { return cmp.Compare(a.pkg, b.pkg) })
	rows := make([]row, len(chosen))
	work := make(chan []int, len(chosen))
	for i, m := range chosen {
		if i == 0 || m.pkg != chosen[i-1].pkg {
			var group []int
			for k := i; k < len(chosen) && chosen[k].pkg == m.pkg; k++ {
				group = append(group, k)
			}
			for part := range slices.Chunk(group, max(4, (len(group)+jobs-1)/jobs)) {
				work <- part
			}
		}
	}
	close(work)
	var wg sync.WaitGroup
	errs := make([]error, jobs)
	for j := range jobs {
		wg.Go(func() {
			b := bench{root: filepath.Join(dir, fmt.Sprint("tree", j)), ok: map[string]error{}}
			if errs[j] = copyTree(ctx, root, b.root); errs[j] != nil {
				return
			}
			for part := range work {
				for _, i := range part {
					if ctx.Err() != nil {
						return
					}
					rows[i] = b.try(ctx, &chosen[i])
					fmt.Printf("%-9s %-36s %s (%.1f s)\n", rows[i].Result, rows[i].Mutation, rows[i].Test, rows[i].Seconds)
				}
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errors.Join(errs...), ctx.Err()); err != nil {
		return err
	}
	show(rows, time.Since(begin))
	body, err := json.MarshalIndent(map[string]any{"seconds": time.Since(begin).Seconds(), "mutants": rows}, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(out, append(body, '\n'), 0o644); err != nil {
		return err
	}
	bad := 0
	for _, r := range rows {
		if r.Result != killed {
			bad++
		}
	}
	if bad > 0 {
		return fmt.Errorf("%d of %d were not killed", bad, len(rows))
	}
	return nil
}

// copyTree copies what git tracks, and what it would, from root to dir.
func copyTree(ctx context.Context, root, dir string) error {
	cmd := exec.CommandContext(ctx, "git", "-C", root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	cmd.Stderr = os.Stderr
	list, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("git ls-files: %w", err)
	}
	for name := range strings.SplitSeq(strings.Trim(string(list), "\x00"), "\x00") {
		info, err := os.Lstat(filepath.Join(root, name))
		if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
			continue // removed, or a link
		}
		if err != nil {
			return err
		}
		b, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			return err
		}
		to := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, b, info.Mode().Perm())); err != nil {
			return err
		}
	}
	// Envoy is found here by the tests that need it.
	if _, err := os.Stat(filepath.Join(root, ".venv")); err == nil {
		return os.Symlink(filepath.Join(root, ".venv"), filepath.Join(dir, ".venv"))
	}
	return nil
}

// bench is one copy of the tree. One goroutine uses it.
type bench struct {
	root string
	ok   map[string]error // by package and test: what the unchanged tree says of it
}

// try applies m, runs its test and takes m back.
func (b *bench) try(ctx context.Context, m *mutation) row {
	r := row{Mutation: m.name, File: m.file, Test: "./" + m.pkg + " " + m.test, Result: broken}
	original, mutated, err := m.applyIn(b.root)
	if err != nil {
		r.Detail = err.Error()
		return r
	}
	// A test that fails anyway kills nothing.
	if _, tried := b.ok[r.Test]; !tried {
		res := b.test(ctx, m)
		switch {
		case res.err != nil:
			b.ok[r.Test] = res.err
		case res.failed:
			b.ok[r.Test] = errors.New("the test fails without any mutation")
			r.output = res.output
		default:
			b.ok[r.Test] = nil
		}
	}
	if err := b.ok[r.Test]; err != nil {
		r.Detail = err.Error()
		return r
	}
	path := filepath.Join(b.root, m.file)
	if err := os.WriteFile(path, mutated, 0o644); err != nil {
		r.Detail = err.Error()
		return r
	}
	begin := time.Now()
	res := b.test(ctx, m)
	r.Seconds, r.output = time.Since(begin).Seconds(), res.output
	if err := os.WriteFile(path, original, 0o644); err != nil {
		r.Detail = err.Error()
		return r
	}
	switch {
	case res.err != nil:
		r.Detail = res.err.Error()
	case res.failed:
		r.Result, r.Detail = killed, res.why
	default:
		r.Result = survived
	}
	return r
}

// result is one run of a test. err means that it says nothing: it did not compile, or there is no such test.
type result struct {
	failed bool
	why    string // the line that failed it, as far as that can be told
	output string
	err    error
}

func (b *bench) test(ctx context.Context, m *mutation) result {
	ctx, cancel := context.WithTimeout(ctx, testTimeout+time.Minute)
	defer cancel()
	binary := filepath.Join(b.root, "mutant.test")
	build := exec.CommandContext(ctx, "go", "test", "-c", "-vet=off", "-o", binary, "./"+m.pkg)
	build.Dir = b.root
	if out, err := build.CombinedOutput(); err != nil {
		return result{err: fmt.Errorf("does not compile: %w\n%s", err, out), output: string(out)}
	}
	pattern := make([]string, 0, 2)
	for part := range strings.SplitSeq(m.test, "/") {
		pattern = append(pattern, "^"+regexp.QuoteMeta(part)+"$")
	}
	cmd := exec.CommandContext(ctx, binary, "-test.run", strings.Join(pattern, "/"), "-test.v", "-test.failfast",
		"-test.timeout", testTimeout.String())
	cmd.Dir = filepath.Join(b.root, m.pkg)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	err := cmd.Run()
	res := result{output: log.String()}
	var exit *exec.ExitError
	switch {
	case !strings.Contains(res.output, "=== RUN   "+m.test+"\n"):
		res.err = fmt.Errorf("no test %s ran", m.test)
	case strings.Contains(res.output, "--- SKIP: "+m.test+" "):
		res.err = fmt.Errorf("%s was skipped", m.test)
	case err == nil:
	case errors.As(err, &exit):
		res.failed, res.why = true, reason(res.output)
	default:
		res.err = err
	}
	return res
}

// complaint is a line by which a test says what is wrong.
var complaint = regexp.MustCompile(`^\s+(\w+_test\.go:\d+: .*)$|^(panic: .*)$`)

// reason returns the last complaint before the test ended: earlier ones may be log lines.
func reason(output string) string {
	var last string
	for line := range strings.Lines(output) {
		if m := complaint.FindStringSubmatch(strings.TrimRight(line, "\n")); m != nil {
			last = cmp.Or(m[1], m[2])
		}
	}
	if len(last) > 200 {
		last = last[:200] + "..."
	}
	return last
}

func show(rows []row, took time.Duration) {
	for _, r := range rows {
		switch r.Result {
		case survived:
			fmt.Printf("\n%s survived %s\n", r.Mutation, r.Test)
		case broken:
			fmt.Printf("\n%s: %s\n%s", r.Mutation, r.Detail, tail(r.output))
		}
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nmutation\ttest\tresult\tseconds")
	n := 0
	for _, r := range rows {
		fmt.Fprintf(w, "%s\t%s\t%s\t%.1f\n", r.Mutation, r.Test, r.Result, r.Seconds)
		if r.Result == killed {
			n++
		}
	}
	_ = w.Flush() // to standard output
	fmt.Printf("\n%d of %d killed in %v\n", n, len(rows), took.Round(time.Second))
}

// tail is the end of a long output.
func tail(s string) string {
	if len(s) > 4000 {
		return "...\n" + s[len(s)-4000:]
	}
	return s
}
