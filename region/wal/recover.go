package wal

import (
	"fmt"
	"path/filepath"
)

// segment is a file of groups. Its number is never used twice, even if the file is.
//
// Groups follow each other from offset 0. The last headerSize bytes, the slot, stand apart: there a mark is put once the
// segment has been left. It must not follow the other groups, since where a crash tore an empty group, valid ones may
// stand right behind, and a new empty group in the gap would join them to the log again.
type segment struct {
	number     uint64
	size       int64
	first, end uint64 // its records are first <= n < end
	tail       int64  // where the next group goes
	f          File   // nil while nobody writes or syncs it
}

func (s *segment) slot() int64 { return s.size - headerSize }

func segmentName(number uint64) string { return fmt.Sprintf("%016x%s", number, segmentSuffix) }

// scanned is what one segment holds.
type scanned struct {
	segment
	opened  bool // it begins with a valid opening group; else first, end and tail are 0
	opening opening
	torn    bool // a header made for this place stands at tail, but no valid group
	orphans bool // valid groups stand behind tail
	closed  bool // the last group before tail is a closing one
	lost    bool // the slot says that numbers were declared lost behind the last record

	durable, ceiling, released uint64 // the highest in any valid group; released without orphans
}

// scan reads a whole segment. Its errors are read errors.
func scan(r *reader) (scanned, error) {
	s := scanned{segment: segment{number: r.segment, size: r.size}}
	note := func(g group) {
		s.durable, s.ceiling = max(s.durable, g.durable), max(s.ceiling, g.ceiling)
	}
	for s.tail < s.slot() {
		g, ok, ours, err := r.group(s.tail)
		if err != nil {
			return s, err
		}
		if !ok || s.opened != (g.kind != kindOpen) || (s.opened && g.first != s.end) {
			s.torn = ours
			break
		}
		if !s.opened {
			s.opened, s.first = true, g.first
			s.opening, _ = parseOpening(g.payload)
		}
		note(g)
		s.end, s.closed = g.end(), g.kind == kindClose
		s.released = max(s.released, g.released)
		s.tail += g.size()
	}
	err := r.search(s.tail, func(g group) {
		note(g)
		if int64(g.offset) == s.slot() && (g.kind == kindMark || g.kind == kindLost) {
			s.released, s.lost = max(s.released, g.released), g.kind == kindLost
			return
		}
		s.orphans = true
	})
	return s, err
}

// found is the log that a directory's segments make up.
type found struct {
	Recovery
	chain   []segment // segments whose groups count, ascending; the last one was written last. Never empty.
	blank   []segment // others, ascending: never used, or used for nothing that was acknowledged
	durable uint64    // everything below was synced by the last writer
	last    uint64    // highest segment number there is
}

// corrupt makes the error for damage at an offset of a segment in dir.
func corrupt(dir string, number uint64, off int64, format string, args ...any) error {
	return fmt.Errorf("%w: %s offset %d: %s", ErrCorrupt, filepath.Join(dir, segmentName(number)), off, fmt.Sprintf(format, args...))
}

// assemble decides what counts. It is pure: all, ascending by number, is what scan saw; boot is the boot id running now,
// empty when unknown.
//
// Segments are chained by their opening groups: each names the segment written before it and how far the log had got.
// What is not chained was never acknowledged, unless a valid group anywhere says that it was synced (or, on the same boot,
// unless there is anything behind the chain's end at all, since what one process writes in order cannot vanish from the
// page cache in the middle). Then it is damage.
func assemble(dir string, all []scanned, boot string) (found, error) {
	var f found
	var end *scanned // of the chain
	var ceiling uint64
	for i := range all {
		s := &all[i]
		f.last = max(f.last, s.number)
		f.durable, ceiling = max(f.durable, s.durable), max(ceiling, s.ceiling)
		if !s.opened || end != nil && (s.opening.prev != end.number || s.opening.gapFrom != end.end) {
			f.blank = append(f.blank, s.segment)
			continue
		}
		end = s
		f.chain = append(f.chain, s.segment)
		f.First = max(f.First, s.released)
		if o := s.opening; o.gapFrom < o.gapTo {
			f.Lost = addRange(f.Lost, Range{o.gapFrom, o.gapTo})
		}
	}
	if end == nil {
		return f, fmt.Errorf("%w: %s: none of %d segments begins with a valid group", ErrCorrupt, dir, len(all))
	}
	base := f.chain[0]
	if from := all[indexOf(all, base.number)].opening.gapFrom; from > f.First {
		return f, corrupt(dir, base.number, 0, "the oldest segment begins at record %d, but only those below %d were released: "+
			"an older segment is missing or damaged", from, f.First)
	}
	f.Next, f.Torn = end.end, end.torn || end.orphans
	f.SameBoot = boot != "" && boot == end.opening.boot
	behind := end.orphans
	for _, s := range all[indexOf(all, end.number)+1:] {
		behind = behind || s.opened || s.orphans
		f.Torn = f.Torn || s.opened || s.orphans || s.torn
	}
	f.Clean = end.closed && !f.Torn
	switch {
	case f.Next < f.durable:
		at, off := damaged(all, end)
		return f, corrupt(dir, at, off, "no valid group with record %d, but records below %d were synced", f.Next, f.durable)
	case f.First > f.Next:
		return f, corrupt(dir, end.number, end.tail, "records below %d were released, but the log ends before %d", f.First, f.Next)
	case f.SameBoot && behind:
		return f, corrupt(dir, end.number, end.tail, "no valid group, but valid ones behind, and the machine has not restarted since")
	}
	if ceiling > f.Next && (end.lost || !f.SameBoot && !end.closed) {
		f.Lost = addRange(f.Lost, Range{f.Next, ceiling})
		f.Next = ceiling
	}
	for len(f.Lost) > 0 && f.Lost[0].To <= f.First {
		f.Lost = f.Lost[1:]
	}
	if n := len(f.Lost); n > 0 {
		f.LostFrom, f.LostTo = f.Lost[n-1].From, f.Lost[n-1].To
	}
	return f, nil
}

// damaged guesses where the group that should follow the chain's end stood.
func damaged(all []scanned, end *scanned) (number uint64, off int64) {
	if !end.torn && !end.orphans {
		for _, s := range all[indexOf(all, end.number)+1:] {
			if !s.opened && (s.torn || s.orphans) {
				return s.number, 0
			}
		}
	}
	return end.number, end.tail
}

// addRange appends r, which begins where the last range ends or later.
func addRange(rs []Range, r Range) []Range {
	if n := len(rs); n > 0 && rs[n-1].To == r.From {
		rs[n-1].To = r.To
		return rs
	}
	return append(rs, r)
}

func indexOf(all []scanned, number uint64) int {
	for i := range all {
		if all[i].number == number {
			return i
		}
	}
	return -1
}
