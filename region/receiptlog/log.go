package receiptlog

import (
	"cmp"
	"context"
	"crypto/rand"
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
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/sys/unix"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/region/wal"
)

const (
	signTimeout     = 5 * time.Second
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
)

// Config is what a Log needs. All fields are required unless they say otherwise.
type Config struct {
	Dir      string // state directory; made if missing
	Origin   string // configured origin; the log's own is Origin "/" log id
	Instance string // replica name in receipt ids

	Identity       keys.Signer // signs every checkpoint; whoever holds it can fork the log
	Daily          keys.Store  // makes and holds daily keys
	DailyLabel     string
	DailyAlgorithm keys.Algorithm
	DailyMaxAge    time.Duration // (0, 24h]

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

// Log is one replica's receipt log. Methods are safe for concurrent use once Open has returned.
type Log struct {
	cfg         Config
	log         *slog.Logger
	id          identity
	logID       [16]byte
	lock        *os.File
	store       *store
	wal         *wal.WAL
	clock       *clock
	before      time.Time // of the last block before Open
	identity    note.Signer
	daily       *dailySigner
	rotateMu    sync.Mutex    // held while the daily key changes; guards the next two
	spare       *keys.Version // made, but not stated yet
	rotateAgain time.Time

	add       tessera.AddFn
	stopLog   func(context.Context) error
	cancelLog context.CancelFunc
	reader    tessera.LogReader
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
	dailyCur    dailyKey
	subscribers map[chan<- Event]struct{}

	pending pendingSet // decisions without outcome
	crashed [][16]byte // those that a crash left; Run records their outcome

	// chain is owned by the sealer: Open, then Run, then Close.
	chain      chain
	unanswered [][]openDecision // of the last blocks, by block; see putPending
	scratch    [3][]byte        // of putRecords
	reuse      struct {         // memory of the last block that was committed
		buf  []byte
		recs []rec
	}
	// added is the number of the next block whose header is not in the log yet. Owned by the publisher: Open, Run, Close.
	added uint64
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
	l := &Log{cfg: cfg, log: cfg.Log, maxRecord: int(min(maxRecordBytes, cfg.SegmentBytes/8)), subscribers: map[chan<- Event]struct{}{}, wake: make(chan struct{}, 1)}
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
	if _, err := l.store.getMeta("chain", &l.chain); err != nil {
		return nil, err
	}
	if err := l.sameLog(); err != nil {
		return nil, err
	}
	l.clock, l.before = newClock(cfg.Now, l.chain.Time), l.chain.Time
	l.daily = &dailySigner{origin: l.id.Origin, clock: l.clock}
	if err := l.openDaily(ctx); err != nil {
		return nil, err
	}
	if err := l.openTree(ctx); err != nil {
		return nil, err
	}
	undo = append(undo, func() error { l.cancelLog(); return nil })
	if err := l.recover(ctx); err != nil {
		return nil, err
	}
	return l, nil
}

// openTree opens the transparency log.
func (l *Log) openTree(ctx context.Context) error {
	verifier, err := keys.Verifier(l.id.Identity)
	if err != nil {
		return fmt.Errorf("open log: identity key: %w", err)
	}
	if err := checkTree(ctx, filepath.Join(l.cfg.Dir, "log"), verifier); err != nil {
		return err
	}
	driver, err := posix.New(ctx, posix.Config{Path: filepath.Join(l.cfg.Dir, "log")})
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	// Tessera's background work outlives ctx, which ends with Open: Close cancels it after the shutdown has published.
	treeCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	opts := tessera.NewAppendOptions().WithCheckpointSigner(l.identity, l.daily).WithBatching(logBatchSize, logBatchAge).
		WithCheckpointInterval(min(max(l.cfg.SealEvery/2, checkpointPoll), time.Second)).WithGarbageCollectionInterval(logGC)
	app, stop, reader, err := tessera.NewAppender(treeCtx, driver, opts)
	if err != nil {
		cancel()
		return fmt.Errorf("open log: %w", err)
	}
	l.add, l.stopLog, l.cancelLog, l.reader = app.Add, stop, cancel, reader
	return nil
}

// addLeaf appends one leaf to the transparency log and returns its index once it is integrated (durable, not yet signed).
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

// Origin returns the origin of the log, log id included.
func (l *Log) Origin() string { return l.id.Origin }

// Before is the time of the last block that an earlier process has closed: until then it has certainly lived, and at most
// SealEvery, or Heartbeat without records, longer. Zero for a new log.
func (l *Log) Before() time.Time { return l.before }

// IdentityVKey returns the verifier key that policies and witnesses pin.
func (l *Log) IdentityVKey() string { return l.id.Identity }

// DailyKey returns the verifier key of the daily key in force and when it stops signing.
func (l *Log) DailyKey() (vkey string, expires time.Time) {
	return l.currentDaily().VKey, l.daily.expires()
}

// Policy returns the text of the policy file that verifies this log's bundles.
func (l *Log) Policy() []byte { return policyText(l.id) }

// Refusing says why Decide refuses new decisions; nil when it takes them.
func (l *Log) Refusing() error {
	if p := l.refusing.Load(); p != nil {
		return *p
	}
	return nil
}

// refuse makes Decide refuse for a reason that may pass; a reason that is there already stays.
func (l *Log) refuse(err error) bool { return l.refusing.CompareAndSwap(nil, &err) }

// latch makes Decide refuse for good. A fault is never overwritten: only a restart, which audits the state, ends it.
func (l *Log) latch(err error) bool {
	for {
		cur := l.refusing.Load()
		if cur != nil && errors.Is(*cur, ErrUnavailable) {
			return false
		}
		if l.refusing.CompareAndSwap(cur, &err) {
			return true
		}
	}
}

// Stop makes Decide refuse with ErrStopping; outcomes are still taken. The first step of a shutdown.
func (l *Log) Stop() { l.latch(ErrStopping) }

// Level of certainty that Decide waits for.
type Level = wal.Level

// Decide records a decision and returns when it has reached the level. d gets its ID, Nonce, Ordinal, Origin, Time and
// commitment here; req is the evidence behind the commitment. On an error nothing may go on: the decision may or may not
// be in the log: the caller then reports an Outcome for d.ID that says the request was refused after all.
func (l *Log) Decide(ctx context.Context, level Level, d *receipt.Decision, req *receipt.Request) error {
	if err := l.Refusing(); err != nil {
		return err
	}
	n := len(req.Method) + len(req.Scheme) + len(req.Authority) + len(req.Path) + len(req.RequestID) + len(req.Source)
	if n > maxRequestBytes {
		return fmt.Errorf("%w: %d bytes of method, host, path and request id, at most %d", ErrTooLarge, n, maxRequestBytes)
	}
	var r [58]byte
	if _, err := rand.Read(r[:]); err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	// The log's own clock never goes back, and blocks are dated by it: lookups rely on the id's time.
	now := l.clock.now()
	id, uuid := receipt.NewID(now, (*[10]byte)(r[48:]), l.cfg.Instance)
	d.Origin, d.Time = l.id.Origin, now
	copy(d.Nonce[:], r[:16])
	salt := [32]byte(r[16:48])
	d.Request = req.Commit(&salt)
	ev := receipt.EvidenceFor(id, &salt, req)
	d.ID = id
	// A record that cannot be read back, or that the WAL has no room for, must not get as far as the block.
	if err := cmp.Or(d.Validate(), l.fits(d, ev, n)); err != nil {
		d.ID = ""
		return err
	}
	t, err := l.wal.Append(level, false, func(seq uint64) []byte {
		d.Ordinal = seq
		l.mu.Lock()
		defer l.mu.Unlock()
		entry, ref := l.open.addDecision(d, uuid, ev, req.RequestID)
		l.pending.put(uuid, ref)
		return entry
	})
	if err != nil {
		return l.walError(err)
	}
	l.decisions.Add(1)
	l.publish(func() Event { return Event{ID: id, Leaf: receipt.AppendDecision(nil, d)} })
	if err := t.Wait(ctx); err != nil {
		return l.walError(err)
	}
	return nil
}

// surelyFits bounds what JSON can make of a record with n bytes of text: true means that it can be written and read back.
func (l *Log) surelyFits(n int) bool {
	const fixed, escaped = 2048, 6 // members of bounded length; bytes one byte can become
	return fixed+escaped*n <= min(receipt.MaxLeaf, l.maxRecord)
}

// fits says whether a decision and its evidence, which holds n bytes, can be written and read back. Nearly always the bound settles
// it; else they are encoded to see.
func (l *Log) fits(d *receipt.Decision, ev *receipt.Evidence, n int) error {
	n += len(d.Tenant) + len(d.Rule) + len(d.Reason) + len(d.SPIFFEID) + len(d.Route) + len(d.Cluster) + len(d.Origin) + len(d.ID)
	if l.surelyFits(n) {
		return nil
	}
	leaf, evidence := len(receipt.AppendDecision(nil, d))+20, len(receipt.AppendEvidence(nil, ev)) // 20: the ordinal is not set yet
	if leaf > receipt.MaxLeaf || evidence > receipt.MaxEvidence || leaf+evidence+walOverhead > l.maxRecord {
		return fmt.Errorf("%w: a record of %d bytes with %d bytes of evidence", ErrTooLarge, leaf, evidence)
	}
	return nil
}

// fieldRequestID is the evidence field that holds x-request-id; receipts can be found by it.
const fieldRequestID = "request_id"

func (l *Log) walError(err error) error {
	switch {
	case errors.Is(err, wal.ErrFull):
		return fmt.Errorf("%w: %w", ErrFull, err)
	case errors.Is(err, wal.ErrClosed):
		return fmt.Errorf("%w: %w", ErrStopping, err)
	case errors.Is(err, wal.ErrFailed):
		l.fail(err)
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

// fail latches: after a failed write or sync nothing is recorded, sealed or signed until a restart has re-audited the state.
func (l *Log) fail(err error) {
	if !l.latch(fmt.Errorf("%w until restarted: %w", ErrUnavailable, err)) {
		return
	}
	l.log.Error("receipt log stopped: nothing is recorded or signed until a restart has checked the state", "error", err)
}

// faulted returns the fault that has stopped the log, nil while there is none.
func (l *Log) faulted() error {
	if p := l.refusing.Load(); p != nil && errors.Is(*p, ErrUnavailable) {
		return *p
	}
	return nil
}

// guardedSigner signs nothing once the log has failed: what the disk holds is then not known until a restart has audited it.
type guardedSigner struct {
	note.Signer
	faulted func() error
}

func (s guardedSigner) Sign(msg []byte) ([]byte, error) {
	if err := s.faulted(); err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	return s.Signer.Sign(msg)
}

// Outcome records what became of the transaction id. It does not wait for the disk: the record goes out with the next decision
// that does, or within 10 ms. A process that dies before takes it along, and its decision gets the outcome
// "unknown" at the restart. ErrNotFound when this replica knows no
// such decision; a second outcome for one decision is dropped and counted, unless the first was "unknown".
func (l *Log) Outcome(ctx context.Context, id string, o *policy.Outcome) error {
	uuid, instance, err := receipt.ParseID(id)
	if err != nil {
		return err
	}
	if instance != l.cfg.Instance {
		l.counts.foreignOutcomes.Add(1)
		return fmt.Errorf("%w here: %s was recorded by instance %q", ErrNotFound, id, instance)
	}
	ref, ok := l.pending.claim(uuid)
	if ok {
		if err = l.writeOutcome(ctx, id, uuid, o, ref, false); err != nil {
			l.pending.putBack(uuid, ref)
		}
		return err
	}
	// Rare from here on: a repetition, a late outcome, or one that expire has just claimed. One at a time.
	l.lateMu.Lock()
	defer l.lateMu.Unlock()
	d, outcomes, err := l.find(uuid)
	switch {
	case err != nil:
		return err
	case d == nil:
		l.counts.foreignOutcomes.Add(1)
		return fmt.Errorf("record outcome of %s: %w", id, ErrNotFound)
	case len(outcomes) != 1 || !outcomes[0].unknown():
		l.counts.duplicateOutcomes.Add(1)
		return nil
	}
	l.counts.lateOutcomes.Add(1)
	return l.writeOutcome(ctx, id, uuid, o, pendingRef{late: true}, true)
}

func (l *Log) writeOutcome(_ context.Context, id string, uuid [16]byte, o *policy.Outcome, ref pendingRef, late bool) error {
	rec := receipt.Outcome{
		ID: id, Origin: l.id.Origin, Time: l.clock.now(), Source: o.Source, Result: string(o.Result), Status: uint32(o.Status),
		UpstreamStatus: uint32(o.UpstreamStatus), Flags: o.Flags, Details: o.Details, Cluster: o.Cluster, UpstreamHost: o.UpstreamHost,
		Attempts: o.Attempts, BytesIn: o.BytesIn, BytesOut: o.BytesOut, DurationNS: uint64(max(o.Duration, 0)), CacheStatus: o.CacheStatus,
		Late: late,
	}
	if _, err := rand.Read(rec.Nonce[:]); err != nil {
		return fmt.Errorf("record outcome: %w", err)
	}
	if err := rec.Validate(); err != nil {
		return fmt.Errorf("record outcome of %s: %w", id, err)
	}
	if n := len(o.Flags) + len(o.Details) + len(o.Cluster) + len(o.UpstreamHost) + len(o.CacheStatus) + len(rec.Origin); !l.surelyFits(n) {
		return fmt.Errorf("record outcome of %s: %w: %d bytes of text", id, ErrTooLarge, n)
	}
	_, err := l.wal.Append(wal.Queued, true, func(seq uint64) []byte {
		rec.Ordinal = seq
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.open.addOutcome(&rec, uuid, ref)
	})
	if err != nil {
		return l.walError(err)
	}
	l.publish(func() Event { return Event{ID: id, Leaf: receipt.AppendOutcome(nil, &rec)} })
	return nil
}

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

// Close writes the final header, publishes and signs what is there, and gives the directory back. Run must have returned.
func (l *Log) Close(ctx context.Context) error {
	l.Stop()
	var errs []error
	if l.wal.Err() == nil {
		errs = append(errs, l.finish(ctx))
	}
	ctx, cancel := context.WithTimeout(ctx, shutdownWait)
	defer cancel()
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
	DailyLeft                                                         time.Duration
	Refusing                                                          error
}

// Stats returns how the log stands now.
func (l *Log) Stats() Stats {
	w := l.wal.Stats()
	s := Stats{
		Decisions: l.decisions.Load(), Blocks: l.blocks.Load(), Pending: l.pending.len(), Unsigned: l.UnsignedAge(),
		LateOutcomes: l.counts.lateOutcomes.Load(), DuplicateOutcomes: l.counts.duplicateOutcomes.Load(),
		ForeignOutcomes: l.counts.foreignOutcomes.Load(), UnknownOutcomes: l.counts.unknownOutcomes.Load(),
		Recovered: l.counts.recovered.Load(), WALBytes: w.Bytes, WALSyncs: w.Syncs,
		DailyLeft: l.daily.expires().Sub(l.clock.now()), Refusing: l.Refusing(),
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

// Custody says in words where the daily keys live.
func (l *Log) Custody() string { return l.cfg.Daily.Custody() }

// room says whether the volume of the state directory has room for more. Admission stops well before the block store would hit
// the end of the disk: it could not go on, and could not be opened again either.
func (l *Log) room() error {
	free, err := freeBytes(l.cfg.Dir)
	if err != nil {
		return fmt.Errorf("%w: look at the disk of state_dir: %w", ErrUnavailable, err)
	}
	if free < minFree {
		return fmt.Errorf("%w: %d MiB are free on the volume of state_dir %s, at least %d MiB are needed", ErrFull, free>>20, l.cfg.Dir, minFree>>20)
	}
	return nil
}

func freeBytes(dir string) (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return st.Bavail * uint64(st.Bsize), nil
}
