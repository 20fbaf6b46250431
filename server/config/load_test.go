package config

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// TestGolden reads the files in testdata/errors; what is told about each stands beside it, as text and as JSON.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/errors/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no files: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			_, err := Load(file)
			var problems Errors
			if !errors.As(err, &problems) {
				t.Fatalf("error of type %T: %v", err, err)
			}
			asJSON, err := json.MarshalIndent(problems, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			base := strings.TrimSuffix(file, ".yaml")
			golden(t, base+".txt", problems.Error()+"\n")
			golden(t, base+".json", string(asJSON)+"\n")
		})
	}
}

func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (rewrite with -update):\n%s", file, got)
	}
}

func TestSecretsAreNotShown(t *testing.T) {
	for _, text := range []string{
		"keys: {identity: {uri: \"pkcs11:token=t;object=o?module-path=/m&pin-value=31337\"}}",
		"keys: {identity: {uri: \"pkcs11:token=t;object=o?module-path=/m&pin-source=31337\"}}",
		"keys: {identity: {uri: \"pkcs11:31337\", algoritm: P256}}",
		"keys:\n  identity: \"pkcs11:pin-value=31337\"\n",
		"keys: {identity: {url: \"pkcs11:token=t;object=o?pin-value=31337\"}}",
		"keys:\n  identity:\n    uri:\n      - pkcs11:token=t?pin-value=31337\n",
		"keys:\n  identity:\n    uri: \"pkcs11:token=t?pin-value=31337\n",
	} {
		_, err := Parse("x.yaml", []byte(text))
		if err == nil || strings.Contains(err.Error(), "31337") {
			t.Errorf("%s:\n%v", text, err)
		}
	}
}

// TestLoadRefuses is about files that are no configuration at all: one problem, soon.
func TestLoadRefuses(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, data string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	loop := filepath.Join(dir, "loop")
	if err := os.Symlink(loop, loop); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, path, want string }{
		{"missing", filepath.Join(dir, "nowhere.yaml"), "no such file"},
		{"a directory", dir, "is a directory"},
		{"a link to itself", loop, "cannot be read"},
		{"a pipe, which would never end", pipe, "not a regular file"},
		{"a device", os.DevNull, "not a regular file"},
		{"empty", write("empty", ""), "is empty"},
		{"comments only", write("comments", "# nothing\n\n# here\n"), "is empty"},
		{"10 MB", write("large", strings.Repeat("# comment\n", 1<<20)), "has at most 4194304"},
	} {
		_, err := Load(c.path)
		problems, _ := err.(Errors)
		if len(problems) != 1 || !strings.Contains(problems[0].Message, c.want) || problems[0].File != c.path {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	bomb := "b0: &b0 [x, x]\n"
	for i := range 30 {
		bomb += fmt.Sprintf("b%d: &b%d [*b%d, *b%d]\n", i+1, i+1, i, i)
	}
	for _, c := range []struct {
		name, data, want string
		many             bool // more than one problem is fine
	}{
		{name: "an ELF header", data: "\x7fELF\x02\x01\x01\x00\x00", want: "the character U+007F"},
		{name: "a gzip header", data: "\x1f\x8b\x08\x00\x00", want: "the character U+001F"},
		{name: "Latin-1", data: "origin: caf\xe9\n", want: "not UTF-8"},
		{name: "UTF-16", data: "\xff\xfeo\x00r\x00", want: "not UTF-8"},
		{name: "a NUL", data: "origin: a\x00b\n", want: "U+0000"},
		{name: "CR alone, which only YAML takes for a line break", data: "origin: a\rinstance: b\n", want: "U+000D"},
		{name: "NEL, the same", data: "origin: a\u0085instance: b\n", want: "U+0085"},
		{name: "a line separator, the same", data: "origin: a\u2028instance: b\n", want: "U+2028"},
		{name: "a scalar", data: "hello\n", want: `not "hello"`},
		{name: "a list", data: "- origin: a\n", want: "not a list"},
		{name: "JSON that is no object", data: "[1, 2]", want: "not a list"},
		{name: "null", data: "---\n...\n", want: "not nothing"},
		{name: "an unclosed brace", data: "{origin: a", want: "is not YAML"},
		{name: "a tab", data: "listeners:\n\tenvoy: a\n", want: "is not YAML"},
		{name: "an unknown anchor", data: "origin: *o\n", want: "unknown anchor"},
		{name: "HTML", data: "<!DOCTYPE html>\n<html><body class=\"x\">hello: you: there</body></html>\n", want: "is not YAML"},
		{name: "two documents", data: "origin: a\n---\norigin: b\n", want: "second YAML document", many: true},
		{name: "junk behind the document", data: "origin: a\n---\n{", want: "is not YAML", many: true},
		{name: "an alias", data: "origin: &o example.com\ninstance: *o\n", want: "aliases are not supported", many: true},
		{name: "an alias bomb", data: bomb, want: "unknown key", many: true},
		{name: "a merge key", data: "listeners: {<<: {envoy: 'unix:/x'}}\n", want: "unknown key", many: true},
		{name: "a tag", data: "origin: !!binary aGVsbG8=\n", want: "tags such as !!binary", many: true},
		{name: "a key twice", data: "origin: a\norigin: b\n", want: "a second time, after line 1", many: true},
		{name: "the JSON spelling", data: "stateDir: /x\n", want: "did you mean state_dir", many: true},
		{name: "a field number, which protoyaml would take", data: "1: example.com\n", want: "unknown key", many: true},
		{name: "a list as a key", data: "? [origin]\n: b\n", want: "a key must be a name", many: true},
		{name: "null for a string, which protoyaml would take for text", data: "origin: ~\n", want: "has no value", many: true},
		{name: "a line of 100 KB", data: "origin: " + strings.Repeat("a", 100<<10), want: "at most 65536"},
		{name: "deep brackets", data: strings.Repeat(strings.Repeat("[", 1<<10)+"\n", 1<<10), want: "is not YAML"},
		{name: "deep braces", data: strings.Repeat(strings.Repeat("{a: ", 1<<10)+"\n", 1<<9), want: "is not YAML"},
		{name: "deep lists", data: strings.Repeat("- ", 20000), want: "is not YAML"},
		{name: "a line of many unknown keys", data: "{" + strings.Repeat("a,", 30<<10) + "}", want: "unknown key", many: true},
		{name: "many lines of them", data: strings.Repeat("ab: c\n", 500000), want: "unknown key", many: true},
		{name: "many bad routes", data: "routes:\n" + strings.Repeat("- {retries: x, timeout: y}\n", 20000),
			want: "decimal digits", many: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			start := time.Now()
			_, err := Parse("x.yaml", []byte(c.data))
			if took := time.Since(start); took > 2*time.Minute { // a hang, not a slow machine
				t.Errorf("took %v", took)
			}
			problems, ok := err.(Errors)
			if !ok || len(problems) == 0 || len(problems) > maxProblems {
				t.Fatalf("%d problems, error %.300v", len(problems), err)
			}
			if !c.many && len(problems) != 1 {
				t.Errorf("%d problems: %.1000v", len(problems), err)
			}
			found := false
			for _, p := range problems {
				found = found || strings.Contains(p.Message, c.want)
			}
			if !found {
				t.Errorf("none says %q: %.1000v", c.want, err)
			}
			if len(err.Error()) > 64<<10 {
				t.Errorf("the text is %d bytes long", len(err.Error()))
			}
		})
	}
}

