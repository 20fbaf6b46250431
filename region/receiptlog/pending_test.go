package receiptlog

import (
	"fmt"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/region/wal"
)

// pendingKeys counts the P keys of a directory that is not open.
func pendingKeys(t *testing.T, f *fixture) (n int) {
	t.Helper()
	s, err := openStore(f.cfg.Dir, f.cfg.Log, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{kPending}, UpperBound: []byte{kPending + 1}})
	if err != nil {
		t.Fatal(err)
	}
	for it.First(); it.Valid(); it.Next() {
		n++
	}
	if err := it.Close(); err != nil {
		t.Fatal(err)
	}
	return n
}

// TestPending: a decision without outcome is known to be one after any restart, whether it stands in one of the last blocks, which a
// start reads, or further back, where a P key names it; with its outcome it is forgotten.
func TestPending(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	old := f.decide(wal.Durable, "old")
	for i := range 2 * farBlocks { // blocks that close behind it
		before := l.Stats().Blocks
		f.outcome(f.decide(wal.Durable, fmt.Sprint(i)), 200)
		eventually(t, "the next block", func() bool { return l.Stats().Blocks > before })
	}
	recent := f.decide(wal.Durable, "recent")
	f.close()
	if n := pendingKeys(t, f); n != 1 {
		t.Errorf("%d P keys, want one, of the old decision", n)
	}
	l = f.open()
	if n := l.Stats().Pending; n != 2 {
		t.Errorf("%d decisions are pending after the restart, want 2", n)
	}
	f.outcome(old, 201)
	f.outcome(recent, 202)
	f.bundle(old, 2)
	f.bundle(recent, 2)
	f.close()
	if n := pendingKeys(t, f); n != 0 {
		t.Errorf("%d P keys, want none", n)
	}
	l = f.open()
	if n := l.Stats().Pending; n != 0 {
		t.Errorf("%d decisions are pending, want none", n)
	}
	f.close()
	f.fsckClean()
}

// TestPendingPutBack: an outcome that could not be written leaves its decision pending, also when its P key was due meanwhile.
func TestPendingPutBack(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	id := f.decide(wal.Durable, "claimed")
	uuid := mustUUID(t, id)
	ref, ok := l.pending.claim(uuid)
	if !ok {
		t.Fatal("not pending")
	}
	for i := range 2 * farBlocks {
		before := l.Stats().Blocks
		f.outcome(f.decide(wal.Durable, fmt.Sprint(i)), 200)
		eventually(t, "the next block", func() bool { return l.Stats().Blocks > before })
	}
	l.pending.putBack(uuid, ref)
	f.outcome(f.decide(wal.Durable, "more"), 200)
	f.close()
	if n := pendingKeys(t, f); n != 1 {
		t.Errorf("%d P keys, want one", n)
	}
	l = f.open()
	if n := l.Stats().Pending; n != 1 {
		t.Errorf("%d decisions are pending, want one", n)
	}
}

// TestOneLateOutcome: after "unknown" one outcome is taken, also while both stand in a block that is not committed yet.
func TestOneLateOutcome(t *testing.T) {
	f := newFixture(t)
	f.cfg.SealEvery = time.Hour
	l := f.open()
	id := f.decide(wal.Durable, "r")
	if err := l.expire(t.Context(), [][16]byte{mustUUID(t, id)}, "a test"); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		f.outcome(id, 200)
	}
	if s := l.Stats(); s.LateOutcomes != 1 || s.DuplicateOutcomes != 2 {
		t.Errorf("%d late and %d repeated outcomes, want 1 and 2", s.LateOutcomes, s.DuplicateOutcomes)
	}
}

func mustUUID(t *testing.T, id string) [16]byte {
	t.Helper()
	u, _, err := receipt.ParseID(id)
	if err != nil {
		t.Fatal(err)
	}
	return u
}
