package fault

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func TestTable(t *testing.T) {
	names := map[string]bool{}
	form := regexp.MustCompile(`^[a-z0-9-]+/[a-z0-9-]+$`)
	for _, f := range Table {
		if !form.MatchString(f.Name) || names[f.Name] {
			t.Errorf("fault %q: want AREA/FAULT in lower case, once", f.Name)
		}
		if f.What == "" || f.Full < 1 || f.Full < f.Test || f.Test < 0 {
			t.Errorf("fault %s: What %q, Test %d, Full %d", f.Name, f.What, f.Test, f.Full)
		}
		names[f.Name] = true
	}
}

func TestRounds(t *testing.T) {
	f := Fault{Name: "a/b", Test: 2, Full: 20}
	for _, tc := range []struct {
		full     bool
		override string
		want     int
		wrong    bool
	}{
		{false, "", 2, false},
		{true, "", 20, false},
		{true, "a/b=1000", 1000, false},
		{false, "x/y=7,a/b=3", 3, false},
		{true, "a/b=1", 0, true}, // fewer than make test does
		{true, "a/b=many", 0, true},
	} {
		got, err := rounds(f, tc.full, tc.override)
		if (err != nil) != tc.wrong || err == nil && got != tc.want {
			t.Errorf("rounds(%v, %q) = %d, %v", tc.full, tc.override, got, err)
		}
	}
}

// recorder is a test that hears what a Run says of it.
type recorder struct {
	testing.TB
	errors   []string
	cleanups []func()
}

func (r *recorder) Error(args ...any)     { r.errors = append(r.errors, args[0].(error).Error()) }
func (r *recorder) Failed() bool          { return len(r.errors) > 0 }
func (r *recorder) Cleanup(f func())      { r.cleanups = append(r.cleanups, f) }
func (r *recorder) Logf(string, ...any)   {}
func (r *recorder) Helper()               {}
func (r *recorder) Fatalf(string, ...any) { panic("fatal") }

func TestRun(t *testing.T) {
	saved := Table
	defer func() { Table = saved }()
	Table = []Fault{{Name: "a/b", What: "x", Test: 2, Full: 2}}
	for _, tc := range []struct {
		name           string
		observed, done int
		want           string
	}{
		{"as it should be", 2, 2, ""},
		{"never observed", 0, 2, "never observed"},
		{"observed too seldom", 1, 2, "observed in 1 of 2"},
		{"a round missing", 2, 1, "1 of 2 rounds were done"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out := filepath.Join(t.TempDir(), "rows")
			t.Setenv(EnvOut, out)
			t.Setenv(EnvSeed, "7")
			rec := &recorder{TB: t}
			r := Begin(rec, "a/b")
			for range tc.observed {
				r.Observed("a counter")
			}
			for range tc.done {
				r.Done()
			}
			rec.cleanups[0]()
			if got := strings.Join(rec.errors, "; "); (tc.want == "") != (got == "") || !strings.Contains(got, tc.want) {
				t.Errorf("errors %q, want %q", got, tc.want)
			}
			b, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			var row Row
			if err := json.Unmarshal(b, &row); err != nil || row.Seed != 7 || row.Failed != (tc.want != "") {
				t.Errorf("row %s: %v", b, err)
			}
		})
	}
}
