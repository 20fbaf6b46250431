package receiptlog

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"runtime"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/sync/errgroup"

	"filippo.io/torchwood"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/region/wal"
)

var emptyRoot = receipt.Hash(rfc6962.DefaultHasher.EmptyRoot())

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

// Run closes blocks, feeds the log, watches the checkpoint and expires outcomes until ctx ends. An error is a fault that
// stopped the log; the caller should stop serving.
func (l *Log) Run(ctx context.Context) error {
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
		kind := receipt.HeaderBlock
		l.mu.Lock()
		empty, size := len(l.open.recs) == 0, uint64(len(l.open.buf))
		l.mu.Unlock()
		if free, err := freeBytes(l.cfg.Dir); err == nil && free < sealFree+2*size {
			continue // the records are safe in the WAL; a block store that runs into the end of the disk is not
		}
		if empty {
			if l.clock.now().Sub(l.chain.Time) < l.cfg.Heartbeat {
				continue
			}
			kind = receipt.HeaderHeartbeat
		}
		if err := l.seal(ctx, kind, headerExtra{}); err != nil {
			return err
		}
	}
}

// headerExtra is what only some headers say.
type headerExtra struct {
	recovered        bool
	lostFrom, lostTo uint64
	clean            bool
}

// seal cuts the open block and commits it: records, index and the exact header bytes in one synced batch. Only then may
// the header go to the log.
//
// A crash before the commit leaves the records in the WAL, to be sealed by the recovery; a crash after it leaves a header
// that the next start adds to the log, byte for byte.
func (l *Log) seal(ctx context.Context, kind string, x headerExtra) error {
	// The memory of the block before: growing a new one would copy megabytes while requests wait.
	next := newBlock(0)
	next.buf, next.recs = l.reuse.buf[:0], l.reuse.recs[:0]
	l.mu.Lock()
	if l.sealing != nil {
		l.mu.Unlock()
		return fmt.Errorf("seal: block %d could not be committed; a restart recovers its records from the WAL", l.sealing.n)
	}
	b := l.open
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
	if err := l.commitBlock(ctx, b, kind, x); err != nil {
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

func (l *Log) commitBlock(ctx context.Context, b *block, kind string, x headerExtra) error {
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
		Origin: l.id.Origin, LogID: l.logID, Instance: l.cfg.Instance, Incarnation: c.Incarnation, Seq: c.Seq, Kind: kind, Prev: c.Prev,
		Time: l.clock.now(), Count: uint64(len(leaves)), Root: tree.Root(), Recovered: x.recovered, LostFrom: x.lostFrom, LostTo: x.lostTo,
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
		putMeta(batch, "chain", c), l.putRecords(batch, b), l.putPending(batch, b.n))
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

// runPublisher adds the headers of committed blocks to the transparency log, in order, and replaces the daily key in time.
func (l *Log) runPublisher(ctx context.Context) error {
	retry := time.NewTimer(0)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-l.wake:
		case <-retry.C:
		}
		err := errors.Join(l.addHeaders(ctx), l.settleDaily(ctx))
		if err != nil && ctx.Err() == nil {
			l.log.WarnContext(ctx, "cannot add to the log, trying again", "error", err)
		}
		retry.Reset(time.Second)
	}
}

// addHeaders adds every committed header that is not in the log yet.
func (l *Log) addHeaders(ctx context.Context) error {
	for l.added < l.blocks.Load() {
		if _, known, err := l.store.index(l.added); err != nil {
			return err
		} else if !known {
			leaf, err := l.store.header(l.added)
			if err != nil {
				return err
			}
			idx, err := l.addLeaf(ctx, leaf)
			if err != nil {
				return fmt.Errorf("add header of block %d: %w", l.added, err)
			}
			// Not synced: a crash here adds the same bytes again, which is legal.
			if err := l.store.setIndex(l.added, idx); err != nil {
				return err
			}
		}
		l.added++
	}
	return nil
}

// runWatch follows the signed checkpoint and refuses requests when records have gone unsigned for too long.
func (l *Log) runWatch(ctx context.Context) error {
	tick := time.NewTicker(checkpointPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if _, err := l.checkpoint(ctx); err != nil && ctx.Err() == nil {
			l.log.WarnContext(ctx, "cannot read checkpoint", "error", err)
		}
		l.judge(ctx)
	}
}

// judge decides whether requests are taken: not while records have gone unsigned for too long, nor while the disk is nearly full.
func (l *Log) judge(ctx context.Context) {
	why := l.room()
	if age := l.UnsignedAge(); age > l.cfg.MaxUnsigned {
		why = fmt.Errorf("%w: %v, limit %v", ErrUnsigned, age.Round(time.Second), l.cfg.MaxUnsigned)
	}
	cur := l.refusing.Load()
	switch {
	case why != nil && cur == nil:
		if l.refuse(why) {
			l.log.ErrorContext(ctx, "refusing requests", "error", why)
		}
	case why == nil && cur != nil && (errors.Is(*cur, ErrUnsigned) || errors.Is(*cur, ErrFull)):
		if l.refusing.CompareAndSwap(cur, nil) {
			l.log.InfoContext(ctx, "taking requests again")
		}
	}
}

