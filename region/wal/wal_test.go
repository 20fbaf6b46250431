package wal_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/knhk/sidecar/region/wal"
	"github.com/knhk/sidecar/region/wal/waltest"
)

// run starts Run and returns what ends it and gives its error.
func run(t *testing.T, w *wal.WAL) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	return func() error {
		cancel()
		return <-done
	}
}

func TestConfigErrors(t *testing.T) {
	base := wal.Config{Dir: "/wal", FS: waltest.New(0)}
	for _, c := range []struct {
		name string
		edit func(*wal.Config)
		want string
	}{
		{"no directory", func(c *wal.Config) { c.Dir = "" }, "Dir"},
		{"segment too small", func(c *wal.Config) { c.SegmentBytes = 4096 }, "SegmentBytes"},
		{"segment too large for offsets", func(c *wal.Config) { c.SegmentBytes = 2 << 30 }, "SegmentBytes"},
		{"segment not of whole pages", func(c *wal.Config) { c.SegmentBytes = 1<<20 + 1 }, "SegmentBytes"},
		{"less than three segments", func(c *wal.Config) { c.SegmentBytes, c.MaxBytes = 1<<20, 2<<20 }, "MaxBytes"},
		{"reserve leaves nothing for others", func(c *wal.Config) { c.SegmentBytes, c.MaxBytes, c.ReserveBytes = 1<<20, 3<<20, 2<<20 },
			"ReserveBytes"},
		{"negative reserve", func(c *wal.Config) { c.ReserveBytes = -1 }, "ReserveBytes"},
		{"record larger than an eighth", func(c *wal.Config) { c.SegmentBytes, c.MaxRecordBytes = 16<<10, 4<<10 }, "MaxRecordBytes"},
		{"negative period", func(c *wal.Config) { c.SyncEvery = -1 }, "SyncEvery"},
		{"too few numbers ahead", func(c *wal.Config) { c.Ahead = 1 }, "Ahead"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := base
			c.edit(&cfg)
			if _, err := wal.Open(cfg); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want an error naming %s", err, c.want)
			}
		})
	}
}

// TestRoundTrip appends at both levels, closes in order, and finds everything again on another machine.
func TestRoundTrip(t *testing.T) {
	fs := waltest.New(0)
	cfg := testConfig(fs)
	w := mustOpen(t, cfg)
	if r := w.Recovered(); r.First != 1 || r.Next != 1 || len(r.Lost) != 0 || !r.Clean {
		t.Fatalf("new log: %+v", r)
	}
	stop := run(t, w)
	for i := range 20 {
		ticket := mustAppend(t, w, []wal.Level{wal.Written, wal.Durable}[i%2])
		must(t, ticket.Wait(t.Context()))
		if ticket.Seq() != uint64(i+1) {
			t.Fatalf("record %d got number %d", i, ticket.Seq())
		}
	}
	must(t, w.Release(6))
	must(t, w.Sync(t.Context()))
	must(t, stop())
	if _, err := w.Append(wal.Written, true, record); !errors.Is(err, wal.ErrClosed) {
		t.Errorf("append after Run: got %v, want ErrClosed", err)
	}
	must(t, w.Sync(t.Context())) // there is nothing left to sync
	if err := w.Run(t.Context()); !errors.Is(err, wal.ErrClosed) {
		t.Errorf("second Run: got %v, want ErrClosed", err)
	}
	must(t, w.Close())
	must(t, w.Close())

	fs.Crash(nil)
	again := mustOpen(t, onBoot(cfg, "another"))
	if r := again.Recovered(); r.First != 6 || r.Next != 21 || len(r.Lost) != 0 || !r.Clean || r.Torn || r.SameBoot {
		t.Errorf("after a clean end: %+v", r)
	}
	if next := audit(t, again); next != 21 {
		t.Errorf("records end before %d, want 21", next)
	}
	sentinel := errors.New("enough")
	if err := again.Replay(func(uint64, []byte) error { return sentinel }); !errors.Is(err, sentinel) {
		t.Errorf("replay: got %v, want the function's error", err)
	}
	must(t, again.Close())
	if err := again.Replay(func(uint64, []byte) error { return nil }); !errors.Is(err, wal.ErrClosed) {
		t.Errorf("replay after Close: got %v", err)
	}
}

