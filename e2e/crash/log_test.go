package crash

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/knhk/sidecar/crypto/receipt"
)

// publicLog is the transparency log as anybody can read it: signed checkpoints, tiles and entries, with torchwood and the policy
// that was pinned when the log was new. It is read on from where it was left, so that many crashes cost no more than few.
type publicLog struct {
	policy torchwood.Policy
	tiles  *torchwood.TileFS
	tree   tlog.Tree // as far as it was read

	mu   sync.Mutex
	seen map[tlog.Tree]bool // signed checkpoints that were seen and are not known yet to be part of tree

	headers      map[headerKey][]byte
	leaves       map[receipt.Hash]bool // leaf hashes of the headers
	incarnations map[[16]byte]*receipt.Header
	prev         receipt.Hash
	logID        [16]byte
	next         uint64 // ordinal that follows those in blocks; the first is 1
	records      uint64
	recovered    int // incarnations that a crash ended
}

// headerKey is what no two headers may have in common.
type headerKey struct {
	logID       [16]byte
	instance    string
	incarnation [16]byte
	seq         uint64
}

func openPublicLog(dir string, policy []byte) (*publicLog, error) {
	p, err := torchwood.ParsePolicy(policy)
	if err != nil {
		return nil, err
	}
	tiles, err := torchwood.NewTileFS(os.DirFS(dir))
	if err != nil {
		return nil, err
	}
	return &publicLog{policy: p, tiles: tiles, next: 1, seen: map[tlog.Tree]bool{}, headers: map[headerKey][]byte{},
		leaves: map[receipt.Hash]bool{}, incarnations: map[[16]byte]*receipt.Header{}}, nil
}

// checkpoint reads and verifies the checkpoint, and remembers that it was seen.
func (l *publicLog) checkpoint(ctx context.Context) (tlog.Tree, error) {
	raw, err := l.tiles.ReadEndpoint(ctx, "checkpoint")
	if err != nil {
		return tlog.Tree{}, err
	}
	c, _, err := torchwood.VerifyCheckpoint(raw, l.policy)
	if err != nil {
		return tlog.Tree{}, fmt.Errorf("checkpoint: %w\n%s", err, raw)
	}
	l.saw(c.Tree)
	return c.Tree, nil
}

// saw remembers a checkpoint that somebody has seen signed.
func (l *publicLog) saw(t tlog.Tree) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.seen[t] = true
}

// watch sees every checkpoint that it can until ctx ends.
func (l *publicLog) watch(ctx context.Context) error {
	for ctx.Err() == nil {
		if _, err := l.checkpoint(ctx); err != nil && ctx.Err() == nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}

// read reads the log up to its latest checkpoint: the checkpoints that were seen before lie in it, and its new entries are in order.
func (l *publicLog) read(ctx context.Context) error {
	tree, err := l.checkpoint(ctx)
	if err != nil {
		return err
	}
	if tree.N < l.tree.N {
		return fmt.Errorf("fork: the log had %d leaves, now %d", l.tree.N, tree.N)
	}
	// The reader proves every tile under the new root, so the tree hash at an earlier size is what a consistency proof would show.
	hashes := torchwood.TileHashReaderWithContext(ctx, tree, l.tiles)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.tree.N > 0 {
		l.seen[l.tree] = true
	}
	for old := range l.seen {
		if old.N > tree.N {
			return fmt.Errorf("fork: a checkpoint of %d leaves was signed before one of %d", old.N, tree.N)
		}
		root, err := tlog.TreeHash(old.N, hashes)
		if err != nil {
			return fmt.Errorf("consistency of %d and %d leaves: %w", old.N, tree.N, err)
		}
		if root != old.Hash {
			return fmt.Errorf("fork: two histories of %d leaves: %v and, within %d leaves, %v", old.N, old.Hash, tree.N, root)
		}
		delete(l.seen, old)
	}
	client, err := torchwood.NewClient(l.tiles)
	if err != nil {
		return err
	}
	for i, leaf := range client.AllEntries(ctx, tree, l.tree.N) {
		if err := l.entry(leaf); err != nil {
			return fmt.Errorf("log leaf %d: %w", i, err)
		}
	}
	if err := client.Err(); err != nil {
		return fmt.Errorf("read log from %d to %d: %w", l.tree.N, tree.N, err)
	}
	l.tree = tree
	return nil
}

// entry checks one leaf against those before it.
func (l *publicLog) entry(leaf []byte) error {
	if bytes.HasPrefix(leaf, []byte(receipt.KeyPrefix)) {
		_, err := receipt.ParseKeyStatement(leaf)
		return err
	}
	h, err := receipt.ParseHeader(leaf)
	if err != nil {
		return err
	}
	key := headerKey{h.LogID, h.Instance, h.Incarnation, h.Seq}
	if old, ok := l.headers[key]; ok {
		if !bytes.Equal(old, leaf) {
			return fmt.Errorf("two headers for incarnation %x, seq %d:\n%s\n%s", h.Incarnation, h.Seq, old, leaf)
		}
		return nil // an equal duplicate is legal after a crash
	}
	last, known := l.incarnations[h.Incarnation]
	switch {
	case !known && h.Seq != 0:
		return fmt.Errorf("incarnation %x begins with seq %d", h.Incarnation, h.Seq)
	case known && h.Seq != last.Seq+1:
		return fmt.Errorf("incarnation %x: seq %d follows %d", h.Incarnation, h.Seq, last.Seq)
	case known && last.Kind == receipt.HeaderFinal:
		return fmt.Errorf("incarnation %x goes on after its final header", h.Incarnation)
	case h.Prev != l.prev:
		return errors.New("the header does not follow the one before it")
	case len(l.headers) > 0 && h.LogID != l.logID:
		return errors.New("the header is of another log")
	case h.LostFrom != h.LostTo:
		return fmt.Errorf("ordinals %d to %d are declared lost, and the machine has not died", h.LostFrom, h.LostTo)
	case h.Count > 0 && (h.First != l.next || h.Last-h.First+1 != h.Count):
		return fmt.Errorf("ordinals %d to %d of %d records after %d", h.First, h.Last, h.Count, l.next)
	}
	if h.Count > 0 {
		l.next = h.Last + 1
	}
	if h.Kind == receipt.HeaderFinal && h.Recovered {
		l.recovered++
	}
	l.headers[key], l.incarnations[h.Incarnation], l.logID, l.prev = bytes.Clone(leaf), h, h.LogID, receipt.LeafHash(leaf)
	l.leaves[l.prev] = true
	l.records += h.Count
	return nil
}

// awaitFirst waits until there is a checkpoint.
func (l *publicLog) awaitFirst(ctx context.Context) error {
	for {
		_, err := l.checkpoint(ctx)
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func logDir(state string) string { return filepath.Join(state, "log") }
