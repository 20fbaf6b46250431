package receiptlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/client"
	"golang.org/x/mod/sumdb/note"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/rotation"
	"github.com/knhk/sidecar/region/wal"
)

// wallClock is a clock that a test sets.
type wallClock struct {
	mu     sync.Mutex
	offset time.Duration
	set    time.Time // when it was set last, by the real clock
}

func (c *wallClock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.offset)
}

func (c *wallClock) jump(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.offset, c.set = c.offset+d, time.Now()
}

// settled says whether the clock has not been set for a moment: what a signature was allowed by is then what it is judged by.
func (c *wallClock) settled() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Since(c.set) > 100*time.Millisecond
}

// watchedStore notes when each version of the daily key signed checkpoints, and of what size.
type watchedStore struct {
	keys.Store
	clock *wallClock

	mu    sync.Mutex
	signs []signing
}

type signing struct {
	key    string // verifier key text, without the name
	at     time.Time
	text   string
	judged bool // its time is that by which it was allowed
}

func (s *watchedStore) Signer(ctx context.Context, label, id string) (keys.Signer, error) {
	k, err := s.Store.Signer(ctx, label, id)
	if err != nil {
		return nil, err
	}
	vkey, err := keys.VKey("x", k.Public())
	if err != nil {
		return nil, err
	}
	return watchedSigner{k, s, keyText(vkey)}, nil
}

type watchedSigner struct {
	keys.Signer
	store *watchedStore
	key   string
}

func (s watchedSigner) Sign(ctx context.Context, msg []byte) ([]byte, error) {
	at, judged := s.store.clock.now(), s.store.clock.settled()
	s.store.mu.Lock()
	s.store.signs = append(s.store.signs, signing{s.key, at, string(msg), judged})
	s.store.mu.Unlock()
	return s.Signer.Sign(ctx, msg)
}

// auditTiles is what an auditor does who has the tiles of a log and its identity key, and nothing else.
func auditTiles(t *testing.T, dir, origin, identity string) (used []receipt.KeyUse) {
	t.Helper()
	verifier, err := keys.Verifier(identity)
	if err != nil {
		t.Fatal(err)
	}
	tree := client.FileFetcher{Root: filepath.Join(dir, "log")}
	raw, err := tree.ReadCheckpoint(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := note.Open(raw, note.VerifierList(verifier)); err != nil {
		t.Fatal(err)
	}
	cp, err := parseCheckpoint(raw)
	if err != nil {
		t.Fatal(err)
	}
	audit := receipt.NewKeyAudit(origin, verifier)
	audit.Done = func(k receipt.KeyUse) { used = append(used, k) }
	so := (&compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}).NewEmptyRange(0)
	root := func() receipt.Hash {
		if so.End() == 0 {
			return receipt.EmptyRoot
		}
		r, err := so.GetRootHash(nil)
		if err != nil {
			t.Fatal(err)
		}
		return receipt.Hash(r)
	}
	for leaf, err := range logLeaves(t.Context(), tree, 0, cp.size) {
		if err != nil {
			t.Fatal(err)
		}
		var r receipt.Hash
		if receipt.RootNeeded(leaf.data) {
			r = root()
		}
		if err := audit.Leaf(leaf.index, r, leaf.data); err != nil {
			t.Errorf("audit: %v", err)
		}
		hash := receipt.LeafHash(leaf.data)
		if err := so.Append(hash[:], nil); err != nil {
			t.Fatal(err)
		}
	}
	if root() != cp.root {
		t.Error("audit: the leaves are not those under the checkpoint")
	}
	if k, ok := audit.Current(); ok {
		used = append(used, k)
	}
	return used
}

// jumpSizes are how far the clock is set, either way.
var jumpSizes = []time.Duration{
	time.Second, time.Minute, time.Hour, 16*time.Hour - time.Second, 16*time.Hour + time.Second, 18 * time.Hour, 20 * time.Hour,
	24*time.Hour - 2*time.Second, 24*time.Hour - time.Nanosecond, 24 * time.Hour, 24*time.Hour + time.Nanosecond, 25 * time.Hour, 48 * time.Hour,
	30 * 24 * time.Hour, 365 * 24 * time.Hour, 3650 * 24 * time.Hour,
}

