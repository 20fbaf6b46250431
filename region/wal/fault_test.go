package wal_test

import (
	"errors"
	"fmt"
	"io"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/knhk/sidecar/region/wal"
	"github.com/knhk/sidecar/region/wal/waltest"
)

// script is a short life that makes every kind of call: it opens what is there, appends over several segments, releases,
// recycles, and closes. Errors of the log are allowed, broken promises are not.
func script(s *sim) error {
	for life := range 2 {
		if err := s.reopen(); err != nil {
			s.fs.Kill()
			if s.broken(err) {
				return err
			}
			return s.audit(life == 1)
		}
		for i := range 150 {
			level := wal.Durable
			if i%3 == 0 {
				level = wal.Written
			}
			if err := s.append(level); err != nil {
				return err
			}
			switch {
			case i%5 == 4:
				err := s.w.Commit()
				s.collect()
				if err != nil && s.w.Err() == nil {
					return fmt.Errorf("commit failed, but nothing is latched: %w", err)
				}
			case i%7 == 6:
				_ = s.w.Prepare()
			case i%11 == 10:
				_ = s.w.Idle()
			case i%13 == 12:
				if n := s.w.Stats().Durable; n > 30 && s.w.Release(n-30) == nil {
					s.released = max(s.released, n-30)
				}
			}
			if err := s.latched(); err != nil {
				return err
			}
		}
		if s.w.Close() == nil {
			for seq := range s.given {
				s.strong[seq] = true
			}
		}
	}
	return nil
}

// broken says whether a failed Open broke a promise: a fault may make it fail, but not cry damage.
func (s *sim) broken(err error) bool {
	return errors.Is(err, wal.ErrCorrupt) || !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, io.EOF)
}

// latched checks that a log that has failed takes nothing any more.
func (s *sim) latched() error {
	err := s.w.Err()
	if err == nil {
		return nil
	}
	called := false
	_, again := s.w.Append(wal.Durable, true, func(uint64) []byte { called = true; return []byte("x") })
	if !errors.Is(again, wal.ErrFailed) || called {
		return fmt.Errorf("append after %q: called %v, error %v", err, called, again)
	}
	return nil
}

// audit opens what is left and checks it, after the death of the process or, with power, of the machine.
func (s *sim) audit(power bool) error {
	s.fs.SetHook(nil)
	if power {
		s.fs.Crash(s.rng)
		s.power = true
		s.boot += "'"
	} else {
		s.fs.Kill()
	}
	return s.reopen()
}

// TestEveryCallFails fails every call that script makes in turn, with either error, before its work and after it, and
// audits the log after the death of the process and of the machine.
func TestEveryCallFails(t *testing.T) {
	probe := newSim(1, 0)
	if err := script(probe); err != nil {
		t.Fatal(err)
	}
	total := 0
	for _, n := range probe.fs.Calls() {
		total += n
	}
	stride := 1
	if testing.Short() {
		stride = 7
	}
	t.Logf("%d calls: %v", total, probe.fs.Calls())
	for _, errno := range []error{unix.EIO, unix.ENOSPC} {
		for _, persist := range []bool{false, true} {
			for _, power := range []bool{false, true} {
				for n := 1; n <= total; n += stride {
					s := newSim(uint64(n), 0)
					var failed waltest.Call
					s.fs.SetHook(func(c waltest.Call) *waltest.Fault {
						if c.Total != n {
							return nil
						}
						failed = c
						return &waltest.Fault{Err: errno, Persist: persist, Bytes: n % 200}
					})
					err := script(s)
					if err == nil {
						err = s.audit(power)
					}
					if err != nil {
						t.Fatalf("call %d (%s %s) fails with %v, persist %v, then power loss %v: %v",
							n, failed.Op, failed.Name, errno, persist, power, err)
					}
				}
			}
		}
	}
}

// TestFailedSyncIsNotRetried: the sync fails, a second one would succeed, and the data is gone all the same. Nobody may
// have been told otherwise.
func TestFailedSyncIsNotRetried(t *testing.T) {
	fs := waltest.New(0)
	cfg := testConfig(fs)
	w := mustOpen(t, cfg)
	first := mustAppend(t, w, wal.Durable)
	must(t, w.Commit())
	must(t, first.Wait(t.Context()))
	lost := mustAppend(t, w, wal.Durable)
	fs.FailNth(waltest.OpSync, 1, waltest.Fault{Err: unix.EIO})
	if err := w.Commit(); !errors.Is(err, wal.ErrFailed) || !errors.Is(err, unix.EIO) {
		t.Fatalf("commit: got %v, want ErrFailed and EIO", err)
	}
	if err := lost.Wait(t.Context()); !errors.Is(err, wal.ErrFailed) {
		t.Fatalf("wait: got %v, want ErrFailed", err)
	}
	syncs := fs.Calls()[waltest.OpSync]
	for name, err := range map[string]error{"commit": w.Commit(), "idle": w.Idle(), "sync": w.Sync(t.Context()), "close": w.Close()} {
		if !errors.Is(err, wal.ErrFailed) {
			t.Errorf("%s afterwards: got %v, want ErrFailed", name, err)
		}
	}
	if n := fs.Calls()[waltest.OpSync]; n != syncs {
		t.Errorf("%d syncs after the failed one", n-syncs)
	}
	// The page cache still has the record: a new process on the same boot reads it and makes it durable, by writing it again.
	again := mustOpen(t, cfg)
	if next := audit(t, again); next != 3 {
		t.Fatalf("same boot: records end before %d, want 3", next)
	}
	fs.Crash(nil)
	after := mustOpen(t, onBoot(cfg, "another"))
	if next := audit(t, after); next != 3 {
		t.Errorf("after the crash: records end before %d, want 3: replayed records must have been made durable", next)
	}
}
