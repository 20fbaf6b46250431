package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func testRoot(t *testing.T) string {
	t.Helper()
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// TestTable: every mutation still fits the source, and names a test that exists.
func TestTable(t *testing.T) {
	root := testRoot(t)
	names := map[string]bool{}
	tests := map[string]string{} // sources of a package's tests
	for _, m := range mutations {
		if names[m.name] {
			t.Errorf("%s stands twice in the table", m.name)
		}
		names[m.name] = true
		if _, _, err := m.applyIn(root); err != nil {
			t.Error(err)
		}
		if _, ok := tests[m.pkg]; !ok {
			files, err := filepath.Glob(filepath.Join(root, m.pkg, "*_test.go"))
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range files {
				b, err := os.ReadFile(f)
				if err != nil {
					t.Fatal(err)
				}
				tests[m.pkg] += string(b)
			}
		}
		name, _, _ := strings.Cut(m.test, "/")
		if !strings.Contains(tests[m.pkg], "\nfunc "+name+"(t *testing.T)") {
			t.Errorf("%s: %s has no test %s", m.name, m.pkg, name)
		}
	}
}

// TestEverySync: each call in the product that makes something durable is taken out by exactly one mutation.
func TestEverySync(t *testing.T) {
	root := testRoot(t)
	total := 0
	if err := productSources(root, func(name string, source []byte) error {
		sites, err := syncSites(name, source)
		if err != nil {
			return err
		}
		total += len(sites)
		for _, at := range sites {
			var by []string
			for _, m := range mutations {
				if m.file != name {
					continue
				}
				mutated, err := m.apply(source)
				if err != nil {
					return err
				}
				left, err := syncSites(name, mutated)
				if err != nil {
					return err
				}
				if from := strings.Index(string(source), m.old); len(left) == len(sites)-1 && from <= at && at < from+len(m.old) {
					by = append(by, m.name)
				}
			}
			line := 1 + strings.Count(string(source[:at]), "\n")
			if len(by) != 1 {
				t.Errorf("%s:%d makes something durable, and the mutations that take it out are %v: want one", name, line, by)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if total < 15 {
		t.Errorf("%d calls found: the search finds too little", total)
	}
	t.Logf("%d calls, each with its mutation", total)
}

func TestSyncSites(t *testing.T) {
	const head = "package p\nfunc f() error {\n"
	for body, want := range map[string]int{
		"return g.Sync()":                                    1,
		"return b.Commit(pebble.Sync)":                       1,
		"return b.Commit(pebble.NoSync)":                     0,
		"return errors.Join(syncDir(d), nil)":                1,
		"f.Sync(); return unix.Fdatasync(3)":                 2,
		"return nil // f.Sync()":                             0,
		"x, err := os.OpenFile(n, os.O_SYNC, 0); return err": 1,
		"return s.Synchronise()":                             0,
	} {
		sites, err := syncSites("p.go", []byte(head+body+"\n}\n"))
		if err != nil || len(sites) != want {
			t.Errorf("%s: %d sites, %v; want %d", body, len(sites), err, want)
		}
	}
}

func TestApply(t *testing.T) {
	m := mutation{name: "m", file: "p.go", old: "x > 0", new: "true"}
	for source, want := range map[string]string{
		"package p\nvar y = x > 0\n":                "package p\nvar y = true\n",
		"package p\nvar y = x\n":                    "",
		"package p\nvar y = x > 0\nvar z = x > 0\n": "",
	} {
		if got, err := m.apply([]byte(source)); string(got) != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", source, got, err)
		}
	}
	same := mutation{old: "x", new: "x"}
	if _, err := same.apply([]byte("package x")); err == nil {
		t.Error("a mutation that changes nothing was applied")
	}
	wrong := mutation{old: "x", new: "}"}
	if _, err := wrong.apply([]byte("package x")); err == nil {
		t.Error("a mutation that does not parse was applied")
	}
}

func TestReason(t *testing.T) {
	const output = "=== RUN   TestX\n    x_test.go:7: a log line\n    x_test.go:9: got 1, want 2\n--- FAIL: TestX (0.00s)\nFAIL\n"
	if got := reason(output); got != "x_test.go:9: got 1, want 2" {
		t.Errorf("%q", got)
	}
	if got := reason("panic: test timed out after 1m\n"); !regexp.MustCompile("timed out").MatchString(got) {
		t.Errorf("%q", got)
	}
}
