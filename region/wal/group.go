package wal

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"math"
)

// A group is what one write puts into a segment: a header and, in a data group, records. All integers are little endian.
//
//	 0 magic     4  "KNW1"
//	 4 crc       4  CRC-32C of everything behind it, padding included
//	 8 log       8  random number made with the directory; also in VERSION
//	16 segment   8  number of the segment, as in its file name
//	24 offset    4  where in the segment the group stands
//	28 length    4  bytes of payload, padding to a multiple of 8 not included
//	32 count     4  records in the payload
//	36 kind      1  then 3 zero bytes
//	40 first     8  sequence number of the first record; without records, of the next one
//	48 durable   8  every record below was synced when this header was made
//	56 ceiling   8  no number from here on is handed out before a group with a higher ceiling is synced
//	64 released  8  every record below had been released
//	72 payload
//
// log, segment and offset make a group valid in one place only: what a recycled segment still holds, what another log
// left, and bytes that a client smuggled into a record are no groups.
const (
	groupMagic = 0x31574e4b
	headerSize = 72
	align      = 8

	// maxGroup bounds the payload one header covers, so that readers need little memory.
	maxGroup = 1 << 20
	// maxBoot bounds a boot id.
	maxBoot = 255
)

// The kinds of groups.
const (
	kindData  = iota + 1 // records
	kindOpen             // first in a segment: opening as payload
	kindMark             // empty: says what is durable
	kindClose            // empty: the writer ended in order, with everything before it synced
	kindLost             // empty: a mark by an Open that declared the numbers from first to ceiling lost
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	magicBytes = binary.LittleEndian.AppendUint32(nil, groupMagic)
)

type header struct {
	log, segment          uint64
	offset, length, count uint32
	kind                  uint8
	first, durable        uint64
	ceiling, released     uint64
}

// end is the sequence number after the group's last record.
func (h *header) end() uint64 { return h.first + uint64(h.count) }

// size is the group's size in the segment.
func (h *header) size() int64 { return headerSize + int64(padded(int(h.length))) }

func padded(n int) int { return (n + align - 1) &^ (align - 1) }

// seal completes a group: buf starts with headerSize bytes to be filled and holds the payload behind them. It returns
// buf, padded.
func seal(buf []byte, h header) []byte {
	h.length = uint32(len(buf) - headerSize)
	var zero [align]byte
	buf = append(buf, zero[:padded(len(buf))-len(buf)]...)
	le := binary.LittleEndian
	le.PutUint32(buf[0:], groupMagic)
	le.PutUint64(buf[8:], h.log)
	le.PutUint64(buf[16:], h.segment)
	le.PutUint32(buf[24:], h.offset)
	le.PutUint32(buf[28:], h.length)
	le.PutUint32(buf[32:], h.count)
	le.PutUint32(buf[36:], uint32(h.kind))
	le.PutUint64(buf[40:], h.first)
	le.PutUint64(buf[48:], h.durable)
	le.PutUint64(buf[56:], h.ceiling)
	le.PutUint64(buf[64:], h.released)
	le.PutUint32(buf[4:], crc32.Checksum(buf[8:], castagnoli))
	return buf
}

// parseHeader reads a header that claims to stand where it was read; ok says no more than that.
func parseHeader(b []byte, log, segment uint64, off int64) (h header, ok bool) {
	le := binary.LittleEndian
	if len(b) < headerSize || le.Uint32(b) != groupMagic {
		return h, false
	}
	kind := le.Uint32(b[36:])
	h = header{
		log: le.Uint64(b[8:]), segment: le.Uint64(b[16:]), offset: le.Uint32(b[24:]), length: le.Uint32(b[28:]),
		count: le.Uint32(b[32:]), kind: uint8(kind), first: le.Uint64(b[40:]), durable: le.Uint64(b[48:]),
		ceiling: le.Uint64(b[56:]), released: le.Uint64(b[64:]),
	}
	return h, kind <= math.MaxUint8 && h.log == log && h.segment == segment && int64(h.offset) == off
}

// opening is the payload of a segment's first group.
type opening struct {
	prev           uint64 // number of the segment written before; 0 for the first ever
	gapFrom, gapTo uint64 // numbers lost between that segment's last record and this one's first; equal when none
	boot           string // boot id of the writer, empty when unknown
}

func (o *opening) append(dst []byte) []byte {
	le := binary.LittleEndian
	dst = le.AppendUint64(dst, o.prev)
	dst = le.AppendUint64(dst, o.gapFrom)
	dst = le.AppendUint64(dst, o.gapTo)
	dst = append(dst, uint8(len(o.boot)))
	return append(dst, o.boot...)
}

