package wal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"testing"
)

const (
	testLog = 0x1122334455667788
	testSeg = 7
)

// dataGroup makes a sealed data group that stands at off.
func dataGroup(off int64, first uint64, recs ...string) []byte {
	buf := make([]byte, headerSize)
	for _, r := range recs {
		buf = binary.LittleEndian.AppendUint32(buf, uint32(len(r)))
		buf = append(buf, r...)
	}
	return seal(buf, header{
		log: testLog, segment: testSeg, offset: uint32(off), count: uint32(len(recs)), kind: kindData,
		first: first, durable: first, ceiling: first + 100, released: 1,
	})
}

func openGroup(o opening) []byte {
	return seal(o.append(make([]byte, headerSize)), header{
		log: testLog, segment: testSeg, kind: kindOpen, first: o.gapTo, durable: o.gapFrom, ceiling: o.gapTo + 100, released: 1,
	})
}

// testSegment is an opening group and three data groups: records 5; 6 and 7; 8.
func testSegment() []byte {
	b := openGroup(opening{prev: 6, gapFrom: 3, gapTo: 5, boot: "boot"})
	b = append(b, dataGroup(int64(len(b)), 5, "five")...)
	b = append(b, dataGroup(int64(len(b)), 6, "six", "seven")...)
	return append(b, dataGroup(int64(len(b)), 8, "eight")...)
}

func testReader(b []byte) *reader {
	return &reader{f: bytes.NewReader(b), size: int64(len(b)), log: testLog, segment: testSeg}
}

// TestGroupIsOfOnePlace: what is a valid group in its place is none in another log, segment or place.
func TestGroupIsOfOnePlace(t *testing.T) {
	b := openGroup(opening{boot: "boot"})
	for _, c := range []struct {
		name   string
		change func(r *reader)
		ok     bool
	}{
		{"its place", func(*reader) {}, true},
		{"another log", func(r *reader) { r.log++ }, false},
		{"another segment, as in a recycled file", func(r *reader) { r.segment++ }, false},
		{"another offset", func(r *reader) { r.f, r.size = bytes.NewReader(append(make([]byte, 64), b...)), int64(len(b))+64 }, false},
	} {
		r := testReader(b)
		c.change(r)
		at := r.size - int64(len(b))
		if _, ok, ours, err := r.group(at); ok != c.ok || ours != c.ok || err != nil {
			t.Errorf("%s: %v, %v, %v; want %v", c.name, ok, ours, err, c.ok)
		}
	}
}

func TestScan(t *testing.T) {
	whole := testSegment()
	open := int64(len(openGroup(opening{boot: "boot"})))
	five := open + int64(len(dataGroup(0, 5, "five")))
	six := five + int64(len(dataGroup(0, 6, "six", "seven")))
	all := int64(len(whole))
	size := int(all) + 4096

	for _, c := range []struct {
		name    string
		edit    func(b []byte) []byte
		end     uint64
		tail    int64
		opened  bool
		torn    bool
		orphans bool
	}{
		{"whole", func(b []byte) []byte { return b }, 9, all, true, false, false},
		{"blank", func(b []byte) []byte { clear(b); return b }, 0, 0, false, false, false},
		{"empty file", func([]byte) []byte { return nil }, 0, 0, false, false, false},
		{"cut in the last payload", func(b []byte) []byte { clear(b[all-8:]); return b }, 8, six, true, true, false},
		{"cut in the last header", func(b []byte) []byte { clear(b[six+10:]); return b }, 8, six, true, false, false},
		{"file cut short", func(b []byte) []byte { return b[:all-8] }, 8, six, true, true, false},
		{"hole in the middle", func(b []byte) []byte { clear(b[five : five+8]); return b }, 6, five, true, false, true},
		{"first group gone", func(b []byte) []byte { clear(b[:4]); return b }, 0, 0, false, false, true},
		{"group of another log", func(b []byte) []byte { b[six+8]++; return b }, 8, six, true, false, false},
		{"group moved by a block", func(b []byte) []byte {
			copy(b[all:], b[six:all])
			clear(b[six:all])
			return b
		}, 8, six, true, false, false},
		{"group repeated where it would fit", func(b []byte) []byte {
			copy(b[all:], dataGroup(all, 8, "eight"))
			return b
		}, 9, all, true, true, true},
		{"number left out", func(b []byte) []byte {
			copy(b[all:], dataGroup(all, 10, "ten"))
			return b
		}, 9, all, true, true, true},
		{"bytes of a group inside a record", func(b []byte) []byte {
			// A client that knew everything could forge this only for a damaged place; elsewhere it is payload.
			copy(b[all:], dataGroup(all, 9, string(dataGroup(0, 9, "forged"))))
			return b
		}, 10, all + int64(len(dataGroup(0, 9, string(dataGroup(0, 9, "forged"))))), true, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := make([]byte, size)
			copy(b, whole)
			s, err := scan(testReader(c.edit(b)))
			if err != nil {
				t.Fatal(err)
			}
			if s.end != c.end || s.tail != c.tail || s.opened != c.opened || s.torn != c.torn || s.orphans != c.orphans {
				t.Errorf("got end %d tail %d opened %v torn %v orphans %v, want %d %d %v %v %v",
					s.end, s.tail, s.opened, s.torn, s.orphans, c.end, c.tail, c.opened, c.torn, c.orphans)
			}
		})
	}
}

