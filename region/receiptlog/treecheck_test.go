package receiptlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2"

	"github.com/knhk/sidecar/region/wal"
)

// TestOpenNames damages what a start builds on: it is named, and nothing is signed over it.
func TestOpenNames(t *testing.T) {
	f := newFixture(t)
	f.open()
	for i := range 5 {
		f.bundle(f.decide(wal.Durable, fmt.Sprint(i)), 1)
	}
	f.close()
	whole := f.cfg.Dir
	last := func(dir string) string { // the widest partial resource of the log's right edge
		files, err := filepath.Glob(filepath.Join(dir, "log", "tile", "entries", "000.p", "*"))
		if err != nil || len(files) == 0 {
			t.Fatal(files, err)
		}
		var widest string
		for _, name := range files {
			if n := filepath.Base(name); len(n) > len(widest) || len(n) == len(widest) && n > widest {
				widest = n
			}
		}
		return widest
	}
	for _, c := range []struct {
		name, want string
		file       func(dir string) string
		damage     func(b []byte) []byte
	}{
		{"the tree state's root", "check log: ", func(string) string { return "log/.state/treeState" }, func(b []byte) []byte {
			i := bytes.Index(b, []byte(`"root":"`)) + len(`"root":"`) // one letter of the base64
			b[i] = map[bool]byte{true: 'B', false: 'A'}[b[i] == 'A']
			return b
		}},
		{"the tree state is of a smaller tree", "check log: ", func(string) string { return "log/.state/treeState" }, func(b []byte) []byte {
			return bytes.Replace(b, []byte(`"size":`), []byte(`"size":0,"was":`), 1)
		}},
		{"the tree state is gone", "treeState is missing or damaged", func(string) string { return "log/.state/treeState" }, nil},
		{"a leaf of the last bundle", "check log: entries are damaged", func(dir string) string {
			return "log/tile/entries/000.p/" + last(dir)
		}, func(b []byte) []byte { b[10] ^= 1; return b }},
		{"a hash of the last tile", "check log: ", func(dir string) string { return "log/tile/0/000.p/" + last(dir) },
			func(b []byte) []byte { b[40] ^= 1; return b }},
		{"the checkpoint", "not signed by the identity key", func(string) string { return "log/checkpoint" }, func(b []byte) []byte {
			i := bytes.IndexByte(b, '\n') + 1
			b[i] ^= 1 // the size
			return b
		}},
		{"the log id behind what the origin shows of it", "one of them is damaged", func(string) string { return "log.json" }, func(b []byte) []byte {
			i := bytes.Index(b, []byte(`"log_id":"`)) + len(`"log_id":"`) + 31
			b[i] = map[bool]byte{true: '1', false: '0'}[b[i] == '0']
			return b
		}},
		{"the policy file", "", func(string) string { return "policy" }, func(b []byte) []byte { return b[1:] }},
	} {
		dir := filepath.Join(t.TempDir(), "copy")
		if err := os.CopyFS(dir, os.DirFS(whole)); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, c.file(dir))
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if c.damage == nil {
			err = os.Remove(path)
		} else {
			err = os.WriteFile(path, c.damage(bytes.Clone(before)), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		f.cfg.Dir = dir
		l, err := Open(t.Context(), f.cfg)
		if l != nil {
			l.Close(context.Background())
		}
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
		if c.want != "" {
			continue
		}
		if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
			t.Errorf("%s: not written again: %q, %v", c.name, after, err)
		}
	}
}

// TestOpenNamesLostBlocks takes blocks out of the store: a start says so.
func TestOpenNamesLostBlocks(t *testing.T) {
	f := newFixture(t)
	f.open()
	for i := range 3 {
		f.bundle(f.decide(wal.Durable, fmt.Sprint(i)), 1)
	}
	f.close()
	whole := f.cfg.Dir
	for _, c := range []struct {
		name, want string
		damage     func(dir string) error
	}{
		{"the first block", "block 0 is missing", func(dir string) error {
			return editStore(dir, func(s *store) error { return s.db.Delete(key(kHeader, 0), pebble.Sync) }, f)
		}},
		{"a block in the middle", "block 2 is missing", func(dir string) error {
			return editStore(dir, func(s *store) error { return s.db.Delete(key(kHeader, 2), pebble.Sync) }, f)
		}},
		{"all of them", "the block store is empty", func(dir string) error { return os.RemoveAll(filepath.Join(dir, "blocks")) }},
		{"all of them, and the write-ahead log", "the block store is empty", func(dir string) error {
			return errors.Join(os.RemoveAll(filepath.Join(dir, "blocks")), os.RemoveAll(filepath.Join(dir, "wal")))
		}},
	} {
		dir := filepath.Join(t.TempDir(), "copy")
		if err := os.CopyFS(dir, os.DirFS(whole)); err != nil {
			t.Fatal(err)
		}
		if err := c.damage(dir); err != nil {
			t.Fatal(err)
		}
		f.cfg.Dir = dir
		l, err := Open(t.Context(), f.cfg)
		if l != nil {
			l.Close(context.Background())
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}
