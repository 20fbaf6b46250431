package wal

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
)

// zeroes is what new segments are filled with, so that later syncs find every block written and no metadata to change.
var zeroes [256 << 10]byte

var (
	// errNoFile: MaxBytes is reached and nothing can be recycled yet.
	errNoFile = errors.New("no segment can be recycled")
	// errDiskFull: the disk had no space for a new segment, and the attempt has left nothing behind.
	errDiskFull = errors.New("no space for a segment")
)

// prepare makes a segment that can be written to without any change to the directory or the file's metadata: a recycled
// one if there is one, else a new one if MaxBytes allows. Only one goroutine calls it. After errNoFile, errDiskFull and
// ctx's error it may be tried again; any other is final, as nobody knows what the directory holds.
func (w *WAL) prepare(ctx context.Context) (*segment, error) {
	for {
		src, number, err := w.choose()
		if err != nil {
			return nil, err
		}
		seg := &segment{number: number, size: w.cfg.SegmentBytes}
		name := w.path(seg)
		switch {
		case src == nil:
			if err := w.zeroFill(ctx, name); err != nil {
				return nil, err
			}
		case src.size != seg.size: // SegmentBytes was another
			if err := w.cfg.FS.Remove(w.path(src)); err != nil {
				return nil, fmt.Errorf("prepare segment: %w", err)
			}
			w.mu.Lock()
			w.files--
			w.mu.Unlock()
			continue
		default:
			if err := w.cfg.FS.Rename(w.path(src), name); err != nil {
				return nil, fmt.Errorf("prepare segment: %w", err)
			}
		}
		// A crash before this leaves the file under either name, and no valid group of the new number in it.
		if err := w.cfg.FS.SyncDir(w.cfg.Dir); err != nil {
			return nil, fmt.Errorf("prepare segment: %w", err)
		}
		if seg.f, err = w.cfg.FS.Open(name); err != nil {
			return nil, fmt.Errorf("prepare segment: %w", err)
		}
		return seg, nil
	}
}

// choose takes a file out of the free ones, or returns nil if a new one may be made, with the new segment's number.
func (w *WAL) choose() (src *segment, number uint64, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	limit := w.maxFiles()
	if !w.started {
		limit++ // the fresh segment after a restart must not wait for a Release
	}
	switch {
	case len(w.blank) > 0:
		s := w.blank[0]
		src, w.blank = &s, w.blank[1:]
	case w.recyclable() > 0:
		s := w.segs[0]
		src, w.segs = &s, w.segs[1:]
	case w.files < limit:
		w.files++
	default:
		return nil, 0, errNoFile
	}
	w.count()
	w.last++
	return src, w.last, nil
}

// recyclable is how many of segs, the oldest, hold nothing that is still needed. mu is held.
func (w *WAL) recyclable() int {
	for i := range w.segs {
		if w.segs[i].end > w.pinned {
			return i
		}
	}
	return len(w.segs)
}

// count brings free up to date. mu is held.
func (w *WAL) count() { w.free = len(w.blank) + w.recyclable() }

// zeroFill makes a new segment. When it fails the file counts as not made.
func (w *WAL) zeroFill(ctx context.Context, name string) (err error) {
	defer func() {
		if err != nil {
			w.mu.Lock()
			w.files--
			w.mu.Unlock()
		}
	}()
	tmp := filepath.Join(w.cfg.Dir, segmentTmp)
	f, err := w.cfg.FS.Create(tmp)
	if err != nil {
		return diskFull(err)
	}
	err = w.fill(ctx, f)
	if err == nil {
		err = f.Sync() // for speed, not safety: a commit would otherwise pay for the blocks
	}
	if err = errors.Join(err, f.Close()); err != nil {
		// The name is free again before the next attempt; if it comes back after a crash, Open removes it.
		if rmErr := w.cfg.FS.Remove(tmp); rmErr != nil {
			return fmt.Errorf("prepare segment: %w", errors.Join(err, rmErr))
		}
		return diskFull(err)
	}
	if err := w.cfg.FS.Rename(tmp, name); err != nil {
		return fmt.Errorf("prepare segment: %w", err)
	}
	return nil
}

