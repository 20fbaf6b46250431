// Package structure holds the rules of the tree as tests: who may import whom, what verification must not need, that
// every package explains itself, and that README.md and CONTRIBUTING.md say what is there. It changes nothing, and no
// package imports it.
package structure

import (
	"bytes"
	"encoding/json/jsontext"
	"encoding/json/v2"
	"errors"
	"fmt"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"unicode"

	"golang.org/x/mod/modfile"

	"github.com/knhk/sidecar/e2e/harness"
)

const module = "github.com/knhk/sidecar"

// maxLines bounds a file; what is longer has two subjects.
const maxLines = 700

// pkg is what `go list -json` says of a package.
type pkg struct {
	ImportPath, Dir                              string
	Standard                                     bool
	GoFiles, CgoFiles, TestGoFiles, XTestGoFiles []string
	Imports, TestImports, XTestImports           []string
}

// list runs go list with the given arguments. cgo says whether files behind cgo count.
func list(t *testing.T, cgo bool, args ...string) []pkg {
	t.Helper()
	fields := "-json=ImportPath,Dir,Standard,GoFiles,CgoFiles,TestGoFiles,XTestGoFiles,Imports,TestImports,XTestImports"
	cmd := exec.Command("go", append([]string{"list", fields}, args...)...)
	cmd.Dir = root(t)
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+map[bool]string{true: "1", false: "0"}[cgo])
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list %v: %v\n%s", args, err, stderr.Bytes())
	}
	var pkgs []pkg
	for dec := jsontext.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		err := json.UnmarshalDecode(dec, &p)
		if errors.Is(err, io.EOF) {
			return pkgs
		}
		if err != nil {
			t.Fatalf("go list %v: %v", args, err)
		}
		pkgs = append(pkgs, p)
	}
}

