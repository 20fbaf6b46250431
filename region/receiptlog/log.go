package receiptlog

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/transparency-dev/tessera"
	"golang.org/x/mod/sumdb/note"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/rotation"
	"github.com/knhk/sidecar/region/wal"
)

const (
	signTimeout     = 5 * time.Second
	publishedPoll   = 20 * time.Millisecond
	firstCheckpoint = 10 * time.Second      // how long a new log waits for its first checkpoint
	logBatchAge     = 50 * time.Millisecond // facts: batch age must exceed flush time
	logBatchSize    = 256
	logGC           = time.Second // about 100 bundles per interval
	shutdownWait    = 10 * time.Second
	cachedBlocks    = 4 // inner trees kept for proofs
	checkpointPoll  = 100 * time.Millisecond
	maxRequestBytes = 96 << 10 // of evidence; Envoy's own limit for all headers is 60 KiB by default
	maxRecordBytes  = 512 << 10
	walOverhead     = 16       // kind and length before a leaf
	reuseBytes      = 1 << 20  // of a block's memory that is always kept for the next one
	minFree         = 16 << 20 // bytes of disk below which nothing is admitted
	sealFree        = 4 << 20  // bytes of disk that must be left after a block
	maxBacklog      = 16       // headers that wait to be added, above which blocks grow instead of becoming more
	largeBlock      = 8 << 20  // bytes at which a block is closed all the same
)

// Errors of Decide that callers branch on. Each carries the reason with which the request is refused.
var (
	ErrUnavailable = errors.New("receipt log is not available")
	ErrFull        = errors.New("receipt log is full")
	ErrUnsigned    = errors.New("records have gone unsigned for too long")
	ErrTooLarge    = errors.New("request is too large to be recorded")
	ErrStopping    = errors.New("receipt log is stopping")
	ErrNotFound    = errors.New("no such receipt")
	ErrPending     = errors.New("receipt is not under a signed checkpoint yet")
	ErrSealed      = errors.New("receipt log is sealed: nothing is recorded in it any more; start a successor with a state_dir and an identity key of its own")
	ErrInUse       = errors.New("another knhk owns it")
)

// Config is what a Log needs. All fields are required unless they say otherwise.
type Config struct {
	Dir      string // state directory; made if missing
	Origin   string // configured origin; the log's own is Origin "/" log id
	Instance string // replica name in receipt ids

	Identity       keys.Signer // signs every checkpoint; whoever holds it can fork the log. Nil will do for a sealed log
	Daily          keys.Store  // makes and holds daily keys, under a label that is this log's alone. Nil will do for a sealed log
	DailyLabel     string
	DailyAlgorithm keys.Algorithm
	DailyMaxAge    time.Duration // age at which a daily key refuses to sign; it is replaced at two thirds; (0, 24h]

	// Succeeds names the sealed log that this one follows; nil for none. It is said in the first leaf of a new log.
	Succeeds *receipt.Quote
	// ReplaceDailyKey opens a directory whose key store has gone past it, a restored copy: its daily key is replaced at once.
	ReplaceDailyKey bool

	SealEvery      time.Duration // > 0
	Heartbeat      time.Duration // header without records after this much silence
	MaxUnsigned    time.Duration
	OutcomeTimeout time.Duration

	SegmentBytes int64 // of the WAL
	MaxBytes     int64 // of the WAL

	Log *slog.Logger
	Now func() time.Time // default time.Now

	BlockFS vfs.FS                 // default the operating system's; tests give one that fails
	WALFS   wal.FS                 // likewise
	BootID  func() (string, error) // names the kernel's boot; default the kernel's own word
}