// TestRefusedAppends: what is not appended uses no number.
func TestRefusedAppends(t *testing.T) {
	w := mustOpen(t, testConfig(waltest.New(0)))
	var zero wal.Ticket
	if zero.Wait(t.Context()) == nil {
		t.Error("the zero ticket is done")
	}
	for name, try := range map[string]func() error{
		"no level":      func() error { _, err := w.Append(0, true, record); return err },
		"unknown level": func() error { _, err := w.Append(wal.Durable+1, true, record); return err },
		"empty record":  func() error { _, err := w.Append(wal.Written, true, func(uint64) []byte { return nil }); return err },
		"large record": func() error {
			_, err := w.Append(wal.Written, true, func(uint64) []byte { return make([]byte, 1<<10+1) })
			return err
		},
		"panic": func() (err error) {
			defer func() { err = recover().(error) }()
			_, _ = w.Append(wal.Written, true, func(uint64) []byte { panic(errors.New("boom")) })
			return nil
		},
	} {
		if try() == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if n := mustAppend(t, w, wal.Written).Seq(); n != 1 {
		t.Errorf("first number is %d", n)
	}
	if err := w.Release(3); err == nil {
		t.Error("a number that was not handed out could be released")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := mustAppend(t, w, wal.Durable).Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("wait without Run: got %v", err)
	}
	must(t, w.Close()) // which commits it
}

// TestLevels: what each level promises, and what it does not.
func TestLevels(t *testing.T) {
	fs := waltest.New(0)
	cfg := testConfig(fs)
	w := mustOpen(t, cfg)
	written := fs.Calls()[waltest.OpWrite]
	waiting := mustAppend(t, w, wal.Durable)
	if n := fs.Calls()[waltest.OpWrite]; n != written {
		t.Errorf("a durable append wrote %d times by itself", n-written)
	}
	mustAppend(t, w, wal.Written)
	if n := fs.Calls()[waltest.OpWrite]; n != written+1 {
		t.Errorf("a written append made %d writes, want one for everything pending", n-written)
	}
	c := fs.Clone()
	copyCfg := cfg
	copyCfg.FS = c
	if next := audit(t, mustOpen(t, copyCfg)); next != 3 {
		t.Errorf("death of the process: records end before %d, want 3", next)
	}
	c = fs.Clone()
	c.Crash(nil)
	copyCfg = onBoot(cfg, "another")
	copyCfg.FS = c
	after := mustOpen(t, copyCfg)
	if r := after.Recovered(); r.Next <= 2 || r.LostFrom != 1 || r.LostTo != r.Next || r.LostTo < 3 {
		t.Errorf("death of the machine: %+v, want 1 and 2 lost", r)
	}
	must(t, w.Commit())
	must(t, waiting.Wait(t.Context()))
	fs.Crash(nil)
	if next := audit(t, mustOpen(t, onBoot(cfg, "another"))); next != 3 {
		t.Errorf("after the sync: records end before %d, want 3", next)
	}
}

// TestReserve fills a log: others are refused first, urgent appends go on through the reserve, and Release ends it.
func TestReserve(t *testing.T) {
	fs := waltest.New(0)
	cfg := testConfig(fs)
	cfg.MaxBytes, cfg.ReserveBytes = 64<<10, 20<<10
	w := mustOpen(t, cfg)
	fill := func(urgent bool) (n int) {
		for n < 200 {
			must(t, w.Prepare())
			_, err := w.Append(wal.Written, urgent, func(uint64) []byte { return make([]byte, 1000) })
			if errors.Is(err, wal.ErrFull) {
				return n
			}
			must(t, err)
			n++
		}
		return n
	}
	normal := fill(false)
	if free := w.Stats().Free; free < cfg.ReserveBytes {
		t.Errorf("others left %d bytes of a reserve of %d", free, cfg.ReserveBytes)
	}
	urgent := fill(true)
	if urgent < 16 || normal < 32 {
		t.Errorf("took %d normal and %d urgent records of 1,000 bytes", normal, urgent)
	}
	if s := w.Stats(); s.Bytes > cfg.MaxBytes {
		t.Errorf("takes %d bytes of %d", s.Bytes, cfg.MaxBytes)
	}
	must(t, w.Commit())
	must(t, w.Release(uint64(normal+urgent)))
	if fill(false) != 0 {
		t.Error("a release that is not durable yet freed room")
	}
	must(t, w.Idle()) // pins the release, though no record fits any more
	if n := fill(false); n < 16 {
		t.Errorf("took %d records after the release", n)
	}
	must(t, w.Close())
	if r := mustOpen(t, cfg).Recovered(); r.First != uint64(normal+urgent) {
		t.Errorf("first is %d, released below %d", r.First, normal+urgent)
	}
}

// TestFullAtOpen restarts a full log again and again: it must open, say what it holds, and go on after a Release.
func TestFullAtOpen(t *testing.T) {
	fs := waltest.New(0)
	cfg := testConfig(fs)
	cfg.MaxBytes = 48 << 10
	next := uint64(1)
	for i := range 6 {
		w := mustOpen(t, onBoot(cfg, string(rune('a'+i)))) // a new boot each time
		if r := w.Recovered(); r.First != 1 || r.Next < next {
			t.Fatalf("restart %d: %+v", i, r)
		}
		for range 200 {
			must(t, w.Prepare())
			ticket, err := w.Append(wal.Durable, true, func(uint64) []byte { return make([]byte, 1000) })
			if err != nil {
				break
			}
			must(t, w.Commit())
			next = ticket.Seq() + 1
		}
		fs.Crash(nil)
	}
	w := mustOpen(t, onBoot(cfg, "z"))
	lost := w.Recovered().Lost
	if len(lost) == 0 || w.Recovered().Next < next {
		t.Fatalf("recovered %+v", w.Recovered())
	}
	must(t, w.Release(w.Recovered().Next))
	must(t, w.Idle())
	must(t, w.Prepare())
	must(t, w.Prepare())
	if seq := mustAppend(t, w, wal.Written).Seq(); seq != lost[len(lost)-1].To {
		t.Errorf("goes on with %d after %v", seq, lost)
	}
	must(t, w.Close())
}

// TestCeiling: numbers beyond the last sync are bounded, and so is what a machine crash can lose.
func TestCeiling(t *testing.T) {
	fs := waltest.New(0)
	cfg := testConfig(fs)
	cfg.Ahead = 32
	w := mustOpen(t, cfg)
	fill := func(urgent bool) (n int) {
		for n < 200 {
			_, err := w.Append(wal.Written, urgent, record)
			if errors.Is(err, wal.ErrFull) {
				return n
			}
			must(t, err)
			n++
		}
		return n
	}
	if n := fill(false); n != 28 {
		t.Errorf("others took %d of 32 numbers, want 28", n)
	}
	if n := fill(true); n != 4 {
		t.Errorf("urgent appends took %d of the last 4 numbers", n)
	}
	c := fs.Clone()
	c.Crash(nil)
	copyCfg := onBoot(cfg, "another")
	copyCfg.FS = c
	if r := mustOpen(t, copyCfg).Recovered(); r.LostFrom != 1 || r.LostTo != 33 || r.Next != 33 {
		t.Errorf("lost %+v, want 1 to 33", r)
	}
	must(t, w.Commit())
	if n := fill(true); n != 32 {
		t.Errorf("%d numbers after a sync, want 32", n)
	}
	must(t, w.Close())
}

// TestDiskFull takes the space away for a while. Nothing is latched, and appends go on by themselves when it is back.
func TestDiskFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := waltest.New(0)
		var log bytes.Buffer
		cfg := testConfig(fs)
		cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
		w := mustOpen(t, cfg)
		full := func(c waltest.Call) *waltest.Fault {
			if c.Op == waltest.OpWrite && strings.HasSuffix(c.Name, ".tmp") {
				return &waltest.Fault{Err: unix.ENOSPC, Bytes: 100}
			}
			return nil
		}
		fs.SetHook(full)
		stop := run(t, w)
		synctest.Wait()
		for range 1000 {
			if _, err := w.Append(wal.Durable, true, record); err != nil {
				if !errors.Is(err, wal.ErrFull) {
					t.Fatal(err)
				}
				break
			}
		}
		if s := w.Stats(); !s.DiskFull || s.Segments != 1 || w.Err() != nil {
			t.Errorf("on a full disk: %+v, latched %v", s, w.Err())
		}
		time.Sleep(10 * time.Second) // on the bubble's clock
		if n := strings.Count(log.String(), "will be refused"); n != 1 {
			t.Errorf("said %d times that there is no space", n)
		}
		if slices.Contains(fs.Names(), simDir+"/next.tmp") {
			t.Error("the unfinished segment was left behind")
		}
		fs.SetHook(nil)
		time.Sleep(2 * time.Second)
		must(t, mustAppend(t, w, wal.Durable).Wait(t.Context()))
		if s := w.Stats(); s.DiskFull {
			t.Errorf("with space again: %+v", s)
		}
		must(t, stop())
		must(t, w.Close())

		fs.SetHook(full)
		fresh := cfg
		fresh.Dir = "/new"
		if _, err := wal.Open(fresh); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("a new log on a full disk: got %v, want ENOSPC", err)
		}
		fs.SetHook(nil)
		must(t, mustOpen(t, fresh).Close())
	})
}

