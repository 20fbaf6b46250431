package receiptlog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"time"

	"github.com/knhk/sidecar/crypto/receipt"
)

// The WAL carries what a block is made of: a decision with its evidence beside it, or an outcome.
const (
	walDecision = 'D' // uvarint length of the leaf, leaf, evidence
	walOutcome  = 'O' // leaf
)

// block gathers the records of one block, in the order of their ordinals. Guarded by Log.mu until it is cut.
type block struct {
	n     uint64 // local number, fixed when the block is opened
	since time.Time
	buf   []byte // WAL entries, one after the other
	recs  []rec
}

// rec is one record within block.buf.
type rec struct {
	uuid           [16]byte
	seq            uint64
	request, trace uint64 // hashes for lookups; 0 for none
	leaf, evidence span
	decision       bool
	ref            pendingRef // of an outcome: where its decision stands
}

type span struct{ off, len uint32 }

func (b *block) bytes(s span) []byte { return b.buf[s.off : s.off+s.len : s.off+s.len] }

// addDecision encodes d and its evidence and returns the WAL entry, which is valid until the next call.
func (b *block) addDecision(d *receipt.Decision, uuid [16]byte, ev *receipt.Evidence, requestID string) ([]byte, pendingRef) {
	start := len(b.buf)
	// The leaf's length stands before it: leave room for a fixed three-byte uvarint (a leaf is far below 2 MiB).
	b.buf = append(b.buf, walDecision, 0, 0, 0)
	leafOff := len(b.buf)
	b.buf = receipt.AppendDecision(b.buf, d)
	leaf := span{uint32(leafOff), uint32(len(b.buf) - leafOff)}
	putUvarint3(b.buf[start+1:], leaf.len)
	evOff := len(b.buf)
	b.buf = receipt.AppendEvidence(b.buf, ev)
	r := rec{uuid: uuid, seq: d.Ordinal, decision: true, leaf: leaf, evidence: span{uint32(evOff), uint32(len(b.buf) - evOff)},
		request: lookupHash('r', []byte(requestID))}
	if d.TraceID != ([16]byte{}) {
		r.trace = lookupHash('t', d.TraceID[:])
	}
	return b.buf[start:], b.add(r, d.Time)
}

func (b *block) addOutcome(o *receipt.Outcome, uuid [16]byte, ref pendingRef) []byte {
	start := len(b.buf)
	b.buf = append(b.buf, walOutcome)
	b.buf = receipt.AppendOutcome(b.buf, o)
	b.add(rec{uuid: uuid, seq: o.Ordinal, leaf: span{uint32(start + 1), uint32(len(b.buf) - start - 1)}, ref: ref}, o.Time)
	return b.buf[start:]
}

func (b *block) add(r rec, at time.Time) pendingRef {
	if len(b.recs) == 0 {
		b.since = at
	}
	b.recs = append(b.recs, r)
	return pendingRef{at: at, block: b.n, pos: uint32(len(b.recs) - 1)}
}

// replay adds a WAL entry as it was written.
func (b *block) replay(seq uint64, entry []byte, pending *pendingSet) error {
	if len(entry) == 0 {
		return errors.New("empty WAL record")
	}
	start := len(b.buf)
	b.buf = append(b.buf, entry...)
	switch entry[0] {
	case walDecision:
		size, w := binary.Uvarint(entry[1:])
		if w <= 0 || size > uint64(len(entry)-1-w) {
			return errors.New("damaged decision in WAL")
		}
		leaf := span{uint32(start + 1 + w), uint32(size)}
		evOff := leaf.off + leaf.len
		evidence := span{evOff, uint32(len(b.buf)) - evOff}
		d, err := receipt.ParseDecision(b.bytes(leaf))
		if err != nil {
			return err
		}
		ev, err := receipt.ParseEvidence(b.bytes(evidence))
		if err != nil {
			return err
		}
		uuid, _, err := receipt.ParseID(d.ID)
		if err != nil {
			return err
		}
		r := rec{uuid: uuid, seq: seq, decision: true, leaf: leaf, evidence: evidence, request: lookupHash('r', []byte(fieldOf(ev, fieldRequestID)))}
		if d.TraceID != ([16]byte{}) {
			r.trace = lookupHash('t', d.TraceID[:])
		}
		pending.put(uuid, b.add(r, d.Time))
	case walOutcome:
		leaf := span{uint32(start + 1), uint32(len(entry) - 1)}
		o, err := receipt.ParseOutcome(b.bytes(leaf))
		if err != nil {
			return err
		}
		uuid, _, err := receipt.ParseID(o.ID)
		if err != nil {
			return err
		}
		ref, ok := pending.claim(uuid)
		if !ok {
			ref = pendingRef{late: true}
		}
		b.add(rec{uuid: uuid, seq: seq, leaf: leaf, ref: ref}, o.Time)
	default:
		return fmt.Errorf("WAL record of unknown kind %q", entry[0])
	}
	return nil
}

func fieldOf(ev *receipt.Evidence, name string) string {
	for _, f := range ev.Fields {
		if f.Name == name {
			return f.Value
		}
	}
	return ""
}

// putUvarint3 writes v < 2^21 as a uvarint of exactly three bytes.
func putUvarint3(dst []byte, v uint32) {
	dst[0], dst[1], dst[2] = byte(v)|0x80, byte(v>>7)|0x80, byte(v>>14)
}

// lookupHash is the key under which a decision is found by a value; 0 for the empty value. Collisions cost a read, no more:
// what is found is compared with the record.
func lookupHash(kind byte, value []byte) uint64 {
	if len(value) == 0 {
		return 0
	}
	h := fnv.New64a()
	h.Write([]byte{kind})
	h.Write(value)
	return h.Sum64()
}