// Log is one replica's receipt log. Methods are safe for concurrent use once Open has returned. Locks are taken in the order keyMu,
// addMu, headerMu, mu: see doc.go.
type Log struct {
	cfg      Config
	log      *slog.Logger
	id       identity
	logID    [16]byte
	lock     *os.File
	store    *store
	wal      *wal.WAL // nil when readOnly
	clock    *rotation.Clock
	before   time.Time // of the last block before Open
	identity note.Signer
	keys     *rotation.Manager
	pins     atomic.Pointer[[]receipt.Pin] // what bundles are shown to be consistent with
	readOnly bool                          // sealed before Open
	ended    atomic.Bool                   // the last block is closed, or being closed: what is recorded now is in none

	keyMu    ctxMutex        // held while keys change: Settle, Rotate, Revoke, Seal
	life     context.Context // ends with Close
	endLife  context.CancelFunc
	addMu    ctxMutex // held while leaves are added to the transparency log
	headerMu ctxMutex // held from the choice of a header's kind and key until it is committed

	add       tessera.AddFn
	stopLog   func(context.Context) error
	cancelLog context.CancelFunc
	reader    logReader
	trees     *lru.Cache[uint64, *receipt.Tree] // by block number
	refusing  atomic.Pointer[error]             // why Decide refuses; nil when it does not
	decisions atomic.Uint64
	blocks    atomic.Uint64 // blocks written, all incarnations
	counts    counts
	maxRecord int         // bytes of one WAL record
	lateMu    sync.Mutex  // held while an outcome is looked for and written that is not the first
	followed  atomic.Bool // subscribers is not empty

	// mu guards what follows. It is taken inside the WAL's append lock, so records enter open in the order of their ordinals.
	mu          sync.Mutex
	open        *block // records of no block yet
	sealing     *block // cut, not yet committed; nil otherwise
	subscribers map[chan<- Event]struct{}

	pending pendingSet // decisions without outcome
	crashed [][16]byte // those that a crash left; Run records their outcome

	// What follows is guarded by headerMu.
	chain      chain
	unanswered [][]openDecision // of the last blocks, by block; see putPending
	scratch    [3][]byte        // of putRecords
	reuse      struct {         // memory of the last block that was committed
		buf  []byte
		recs []rec
	}
	// added is the number of the next block whose header is not in the log yet. Written under addMu.
	added atomic.Uint64
	wake  chan struct{} // a block was committed

	// cp is the latest signed checkpoint read back from the log.
	cp atomic.Pointer[checkpoint]
	// uncovered holds the committed blocks that no signed checkpoint covers yet, in order.
	uncovered struct {
		sync.Mutex
		queue []uncoveredBlock
	}
}

// Event is one record that was written, for Tail. Leaf must not be changed.
type Event struct {
	ID   string
	Leaf []byte
}

type counts struct {
	lateOutcomes, duplicateOutcomes, foreignOutcomes, unknownOutcomes, recovered atomic.Uint64
}

