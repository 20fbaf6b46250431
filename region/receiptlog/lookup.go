package receiptlog

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"sort"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/policy"
)

// findWindow bounds how long after its id was made a decision can have been sealed.
const findWindow = 2 * time.Minute

// State says how far a receipt has come.
type State string

// The states, in order.
const (
	StatePending State = "pending" // in the WAL
	StateSealed  State = "sealed"  // in a block
	StateLogged  State = "logged"  // its header is under a signed checkpoint
)

// Summary is one receipt as it stands now. Leaves are nil where there is none yet.
type Summary struct {
	ID       string
	State    State
	Decision []byte // leaf
	Outcome  []byte // leaf of the latest outcome
}

// found is a record and where it stands.
type found struct {
	leaf   []byte
	block  uint64
	pos    uint32
	sealed bool
}

func (f *found) unknown() bool {
	o, err := receipt.ParseOutcome(f.leaf)
	return err == nil && o.Result == string(policy.ResultUnknown)
}

// find returns the decision of uuid, nil if there is none, and its outcomes in order: none, one, or "unknown" and a late one.
func (l *Log) find(uuid [16]byte) (decision *found, outcomes []*found, err error) {
	decision, open := l.findOpen(uuid)
	if decision == nil {
		if decision, err = l.findSealed(uuid); err != nil || decision == nil {
			return nil, nil, err
		}
	}
	outcomes, err = l.findOutcomes(uuid, decision.block)
	sealed := len(outcomes)
	for _, o := range open {
		if sealed == 0 || outcomes[sealed-1].block < o.block { // not committed while we looked
			outcomes = append(outcomes, o)
		}
	}
	return decision, outcomes, err
}

// findOpen looks at the records that are in no committed block yet.
func (l *Log) findOpen(uuid [16]byte) (decision *found, outcomes []*found) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, b := range []*block{l.sealing, l.open} {
		if b == nil {
			continue
		}
		for i := range b.recs {
			if r := &b.recs[i]; r.uuid == uuid {
				f := &found{leaf: bytes.Clone(b.bytes(r.leaf)), block: b.n, pos: uint32(i)}
				if r.decision {
					decision = f
				} else {
					outcomes = append(outcomes, f)
				}
			}
		}
	}
	return decision, outcomes
}

// findSealed finds the decision of uuid in a block. The id's time says where to begin: a decision is appended at or after it,
// so it stands in the first block closed at or after it, or in the one that was being cut.
func (l *Log) findSealed(uuid [16]byte) (*found, error) {
	it, err := l.store.db.NewIter(&pebble.IterOptions{LowerBound: key(kTime, uint64(receipt.IDTime(uuid).UnixNano())), UpperBound: []byte{kTime + 1}})
	if err != nil {
		return nil, fmt.Errorf("find receipt: %w", err)
	}
	var f *found
	for it.First(); it.Valid() && f == nil && err == nil; it.Next() {
		n := binary.BigEndian.Uint64(it.Key()[9:])
		var at []*found
		if at, err = l.inBlock(uuid, n, receipt.DecisionPrefix); len(at) > 0 {
			f = at[0]
		}
		// A commit may have lasted a few blocks' time at most; beyond that the id was never recorded here.
		if binary.BigEndian.Uint64(it.Key()[1:])-uint64(receipt.IDTime(uuid).UnixNano()) > uint64(findWindow) {
			break
		}
	}
	return f, errors.Join(err, it.Close())
}

// inBlock finds the records of uuid with the given prefix in block n, in order.
func (l *Log) inBlock(uuid [16]byte, n uint64, prefix string) (out []*found, err error) {
	list, err := l.store.idIndex(n)
	if err != nil || list == nil {
		return nil, err
	}
	want := idHash(uuid)
	count := len(list) / 8
	for i := sort.Search(count, func(i int) bool { return binary.BigEndian.Uint32(list[8*i:]) >= want }); i < count; i++ {
		e := binary.BigEndian.Uint64(list[8*i:])
		if uint32(e>>32) != want {
			break
		}
		leaf, err := l.store.record(kRecords, n, e&(1<<32-1))
		if err != nil {
			return nil, err
		}
		if bytes.HasPrefix(leaf, []byte(prefix)) && leafUUID(leaf) == uuid {
			out = append(out, &found{leaf: leaf, block: n, pos: uint32(e), sealed: true})
		}
	}
	return out, nil
}

