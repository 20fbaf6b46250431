package rotations

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/witnesses"
)

// observer is what the world sees of the log: it polls the checkpoint over HTTP, has torchwood verify it under the policy that was
// pinned when the log was new, and litewitness and omniwitness cosign it, which were configured then. None of them ever learns of a
// daily key.
type observer struct {
	url       string // of the checkpoint
	policy    torchwood.Policy
	tiles     *torchwood.TileFS
	witnesses *witnesses.Set // nil where they cannot be built

	last     []byte
	trees    map[int64]tlog.Hash // of every checkpoint that was seen
	signers  map[string]int      // checkpoints by the hash of the daily key that signed them
	cosigned int                 // checkpoints, each by both witnesses
}

func newObserver(t *testing.T, tiles, logDir string, policy []byte, identity string) *observer {
	t.Helper()
	p, err := torchwood.ParsePolicy(policy)
	if err != nil {
		t.Fatal(err)
	}
	fs, err := torchwood.NewTileFS(os.DirFS(logDir))
	if err != nil {
		t.Fatal(err)
	}
	o := &observer{url: "http://" + tiles + "/checkpoint", policy: p, tiles: fs, trees: map[int64]tlog.Hash{}, signers: map[string]int{}}
	programs, err := witnesses.Build(t.Context())
	switch {
	case err == nil:
		o.witnesses = witnesses.Start(t, programs, identity)
	case os.Getenv("CI") == "true":
		t.Fatal(err)
	default:
		t.Logf("SKIPPED: litewitness and omniwitness, torchwood's library alone looks on: %v", err)
	}
	return o
}

// watch looks at every checkpoint that it can until ctx ends.
func (o *observer) watch(ctx context.Context) error {
	for ctx.Err() == nil {
		if err := o.look(context.WithoutCancel(ctx)); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}

// look takes the checkpoint of now, if it is another than before.
func (o *observer) look(ctx context.Context) error {
	raw, err := harness.Get(ctx, o.url)
	if err != nil || bytes.Equal(raw, o.last) {
		return err
	}
	c, n, err := torchwood.VerifyCheckpoint(raw, o.policy)
	if err != nil {
		return fmt.Errorf("torchwood refuses the checkpoint: %w\n%s", err, raw)
	}
	if len(n.Sigs) != 1 || len(n.UnverifiedSigs) != 1 {
		return fmt.Errorf("%d known and %d unknown signatures, want the identity's and the daily key's:\n%s", len(n.Sigs), len(n.UnverifiedSigs), raw)
	}
	if root, ok := o.trees[c.N]; ok && root != c.Hash {
		return fmt.Errorf("fork: two trees of %d leaves, %v and %v", c.N, root, c.Hash)
	}
	o.last, o.trees[c.N] = raw, c.Hash
	o.signers[fmt.Sprintf("%08x", n.UnverifiedSigs[0].Hash)]++
	return o.cosign(ctx, c.Tree, raw)
}

// cosign has the witnesses cosign a checkpoint.
func (o *observer) cosign(ctx context.Context, tree tlog.Tree, raw []byte) error {
	if o.witnesses == nil {
		return nil
	}
	if err := o.witnesses.Cosign(ctx, raw, torchwood.TileHashReaderWithContext(ctx, tree, o.tiles)); err != nil {
		return err
	}
	o.cosigned++
	return nil
}

// consistent proves that every checkpoint that was seen is a prefix of the latest, and returns the leaves below that.
func (o *observer) consistent(ctx context.Context) (leaves [][]byte, err error) {
	if err := o.look(ctx); err != nil {
		return nil, err
	}
	c, _, err := torchwood.VerifyCheckpoint(o.last, o.policy)
	if err != nil {
		return nil, err
	}
	// The reader proves every tile under the root, so the tree hash at an earlier size is what a consistency proof would show.
	hashes := torchwood.TileHashReaderWithContext(ctx, c.Tree, o.tiles)
	for n, root := range o.trees {
		got, err := tlog.TreeHash(n, hashes)
		if err != nil {
			return nil, err
		}
		if got != root {
			return nil, fmt.Errorf("fork: two histories of %d leaves: %v and, within %d leaves, %v", n, root, c.N, got)
		}
	}
	client, err := torchwood.NewClient(o.tiles)
	if err != nil {
		return nil, err
	}
	for _, leaf := range client.AllEntries(ctx, c.Tree, 0) {
		leaves = append(leaves, bytes.Clone(leaf))
	}
	if err := client.Err(); err != nil {
		return nil, err
	}
	if int64(len(leaves)) != c.N {
		return nil, errors.New("leaves are missing")
	}
	return leaves, nil
}
