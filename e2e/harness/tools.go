package harness

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// BuildTools builds the programs that the module e2e/tools/NAME pins into .tools/NAME beside go.mod, unless those there are as they would
// become, and returns that directory. Several processes may call it at once. It fails after limit, and where the modules are neither in
// Go's cache nor within reach.
func BuildTools(ctx context.Context, name string, limit time.Duration, flags ...string) (dir string, err error) {
	fail := func(err error) (string, error) { return "", fmt.Errorf("build %s: %w", name, err) }
	root, err := ModuleRoot()
	if err != nil {
		return fail(err)
	}
	dir = filepath.Join(root, ".tools", name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fail(err)
	}
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return fail(err)
	}
	defer lock.Close() // gives the lock up
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		select {
		case <-ctx.Done():
			return fail(fmt.Errorf("another process is at it: %w", ctx.Err()))
		case <-time.After(100 * time.Millisecond):
		}
	}
	cmd := exec.CommandContext(ctx, "go", append(append([]string{"build"}, flags...), "-o", dir+string(filepath.Separator), "tool")...)
	cmd.Dir = filepath.Join(root, "e2e", "tools", name)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fail(fmt.Errorf("%w\n%s", err, out))
	}
	return dir, nil
}
