package receipt

import (
	"bytes"
	"errors"
	"fmt"
	"math/bits"

	"golang.org/x/mod/sumdb/tlog"
)

// logProof is a parsed c2sp.org/tlog-proof@v1: an index, an audit path and a signed checkpoint.
type logProof struct {
	index      uint64
	path       tlog.RecordProof
	checkpoint []byte // borrowed from the text
}

const proofHeader = "c2sp.org/tlog-proof@v1\n"

// parseProof parses a proof in the one spelling torchwood.FormatProof gives it, without an extra line. It verifies nothing.
func parseProof(text []byte) (*logProof, error) {
	rest, ok := bytes.CutPrefix(text, []byte(proofHeader))
	if !ok {
		return nil, errors.New("not a c2sp.org/tlog-proof@v1")
	}
	line, rest, ok := bytes.Cut(rest, []byte("\n"))
	number, ok2 := bytes.CutPrefix(line, []byte("index "))
	if !ok || !ok2 {
		return nil, errors.New("want an index line")
	}
	n, err := parseUint(string(number), 63)
	if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	p := &logProof{index: n}
	for {
		line, rest, ok = bytes.Cut(rest, []byte("\n"))
		if !ok {
			return nil, errors.New("ends before the checkpoint")
		}
		if len(line) == 0 {
			p.checkpoint = rest
			return p, nil
		}
		if len(p.path) == maxPath {
			return nil, fmt.Errorf("more than %d hashes", maxPath)
		}
		var raw [33]byte // 44 characters may stand for 33 bytes
		if len(line) != 44 {
			return nil, fmt.Errorf("hash %d is malformed", len(p.path))
		}
		if n, err := stdEncoding.Decode(raw[:], line); err != nil || n != 32 {
			return nil, fmt.Errorf("hash %d is malformed", len(p.path))
		}
		p.path = append(p.path, tlog.Hash(raw[:32]))
	}
}

// check verifies that leaf stands at p's index below c.
func (p *logProof) check(c *checkpoint, leaf []byte) error {
	if p.index >= c.size {
		return fmt.Errorf("index %d in a log of %d", p.index, c.size)
	}
	if tlog.CheckRecord(p.path, int64(c.size), tlog.Hash(c.root), int64(p.index), tlog.RecordHash(leaf)) != nil {
		return fmt.Errorf("not included at index %d of %d", p.index, c.size)
	}
	return nil
}

// maxConsistency is the length of the longest consistency proof: an audit path and one node more.
const maxConsistency = maxPath + 1

// before is the tree head over the leaves before a proven one: the hashes of its audit path that stand to the left cover them
// exactly (RFC 6962 section 2.1.1 and 2.1). path must have been checked for index and size.
func before(path tlog.RecordProof, index, size uint64) Hash {
	var left []tlog.Hash // from the largest subtree to the smallest
	for n := len(path) - 1; n >= 0; n-- {
		half := uint64(1) << (bits.Len64(size-1) - 1)
		if index < half {
			size = half
			continue
		}
		left = append(left, path[n])
		index, size = index-half, size-half
	}
	if len(left) == 0 {
		return EmptyRoot
	}
	h := left[len(left)-1]
	for i := len(left) - 2; i >= 0; i-- {
		h = tlog.NodeHash(left[i], h)
	}
	return Hash(h)
}

// check verifies that c is consistent with the pin.
func (p *PinProof) check(c *checkpoint) error {
	switch {
	case p.Size == 0 || p.Size > maxTree:
		return fmt.Errorf("a pin of size %d", p.Size)
	case p.Size == c.size && len(p.Proof) == 0 && p.Root == c.root:
		return nil
	}
	proof := make(tlog.TreeProof, len(p.Proof))
	for i, h := range p.Proof {
		proof[i] = tlog.Hash(h)
	}
	var err error
	if p.Size <= c.size {
		err = tlog.CheckTree(proof, int64(c.size), tlog.Hash(c.root), int64(p.Size), tlog.Hash(p.Root))
	} else {
		err = tlog.CheckTree(proof, int64(p.Size), tlog.Hash(p.Root), int64(c.size), tlog.Hash(c.root))
	}
	if err != nil {
		return fmt.Errorf("the log of %d leaves is not consistent with the tree pinned at size %d", c.size, p.Size)
	}
	return nil
}