// UnsignedAge is the age of the oldest record that no signed checkpoint covers; 0 when there is none.
func (l *Log) UnsignedAge() time.Duration {
	l.uncovered.Lock()
	defer l.uncovered.Unlock()
	if cp := l.cp.Load(); cp != nil {
		q := l.uncovered.queue
		for len(q) > 0 {
			idx, known, err := l.store.index(q[0].n)
			if err != nil || !known || idx >= cp.size {
				break
			}
			q = q[1:]
		}
		l.uncovered.queue = q
	}
	var since time.Time
	if len(l.uncovered.queue) > 0 {
		since = l.uncovered.queue[0].since
	} else {
		l.mu.Lock()
		for _, b := range []*block{l.open, l.sealing} { // the older one last
			if b != nil && len(b.recs) > 0 {
				since = b.since
			}
		}
		l.mu.Unlock()
	}
	if since.IsZero() {
		return 0
	}
	return max(l.clock.now().Sub(since), 0)
}

// checkpoint reads the latest signed checkpoint back from the log.
func (l *Log) checkpoint(ctx context.Context) (*checkpoint, error) {
	raw, err := l.reader.ReadCheckpoint(ctx)
	if err != nil {
		return nil, fmt.Errorf("read checkpoint: %w", err)
	}
	if old := l.cp.Load(); old != nil && string(old.raw) == string(raw) {
		return old, nil
	}
	cp, err := parseCheckpoint(raw)
	if err != nil {
		return nil, err
	}
	l.cp.Store(cp)
	return cp, nil
}

func parseCheckpoint(raw []byte) (*checkpoint, error) {
	text, _, ok := cutNote(raw)
	if !ok {
		return nil, errors.New("read checkpoint: not a signed note")
	}
	c, err := torchwood.ParseCheckpoint(text)
	if err != nil {
		return nil, fmt.Errorf("read checkpoint: %w", err)
	}
	return &checkpoint{raw: raw, size: uint64(c.N), root: receipt.Hash(c.Hash)}, nil
}

// recover brings a directory back to where its records say it is: see doc.go.
func (l *Log) recover(ctx context.Context) error {
	if err := l.loadPending(); err != nil {
		return err
	}
	fresh := l.chain.Next == 0
	crashed := !fresh && !l.chain.Clean
	l.open = newBlock(l.chain.Next)
	var replayed uint64
	if err := l.wal.Replay(func(seq uint64, entry []byte) error {
		if seq < l.chain.Released {
			return nil // in a block already: the crash came between the block's commit and the WAL's release
		}
		replayed++
		if err := l.open.replay(seq, entry, &l.pending); err != nil {
			return fmt.Errorf("recover WAL record %d: %w", seq, err)
		}
		return nil
	}); err != nil {
		return err
	}
	l.blocks.Store(l.chain.Next)
	behind, err := l.matchLog(ctx)
	if err != nil {
		return err
	}
	if err := l.loadUncovered(ctx); err != nil {
		return err
	}
	found := l.wal.Recovered()
	if fresh && (behind || replayed > 0) {
		// The first header is committed before anything is recorded or logged.
		return fmt.Errorf("open receipt log: the block store is empty, but %d records wait in the WAL, and the log holds headers of this log: %v: "+
			"the block store is damaged or gone; restore state_dir as a whole, or start a new one", replayed, behind)
	}
	if err := meets(found, l.chain.Released); err != nil {
		return fmt.Errorf("open receipt log: %w", err)
	}
	// Ranges of R1 records that a machine crash may have taken along: the first in the open header, more in headers of their own.
	lost := append([]wal.Range{}, found.Lost...)
	if len(lost) == 0 {
		lost = []wal.Range{{}} // none: the header says so with zeros
	}
	if crashed {
		l.log.WarnContext(ctx, "recovering after a crash", "records_in_wal", replayed, "lost", found.Lost)
		l.counts.recovered.Add(replayed)
		if behind {
			l.log.ErrorContext(ctx, "the block store is behind the log: headers in the log whose blocks are not here; it is damaged or an older copy, see knhk fsck; "+
				"the last incarnation is not continued")
		} else if !l.chain.Closed || replayed > 0 { // a crash within the last recovery may have come after its final header
			if err := l.seal(ctx, receipt.HeaderFinal, headerExtra{recovered: true}); err != nil {
				return err
			}
		}
		l.crashed = l.pending.before(l.clock.now().Add(time.Hour))
	}
	l.chain.Seq, l.chain.Clean, l.chain.Closed = 0, false, false
	if _, err := rand.Read(l.chain.Incarnation[:]); err != nil {
		return fmt.Errorf("make incarnation: %w", err)
	}
	l.mu.Lock()
	leftover := l.open
	l.open = newBlock(leftover.n)
	l.mu.Unlock()
	// The open header comes first in its incarnation, records that could not be sealed in the last one follow it.
	for i, r := range lost {
		kind := receipt.HeaderOpen
		if i > 0 {
			kind = receipt.HeaderHeartbeat
		}
		if err := l.seal(ctx, kind, headerExtra{lostFrom: r.From, lostTo: r.To}); err != nil {
			return err
		}
	}
	if len(leftover.recs) > 0 {
		l.mu.Lock()
		old := leftover.n
		leftover.n = l.open.n
		for i := range leftover.recs {
			if r := &leftover.recs[i]; !r.decision && !r.ref.late && r.ref.block == old {
				r.ref.block = leftover.n
			}
		}
		l.open = leftover
		l.mu.Unlock()
		if err := l.seal(ctx, receipt.HeaderBlock, headerExtra{recovered: true}); err != nil {
			return err
		}
	}
	// The key's statement first: no checkpoint may be signed by a daily key that the log does not know.
	if err := errors.Join(l.settleDaily(ctx), l.addHeaders(ctx)); err != nil {
		return fmt.Errorf("bring the log up to date: %w", err)
	}
	if _, err := l.checkpoint(ctx); err != nil {
		return err
	}
	l.judge(ctx)
	return nil
}