// TestBackground: Run syncs Written records within SyncEvery and notes what is durable once the log is idle.
func TestBackground(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := waltest.New(0)
		cfg := testConfig(fs)
		w := mustOpen(t, cfg)
		stop := run(t, w)
		mustAppend(t, w, wal.Written)
		time.Sleep(wal.DefaultSyncEvery + 1)
		synctest.Wait()
		if s := w.Stats(); s.Durable != 2 {
			t.Errorf("not synced after SyncEvery: %+v", s)
		}
		time.Sleep(wal.DefaultSyncEvery)
		synctest.Wait()
		before := w.Stats()
		name, _ := newest(fs)
		c := fs.Clone()
		b := c.Content(name)
		b[bytes.Index(b, record(1))]++
		c.Corrupt(name, b)
		copyCfg := onBoot(cfg, "another")
		copyCfg.FS = c
		if _, err := wal.Open(copyCfg); !errors.Is(err, wal.ErrCorrupt) {
			t.Errorf("damage to the last record of an idle log: got %v, want ErrCorrupt", err)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if s := w.Stats(); s.Groups != before.Groups || s.Syncs != before.Syncs {
			t.Errorf("an idle log wrote %d groups and synced %d times in an hour", s.Groups-before.Groups, s.Syncs-before.Syncs)
		}
		must(t, stop())
		must(t, w.Close())
	})
}

