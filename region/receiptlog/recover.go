package receiptlog

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/rotation"
	"github.com/knhk/sidecar/region/wal"
)

// replay reads what is not in the log yet: decisions without outcome, and the records of the WAL. It returns how many those are.
func (l *Log) replay() (replayed uint64, err error) {
	if err := l.loadPending(); err != nil {
		return 0, err
	}
	l.open = newBlock(l.chain.Next)
	err = l.wal.Replay(func(seq uint64, entry []byte) error {
		if seq < l.chain.Released {
			return nil // in a block already: the crash came between the block's commit and the WAL's release
		}
		replayed++
		if err := l.open.replay(seq, entry, &l.pending); err != nil {
			return fmt.Errorf("recover WAL record %d: %w", seq, err)
		}
		return nil
	})
	return replayed, err
}

// checkEmpty refuses a block store without blocks in a directory that has seen some: the state of the daily keys is committed before
// the log has a leaf, and the first header before anything is recorded.
func (l *Log) checkEmpty(replayed uint64) error {
	if l.chain.Next > 0 {
		return nil
	}
	st, err := l.store.loadKeys()
	if err != nil {
		return err
	}
	tree, err := readTreeState(filepath.Join(l.cfg.Dir, "log"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("open receipt log: read the state of the tree: %w", err)
	}
	if replayed > 0 || st == nil && tree.Size > 0 {
		return fmt.Errorf("open receipt log: the block store is empty, but %d records wait in the WAL, and the log holds %d leaves: "+
			"the block store is damaged or gone; restore state_dir as a whole, or start a new one", replayed, tree.Size)
	}
	return nil
}

// floor is the latest time that the directory has seen, as far as its records know: no header may be older than what it covers.
func (l *Log) floor() time.Time {
	floor := l.chain.Time
	for i := range l.open.recs {
		var at time.Time
		leaf := l.open.bytes(l.open.recs[i].leaf)
		if d, err := receipt.ParseDecision(leaf); err == nil {
			at = d.Time
		} else if o, err := receipt.ParseOutcome(leaf); err == nil {
			at = o.Time
		}
		if at.After(floor) {
			floor = at
		}
	}
	return floor
}

// recover brings a directory back to where its records say it is: see doc.go. The order is what makes it safe: first what the log
// holds is known, then a change of the daily key that a crash cut short is finished and a key that may not sign is replaced, and only
// then headers are made or added. A header that is committed and not in the log yet names the key that is in force until the
// next change, which adds it first.
func (l *Log) recover(ctx context.Context, replayed uint64) error {
	fresh := l.chain.Next == 0
	crashed := !fresh && !l.chain.Clean
	l.blocks.Store(l.chain.Next)
	behind, err := l.matchLog(ctx)
	if err != nil {
		return err
	}
	if fresh && behind {
		return errors.New("open receipt log: the block store is empty, but the log holds headers of this log: the block store is damaged or gone; " +
			"restore state_dir as a whole, or start a new one")
	}
	if err := l.loadUncovered(ctx); err != nil {
		return err
	}
	found := l.wal.Recovered()
	if err := meets(found, l.chain.Released); err != nil {
		return fmt.Errorf("open receipt log: %w", err)
	}
	if err := l.settleKeys(ctx); err != nil {
		return err
	}
	if l.Sealed() != nil { // it is finished now, if a crash had cut it short
		l.latch(ErrSealed)
		l.ended.Store(true)
		return nil
	}
	if err := l.recoverRecords(ctx, crashed, behind, replayed, found); err != nil {
		return err
	}
	if err := l.catchUp(ctx, fresh); err != nil {
		return err
	}
	l.judge(ctx)
	return nil
}

// settleKeys brings the daily keys in order before any header is made. A key that is merely due can wait for Run.
func (l *Log) settleKeys(ctx context.Context) error {
	err := l.keys.Settle(ctx)
	if _, _, ok := l.keys.HeaderKey(); ok || l.Sealed() != nil {
		if err != nil {
			l.log.WarnContext(ctx, "cannot bring the daily keys in order, trying again", "error", err)
		}
		return nil
	}
	if err == nil {
		err = errNoKey
	}
	return fmt.Errorf("open receipt log: bring the daily keys in order: %w", err)
}

// recoverRecords closes the last incarnation, if a crash left it open, and begins the next.
func (l *Log) recoverRecords(ctx context.Context, crashed, behind bool, replayed uint64, found wal.Recovery) error {
	if err := l.headerMu.lock(ctx); err != nil {
		return err
	}
	defer l.headerMu.unlock()
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
		l.crashed = l.pending.before(l.clock.Now().Add(time.Hour))
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
	if len(leftover.recs) == 0 {
		return nil
	}
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
	return l.seal(ctx, receipt.HeaderBlock, headerExtra{recovered: true})
}

// catchUp adds the headers that are not in the log yet. A new log waits for its first checkpoint: whoever opened it wants to show it.
func (l *Log) catchUp(ctx context.Context, fresh bool) error {
	if err := l.addMu.lock(ctx); err != nil {
		return err
	}
	err := l.addHeaders(ctx, l.blocks.Load())
	l.addMu.unlock()
	if err != nil {
		return fmt.Errorf("bring the log up to date: %w", err)
	}
	if fresh {
		wait, cancel := context.WithTimeout(ctx, firstCheckpoint)
		defer cancel()
		if err := l.Published(wait, 1); err != nil {
			l.log.WarnContext(ctx, "a new log has no checkpoint yet", "error", err)
		}
	}
	_, err = l.checkpoint(ctx)
	return err
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
	st, err := l.store.loadKeys()
	if err != nil {
		return false, err
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
			l.added.Store(n)
			if next > size {
				return false, fmt.Errorf("open receipt log: the header of block %d stood at index %d of the log, which holds %d leaves: "+
					"the log was damaged or restored alone: restore state_dir as a whole", n-1, idx, size)
			}
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
			if err := l.knownLeaf(leaf, st); err != nil {
				return false, err
			}
			continue
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

// knownLeaf says whether a leaf of the log that is no header is one that the state of the keys knows, st: the statement of a key that is or
// was in force, or of the one that is to follow, or the seal.
func (l *Log) knownLeaf(leaf logLeaf, st *rotation.State) error {
	stated, err := l.store.get(key(kKey, leaf.index))
	switch {
	case err != nil:
		return err
	case bytes.Equal(stated, leaf.data), st != nil && bytes.Equal(st.Seal, leaf.data),
		st != nil && st.Next != nil && st.Next.Index == leaf.index && bytes.Equal(st.Next.Statement, leaf.data):
		return nil
	}
	return fmt.Errorf("open receipt log: leaf %d of the log is a key statement or a seal that the block store knows nothing of: it is an older copy, "+
		"restored alone: restore state_dir as a whole, or start a successor", leaf.index)
}

// finish seals what is open and closes the incarnation.
func (l *Log) finish(ctx context.Context) error {
	if err := l.headerMu.lock(ctx); err != nil {
		return err
	}
	err := l.seal(ctx, receipt.HeaderFinal, headerExtra{clean: true})
	l.headerMu.unlock()
	if errors.Is(err, errNoKey) {
		l.log.WarnContext(ctx, "no final header: the next start recovers what is open from the WAL", "error", err)
	} else if err != nil {
		return err
	}
	if err := l.addMu.lock(ctx); err != nil {
		return err
	}
	defer l.addMu.unlock()
	return l.addHeaders(ctx, l.blocks.Load())
}
