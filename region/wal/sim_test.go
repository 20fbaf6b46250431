package wal_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/knhk/sidecar/region/wal"
	"github.com/knhk/sidecar/region/wal/waltest"
)

// sim drives one log through deaths and checks every recovery against a model that is deliberately dumb: maps of what was
// promised. It runs the steps of Run itself, in one goroutine, so a seed replays exactly.
type sim struct {
	rng     *rand.Rand
	fs      *waltest.FS
	cfg     wal.Config
	boot    string // "" means unreadable
	machine int    // boots so far
	w       *wal.WAL

	dieIn int  // every call from this one on fails; 0 means none
	part  int  // how many bytes of a write still get through then
	full  bool // the disk has no space for a new segment

	given    map[uint64][]byte // content of every number fn was called for, the latest
	weak     map[uint64]bool   // must survive the death of the process
	strong   map[uint64]bool   // must survive the death of the machine
	open     map[uint64]wal.Ticket
	ranges   []wal.Range // declared lost so far
	released uint64
	power    bool // the last death was the machine's
	unlucky  bool // it could not be told from the machine's
	opened   bool // some Open has succeeded
	deaths   int
	appends  int
}

const simDir = "/wal"

func newSim(seed uint64, page int) *sim {
	s := &sim{
		rng: rand.New(rand.NewPCG(seed, 1)), fs: waltest.New(page),
		given: map[uint64][]byte{}, weak: map[uint64]bool{}, strong: map[uint64]bool{}, open: map[uint64]wal.Ticket{},
		released: 1, boot: "boot-0",
	}
	s.cfg = wal.Config{
		Dir: simDir, SegmentBytes: 16 << 10, MaxBytes: 80 << 10, ReserveBytes: 4 << 10, MaxRecordBytes: 1 << 10, Ahead: 64, FS: s.fs,
		BootID: func() (string, error) {
			if s.boot == "" {
				return "", errors.New("unreadable")
			}
			return s.boot, nil
		},
	}
	s.fs.SetHook(s.hook)
	return s
}

var (
	errDied    = errors.New("died")
	errNoSpace = unix.ENOSPC
)

func (s *sim) hook(c waltest.Call) *waltest.Fault {
	if s.dieIn > 0 {
		if s.dieIn--; s.dieIn == 0 {
			s.dieIn = 1
			f := &waltest.Fault{Err: errDied, Bytes: s.part}
			s.part = 0
			return f
		}
	}
	if s.full && filepath.Base(c.Name) == "next.tmp" && (c.Op == waltest.OpAllocate || c.Op == waltest.OpWrite) {
		return &waltest.Fault{Err: unix.ENOSPC}
	}
	return nil
}

// reopen opens the log and checks what it says and holds.
func (s *sim) reopen() error {
	w, err := wal.Open(s.cfg)
	if err != nil {
		return err
	}
	s.w = w
	return s.check()
}

// check compares the recovery with the model, then takes it as the new state.
func (s *sim) check() error {
	rec := s.w.Recovered()
	lost := func(n uint64) bool {
		return slices.ContainsFunc(rec.Lost, func(r wal.Range) bool { return r.From <= n && n < r.To })
	}
	if rec.First > s.released {
		return fmt.Errorf("first %d, but only those below %d were released", rec.First, s.released)
	}
	got := map[uint64][]byte{}
	next := rec.First
	err := s.w.Replay(func(seq uint64, b []byte) error {
		for ; next < seq; next++ {
			if !lost(next) {
				return fmt.Errorf("number %d is neither here nor declared lost", next)
			}
		}
		if seq < next || lost(seq) {
			return fmt.Errorf("record %d comes after %d or is declared lost", seq, next)
		}
		next = seq + 1
		got[seq] = bytes.Clone(b)
		return nil
	})
	if err != nil {
		return err
	}
	for ; next < rec.Next; next++ {
		if !lost(next) {
			return fmt.Errorf("number %d below next %d is neither here nor declared lost", next, rec.Next)
		}
	}
	if next != rec.Next {
		return fmt.Errorf("record %d replayed, but next is %d", next-1, rec.Next)
	}
	for seq, b := range got {
		if !bytes.Equal(b, s.given[seq]) {
			return fmt.Errorf("record %d is not what was appended", seq)
		}
	}
	for seq := range s.given {
		_, here := got[seq]
		switch {
		case here || seq < s.released:
		case s.strong[seq]:
			return fmt.Errorf("durable record %d is gone", seq)
		case s.weak[seq] && !s.power:
			return fmt.Errorf("written record %d is gone after the death of a process", seq)
		case (s.weak[seq] || s.power) && !lost(seq):
			return fmt.Errorf("record %d is gone and not declared lost", seq)
		}
		if !here && seq < rec.Next && seq >= s.released && !lost(seq) {
			return fmt.Errorf("number %d is neither here nor declared lost", seq)
		}
	}
	for _, r := range s.ranges {
		if r.To > s.released && !lost(r.To-1) {
			return fmt.Errorf("lost range %v is forgotten, released %d", r, s.released)
		}
	}
	if rec.LostFrom != rec.LostTo && (len(rec.Lost) == 0 || rec.Lost[len(rec.Lost)-1] != wal.Range{From: rec.LostFrom, To: rec.LostTo}) {
		return fmt.Errorf("lost [%d, %d) is not the newest of %v", rec.LostFrom, rec.LostTo, rec.Lost)
	}
	if !s.power && !s.unlucky && s.opened {
		for _, r := range rec.Lost {
			if !slices.ContainsFunc(s.ranges, func(o wal.Range) bool { return o.From <= r.From && r.To <= o.To }) {
				return fmt.Errorf("%v declared lost, but the machine has not died", r)
			}
		}
	}
	// What a recovery showed is durable. What was in flight may be given again, what is lost may not: see append.
	maps.DeleteFunc(s.given, func(seq uint64, _ []byte) bool { return got[seq] == nil })
	s.weak, s.strong, s.open = map[uint64]bool{}, map[uint64]bool{}, map[uint64]wal.Ticket{}
	for seq := range got {
		s.strong[seq] = true
	}
	s.ranges = slices.Clone(rec.Lost)
	s.released = min(s.released, rec.Next) // it may have been told of numbers that were still in flight
	s.power, s.unlucky, s.opened = false, false, true
	return nil
}

