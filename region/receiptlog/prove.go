package receiptlog

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"filippo.io/torchwood"
	"github.com/transparency-dev/tessera/client"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/knhk/sidecar/crypto/receipt"
)

// prover makes bundles under one checkpoint. Not safe for concurrent use.
type prover struct {
	l       *Log
	cp      *checkpoint
	hashes  tlog.HashReader
	headers map[uint64]receipt.Proof // by block: proofs are the same for every receipt of a block
	keys    []receipt.Proof          // the statement of the key that signed the checkpoint
	tail    receipt.Proof            // the last leaf, which names that statement
	pins    []receipt.PinProof
}

func (l *Log) newProver(ctx context.Context) (*prover, error) {
	cp, err := l.checkpoint(ctx)
	if err != nil {
		return nil, err
	}
	if cp.size == 0 {
		return nil, ErrPending
	}
	p := &prover{l: l, cp: cp, headers: map[uint64]receipt.Proof{}, hashes: l.hashReader(ctx, cp.size, cp.root)}
	index, statement, err := l.store.statementAt(cp.size)
	if err != nil {
		return nil, err
	}
	tail, err := readLeaf(ctx, l.reader, cp.size-1, cp.size)
	if err != nil {
		return nil, err
	}
	first, err := p.prove(index)
	if err != nil {
		return nil, err
	}
	last, err := p.prove(cp.size - 1)
	if err != nil {
		return nil, err
	}
	p.keys = []receipt.Proof{{Leaf: statement, Text: first}}
	p.tail = receipt.Proof{Leaf: tail, Text: last}
	for _, pin := range *l.pins.Load() {
		larger := p.hashes
		if pin.Size > cp.size { // revoked a moment ago
			larger = l.hashReader(ctx, pin.Size, pin.Root)
		}
		proof, err := receipt.ProvePin(pin, cp.size, larger)
		if err != nil {
			return nil, err
		}
		p.pins = append(p.pins, proof)
	}
	return p, nil
}

func (l *Log) hashReader(ctx context.Context, size uint64, root receipt.Hash) tlog.HashReader {
	return torchwood.TileHashReaderWithContext(ctx, tlog.Tree{N: int64(size), Hash: tlog.Hash(root)}, tileReader{l.reader})
}

// prove makes the tlog-proof of one leaf of the log.
func (p *prover) prove(index uint64) ([]byte, error) {
	proof, err := tlog.ProveRecord(int64(p.cp.size), int64(index), p.hashes)
	if err != nil {
		return nil, fmt.Errorf("prove leaf %d: %w", index, err)
	}
	return torchwood.FormatProof(int64(index), proof, p.cp.raw), nil
}

func (p *prover) bundle(d *found, outcomes []*found, evidence bool) ([]byte, error) {
	b := receipt.Bundle{Keys: p.keys, Tail: p.tail, Pins: p.pins}
	recs := []*found{d}
	for _, o := range outcomes {
		if !o.sealed {
			break
		}
		if idx, known, err := p.l.store.index(o.block); err != nil {
			return nil, err
		} else if !known || idx >= p.cp.size {
			break
		}
		recs = append(recs, o)
	}
	at := map[uint64]int{}
	for _, f := range recs {
		if !f.sealed {
			return nil, ErrPending
		}
		if _, ok := at[f.block]; !ok {
			h, err := p.header(f.block)
			if err != nil {
				return nil, err
			}
			at[f.block] = len(b.Headers)
			b.Headers = append(b.Headers, h)
		}
		tree, err := p.l.tree(f.block)
		if err != nil {
			return nil, err
		}
		b.Records = append(b.Records, receipt.Record{
			Leaf: f.leaf, Header: at[f.block], Index: uint64(f.pos), Size: uint64(tree.Len()), Path: tree.Path(int(f.pos)),
		})
	}
	if evidence {
		raw, err := p.l.store.record(kEvidence, d.block, uint64(d.pos))
		if err != nil {
			return nil, err
		}
		ev, err := receipt.ParseEvidence(raw)
		if err != nil {
			return nil, err
		}
		b.Evidence = ev
	}
	return b.Marshal()
}

