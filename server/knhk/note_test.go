package main

import (
	"bytes"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/spf13/cobra"
)

// TestNoteIsSynced writes a revocation's file: it gets its name when it is on the disk, and not when that cannot be.
func TestNoteIsSynced(t *testing.T) {
	write := func(file string) error {
		cmd := &cobra.Command{}
		cmd.Flags().String("out", file, "")
		n, err := noteFile(cmd)
		if err != nil {
			return err
		}
		defer n.discard()
		return n.write([]byte("a note\n"))
	}
	file := filepath.Join(t.TempDir(), "revocation")
	if err := write(file); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(file); err != nil || !bytes.Equal(b, []byte("a note\n")) {
		t.Errorf("the file: %q, %v", b, err)
	}
	file = filepath.Join(t.TempDir(), "revocation")
	if err := syscall.Mkfifo(file+".part", 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := os.OpenFile(file+".part", os.O_RDWR, 0) // so that the writer does not wait for a reader
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := write(file); err == nil {
		t.Error("a note that was not synced was taken for written")
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("a note that was not synced got its name")
	}
}
