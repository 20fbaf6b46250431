package receiptlog

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/transparency-dev/tessera"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/rotation"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/region/wal"
)

// gate holds up every signature and every new key while it is shut, as a token does that hangs.
type gate struct {
	mu   sync.Mutex
	open chan struct{} // closed while the gate is open
	held atomic.Int64  // calls that were held up
}

func newGate() *gate {
	g := &gate{open: make(chan struct{})}
	close(g.open)
	return g
}

func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open = make(chan struct{})
}

func (g *gate) release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.open)
}

func (g *gate) pass(ctx context.Context) error {
	g.mu.Lock()
	open := g.open
	g.mu.Unlock()
	select {
	case <-open:
		return nil
	default:
	}
	g.held.Add(1)
	select {
	case <-open:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", keys.ErrUnavailable, ctx.Err())
	}
}

type gatedSigner struct {
	keys.Signer
	gate *gate
}

func (s gatedSigner) Sign(ctx context.Context, msg []byte) ([]byte, error) {
	if err := s.gate.pass(ctx); err != nil {
		return nil, err
	}
	return s.Signer.Sign(ctx, msg)
}

type gatedStore struct {
	keys.Store
	gate *gate
}

func (s gatedStore) Create(ctx context.Context, label string, alg keys.Algorithm) (keys.Version, error) {
	if err := s.gate.pass(ctx); err != nil {
		return keys.Version{}, err
	}
	return s.Store.Create(ctx, label, alg)
}

func (s gatedStore) Signer(ctx context.Context, label, id string) (keys.Signer, error) {
	k, err := s.Store.Signer(ctx, label, id)
	if err != nil {
		return nil, err
	}
	return gatedSigner{k, s.gate}, nil
}

// policyOf is what an auditor knows of the log.
func (f *fixture) policyOf() *receipt.Policy {
	f.t.Helper()
	p, err := receipt.ParsePolicy(f.log.Policy())
	if err != nil {
		f.t.Fatal(err)
	}
	return p
}

func verifyRaw(p *receipt.Policy, raw []byte) (*receipt.Verified, error) {
	b, err := receipt.ParseBundle(raw)
	if err != nil {
		return nil, err
	}
	return receipt.Verify(p, b)
}

// rawBundle waits for the bundle of a decision.
func (f *fixture) rawBundle(id string) (raw []byte) {
	f.t.Helper()
	f.bundle(id, 1)
	raw, err := f.log.Bundle(f.t.Context(), id, false)
	if err != nil {
		f.t.Fatal(err)
	}
	return raw
}

// TestDecisionsDoNotWait hangs every signature and every new key, while a key change is under way: decisions become durable all the
// same, and get their receipts when the store is back.
func TestDecisionsDoNotWait(t *testing.T) {
	f := newFixture(t)
	g := newGate()
	f.cfg.Identity, f.cfg.Daily, f.cfg.MaxUnsigned = gatedSigner{f.cfg.Identity, g}, gatedStore{f.store, g}, time.Hour
	l := f.open()
	f.bundle(f.decide(wal.Durable, "before"), 1)
	g.shut()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	changed := make(chan error, 1)
	go func() {
		_, err := l.RotateKey(ctx)
		changed <- err
	}()
	eventually(t, "a call that hangs", func() bool { return g.held.Load() > 0 })
	const workers, each = 10, 30
	ids := make([][]string, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range each {
				d := receipt.Decision{Class: "W1", Verdict: "admit", Reason: "ok", Capture: "lean"}
				if err := l.Decide(t.Context(), wal.Durable, &d, &receipt.Request{Path: fmt.Sprint(i)}); err != nil {
					t.Errorf("decide while the key store hangs: %v", err)
					return
				}
				ids[w] = append(ids[w], d.ID)
			}
		})
	}
	wg.Wait() // the gate is still shut: whoever waited for a signature would be here for ever
	if n := g.held.Load(); n == 0 {
		t.Error("no call of the key store was held up")
	}
	g.release()
	select {
	case err := <-changed:
		t.Logf("the key change: %v", err) // it may have given up: then it is tried again
	case <-time.After(2 * time.Minute):
		t.Fatal("the key change does not come back")
	}
	for _, list := range ids {
		for _, id := range list {
			f.bundle(id, 1)
		}
	}
	f.close()
	f.fsckClean()
}

