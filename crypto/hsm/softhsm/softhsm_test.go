package softhsm

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestInitToken(t *testing.T) {
	Need(t)
	dir := filepath.Join(t.TempDir(), "demo")
	for i, label := range []string{"knhk", "second token"} {
		conf, err := InitToken(dir, label, "1234", "12345678")
		if err != nil {
			t.Fatal(err)
		}
		if conf != filepath.Join(dir, "softhsm2.conf") {
			t.Errorf("configuration is %s", conf)
		}
		tokens, err := os.ReadDir(TokenDir(dir))
		if err != nil || len(tokens) != i+1 {
			t.Errorf("%d tokens, %v; want %d", len(tokens), err, i+1)
		}
	}
	for _, path := range []string{TokenDir(dir), filepath.Join(dir, "softhsm2.conf")} {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v, %v; want it for its owner only", path, info.Mode(), err)
		}
	}
}

func TestInitTokenRefuses(t *testing.T) {
	Need(t)
	for _, c := range []struct{ why, dir, label, pin, want string }{
		{"no label", t.TempDir(), "", "1234", "label has 0 bytes"},
		{"long label", t.TempDir(), strings.Repeat("t", 33), "1234", "label has 33 bytes"},
		{"line break in the directory", t.TempDir() + "/a\nb", "knhk", "1234", "line break"},
		{"PIN too short for SoftHSM", t.TempDir(), "knhk", "1", "softhsm2-util"},
		{"a file in the way", "/dev/null", "knhk", "1234", "softhsm: init token"},
	} {
		if _, err := InitToken(c.dir, c.label, c.pin, "12345678"); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want %q", c.why, err, c.want)
		}
	}
}

func TestFind(t *testing.T) {
	module := Need(t)
	t.Setenv(ModuleEnv, module)
	if got, ok := Find(); !ok || got != module {
		t.Errorf("Find with %s=%s: %s, %v", ModuleEnv, module, got, ok)
	}
	t.Setenv(ModuleEnv, filepath.Join(t.TempDir(), "none.so"))
	if got, ok := Find(); ok {
		t.Errorf("Find with %s pointing nowhere: %s; want none, not another one", ModuleEnv, got)
	}
}

// outcome records what Need does to a test.
type outcome struct{ skipped, failed string }

func (o *outcome) Helper()           {}
func (o *outcome) Skip(args ...any)  { o.skipped = fmt.Sprint(args...) }
func (o *outcome) Fatal(args ...any) { o.failed = fmt.Sprint(args...) }

// TestNeed: without SoftHSM a developer's test is skipped with advice, and a pipeline's fails.
func TestNeed(t *testing.T) {
	t.Setenv("PATH", t.TempDir()) // no softhsm2-util
	for _, c := range []struct {
		ci, require string
		fails       bool
	}{{"", "", false}, {"true", "", true}, {"", "1", true}, {"false", "0", false}} {
		t.Setenv("CI", c.ci)
		t.Setenv("REQUIRE_SOFTHSM", c.require)
		var o outcome
		Need(&o)
		if said := o.skipped + o.failed; (o.failed != "") != c.fails || !strings.Contains(said, "install") {
			t.Errorf("CI=%q REQUIRE_SOFTHSM=%q: %+v; want it to fail: %v", c.ci, c.require, o, c.fails)
		}
	}
}
