package receiptlog

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/google/uuid"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/policy"
)

// pendingRef says where a decision stands that waits for its outcome.
type pendingRef struct {
	at    time.Time
	block uint64
	pos   uint32
	late  bool // not the first outcome of its decision, which then stands anywhere

	stored bool // the block store names it with a P key
}

// pendingSet is the set of decisions without outcome, in shards so that looking for the expired ones never stops the requests.
type pendingSet struct {
	shards [64]struct {
		sync.Mutex
		m map[[16]byte]pendingRef
	}

	mu       sync.Mutex
	returned []openDecision // those whose outcome could not be written although they had been claimed for it
}

func (p *pendingSet) put(uuid [16]byte, ref pendingRef) {
	s := &p.shards[uuid[15]%64]
	s.Lock()
	defer s.Unlock()
	if s.m == nil {
		s.m = map[[16]byte]pendingRef{}
	}
	s.m[uuid] = ref
}

// claim removes uuid: only one outcome gets it.
func (p *pendingSet) claim(uuid [16]byte) (pendingRef, bool) {
	s := &p.shards[uuid[15]%64]
	s.Lock()
	defer s.Unlock()
	ref, ok := s.m[uuid]
	delete(s.m, uuid)
	return ref, ok
}

// store notes that uuid gets a P key, and says whether it is still pending.
func (p *pendingSet) store(uuid [16]byte) bool {
	s := &p.shards[uuid[15]%64]
	s.Lock()
	defer s.Unlock()
	ref, ok := s.m[uuid]
	if ok {
		ref.stored = true
		s.m[uuid] = ref
	}
	return ok
}

// stored says whether uuid has a P key.
func (p *pendingSet) stored(uuid [16]byte) bool {
	s := &p.shards[uuid[15]%64]
	s.Lock()
	defer s.Unlock()
	return s.m[uuid].stored
}

// putBack undoes claim.
func (p *pendingSet) putBack(uuid [16]byte, ref pendingRef) {
	p.put(uuid, ref)
	if !ref.stored {
		p.mu.Lock()
		defer p.mu.Unlock()
		if n := len(p.returned); n > 0 && p.returned[n-1].uuid == uuid {
			return // tried again, and again
		}
		p.returned = append(p.returned, openDecision{uuid, ref.block, ref.pos})
	}
}

// takeReturned gives those that putBack has returned since the last call.
func (p *pendingSet) takeReturned() []openDecision {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := p.returned
	p.returned = nil
	return list
}

func (p *pendingSet) len() (n int) {
	for i := range p.shards {
		s := &p.shards[i]
		s.Lock()
		n += len(s.m)
		s.Unlock()
	}
	return n
}

// before lists the decisions made before t.
func (p *pendingSet) before(t time.Time) (out [][16]byte) {
	for i := range p.shards {
		s := &p.shards[i]
		s.Lock()
		for uuid, ref := range s.m {
			if ref.at.Before(t) {
				out = append(out, uuid)
			}
		}
		s.Unlock()
	}
	return out
}

// unknownOutcome is what is recorded when nobody told.
func unknownOutcome(why string) *policy.Outcome {
	return &policy.Outcome{Source: "recovery", Result: policy.ResultUnknown, Details: why}
}

// openDecision is a decision that had no outcome when its block was committed.
type openDecision struct {
	uuid [16]byte
	n    uint64
	pos  uint32
}

// putPending writes a P key for the decisions that are still without outcome farBlocks after their own block; most never get that
// far. Until then a start finds them in their blocks.
func (l *Log) putPending(batch *pebble.Batch, n uint64) error {
	var errs []error
	for _, d := range l.pending.takeReturned() { // putPending may have met them while they were claimed
		l.unanswered = append(l.unanswered, []openDecision{d})
	}
	keep := l.unanswered[:0]
	for _, open := range l.unanswered {
		if len(open) > 0 && open[0].n+farBlocks > n {
			keep = append(keep, open)
			continue
		}
		for _, d := range open {
			if l.pending.store(d.uuid) {
				v := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, d.n), uint64(d.pos))
				errs = append(errs, batch.Set(uuidKey(kPending, d.uuid), v, nil))
			}
		}
	}
	clear(l.unanswered[len(keep):])
	l.unanswered = keep
	return errors.Join(errs...)
}