func (p *prover) header(n uint64) (receipt.Proof, error) {
	if h, ok := p.headers[n]; ok {
		return h, nil
	}
	idx, known, err := p.l.store.index(n)
	if err != nil {
		return receipt.Proof{}, err
	}
	if !known || idx >= p.cp.size {
		return receipt.Proof{}, ErrPending
	}
	leaf, err := p.l.store.header(n)
	if err != nil {
		return receipt.Proof{}, err
	}
	proof, err := p.prove(idx)
	if err != nil {
		return receipt.Proof{}, err
	}
	h := receipt.Proof{Leaf: leaf, Text: proof}
	if len(p.headers) > 64 {
		clear(p.headers)
	}
	p.headers[n] = h
	return h, nil
}

// tree is the inner tree of block n, rebuilt from its records: leaf hashes are not stored while the records are.
func (l *Log) tree(n uint64) (*receipt.Tree, error) {
	if t, ok := l.trees.Get(n); ok {
		return t, nil
	}
	h, ok, err := l.store.parseHeaderAt(n)
	if err != nil || !ok {
		return nil, errors.Join(err, fmt.Errorf("block %d is missing", n))
	}
	hashes := make([]receipt.Hash, 0, min(h.Count, 1<<16))
	if err := l.store.each(n, h.Count, func(_ uint32, leaf []byte) error {
		hashes = append(hashes, receipt.LeafHash(leaf))
		return nil
	}); err != nil {
		return nil, err
	}
	t := receipt.NewTree(hashes)
	if t.Root() != h.Root {
		return nil, fmt.Errorf("block %d: records do not hash to the header's root: run knhk fsck", n)
	}
	l.trees.Add(n, t)
	return t, nil
}

// tileReader serves torchwood from Tessera's reader.
type tileReader struct{ r logReader }

func (t tileReader) ReadTiles(ctx context.Context, tiles []tlog.Tile) ([][]byte, error) {
	out := make([][]byte, len(tiles))
	for i, tile := range tiles {
		b, err := t.r.ReadTile(ctx, uint64(tile.L), uint64(tile.N), uint8(tile.W%256))
		if err != nil {
			return nil, err
		}
		// A full tile may stand where a partial one was asked for.
		out[i] = b[:min(len(b), tile.W*tlog.HashSize)]
	}
	return out, nil
}

func (t tileReader) SaveTiles([]tlog.Tile, [][]byte) {}

func (t tileReader) ReadEndpoint(context.Context, string) ([]byte, error) {
	return nil, errors.New("not a file tree")
}

type logLeaf struct {
	index uint64
	data  []byte
}

// bundleReader is the part of a log that leaves are read from.
type bundleReader interface {
	ReadEntryBundle(ctx context.Context, index uint64, p uint8) ([]byte, error)
}

// readLeaf reads one leaf of a log of size leaves.
func readLeaf(ctx context.Context, r bundleReader, index, size uint64) ([]byte, error) {
	for leaf, err := range logLeaves(ctx, r, index, size) {
		return leaf.data, err
	}
	return nil, fmt.Errorf("read log leaf %d of %d: there is none", index, size)
}

// logLeaves yields the leaves [from, size) of the log.
func logLeaves(ctx context.Context, r bundleReader, from, size uint64) iter.Seq2[logLeaf, error] {
	return func(yield func(logLeaf, error) bool) {
		for i := from; i < size; {
			b, err := client.GetEntryBundle(ctx, r.ReadEntryBundle, i/256, size)
			if err != nil {
				yield(logLeaf{}, fmt.Errorf("read log leaf %d: %w", i, err))
				return
			}
			for end := min(size, i-i%256+256); i < end; i++ {
				if i%256 >= uint64(len(b.Entries)) {
					yield(logLeaf{}, fmt.Errorf("read log leaf %d: its bundle holds %d entries only", i, len(b.Entries)))
					return
				}
				if !yield(logLeaf{i, b.Entries[i%256]}, nil) {
					return
				}
			}
		}
	}
}
