package receiptlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/client"
	"github.com/transparency-dev/tessera/fsck"
	"golang.org/x/mod/sumdb/note"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/region/wal"
)

// Problem is one thing that is not as it must be.
type Problem struct {
	Where string `json:"where"` // "block 17 (incarnation 5f.., seq 3)", "log leaf 4", "checkpoint"
	What  string `json:"what"`
}

// Report is what an audit of a directory found.
type Report struct {
	Origin         string    `json:"origin"`
	CheckpointSize uint64    `json:"checkpoint_size"`
	Headers        uint64    `json:"headers"` // under the checkpoint
	KeyStatements  uint64    `json:"key_statements"`
	Blocks         uint64    `json:"blocks"` // with records
	Records        uint64    `json:"records"`
	Decisions      uint64    `json:"decisions"`
	Outcomes       uint64    `json:"outcomes"`
	Unlogged       uint64    `json:"unlogged"` // committed blocks whose header no signed checkpoint covers yet
	Unsealed       uint64    `json:"unsealed"` // records of the write-ahead log that are in no block yet
	Incarnations   uint64    `json:"incarnations"`
	Sealed         bool      `json:"sealed"`
	Problems       []Problem `json:"problems"`
}

// Fsck audits a state directory that nobody serves from: the checkpoint's signatures, every tile and leaf of the log against
// it, the chain of key statements and that every header names the key in force and was made within its time (receipt.KeyAudit), the
// chain of headers, every record of every block against its header, its evidence against its commitment, the indices by
// which receipts are found, the records of the write-ahead log, and that every ordinal is a record or declared lost. It changes
// nothing. progress is called with the leaves done and their number. An error means that the audit could not be done; what it
// found wrong is in the report.
func Fsck(ctx context.Context, dir string, log *slog.Logger, progress func(done, total uint64)) (_ *Report, err error) {
	return fsckOn(ctx, dir, wal.Config{Dir: filepath.Join(dir, "wal")}, log, progress)
}

func fsckOn(ctx context.Context, dir string, walConfig wal.Config, log *slog.Logger, progress func(done, total uint64)) (_ *Report, err error) {
	lock, err := lockDir(dir, false)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	id, err := readIdentity(dir)
	if err != nil {
		return nil, err
	}
	st, err := openStore(dir, log, nil, true)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, st.close()) }()
	verifier, err := keys.Verifier(id.Identity)
	if err != nil {
		return nil, fmt.Errorf("read log.json: identity key: %w", err)
	}
	a := &audit{store: st, wal: walConfig, id: id, verifier: verifier, report: &Report{Origin: id.Origin}, tree: client.FileFetcher{Root: filepath.Join(dir, "log")},
		byHeader: map[receipt.Hash]uint64{}, last: map[[16]byte]receipt.Header{}, decided: map[[16]byte]decided{},
		keys: receipt.NewKeyAudit(id.Origin, verifier), so: (&compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}).NewEmptyRange(0)}
	return a.report, a.run(ctx, progress)
}

type audit struct {
	store    *store
	wal      wal.Config
	id       identity
	verifier note.Verifier
	report   *Report
	tree     client.FileFetcher
	byHeader map[receipt.Hash]uint64     // block number by leaf hash of its header
	last     map[[16]byte]receipt.Header // last header by incarnation
	prev     receipt.Hash                // leaf hash of the last distinct header
	decided  map[[16]byte]decided        // decisions seen
	keys     *receipt.KeyAudit           // of the whole log
	inForce  string                      // daily key of the last statement
	so       *compact.Range              // the leaves so far
	hashes   []receipt.Hash              // of the log's leaves
	released uint64                      // ordinals below this stand in blocks
	present  []wal.Range                 // ordinals of records, as they come
	lost     []wal.Range                 // declared by headers, or named by the write-ahead log
}

// decided is a decision that the audit has met.
type decided struct {
	block    uint64
	answered bool // it has an outcome
}

func (a *audit) problem(where, format string, args ...any) {
	a.report.Problems = append(a.report.Problems, Problem{where, fmt.Sprintf(format, args...)})
}

func (a *audit) run(ctx context.Context, progress func(done, total uint64)) error {
	total := a.indexBlocks()
	seen := map[uint64]bool{}
	if err := a.log(ctx, seen, progress); err != nil {
		return err
	}
	for n := range total {
		if !seen[n] {
			a.unlogged(n)
		}
	}
	a.places(total)
	a.pending(total)
	a.everyKey()
	a.unsealed()
	a.ordinals()
	return nil
}

