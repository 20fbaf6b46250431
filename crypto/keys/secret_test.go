package keys

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestReadSecret: where secrets may come from and how they are refused. No error repeats a value; TestPIN has the lengths.
func TestReadSecret(t *testing.T) {
	const secret = "7Xq-secret-value"
	dir := t.TempDir()
	file := filepath.Join(dir, "pin")
	write := func(path string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(path, []byte(secret+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	link, fifo := filepath.Join(dir, "link"), filepath.Join(dir, "fifo")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KNHK_TEST_SECRET", secret)
	for _, c := range []struct {
		why, source string
		mode        os.FileMode
		refused     string // "": read
	}{
		{"a file of the owner's", "file:" + file, 0o600, ""},
		{"read-only", "file:" + file, 0o400, ""},
		{"as a URL", "file://" + file, 0o600, ""},
		{"through a link, as mounted secrets are", "file:" + link, 0o600, ""},
		{"the environment", "env:KNHK_TEST_SECRET", 0o600, ""},
		{"the group can read it", "file:" + file, 0o640, "has mode 0640: a secret must be for its owner only (chmod go= "},
		{"all can read it", "file:" + file, 0o604, "has mode 0604"},
		{"a link to one that all can read", "file:" + link, 0o644, "has mode 0644"},
		{"the group can write it", "file:" + file, 0o620, "has mode 0620"},
		{"a directory", "file:" + dir, 0o600, "is not a regular file"},
		{"a FIFO that nobody writes to", "file:" + fifo, 0o600, "is not a regular file"},
		{"missing", "file:" + file + ".none", 0o600, "no such file"},
		{"not set", "env:KNHK_TEST_NO_SECRET", 0o600, "KNHK_TEST_NO_SECRET is not set"},
		{"a relative path", "file:pin", 0o600, "absolute path"},
		{"the secret itself", secret, 0o600, "want file:/path or env:NAME"},
		{"the secret as a file", "file:" + secret, 0o600, "absolute path"},
		{"the secret as a variable", "env:" + secret, 0o600, "name of an environment variable"},
		{"nothing", "", 0o600, "want file:/path or env:NAME"},
	} {
		write(file, c.mode)
		got, err := ReadSecret(c.source)
		if c.refused == "" && (err != nil || got != secret) || c.refused != "" && (err == nil || got != "" || !strings.Contains(err.Error(), c.refused)) {
			t.Errorf("%s: %d bytes, %v; want %q", c.why, len(got), err, c.refused)
		}
		if err != nil && (strings.Contains(err.Error(), secret) || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%s: the error repeats the secret or has more than one line: %v", c.why, err)
		}
	}
}
