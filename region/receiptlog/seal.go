package receiptlog

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"runtime"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"golang.org/x/sync/errgroup"

	"github.com/knhk/sidecar/crypto/receipt"
)

// chain is where the sequence of headers stands; it is written in the same batch as the block it follows from.
type chain struct {
	Incarnation [16]byte     `json:"incarnation"`
	Seq         uint64       `json:"seq"`      // of the next header in this incarnation
	Prev        receipt.Hash `json:"prev"`     // leaf hash of the last header
	Next        uint64       `json:"next"`     // local number of the next block
	Time        time.Time    `json:"time"`     // of the last header; the durable floor of the clock
	Released    uint64       `json:"released"` // WAL ordinals below this stand in blocks
	Clean       bool         `json:"clean"`    // the incarnation ended in order
	Closed      bool         `json:"closed"`   // it has a final header, be it the recovery's
}

type uncoveredBlock struct {
	n     uint64
	since time.Time
}

type checkpoint struct {
	raw  []byte
	size uint64
	root receipt.Hash
}

// Run closes blocks, feeds the log, changes its daily key in time, watches the checkpoint and expires outcomes until ctx ends. An
// error is a fault that stopped the log; the caller should stop serving. A log that is sealed for good is only read: Run waits.
func (l *Log) Run(ctx context.Context) error {
	if l.wal == nil { // sealed long ago: there is nothing to do but to be read
		<-ctx.Done()
		return nil
	}
	// The WAL outlives those who write to it: the sealer must be able to finish the block it has cut.
	walCtx, stopWAL := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWAL()
	g, ctx := errgroup.WithContext(ctx)
	walDone := make(chan error, 1)
	go func() { walDone <- l.wal.Run(walCtx) }()
	g.Go(func() error {
		select {
		case err := <-walDone:
			walDone <- err
			return err
		case <-ctx.Done():
			return nil
		}
	})
	g.Go(func() error { return l.runSealer(ctx) })
	g.Go(func() error { return l.runPublisher(ctx) })
	g.Go(func() error { return l.runKeys(ctx) })
	g.Go(func() error { return l.runWatch(ctx) })
	g.Go(func() error { return l.runExpiry(ctx) })
	err := g.Wait()
	stopWAL()
	err = errors.Join(err, <-walDone)
	if err != nil {
		l.fail(err)
		return fmt.Errorf("receipt log: %w", err)
	}
	return nil
}

// runSealer closes a block every SealEvery, or a heartbeat when there was nothing for a while.
func (l *Log) runSealer(ctx context.Context) error {
	tick := time.NewTicker(l.cfg.SealEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := l.headerMu.lock(ctx); err != nil {
			return nil
		}
		err := l.sealDue(ctx)
		l.headerMu.unlock()
		if err != nil {
			return err
		}
	}
}

// sealDue closes a block if one is due. What it is, and under which key, is decided here and in seal, where nothing can come
// between. The caller holds headerMu.
func (l *Log) sealDue(ctx context.Context) error {
	if l.ended.Load() {
		return nil
	}
	l.mu.Lock()
	empty, size := len(l.open.recs) == 0, uint64(len(l.open.buf))
	l.mu.Unlock()
	if free, err := freeBytes(l.cfg.Dir); err == nil && free < sealFree+2*size {
		return nil // the records are safe in the WAL; a block store that runs into the end of the disk is not
	}
	// A log that takes headers more slowly than they come is given fewer, so that a key change, which waits for all of them, does not
	// wait for long. The WAL must be released all the same.
	if l.blocks.Load()-l.added.Load() >= maxBacklog && size < largeBlock {
		return nil
	}
	kind := receipt.HeaderBlock
	if empty {
		if l.clock.Now().Sub(l.chain.Time) < l.cfg.Heartbeat {
			return nil
		}
		kind = receipt.HeaderHeartbeat
	}
	err := l.seal(ctx, kind, headerExtra{})
	if errors.Is(err, errNoKey) {
		return nil // runKeys changes it; the records wait in the WAL, and max_unsigned counts
	}
	return err
}

// headerExtra is what only some headers say.
type headerExtra struct {
	recovered        bool
	lostFrom, lostTo uint64
	clean            bool
}

// errNoKey says that no header can be made now: the daily key in force is past its age, or it is being changed.
var errNoKey = errors.New("no daily key in force")