// TestRunEndsOnFailure: a failure anywhere ends Run and every wait, with the cause.
func TestRunEndsOnFailure(t *testing.T) {
	for _, op := range []waltest.Op{waltest.OpWrite, waltest.OpSync, waltest.OpRename, waltest.OpSyncDir} {
		t.Run(string(op), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fs := waltest.New(0)
				w := mustOpen(t, testConfig(fs))
				fs.FailNth(op, 1, waltest.Fault{Err: unix.EIO})
				ticket := mustAppend(t, w, wal.Durable)
				stop := run(t, w)
				if err := ticket.Wait(t.Context()); err != nil && !errors.Is(err, unix.EIO) {
					t.Errorf("wait: %v", err)
				}
				synctest.Wait()
				if err := stop(); !errors.Is(err, wal.ErrFailed) || !errors.Is(err, unix.EIO) {
					t.Errorf("run: got %v, want ErrFailed and EIO", err)
				}
				if err := w.Sync(t.Context()); !errors.Is(err, wal.ErrFailed) {
					t.Errorf("sync: %v", err)
				}
				if err := w.Close(); !errors.Is(err, wal.ErrFailed) {
					t.Errorf("close: %v", err)
				}
			})
		})
	}
}

// TestSegmentSizeChanges opens a log with another SegmentBytes: old segments stay readable and are removed, not recycled.
func TestSegmentSizeChanges(t *testing.T) {
	fs := waltest.New(0)
	cfg := testConfig(fs)
	var next uint64
	for i, size := range []int64{16 << 10, 32 << 10, 16 << 10} {
		cfg.SegmentBytes, cfg.MaxBytes = size, 8*size
		w := mustOpen(t, cfg)
		if i > 0 {
			if got := audit(t, w); got != next {
				t.Fatalf("records end before %d, want %d", got, next)
			}
		}
		for range 300 {
			must(t, w.Prepare())
			next = mustAppend(t, w, wal.Written).Seq() + 1
		}
		must(t, w.Commit())
		must(t, w.Release(next-20))
		must(t, w.Close())
		var bytes int64
		for _, n := range fs.Names() {
			if strings.HasSuffix(n, ".wal") {
				bytes += int64(len(fs.Content(n)))
			}
		}
		if s := w.Stats(); s.Bytes != bytes {
			t.Errorf("stats say %d bytes, files have %d", s.Bytes, bytes)
		}
	}
}