// findOutcomes finds the outcomes of a decision that stands in block n: in the blocks that follow it, or where an O key says.
func (l *Log) findOutcomes(uuid [16]byte, n uint64) (out []*found, err error) {
	blocks := make([]uint64, 0, farBlocks+3)
	for m := n; m <= n+farBlocks; m++ {
		blocks = append(blocks, m)
	}
	it, err := l.store.db.NewIter(&pebble.IterOptions{LowerBound: uuidKey(kOutcome, uuid), UpperBound: append(uuidKey(kOutcome, uuid), bytes.Repeat([]byte{0xff}, 9)...)})
	if err != nil {
		return nil, fmt.Errorf("find outcome: %w", err)
	}
	for it.First(); it.Valid(); it.Next() {
		if m := binary.BigEndian.Uint64(it.Key()[17:]); m > n+farBlocks {
			blocks = append(blocks, m)
		}
	}
	if err := errors.Join(it.Error(), it.Close()); err != nil {
		return nil, fmt.Errorf("find outcome: %w", err)
	}
	for _, m := range blocks {
		f, err := l.inBlock(uuid, m, receipt.OutcomePrefix)
		if err != nil {
			return nil, err
		}
		out = append(out, f...)
	}
	return out, nil
}

func leafUUID(leaf []byte) (uuid [16]byte) {
	var id string
	if bytes.HasPrefix(leaf, []byte(receipt.DecisionPrefix)) {
		if d, err := receipt.ParseDecision(leaf); err == nil {
			id = d.ID
		}
	} else if o, err := receipt.ParseOutcome(leaf); err == nil {
		id = o.ID
	}
	uuid, _, _ = receipt.ParseID(id)
	return uuid
}

// Get returns a receipt as it stands now. ErrNotFound.
func (l *Log) Get(ctx context.Context, id string) (Summary, error) {
	uuid, _, err := receipt.ParseID(id)
	if err != nil {
		return Summary{}, err
	}
	d, o, err := l.find(uuid)
	if err != nil {
		return Summary{}, err
	}
	if d == nil {
		return Summary{}, fmt.Errorf("%s: %w", id, ErrNotFound)
	}
	return l.summary(ctx, d, o)
}

func (l *Log) summary(ctx context.Context, d *found, outcomes []*found) (Summary, error) {
	dec, err := receipt.ParseDecision(d.leaf)
	if err != nil {
		return Summary{}, fmt.Errorf("block %d record %d: %w", d.block, d.pos, err)
	}
	s := Summary{ID: dec.ID, State: StatePending, Decision: d.leaf}
	if n := len(outcomes); n > 0 {
		s.Outcome = outcomes[n-1].leaf
	}
	if d.sealed {
		s.State = StateSealed
		cp, err := l.checkpoint(ctx)
		if err != nil {
			return Summary{}, err
		}
		if idx, known, err := l.store.index(d.block); err != nil {
			return Summary{}, err
		} else if known && idx < cp.size {
			s.State = StateLogged
		}
	}
	return s, nil
}

// ByRequestID lists the ids of the receipts of an x-request-id, oldest first. Only sealed receipts are found.
func (l *Log) ByRequestID(requestID string) ([]string, error) {
	return l.query(lookupHash('r', []byte(requestID)), func(n, pos uint64, _ *receipt.Decision) (bool, error) {
		raw, err := l.store.record(kEvidence, n, pos)
		if err != nil {
			return false, err
		}
		ev, err := receipt.ParseEvidence(raw)
		return err == nil && fieldOf(ev, fieldRequestID) == requestID, err
	})
}

// ByTraceID lists the ids of the receipts of a W3C trace id (32 hex digits), oldest first. Only sealed receipts are found.
func (l *Log) ByTraceID(traceID string) ([]string, error) {
	raw, err := hex.DecodeString(traceID)
	if err != nil || len(raw) != 16 {
		return nil, fmt.Errorf("trace id %q: want 32 hex digits", traceID)
	}
	return l.query(lookupHash('t', raw), func(_, _ uint64, d *receipt.Decision) (bool, error) { return d.TraceID == [16]byte(raw), nil })
}

func (l *Log) query(hash uint64, match func(n, pos uint64, d *receipt.Decision) (bool, error)) ([]string, error) {
	if hash == 0 {
		return nil, nil
	}
	it, err := l.store.db.NewIter(&pebble.IterOptions{LowerBound: key(kQuery, hash), UpperBound: key(kQuery, hash+1)})
	if err != nil {
		return nil, fmt.Errorf("find receipts: %w", err)
	}
	var ids []string
	for it.First(); it.Valid() && err == nil; it.Next() {
		n, pos := binary.BigEndian.Uint64(it.Key()[9:]), binary.BigEndian.Uint64(it.Key()[17:])
		var leaf []byte
		var d *receipt.Decision
		if leaf, err = l.store.record(kRecords, n, pos); err != nil {
			break
		}
		if d, err = receipt.ParseDecision(leaf); err != nil {
			break
		}
		var ok bool
		if ok, err = match(n, pos, d); ok {
			ids = append(ids, d.ID)
		}
	}
	return ids, errors.Join(err, it.Close())
}