// TestRotateUnderLoad changes the daily key again and again while many record and the sealer is never idle: each change finishes, no
// request fails, and every bundle of before, during and after verifies with the policy of the first day.
func TestRotateUnderLoad(t *testing.T) {
	changes := 30
	if testing.Short() {
		changes = 6
	}
	f := newFixture(t)
	l := f.open()
	p := f.policyOf()
	saved := [][]byte{f.rawBundle(f.decide(wal.Durable, "before"))}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var decided atomic.Int64
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			level := wal.Durable
			if w%2 == 0 {
				level = wal.Written
			}
			for i := 0; ctx.Err() == nil; i++ {
				d := receipt.Decision{Class: "W1", Verdict: "admit", Reason: "ok", Capture: "lean"}
				if err := l.Decide(context.Background(), level, &d, &receipt.Request{Path: fmt.Sprint(i)}); err != nil {
					t.Errorf("decide during a key change: %v", err)
					return
				}
				if err := l.Outcome(context.Background(), d.ID, &policy.Outcome{Source: "als", Result: policy.ResultComplete, Status: 200}); err != nil {
					t.Errorf("outcome during a key change: %v", err)
					return
				}
				decided.Add(1)
				time.Sleep(time.Millisecond) // a load, not a flood
			}
		})
	}
	for i := range changes {
		before, _ := l.DailyKey()
		bound, stop := context.WithTimeout(t.Context(), 2*time.Minute)
		info, err := l.RotateKey(bound)
		stop()
		if err != nil {
			t.Fatalf("change %d: %v", i, err)
		}
		if info.VKey == before {
			t.Fatalf("change %d: the key in force is still %s", i, before)
		}
		if i%5 == 0 {
			saved = append(saved, f.rawBundle(f.decide(wal.Durable, fmt.Sprint("during ", i))))
		}
	}
	cancel()
	wg.Wait()
	saved = append(saved, f.rawBundle(f.decide(wal.Durable, "after")))
	for i, raw := range saved {
		if _, err := verifyRaw(p, raw); err != nil {
			t.Errorf("bundle %d of %d, under the first policy: %v", i, len(saved), err)
		}
	}
	eventually(t, "everything is signed", func() bool { return l.UnsignedAge() == 0 })
	n := int64(0)
	v := receipt.NewVerifier(p)
	for raw, err := range l.Export(t.Context(), false) {
		if err != nil {
			t.Fatal(err)
		}
		b, err := receipt.ParseBundle(raw)
		if err == nil {
			_, err = v.Verify(b)
		}
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	if want := decided.Load(); n < want {
		t.Errorf("%d receipts, %d decisions", n, want)
	}
	records := l.VKeys()
	if len(records) != changes+1 {
		t.Errorf("%d daily keys, want %d", len(records), changes+1)
	}
	for i, k := range records {
		if last := i == len(records)-1; last != (k.LastSize == 0) || !last && (k.LastSize != records[i+1].FirstSize || k.Ended != receipt.EndedRotated) {
			t.Errorf("key %d: %+v", i, k)
		}
	}
	f.close()
	if vs, err := f.store.Versions(t.Context(), "daily"); err != nil {
		t.Error(err)
	} else {
		for _, v := range vs[:len(vs)-1] {
			if v.State != keys.Destroyed {
				t.Errorf("version %s is %s after its key was replaced", v.ID, v.State)
			}
		}
	}
	if r := f.fsckClean(); r.KeyStatements != uint64(changes)+1 {
		t.Errorf("fsck counts %d key statements, want %d", r.KeyStatements, changes+1)
	}
}