func diskFull(err error) error {
	if noSpace(err) {
		return fmt.Errorf("%w: %w", errDiskFull, err)
	}
	return fmt.Errorf("prepare segment: %w", err)
}

func (w *WAL) fill(ctx context.Context, f File) error {
	if err := f.Allocate(w.cfg.SegmentBytes); err != nil {
		return err
	}
	for off := int64(0); off < w.cfg.SegmentBytes; off += int64(len(zeroes)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(int64(len(zeroes)), w.cfg.SegmentBytes-off)
		if _, err := f.WriteAt(zeroes[:n], off); err != nil {
			return err
		}
	}
	return nil
}

// start makes seg the first segment this WAL appends to: it syncs an opening group that says where the last writer's
// records end and which numbers were lost, and only then may a number be handed out.
func (w *WAL) start(seg *segment) error {
	w.wmu.Lock()
	defer w.wmu.Unlock()
	w.mu.Lock()
	o := opening{gapFrom: w.next, gapTo: w.next, boot: w.boot}
	if w.active != nil {
		o.prev, o.gapFrom = w.active.number, w.active.end
	}
	h := header{
		log: w.id, segment: seg.number, kind: kindOpen, first: w.next,
		durable: o.gapFrom, released: min(w.released, o.gapFrom), ceiling: w.next + w.cfg.Ahead,
	}
	w.mu.Unlock()
	buf := seal(o.append(make([]byte, headerSize, 512)), h)
	if _, err := seg.f.WriteAt(buf, 0); err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", w.path(seg), err), seg.f.Close())
	}
	if err := seg.f.Sync(); err != nil {
		return errors.Join(fmt.Errorf("sync %s: %w", w.path(seg), err), seg.f.Close())
	}
	w.groups.Add(1)
	w.syncs.Add(1)
	w.claimed = h.ceiling
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.active != nil {
		w.retired = append(w.retired, w.active)
	}
	seg.first, seg.tail = w.next, int64(len(buf))
	w.active, w.started, w.durable, w.ceiling = seg, true, w.next, h.ceiling
	w.pinned = max(w.pinned, h.released)
	w.count()
	return nil
}

// mark notes in segments that were left that later records are durable: should the segment that holds those be lost as
// a whole, the next Open will know. It needs no sync. Then their files are closed.
func (w *WAL) mark(left []*segment) error {
	for _, s := range left {
		if err := w.markOne(s); err != nil {
			return w.fail(fmt.Errorf("mark %s: %w", w.path(s), err))
		}
		err := s.f.Close()
		s.f = nil
		if err != nil {
			return w.fail(fmt.Errorf("close %s: %w", w.path(s), err))
		}
		w.mu.Lock()
		w.segs = append(w.segs, *s)
		w.count()
		w.mu.Unlock()
		signal(w.space)
	}
	return nil
}

func (w *WAL) markOne(s *segment) error {
	w.wmu.Lock()
	defer w.wmu.Unlock()
	w.mu.Lock()
	h := header{
		log: w.id, segment: s.number, offset: uint32(s.slot()), kind: kindMark, first: s.end,
		durable: w.durable, released: w.pinned, ceiling: w.claimed, // nothing that a sync has not confirmed
	}
	w.mu.Unlock()
	_, err := s.f.WriteAt(seal(make([]byte, headerSize), h), s.slot())
	w.groups.Add(1)
	return err
}

// bytes is the disk that segment files take. mu is held.
func (w *WAL) bytes() int64 {
	if w.files == 0 {
		return 0
	}
	n := int64(w.files) * w.cfg.SegmentBytes
	for _, list := range [][]segment{w.blank, w.segs} {
		for i := range list {
			n += list[i].size - w.cfg.SegmentBytes
		}
	}
	return n
}