// seal cuts the open block and commits it: records, index and the exact header bytes in one synced batch. Only then may
// the header go to the log. The caller holds headerMu. errNoKey: nothing was cut.
//
// A crash before the commit leaves the records in the WAL, to be sealed by the recovery; a crash after it leaves a header
// that the next start adds to the log, byte for byte, before its key can be changed.
func (l *Log) seal(ctx context.Context, kind string, x headerExtra) error {
	statement, notAfter, ok := l.keys.HeaderKey()
	if !ok {
		return fmt.Errorf("seal: %w", errNoKey)
	}
	// The memory of the block before: growing a new one would copy megabytes while requests wait.
	next := newBlock(0)
	next.buf, next.recs = l.reuse.buf[:0], l.reuse.recs[:0]
	l.mu.Lock()
	if l.sealing != nil {
		l.mu.Unlock()
		return fmt.Errorf("seal: block %d could not be committed; a restart recovers its records from the WAL", l.sealing.n)
	}
	// Read while nobody can append: no record of the block is younger than its header.
	now := l.clock.Now()
	if !now.Before(notAfter) {
		l.mu.Unlock()
		return fmt.Errorf("seal: %w: it ended %s", errNoKey, notAfter.UTC().Format(time.RFC3339))
	}
	b := l.open
	if kind == receipt.HeaderHeartbeat && len(b.recs) > 0 && x.lostFrom == x.lostTo {
		kind = receipt.HeaderBlock // the silence has just ended: it is no longer called for, and after the block the next records may be there
	}
	if kind != receipt.HeaderBlock && len(b.recs) > 0 {
		l.mu.Unlock()
		if err := l.seal(ctx, receipt.HeaderBlock, headerExtra{recovered: x.recovered}); err != nil {
			return err
		}
		return l.seal(ctx, kind, x)
	}
	l.reuse.buf, l.reuse.recs = nil, nil
	l.sealing = b
	l.open = next
	next.n = b.n + 1
	l.mu.Unlock()
	if err := l.commitBlock(ctx, b, kind, x, statement, now); err != nil {
		l.fail(err)
		return fmt.Errorf("seal block %d: %w", b.n, err)
	}
	l.mu.Lock()
	l.sealing = nil
	l.mu.Unlock()
	// Nobody looks at b any more: lookups copy what they find while mu is held. A burst's memory is not kept for ever.
	if cap(b.buf) <= max(reuseBytes, 4*len(b.buf)) {
		l.reuse.buf, l.reuse.recs = b.buf, b.recs
	}
	select {
	case l.wake <- struct{}{}:
	default:
	}
	return nil
}

func newBlock(n uint64) *block { return &block{n: n} }

// commitBlock writes block b under a header of the given time, which names the key statement in force.
func (l *Log) commitBlock(ctx context.Context, b *block, kind string, x headerExtra, statement uint64, now time.Time) error {
	// A record may be in the block before its write has been tried: nothing is sealed that the WAL does not hold.
	// What a recovery seals was read from the WAL.
	if len(b.recs) > 0 && !x.recovered {
		if err := l.wal.Sync(context.WithoutCancel(ctx)); err != nil { // a block that was cut is finished
			return err
		}
	}
	leaves := make([]receipt.Hash, len(b.recs))
	for i := range b.recs {
		if i%chunkRecords == 0 {
			runtime.Gosched() // requests first: they are many short turns, this is a long one
		}
		leaves[i] = receipt.LeafHash(b.bytes(b.recs[i].leaf))
	}
	tree := receipt.NewTree(leaves)
	c := l.chain
	h := receipt.Header{
		Origin: l.id.Origin, LogID: l.logID, Instance: l.cfg.Instance, Incarnation: c.Incarnation, Seq: c.Seq, Kind: kind, Key: statement,
		Prev: c.Prev, Time: now, Count: uint64(len(leaves)), Root: tree.Root(), Recovered: x.recovered, LostFrom: x.lostFrom, LostTo: x.lostTo,
	}
	if n := len(b.recs); n > 0 {
		h.First, h.Last = b.recs[0].seq, b.recs[n-1].seq
		c.Released = h.Last + 1
	}
	leaf := receipt.AppendHeader(nil, &h)
	c.Seq, c.Prev, c.Next, c.Time, c.Clean = c.Seq+1, receipt.LeafHash(leaf), b.n+1, h.Time, x.clean
	c.Closed = kind == receipt.HeaderFinal

	batch := l.store.db.NewBatchWithSize(len(b.buf)/4 + 32*len(b.recs) + 4096) // about what becomes of it
	defer batch.Close()
	err := errors.Join(batch.Set(key(kHeader, b.n), leaf, nil), batch.Set(key(kTime, uint64(h.Time.UnixNano()), b.n), nil, nil),
		putChain(batch, c), l.putRecords(batch, b), l.putPending(batch, b.n))
	if err == nil {
		err = batch.Commit(pebble.Sync)
	}
	if err != nil {
		return err
	}
	l.chain = c
	l.blocks.Store(c.Next)
	if len(leaves) > 0 {
		l.trees.Add(b.n, tree)
	}
	since := h.Time
	if len(b.recs) > 0 {
		since = b.since
	}
	l.uncovered.Lock()
	l.uncovered.queue = append(l.uncovered.queue, uncoveredBlock{b.n, since})
	l.uncovered.Unlock()
	if len(leaves) > 0 {
		if err := l.wal.Release(c.Released); err != nil {
			return fmt.Errorf("release WAL: %w", err)
		}
	}
	return nil
}