// TestJumps sets the wall clock 50 times, by a second to ten years, either way, now while the log runs and now while it does not, and
// opens copies of the directory from before. What the log has then is judged from its tiles alone, and every signature that a daily
// key made by the time it was made at: no key signs past its age, and no two keys sign checkpoints of one size.
func TestJumps(t *testing.T) {
	jumps := 50
	if testing.Short() {
		jumps = 12
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 5))
	f := newFixture(t)
	clock := &wallClock{}
	store := &watchedStore{Store: f.store, clock: clock}
	f.cfg.Now, f.cfg.Daily, f.cfg.OutcomeTimeout = clock.now, store, 290*365*24*time.Hour
	f.cfg.Log = slog.New(slog.DiscardHandler)
	whole := f.cfg.Dir
	var copies []dirCopy
	var checkpoints [][]byte
	f.open()
	for i := range jumps {
		d := jumpSizes[rng.IntN(len(jumpSizes))]
		if at := clock.offset + d; rng.IntN(2) == 0 || at > 60*365*24*time.Hour { // years that a nanosecond count can hold
			d = -d
		}
		if at := clock.offset + d; at < -40*365*24*time.Hour {
			d = -d
		}
		restart := rng.IntN(3) == 0
		if restart {
			f.close()
			if rng.IntN(2) == 0 {
				c := dirCopy{filepath.Join(t.TempDir(), "copy"), currentKey(t, whole)}
				if err := os.CopyFS(c.dir, os.DirFS(whole)); err != nil {
					t.Fatal(err)
				}
				copies = append(copies, c)
			}
		}
		clock.jump(d)
		if restart {
			openCopies(t, f, copies, currentKey(t, whole))
			f.open()
		}
		eventually(t, "requests are taken", func() bool { return f.log.Refusing() == nil })
		id := f.decide(wal.Durable, fmt.Sprint("jump ", i, " ", d))
		f.bundle(id, 1)
		checkpoints = append(checkpoints, f.log.Checkpoint())
	}
	f.close()
	f.fsckClean()
	id, err := readIdentity(whole)
	if err != nil {
		t.Fatal(err)
	}
	used := auditTiles(t, whole, id.Origin, id.Identity)
	t.Logf("%d jumps, %d keys, %d copies, %d signatures", jumps, len(used), len(copies), len(store.signs))
	if len(used) < jumps/10 {
		t.Errorf("only %d keys were in force", len(used))
	}
	judgeSignings(t, store.signs, used, id.Origin)
	judgeCheckpoints(t, checkpoints, used)

	// A copy that goes on against advice: the directory it was made of has lost its key and does not sign beside it.
	old := filepath.Join(t.TempDir(), "last")
	if err := os.CopyFS(old, os.DirFS(whole)); err != nil {
		t.Fatal(err)
	}
	f.open()
	if _, err := f.log.RotateKey(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.close()
	f.cfg.Dir, f.cfg.ReplaceDailyKey = old, true
	f.open()
	f.bundle(f.decide(wal.Durable, "the copy"), 1)
	f.close()
	f.fsckClean()
	auditTiles(t, old, id.Origin, id.Identity)
	f.cfg.Dir, f.cfg.ReplaceDailyKey = whole, false
	if l, err := Open(t.Context(), f.cfg); !errors.Is(err, rotation.ErrOlderCopy) {
		t.Errorf("two directories go on with one log: %v, %v", l, err)
	}
}

// dirCopy is a copy of the directory and the key that was in force when it was made.
type dirCopy struct{ dir, key string }

func currentKey(t *testing.T, dir string) string {
	t.Helper()
	k, err := ReadKeys(dir)
	if err != nil || len(k.Keys) == 0 {
		t.Fatalf("keys of %s: %+v, %v", dir, k, err)
	}
	return k.Keys[len(k.Keys)-1].VKey
}

// openCopies tries the copies whose key has been replaced since: each is refused.
func openCopies(t *testing.T, f *fixture, copies []dirCopy, current string) {
	t.Helper()
	for _, c := range copies {
		if c.key == current {
			continue // nothing but a peer can tell
		}
		cfg := f.cfg
		cfg.Dir = c.dir
		l, err := Open(t.Context(), cfg)
		if l != nil {
			l.Close(t.Context())
		}
		if !errors.Is(err, rotation.ErrOlderCopy) {
			t.Fatalf("a copy from before a key change: %v", err)
		}
	}
}

// judgeSignings looks at each signature of a daily key by itself.
func judgeSignings(t *testing.T, signs []signing, used []receipt.KeyUse, origin string) {
	t.Helper()
	byKey := map[string]receipt.KeyUse{}
	for _, k := range used {
		byKey[keyText(k.Key)] = k
	}
	sizes := map[uint64]string{}
	judged := 0
	for _, s := range signs {
		k, ok := byKey[s.key]
		if !ok {
			continue // proved to sign when it was made, and never stated
		}
		if s.judged && !s.at.Before(k.NotAfter) {
			t.Errorf("a key that ended %v signed at %v: %q", k.NotAfter, s.at, s.text)
		}
		if !strings.HasPrefix(s.text, origin+"\n") {
			continue // its successor's statement
		}
		judged++
		cp, err := parseCheckpoint([]byte(s.text + "\n"))
		if err != nil {
			t.Fatalf("%q: %v", s.text, err)
		}
		if k.LastSize != 0 && cp.size > k.LastSize || cp.size <= k.Index && cp.size != 0 {
			t.Errorf("the key for sizes above %d up to %d signed size %d", k.Index, k.LastSize, cp.size)
		}
		if other := sizes[cp.size]; other != "" && other != s.key {
			t.Errorf("two keys signed size %d", cp.size)
		}
		sizes[cp.size] = s.key
	}
	if judged == 0 {
		t.Error("no signature of a checkpoint was seen")
	}
}

// judgeCheckpoints checks that what was published is signed by the key in force for its size.
func judgeCheckpoints(t *testing.T, checkpoints [][]byte, used []receipt.KeyUse) {
	t.Helper()
	for _, raw := range checkpoints {
		cp, err := parseCheckpoint(raw)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range used {
			if cp.size <= k.Index || k.LastSize != 0 && cp.size > k.LastSize {
				continue
			}
			v, err := keys.Verifier(k.Key)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := note.Open(bytes.Clone(raw), note.VerifierList(v)); err != nil {
				t.Errorf("the checkpoint of size %d is not signed by the key in force: %v", cp.size, err)
			}
		}
	}
}
