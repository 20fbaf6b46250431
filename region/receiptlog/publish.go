package receiptlog

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"filippo.io/torchwood"
	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/client"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/sys/unix"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/rotation"
)

// ctxMutex is a mutex whose waiters give up with their context. Waiters get it in the order they came.
type ctxMutex chan struct{}

func newCtxMutex() ctxMutex { return make(ctxMutex, 1) }

func (m ctxMutex) lock(ctx context.Context) error {
	select {
	case m <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (m ctxMutex) unlock() { <-m }

// logReader is what is read of the transparency log: Tessera's reader, or files of a sealed one.
type logReader interface {
	ReadCheckpoint(ctx context.Context) ([]byte, error)
	ReadTile(ctx context.Context, level, index uint64, p uint8) ([]byte, error)
	ReadEntryBundle(ctx context.Context, index uint64, p uint8) ([]byte, error)
	IntegratedSize(ctx context.Context) (uint64, error)
}

// openTree opens the transparency log.
func (l *Log) openTree(ctx context.Context) error {
	dir := filepath.Join(l.cfg.Dir, "log")
	verifier, err := keys.Verifier(l.id.Identity)
	if err != nil {
		return fmt.Errorf("open log: identity key: %w", err)
	}
	if err := checkTree(ctx, dir, verifier); err != nil {
		return err
	}
	driver, err := posix.New(ctx, posix.Config{Path: dir})
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	// Tessera's background work outlives ctx, which ends with Open: Close cancels it after the shutdown has published.
	treeCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	opts := tessera.NewAppendOptions().WithCheckpointSigner(l.identity, l.keys.Signer()).WithBatching(logBatchSize, logBatchAge).
		WithCheckpointInterval(min(max(l.cfg.SealEvery/2, checkpointPoll), time.Second)).WithGarbageCollectionInterval(logGC)
	app, stop, reader, err := tessera.NewAppender(treeCtx, driver, opts)
	if err != nil {
		cancel()
		return fmt.Errorf("open log: %w", err)
	}
	l.add, l.stopLog, l.cancelLog, l.reader = app.Add, stop, cancel, reader
	return nil
}

// addLeaf appends one leaf to the transparency log and returns its index once it is integrated (durable, not yet signed). The
// caller holds addMu.
func (l *Log) addLeaf(ctx context.Context, leaf []byte) (uint64, error) {
	// Tessera panics when it cannot lock its tree. On a directory that has become read-only the records had better wait, durable and
	// unsigned, than the process end.
	if err := unix.Access(filepath.Join(l.cfg.Dir, "log", ".state"), unix.W_OK); err != nil {
		return 0, fmt.Errorf("log directory: %w", err)
	}
	idx, err := l.add(ctx, tessera.NewEntry(leaf))()
	if err != nil {
		return 0, err
	}
	return idx.Index, nil
}

// runPublisher adds the headers of committed blocks to the transparency log, in order.
func (l *Log) runPublisher(ctx context.Context) error {
	retry := time.NewTimer(0)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-l.wake:
		case <-retry.C:
		}
		if err := l.addOneByOne(ctx); err != nil && ctx.Err() == nil {
			l.log.WarnContext(ctx, "cannot add to the log, trying again", "error", err)
		}
		retry.Reset(time.Second)
	}
}

// addOneByOne adds what is committed, and lets a key change come between any two headers: when headers come faster than they can be
// added, it might never come to an end.
func (l *Log) addOneByOne(ctx context.Context) error {
	for more := true; more; {
		if err := l.addMu.lock(ctx); err != nil {
			return err
		}
		next := l.added.Load()
		err := l.addHeaders(ctx, next+1)
		l.addMu.unlock()
		if err != nil {
			return err
		}
		more = next < l.blocks.Load()
	}
	return nil
}

// addHeaders adds the committed headers of the blocks below end that are not in the log yet. The caller holds addMu.
func (l *Log) addHeaders(ctx context.Context, end uint64) error {
	for n := l.added.Load(); n < min(end, l.blocks.Load()); n++ {
		if _, known, err := l.store.index(n); err != nil {
			return err
		} else if !known {
			leaf, err := l.store.header(n)
			if err != nil {
				return err
			}
			idx, err := l.addLeaf(ctx, leaf)
			if err != nil {
				return fmt.Errorf("add header of block %d: %w", n, err)
			}
			// Not synced: a crash here adds the same bytes again, which is legal.
			if err := l.store.setIndex(n, idx); err != nil {
				return err
			}
		}
		l.added.Store(n + 1)
	}
	return nil
}

