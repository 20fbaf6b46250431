package harness

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// Directory makes a directory for a test's processes below parent ("": the system's place for temporary files). It is removed at the
// end of the test, and kept when that failed. Not t.TempDir: its path is too long for a unix socket.
func Directory(t TB, parent string) string {
	t.Helper()
	dir, err := os.MkdirTemp(parent, "knhk-e2e-")
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
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
