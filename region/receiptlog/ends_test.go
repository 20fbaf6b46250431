package receiptlog

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/rotation"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/region/wal"
)

// TestSealedWithoutNote opens, without any key, a log that ended right after its final checkpoint, before its state said so: it shows
// its seal all the same, for whoever has to revoke it, and the private key that nobody has destroyed.
func TestSealedWithoutNote(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	f.bundle(f.decide(wal.Durable, "before"), 1)
	leaf, err := l.Seal(t.Context(), "gone")
	if err != nil {
		t.Fatal(err)
	}
	f.close()
	if err := editStore(f.cfg.Dir, func(s *store) error {
		st, err := s.loadKeys()
		if err != nil {
			return err
		}
		st.Sealed, st.SealPublished, st.Retired = false, false, nil
		st.Sealing = &rotation.Asked{Reason: "gone", Time: st.Floor}
		return s.saveKeys(st)
	}, f); err != nil {
		t.Fatal(err)
	}
	f.cfg.Identity, f.cfg.Daily = nil, nil
	l = f.open()
	if !bytes.Equal(l.Sealed(), leaf) || !l.Keys().SealPublished {
		t.Errorf("it shows the seal %q, published %v", l.Sealed(), l.Keys().SealPublished)
	}
	if n := len(l.Keys().Retired); n != 1 {
		t.Errorf("%d versions whose private key may still be in the store", n)
	}
	if again, err := l.Seal(t.Context(), "again"); err != nil || !bytes.Equal(again, leaf) {
		t.Errorf("sealed again: %q, %v", again, err)
	}
}

// TestHeartbeatOvertaken closes a block for a heartbeat as the first record after the silence comes: it becomes a block, alone. A
// heartbeat after it would find the next records, and so on, with the header lock held.
func TestHeartbeatOvertaken(t *testing.T) {
	f := newFixture(t)
	f.cfg.SealEvery = time.Hour
	l := f.open()
	f.decide(wal.Durable, "first")
	if err := l.headerMu.lock(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := l.blocks.Load()
	err := l.seal(t.Context(), receipt.HeaderHeartbeat, headerExtra{})
	l.headerMu.unlock()
	if err != nil {
		t.Fatal(err)
	}
	h, _, err := l.store.parseHeaderAt(before)
	if err != nil {
		t.Fatal(err)
	}
	if made := l.blocks.Load() - before; made != 1 || h.Kind != receipt.HeaderBlock || h.Count != 1 {
		t.Errorf("%d headers, the first of kind %s with %d records", made, h.Kind, h.Count)
	}
}

// TestSealRefused asks for a seal with a reason that no leaf can hold: nothing ends.
func TestSealRefused(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	if leaf, err := l.Seal(t.Context(), "\xff"); err == nil {
		t.Fatalf("sealed: %q", leaf)
	}
	if err := l.Refusing(); err != nil {
		t.Errorf("after a seal that can never be made: %v", err)
	}
	f.bundle(f.decide(wal.Durable, "after"), 1)
}

// TestOutcomeAfterTheLastBlock appends an outcome while the last block is cut: nobody is told that it is recorded.
func TestOutcomeAfterTheLastBlock(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	id := f.decide(wal.Durable, "before")
	l.mu.Lock()
	done := make(chan error, 1)
	go func() {
		done <- l.Outcome(context.Background(), id, &policy.Outcome{Source: "als", Result: policy.ResultComplete})
	}()
	eventually(t, "an outcome on its way", func() bool { return l.pending.len() == 0 })
	l.ended.Store(true)
	l.mu.Unlock()
	if err := <-done; !errors.Is(err, ErrSealed) {
		t.Errorf("an outcome that may be in no block: %v", err)
	}
	l.ended.Store(false)
}

// TestReadKeysBeforeTheSeal reads, offline, the keys of a log whose seal was signed and did not get into the log: it is not the log's
// seal, and may never be.
func TestReadKeysBeforeTheSeal(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	f.bundle(f.decide(wal.Durable, "before"), 1)
	identity := l.identity
	f.close()
	if err := editStore(f.cfg.Dir, func(s *store) error {
		st, err := s.loadKeys()
		if err != nil {
			return err
		}
		st.Sealing, st.SealAt = &rotation.Asked{Reason: "gone", Time: st.Floor}, 100
		if st.Seal, err = receipt.SignSeal(&receipt.Seal{Origin: identity.Name(), Size: 100, Time: st.Floor, Reason: "gone"}, identity, nil); err != nil {
			return err
		}
		return s.saveKeys(st)
	}, f); err != nil {
		t.Fatal(err)
	}
	k, err := ReadKeys(f.cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	if k.Seal != nil {
		t.Errorf("it shows the seal %q", k.Seal)
	}
}
