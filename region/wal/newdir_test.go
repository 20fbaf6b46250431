package wal_test

import (
	"path/filepath"
	"slices"
	"testing"

	"github.com/knhk/sidecar/region/wal"
)

// syncedDirs is the file system of the machine, and remembers which directories were synced.
type syncedDirs struct {
	wal.FS
	dirs []string
}

func (s *syncedDirs) SyncDir(dir string) error {
	s.dirs = append(s.dirs, dir)
	return s.FS.SyncDir(dir)
}

// TestNewLogIsSynced: a new log's directory is durable under its name, or a power loss could take the log as a whole and the next
// start begin another.
func TestNewLogIsSynced(t *testing.T) {
	fs := &syncedDirs{FS: wal.OS()}
	dir := filepath.Join(t.TempDir(), "wal")
	w, err := wal.Open(wal.Config{Dir: dir, SegmentBytes: 16 << 10, FS: fs})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(fs.dirs, filepath.Dir(dir)) {
		t.Errorf("synced: %q, without %s", fs.dirs, filepath.Dir(dir))
	}
}
