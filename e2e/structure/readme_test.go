package structure

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/hsm/softhsm"
	"github.com/knhk/sidecar/e2e/harness"
)

// TestReadmeToken runs the commands that the README gives for a token as they are printed, but for ports that are free and for
// waiting until the service answers, however long that takes.
func TestReadmeToken(t *testing.T) {
	softhsm.Need(t)
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("curl is not installed")
	}
	_, section, ok := strings.Cut(read(t, "README.md"), "\n### With a token, step by step\n")
	_, script, ok2 := strings.Cut(section, "\n```sh\n")
	script, _, ok3 := strings.Cut(script, "\n```\n")
	if !ok || !ok2 || !ok3 {
		t.Fatal("README.md has no commands for a token")
	}
	dir := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(dir, "bin", "knhk"), "./server/knhk")
	build.Dir = root(t)
	build.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := build.CombinedOutput(); err != nil {
		t.Skipf("no build with cgo: %v\n%s", err, out)
	}
	var admin int
	for _, printed := range []string{"127.0.0.1:9012", "127.0.0.1:9013"} {
		port, err := harness.FreePort()
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(script, printed) {
			t.Fatalf("the commands do not name %s", printed)
		}
		script, admin = strings.ReplaceAll(script, printed, fmt.Sprintf("127.0.0.1:%d", port)), port
	}
	const pause = "\nsleep 5\n"
	if strings.Count(script, pause) != 1 {
		t.Fatalf("the commands do not hold one %q", pause)
	}
	script = strings.Replace(script, pause, fmt.Sprintf("\nuntil curl -sf -o page http://127.0.0.1:%d/livez; do sleep 0.1; done\n", admin), 1)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-eu", "-c", script)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if serr := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); serr == nil && err == nil {
		t.Error("the commands leave a process behind")
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out.Bytes())
	}
	for _, want := range []string{"the log is not begun", "revoked daily key ", " rotated ", " revoked ", "\nidentity example.com/knhk/token/", " is sealed above ", " 0 problems\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the commands do not say %q", want)
		}
	}
	if t.Failed() {
		t.Logf("%s", out.Bytes())
	}
}
