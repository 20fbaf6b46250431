package receipt_test

import (
	"crypto/sha256"
	"encoding/binary"
	"math"
	"slices"
	"testing"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/mod/sumdb/tlog"
)

func testLeaves(n int) (leaves []receipt.Hash) {
	for i := range n {
		leaves = append(leaves, receipt.LeafHash(binary.BigEndian.AppendUint32(nil, uint32(i))))
	}
	return leaves
}

// dumbRoot is the definition of MTH in RFC 6962 section 2.1, word for word.
func dumbRoot(leaves []receipt.Hash) receipt.Hash {
	switch len(leaves) {
	case 0:
		return sha256.Sum256(nil)
	case 1:
		return leaves[0]
	}
	k := split(len(leaves))
	left, right := dumbRoot(leaves[:k]), dumbRoot(leaves[k:])
	return sha256.Sum256(slices.Concat([]byte{1}, left[:], right[:]))
}

// dumbPath is PATH of RFC 6962 section 2.1.1.
func dumbPath(leaves []receipt.Hash, m int) []receipt.Hash {
	if len(leaves) == 1 {
		return nil
	}
	if k := split(len(leaves)); m < k {
		return append(dumbPath(leaves[:k], m), dumbRoot(leaves[k:]))
	} else {
		return append(dumbPath(leaves[k:], m-k), dumbRoot(leaves[:k]))
	}
}

// split is the largest power of two smaller than n.
func split(n int) int {
	k := 1
	for 2*k < n {
		k *= 2
	}
	return k
}

// stored keeps the hashes of x/mod's arithmetic.
type stored []tlog.Hash

func (s stored) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		out[i] = s[x]
	}
	return out, nil
}

// TestTree compares every tree up to 300 leaves and every path in it with x/mod's and with transparency-dev's arithmetic;
// the smaller ones also with the definitions of RFC 6962.
func TestTree(t *testing.T) {
	all := testLeaves(300)
	var s stored
	for n := 0; n <= len(all); n++ {
		if n > 0 {
			hashes, err := tlog.StoredHashesForRecordHash(int64(n-1), tlog.Hash(all[n-1]), s)
			if err != nil {
				t.Fatal(err)
			}
			s = append(s, hashes...)
		}
		leaves := all[:n]
		tree := receipt.NewTree(leaves)
		want, err := tlog.TreeHash(int64(n), s)
		if err != nil {
			t.Fatal(err)
		}
		root := tree.Root()
		if root != receipt.Hash(want) || receipt.BlockRoot(leaves) != root || tree.Len() != n {
			t.Fatalf("size %d: root %v, want %v", n, root, want)
		}
		if n <= 70 && dumbRoot(leaves) != root {
			t.Fatalf("size %d: not the root of RFC 6962", n)
		}
		for i := range n {
			path := tree.Path(i)
			wantPath, err := tlog.ProveRecord(int64(n), int64(i), s)
			if err != nil {
				t.Fatal(err)
			}
			if len(path) != len(wantPath) {
				t.Fatalf("size %d, leaf %d: %d hashes, want %d", n, i, len(path), len(wantPath))
			}
			raw := make([][]byte, len(path))
			for k := range path {
				if path[k] != receipt.Hash(wantPath[k]) {
					t.Fatalf("size %d, leaf %d: hash %d differs", n, i, k)
				}
				raw[k] = path[k][:]
			}
			if n <= 70 && !slices.Equal(path, dumbPath(leaves, i)) {
				t.Fatalf("size %d, leaf %d: not the path of RFC 6962", n, i)
			}
			if err := receipt.VerifyPath(root, uint64(n), uint64(i), leaves[i], path); err != nil {
				t.Fatalf("size %d, leaf %d: %v", n, i, err)
			}
			if err := proof.VerifyInclusion(rfc6962.DefaultHasher, uint64(i), uint64(n), leaves[i][:], raw, root[:]); err != nil {
				t.Fatalf("size %d, leaf %d: %v", n, i, err)
			}
		}
	}
	if !slices.Equal(receipt.Path(all, 17), receipt.NewTree(all).Path(17)) {
		t.Error("Path differs from Tree.Path")
	}
}

// TestVerifyPathRefuses changes one thing of a valid path at a time, in every tree up to 40 leaves. An audit path says
// how deep a leaf is and on which side each sibling stands, so it may fit other sizes; never another leaf, index or root.
func TestVerifyPathRefuses(t *testing.T) {
	all := testLeaves(41)
	for n := 1; n <= 40; n++ {
		tree := receipt.NewTree(all[:n])
		for i := range n {
			path, root := tree.Path(i), tree.Root()
			for j := range uint64(n) + 2 {
				if j != uint64(i) && receipt.VerifyPath(root, uint64(n), j, all[i], path) == nil {
					t.Fatalf("size %d: leaf %d accepted at %d", n, i, j)
				}
			}
			bad := map[string]bool{
				"another leaf":       receipt.VerifyPath(root, uint64(n), uint64(i), all[40], path) == nil,
				"another root":       receipt.VerifyPath(all[40], uint64(n), uint64(i), all[i], path) == nil,
				"a hash more":        receipt.VerifyPath(root, uint64(n), uint64(i), all[i], append(slices.Clone(path), root)) == nil,
				"no leaves":          receipt.VerifyPath(root, 0, uint64(i), all[i], path) == nil,
				"size overflow":      receipt.VerifyPath(root, math.MaxUint64, uint64(i), all[i], path) == nil,
				"a size without end": receipt.VerifyPath(root, math.MaxInt64, uint64(i), all[i], path) == nil, // tlog's check would not return
				"index overflow":     receipt.VerifyPath(root, uint64(n), math.MaxUint64, all[i], path) == nil,
				"64 hashes":          receipt.VerifyPath(root, uint64(n), uint64(i), all[i], make([]receipt.Hash, 64)) == nil,
			}
			if len(path) > 0 {
				bad["a hash less"] = receipt.VerifyPath(root, uint64(n), uint64(i), all[i], path[1:]) == nil
				for k := range path {
					changed := slices.Clone(path)
					changed[k][i%32] ^= 1 << (k % 8)
					bad["a changed hash"] = bad["a changed hash"] || receipt.VerifyPath(root, uint64(n), uint64(i), all[i], changed) == nil
				}
			}
			for what, accepted := range bad {
				if accepted {
					t.Errorf("size %d, leaf %d: %s accepted", n, i, what)
				}
			}
		}
	}
}

func TestEmptyTree(t *testing.T) {
	var zero receipt.Tree
	if zero.Root() != receipt.EmptyRoot || zero.Len() != 0 || receipt.BlockRoot(nil) != receipt.EmptyRoot {
		t.Error("the tree of no leaves")
	}
	defer func() {
		if recover() == nil {
			t.Error("a path in the empty tree")
		}
	}()
	zero.Path(0)
}