// putRecords writes the records, evidence and indices of b.
func (l *Log) putRecords(batch *pebble.Batch, b *block) error {
	if len(b.recs) == 0 {
		return nil
	}
	var errs []error
	plain, evidence, packed := l.scratch[0][:0], l.scratch[1][:0], l.scratch[2]
	defer func() { l.scratch = [3][]byte{plain, evidence, packed} }()
	pack := func(kind byte, c uint64, items []byte) error { // the batch copies
		packed = l.store.enc.EncodeAll(items, packed[:0])
		return batch.Set(key(kind, b.n, c), packed, nil)
	}
	answered := make([]bool, len(b.recs))
	ids := make([]uint64, len(b.recs))
	for i := range b.recs {
		r := &b.recs[i]
		plain = appendChunk(plain, b.bytes(r.leaf))
		evidence = appendChunk(evidence, b.bytes(r.evidence))
		if (i+1)%chunkRecords == 0 || i == len(b.recs)-1 {
			c := uint64(i / chunkRecords)
			errs = append(errs, pack(kRecords, c, plain), pack(kEvidence, c, evidence))
			plain, evidence = plain[:0], evidence[:0]
			runtime.Gosched()
		}
		ids[i] = idEntry(r.uuid, i)
		if r.decision {
			for _, h := range [...]uint64{r.request, r.trace} {
				if h != 0 {
					errs = append(errs, batch.Set(key(kQuery, h, b.n, uint64(i)), nil, nil))
				}
			}
			continue
		}
		if !r.ref.late && r.ref.block == b.n {
			answered[r.ref.pos] = true
			continue
		}
		if r.ref.late || r.ref.stored || b.n-r.ref.block >= farBlocks {
			errs = append(errs, batch.Delete(uuidKey(kPending, r.uuid), nil))
		}
		if r.ref.late || b.n-r.ref.block > farBlocks {
			errs = append(errs, batch.Set(binary.BigEndian.AppendUint64(uuidKey(kOutcome, r.uuid), b.n), nil, nil))
		}
	}
	var open []openDecision
	for i := range b.recs {
		if r := &b.recs[i]; r.decision && !answered[i] {
			open = append(open, openDecision{r.uuid, b.n, uint32(i)})
		}
	}
	l.unanswered = append(l.unanswered, open)
	return errors.Join(append(errs, batch.Set(key(kIDs, b.n), encodeIDs(ids), nil))...)
}

// idEntry is what the id index says of the record at pos.
func idEntry(uuid [16]byte, pos int) uint64 { return uint64(idHash(uuid))<<32 | uint64(pos) }

// encodeIDs sorts the entries of a block's id index and gives it as it is stored.
func encodeIDs(ids []uint64) []byte {
	slices.Sort(ids)
	list := make([]byte, 0, 8*len(ids))
	for _, id := range ids {
		list = binary.BigEndian.AppendUint64(list, id)
	}
	return list
}

// idHash is the first half of an id index entry.
func idHash(uuid [16]byte) uint32 {
	h := fnv.New32a()
	h.Write(uuid[:])
	return h.Sum32()
}
