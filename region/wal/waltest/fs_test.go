package waltest

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/knhk/sidecar/region/wal"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func put(t *testing.T, f wal.File, text string, off int64) {
	t.Helper()
	_, err := f.WriteAt([]byte(text), off)
	must(t, err)
}

// newFile returns a file system with an empty, durable file /d/x.
func newFile(t *testing.T, page int) (*FS, wal.File) {
	t.Helper()
	f := New(page)
	must(t, f.MkdirAll("/d", 0o700))
	x, err := f.Create("/d/x")
	must(t, err)
	must(t, f.SyncDir("/d"))
	return f, x
}

// TestCrashLosesWhatWasNotSynced: content and names alike, and nothing that was.
func TestCrashLosesWhatWasNotSynced(t *testing.T) {
	f, x := newFile(t, 0)
	put(t, x, "old", 0)
	must(t, x.Sync())
	put(t, x, "new", 0)
	y, err := f.Create("/d/y")
	must(t, err)
	put(t, y, "synced, but without a name", 0)
	must(t, y.Sync())

	killed := f.Clone()
	killed.Kill()
	if got := killed.Content("/d/x"); string(got) != "new" || len(killed.Names()) != 2 {
		t.Errorf("death of the process: %q, %v", got, killed.Names())
	}
	f.Crash(nil)
	if got := f.Content("/d/x"); string(got) != "old" || len(f.Names()) != 1 {
		t.Errorf("death of the machine: %q, %v", got, f.Names())
	}
	if _, err := x.WriteAt([]byte("ghost"), 0); err == nil {
		t.Error("a dead process wrote")
	}
	if _, err := f.Open("/d/y"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("open of a lost name: %v", err)
	}
}

// TestCrashKeepsAnyVersionOfAPage: over many seeds every version of each of two pages is seen, in every combination.
func TestCrashKeepsAnyVersionOfAPage(t *testing.T) {
	seen := map[string]bool{}
	for seed := range uint64(400) {
		f, x := newFile(t, 4)
		put(t, x, "aaaaaaaa", 0)
		must(t, x.Sync())
		put(t, x, "bbbbbbbb", 0)
		put(t, x, "cccccccc", 0)
		f.Crash(rand.New(rand.NewPCG(seed, 1)))
		seen[string(f.Content("/d/x"))] = true
	}
	for _, first := range []string{"aaaa", "bbbb", "cccc"} {
		for _, second := range []string{"aaaa", "bbbb", "cccc"} {
			if !seen[first+second] {
				t.Errorf("never saw %s", first+second)
			}
		}
	}
	if len(seen) != 9 {
		t.Errorf("saw %d outcomes, want 9: a page was torn", len(seen))
	}
}

// TestFaults: each way to fail does what it says, a failed sync included.
func TestFaults(t *testing.T) {
	f, x := newFile(t, 0)
	f.FailNth(OpWrite, 2, Fault{Err: unix.EIO, Bytes: 2})
	put(t, x, "one", 0)
	if n, err := x.WriteAt([]byte("two"), 0); n != 2 || !errors.Is(err, unix.EIO) {
		t.Errorf("short write: %d, %v", n, err)
	}
	put(t, x, "!", 3)
	if got := f.Content("/d/x"); string(got) != "twe!" {
		t.Errorf("after the short write: %q", got)
	}

	f.FailNth(OpSync, 1, Fault{Err: unix.EIO})
	if err := x.Sync(); !errors.Is(err, unix.EIO) {
		t.Errorf("sync: %v", err)
	}
	must(t, x.Sync()) // succeeds, and proves nothing
	lost := f.Clone()
	lost.Crash(rand.New(rand.NewPCG(1, 1)))
	if got := lost.Content("/d/x"); len(got) != 0 {
		t.Errorf("a sync after a failed one saved %q", got)
	}

	put(t, x, "three", 0)
	f.FailNth(OpSync, 1, Fault{Err: unix.EIO, Persist: true})
	if err := x.Sync(); !errors.Is(err, unix.EIO) {
		t.Errorf("sync: %v", err)
	}
	f.FailNth(OpRename, 1, Fault{Err: unix.ENOSPC, Persist: true})
	if err := f.Rename("/d/x", "/d/y"); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("rename: %v", err)
	}
	must(t, f.SyncDir("/d"))
	f.Crash(nil)
	if got := f.Content("/d/y"); !bytes.Equal(got, []byte("three")) || f.Content("/d/x") != nil {
		t.Errorf("failed but persisted: %q, %v", got, f.Names())
	}
}
