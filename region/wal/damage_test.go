package wal_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/knhk/sidecar/region/wal"
	"github.com/knhk/sidecar/region/wal/waltest"
)

// testConfig is a small log on fs under boot id "boot".
func testConfig(fs *waltest.FS) wal.Config {
	return wal.Config{
		Dir: simDir, SegmentBytes: 16 << 10, MaxBytes: 128 << 10, MaxRecordBytes: 1 << 10, ReserveBytes: 1 << 10, FS: fs,
		BootID: func() (string, error) { return "boot", nil },
	}
}

func onBoot(cfg wal.Config, boot string) wal.Config {
	cfg.BootID = func() (string, error) { return boot, nil }
	return cfg
}

func mustOpen(t *testing.T, cfg wal.Config) *wal.WAL {
	t.Helper()
	w, err := wal.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// record is content that belongs to one number.
func record(seq uint64) []byte {
	return fmt.Appendf(nil, "record %d %s", seq, strings.Repeat("x", int(seq%97)))
}

func mustAppend(t *testing.T, w *wal.WAL, level wal.Level) wal.Ticket {
	t.Helper()
	ticket, err := w.Append(level, false, record)
	if err != nil {
		t.Fatal(err)
	}
	return ticket
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// audit reads the whole log and returns the number after its last record. Content must be record's.
func audit(t *testing.T, w *wal.WAL) uint64 {
	t.Helper()
	next := w.Recovered().First
	must(t, w.Replay(func(seq uint64, rec []byte) error {
		if seq != next || !bytes.Equal(rec, record(seq)) {
			return fmt.Errorf("got record %d %.20q, want %d", seq, rec, next)
		}
		next++
		return nil
	}))
	return next
}

// newest returns the path of the segment with the highest number that holds a record, and the offset after its last
// non-zero byte before the slot. It is for fresh segments.
func newest(fs *waltest.FS) (name string, end int) {
	for _, n := range fs.Names() {
		b := fs.Content(n)
		if filepath.Ext(n) != ".wal" || len(b) < 72 {
			continue
		}
		if i := len(bytes.TrimRight(b[:len(b)-72], "\x00")); i > 0 {
			name, end = n, (i+7)&^7
		}
	}
	return name, end
}

// TestTailCutAtEveryByte cuts the last batch, which nobody was told is durable, at every byte: what came before must be
// there and the batch gone, whole.
func TestTailCutAtEveryByte(t *testing.T) {
	fs := waltest.New(0)
	cfg := testConfig(fs)
	w := mustOpen(t, cfg)
	for range 5 {
		mustAppend(t, w, wal.Durable)
	}
	must(t, w.Commit())
	must(t, w.Idle()) // the mark
	name, from := newest(fs)
	for range 3 {
		mustAppend(t, w, wal.Durable)
	}
	fs.FailNth(waltest.OpSync, 1, waltest.Fault{Err: errDied}) // the batch is written, its sync does not return
	if err := w.Commit(); !errors.Is(err, wal.ErrFailed) || !errors.Is(err, errDied) {
		t.Fatal(err)
	}
	_, to := newest(fs)
	fs.Kill()

	rng := rand.New(rand.NewPCG(1, 1))
	for cut := from; cut <= to; cut++ {
		for _, fill := range []string{"zeros", "garbage"} {
			for _, boot := range []string{"boot", "another"} {
				c := fs.Clone()
				b := c.Content(name)
				for i := cut; i < len(b); i++ {
					if b[i] = 0; fill == "garbage" {
						b[i] = byte(rng.Uint32())
					}
				}
				whole := bytes.Equal(b[from:to], fs.Content(name)[from:to])
				c.Corrupt(name, b)
				copyCfg := onBoot(cfg, boot)
				copyCfg.FS = c
				w, err := wal.Open(copyCfg)
				if err != nil {
					t.Fatalf("cut at %d of %d..%d, %s, boot %s: %v", cut, from, to, fill, boot, err)
				}
				want := uint64(6)
				if whole {
					want = 9
				}
				if next := audit(t, w); next != want {
					t.Fatalf("cut at %d of %d..%d, %s, boot %s: records end before %d, want %d", cut, from, to, fill, boot, next, want)
				}
				if rec := w.Recovered(); boot == "another" && (rec.LostFrom != want || rec.LostTo < 9) {
					t.Fatalf("cut at %d: lost %+v, want from %d", cut, rec, want)
				}
				must(t, w.Close())
			}
		}
	}
}

// TestTailCutBehindAcknowledged is the same for a batch that was acknowledged and noted as durable: damage to it is never
// taken for a torn tail.
func TestTailCutBehindAcknowledged(t *testing.T) {
	fs := waltest.New(0)
	cfg := testConfig(fs)
	w := mustOpen(t, cfg)
	_, from := newest(fs)
	for range 3 {
		mustAppend(t, w, wal.Durable)
	}
	must(t, w.Commit())
	name, to := newest(fs)
	must(t, w.Idle())
	fs.Kill()
	to -= 8 // the last bytes may be padding and zeros already
	for cut := from; cut < to; cut++ {
		for _, boot := range []string{"boot", "another"} {
			c := fs.Clone()
			b := c.Content(name)
			clear(b[cut:to])
			c.Corrupt(name, b)
			copyCfg := onBoot(cfg, boot)
			copyCfg.FS = c
			if _, err := wal.Open(copyCfg); !errors.Is(err, wal.ErrCorrupt) || !strings.Contains(err.Error(), name) {
				t.Fatalf("bytes %d..%d cleared, boot %s: got %v, want ErrCorrupt naming %s", cut, to, boot, err, name)
			}
		}
	}
}

// damaged makes a log of three segments with everything acknowledged and noted, and returns the number after the last.
func damagedLog(t *testing.T) (*waltest.FS, wal.Config, uint64) {
	fs := waltest.New(0)
	cfg := testConfig(fs)
	w := mustOpen(t, cfg)
	for w.Stats().Segments < 4 {
		must(t, w.Prepare())
		mustAppend(t, w, wal.Durable)
		mustAppend(t, w, wal.Written)
		must(t, w.Commit())
	}
	must(t, w.Idle())
	fs.Kill()
	return fs, cfg, w.Stats().Next
}

// TestBitFlips flips single bits all over the segments and VERSION. Open must refuse, or hold everything.
func TestBitFlips(t *testing.T) {
	const seed, flips = 42, 4000
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	fs, cfg, next := damagedLog(t)
	names := slices.DeleteFunc(fs.Names(), func(n string) bool { return strings.HasSuffix(n, "LOCK") })
	found := 0
	for i := range flips {
		name := names[rng.IntN(len(names))]
		c := fs.Clone()
		b := c.Content(name)
		off, bit := rng.IntN(len(b)), rng.IntN(8)
		if i%4 == 0 { // headers of the first groups
			off = rng.IntN(min(300, len(b)))
		}
		b[off] ^= 1 << bit
		c.Corrupt(name, b)
		copyCfg := onBoot(cfg, []string{"boot", "another"}[i%2])
		copyCfg.FS = c
		w, err := wal.Open(copyCfg)
		if err != nil {
			if !errors.Is(err, wal.ErrCorrupt) && !strings.Contains(err.Error(), "VERSION") {
				t.Fatalf("%s offset %d bit %d: %v", name, off, bit, err)
			}
			found++
			continue
		}
		if got := audit(t, w); got != next {
			t.Fatalf("%s offset %d bit %d: records end before %d, want %d, and nobody noticed", name, off, bit, got, next)
		}
		must(t, w.Close())
	}
	t.Logf("%d of %d flips refused, the others hit nothing that counts", found, flips)
	if found < flips/4 {
		t.Errorf("only %d of %d flips were found", found, flips)
	}
}

// TestDamage is damage of the larger kind. Every case must be refused.
func TestDamage(t *testing.T) {
	fs, cfg, _ := damagedLog(t)
	var segs []string
	for _, n := range fs.Names() {
		if strings.HasSuffix(n, ".wal") && !allZero(fs.Content(n)) {
			segs = append(segs, n)
		}
	}
	if len(segs) < 3 {
		t.Fatalf("want three segments in use, got %v", segs)
	}
	for _, c := range []struct {
		name string
		edit func(fs *waltest.FS)
	}{
		{"oldest segment gone", func(fs *waltest.FS) { fs.Lose(segs[0]) }},
		{"middle segment gone", func(fs *waltest.FS) { fs.Lose(segs[1]) }},
		{"newest segment gone", func(fs *waltest.FS) { fs.Lose(segs[len(segs)-1]) }},
		{"newest segment full of zeros", func(fs *waltest.FS) { fs.Corrupt(segs[len(segs)-1], make([]byte, 16<<10)) }},
		{"all segments gone", func(fs *waltest.FS) {
			for _, n := range fs.Names() {
				if strings.HasSuffix(n, ".wal") {
					fs.Lose(n)
				}
			}
		}},
		{"VERSION gone", func(fs *waltest.FS) { fs.Lose(simDir + "/VERSION") }},
		{"VERSION of another log", func(fs *waltest.FS) { fs.Corrupt(simDir+"/VERSION", []byte("knhk-wal 1\nlog 0000000000000001\n")) }},
		{"segment cut to half", func(fs *waltest.FS) { fs.Corrupt(segs[0], fs.Content(segs[0])[:8<<10]) }},
		{"two segments swapped", func(fs *waltest.FS) {
			a, b := fs.Content(segs[0]), fs.Content(segs[1])
			fs.Corrupt(segs[0], b)
			fs.Corrupt(segs[1], a)
		}},
		{"a page in the middle gone", func(fs *waltest.FS) {
			b := fs.Content(segs[1])
			clear(b[4096:8192])
			fs.Corrupt(segs[1], b)
		}},
	} {
		for _, boot := range []string{"boot", "another"} {
			t.Run(c.name+", boot "+boot, func(t *testing.T) {
				broken := fs.Clone()
				c.edit(broken)
				before := broken.Names()
				copyCfg := onBoot(cfg, boot)
				copyCfg.FS = broken
				if _, err := wal.Open(copyCfg); !errors.Is(err, wal.ErrCorrupt) {
					t.Errorf("got %v, want ErrCorrupt", err)
				}
				if after := broken.Names(); !slices.Equal(before, after) {
					t.Errorf("Open changed the directory from %v to %v", before, after)
				}
			})
		}
	}
	t.Run("unknown release", func(t *testing.T) {
		broken := fs.Clone()
		broken.Corrupt(simDir+"/VERSION", []byte("knhk-wal 2\nsomething\n"))
		copyCfg := cfg
		copyCfg.FS = broken
		if _, err := wal.Open(copyCfg); err == nil || errors.Is(err, wal.ErrCorrupt) {
			t.Errorf("got %v, want an error that does not cry damage", err)
		}
	})
}

func allZero(b []byte) bool { return len(bytes.TrimRight(b, "\x00")) == 0 }

// TestStaleGroupsAreNotReplayed recycles segments full of groups that all have the same size, so that every old group
// stands exactly where a new one would be expected, and crashes at each fill level of a recycled segment.
func TestStaleGroupsAreNotReplayed(t *testing.T) {
	fs := waltest.New(0)
	cfg := testConfig(fs)
	cfg.MaxBytes = 48 << 10
	same := func(seq uint64) []byte { return binary.LittleEndian.AppendUint64(make([]byte, 192), seq) }
	w := mustOpen(t, cfg)
	perSegment := (16<<10 - wal.FooterBytes) / 280
	for i := range 8 * perSegment {
		must(t, w.Prepare())
		ticket, err := w.Append(wal.Durable, true, same)
		must(t, err)
		must(t, w.Commit())
		must(t, ticket.Wait(context.Background()))
		if ticket.Seq() > 10 {
			must(t, w.Release(ticket.Seq()-10))
		}
		must(t, w.Idle())
		if i < 5*perSegment || i%3 != 0 {
			continue
		}
		c := fs.Clone()
		if i%2 == 0 {
			c.Crash(nil)
		}
		copyCfg := onBoot(cfg, fmt.Sprint("boot", i%2))
		copyCfg.FS = c
		again := mustOpen(t, copyCfg)
		next := again.Recovered().First
		must(t, again.Replay(func(seq uint64, rec []byte) error {
			if seq != next || !bytes.Equal(rec, same(seq)) {
				return fmt.Errorf("got record %d with content of %d, want %d", seq, binary.LittleEndian.Uint64(rec[192:]), next)
			}
			next++
			return nil
		}))
		if next != ticket.Seq()+1 || again.Recovered().First > ticket.Seq()-9 {
			t.Fatalf("replayed %d to %d after record %d", again.Recovered().First, next, ticket.Seq())
		}
		must(t, again.Close())
	}
	if n := w.Stats().Segments; n > 3 {
		t.Errorf("%d segments, MaxBytes allows 3", n)
	}
}