// List returns up to limit receipts, newest first, those before the receipt id before if it is not empty.
func (l *Log) List(ctx context.Context, limit int, before string) ([]Summary, error) {
	var out []Summary
	start := ^uint64(0)
	startPos := ^uint32(0)
	if before != "" {
		uuid, _, err := receipt.ParseID(before)
		if err != nil {
			return nil, err
		}
		d, _, err := l.find(uuid)
		if err != nil {
			return nil, err
		}
		if d == nil {
			return nil, fmt.Errorf("%s: %w", before, ErrNotFound)
		}
		start, startPos = d.block, d.pos
	}
	var uuids [][16]byte
	take := func(n uint64, pos uint32, uuid [16]byte) {
		if (n < start || n == start && pos < startPos) && len(uuids) < limit {
			uuids = append(uuids, uuid)
		}
	}
	l.mu.Lock()
	for _, b := range []*block{l.open, l.sealing} {
		for i := 0; b != nil && i < len(b.recs); i++ {
			if r := &b.recs[len(b.recs)-1-i]; r.decision {
				take(b.n, uint32(len(b.recs)-1-i), r.uuid)
			}
		}
	}
	l.mu.Unlock()
	for n := l.blocks.Load(); n > 0 && len(uuids) < limit; n-- {
		if n-1 > start {
			continue
		}
		h, ok, err := l.store.parseHeaderAt(n - 1)
		if err != nil {
			return nil, err
		}
		if !ok {
			return nil, missing(n - 1)
		}
		if h.Count == 0 {
			continue
		}
		leaves, err := l.store.records(n-1, h.Count)
		if err != nil {
			return nil, err
		}
		for pos := len(leaves) - 1; pos >= 0; pos-- {
			if bytes.HasPrefix(leaves[pos], []byte(receipt.DecisionPrefix)) {
				take(n-1, uint32(pos), leafUUID(leaves[pos]))
			}
		}
	}
	for _, uuid := range uuids {
		d, o, err := l.find(uuid)
		if err != nil {
			return nil, err
		}
		if d == nil {
			continue
		}
		s, err := l.summary(ctx, d, o)
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}

// Bundle returns the bundle of a receipt under the latest signed checkpoint. ErrNotFound; ErrPending while the decision is not
// under one. An outcome that is not under it yet is left out: the receipt is then pending in that respect.
func (l *Log) Bundle(ctx context.Context, id string, evidence bool) ([]byte, error) {
	uuid, _, err := receipt.ParseID(id)
	if err != nil {
		return nil, err
	}
	d, o, err := l.find(uuid)
	if err != nil {
		return nil, err
	}
	if d == nil {
		return nil, fmt.Errorf("%s: %w", id, ErrNotFound)
	}
	p, err := l.newProver(ctx)
	if err != nil {
		return nil, err
	}
	return p.bundle(d, o, evidence)
}

// Export yields the bundles of every receipt under one and the same signed checkpoint, in order of admission, with how many
// there are in all (an upper bound: records are counted, receipts have one or two).
func (l *Log) Export(ctx context.Context, evidence bool) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		p, err := l.newProver(ctx)
		if err != nil {
			yield(nil, err)
			return
		}
		for n := range l.blocks.Load() {
			idx, known, err := l.store.index(n)
			if err != nil {
				yield(nil, err)
				return
			}
			if !known || idx >= p.cp.size {
				if _, ok, err := l.store.parseHeaderAt(n); err != nil || !ok { // not merely newer than the checkpoint
					yield(nil, errors.Join(err, missing(n)))
				}
				return
			}
			if !l.exportBlock(p, n, evidence, yield) {
				return
			}
		}
	}
}

// missing is the error for a block that was committed and is not there.
func missing(n uint64) error { return fmt.Errorf("block %d is missing or damaged: run knhk fsck", n) }

func (l *Log) exportBlock(p *prover, n uint64, evidence bool, yield func([]byte, error) bool) bool {
	h, ok, err := l.store.parseHeaderAt(n)
	if err != nil || !ok {
		return yield(nil, errors.Join(err, missing(n))) && false
	}
	if h.Count == 0 {
		return true
	}
	errStop := errors.New("stop")
	err = l.store.each(n, h.Count, func(pos uint32, leaf []byte) error {
		if !bytes.HasPrefix(leaf, []byte(receipt.DecisionPrefix)) {
			return nil
		}
		o, err := l.findOutcomes(leafUUID(leaf), n)
		if err != nil {
			return err
		}
		b, err := p.bundle(&found{leaf: leaf, block: n, pos: pos, sealed: true}, o, evidence)
		if err == nil && !yield(b, nil) {
			err = errStop
		}
		return err
	})
	if err != nil && !errors.Is(err, errStop) {
		yield(nil, err)
	}
	return err == nil
}

// Receipts estimates how many receipts the blocks hold: half of their records, rounded up.
func (l *Log) Receipts() (uint64, error) {
	var records uint64
	for n := range l.blocks.Load() {
		h, ok, err := l.store.parseHeaderAt(n)
		if err != nil {
			return 0, err
		}
		if ok {
			records += h.Count
		}
	}
	return (records + 1) / 2, nil
}
