package harness

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// quietPlace is a directory in memory, if there is one with room, else "". A disk that somebody else keeps busy for longer than a
// class's commit_timeout has requests refused, as it must; most tests are about something else, and count requests. `make fault`
// takes the real disk.
func quietPlace() string {
	const place, room = "/dev/shm", 4 << 30
	var fs unix.Statfs_t
	err := unix.Statfs(place, &fs)
	if err != nil || fs.Type != unix.TMPFS_MAGIC || fs.Flags&(unix.ST_NOEXEC|unix.ST_RDONLY) != 0 || fs.Bavail*uint64(fs.Bsize) < room || os.Getenv("KNHK_FAULT_FULL") == "1" {
		return ""
	}
	return place
}

// Directory makes a directory for a test's processes below parent ("": in memory where there is room, else in the system's place for
// temporary files, or in /tmp when the name of that is long). It is removed at the end of the test, and kept when that failed, but for what is in memory. Not t.TempDir: its
// path is too long for a unix socket.
func Directory(t TB, parent string) string {
	t.Helper()
	inMemory := false
	if parent == "" {
		parent = quietPlace()
		inMemory = parent != ""
	}
	if parent == "" && len(os.TempDir()) > 40 {
		parent = "/tmp"
	}
	dir, err := os.MkdirTemp(parent, "knhk-e2e-")
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		if t.Failed() && !inMemory {
			t.Logf("files are kept in %s", dir)
		} else if err := os.RemoveAll(dir); err != nil {
			t.Fatalf("%v", err)
		}
	})
	return dir
}

// Files is what a directory holds.
type Files struct {
	Count float64 `json:"files"`
	Bytes float64 `json:"bytes"`
}

// FilesIn counts the regular files below dir. Files that go while it looks are not counted.
func FilesIn(dir string) (f Files, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		f.Count++
		f.Bytes += float64(info.Size())
		return nil
	})
	return f, err
}
