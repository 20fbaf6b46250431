package wal_test

import (
	"errors"
	"flag"
	"testing"
)

var (
	seedFlag = flag.Uint64("wal.seed", 0, "first seed of the random tests")
	runsFlag = flag.Int("wal.runs", 0, "how many seeds; 0 means the test's own number")
)

// TestCrashAndReplay lets a log live and die at random, often in the middle of a call, Open's calls included, and checks
// every promise after every death. Seeds are consecutive; a failure prints its own.
func TestCrashAndReplay(t *testing.T) {
	runs := 300
	if testing.Short() {
		runs = 50
	}
	if *runsFlag > 0 {
		runs = *runsFlag
	}
	deaths, appends := 0, 0
	for i := range runs {
		seed := *seedFlag + uint64(i)
		page := 4096
		if seed%3 == 0 {
			page = 512 // sectors that tear pages
		}
		s := newSim(seed, page)
		if err := crashRun(s); err != nil {
			t.Fatalf("seed %d, death %d: %v\n(go test -run '^%s$' -wal.seed=%d -wal.runs=1)", seed, s.deaths, err, t.Name(), seed)
		}
		deaths, appends = deaths+s.deaths, appends+s.appends
	}
	t.Logf("%d runs from seed %d: %d deaths, %d appends", runs, *seedFlag, deaths, appends)
}

func crashRun(s *sim) error {
	for range 12 {
		if s.rng.IntN(4) == 0 { // dies while opening, perhaps
			s.dieIn, s.part = 1+s.rng.IntN(40), s.rng.IntN(200)
		}
		switch err := s.reopen(); {
		case errors.Is(err, errDied) || !s.opened && errors.Is(err, errNoSpace):
			s.full = false
			s.die()
			continue
		case err != nil:
			return err
		}
		if s.dieIn = 0; s.rng.IntN(2) == 0 {
			s.dieIn, s.part = 1+s.rng.IntN(300), s.rng.IntN(600)
		}
		for range s.rng.IntN(400) {
			if err := s.step(); err != nil {
				return err
			}
			if s.w.Err() != nil {
				break
			}
		}
		if s.rng.IntN(5) == 0 && s.w.Close() == nil {
			for seq := range s.given {
				s.strong[seq] = true
			}
		}
		s.die()
	}
	return s.reopen()
}
