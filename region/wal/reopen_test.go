package wal_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/knhk/sidecar/region/wal"
	"github.com/knhk/sidecar/region/wal/waltest"
)

// TestLostStaysDeclared: what one Open declared lost, the next one does too, though it has better reasons not to and the
// first had no room for a segment to say it in.
func TestLostStaysDeclared(t *testing.T) {
	fs := waltest.New(0)
	cfg := testConfig(fs)
	w := mustOpen(t, cfg)
	mustAppend(t, w, wal.Written)
	fs.Kill()

	fs.SetHook(func(c waltest.Call) *waltest.Fault {
		if strings.HasSuffix(c.Name, ".tmp") && c.Op == waltest.OpAllocate {
			return &waltest.Fault{Err: unix.ENOSPC}
		}
		return nil
	})
	unreadable := cfg
	unreadable.BootID = func() (string, error) { return "", errors.New("not mounted") }
	first := mustOpen(t, unreadable)
	lost := first.Recovered()
	if lost.LostFrom != 2 || lost.LostTo <= 2 {
		t.Fatalf("without a boot id: %+v, want numbers from 2 on lost", lost)
	}
	if _, err := first.Append(wal.Written, true, record); !errors.Is(err, wal.ErrFull) {
		t.Errorf("append without a segment: got %v, want ErrFull", err)
	}
	must(t, first.Sync(t.Context()))
	if err := first.Release(lost.Next); err != nil {
		t.Error(err)
	}
	must(t, first.Idle()) // must not write over what the slot says
	fs.SetHook(nil)
	fs.Kill()

	second := mustOpen(t, cfg)
	if r := second.Recovered(); r.LostFrom != lost.LostFrom || r.LostTo != lost.LostTo || r.Next != lost.Next || !r.SameBoot {
		t.Errorf("then: %+v, want what was declared: %+v", r, lost)
	}
	if seq := mustAppend(t, second, wal.Written).Seq(); seq != lost.LostTo {
		t.Errorf("goes on with %d, want %d", seq, lost.LostTo)
	}
	fs.Kill()
	if r := mustOpen(t, cfg).Recovered(); r.LostFrom != lost.LostFrom || r.LostTo != lost.LostTo {
		t.Errorf("not released, but forgotten: %+v", r)
	}
}

// TestUnsyncedReleaseInSlot: a log without room notes a release in the slot of its last segment and dies before the sync.
// The next process believes the note, recycles a segment, and the machine dies: the note must have been made durable.
func TestUnsyncedReleaseInSlot(t *testing.T) {
	fs := waltest.New(0)
	cfg := testConfig(fs)
	cfg.MaxBytes = 48 << 10
	var next uint64
	var w *wal.WAL
	for range 3 { // two lives fill it, the third finds no room
		w = mustOpen(t, cfg)
		for range 200 {
			must(t, w.Prepare())
			ticket, err := w.Append(wal.Durable, true, record)
			if err != nil {
				break
			}
			must(t, w.Commit())
			next = ticket.Seq() + 1
		}
		fs.Kill()
	}
	w = mustOpen(t, cfg)
	if _, err := w.Append(wal.Durable, true, record); !errors.Is(err, wal.ErrFull) {
		t.Fatalf("append: got %v, want ErrFull from the start", err)
	}
	must(t, w.Release(next))
	fs.FailNth(waltest.OpSync, 1, waltest.Fault{Err: errDied})
	if err := w.Idle(); !errors.Is(err, errDied) {
		t.Fatalf("idle: got %v, want it to die in the sync", err)
	}
	fs.Kill()

	renamed := false // the recycled segment has its new name when the machine dies
	fs.SetHook(func(c waltest.Call) *waltest.Fault {
		if renamed = renamed || c.Op == waltest.OpRename; renamed && c.Op == waltest.OpWrite {
			return &waltest.Fault{Err: errDied}
		}
		return nil
	})
	if _, err := wal.Open(cfg); !errors.Is(err, errDied) || !renamed {
		t.Fatalf("open: got %v, recycled %v, want it to die right after recycling", err, renamed)
	}
	fs.SetHook(nil)
	fs.Crash(nil)
	if r := mustOpen(t, onBoot(cfg, "another")).Recovered(); r.First != next {
		t.Errorf("recovered %+v, want first %d", r, next)
	}
}

// TestReleaseNeedsItsOwnGroup: a sync that found nothing to write has not made a release durable, and must not let a
// segment be recycled: after a crash the log would begin behind what it says was released.
func TestReleaseNeedsItsOwnGroup(t *testing.T) {
	fs := waltest.New(0)
	cfg := testConfig(fs)
	w := mustOpen(t, cfg)
	must(t, w.Prepare())
	for w.Stats().Groups < 3 || w.Stats().Free > cfg.MaxBytes-20<<10 { // into the second segment
		mustAppend(t, w, wal.Durable)
		must(t, w.Commit())
	}
	next := w.Stats().Next
	must(t, w.Release(next))
	must(t, w.Commit()) // writes nothing
	must(t, w.Prepare())
	fs.Crash(nil)
	again := mustOpen(t, onBoot(cfg, "another"))
	if r := again.Recovered(); r.First > next {
		t.Errorf("recovered %+v, released below %d", r, next)
	}
	if n := again.Recovered().First; n >= next {
		t.Errorf("first is %d: the release was not durable", n)
	}
}

// TestReleaseAheadOfDurable releases records that are still pending, over a change of segments, and loses any part of them
// in a crash: no group may have said that they were released, or the log would seem to end before its beginning.
func TestReleaseAheadOfDurable(t *testing.T) {
	fs := waltest.New(0)
	cfg := testConfig(fs)
	w := mustOpen(t, cfg)
	must(t, w.Prepare())
	for range 200 { // into the second segment, all of it pending
		mustAppend(t, w, wal.Durable)
	}
	must(t, w.Release(w.Stats().Next))
	fs.FailNth(waltest.OpSync, 1, waltest.Fault{Err: errDied, Persist: true})
	before := fs.Clone()
	if err := w.Commit(); !errors.Is(err, errDied) {
		t.Fatal(err)
	}
	first := fs.Content(simDir + "/0000000000000001.wal")
	if bytes.Equal(first, before.Content(simDir+"/0000000000000001.wal")) {
		t.Fatal("the first segment was not written")
	}
	before.Kill()
	before.Corrupt(simDir+"/0000000000000001.wal", first) // of all that was written, this much reached the disk
	after := onBoot(cfg, "another")
	after.FS = before
	r := mustOpen(t, after).Recovered()
	if r.First != 1 || r.LostFrom < 100 || r.LostTo <= 200 {
		t.Errorf("recovered %+v", r)
	}
}