// Open takes the directory, recovers what a crash left and starts the transparency log. Nothing is served before the state
// has been checked. The caller must then call Run, and Close after Run has returned.
func Open(ctx context.Context, cfg Config) (_ *Log, err error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.DailyMaxAge <= 0 || cfg.DailyMaxAge > MaxDailyAge {
		return nil, fmt.Errorf("open receipt log: daily key age %v: want more than 0 and at most %v", cfg.DailyMaxAge, MaxDailyAge)
	}
	if cfg.SealEvery <= 0 || cfg.Heartbeat <= 0 || cfg.MaxUnsigned <= 0 || cfg.OutcomeTimeout <= 0 {
		return nil, errors.New("open receipt log: seal, heartbeat, max_unsigned and outcome_timeout must be positive")
	}
	l := &Log{
		cfg: cfg, log: cfg.Log, maxRecord: int(min(maxRecordBytes, cfg.SegmentBytes/8)), subscribers: map[chan<- Event]struct{}{},
		wake: make(chan struct{}, 1), keyMu: newCtxMutex(), addMu: newCtxMutex(), headerMu: newCtxMutex(),
	}
	l.pins.Store(new([]receipt.Pin))
	l.life, l.endLife = context.WithCancel(context.WithoutCancel(ctx))
	var undo []func() error
	defer func() {
		if err != nil {
			for i := len(undo) - 1; i >= 0; i-- {
				err = errors.Join(err, undo[i]())
			}
		}
	}()
	if l.lock, err = lockDir(cfg.Dir, true); err != nil {
		return nil, err
	}
	undo = append(undo, l.lock.Close)
	if sealed, err := IsSealed(cfg.Dir); err != nil {
		return nil, fmt.Errorf("open receipt log: %w", err)
	} else if sealed {
		if done, err := l.openSealed(ctx); err != nil {
			return nil, err
		} else if done {
			return l, nil
		}
	}
	if cfg.Identity == nil || cfg.Daily == nil {
		return nil, errors.New("open receipt log: it is not sealed: identity key and store of daily keys are needed")
	}
	if err := l.room(); err != nil {
		return nil, fmt.Errorf("open receipt log: %w", err)
	}
	l.id, err = loadIdentity(cfg.Dir, cfg.Origin, cfg.Instance, func(origin string) (string, error) { return keys.VKey(origin, cfg.Identity.Public()) })
	if err != nil {
		return nil, err
	}
	l.logID = l.id.logID()
	if err := l.restorePolicy(); err != nil {
		return nil, err
	}
	identity, err := keys.NoteSigner(l.id.Origin, cfg.Identity, signTimeout)
	if err != nil {
		return nil, fmt.Errorf("open identity key: %w", err)
	}
	l.identity = guardedSigner{identity, l.faulted}
	if l.trees, err = lru.New[uint64, *receipt.Tree](cachedBlocks); err != nil {
		return nil, err
	}
	if l.store, err = openStore(cfg.Dir, l.log, cfg.BlockFS, false); err != nil {
		return nil, err
	}
	undo = append(undo, l.store.close)
	if l.wal, err = wal.Open(wal.Config{
		Dir: filepath.Join(cfg.Dir, "wal"), SegmentBytes: cfg.SegmentBytes, MaxBytes: cfg.MaxBytes, FS: cfg.WALFS, Log: l.log, BootID: cfg.BootID,
		MaxRecordBytes: l.maxRecord,
	}); err != nil {
		return nil, fmt.Errorf("open receipt log: %w", err)
	}
	undo = append(undo, l.wal.Close)
	if err := l.store.loadChain(&l.chain); err != nil {
		return nil, err
	}
	if err := cmp.Or(l.sameLog(), l.checkSuccession()); err != nil {
		return nil, err
	}
	l.before = l.chain.Time
	// Before the keys: what stands in the WAL says how late it is, too.
	replayed, err := l.replay()
	if err != nil {
		return nil, err
	}
	if err := l.checkEmpty(replayed); err != nil {
		return nil, err
	}
	l.clock = rotation.NewClock(cfg.Now, l.floor())
	if err := l.openKeys(ctx); err != nil {
		return nil, err
	}
	if err := l.openTree(ctx); err != nil {
		return nil, err
	}
	undo = append(undo, func() error { l.cancelLog(); return nil })
	l.keys.SetTree(l)
	if err := l.recover(ctx, replayed); err != nil {
		return nil, err
	}
	return l, nil
}

// Origin returns the origin of the log, log id included.
func (l *Log) Origin() string { return l.id.Origin }

// Before is the time of the last block that an earlier process has closed: until then it has certainly lived, and at most
// SealEvery, or Heartbeat without records, longer. Zero for a new log.
func (l *Log) Before() time.Time { return l.before }

// IdentityVKey returns the verifier key that policies and witnesses pin.
func (l *Log) IdentityVKey() string { return l.id.Identity }

// Policy returns the text of the policy file that verifies this log's bundles.
func (l *Log) Policy() []byte { return policyText(l.id) }