func root(t *testing.T) string {
	t.Helper()
	dir, err := harness.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root(t), name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// files lists what git tracks or would track.
func files(t *testing.T) []string {
	t.Helper()
	cmd := exec.Command("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
	cmd.Dir = root(t)
	out, err := cmd.Output()
	if err != nil {
		t.Skipf("not a git checkout: %v", err)
	}
	var all []string
	for f := range strings.SplitSeq(strings.TrimSuffix(string(out), "\x00"), "\x00") {
		if _, err := os.Lstat(filepath.Join(root(t), f)); err == nil { // else deleted, not committed
			all = append(all, f)
		}
	}
	return all
}

// top is the first folder of a package of ours, "" for others'.
func top(importPath string) string {
	rest, ok := strings.CutPrefix(importPath, module+"/")
	if !ok {
		return ""
	}
	name, _, _ := strings.Cut(rest, "/")
	return name
}

// mayImport says which top folders the packages of a top folder may import, their own included.
var mayImport = map[string][]string{
	"api":      {"api"},
	"policy":   {"api", "policy"},
	"crypto":   {"api", "crypto"},
	"envoy":    {"api", "envoy"},
	"region":   {"api", "crypto", "policy", "region"},
	"server":   {"api", "crypto", "envoy", "policy", "region", "server"},
	"examples": {"api", "crypto", "envoy", "policy", "region", "server", "examples"},
	"e2e":      {"api", "crypto", "envoy", "policy", "region", "server", "examples", "e2e"},
}

func TestImports(t *testing.T) {
	for _, p := range list(t, true, "./...") {
		from := top(p.ImportPath)
		allowed, known := mayImport[from]
		if !known {
			t.Errorf("%s is in no folder that this test knows", p.ImportPath)
			continue
		}
		for _, kind := range []struct {
			name    string
			imports []string
		}{{"imports", p.Imports}, {"test imports", p.TestImports}, {"external test imports", p.XTestImports}} {
			for _, i := range kind.imports {
				if to := top(i); to != "" && !slices.Contains(allowed, to) {
					t.Errorf("%s %s %s: packages below %s may import only %s", p.ImportPath, kind.name, i, from, strings.Join(allowed, ", "))
				}
			}
		}
	}
}

// What an auditor links must hold no C, no server and no store, and no key store either. net/http is there, because torchwood can
// fetch tiles with it; crypto/receipt never does.
func TestVerificationStandsAlone(t *testing.T) {
	banned := map[string]string{
		module + "/server":                    "an auditor needs no server",
		module + "/region":                    "an auditor needs no state directory",
		module + "/policy":                    "verification rests on no judgement",
		module + "/envoy":                     "receipts outlive Envoy",
		module + "/crypto/hsm":                "cgo",
		module + "/crypto/soft":               "an auditor holds no keys",
		"github.com/miekg/pkcs11":             "cgo",
		"github.com/cockroachdb/pebble":       "a store",
		"github.com/transparency-dev/tessera": "a log server",
		"google.golang.org/grpc":              "a network",
	}
	for _, p := range list(t, true, "-deps", "./crypto/receipt") {
		for bad, why := range banned {
			if p.ImportPath == bad || strings.HasPrefix(p.ImportPath, bad+"/") {
				t.Errorf("crypto/receipt depends on %s: %s", p.ImportPath, why)
			}
		}
		if len(p.CgoFiles) > 0 && !p.Standard {
			t.Errorf("crypto/receipt depends on %s, which needs cgo", p.ImportPath)
		}
	}
}

// The development issuer is a command of its own: the service neither starts it nor links it, and of the program one file only knows it.
func TestDevelopmentIssuerStandsApart(t *testing.T) {
	const issuer = module + "/crypto/spiffe/devissuer"
	for _, p := range list(t, true, "./...") {
		if slices.Contains(p.Imports, issuer) && p.ImportPath != module+"/server/knhk" {
			t.Errorf("%s imports the development issuer", p.ImportPath)
		}
	}
	for _, p := range list(t, true, "-deps", "./server") {
		if p.ImportPath == issuer {
			t.Error("the service links the development issuer")
		}
	}
	for _, f := range files(t) {
		if strings.HasPrefix(f, "server/") && strings.HasSuffix(f, ".go") && f != "server/knhk/devissuer.go" && strings.Contains(read(t, f), issuer) {
			t.Errorf("%s knows the development issuer", f)
		}
	}
}

// knhk is the program, built once without C.
var knhk = sync.OnceValues(func() (string, error) {
	dir, err := harness.ModuleRoot()
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "bin", "knhk-without-cgo") // bin/ is ignored by git
	cmd := exec.Command("go", "build", "-o", bin, "./server/knhk")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("CGO_ENABLED=0 go build ./server/knhk: %w\n%s", err, out)
	}
	return bin, nil
})

func TestBuildsWithoutC(t *testing.T) {
	if _, err := knhk(); err != nil {
		t.Error(err)
	}
	for _, p := range list(t, false, "-deps", "./crypto/receipt", "./server/knhk") {
		if len(p.CgoFiles) > 0 {
			t.Errorf("%s has cgo files although cgo is off", p.ImportPath)
		}
	}
}

