package receiptlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/client"
	"golang.org/x/mod/sumdb/note"
)

// checkTree holds what the transparency log will build on, and sign, against what is there: the tree state that Tessera keeps and
// trusts without looking, the tiles and the last bundle at the tree's right edge, and the signed checkpoint. It reads a few files,
// however large the log is; knhk fsck reads them all. A log that was never begun is right.
func checkTree(ctx context.Context, dir string, identity note.Verifier) error {
	tree := client.FileFetcher{Root: dir}
	raw, err := tree.ReadCheckpoint(ctx)
	signed := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("check log: read checkpoint: %w", err)
	}
	file := filepath.Join(dir, ".state", "treeState")
	state, err := readTreeState(dir) // Tessera trusts it without looking
	if errors.Is(err, fs.ErrNotExist) && !signed {
		return nil
	}
	if err != nil {
		return fmt.Errorf("check log: %s is missing or damaged: %w", file, err)
	}
	if err := rootIs(ctx, tree, state.Size, state.Root); err != nil {
		return fmt.Errorf("check log: %s or the tiles are damaged: %w", file, err)
	}
	if err := lastBundle(ctx, tree, state.Size); err != nil {
		return fmt.Errorf("check log: entries are damaged: %w", err)
	}
	if !signed {
		return nil
	}
	if _, err := note.Open(raw, note.VerifierList(identity)); err != nil {
		return fmt.Errorf("check log: the checkpoint is not signed by the identity key: %w", err)
	}
	cp, err := parseCheckpoint(raw)
	if err != nil {
		return fmt.Errorf("check log: %w", err)
	}
	if cp.size > state.Size {
		return fmt.Errorf("check log: a checkpoint of %d leaves was signed, %s says that there are %d: the log was damaged, or part of it restored",
			cp.size, file, state.Size)
	}
	if err := rootIs(ctx, tree, cp.size, cp.root[:]); err != nil {
		return fmt.Errorf("check log: the tiles are not those that were signed: %w", err)
	}
	return nil
}

// rootIs checks the root of the first size leaves, computed from the tiles.
func rootIs(ctx context.Context, tree client.FileFetcher, size uint64, want []byte) error {
	got, err := rootOf(ctx, tree.ReadTile, size)
	if err != nil {
		return err
	}
	if !bytes.Equal(got[:], want) {
		return fmt.Errorf("the root of %d leaves is %x, not %x", size, got, want)
	}
	return nil
}

// lastBundle checks the last bundle against the tiles: the next leaf is written behind what it holds.
func lastBundle(ctx context.Context, tree client.FileFetcher, size uint64) error {
	if size == 0 {
		return nil
	}
	first := (size - 1) / 256 * 256
	bundle, err := client.GetEntryBundle(ctx, tree.ReadEntryBundle, first/256, size)
	if err != nil {
		return err
	}
	hashes, err := client.FetchLeafHashes(ctx, tree.ReadTile, first, size-first, size)
	if err != nil {
		return err
	}
	for i, want := range hashes {
		if i >= len(bundle.Entries) || !bytes.Equal(rfc6962.DefaultHasher.HashLeaf(bundle.Entries[i]), want) {
			return fmt.Errorf("leaf %d is not the one that was integrated", first+uint64(i))
		}
	}
	return nil
}
