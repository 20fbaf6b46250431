package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestExamples: every knhk*.yaml below examples/ is right, and the envoy*.yaml beside it is what `knhk bootstrap` writes for it.
// With -update it is written.
func TestExamples(t *testing.T) {
	t.Chdir(filepath.Join("..", "..")) // paths in the examples are relative to it
	found, err := filepath.Glob(filepath.Join("examples", "*", "knhk*.yaml"))
	if err != nil || len(found) < 5 {
		t.Fatalf("%d examples, %v: is this test still reading them?", len(found), err)
	}
	for _, name := range found {
		dir, file := filepath.Split(name)
		beside := filepath.Join(dir, "envoy"+strings.TrimPrefix(file, "knhk"))
		t.Run(strings.TrimSuffix(filepath.ToSlash(strings.TrimPrefix(name, "examples")), ".yaml"), func(t *testing.T) {
			got := runs(t, "bootstrap", "--config", name)
			runs(t, "check", "--config", name)
			if *update {
				if err := os.WriteFile(beside, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(beside)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s is not what knhk bootstrap writes for %s: run 'make golden' and read the diff", beside, name)
			}
		})
	}
}

// runs runs a command in this process and returns its standard output.
func runs(t *testing.T, args ...string) []byte {
	t.Helper()
	cmd := root()
	var out, said bytes.Buffer
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(&said)
	if err := cmd.ExecuteContext(t.Context()); err != nil {
		t.Fatalf("knhk %s: %v\n%s", strings.Join(args, " "), err, said.Bytes())
	}
	return out.Bytes()
}