// Every package explains itself: a comment with at least one whole sentence, that begins as Go's convention has it.
func TestPackageComments(t *testing.T) {
	for _, p := range list(t, true, "./...") {
		var doc, name string
		generated := true
		files := slices.Concat(p.GoFiles, p.CgoFiles)
		if len(files) == 0 { // a package of tests alone
			files = slices.Concat(p.TestGoFiles, p.XTestGoFiles)
		}
		for _, f := range files {
			src, err := os.ReadFile(filepath.Join(p.Dir, f))
			if err != nil {
				t.Fatal(err)
			}
			if isGenerated(src) {
				continue
			}
			generated = false
			ast, err := parser.ParseFile(token.NewFileSet(), f, src, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			name = ast.Name.Name
			if d := ast.Doc.Text(); len(d) > len(doc) {
				doc = d
			}
		}
		want := "Package " + name + " "
		if name == "main" {
			want = "Command " + filepath.Base(p.ImportPath) + " "
			if alt := "Program " + filepath.Base(p.ImportPath) + " "; strings.HasPrefix(doc, alt) {
				want = alt
			}
		}
		switch {
		case generated:
		case doc == "":
			t.Errorf("%s has no package comment", p.ImportPath)
		case !strings.HasPrefix(doc, want):
			t.Errorf("%s: its comment does not begin with %q: %.60q", p.ImportPath, want, doc)
		case !sentence.MatchString(doc):
			t.Errorf("%s: its comment has no whole sentence: %.60q", p.ImportPath, doc)
		}
	}
}

// sentence is some words and a full stop.
var sentence = regexp.MustCompile(`^(?s)\S+(\s+\S+){4,}?[.:](\s|$)`)

var generatedLine = regexp.MustCompile(`(?m)^// Code generated .* DO NOT EDIT\.$`)

func isGenerated(src []byte) bool { return generatedLine.Match(src) }

// The top of the tree is fixed: what is new has its place below it.
func TestTopLevel(t *testing.T) {
	known := strings.Fields(`api server policy crypto region envoy examples e2e
		go.mod go.sum buf.yaml buf.gen.yaml Makefile README.md LICENSE CHANGELOG.md CONTRIBUTING.md SECURITY.md`)
	seen := map[string]bool{}
	for _, f := range files(t) {
		name, _, _ := strings.Cut(f, "/")
		seen[name] = true
	}
	for name := range seen {
		if !slices.Contains(known, name) && !strings.HasPrefix(name, ".") {
			t.Errorf("%s does not belong at the top of the tree", name)
		}
	}
	for _, name := range known {
		if !seen[name] {
			t.Errorf("%s is missing", name)
		}
	}
	ignored := strings.Fields(read(t, ".gitignore"))
	for _, dir := range []string{"/bin/", "/run/", "/.venv/", "/.tools/"} {
		if !slices.Contains(ignored, dir) {
			t.Errorf(".gitignore lacks %s", dir)
		}
	}
}

func TestFileLength(t *testing.T) {
	for _, f := range files(t) {
		if strings.HasSuffix(f, ".sum") || strings.HasSuffix(f, "go.mod") || strings.Contains(f, "testdata/") || f == "LICENSE" {
			continue
		}
		src := []byte(read(t, f))
		if n := bytes.Count(src, []byte("\n")); n > maxLines && !isGenerated(src) {
			t.Errorf("%s has %d lines, at most %d are read with pleasure", f, n, maxLines)
		}
	}
}

// Each direct dependency has a line that says why it, and no line outlives its dependency.
func TestDependenciesAreExplained(t *testing.T) {
	mod, err := modfile.Parse("go.mod", []byte(read(t, "go.mod")), nil)
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(read(t, "CONTRIBUTING.md"), "\n## Dependencies\n")
	if !ok {
		t.Fatal("CONTRIBUTING.md has no section Dependencies")
	}
	explained := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| ([^|]+) \\| ([^|]+) \\|$").FindAllStringSubmatch(section, -1) {
		if explained[m[1]] {
			t.Errorf("CONTRIBUTING.md explains %s twice", m[1])
		}
		explained[m[1]] = true
	}
	for _, r := range mod.Require {
		if !r.Indirect && !explained[r.Mod.Path] {
			t.Errorf("CONTRIBUTING.md does not say why %s", r.Mod.Path)
		}
		if !r.Indirect {
			delete(explained, r.Mod.Path)
		}
	}
	for path := range explained {
		t.Errorf("CONTRIBUTING.md explains %s, which go.mod does not require directly", path)
	}
}

