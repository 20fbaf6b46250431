package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func say(w io.Writer, e event) {
	b, err := json.Marshal(e)
	if err != nil {
		panic(err)
	}
	fmt.Fprintf(w, "%s\n", b)
}

func TestReport(t *testing.T) {
	var in bytes.Buffer
	say(&in, event{Action: "output", Package: "a", Test: "TestGood", Output: "hello\n"})
	say(&in, event{Action: "pass", Package: "a", Test: "TestGood"})
	say(&in, event{Action: "output", Package: "a", Test: "TestSkip", Output: "    a_test.go:1: no token\n"})
	say(&in, event{Action: "skip", Package: "a", Test: "TestSkip"})
	say(&in, event{Action: "pass", Package: "a"})
	for i := range 10_000 {
		say(&in, event{Action: "output", Package: "b", Test: "TestLoud", Output: fmt.Sprintf("line %d\n", i)})
	}
	say(&in, event{Action: "output", Package: "b", Test: "TestLoud", Output: strings.Repeat("x", 3<<20) + "\n"}) // longer than any buffer
	say(&in, event{Action: "fail", Package: "b", Test: "TestLoud"})
	say(&in, event{Action: "output", Package: "b", Test: "TestHangs", Output: "begun\n"})
	say(&in, event{Action: "fail", Package: "b"})
	fmt.Fprintln(&in, "not JSON")
	r := &result{name: "lane"}
	r.read(&in)
	if r.passed != 1 || r.failed != 1 || r.skipped != 1 {
		t.Errorf("%d passed, %d failed, %d skipped", r.passed, r.failed, r.skipped)
	}
	var out bytes.Buffer
	if report(&out, []*result{r}) {
		t.Error("a failed package is well")
	}
	s := out.String()
	for _, want := range []string{"line 0\n", "line 9999\n", "lane: 1 passed, 1 failed, 1 skipped", "skipped TestSkip: a_test.go:1: no token", "(3141", "begun"} {
		if !strings.Contains(s, want) {
			t.Errorf("no %q in the report", want)
		}
	}
	if strings.Contains(s, "line 500\n") || strings.Count(s, "\n") > 250 || len(s) > 20_000 {
		t.Errorf("the report has %d lines, %d bytes", strings.Count(s, "\n"), len(s))
	}
	if !strings.HasSuffix(s, "FAILED\nFAIL  lane: b TestHangs (did not end)\nFAIL  lane: b TestLoud\n") {
		t.Errorf("the report ends with %q", s[max(0, len(s)-200):])
	}
}

func TestFlakyIsTold(t *testing.T) {
	var in bytes.Buffer
	say(&in, event{Action: "pass", Package: "a", Test: "TestGood"})
	say(&in, event{Action: "pass", Package: "a"})
	say(&in, event{Action: "output", Package: "b", Test: "TestNow", Output: "too slow\n"})
	say(&in, event{Action: "fail", Package: "b", Test: "TestNow"})
	say(&in, event{Action: "fail", Package: "b"})
	r := &result{name: "lane"}
	r.read(&in)
	r.failedPackages()[0].flaky = true
	var out bytes.Buffer
	if !report(&out, []*result{r}) || !strings.Contains(out.String(), "too slow") || !strings.HasSuffix(out.String(), "FLAKY lane: b TestNow\n") {
		t.Errorf("%s", &out)
	}
}

// What no slow machine brings about is never tried again.
func TestCertain(t *testing.T) {
	for _, tc := range []struct {
		output, build string
		certain       bool
	}{
		{"    x_test.go:1: not within 10 s\n", "", false},
		{"panic: test timed out after 10m0s\n", "", false},
		{"WARNING: DATA RACE\n", "", true},
		{"panic: runtime error: index out of range\n", "", true},
		{"fatal error: concurrent map writes\n", "", true},
		{"", "b", true},
	} {
		var in bytes.Buffer
		say(&in, event{Action: "output", Package: "b", Test: "TestX", Output: tc.output})
		say(&in, event{Action: "fail", Package: "b", Test: "TestX"})
		say(&in, event{Action: "fail", Package: "b", FailedBuild: tc.build})
		r := &result{}
		r.read(&in)
		if got := r.failedPackages()[0].certain(); (got != "") != tc.certain {
			t.Errorf("%q: %q", tc.output, got)
		}
	}
}

// A lane of a module of its own: one package fails once, one always, one hangs.
func TestRun(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	t.Setenv("GOFLAGS", "-mod=mod")
	write := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("go.mod", "module example.com/lanes\n\ngo 1.24\n")
	write("good/good_test.go", "package good\n\nimport \"testing\"\n\nfunc TestGood(t *testing.T) {}\n")
	write("once/once_test.go", `package once

import (
	"os"
	"testing"
)

func TestOnce(t *testing.T) {
	if os.WriteFile("seen", nil, 0o600); len(os.Getenv("NEVER")) == 0 {
		if _, err := os.Stat("before"); err != nil {
			os.WriteFile("before", nil, 0o600)
			t.Fatal("the first time")
		}
	}
}
`)
	r := run(t.Context(), lane{"lane", []string{"-p", "1", "./good", "./once"}, 5 * time.Minute})
	var out bytes.Buffer
	if !report(&out, []*result{r}) || !strings.HasSuffix(out.String(), "FLAKY lane: example.com/lanes/once TestOnce\n") {
		t.Errorf("one that fails once: %s", &out)
	}
	write("bad/bad_test.go", "package bad\n\nimport \"testing\"\n\nfunc TestBad(t *testing.T) { t.Fatal(\"always\") }\n")
	r = run(t.Context(), lane{"lane", []string{"./good", "./bad"}, 5 * time.Minute})
	out.Reset()
	if report(&out, []*result{r}) || !strings.HasSuffix(out.String(), "TestBad\nFAIL  lane: example.com/lanes/bad TestBad (again)\n") {
		t.Errorf("one that always fails: %s", &out)
	}
	// One that hangs, and has a child that holds its output open.
	write("hang/hang_test.go", `package hang

import (
	"os"
	"os/exec"
	"testing"
)

func TestHang(t *testing.T) {
	cmd := exec.Command("sleep", "3600")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	os.WriteFile("hangs", nil, 0o600)
	select {}
}
`)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	go func() {
		for ctx.Err() == nil {
			if _, err := os.Stat("hang/hangs"); err == nil {
				cancel(fmt.Errorf("the limit"))
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	r = run(ctx, lane{"lane", []string{"./good", "./hang"}, 5 * time.Minute})
	out.Reset()
	if report(&out, []*result{r}) || !strings.Contains(out.String(), "TestHang") || !strings.HasSuffix(out.String(), "FAIL  lane: the limit\n") {
		t.Errorf("one that hangs: %s", &out)
	}
}
