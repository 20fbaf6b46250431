// Command lane runs every fault of e2e/fault's table at its full rounds, prints a table of them and writes fault.json. It fails
// where a round was not done, a fault was never observed, a row is missing, or a test failed. `make fault` calls it.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/knhk/sidecar/e2e/fault"
)

func main() {
	only := flag.String("run", "", "run only the tests that match this regular expression (as go test -run); faults without a row are then not missed")
	rounds := flag.String("rounds", "", "NAME=ROUNDS,...: other rounds for some faults, crash/kill-9=1000 say; never fewer than make test does")
	seed := flag.String("seed", "", "seed of every fault's chance, as a failed test has printed it")
	quick := flag.Bool("quick", false, "the rounds of make test")
	out := flag.String("out", "fault.json", "file for the rows")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "usage: lane [--run REGEXP] [--rounds NAME=N,...] [--seed N] [--quick] [--out FILE]")
		os.Exit(2)
	}
	if err := check(*rounds); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	if err := run(*only, *rounds, *seed, *out, *quick); err != nil {
		fmt.Fprintln(os.Stderr, "fault lane:", err)
		os.Exit(1)
	}
}

// check names faults of --rounds that do not exist.
func check(rounds string) error {
	if rounds == "" {
		return nil
	}
	for part := range strings.SplitSeq(rounds, ",") {
		name, _, _ := strings.Cut(part, "=")
		if _, ok := fault.Find(name); !ok {
			return fmt.Errorf("--rounds: %q: there is no such fault", name)
		}
	}
	return nil
}

func run(only, rounds, seed, out string, quick bool) (err error) {
	dir, err := os.MkdirTemp("", "knhk-fault-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	// Ctrl-C reaches the tests too, being in this process group; the table is still made of what there is.
	interrupts := make(chan os.Signal, 1)
	signal.Notify(interrupts, os.Interrupt)
	defer signal.Stop(interrupts)

	file := filepath.Join(dir, "rows")
	args := []string{"test", "-count=1", "-p", "1", "-timeout", "4h", "-v"}
	if only != "" {
		args = append(args, "-run", only)
	}
	packages, err := importers()
	if err != nil {
		return err
	}
	cmd := exec.Command("go", append(args, packages...)...)
	cmd.Env = append(os.Environ(), fault.EnvOut+"="+file, fault.EnvRounds+"="+rounds, fault.EnvSeed+"="+seed)
	if !quick {
		cmd.Env = append(cmd.Env, fault.EnvFull+"=1")
	}
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.MultiWriter(&log, progress{}), os.Stderr
	testErr := cmd.Run()

	rows, err := read(file)
	if err != nil {
		return err
	}
	problems := judge(rows, only == "", quick)
	if err := show(rows); err != nil {
		return err
	}
	body, err := json.MarshalIndent(map[string]any{"full": !quick, "faults": rows}, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(out, append(body, '\n'), 0o644); err != nil {
		return err
	}
	if testErr != nil {
		_, _ = os.Stdout.Write(log.Bytes()) // the table has been shown; this is for whoever looks for the reason
		problems = append(problems, fmt.Errorf("go test: %w", testErr))
	}
	return errors.Join(problems...)
}

// importers lists the packages whose tests count faults.
func importers() ([]string, error) {
	cmd := exec.Command("go", "list", "-f", `{{.ImportPath}} {{join .TestImports ","}} {{join .XTestImports ","}}`, "./...")
	cmd.Stderr = os.Stderr
	list, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	var packages []string
	for line := range strings.Lines(string(list)) {
		path, imports, _ := strings.Cut(strings.TrimSpace(line), " ")
		if slices.Contains(strings.FieldsFunc(imports, func(r rune) bool { return r == ',' || r == ' ' }), "github.com/knhk/sidecar/e2e/fault") {
			packages = append(packages, path)
		}
	}
	if len(packages) == 0 {
		return nil, errors.New("no test imports e2e/fault")
	}
	return packages, nil
}

// progress passes on the lines of `go test -v` that tell of faults and of tests that ended.
type progress struct{}

func (progress) Write(p []byte) (int, error) {
	for line := range strings.Lines(string(p)) {
		if l := strings.TrimSpace(line); strings.Contains(l, ": fault ") || strings.HasPrefix(l, "--- FAIL") || strings.HasPrefix(l, "ok ") {
			fmt.Println(l)
		}
	}
	return len(p), nil
}

func read(file string) ([]fault.Row, error) {
	b, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var rows []fault.Row
	for line := range strings.Lines(string(b)) {
		var row fault.Row
		if err := json.Unmarshal([]byte(line), &row); err != nil {
			return nil, fmt.Errorf("row %q: %w", line, err)
		}
		rows = append(rows, row)
	}
	place := func(r fault.Row) int {
		return slices.IndexFunc(fault.Table, func(f fault.Fault) bool { return f.Name == r.Name })
	}
	slices.SortStableFunc(rows, func(a, b fault.Row) int { return place(a) - place(b) })
	return rows, nil
}

// judge says what is wrong with the rows; all: every fault of the table must have one.
func judge(rows []fault.Row, all, quick bool) []error {
	var problems []error
	seen := map[string]bool{}
	for _, row := range rows {
		seen[row.Name] = true
		if err := row.Verdict(); err != nil {
			problems = append(problems, err)
		}
	}
	for _, f := range fault.Table {
		if all && !seen[f.Name] && (!quick || f.Test > 0) {
			problems = append(problems, fmt.Errorf("fault %s was not tested", f.Name))
		}
	}
	return problems
}

func show(rows []fault.Row) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nfault\trounds\tobserved\tas promised\tseconds\tresult\tobserved by")
	for _, r := range rows {
		result := "ok"
		if r.Verdict() != nil {
			result = "FAILED"
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%.1f\t%s\t%s\n", r.Name, r.Rounds, r.Observed, r.Done, r.Seconds, result, r.How)
	}
	return w.Flush()
}
