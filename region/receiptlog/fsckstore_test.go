package receiptlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/region/wal"
)

// TestFsckNamesWhatStandsBeside damages what stands beside the records: evidence, indices, the write-ahead log.
func TestFsckNamesWhatStandsBeside(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	for i := range 10 {
		f.outcome(f.decide(wal.Durable, fmt.Sprint(i)), 200)
	}
	f.bundle(f.decide(wal.Durable, "pending"), 1)
	for i := range 2 * farBlocks { // so that it is too far back for a start to read
		before := l.Stats().Blocks
		f.outcome(f.decide(wal.Durable, fmt.Sprint("later ", i)), 200)
		eventually(t, "the next block", func() bool { return l.Stats().Blocks > before })
	}
	f.close()
	f.fsckClean()
	whole := f.cfg.Dir
	type change = func(s *store) error
	for _, c := range []struct {
		name, where, what string
		damage            change
	}{
		{"evidence is gone", "block 1 ", "evidence: block 1: chunk 0 is missing", func(s *store) error {
			return s.db.Delete(key(kEvidence, 1, 0), pebble.Sync)
		}},
		{"evidence is another's", "block 1 ", "does not open the decision's commitment", func(s *store) error {
			items, err := s.chunk(kEvidence, 1, 0)
			if err != nil {
				return err
			}
			var plain []byte
			for i, item := range items {
				if ev, err := receipt.ParseEvidence(item); err == nil && i == 0 {
					ev.Salt[0] ^= 1
					item = receipt.AppendEvidence(nil, ev)
				}
				plain = appendChunk(plain, item)
			}
			return s.db.Set(key(kEvidence, 1, 0), s.enc.EncodeAll(plain, nil), pebble.Sync)
		}},
		{"the id index is gone", "block 1 ", "index of ids", func(s *store) error { return s.db.Delete(key(kIDs, 1), pebble.Sync) }},
		{"the time index is gone", "incarnation ", "index by time", func(s *store) error {
			h, _, err := s.parseHeaderAt(1)
			if err != nil {
				return err
			}
			return s.db.Delete(key(kTime, uint64(h.Time.UnixNano()), 1), pebble.Sync)
		}},
		{"the place in the log is another", "incarnation ", "is said to be leaf 0", func(s *store) error {
			return s.db.Set(key(kIndex, 1), binary.BigEndian.AppendUint64(nil, 0), pebble.Sync)
		}},
		{"a pending decision is forgotten", "blocks", "not noted as pending", func(s *store) error {
			return s.db.DeleteRange([]byte{kPending}, []byte{kPending + 1}, pebble.Sync)
		}},
		{"a decision is pending that is not", "blocks", "noted as pending, and is not", func(s *store) error {
			return s.db.Set(uuidKey(kPending, [16]byte{1}), make([]byte, 16), pebble.Sync)
		}},
		{"a key statement is forgotten", "log leaf 0", "that the block store does not know", func(s *store) error {
			return s.db.Delete(key(kKey, 0), pebble.Sync)
		}},
		{"the state of the keys is forgotten", "blocks", "state of the daily keys is missing", func(s *store) error {
			return s.db.Delete(metaKey(keysMeta), pebble.Sync)
		}},
		{"an unknown key", "blocks", "unknown key", func(s *store) error { return s.db.Set([]byte("z"), nil, pebble.Sync) }},
		{"the blocks are rolled back behind the write-ahead log", "wal", "those between were sealed and are gone", func(s *store) error {
			var c chain
			if err := s.loadChain(&c); err != nil {
				return err
			}
			c.Released = 2
			b := s.db.NewBatch()
			defer b.Close()
			return errors.Join(putChain(b, c), b.Commit(pebble.Sync))
		}},
		{"a segment of the write-ahead log is damaged", "wal", "corrupt", nil},
	} {
		dir := filepath.Join(t.TempDir(), "copy")
		if err := os.CopyFS(dir, os.DirFS(whole)); err != nil {
			t.Fatal(err)
		}
		if c.damage == nil {
			files, err := filepath.Glob(filepath.Join(dir, "wal", "*.wal"))
			if err != nil || len(files) == 0 {
				t.Fatal(files, err)
			}
			for _, file := range files {
				b, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				for i := range 64 {
					b[i] ^= 1
				}
				if err := os.WriteFile(file, b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
		} else if err := editStore(dir, c.damage, f); err != nil {
			t.Fatal(err)
		}
		f.cfg.Dir = dir
		r := f.fsck()
		named := false
		for _, p := range r.Problems {
			named = named || strings.HasPrefix(p.Where, c.where) && strings.Contains(p.What, c.what)
		}
		if !named {
			t.Errorf("%s: not named: %+v", c.name, r.Problems)
		}
	}
}

func editStore(dir string, change func(*store) error, f *fixture) error {
	db, err := pebble.Open(filepath.Join(dir, "blocks"), &pebble.Options{Logger: pebbleLog{f.cfg.Log}})
	if err != nil {
		return err
	}
	s, err := newStore(db)
	if err != nil {
		return err
	}
	return errors.Join(change(s), db.Close())
}

// TestOrdinals: every ordinal is a record, once, or declared lost.
func TestOrdinals(t *testing.T) {
	type ranges = []wal.Range
	for _, c := range []struct {
		name          string
		present, lost ranges
		want          string
	}{
		{"nothing", nil, nil, ""},
		{"dense", ranges{{From: 1, To: 5}, {From: 5, To: 9}}, nil, ""},
		{"dense, in another order", ranges{{From: 5, To: 9}, {From: 1, To: 5}}, nil, ""},
		{"a gap", ranges{{From: 1, To: 5}, {From: 7, To: 9}}, nil, "records 5 to 6 are in no block"},
		{"the first is missing", ranges{{From: 2, To: 5}}, nil, "records 1 to 1 are in no block"},
		{"a gap that is declared", ranges{{From: 1, To: 5}, {From: 7, To: 9}}, ranges{{From: 5, To: 7}}, ""},
		{"declared twice, the second time further", ranges{{From: 1, To: 5}, {From: 9, To: 10}}, ranges{{From: 5, To: 7}, {From: 5, To: 9}}, ""},
		{"declared too short", ranges{{From: 1, To: 5}, {From: 7, To: 9}}, ranges{{From: 5, To: 6}}, "records 6 to 6 are in no block"},
		{"declared, and there", ranges{{From: 1, To: 9}, {From: 9, To: 12}}, ranges{{From: 9, To: 11}}, "records 9 to 10 are there twice"},
		{"twice", ranges{{From: 1, To: 5}, {From: 4, To: 9}}, nil, "records 4 to 4 are there twice"},
		{"lost at the end", ranges{{From: 1, To: 5}}, ranges{{From: 5, To: 7}}, ""},
	} {
		a := &audit{report: &Report{}, present: c.present, lost: c.lost}
		a.ordinals()
		var got []string
		for _, p := range a.report.Problems {
			got = append(got, p.What)
		}
		if text := strings.Join(got, "; "); (c.want == "") != (text == "") || !strings.Contains(text, c.want) {
			t.Errorf("%s: %q, want %q", c.name, text, c.want)
		}
	}
}
