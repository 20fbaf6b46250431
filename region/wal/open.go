package wal

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
)

// Names in the directory.
const (
	versionName   = "VERSION"
	versionTmp    = "VERSION.tmp"
	lockName      = "LOCK"
	segmentSuffix = ".wal"
	segmentTmp    = "next.tmp" // a segment being zero-filled

	formatLine = "knhk-wal 1"
)

// WAL is an open write-ahead log. Append, Ticket.Wait, Sync, Release, Err and Stats may be called from any goroutine.
type WAL struct {
	cfg  Config
	log  *slog.Logger
	id   uint64
	boot string
	lock io.Closer
	rec  Recovery
	old  []segment // the chain Open found, for Replay

	kick  chan struct{} // wakes the committer; capacity 1
	space chan struct{} // wakes the preparer; capacity 1
	stop  chan struct{} // closed by Close
	done  chan struct{} // closed when Run returns

	groups, syncs, written atomic.Uint64

	// wmu orders writes to the segments in use: whoever holds it takes what is pending and writes it. It is taken before mu,
	// never after, and not held during a sync.
	wmu      sync.Mutex
	spare    []byte     // buffer for the group after the pending one
	out      []chunk    // scratch of take
	unsynced []*segment // written to since the last sync began, each once
	syncing  []*segment // the other buffer for it; the committer's during a sync
	claimed  uint64     // highest ceiling in a group taken
	marked   [2]uint64  // durable and released in the last group taken

	// mu is held for memory operations only, and for fn.
	mu       sync.Mutex
	err      error // latched
	closed   bool
	running  bool
	started  bool   // active takes records; false until a segment could be prepared after Open
	next     uint64 // number of the next record
	durable  uint64 // everything below is synced
	ceiling  uint64 // synced: next never passes it
	released uint64 // by the caller; pinned is what a synced group says of it
	pinned   uint64
	asked    bool       // the committer has been asked to raise the ceiling
	active   *segment   // its tail is where pend will stand
	pend     chunk      // the group being formed
	full     []chunk    // groups formed before, not yet written
	batch    *batch     // what waits for the next sync; nil when nobody does
	ready    *segment   // the next active segment
	segs     []segment  // older ones that hold records or did, ascending
	retired  []*segment // left by the writer since, files still open, ascending; then they move to segs
	blank    []segment  // free for use
	free     int        // how many of segs and blank can be had without a Release
	files    int        // segment files there are
	last     uint64     // highest segment number given
	noSpace  bool
}

// batch is what waits for one sync.
type batch struct {
	done chan struct{}
	err  error // set before done is closed
}

// Open locks the directory, makes it if it is new, verifies every byte of every group, and leaves a fresh segment ready
// to append to. What was recovered has been synced when it returns. It starts nothing: durable appends wait for Run.
//
// Errors: ErrLocked; ErrCorrupt with file and offset, after which nothing in the directory has changed; any error of the
// file system. A lack of room, on the disk or under MaxBytes, is no error unless the
// directory is new: appends get ErrFull until Run finds some.
func Open(cfg Config) (*WAL, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := cfg.FS.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open write-ahead log: %w", err)
	}
	lock, err := cfg.FS.Lock(filepath.Join(cfg.Dir, lockName))
	if err != nil {
		return nil, fmt.Errorf("open write-ahead log: %w", err)
	}
	w := &WAL{
		cfg: cfg, log: cfg.Log, lock: lock,
		kick: make(chan struct{}, 1), space: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{}),
	}
	if w.boot, err = cfg.BootID(); err != nil || len(w.boot) > maxBoot {
		cfg.Log.Warn("boot id unknown: a restart counts as a machine crash", "err", err)
		w.boot = ""
	}
	if err := w.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("open write-ahead log: %w", err), w.closeFiles(), lock.Close())
	}
	return w, nil
}

func (w *WAL) open() error {
	numbers, stray, err := w.list()
	if err != nil {
		return err
	}
	w.id, err = w.readVersion()
	isNew := errors.Is(err, fs.ErrNotExist)
	switch {
	case isNew:
		err = w.create(numbers)
	case err == nil:
		err = w.recover(numbers)
	}
	if err != nil {
		return err
	}
	for _, name := range stray { // left by a crash, never used
		if err := w.cfg.FS.Remove(filepath.Join(w.cfg.Dir, name)); err != nil {
			return err
		}
	}
	w.pend = chunk{buf: make([]byte, headerSize)}
	seg, err := w.prepare(context.Background())
	switch {
	case err == nil:
		if err := w.start(seg); err != nil {
			return err
		}
	case !isNew && (errors.Is(err, errDiskFull) || errors.Is(err, errNoFile)):
		w.noSpace = errors.Is(err, errDiskFull)
		w.log.Warn("no room for a log segment: appends are refused", "dir", w.cfg.Dir, "err", err)
		if w.rec.Next > w.active.end { // declared lost from now on, whatever the next Open makes of the boot id
			if err := w.commit(kindLost); err != nil {
				return err
			}
		}
	default:
		return err
	}
	if isNew {
		if err := w.cfg.FS.SyncDir(filepath.Dir(w.cfg.Dir)); err != nil { // the directory's own name
			return err
		}
		return w.writeVersion() // last, so that a directory without it never held a record
	}
	return nil
}