// loadPending finds the decisions in blocks that have no outcome yet: those that a P key names, and those of the last blocks. It
// reads a few blocks more than have no P keys, for an outcome may have been on its way to a block when the one before was committed.
func (l *Log) loadPending() error {
	if err := l.store.scan([]byte{kPending}, []byte{kPending + 1}, func(k, v []byte) error {
		if len(k) != 17 || len(v) != 16 {
			return fmt.Errorf("pending decision %x is damaged", k)
		}
		uuid := [16]byte(k[1:])
		l.pending.put(uuid, pendingRef{
			at: receipt.IDTime(uuid), block: binary.BigEndian.Uint64(v), pos: uint32(binary.BigEndian.Uint64(v[8:])), stored: true,
		})
		return nil
	}); err != nil {
		return fmt.Errorf("read block store: %w", err)
	}
	for n := l.chain.Next - min(l.chain.Next, readBack); n < l.chain.Next; n++ {
		if err := l.loadPendingOf(n); err != nil {
			return fmt.Errorf("open receipt log: %w: run knhk fsck", err)
		}
	}
	return nil
}

func (l *Log) loadPendingOf(n uint64) error {
	h, ok, err := l.store.parseHeaderAt(n)
	if err != nil || !ok {
		return errors.Join(err, fmt.Errorf("block %d is missing", n))
	}
	var open []openDecision
	if err := l.store.each(n, h.Count, func(pos uint32, leaf []byte) error {
		uuid := leafUUID(leaf)
		if uuid == ([16]byte{}) {
			return fmt.Errorf("block %d: record %d is damaged", n, pos)
		}
		if !bytes.HasPrefix(leaf, []byte(receipt.DecisionPrefix)) {
			l.pending.claim(uuid)
			return nil
		}
		open = append(open, openDecision{uuid, n, pos})
		l.pending.put(uuid, pendingRef{at: receipt.IDTime(uuid), block: n, pos: pos, stored: l.pending.stored(uuid)})
		return nil
	}); err != nil {
		return err
	}
	l.unanswered = append(l.unanswered, open)
	return nil
}

// runExpiry records the outcome "unknown" for the decisions that a crash left behind and for those that have waited too long.
func (l *Log) runExpiry(ctx context.Context) error {
	crashed := l.crashed
	tick := time.NewTimer(0)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := l.expire(ctx, crashed, "the process ended before the outcome was known"); err == nil {
			crashed = nil
			err = l.expire(ctx, l.pending.before(l.clock.Now().Add(-l.cfg.OutcomeTimeout)), "outcome_timeout")
			if err != nil && !errors.Is(err, ErrFull) {
				return err
			}
		} else if !errors.Is(err, ErrFull) {
			return err
		}
		if next := max(l.cfg.OutcomeTimeout/20, 250*time.Millisecond); len(crashed) == 0 {
			tick.Reset(next)
		} else {
			tick.Reset(50 * time.Millisecond) // the WAL was full: those written are not tried again, they are no longer pending
		}
	}
}

// expire records the outcome "unknown" for those of uuids that are still pending, unless the log has ended. ErrFull: try again soon.
func (l *Log) expire(ctx context.Context, uuids [][16]byte, why string) error {
	if l.ended.Load() {
		return nil
	}
	one := func(u [16]byte) error {
		// An outcome that comes between the claim and the record waits, and is then a late one.
		l.lateMu.Lock()
		defer l.lateMu.Unlock()
		ref, ok := l.pending.claim(u)
		if !ok {
			return nil
		}
		id := uuid.UUID(u).String() + "." + l.cfg.Instance
		if err := l.writeOutcome(ctx, id, u, unknownOutcome(why), ref, false); err != nil {
			l.pending.putBack(u, ref)
			return err
		}
		l.counts.unknownOutcomes.Add(1)
		return nil
	}
	for _, u := range uuids {
		if err := one(u); err != nil {
			return err
		}
	}
	return nil
}
