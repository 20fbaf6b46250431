//go:build linux

package kms

import (
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
)

// The tests below ask the kernel to sync what it cannot sync, or what we may not open: whoever forgets to sync hears of no
// error.

// TestFileIsSynced: a pipe takes what is written, and fsync refuses it.
func TestFileIsSynced(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := fill(w, []byte("an entry")); err == nil {
		t.Error("an entry's file was not synced before it got its name")
	}
}

// TestDirectoryIsSynced: a directory that can be written to but not opened takes the file, and cannot be synced.
func TestDirectoryIsSynced(t *testing.T) {
	if err := syncDir("/proc/self"); err == nil {
		t.Error("syncDir says that it has synced a directory of procfs")
	}
	e := entry(t, "daily", "1")
	dir := filepath.Join(t.TempDir(), "archive")
	if err := os.Mkdir(dir, 0o300); err != nil {
		t.Fatal(err)
	}
	unprivileged(t, dir)
	a := &Archive{dir: dir, place: place}
	if err := a.Put(e); err == nil {
		t.Error("an entry was written, and the directory was not synced")
	}
	path, err := a.path(e.Label, e.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the write failed before there was something to sync: %v", err)
	}
}

// TestNewDirectoryIsSynced: a new archive is durable under its name, or not there for its maker.
func TestNewDirectoryIsSynced(t *testing.T) {
	parent := filepath.Join(t.TempDir(), "parent")
	if err := os.Mkdir(parent, 0o300); err != nil { // what cannot be read cannot be opened to be synced
		t.Fatal(err)
	}
	unprivileged(t, parent)
	if err := mkdirAll(filepath.Join(parent, "archive")); err == nil {
		t.Error("a directory was made, and its name was not synced")
	}
	if _, err := os.Lstat(filepath.Join(parent, "archive")); err != nil {
		t.Errorf("it failed before there was something to sync: %v", err)
	}
}

// unprivileged has the rest of the test touch files as an ordinary user, to whom dir is given. Root may open anything.
func unprivileged(t *testing.T, dir string) {
	t.Helper()
	if os.Geteuid() != 0 {
		return
	}
	const nobody = 65534
	if err := os.Chown(dir, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	for up := filepath.Dir(dir); up != filepath.Clean(os.TempDir()) && len(up) > 1; up = filepath.Dir(up) {
		if err := os.Chmod(up, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	runtime.LockOSThread() // the file system's user is a thread's own
	if err := syscall.Setfsuid(nobody); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Setfsuid(0)
		runtime.UnlockOSThread()
	})
	if d, err := os.Open(dir); err == nil {
		d.Close()
		t.Skip("this user may open anything")
	}
}