// meets says whether the WAL goes on where the blocks end, at the first ordinal that is in none.
func meets(found wal.Recovery, released uint64) error {
	switch {
	case found.Next < released:
		return fmt.Errorf("the WAL ends at record %d, the blocks hold records up to %d: the WAL was replaced or restored alone; "+
			"restore state_dir as a whole, or start a new one", found.Next, released)
	case found.First > max(released, 1):
		return fmt.Errorf("the WAL begins at record %d, the blocks hold records below %d only: those between were sealed and are gone; the block "+
			"store is damaged, or was replaced or restored alone: restore state_dir as a whole, or start a new one", found.First, released)
	}
	return nil
}

// loadUncovered queues the committed blocks that no signed checkpoint covers: how long records have gone unsigned does not begin
// again with a restart.
func (l *Log) loadUncovered(ctx context.Context) error {
	var size uint64
	if cp, err := l.checkpoint(ctx); err == nil {
		size = cp.size
	}
	var queue []uncoveredBlock
	for n := l.chain.Next; n > 0; n-- {
		idx, known, err := l.store.index(n - 1)
		if err != nil {
			return err
		}
		if known && idx < size {
			break
		}
		h, ok, err := l.store.parseHeaderAt(n - 1)
		if err != nil || !ok {
			return errors.Join(err, fmt.Errorf("block %d is missing: run knhk fsck", n-1))
		}
		queue = append(queue, uncoveredBlock{n - 1, h.Time})
	}
	slices.Reverse(queue)
	l.uncovered.queue = queue
	return nil
}

// matchLog finds out which of our headers at the end of the log we do not know to be there (a crash came between the add and
// the note of its index), and whether the log holds headers of ours that this directory has never seen.
func (l *Log) matchLog(ctx context.Context) (behind bool, err error) {
	size, err := l.reader.IntegratedSize(ctx)
	if err != nil {
		return false, fmt.Errorf("read log: %w", err)
	}
	unknown := map[receipt.Hash]uint64{}
	next := uint64(0)
	for n := l.chain.Next; n > 0; n-- {
		idx, known, err := l.store.index(n - 1)
		if err != nil {
			return false, err
		}
		if known {
			next = idx + 1
			l.added = n
			break
		}
		leaf, err := l.store.header(n - 1)
		if err != nil {
			return false, err
		}
		unknown[receipt.LeafHash(leaf)] = n - 1
	}
	for leaf, err := range logLeaves(ctx, l.reader, next, size) {
		if err != nil {
			return false, err
		}
		h, perr := receipt.ParseHeader(leaf.data)
		if perr != nil {
			continue // a key statement
		}
		if n, ok := unknown[receipt.LeafHash(leaf.data)]; ok {
			if err := l.store.setIndex(n, leaf.index); err != nil {
				return false, err
			}
			continue
		}
		if h.LogID == l.logID {
			behind = true
		}
	}
	return behind, nil
}

// finish seals what is open and closes the incarnation.
func (l *Log) finish(ctx context.Context) error {
	if err := l.seal(ctx, receipt.HeaderFinal, headerExtra{clean: true}); err != nil {
		return err
	}
	return l.addHeaders(ctx)
}