// append appends a record of random size and content.
func (s *sim) append(level wal.Level) error {
	var b []byte
	var number uint64
	t, err := s.w.Append(level, s.rng.IntN(4) == 0, func(seq uint64) []byte {
		b = make([]byte, 1+s.rng.IntN(400))
		for i := range b {
			b[i] = byte(s.rng.Uint32())
		}
		number = seq
		s.given[seq] = b
		return b
	})
	s.appends++
	switch {
	case errors.Is(err, wal.ErrFull):
		if number != 0 {
			return errors.New("ErrFull after fn was called")
		}
		return nil
	case err != nil:
		return nil // dying
	case s.weak[t.Seq()] || s.strong[t.Seq()] || t.Seq() != number:
		return fmt.Errorf("number %d was given before", t.Seq())
	}
	for _, r := range s.ranges {
		if r.From <= t.Seq() && t.Seq() < r.To {
			return fmt.Errorf("lost number %d was given again", t.Seq())
		}
	}
	s.open[t.Seq()] = t
	if level == wal.Written {
		if err := t.Wait(context.Background()); err != nil {
			return fmt.Errorf("written record not written: %w", err)
		}
		for seq := range s.open { // and everything before it
			s.weak[seq] = true
		}
		s.weak[t.Seq()] = true
		delete(s.open, t.Seq())
	}
	return nil
}

// collect notes which tickets are done.
func (s *sim) collect() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for seq, t := range s.open {
		if t.Wait(ctx) == nil {
			for n := range s.given { // a sync covers everything before it
				if n <= seq {
					s.strong[n] = true
				}
			}
			delete(s.open, seq)
		}
	}
}

// step takes a random step. Errors of the log are expected while it dies; the returned ones are violations.
func (s *sim) step() error {
	switch n := s.rng.IntN(100); {
	case n < 35:
		return s.append(wal.Written)
	case n < 70:
		return s.append(wal.Durable)
	case n < 82:
		_ = s.w.Commit()
		s.collect()
	case n < 90:
		_ = s.w.Prepare()
	case n < 94:
		_ = s.w.Idle()
	case n < 95:
		s.full = !s.full
	default:
		st := s.w.Stats()
		n := s.released + uint64(s.rng.Int64N(int64(st.Next-s.released)+1))
		if s.w.Release(n) == nil {
			s.released = max(s.released, n)
		}
	}
	return nil
}

// die ends the process, by itself or with the machine.
func (s *sim) die() {
	s.collect()
	s.dieIn = 0
	s.deaths++
	if s.rng.IntN(2) == 0 {
		s.fs.Kill() // kill -9
	} else {
		s.fs.Crash(s.rng)
		s.power = true
		s.machine++
	}
	// Without a boot id, then or now, the death of a process counts as the machine's.
	was := s.boot
	if s.boot = fmt.Sprintf("boot-%d", s.machine); s.rng.IntN(6) == 0 {
		s.boot = ""
	}
	s.unlucky = s.unlucky || s.boot == "" || was == ""
	s.w = nil
}