// TestSearchAcrossWindows puts groups around the borders of the reader's window.
func TestSearchAcrossWindows(t *testing.T) {
	b := make([]byte, 3*window+headerSize)
	var want []int64
	for _, off := range []int64{8, window - headerSize, window + 8, 2*window - 8, int64(len(b)) - 88} {
		copy(b[off:], dataGroup(off, 1, "x"))
		want = append(want, off)
	}
	copy(b[window/2+4:], magicBytes) // where no group can stand
	for _, from := range []int64{0, 1, 8} {
		var got []int64
		if err := testReader(b).search(from, func(g group) { got = append(got, int64(g.offset)) }); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(got, want) {
			t.Errorf("from %d: got %v, want %v", from, got, want)
		}
	}
}

func TestReadErrorIsNotDamage(t *testing.T) {
	r := testReader(testSegment())
	r.size += 8 // the file says it is longer than it is
	if _, err := scan(r); err == nil {
		t.Error("a read error went unnoticed")
	}
}

// TestAssemble checks which segments make up a log and when Open must refuse.
func TestAssemble(t *testing.T) {
	seg := func(number, prev, gapFrom, first, end uint64, boot string, edit ...func(*scanned)) scanned {
		s := scanned{
			segment: segment{number: number, size: 1 << 20, first: first, end: end, tail: 4096}, opened: true,
			opening: opening{prev: prev, gapFrom: gapFrom, gapTo: first, boot: boot},
			durable: gapFrom, ceiling: end + 100, released: 1,
		}
		for _, e := range edit {
			e(&s)
		}
		return s
	}
	closed := func(s *scanned) { s.closed, s.ceiling, s.durable = true, s.end, s.end }
	durable := func(n uint64) func(*scanned) { return func(s *scanned) { s.durable = n } }
	released := func(n uint64) func(*scanned) { return func(s *scanned) { s.released = n } }
	orphans := func(s *scanned) { s.orphans = true }
	blank := func(number uint64, edit ...func(*scanned)) scanned {
		s := scanned{segment: segment{number: number, size: 1 << 20}}
		for _, e := range edit {
			e(&s)
		}
		return s
	}

	for _, c := range []struct {
		name string
		all  []scanned
		boot string
		next uint64
		lost []Range
		bad  bool
	}{
		{"closed in order, another boot", []scanned{seg(1, 0, 1, 1, 10, "a", closed)}, "b", 10, nil, false},
		{"killed, same boot", []scanned{seg(1, 0, 1, 1, 10, "a")}, "a", 10, nil, false},
		{"machine crash", []scanned{seg(1, 0, 1, 1, 10, "a")}, "b", 110, []Range{{10, 110}}, false},
		{"boot id unreadable now", []scanned{seg(1, 0, 1, 1, 10, "a")}, "", 110, []Range{{10, 110}}, false},
		{"boot id unreadable then and now", []scanned{seg(1, 0, 1, 1, 10, "")}, "", 110, []Range{{10, 110}}, false},
		{"two segments and a blank one", []scanned{seg(1, 0, 1, 1, 10, "a"), seg(2, 1, 10, 10, 20, "a"), blank(3)}, "a", 20, nil, false},
		{"earlier loss stays declared", []scanned{seg(1, 0, 1, 1, 10, "a"), seg(2, 1, 10, 50, 60, "b")}, "b", 60, []Range{{10, 50}}, false},
		{"losses that touch are one", []scanned{seg(1, 0, 1, 1, 10, "a"), seg(2, 1, 10, 50, 50, "b")}, "c", 150, []Range{{10, 150}}, false},
		{"released loss is forgotten", []scanned{seg(1, 0, 1, 1, 10, "a"), seg(2, 1, 10, 50, 60, "b", released(50))}, "b", 60, nil, false},
		{"segment of an earlier, torn end is passed over", []scanned{
			seg(1, 0, 1, 1, 10, "a", orphans), seg(2, 1, 12, 12, 20, "a"), seg(3, 1, 10, 50, 60, "b"),
		}, "b", 60, []Range{{10, 50}}, false},
		{"a later group says it was durable", []scanned{seg(1, 0, 1, 1, 10, "a", durable(11))}, "b", 0, nil, true},
		{"the next segment says so", []scanned{seg(1, 0, 1, 1, 10, "a"), seg(2, 1, 12, 12, 20, "a", durable(12))}, "b", 0, nil, true},
		{"segment missing in the middle", []scanned{seg(1, 0, 1, 1, 10, "a"), seg(3, 2, 20, 20, 30, "a", durable(20))}, "b", 0, nil, true},
		{"segment without records missing in the middle", []scanned{
			seg(1, 0, 1, 1, 10, "a"), seg(3, 2, 10, 10, 30, "a", durable(20)),
		}, "b", 0, nil, true},
		{"oldest segment missing", []scanned{seg(2, 1, 10, 10, 20, "a")}, "a", 0, nil, true},
		{"oldest segment recycled", []scanned{seg(2, 1, 10, 10, 20, "a", released(10))}, "a", 20, nil, false},
		{"groups behind the end, same boot", []scanned{seg(1, 0, 1, 1, 10, "a", orphans)}, "a", 0, nil, true},
		{"groups behind the end, other boot", []scanned{seg(1, 0, 1, 1, 10, "a", orphans)}, "b", 110, []Range{{10, 110}}, false},
		{"groups in a blank segment, same boot", []scanned{seg(1, 0, 1, 1, 10, "a"), blank(2, orphans)}, "a", 0, nil, true},
		{"declared lost, then the same boot id after all", []scanned{
			seg(1, 0, 1, 1, 10, "a", func(s *scanned) { s.lost = true }),
		}, "a", 110, []Range{{10, 110}}, false},
		{"released beyond the end", []scanned{seg(1, 0, 1, 1, 10, "a", released(11))}, "a", 0, nil, true},
		{"nothing readable", []scanned{blank(1), blank(2)}, "a", 0, nil, true},
		{"no segment at all", nil, "a", 0, nil, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, err := assemble("dir", c.all, c.boot)
			if (err != nil) != c.bad || c.bad && !errors.Is(err, ErrCorrupt) {
				t.Fatalf("error %v, want one: %v", err, c.bad)
			}
			if err == nil && (f.Next != c.next || !slices.Equal(f.Lost, c.lost)) {
				t.Errorf("next %d lost %v, want %d %v", f.Next, f.Lost, c.next, c.lost)
			}
		})
	}
}

