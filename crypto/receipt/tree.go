package receipt

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"

	"golang.org/x/mod/sumdb/tlog"
)

// EmptyRoot is the tree head over no leaves, SHA-256 of nothing (RFC 6962 section 2.1).
var EmptyRoot = Hash(sha256.Sum256(nil))

// String returns h in standard base64, as checkpoints show it.
func (h Hash) String() string { return base64.StdEncoding.EncodeToString(h[:]) }

// LeafHash is the RFC 6962 leaf hash: SHA-256 of a zero byte and the leaf.
func LeafHash(leaf []byte) Hash { return Hash(tlog.RecordHash(leaf)) }

// Tree is the RFC 6962 tree over the leaf hashes of one block: built once, it gives the root and any path by look-up.
// It takes twice the leaves' memory and may be used by many at once. The zero Tree has no leaves.
type Tree struct {
	levels [][]Hash // levels[0] the leaves; a last node without a sibling stands again one level up
}

// NewTree builds the tree over leaves, which it keeps and does not change. It hashes len(leaves)-1 nodes.
func NewTree(leaves []Hash) *Tree {
	if len(leaves) == 0 {
		return &Tree{}
	}
	t := &Tree{levels: [][]Hash{leaves}}
	for below := leaves; len(below) > 1; {
		level := make([]Hash, 0, (len(below)+1)/2)
		for i := 0; i+1 < len(below); i += 2 {
			level = append(level, Hash(tlog.NodeHash(tlog.Hash(below[i]), tlog.Hash(below[i+1]))))
		}
		if len(below)%2 == 1 {
			level = append(level, below[len(below)-1])
		}
		t.levels = append(t.levels, level)
		below = level
	}
	return t
}

// Len returns the number of leaves.
func (t *Tree) Len() int {
	if len(t.levels) == 0 {
		return 0
	}
	return len(t.levels[0])
}

// Root returns the tree head; EmptyRoot without leaves.
func (t *Tree) Root() Hash {
	if len(t.levels) == 0 {
		return EmptyRoot
	}
	return t.levels[len(t.levels)-1][0]
}

// AppendPath appends the audit path of leaf i (RFC 6962 section 2.1.1), nearest sibling first. It panics unless
// 0 <= i < Len().
func (t *Tree) AppendPath(dst []Hash, i int) []Hash {
	if i < 0 || i >= t.Len() {
		panic(fmt.Sprintf("receipt: path of leaf %d in a tree of %d", i, t.Len()))
	}
	for _, level := range t.levels[:len(t.levels)-1] {
		if sibling := i ^ 1; sibling < len(level) {
			dst = append(dst, level[sibling])
		}
		i /= 2
	}
	return dst
}

// Path is AppendPath into a new slice, nil for a tree of one leaf.
func (t *Tree) Path(i int) []Hash { return t.AppendPath(nil, i) }

// BlockRoot returns the tree head over leaves.
func BlockRoot(leaves []Hash) Hash { return NewTree(leaves).Root() }

// Path returns the audit path of leaf i over leaves; for more than one path of a block build a Tree.
func Path(leaves []Hash, i int) []Hash { return NewTree(leaves).Path(i) }

// maxTree is the most leaves a tree may have here: beyond it the arithmetic of golang.org/x/mod/sumdb/tlog overflows, and its checks
// do not end.
const maxTree = 1 << 62

// maxPath is the length of the longest audit path that is read; one more than a tree of maxTree leaves needs.
const maxPath = 63

// VerifyPath checks that leaf is leaf i of the n below root, with exactly the hashes the path must have.
func VerifyPath(root Hash, n, i uint64, leaf Hash, path []Hash) error {
	if n > maxTree || i >= n {
		return fmt.Errorf("verify path: index %d in a tree of %d", i, n)
	}
	if len(path) > maxPath {
		return fmt.Errorf("verify path: %d hashes", len(path))
	}
	var proof [maxPath]tlog.Hash
	for k, h := range path {
		proof[k] = tlog.Hash(h)
	}
	if tlog.CheckRecord(proof[:len(path)], int64(n), tlog.Hash(root), int64(i), tlog.Hash(leaf)) != nil {
		return errors.New("verify path: does not lead to the root")
	}
	return nil
}