// Hold stops new leaves, for a change of the daily key: when it returns, every committed header is in the tree, and no header is
// made, committed or added until release is called. Requests go on: their records wait in the WAL. It gives up with ctx. Part of
// rotation.Tree.
func (l *Log) Hold(ctx context.Context) (head rotation.Head, release func(), err error) {
	if err := l.faulted(); err != nil {
		return rotation.Head{}, nil, err
	}
	if err := l.addMu.lock(ctx); err != nil {
		return rotation.Head{}, nil, fmt.Errorf("hold the log: %w", err)
	}
	var once sync.Once
	undo := l.addMu.unlock
	defer func() {
		if err != nil {
			undo()
			err = fmt.Errorf("hold the log: %w", err)
		}
	}()
	// What waits now, while blocks may still close: the sealer is then held up for the few headers that came meanwhile.
	if err := l.addHeaders(ctx, l.blocks.Load()); err != nil {
		return rotation.Head{}, nil, err
	}
	if err := l.headerMu.lock(ctx); err != nil {
		return rotation.Head{}, nil, err
	}
	undo = func() {
		l.headerMu.unlock()
		l.addMu.unlock()
	}
	if err := l.addHeaders(ctx, l.blocks.Load()); err != nil {
		return rotation.Head{}, nil, err
	}
	if head, err = l.head(ctx); err != nil {
		return rotation.Head{}, nil, err
	}
	return head, func() { once.Do(undo) }, nil
}

// head is the integrated tree, its root computed from the tiles.
func (l *Log) head(ctx context.Context) (rotation.Head, error) {
	size, err := l.reader.IntegratedSize(ctx)
	if err != nil {
		return rotation.Head{}, fmt.Errorf("read log: %w", err)
	}
	root, err := rootOf(ctx, l.reader.ReadTile, size)
	if err != nil {
		return rotation.Head{}, fmt.Errorf("read log: %w", err)
	}
	return rotation.Head{Size: size, Root: root}, nil
}

// rootOf computes the root of the first size leaves from the tiles.
func rootOf(ctx context.Context, tiles client.TileFetcherFunc, size uint64) (receipt.Hash, error) {
	if size == 0 {
		return receipt.EmptyRoot, nil
	}
	nodes, err := client.FetchRangeNodes(ctx, size, tiles)
	if err != nil {
		return receipt.Hash{}, err
	}
	r, err := (&compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}).NewRange(0, size, nodes)
	if err != nil {
		return receipt.Hash{}, err
	}
	root, err := r.GetRootHash(nil)
	if err != nil {
		return receipt.Hash{}, err
	}
	return receipt.Hash(root), nil
}

// Put appends a leaf that is no header, a key statement or a seal, while the caller holds the log. Part of rotation.Tree.
func (l *Log) Put(ctx context.Context, leaf []byte) (index uint64, err error) {
	if err := l.faulted(); err != nil {
		return 0, err
	}
	return l.addLeaf(ctx, leaf)
}

// Leaf reads an integrated leaf; rotation.ErrNoLeaf beyond the end. Part of rotation.Tree.
func (l *Log) Leaf(ctx context.Context, index uint64) ([]byte, error) {
	size, err := l.reader.IntegratedSize(ctx)
	if err != nil {
		return nil, fmt.Errorf("read log: %w", err)
	}
	if index >= size {
		return nil, fmt.Errorf("leaf %d of %d: %w", index, size, rotation.ErrNoLeaf)
	}
	return readLeaf(ctx, l.reader, index, size)
}

// Published waits until a signed checkpoint of at least size can be read. Part of rotation.Tree.
func (l *Log) Published(ctx context.Context, size uint64) error {
	tick := time.NewTicker(publishedPoll)
	defer tick.Stop()
	for {
		cp, err := l.checkpoint(ctx)
		if err == nil && cp.size >= size {
			return nil
		}
		if err := l.faulted(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for a checkpoint of %d leaves: %w", size, errors.Join(context.Cause(ctx), err))
		case <-tick.C:
		}
	}
}

// checkpoint reads the latest signed checkpoint back from the log. While there is none it is that of the empty tree, unsigned.
func (l *Log) checkpoint(ctx context.Context) (*checkpoint, error) {
	raw, err := l.reader.ReadCheckpoint(ctx)
	if errors.Is(err, os.ErrNotExist) {
		return &checkpoint{root: receipt.EmptyRoot}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read checkpoint: %w", err)
	}
	if old := l.cp.Load(); old != nil && string(old.raw) == string(raw) {
		return old, nil
	}
	cp, err := parseCheckpoint(raw)
	if err != nil {
		return nil, err
	}
	for { // of two who read it at the same time, the newer one stays
		old := l.cp.Load()
		if old != nil && old.size > cp.size || l.cp.CompareAndSwap(old, cp) {
			return cp, nil
		}
	}
}

func parseCheckpoint(raw []byte) (*checkpoint, error) {
	text, _, ok := cutNote(raw)
	if !ok {
		return nil, errors.New("read checkpoint: not a signed note")
	}
	c, err := torchwood.ParseCheckpoint(text)
	if err != nil {
		return nil, fmt.Errorf("read checkpoint: %w", err)
	}
	return &checkpoint{raw: raw, size: uint64(c.N), root: receipt.Hash(c.Hash)}, nil
}