// FuzzScan reads any bytes as a segment: nothing but what is whole comes out.
func FuzzScan(f *testing.F) {
	whole := testSegment()
	f.Add(whole)
	f.Add(whole[:len(whole)-9])
	f.Add(append(slices.Clone(whole), make([]byte, 200)...))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) { checkScan(t, b) })
}

// FuzzGroup seals any payload under any header, so that the CRC does not stop what is malformed within.
func FuzzGroup(f *testing.F) {
	f.Add([]byte("\x04\x00\x00\x00five"), uint8(kindData), uint32(1), uint64(5), uint64(5))
	f.Add([]byte("\xff\xff\xff\xff"), uint8(kindData), uint32(1), uint64(5), uint64(5))
	f.Add([]byte{}, uint8(kindData), uint32(1<<31), uint64(5), uint64(5))
	f.Add([]byte{}, uint8(kindClose), uint32(0), uint64(5), uint64(5))
	f.Add((&opening{gapFrom: 9, gapTo: 5}).append(nil), uint8(kindOpen), uint32(0), uint64(5), ^uint64(0))
	f.Fuzz(func(t *testing.T, payload []byte, kind uint8, count uint32, first, durable uint64) {
		if len(payload) > maxGroup {
			return
		}
		b := openGroup(opening{prev: 6, gapFrom: 5, gapTo: 5})
		g := seal(append(make([]byte, headerSize), payload...), header{
			log: testLog, segment: testSeg, offset: uint32(len(b)), count: count, kind: kind, first: first, durable: durable,
		})
		checkScan(t, append(b, g...))
		g = seal(append(make([]byte, headerSize), payload...), header{
			log: testLog, segment: testSeg, count: count, kind: kind, first: first, durable: durable,
		})
		checkScan(t, g)
	})
}

func checkScan(t *testing.T, b []byte) {
	s, err := scan(testReader(b))
	if err != nil {
		t.Fatal(err)
	}
	if s.tail > int64(len(b)) || s.end < s.first || !s.opened && s.end != 0 {
		t.Fatalf("nonsense: %+v of %d bytes", s, len(b))
	}
	next := s.first
	for off := int64(0); off < s.tail; {
		g, ok, _, err := testReader(b).group(off)
		if err != nil || !ok {
			t.Fatalf("group at %d read differently: %v %v", off, ok, err)
		}
		total := 0
		err = g.records(func(seq uint64, rec []byte) error {
			if seq != next {
				t.Fatalf("record %d after %d", seq, next)
			}
			next++
			total += 4 + len(rec)
			return nil
		})
		if err != nil || g.kind == kindData && total != len(g.payload) {
			t.Fatalf("records make %d of %d bytes: %v", total, len(g.payload), err)
		}
		off += g.size()
	}
	if next != s.end {
		t.Fatalf("records end at %d, scan says %d", next, s.end)
	}
	if _, err := assemble("dir", []scanned{s}, "boot"); err != nil && !errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
}

// FuzzVersion parses any VERSION file.
func FuzzVersion(f *testing.F) {
	f.Add("knhk-wal 1\nlog 0123456789abcdef\n")
	f.Add("knhk-wal 2\nlog 0123456789abcdef\n")
	f.Add("knhk-wal 1\nlog 1\n")
	f.Fuzz(func(t *testing.T, text string) {
		id, err := parseVersion("VERSION", text)
		if err == nil && text != versionText(id) {
			t.Errorf("%q accepted as log %x", text, id)
		}
	})
}
