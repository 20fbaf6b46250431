package receiptlog

import (
	"bytes"
	"cmp"
	"slices"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/region/wal"
)

// has notes that a record has this ordinal.
func (a *audit) has(ordinal uint64) {
	if n := len(a.present); n > 0 && a.present[n-1].To == ordinal {
		a.present[n-1].To++
		return
	}
	a.present = append(a.present, wal.Range{From: ordinal, To: ordinal + 1})
}

// beside checks what stands beside the records of block n: the evidence and the id index.
func (a *audit) beside(where string, n uint64, leaves [][]byte) {
	var evidence [][]byte
	for c := uint64(0); c*chunkRecords < uint64(len(leaves)); c++ {
		items, err := a.store.chunk(kEvidence, n, c)
		if err != nil {
			a.problem(where, "evidence: %v", err)
			break
		}
		evidence = append(evidence, items...)
	}
	ids := make([]uint64, 0, len(leaves))
	for i, leaf := range leaves {
		ids = append(ids, idEntry(leafUUID(leaf), i))
		if i >= len(evidence) {
			continue // named above
		}
		d, err := receipt.ParseDecision(leaf)
		if err != nil {
			continue // an outcome; or named by record
		}
		ev, err := receipt.ParseEvidence(evidence[i])
		if err == nil {
			err = receipt.CheckEvidence(d, ev)
		}
		if err != nil {
			a.problem(where, "evidence of receipt %s: %v", d.ID, err)
		}
	}
	if got, err := a.store.get(key(kIDs, n)); err != nil || !bytes.Equal(got, encodeIDs(ids)) {
		a.problem(where, "its index of ids is damaged: receipts in it are not found (%v)", err)
	}
}

// places checks the indices of blocks by time and by place in the log.
func (a *audit) places(total uint64) {
	for n := range total {
		h, ok, err := a.store.parseHeaderAt(n)
		if err != nil || !ok {
			continue // named by indexBlocks
		}
		// The value of a time key is empty, which get returns as such, not as nil.
		if v, err := a.store.get(key(kTime, uint64(h.Time.UnixNano()), n)); err != nil || v == nil {
			a.problem(headerName(h), "block %d is not in the index by time: receipts in it are not found (%v)", n, err)
		}
		leaf, err := a.store.header(n)
		if err != nil {
			continue
		}
		idx, known, err := a.store.index(n)
		if err != nil || known && idx < uint64(len(a.hashes)) && a.hashes[idx] != receipt.LeafHash(leaf) {
			a.problem(headerName(h), "block %d is said to be leaf %d of the log, but that is another (%v)", n, idx, err)
		}
	}
}

// pending checks that decisions without outcome, and only those, are noted as such: a restart knows them by that alone, but for those
// of the last blocks, which it reads.
func (a *audit) pending(total uint64) {
	noted := map[[16]byte]bool{}
	err := a.store.scan([]byte{kPending}, []byte{kPending + 1}, func(k, _ []byte) error {
		if len(k) != 17 {
			a.problem("blocks", "pending decision %x is damaged", k)
			return nil
		}
		uuid := [16]byte(k[1:])
		noted[uuid] = true
		if d, ok := a.decided[uuid]; !ok || d.answered {
			a.problem("blocks", "receipt %x is noted as pending, and is not", uuid)
		}
		return nil
	})
	if err != nil {
		a.problem("blocks", "pending decisions: %v", err)
	}
	for uuid, d := range a.decided {
		if !d.answered && !noted[uuid] && d.block+readBack < total {
			a.problem("blocks", "receipt %x has no outcome, and is not noted as pending", uuid)
		}
	}
}

// everyKey reads all there is: what no other check looks at must at least be readable.
func (a *audit) everyKey() {
	if err := a.store.scan(nil, nil, func(k, _ []byte) error {
		if !bytes.ContainsRune([]byte{kHeader, kIndex, kRecords, kEvidence, kIDs, kOutcome, kPending, kQuery, kTime, kKey, kMeta}, rune(k[0])) {
			a.problem("blocks", "unknown key %q", k)
		}
		return nil
	}); err != nil {
		a.problem("blocks", "cannot be read to the end: %v", err)
	}
}

// unsealed checks the write-ahead log, and that it goes on where the blocks end.
func (a *audit) unsealed() {
	b, pending := newBlock(0), new(pendingSet)
	r, err := wal.Check(a.wal, func(seq uint64, entry []byte) error {
		if seq < a.released {
			return nil
		}
		a.report.Unsealed++
		a.has(seq)
		return b.replay(seq, entry, pending)
	})
	if err != nil {
		a.problem("wal", "%v", err)
		return
	}
	a.lost = append(a.lost, r.Lost...)
	if err := meets(r, a.released); err != nil {
		a.problem("wal", "%v", err)
	}
}

// ordinals checks that every ordinal up to the last is a record, once, or declared lost.
func (a *audit) ordinals() {
	slices.SortFunc(a.present, func(x, y wal.Range) int { return cmp.Compare(x.From, y.From) })
	slices.SortFunc(a.lost, func(x, y wal.Range) int { return cmp.Compare(x.From, y.From) })
	lost, next := a.lost, uint64(1)
	for _, r := range a.present {
		for len(lost) > 0 && lost[0].From <= next {
			next = max(next, lost[0].To)
			lost = lost[1:]
		}
		switch {
		case r.From > next:
			a.problem("blocks", "records %d to %d are in no block, and no header declares them lost", next, r.From-1)
		case r.From < next:
			a.problem("blocks", "records %d to %d are there twice, or declared lost", r.From, min(r.To, next)-1)
		}
		next = max(next, r.To)
	}
}