// log checks the transparency log and the blocks under its signed checkpoint.
func (a *audit) log(ctx context.Context, seen map[uint64]bool, progress func(done, total uint64)) error {
	raw, err := a.tree.ReadCheckpoint(ctx)
	if err != nil {
		a.problem("checkpoint", "cannot be read: %v", err)
		return nil
	}
	if _, err := note.Open(raw, note.VerifierList(a.verifier)); err != nil {
		a.problem("checkpoint", "is not signed by the identity key: %v", err)
		return nil
	}
	cp, err := parseCheckpoint(raw)
	if err != nil {
		a.problem("checkpoint", "%v", err)
		return nil
	}
	a.report.CheckpointSize = cp.size
	if err := checkTree(ctx, a.tree.Root, a.verifier); err != nil {
		a.problem("log", "%v", err)
	}
	// Tessera's own audit: every leaf hash and tile against the root. It logs to standard error when it fails.
	f := fsck.New(a.id.Origin, a.verifier, a.tree, hashBundle, fsck.Opts{N: 2})
	if err := f.Check(ctx); err != nil {
		a.problem("log", "tiles do not match the signed checkpoint: %v", err)
	}
	for leaf, err := range logLeaves(ctx, a.tree, 0, cp.size) {
		if err != nil {
			a.problem("log", "%v", err)
			break
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		a.leaf(leaf, seen)
		progress(leaf.index+1, cp.size)
	}
	a.report.Sealed = a.keys.Seal() != nil
	a.daily(raw)
	return nil
}

// indexBlocks reads every local header, and returns how many there should be.
func (a *audit) indexBlocks() uint64 {
	var c chain
	if err := a.store.loadChain(&c); err != nil {
		a.problem("blocks", "%v", err)
	}
	a.released = c.Released
	for n := range c.Next {
		leaf, err := a.store.header(n)
		switch {
		case err != nil:
			a.problem(fmt.Sprintf("block %d", n), "%v", err)
		case leaf == nil:
			a.problem(fmt.Sprintf("block %d", n), "its header is missing")
		default:
			a.byHeader[receipt.LeafHash(leaf)] = n
			if h, err := receipt.ParseHeader(leaf); err != nil {
				a.problem(fmt.Sprintf("block %d", n), "%v", err)
			} else if h.LostFrom < h.LostTo {
				a.lost = append(a.lost, wal.Range{From: h.LostFrom, To: h.LostTo})
			}
		}
	}
	return c.Next
}

// leaf checks one leaf of the log.
func (a *audit) leaf(leaf logLeaf, seen map[uint64]bool) {
	where := fmt.Sprintf("log leaf %d", leaf.index)
	hash := receipt.LeafHash(leaf.data)
	if err := a.key(leaf); err != nil {
		a.problem(where, "%v", err)
	}
	a.hashes = append(a.hashes, hash)
	if err := a.so.Append(hash[:], nil); err != nil {
		a.problem(where, "%v", err)
	}
	if receipt.RootNeeded(leaf.data) {
		return
	}
	h, err := receipt.ParseHeader(leaf.data)
	if err != nil {
		return // named by key
	}
	n, known := a.byHeader[hash]
	if known && seen[n] {
		return // an equal duplicate, legal after a crash
	}
	a.report.Headers++
	a.chain(where, h, hash)
	if !known {
		if h.LogID == a.id.logID() {
			a.problem(headerName(h), "is in the log, but its block is not here: %d records are gone", h.Count)
		}
		return
	}
	seen[n] = true
	a.block(n, h)
}

// chain checks that headers follow each other.
func (a *audit) chain(where string, h *receipt.Header, hash receipt.Hash) {
	if h.Origin != a.id.Origin || h.LogID != a.id.logID() {
		a.problem(where, "header of another log: %s", h.Origin)
		return
	}
	last, ok := a.last[h.Incarnation]
	switch {
	case !ok:
		a.report.Incarnations++
		if h.Seq != 0 || h.Kind != receipt.HeaderOpen {
			a.problem(headerName(h), "begins an incarnation with seq %d, kind %s", h.Seq, h.Kind)
		}
	case h.Seq != last.Seq+1:
		a.problem(headerName(h), "follows seq %d of its incarnation: %s", last.Seq,
			map[bool]string{true: "two headers for one seq: equivocation", false: "headers are missing"}[h.Seq <= last.Seq])
	case last.Kind == receipt.HeaderFinal:
		a.problem(headerName(h), "follows the final header of its incarnation")
	}
	if h.Instance != a.id.Instance {
		a.problem(headerName(h), "is of instance %q, this log is of %q", h.Instance, a.id.Instance)
	}
	if h.Prev != a.prev {
		a.problem(headerName(h), "does not follow the header before it")
	}
	if ok && h.Time.Before(last.Time) {
		a.problem(headerName(h), "is older than the header before it")
	}
	a.last[h.Incarnation], a.prev = *h, hash
}

// block checks the records of block n against its header.
func (a *audit) block(n uint64, h *receipt.Header) {
	if h.Count == 0 {
		return
	}
	where := fmt.Sprintf("block %d (%s)", n, headerName(h))
	leaves, err := a.store.records(n, h.Count)
	if err != nil {
		a.problem(where, "%v", err)
		return
	}
	hashes := make([]receipt.Hash, len(leaves))
	for i, leaf := range leaves {
		hashes[i] = receipt.LeafHash(leaf)
	}
	if receipt.NewTree(hashes).Root() != h.Root {
		a.problem(where, "its records do not hash to the root in its header")
		return
	}
	a.report.Blocks++
	next := h.First
	for i, leaf := range leaves {
		a.report.Records++
		ordinal, err := a.record(n, leaf)
		if err != nil {
			a.problem(fmt.Sprintf("%s record %d", where, i), "%v", err)
			continue
		}
		// Ordinals are dense, but for those a machine crash lost: a recovered block may span such a range.
		if ordinal != next && (!h.Recovered || ordinal < next) {
			a.problem(fmt.Sprintf("%s record %d", where, i), "has ordinal %d, want %d", ordinal, next)
		}
		next = ordinal + 1
		a.has(ordinal)
	}
	a.beside(where, n, leaves)
}

func (a *audit) record(n uint64, leaf []byte) (ordinal uint64, err error) {
	if bytes.HasPrefix(leaf, []byte(receipt.DecisionPrefix)) {
		d, err := receipt.ParseDecision(leaf)
		if err != nil {
			return 0, err
		}
		a.report.Decisions++
		uuid, _, err := receipt.ParseID(d.ID)
		if err != nil {
			return 0, err
		}
		if _, twice := a.decided[uuid]; twice {
			return d.Ordinal, fmt.Errorf("second decision for receipt %s", d.ID)
		}
		a.decided[uuid] = decided{block: n}
		return d.Ordinal, nil
	}
	o, err := receipt.ParseOutcome(leaf)
	if err != nil {
		return 0, err
	}
	a.report.Outcomes++
	uuid, _, err := receipt.ParseID(o.ID)
	if err != nil {
		return 0, err
	}
	had, ok := a.decided[uuid]
	switch {
	case !ok:
		return o.Ordinal, fmt.Errorf("outcome without decision for receipt %s", o.ID)
	case had.answered && !o.Late:
		return o.Ordinal, fmt.Errorf("second outcome for receipt %s", o.ID)
	}
	a.decided[uuid] = decided{had.block, true}
	return o.Ordinal, nil
}

// key checks a leaf against the daily keys: those before it, and what the block store knows of it.
func (a *audit) key(leaf logLeaf) error {
	root := receipt.EmptyRoot
	if receipt.RootNeeded(leaf.data) && leaf.index > 0 {
		r, err := a.so.GetRootHash(nil)
		if err != nil {
			return err
		}
		root = receipt.Hash(r)
	}
	if err := a.keys.Leaf(leaf.index, root, leaf.data); err != nil {
		return err
	}
	if !bytes.HasPrefix(leaf.data, []byte(receipt.KeyPrefix)) {
		return nil
	}
	a.report.KeyStatements++
	if k, ok := a.keys.Current(); ok {
		a.inForce = k.Key
	}
	known, err := a.store.get(key(kKey, leaf.index))
	if err == nil && !bytes.Equal(known, leaf.data) {
		err = errors.New("key statement that the block store does not know: bundles cannot be made under it")
	}
	return err
}

// daily checks that the daily key in force signed the checkpoint, and that the block store's state of the keys can be read.
func (a *audit) daily(raw []byte) {
	if st, err := a.store.loadKeys(); err != nil {
		a.problem("blocks", "%v", err)
	} else if st == nil {
		a.problem("blocks", "the state of the daily keys is missing")
	}
	if a.report.CheckpointSize == 0 {
		return
	}
	v, err := keys.Verifier(a.inForce)
	if err == nil {
		_, err = note.Open(raw, note.VerifierList(v))
	}
	if err != nil {
		a.problem("checkpoint", "is not signed by the daily key in force, %s: %v", a.inForce, err)
	}
}

// unlogged checks a committed block that the signed checkpoint does not cover: its records must be there all the same.
func (a *audit) unlogged(n uint64) {
	h, ok, err := a.store.parseHeaderAt(n)
	if err != nil || !ok {
		return // named by indexBlocks
	}
	a.report.Unlogged++
	if h.LogID == a.id.logID() {
		a.block(n, h)
	}
}

func headerName(h *receipt.Header) string {
	return fmt.Sprintf("incarnation %x, seq %d", h.Incarnation[:4], h.Seq)
}

func hashBundle(b []byte) ([][]byte, error) {
	var eb api.EntryBundle
	if err := eb.UnmarshalText(b); err != nil {
		return nil, err
	}
	out := make([][]byte, len(eb.Entries))
	for i, e := range eb.Entries {
		out[i] = rfc6962.DefaultHasher.HashLeaf(e)
	}
	return out, nil
}