func TestParseAccepts(t *testing.T) {
	for name, text := range map[string]string{
		"the least there is": minimal,
		"JSON": `{"origin": "example.com/x", "instance": "a", "state_dir": "/x",
			"listeners": {"envoy": "unix:/e", "admin": "unix:/a"}, "keys": {"identity": {"uri": "soft:k"}, "daily": {"uri": "soft:k"}}}`,
		"CRLF":                  strings.ReplaceAll(minimal, "\n", "\r\n"),
		"a byte order mark":     "\ufeff" + minimal,
		"document marks":        "---\n" + minimal + "...\n",
		"sections left empty":   minimal + "log:\nbeat:\n  r1:\nenvoy:\n",
		"an anchor nobody uses": strings.Replace(minimal, "instance: a", "instance: &i a", 1),
	} {
		if _, err := Parse("x.yaml", []byte(text)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, file := range []string{"testdata/full.yaml", "testdata/errors/everything.yaml", "testdata/errors/syntax.yaml"} {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(minimal))
	f.Add([]byte("a: &a [*a]\n"))
	f.Add([]byte("---")) // the node of nothing stands behind the last line
	f.Add([]byte("class_rules:\n- when: >-\n    'a' ==\n\n    \"\\u00e9\"\n"))
	f.Add([]byte("class_rules: [{when: \"path == \\\"\\x41\\u00e9\\U0001f600\\\" &&\\n nope\"}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg, err := Parse("x.yaml", data)
		if err == nil {
			again, err := Parse("y.yaml", data)
			if err != nil || again.PolicyDigest != cfg.PolicyDigest || Changes(cfg, again) != nil {
				t.Fatalf("a second reading differs: %v", err)
			}
			return
		}
		problems, ok := err.(Errors)
		if !ok || len(problems) == 0 || cfg != nil {
			t.Fatalf("error of type %T: %v", err, err)
		}
		lines := strings.Count(string(data), "\n") + 1
		for _, p := range problems {
			if p.Message == "" || p.Line < 0 || p.Line > lines || p.Line > 0 && p.Column < 1 || strings.Contains(p.Message, "internal error") {
				t.Errorf("bad problem: %+v", p)
			}
		}
		_ = err.Error()
	})
}

func TestSnippet(t *testing.T) {
	long := strings.Repeat("x", 100) + "é!" + strings.Repeat("y", 100)
	for _, c := range []struct {
		line   string
		column int
		want   string // two lines
	}{
		{"a: b", 4, "a: b\n   ^"},
		{"a: b\r", 5, "a: b\n    ^"},
		{"\ta:\tb", 4, "\ta:\tb\n\t  ^"}, // tabs are as wide below as above
		{"ä: b", 4, "ä: b\n   ^"},
		{"", 1, "\n^"},
		{"a", 99, "a\n ^"},
		{long, 102, "..." + strings.Repeat("x", 59) + "é!" + strings.Repeat("y", 59) + "...\n" + strings.Repeat(" ", 63) + "^"},
		{long, 1, strings.Repeat("x", 100) + "é!" + strings.Repeat("y", 18) + "...\n^"},
		{long, 203, "..." + strings.Repeat("x", 18) + "é!" + strings.Repeat("y", 100) + "\n" + strings.Repeat(" ", 123) + "^"},
	} {
		if got := snippet(c.line, c.column); got != c.want {
			t.Errorf("column %d of %q:\n%s\nwant\n%s", c.column, c.line, got, c.want)
		}
	}
}