// Subscribe sends every record written from now on to ch until cancel is called. A full channel misses records: the log never
// waits for a reader.
func (l *Log) Subscribe(ch chan<- Event) (cancel func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.subscribers[ch] = struct{}{}
	l.followed.Store(true)
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.subscribers, ch)
		l.followed.Store(len(l.subscribers) > 0)
	}
}

func (l *Log) publish(event func() Event) {
	if !l.followed.Load() {
		return
	}
	e := event()
	l.mu.Lock()
	defer l.mu.Unlock()
	for ch := range l.subscribers {
		select {
		case ch <- e:
		default:
		}
	}
}

// Close writes the final header, publishes and signs what is there, and gives the directory back. Run must have returned; a change
// of keys that is under way gives up, and is finished by the next start.
func (l *Log) Close(ctx context.Context) error {
	l.Stop()
	if l.readOnly {
		l.endLife()
		return errors.Join(l.store.close(), l.lock.Close())
	}
	var errs []error
	ctx, cancel := context.WithTimeout(ctx, shutdownWait)
	defer cancel()
	l.endLife()
	_ = l.keyMu.lock(context.WithoutCancel(ctx)) // a change gives up when its signature does, and none begins
	l.keyMu.unlock()
	if l.wal.Err() == nil && !l.ended.Load() {
		errs = append(errs, l.finish(ctx))
	}
	// A log that has failed signs nothing, so there is no checkpoint to wait for.
	if err := l.faulted(); err != nil {
		errs = append(errs, err)
	} else if err := l.stopLog(ctx); err != nil {
		errs = append(errs, fmt.Errorf("publish the last checkpoint: %w: it is published after the next start", err))
	}
	l.cancelLog()
	errs = append(errs, l.wal.Close(), l.store.close(), l.lock.Close())
	return errors.Join(errs...)
}

// Stats is how the log stands.
type Stats struct {
	Decisions, Blocks, CheckpointSize                                 uint64
	Pending                                                           int           // decisions without outcome
	Unsigned                                                          time.Duration // age of the oldest record under no signed checkpoint
	LateOutcomes, DuplicateOutcomes, ForeignOutcomes, UnknownOutcomes uint64
	Recovered                                                         uint64 // records the last start found in the WAL after a crash
	WALBytes                                                          int64
	WALSyncs                                                          uint64
	DailyLeft                                                         time.Duration // until the daily key refuses to sign; 0 while none is in force
	Refusing                                                          error
}

// Stats returns how the log stands now.
func (l *Log) Stats() Stats {
	var w wal.Stats
	if l.wal != nil {
		w = l.wal.Stats()
	}
	_, ends, ok := l.keys.HeaderKey()
	s := Stats{
		Decisions: l.decisions.Load(), Blocks: l.blocks.Load(), Pending: l.pending.len(), Unsigned: l.UnsignedAge(),
		LateOutcomes: l.counts.lateOutcomes.Load(), DuplicateOutcomes: l.counts.duplicateOutcomes.Load(),
		ForeignOutcomes: l.counts.foreignOutcomes.Load(), UnknownOutcomes: l.counts.unknownOutcomes.Load(),
		Recovered: l.counts.recovered.Load(), WALBytes: w.Bytes, WALSyncs: w.Syncs,
		Refusing: l.Refusing(),
	}
	if ok {
		s.DailyLeft = ends.Sub(l.clock.Now())
	}
	if cp := l.cp.Load(); cp != nil {
		s.CheckpointSize = cp.size
	}
	return s
}

// Checkpoint returns the latest signed checkpoint, nil before there is one.
func (l *Log) Checkpoint() []byte {
	if cp := l.cp.Load(); cp != nil {
		return cp.raw
	}
	return nil
}

// Custody says in words where the daily keys live; nothing for a sealed log.
func (l *Log) Custody() string {
	if l.cfg.Daily == nil {
		return ""
	}
	return l.cfg.Daily.Custody()
}
