package receiptlog

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/rotation"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/region/wal"
)

// TestSealed ends a log under load: decisions that were taken have their receipts, the others were refused; it is then served without
// any key, and a successor quotes it.
func TestSealed(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	kept := f.rawBundle(f.decide(wal.Durable, "kept"))
	var mu sync.Mutex
	var ids []string
	var wg sync.WaitGroup
	refused := make(chan error, 4)
	for range 4 {
		wg.Go(func() {
			for {
				d := receipt.Decision{Class: "W1", Verdict: "admit", Reason: "ok", Capture: "lean"}
				if err := l.Decide(context.Background(), wal.Durable, &d, &receipt.Request{Path: "/"}); err != nil {
					refused <- err
					return
				}
				mu.Lock()
				ids = append(ids, d.ID)
				mu.Unlock()
			}
		})
	}
	eventually(t, "a load", func() bool { mu.Lock(); defer mu.Unlock(); return len(ids) > 50 })
	p := f.policyOf()
	leaf, err := l.Seal(t.Context(), "the identity key was copied")
	if err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	for range 4 {
		if err := <-refused; !errors.Is(err, ErrSealed) {
			t.Errorf("a decision after the seal: %v", err)
		}
	}
	if err := l.Outcome(t.Context(), ids[0], &policy.Outcome{Source: "als", Result: policy.ResultComplete}); !errors.Is(err, ErrSealed) {
		t.Errorf("an outcome after the seal: %v", err)
	}
	if _, err := l.RotateKey(t.Context()); !errors.Is(err, rotation.ErrSealed) {
		t.Errorf("a key change after the seal: %v", err)
	}
	if again, err := l.Seal(t.Context(), "once more"); err != nil || string(again) != string(leaf) {
		t.Errorf("sealed again: %v", err)
	}
	if string(l.Sealed()) != string(leaf) {
		t.Error("the log does not show its seal")
	}
	if err := p.Revoke(leaf); err != nil {
		t.Fatal(err)
	}
	check := func() {
		t.Helper()
		for _, id := range ids {
			raw, err := f.log.Bundle(t.Context(), id, true)
			if err != nil {
				t.Fatalf("receipt of a decision that was taken: %v", err)
			}
			if _, err := verifyRaw(p, raw); err != nil {
				t.Fatal(err)
			}
		}
	}
	check()
	if _, err := verifyRaw(p, kept); err == nil || !strings.Contains(err.Error(), "fetch") {
		t.Errorf("a bundle from before the seal, under it: %v", err)
	}
	f.close()
	if vs, err := f.store.Versions(t.Context(), "daily"); err != nil {
		t.Error(err)
	} else {
		for _, v := range vs {
			if v.State != keys.Destroyed {
				t.Errorf("version %s is %s although the log has ended", v.ID, v.State)
			}
		}
	}
	if r := f.fsckClean(); !r.Sealed {
		t.Error("fsck does not say that the log is sealed")
	}
	if sealed, err := IsSealed(f.cfg.Dir); err != nil || !sealed {
		t.Errorf("sealed: %v, %v", sealed, err)
	}

	f.cfg.Identity, f.cfg.Daily = nil, nil
	l = f.open()
	check()
	d := receipt.Decision{Class: "W1", Verdict: "admit", Reason: "ok", Capture: "lean"}
	if err := l.Decide(t.Context(), wal.Durable, &d, &receipt.Request{}); !errors.Is(err, ErrSealed) {
		t.Errorf("a decision for a sealed log: %v", err)
	}
	if s := l.Stats(); !errors.Is(s.Refusing, ErrSealed) || l.UnsignedAge() != 0 {
		t.Errorf("stats %+v", s)
	}
	if _, err := l.RotateKey(t.Context()); !errors.Is(err, ErrSealed) {
		t.Errorf("a key change: %v", err)
	}
	if got, err := l.Seal(t.Context(), "x"); err != nil || string(got) != string(leaf) {
		t.Errorf("sealed again: %v", err)
	}
	if info := l.Keys(); info.Phase != rotation.PhaseSealed || len(l.VKeys()) != 1 {
		t.Errorf("keys %+v", info)
	}
	n := 0
	for raw, err := range l.Export(t.Context(), false) {
		if err != nil {
			t.Fatal(err)
		}
		if _, err := verifyRaw(p, raw); err != nil {
			t.Fatal(err)
		}
		n++
	}
	if n < len(ids) {
		t.Errorf("%d receipts exported, %d were taken", n, len(ids))
	}
	origin, vkey := l.Origin(), l.IdentityVKey()
	f.close()
	f.fsckClean()
	foreign := f.cfg
	foreign.Origin = "example.com/another"
	if l, err := Open(t.Context(), foreign); err == nil || l != nil {
		t.Errorf("a sealed log under another origin: %v, %v", l, err)
	}
	succeed(t, leaf, origin, vkey)
}

// succeed begins a successor of the sealed log.
func succeed(t *testing.T, leaf []byte, origin, vkey string) {
	t.Helper()
	seal, err := receipt.ParseSeal(leaf)
	if err != nil {
		t.Fatal(err)
	}
	f := newFixture(t)
	quote := receipt.Quote{Origin: origin, Identity: vkey, Size: seal.Size, Root: seal.Root}
	f.cfg.Succeeds = &quote
	l := f.open()
	f.bundle(f.decide(wal.Durable, "successor"), 1)
	first, err := l.Leaf(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if ks, err := receipt.ParseKeyStatement(first); err != nil || ks.Succeeds == nil || *ks.Succeeds != quote {
		t.Errorf("the first statement %+v, %v, want it to quote %+v", ks, err, quote)
	}
	f.close()
	f.fsckClean()
	f.open() // the quote may stay in the configuration
	f.close()
	other := quote
	other.Size++
	f.cfg.Succeeds = &other
	if l, err := Open(t.Context(), f.cfg); err == nil || !strings.Contains(err.Error(), "not begun as its successor") {
		t.Errorf("another predecessor: %v, %v", l, err)
	}
	own := quote
	own.Identity = l.IdentityVKey() // the same key under another name
	f.cfg.Succeeds, f.cfg.Dir = &own, t.TempDir()+"/state"
	if l, err := Open(t.Context(), f.cfg); err == nil || !strings.Contains(err.Error(), "identity key of its own") {
		t.Errorf("with the sealed log's key: %v, %v", l, err)
	}
}

// TestInterruptedSeal stops a seal at its signature: requests stay refused, a restart takes up the records and finishes the seal.
func TestInterruptedSeal(t *testing.T) {
	f := newFixture(t)
	k := &flakyKey{Signer: f.cfg.Identity}
	f.cfg.Identity = k
	l := f.open()
	id := f.decide(wal.Durable, "before")
	f.bundle(id, 1)
	k.away.Store(true)
	if _, err := l.Seal(t.Context(), "gone"); err == nil {
		t.Fatal("sealed without the identity key")
	}
	if err := l.Decide(t.Context(), wal.Durable, &receipt.Decision{Class: "W1", Verdict: "admit", Reason: "ok", Capture: "lean"}, &receipt.Request{}); !errors.Is(err, ErrSealed) {
		t.Errorf("decide after a seal that failed: %v", err)
	}
	f.stop()
	<-f.done
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // no waiting for a signature
	l.Close(ctx)
	k.away.Store(false)
	l = f.open()
	if l.Sealed() == nil || !errors.Is(l.Refusing(), ErrSealed) {
		t.Errorf("after a restart: sealed %v, refusing %v", l.Sealed() != nil, l.Refusing())
	}
	f.bundle(id, 2)
	f.close()
	f.fsckClean()
}