// list returns the segments' numbers, ascending, and the names of temporary files.
func (w *WAL) list() (numbers []uint64, stray []string, err error) {
	names, err := w.cfg.FS.ReadDir(w.cfg.Dir)
	if err != nil {
		return nil, nil, err
	}
	for _, name := range names {
		hex, isSeg := strings.CutSuffix(name, segmentSuffix)
		switch n, err := strconv.ParseUint(hex, 16, 64); {
		case isSeg && err == nil && name == segmentName(n):
			numbers = append(numbers, n)
		case name == versionTmp, name == segmentTmp:
			stray = append(stray, name)
		case name == versionName, name == lockName:
		default:
			return nil, nil, fmt.Errorf("%s: not a file of the log", filepath.Join(w.cfg.Dir, name))
		}
	}
	slices.Sort(numbers)
	return numbers, stray, nil
}

// readVersion returns the log's random number.
func (w *WAL) readVersion() (uint64, error) {
	name := filepath.Join(w.cfg.Dir, versionName)
	f, err := w.cfg.FS.Open(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	b := make([]byte, 256)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("read %s: %w", name, err)
	}
	return parseVersion(name, string(b[:n]))
}

func parseVersion(name, text string) (uint64, error) {
	format, rest, _ := strings.Cut(text, "\n")
	if format != formatLine {
		return 0, fmt.Errorf("%s: unknown format %.40q: want %q; made by another release?", name, format, formatLine)
	}
	hex, ok := strings.CutPrefix(rest, "log ")
	hex, nl := strings.CutSuffix(hex, "\n")
	id, err := strconv.ParseUint(hex, 16, 64)
	if !ok || !nl || err != nil || text != versionText(id) {
		return 0, fmt.Errorf("%w: %s: malformed second line %.40q", ErrCorrupt, name, rest)
	}
	return id, nil
}

func versionText(id uint64) string { return fmt.Sprintf("%s\nlog %016x\n", formatLine, id) }

func (w *WAL) writeVersion() error {
	tmp := filepath.Join(w.cfg.Dir, versionTmp)
	f, err := w.cfg.FS.Create(tmp)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte(versionText(w.id)), 0)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", tmp, err)
	}
	if err := w.cfg.FS.Rename(tmp, filepath.Join(w.cfg.Dir, versionName)); err != nil {
		return err
	}
	return w.cfg.FS.SyncDir(w.cfg.Dir)
}

// create begins a new log. numbers can only be what an Open that was cut short left: nothing with a record in it.
func (w *WAL) create(numbers []uint64) error {
	for _, n := range numbers {
		if err := w.refuseUsed(n); err != nil {
			return err
		}
	}
	for _, n := range numbers {
		if err := w.cfg.FS.Remove(filepath.Join(w.cfg.Dir, segmentName(n))); err != nil {
			return err
		}
	}
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	w.id = binary.LittleEndian.Uint64(id[:])
	w.rec = Recovery{First: 1, Next: 1, Clean: true}
	w.next, w.durable, w.released, w.pinned = 1, 1, 1, 1
	return nil
}

// refuseUsed fails if segment n of an unknown log holds anything but an opening group.
func (w *WAL) refuseUsed(n uint64) error {
	name := filepath.Join(w.cfg.Dir, segmentName(n))
	r, err := w.reader(n)
	if err != nil {
		return err
	}
	defer r.close()
	b, err := r.bytes(0, headerSize)
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	if b == nil {
		return nil
	}
	r.log = binary.LittleEndian.Uint64(b[8:])
	s, err := scan(r.reader)
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	if n != 1 || s.orphans || s.end != s.first {
		return fmt.Errorf("%w: %s is missing, but %s has been in use", ErrCorrupt, versionName, name)
	}
	return nil
}

// fileReader is a reader that owns its file.
type fileReader struct {
	*reader
	f File
}

func (r fileReader) close() { _ = r.f.Close() } // nothing was written

func (w *WAL) reader(number uint64) (fileReader, error) {
	name := filepath.Join(w.cfg.Dir, segmentName(number))
	f, err := w.cfg.FS.Open(name)
	if err != nil {
		return fileReader{}, err
	}
	size, err := f.Size()
	if err != nil {
		_ = f.Close() // nothing was written
		return fileReader{}, fmt.Errorf("size of %s: %w", name, err)
	}
	return fileReader{&reader{f: f, size: min(size, maxSegmentBytes), log: w.id, segment: number}, f}, nil
}