// TestFirstLeaf: a new log begins with the statement of its first key, and the open header follows.
func TestFirstLeaf(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	if err := l.Published(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	first, err := l.Leaf(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	ks, err := receipt.ParseKeyStatement(first)
	if err != nil || ks.FirstSize != 0 || ks.FirstRoot != receipt.EmptyRoot || ks.Succeeds != nil {
		t.Errorf("leaf 0: %+v, %v", ks, err)
	}
	second, err := l.Leaf(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	if h, err := receipt.ParseHeader(second); err != nil || h.Kind != receipt.HeaderOpen || h.Key != 0 || h.Time.Before(ks.NotBefore) {
		t.Errorf("leaf 1: %+v, %v", h, err)
	}
	if _, err := l.Leaf(t.Context(), 1<<20); !errors.Is(err, rotation.ErrNoLeaf) {
		t.Errorf("a leaf beyond the end: %v", err)
	}
}

// TestRevoke revokes the key in force: bundles that are fetched afterwards verify under the revocation, one that was kept from before
// is refused with the advice to fetch it anew, and so is one that the stolen key could make.
func TestRevoke(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	id := f.decide(wal.Durable, "before")
	kept := f.rawBundle(id)
	f.bundle(f.decide(wal.Durable, "more, so that the kept one ends in a smaller tree than the one that is pinned"), 1)
	stolen, _ := l.DailyKey()
	note, err := l.RevokeKey(t.Context(), "", "the token was seen in a bag")
	if err != nil {
		t.Fatal(err)
	}
	r, err := receipt.ParseRevocation(note)
	if err != nil || r.Key != stolen {
		t.Fatalf("revocation %+v, %v, want of %s", r, err, stolen)
	}
	if again, err := l.RevokeKey(t.Context(), stolen, "another word"); err != nil || string(again) != string(note) {
		t.Errorf("revoked again: %v", err)
	}
	if got := l.Revocations(); len(got) != 1 || string(got[0]) != string(note) {
		t.Errorf("%d revocations", len(got))
	}
	p := f.policyOf()
	if err := p.Revoke(note); err != nil {
		t.Fatal(err)
	}
	after := f.decide(wal.Durable, "after")
	for _, id := range []string{id, after} {
		if _, err := verifyRaw(p, f.rawBundle(id)); err != nil {
			t.Errorf("a bundle of today under the revocation: %v", err)
		}
	}
	if _, err := verifyRaw(p, kept); err == nil || !strings.Contains(err.Error(), "fetch") || strings.Contains(err.Error(), "\n") {
		t.Errorf("a bundle kept from before the revocation: %v", err)
	}
	records := l.VKeys()
	if len(records) != 2 || !records[0].Revoked || records[0].Ended != receipt.EndedRevoked || records[1].Revoked {
		t.Errorf("keys %+v", records)
	}
	if _, err := l.RevokeKey(t.Context(), l.IdentityVKey(), "x"); !errors.Is(err, rotation.ErrUnknownKey) {
		t.Errorf("revoke a key that is none of the log's daily keys: %v", err)
	}
	f.close()
	f.open() // and over a restart
	if _, err := verifyRaw(p, f.rawBundle(after)); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	f.close()
	f.fsckClean()
	dir, err := ReadKeys(f.cfg.Dir)
	if err != nil || len(dir.Keys) != 2 || len(dir.Revocations) != 1 || dir.Seal != nil || dir.Identity != l.IdentityVKey() {
		t.Errorf("offline: %+v, %v", dir, err)
	}
	f.open()
	if _, err := ReadKeys(f.cfg.Dir); !errors.Is(err, ErrInUse) {
		t.Errorf("keys of a directory that is served from: %v", err)
	}
	if origin, vkey, err := ReadIdentity(f.cfg.Dir); err != nil || origin != l.Origin() || vkey != l.IdentityVKey() {
		t.Errorf("identity: %q, %q, %v", origin, vkey, err)
	}
}

// TestOlderCopy restores a directory from before a key change: it is refused, and the way out replaces the key before anything is
// signed; the directory that the copy was made of is refused from then on.
func TestOlderCopy(t *testing.T) {
	f := newFixture(t)
	f.open()
	f.bundle(f.decide(wal.Durable, "before"), 1)
	f.close()
	whole, old := f.cfg.Dir, filepath.Join(t.TempDir(), "old")
	if err := os.CopyFS(old, os.DirFS(whole)); err != nil {
		t.Fatal(err)
	}
	l := f.open()
	if _, err := l.RotateKey(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.bundle(f.decide(wal.Durable, "after"), 1)
	f.close()

	f.cfg.Dir = old
	if l, err := Open(t.Context(), f.cfg); !errors.Is(err, rotation.ErrOlderCopy) || !strings.Contains(err.Error(), "--replace-daily-key") ||
		strings.Contains(err.Error(), "\n") {
		t.Fatalf("an older copy: %v, %v", l, err)
	}
	f.cfg.ReplaceDailyKey = true
	l = f.open()
	f.bundle(f.decide(wal.Durable, "replaced"), 1)
	if records := l.VKeys(); len(records) != 2 || records[0].Ended != receipt.EndedLost {
		t.Errorf("keys %+v", records)
	}
	f.close()
	f.fsckClean()
	f.cfg.ReplaceDailyKey = false
	f.open() // it goes on by itself
	f.close()
	f.fsckClean()

	f.cfg.Dir = whole
	if l, err := Open(t.Context(), f.cfg); !errors.Is(err, rotation.ErrOlderCopy) {
		t.Errorf("the directory whose copy has gone on: %v, %v", l, err)
	}
}

// TestBlocksBehindKeys restores the blocks alone, from before a key change: the log holds a statement that they do not know.
func TestBlocksBehindKeys(t *testing.T) {
	f := newFixture(t)
	f.open()
	f.bundle(f.decide(wal.Durable, "before"), 1)
	f.close()
	old := filepath.Join(t.TempDir(), "old")
	if err := os.CopyFS(old, os.DirFS(f.cfg.Dir)); err != nil {
		t.Fatal(err)
	}
	l := f.open()
	if _, err := l.RotateKey(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.close()
	for _, part := range []string{"blocks", "wal"} {
		p := filepath.Join(f.cfg.Dir, part)
		if err := errors.Join(os.RemoveAll(p), os.CopyFS(p, os.DirFS(filepath.Join(old, part)))); err != nil {
			t.Fatal(err)
		}
	}
	f.cfg.ReplaceDailyKey = true // the store's word is overruled, the log's is not
	if l, err := Open(t.Context(), f.cfg); err == nil || !strings.Contains(err.Error(), "restore state_dir as a whole") {
		t.Errorf("opened: %v, %v", l, err)
	}
}

// TestKeyAge moves the clock past the end of the key while nothing can be made or signed: no header is made, and the records, which
// are durable, are closed under the next key.
func TestKeyAge(t *testing.T) {
	var offset atomic.Int64
	f := newFixture(t)
	g := newGate()
	f.cfg.Now = func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
	f.cfg.Daily, f.cfg.MaxUnsigned, f.cfg.OutcomeTimeout = gatedStore{f.store, g}, 100*time.Hour, 1000*time.Hour
	l := f.open()
	first, until := l.DailyKey()
	f.bundle(f.decide(wal.Durable, "before"), 1)
	g.shut()
	offset.Store(int64(25 * time.Hour))
	late := f.decide(wal.Durable, "late")
	blocks := l.blocks.Load()
	if err := l.headerMu.lock(t.Context()); err != nil {
		t.Fatal(err)
	}
	err := l.seal(t.Context(), receipt.HeaderBlock, headerExtra{})
	l.headerMu.unlock()
	if !errors.Is(err, errNoKey) || l.blocks.Load() != blocks {
		t.Errorf("a header past the key's end: %v, %d blocks, had %d", err, l.blocks.Load(), blocks)
	}
	if s, err := l.Get(t.Context(), late); err != nil || s.State != StatePending {
		t.Errorf("the record past the key's end is %q, %v", s.State, err)
	}
	g.release()
	eventually(t, "a new daily key", func() bool { k, _ := l.DailyKey(); return k != first })
	f.bundle(late, 1)
	if k := l.VKeys()[0]; k.Ended != receipt.EndedExpired {
		t.Errorf("the first key %+v", k)
	}
	// Set back by two days: time as the log knows it stands still rather than go back.
	offset.Store(int64(-24 * time.Hour))
	if now := l.clock.Now(); now.Before(until) {
		t.Errorf("the clock went back to %v, the first key ended %v", now, until)
	}
	f.close()
	f.open() // and over a restart: the key in force is replaced before anything is signed
	if now := f.log.clock.Now(); now.Before(until) {
		t.Errorf("after a restart the clock went back to %v", now)
	}
	f.bundle(f.decide(wal.Durable, "after"), 1)
	if k := f.log.VKeys()[1]; k.Ended != receipt.EndedUntrusted {
		t.Errorf("the second key %+v", k)
	}
	f.close()
	f.fsckClean()
}

// TestKeyChangeWhileTheLogIsSlow adds leaves more slowly than blocks close: a key change comes between two of them, and what waits for
// the log stays little, as blocks grow instead of becoming more.
func TestKeyChangeWhileTheLogIsSlow(t *testing.T) {
	f := newFixture(t)
	f.cfg.SealEvery, f.cfg.MaxUnsigned = 20*time.Millisecond, time.Hour
	l, err := Open(t.Context(), f.cfg)
	if err != nil {
		t.Fatal(err)
	}
	add := l.add
	l.add = func(ctx context.Context, e *tessera.Entry) tessera.IndexFuture {
		time.Sleep(100 * time.Millisecond) // the slow disk
		return add(ctx, e)
	}
	ctx, cancel := context.WithCancel(context.Background())
	f.log, f.stop, f.done = l, cancel, make(chan error, 1)
	go func() { f.done <- l.Run(ctx) }()
	var last string
	record := func() {
		last = f.decide(wal.Durable, "r")
		time.Sleep(time.Millisecond) // a load, not a flood
		added := l.added.Load()      // both move on
		if n := l.blocks.Load() - added; n > maxBacklog+2 {
			t.Fatalf("%d headers wait for the log, want at most %d", n, maxBacklog)
		}
	}
	for before := l.blocks.Load(); l.blocks.Load() < before+maxBacklog; {
		record()
	}
	changed := make(chan error, 1)
	go func() {
		_, err := l.RotateKey(ctx)
		changed <- err
	}()
	for end := time.Now().Add(2 * time.Minute); ; record() {
		select {
		case err = <-changed:
		default:
			if time.Now().After(end) {
				t.Fatal("the key change does not come to an end")
			}
			continue
		}
		break
	}
	if err != nil {
		t.Error(err)
	}
	f.bundle(last, 1)
	f.close()
	f.fsckClean()
}

// TestCloseDuringKeyChange closes the log while a change of its key hangs in the store: the change gives up before the directory is
// given back, and the next start has a log in order.
func TestCloseDuringKeyChange(t *testing.T) {
	f := newFixture(t)
	g := newGate()
	f.cfg.Identity, f.cfg.Daily = gatedSigner{f.cfg.Identity, g}, gatedStore{f.store, g}
	l := f.open()
	id := f.decide(wal.Durable, "before")
	f.bundle(id, 1)
	g.shut()
	changed := make(chan error, 1)
	go func() {
		_, err := l.RotateKey(context.Background())
		changed <- err
	}()
	eventually(t, "a call that hangs", func() bool { return g.held.Load() > 0 })
	f.stop()
	<-f.done
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // no waiting for a checkpoint
	l.Close(ctx)
	f.log = nil
	select {
	case err := <-changed:
		if err == nil {
			t.Error("a key change came about without a key store")
		}
	case <-time.After(time.Minute):
		t.Error("a key change goes on over a directory that was given back")
	}
	if _, err := l.RotateKey(t.Context()); !errors.Is(err, ErrStopping) {
		t.Errorf("a key change after Close: %v", err)
	}
	g.release()
	f.open()
	f.bundle(id, 1)
	f.close()
	f.fsckClean()
}