// commands are the words of every call of a program in a document: in fenced blocks, where a line begins with it, and in inline
// code. What a shell would do with the rest of the line is cut off.
func commands(doc, program string) [][]string {
	var out [][]string
	add := func(line string) {
		line = strings.TrimSpace(line)
		for _, p := range []string{program, "bin/" + program} {
			if rest, ok := strings.CutPrefix(line, p+" "); ok {
				if i := strings.IndexAny(rest, "|>&;#"); i >= 0 {
					rest = rest[:i]
				}
				words := strings.Fields(strings.ReplaceAll(rest, `"`, ""))
				if len(words) > 0 {
					out = append(out, words)
				}
			}
		}
	}
	for i, part := range strings.Split(doc, "\n```") {
		if i%2 == 1 {
			for line := range strings.Lines(part) {
				add(line)
			}
			continue
		}
		for _, m := range regexp.MustCompile("`([^`\n]+)`").FindAllStringSubmatch(part, -1) {
			add(m[1])
		}
	}
	return out
}

var documents = []string{"README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md", "examples/ext-proc/knhk.yaml"}

func TestDocumentedTargetsExist(t *testing.T) {
	targets := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^([a-z-]+):`).FindAllStringSubmatch(read(t, "Makefile"), -1) {
		targets[m[1]] = true
	}
	found := 0
	for _, name := range documents {
		for _, words := range commands(read(t, name), "make") {
			for _, w := range words {
				if strings.Contains(w, "=") {
					continue
				}
				if found++; !targets[w] {
					t.Errorf("%s: make %s: no such target", name, w)
				}
			}
		}
	}
	if found < 10 {
		t.Errorf("%d make targets found in the documents: is this test still reading them?", found)
	}
}

// Every documented command exists and takes its flags: with --help after them the program checks both and does nothing.
func TestDocumentedCommandsParse(t *testing.T) {
	bin, err := knhk()
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, name := range documents {
		for _, words := range commands(read(t, name), "knhk") {
			if !unicode.IsLower(rune(words[0][0])) {
				continue // knhk --help, knhk COMMAND
			}
			for i, w := range words { // get|list|export stands for three
				if first, _, ok := strings.Cut(w, "|"); ok {
					words[i] = first
				}
			}
			found++
			out, err := exec.Command(bin, append(words, "--help")...).CombinedOutput()
			usage := "\n  knhk " + words[0] + " "
			if (words[0] == "receipts" || words[0] == "keys") && len(words) > 1 {
				usage = "\n  knhk " + words[0] + " " + words[1] + " "
			}
			if err != nil || !strings.Contains(string(out), usage) {
				t.Errorf("%s: knhk %s: %v, want help with %q:\n%s", name, strings.Join(words, " "), err, usage, out)
			}
		}
	}
	if found < 15 {
		t.Errorf("%d commands found in the documents: is this test still reading them?", found)
	}
}

// Files that the documents link to are there.
func TestDocumentedFilesExist(t *testing.T) {
	for _, name := range []string{"README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "examples/README.md"} {
		for _, m := range regexp.MustCompile(`\]\(([^)#]+)\)`).FindAllStringSubmatch(read(t, name), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(root(t), filepath.Dir(name), m[1])); err != nil {
				t.Errorf("%s links to %s: %v", name, m[1], err)
			}
		}
	}
}

// Every metric has its line in the README: by its name in api/telemetry, as Prometheus shows it.
func TestMetricsAreDocumented(t *testing.T) {
	readme := read(t, "README.md")
	names := regexp.MustCompile(`(?m)^\t\w+\s*= "(knhk\.[a-z.]+)"\s*// \{?\w*`).FindAllStringSubmatch(read(t, "api/telemetry/names.go"), -1)
	if len(names) < 15 {
		t.Fatalf("%d metrics found in api/telemetry: is this test still reading them?", len(names))
	}
	for _, m := range names {
		name := strings.ReplaceAll(m[1], ".", "_")
		if !regexp.MustCompile("`" + name + "(_bytes|_seconds)?(_total)?`").MatchString(readme) {
			t.Errorf("README.md does not say what %s is", name)
		}
	}
}