// look verifies the segments, and changes nothing.
func (w *WAL) look(numbers []uint64) (found, error) {
	all := make([]scanned, len(numbers))
	for i, n := range numbers {
		r, err := w.reader(n)
		if err != nil {
			return found{}, err
		}
		all[i], err = scan(r.reader)
		r.close()
		if err != nil {
			return found{}, fmt.Errorf("%s: %w", filepath.Join(w.cfg.Dir, segmentName(n)), err)
		}
	}
	f, err := assemble(w.cfg.Dir, all, w.boot)
	if err != nil {
		return found{}, err
	}
	w.rec, w.old, w.files = f.Recovery, f.chain, len(all)
	return f, nil
}

// recover verifies the segments and takes over what they hold.
func (w *WAL) recover(numbers []uint64) error {
	f, err := w.look(numbers)
	if err != nil {
		return err
	}
	w.next, w.last = f.Next, f.last
	w.released, w.pinned = f.First, f.First
	w.segs, w.blank = slices.Clone(f.chain[:len(f.chain)-1]), f.blank
	end := f.chain[len(f.chain)-1]
	w.active, w.durable = &end, end.end
	if end.f, err = w.cfg.FS.Open(w.path(&end)); err != nil {
		return err
	}
	if f.Torn || f.LostFrom < f.LostTo {
		w.log.Warn("write-ahead log was not closed in order", "dir", w.cfg.Dir, "torn", f.Torn, "same_boot", f.SameBoot,
			"next", f.Next, "lost_from", f.LostFrom, "lost_to", f.LostTo)
	}
	if f.Clean {
		return nil
	}
	for _, s := range f.chain {
		if s.end > f.durable || s.number == end.number {
			if err := w.heal(s, f.durable); err != nil {
				return fmt.Errorf("make %s durable: %w", w.path(&s), err)
			}
		}
	}
	return nil
}

// heal makes durable what the last writer may not have synced, from record number durable on: whoever replays it may
// build on it. Pages whose write-back failed count as clean in Linux, so a sync alone would not do: they are written
// again, byte by byte the same.
func (w *WAL) heal(s segment, durable uint64) error {
	r, err := w.reader(s.number)
	if err != nil {
		return err
	}
	defer r.close()
	for off := int64(0); off < s.tail; {
		g, ok, _, err := r.group(off)
		if err != nil {
			return err
		}
		if !ok {
			return fmt.Errorf("%w: offset %d read differently the second time", ErrCorrupt, off)
		}
		if g.end() > durable || g.count == 0 {
			b, err := r.bytes(off, int(g.size()))
			if err != nil {
				return err
			}
			if _, err := r.f.WriteAt(b, off); err != nil {
				return err
			}
		}
		off += g.size()
	}
	g, ok, _, err := r.group(s.slot())
	if err == nil && ok {
		_, err = r.f.WriteAt(seal(make([]byte, headerSize), g.header), s.slot())
	}
	if err != nil {
		return err
	}
	return r.f.Sync()
}

// Recovered says what Open found.
func (w *WAL) Recovered() Recovery {
	r := w.rec
	r.Lost = slices.Clone(r.Lost)
	return r
}

// Replay calls fn for every recovered record from Recovered().First on, in order; numbers are dense but for
// Recovered().Lost. rec is borrowed. Release is made durable only by the group that follows it, so records released
// shortly before a crash come again. It must be called before Run; an error of fn ends it and is wrapped.
func (w *WAL) Replay(fn func(seq uint64, rec []byte) error) error {
	w.mu.Lock()
	err := w.usable()
	if err == nil && w.running {
		err = errors.New("Run has begun")
	}
	w.mu.Unlock()
	if err != nil {
		return fmt.Errorf("replay: %w", err)
	}
	for _, s := range w.old {
		if s.end <= w.rec.First {
			continue
		}
		if err := w.replay(s, fn); err != nil {
			return fmt.Errorf("replay %s: %w", w.path(&s), err)
		}
	}
	return nil
}

func (w *WAL) replay(s segment, fn func(seq uint64, rec []byte) error) error {
	r, err := w.reader(s.number)
	if err != nil {
		return err
	}
	defer r.close()
	for off := int64(0); off < s.tail; {
		g, ok, _, err := r.group(off)
		if err != nil {
			return err
		}
		if !ok {
			return fmt.Errorf("%w: offset %d read differently the second time", ErrCorrupt, off)
		}
		err = g.records(func(seq uint64, rec []byte) error {
			if seq < w.rec.First {
				return nil
			}
			if err := fn(seq, rec); err != nil {
				return fmt.Errorf("record %d: %w", seq, err)
			}
			return nil
		})
		if err != nil {
			return err
		}
		off += g.size()
	}
	return nil
}
