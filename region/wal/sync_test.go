//go:build linux

package wal

import (
	"os"
	"testing"
)

// TestSyncReachesTheKernel asks for what the kernel refuses: a pipe and a directory of procfs cannot be synced. A Sync that
// does nothing hears of no error.
func TestSyncReachesTheKernel(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if err := (osFile{w}).Sync(); err == nil {
		t.Error("a pipe was synced")
	}
	if err := OS().SyncDir("/proc/self"); err == nil {
		t.Error("a directory of procfs was synced")
	}
	// And what can be synced is.
	f, err := os.Create(t.TempDir() + "/f")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := (osFile{f}).Sync(); err != nil {
		t.Error(err)
	}
	if err := OS().SyncDir(t.TempDir()); err != nil {
		t.Error(err)
	}
}