func parseOpening(b []byte) (o opening, ok bool) {
	if len(b) < 25 || len(b) != 25+int(b[24]) {
		return o, false
	}
	le := binary.LittleEndian
	o = opening{prev: le.Uint64(b), gapFrom: le.Uint64(b[8:]), gapTo: le.Uint64(b[16:]), boot: string(b[25:])}
	return o, o.gapFrom <= o.gapTo
}

// group is a valid group. payload is borrowed from the reader until its next call.
type group struct {
	header
	payload []byte
}

// records calls fn for each record, in order, until it returns an error. The payload has been checked by reader.group.
func (g *group) records(fn func(seq uint64, rec []byte) error) error {
	b := g.payload
	for i := range uint64(g.count) {
		n := binary.LittleEndian.Uint32(b)
		if err := fn(g.first+i, b[4:4+n:4+n]); err != nil {
			return err
		}
		b = b[4+n:]
	}
	return nil
}

// wellFormed checks what the CRC cannot: that the payload is what kind and count say.
func (g *group) wellFormed() bool {
	if g.first > math.MaxUint64-uint64(g.count) {
		return false
	}
	b := g.payload
	switch g.kind {
	case kindData:
		if g.count == 0 {
			return false
		}
		for range g.count {
			if len(b) < 4 {
				return false
			}
			n := binary.LittleEndian.Uint32(b)
			if uint64(n) > uint64(len(b)-4) {
				return false
			}
			b = b[4+n:]
		}
		return len(b) == 0
	case kindOpen:
		o, ok := parseOpening(b)
		return ok && g.count == 0 && g.offset == 0 && o.gapTo == g.first
	case kindMark, kindClose, kindLost:
		return g.count == 0 && len(b) == 0
	}
	return false
}

// reader reads one segment of size bytes through a window. Its errors are those of reading, never of what was read.
type reader struct {
	f            io.ReaderAt
	size         int64
	log, segment uint64

	win    []byte
	winOff int64
}

const window = 256 << 10

// bytes returns n bytes at off, valid until the next call, or nil if the segment ends before.
func (r *reader) bytes(off int64, n int) ([]byte, error) {
	if off < 0 || off+int64(n) > r.size {
		return nil, nil
	}
	if off < r.winOff || off+int64(n) > r.winOff+int64(len(r.win)) {
		want := int(min(int64(max(n, window)), r.size-off))
		if cap(r.win) < want {
			r.win = make([]byte, want)
		}
		r.win, r.winOff = r.win[:want], off
		if k, err := r.f.ReadAt(r.win, off); k < want {
			r.win = r.win[:0]
			return nil, fmt.Errorf("read at offset %d: %w", off, err)
		}
	}
	i := off - r.winOff
	return r.win[i : i+int64(n) : i+int64(n)], nil
}

// group returns the valid group at off. If there is none, ours says whether there is at least a header written for this
// place.
func (r *reader) group(off int64) (g group, ok, ours bool, err error) {
	b, err := r.bytes(off, headerSize)
	if b == nil {
		return g, false, false, err
	}
	h, ours := parseHeader(b, r.log, r.segment, off)
	if !ours || h.length > maxGroup {
		return g, false, ours, nil
	}
	if b, err = r.bytes(off, int(h.size())); b == nil {
		return g, false, true, err
	}
	if crc32.Checksum(b[8:], castagnoli) != binary.LittleEndian.Uint32(b[4:]) {
		return g, false, true, nil
	}
	g = group{header: h, payload: b[headerSize : headerSize+int(h.length)]}
	return g, g.wellFormed(), true, nil
}

// search calls fn for every valid group at or behind off, whether or not groups lead up to it.
func (r *reader) search(off int64, fn func(g group)) error {
	for off = int64(padded(int(off))); off+headerSize <= r.size; {
		b, err := r.bytes(off, int(min(window, r.size-off)))
		if err != nil {
			return err
		}
		i := bytes.Index(b, magicBytes)
		if i < 0 {
			off += int64(len(b)) &^ (align - 1) // at least one, since a header fits
			continue
		}
		if i%align != 0 { // the window starts aligned, so this is no group
			off += int64(padded(i))
			continue
		}
		off += int64(i)
		g, ok, _, err := r.group(off)
		if err != nil {
			return err
		}
		if !ok {
			off += align
			continue
		}
		fn(g)
		off += g.size()
	}
	return nil
}
