// Package fault counts faults: how often a test was to inject one, how often something other than the code under test saw that
// it really happened, and how often what knhk promises held afterwards.
//
// It promises that rounds never shrink silently: a test that did fewer rounds than the table says, or in which a fault was never
// observed, fails. `make test` does the table's Test rounds, `make fault` the Full ones (e2e/fault/lane), which also collects
// the rows into a table and into fault.json. The package injects nothing itself; the tests beside and around it do.
package fault

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// Environment variables by which e2e/fault/lane speaks to the tests.
const (
	EnvFull   = "KNHK_FAULT_FULL"   // "1": the Full rounds
	EnvRounds = "KNHK_FAULT_ROUNDS" // "NAME=ROUNDS,...": other rounds for some faults; never fewer than Test
	EnvOut    = "KNHK_FAULT_OUT"    // file that gets a JSON line for every Row
	EnvSeed   = "KNHK_FAULT_SEED"   // seed of every Run's chance; default: a new one, logged
)

// Fault is a line of the table.
type Fault struct {
	Name string // AREA/FAULT, unique
	What string // the fault and what must hold, for the reader of the table
	Test int    // rounds in `make test`; 0: only in `make fault`
	Full int    // rounds in `make fault`; at least Test
}

// Table is every fault that is tested, in the order in which it is shown.
var Table = slices.Concat(failClosed, failOpen, authzClosed, authzOpen, crash, storage, peers, restart, keys)

// Row is what a Run came to.
type Row struct {
	Name     string  `json:"name"`
	What     string  `json:"what"`
	Rounds   int     `json:"rounds"`   // that were to be done
	Done     int     `json:"done"`     // rounds after which everything was as promised
	Observed int     `json:"observed"` // rounds in which the fault was seen to have happened
	How      string  `json:"how"`      // what saw it
	Seed     uint64  `json:"seed"`
	Seconds  float64 `json:"seconds"`
	Failed   bool    `json:"failed"`
	// Figures are what a fault's test measured beside: records lost and declared, say.
	Figures map[string]float64 `json:"figures,omitempty"`
}

// Run is one fault under test. Its methods may be called from several goroutines.
type Run struct {
	t     testing.TB
	seed  uint64
	begun time.Time

	mu  sync.Mutex
	row Row
}

// Find returns the table's line of that name.
func Find(name string) (Fault, bool) {
	i := slices.IndexFunc(Table, func(f Fault) bool { return f.Name == name })
	if i < 0 {
		return Fault{}, false
	}
	return Table[i], true
}

// Begin starts counting a fault of the table, and has the test fail at its end unless every round was done and the fault was
// observed in each. With no rounds in this run (Test is 0 and EnvFull is not set) the test is skipped.
func Begin(t testing.TB, name string) *Run {
	t.Helper()
	f, ok := Find(name)
	if !ok {
		t.Fatalf("fault %q is not in the table", name)
	}
	rounds, err := rounds(f, os.Getenv(EnvFull) == "1", os.Getenv(EnvRounds))
	if err != nil {
		t.Fatal(err)
	}
	if rounds == 0 {
		t.Skipf("fault %s: %d rounds in make fault, none here", name, f.Full)
	}
	r := &Run{t: t, seed: rand.Uint64(), begun: time.Now(), row: Row{Name: f.Name, What: f.What, Rounds: rounds}}
	if s := os.Getenv(EnvSeed); s != "" {
		if r.seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("%s: %v", EnvSeed, err)
		}
	}
	r.row.Seed = r.seed
	t.Logf("fault %s: %d rounds, %s=%d", name, rounds, EnvSeed, r.seed)
	t.Cleanup(r.end)
	return r
}

// rounds says how many rounds a run does.
func rounds(f Fault, full bool, override string) (int, error) {
	n := f.Test
	if full {
		n = f.Full
	}
	for part := range strings.SplitSeq(override, ",") {
		name, count, ok := strings.Cut(part, "=")
		if !ok || name != f.Name {
			continue
		}
		k, err := strconv.Atoi(count)
		if err != nil || k < max(f.Test, 1) {
			return 0, fmt.Errorf("%s: %s: want a number from %d", EnvRounds, part, max(f.Test, 1))
		}
		n = k
	}
	return n, nil
}

// Rounds is how many rounds are to be done.
func (r *Run) Rounds() int { return r.row.Rounds }

// Rand returns this run's chance; the same seed gives the same.
func (r *Run) Rand() *rand.Rand { return rand.New(rand.NewPCG(r.seed, 0)) }

// Observed says that in this round the fault has happened, as seen by how: a counter, an exit status, an errno, never only the
// code that was to bear it. At most one call a round.
func (r *Run) Observed(how string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.row.Observed++
	r.row.How = how
}

// Done ends a round in which everything was as promised.
func (r *Run) Done() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.row.Done++
}

// Add adds to a figure that the row shows.
func (r *Run) Add(figure string, n float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.row.Figures == nil {
		r.row.Figures = map[string]float64{}
	}
	r.row.Figures[figure] += n
}

// Max raises a figure that the row shows to n.
func (r *Run) Max(figure string, n float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.row.Figures == nil {
		r.row.Figures = map[string]float64{}
	}
	r.row.Figures[figure] = max(r.row.Figures[figure], n)
}

// Verdict says what is wrong with a row, or nothing.
func (row *Row) Verdict() error {
	switch {
	case row.Observed == 0:
		return fmt.Errorf("fault %s was never observed", row.Name)
	case row.Done < row.Rounds:
		return fmt.Errorf("fault %s: %d of %d rounds were done", row.Name, row.Done, row.Rounds)
	case row.Observed < row.Rounds:
		return fmt.Errorf("fault %s was observed in %d of %d rounds", row.Name, row.Observed, row.Rounds)
	case row.Failed:
		return fmt.Errorf("fault %s: the test failed", row.Name)
	}
	return nil
}

func (r *Run) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.row.Seconds = time.Since(r.begun).Seconds()
	r.row.Failed = r.t.Failed()
	if err := r.row.Verdict(); err != nil && !r.row.Failed {
		r.t.Error(err)
		r.row.Failed = true
	}
	r.t.Logf("fault %s: %d of %d rounds as promised, observed %d times by %s %v", r.row.Name, r.row.Done, r.row.Rounds, r.row.Observed,
		r.row.How, slices.Sorted(maps.Keys(r.row.Figures)))
	if out := os.Getenv(EnvOut); out != "" {
		if err := appendRow(out, r.row); err != nil {
			r.t.Error(err)
		}
	}
}

func appendRow(file string, row Row) error {
	line, err := json.Marshal(row)
	if err != nil {
		return fmt.Errorf("fault row: %w", err)
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return fmt.Errorf("fault row: %w", err)
	}
	defer f.Close()
	if _, err := f.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("fault row: %w", err)
	}
	return nil
}
