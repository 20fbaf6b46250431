package wal

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
)

// footer is kept free at the end of every segment for groups without records: the slot, the closing group, and marks that
// confirm a release when nothing else can be written.
const footer = 8 * headerSize

var (
	errFullSync    = fmt.Errorf("%w: the last sync lags behind", ErrFull)
	errFullSegment = fmt.Errorf("%w: no segment is ready", ErrFull)
	errFullReserve = fmt.Errorf("%w: only the reserve is left", ErrFull)
	errNoTicket    = errors.New("wait: nothing was appended")
	errEmpty       = errors.New("append: empty record")
)

// chunk is a group on its way to a segment.
type chunk struct {
	seg *segment
	h   header
	buf []byte // headerSize bytes, then the payload
}

// Ticket stands for one appended record. The zero Ticket stands for none.
type Ticket struct {
	seq   uint64
	level Level
	b     *batch
}

// Seq is the record's sequence number.
func (t Ticket) Seq() uint64 { return t.seq }

// Wait returns nil once the record has reached its level, ctx's error if that ends first (the record may still become
// durable), or an error that wraps ErrFailed or ErrClosed if it will not be known to. The zero Ticket is an error.
func (t Ticket) Wait(ctx context.Context) error {
	switch {
	case t.level == 0:
		return errNoTicket
	case t.b == nil:
		return nil
	}
	return t.b.wait(ctx)
}

func (b *batch) wait(ctx context.Context) error {
	select {
	case <-b.done:
		return b.err
	default:
	}
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Append hands out the next sequence number. fn runs under the append lock: it must be quick, must not call the WAL, and
// returns the record, 1 to MaxRecordBytes long, which is copied before Append goes on.
//
// At level Queued the record is only in memory when Append returns: it goes out with the next group that anybody asks for, and
// nobody is told when. At level Written it is in the page cache, with everything appended before it. At level Durable it goes
// out with the committer's next group, without lingering: see Ticket.Wait. An urgent append may use ReserveBytes.
//
// Errors: ErrFull, ErrClosed and ErrFailed before fn is called; a record of the wrong size, after which the number is
// given to the next append; ErrFailed when a Written record could not be written, after which the number is spent.
func (w *WAL) Append(level Level, urgent bool, fn func(seq uint64) []byte) (Ticket, error) {
	if level < Queued || level > Durable {
		return Ticket{}, fmt.Errorf("append: unknown level %d", level)
	}
	t, wake, err := w.add(level, urgent, fn)
	if err != nil {
		return Ticket{}, err
	}
	if wake {
		signal(w.kick)
	}
	if level == Written {
		if err := w.flush(t.seq + 1); err != nil {
			return Ticket{}, err
		}
	}
	return t, nil
}

// signal wakes whoever waits on a channel of capacity 1.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (w *WAL) add(level Level, urgent bool, fn func(seq uint64) []byte) (t Ticket, wake bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock() // fn may panic
	if err := w.usable(); err != nil {
		return t, false, err
	}
	if err := w.room(urgent); err != nil {
		return t, false, err
	}
	rec := fn(w.next)
	if len(rec) == 0 {
		return t, false, errEmpty
	}
	if len(rec) > w.cfg.MaxRecordBytes {
		return t, false, fmt.Errorf("append: record of %d bytes: MaxRecordBytes is %d", len(rec), w.cfg.MaxRecordBytes)
	}
	t = Ticket{seq: w.next, level: level}
	w.put(rec)
	if level == Durable {
		if w.batch == nil {
			w.batch = &batch{done: make(chan struct{})}
			wake = true
		}
		t.b = w.batch
	}
	if !w.asked && w.ceiling-w.next <= w.cfg.Ahead/2 {
		w.asked, wake = true, true
	}
	return t, wake, nil
}

// usable returns the latched error or ErrClosed. mu is held.
func (w *WAL) usable() error {
	if w.err != nil {
		return w.err
	}
	if w.closed {
		return ErrClosed
	}
	return nil
}

// need is the room an append asks for: the largest record, its length and padding.
func (w *WAL) need() int64 { return int64(w.cfg.MaxRecordBytes) + 4 + align }

// here is the room left for records in the active segment. mu is held.
func (w *WAL) here() int64 {
	if !w.started {
		return 0
	}
	return max(0, w.active.size-w.active.tail-int64(len(w.pend.buf))-footer)
}

// headroom is what can still be appended before something must be released, if the disk has what it promises. mu is held.
func (w *WAL) headroom() int64 {
	n := int64(w.free)
	if w.ready != nil {
		n++
	}
	if !w.noSpace {
		n += max(0, int64(w.maxFiles()-w.files))
	}
	return w.here() + n*w.cfg.SegmentBytes
}

func (w *WAL) maxFiles() int { return int(w.cfg.MaxBytes / w.cfg.SegmentBytes) }

// room says whether a record of any legal size can be taken. mu is held.
func (w *WAL) room(urgent bool) error {
	if !w.started {
		return errFullSegment
	}
	if left := w.ceiling - w.next; left == 0 || !urgent && left <= w.cfg.Ahead/8 {
		return errFullSync
	}
	here, need := w.here(), w.need()
	if here < need && w.ready == nil {
		return errFullSegment
	}
	if urgent {
		return nil
	}
	// The reserve must exist, and a part of it must be at hand even while no next segment is.
	if w.headroom() < w.cfg.ReserveBytes+need {
		return errFullReserve
	}
	if w.ready == nil && here < min(w.cfg.ReserveBytes, w.cfg.SegmentBytes/4)+need {
		return errFullSegment
	}
	return nil
}

// put copies rec into the pending group. mu is held, room has been checked.
func (w *WAL) put(rec []byte) {
	n := 4 + len(rec)
	if w.pend.h.count > 0 && len(w.pend.buf)+n > headerSize+maxGroup {
		w.endGroup()
	}
	if w.here() < int64(n+align) {
		w.rotate()
	}
	p := &w.pend
	if p.h.count == 0 {
		p.h.first = w.next
	}
	p.buf = binary.LittleEndian.AppendUint32(p.buf, uint32(len(rec)))
	p.buf = append(p.buf, rec...)
	p.h.count++
	w.next++
}

// endGroup moves the pending group to the full ones. mu is held.
func (w *WAL) endGroup() {
	if w.pend.h.count == 0 {
		return
	}
	w.place(&w.pend)
	w.full = append(w.full, w.pend)
	w.pend = chunk{buf: make([]byte, headerSize, 64<<10)}
}

// place gives c the next place in the active segment. mu is held.
func (w *WAL) place(c *chunk) {
	c.seg = w.active
	c.h.segment, c.h.offset = c.seg.number, uint32(c.seg.tail)
	if c.h.kind == 0 {
		c.h.kind = kindData
	}
	c.seg.tail += int64(padded(len(c.buf)))
}

// rotate makes the ready segment the active one. Only memory changes: the groups formed so far still go to the old
// segment, and the next commit syncs it before the new one. mu is held, ready is not nil.
func (w *WAL) rotate() {
	w.endGroup()
	old := w.active
	old.end = w.next
	w.retired = append(w.retired, old)
	w.active, w.ready = w.ready, nil
	w.active.first = w.next
	o := opening{prev: old.number, gapFrom: w.next, gapTo: w.next, boot: w.boot}
	c := chunk{h: header{kind: kindOpen, first: w.next}, buf: o.append(make([]byte, headerSize, 512))}
	w.place(&c)
	w.full = append(w.full, c)
	signal(w.space)
}

// take returns every group not yet written, the pending one included, and one without records of kind extra if that is
// not 0 and there is room for it. wmu and mu are held; the caller passes the result to write before it lets go of wmu.
func (w *WAL) take(extra uint8) []chunk {
	list := append(w.out[:0], w.full...)
	clear(w.full)
	w.full = w.full[:0]
	if w.pend.h.count > 0 {
		w.place(&w.pend)
		list = append(list, w.pend)
		w.pend = chunk{buf: w.spare}
		if w.spare = nil; w.pend.buf == nil {
			w.pend.buf = make([]byte, headerSize, 64<<10)
		}
	}
	// Until the first segment after Open is there, the active one is the last writer's, and ends where that ended.
	durable, released, end := w.durable, min(w.released, w.durable), w.next
	if !w.started {
		end = w.active.end
		durable, released = min(durable, end), min(released, end)
	}
	if extra != 0 {
		c := chunk{h: header{kind: extra, first: end}, buf: make([]byte, headerSize)}
		switch {
		case !w.started:
			if c.h.kind = kindMark; w.next > end {
				c.h.kind = kindLost
			}
			c.seg, c.h.segment, c.h.offset = w.active, w.active.number, uint32(w.active.slot())
			list = append(list, c)
		case w.active.tail+headerSize <= w.active.slot():
			w.place(&c)
			list = append(list, c)
		}
	}
	if len(list) > 0 {
		ceiling := w.next
		if w.started {
			ceiling += w.cfg.Ahead
		}
		w.claimed = max(w.claimed, ceiling)
		w.marked = [2]uint64{durable, released}
	}
	for i := range list {
		h := &list[i].h
		h.log, h.durable, h.released, h.ceiling = w.id, durable, released, w.claimed
		if h.kind == kindClose {
			h.ceiling = h.first
		}
	}
	w.out = list
	return list
}

// write puts groups where they belong. wmu is held. An error is latched.
func (w *WAL) write(list []chunk) error {
	for i := range list {
		c := &list[i]
		c.buf = seal(c.buf, c.h)
		if _, err := c.seg.f.WriteAt(c.buf, int64(c.h.offset)); err != nil {
			return w.fail(fmt.Errorf("write %s at offset %d: %w", w.path(c.seg), c.h.offset, err))
		}
		if n := len(w.unsynced); n == 0 || w.unsynced[n-1] != c.seg {
			w.unsynced = append(w.unsynced, c.seg)
		}
		if c.h.kind == kindData {
			w.written.Store(c.h.end())
			w.spare = c.buf[:headerSize]
		}
	}
	w.groups.Add(uint64(len(list)))
	return nil
}

func (w *WAL) path(s *segment) string { return filepath.Join(w.cfg.Dir, segmentName(s.number)) }

// flush writes everything pending unless the records below upto are written already. Those that are about to append get one
// turn of the scheduler first, not a wait: one write then serves them all.
func (w *WAL) flush(upto uint64) error {
	runtime.Gosched()
	if w.written.Load() >= upto {
		return nil
	}
	w.wmu.Lock()
	defer w.wmu.Unlock()
	if w.written.Load() >= upto {
		return nil
	}
	w.mu.Lock()
	if err := w.err; err != nil {
		w.mu.Unlock()
		return err
	}
	list := w.take(0)
	w.mu.Unlock()
	return w.write(list)
}

// fail latches err and fails who waits. It returns the latched error.
func (w *WAL) fail(err error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = fmt.Errorf("%w: %w", ErrFailed, err)
		w.log.Error("write-ahead log failed", "dir", w.cfg.Dir, "err", err)
	}
	w.drop(w.err)
	signal(w.kick) // so that Run returns
	return w.err
}

// drop ends the wait for the next sync with err. mu is held.
func (w *WAL) drop(err error) {
	if w.batch != nil {
		w.batch.err = err
		close(w.batch.done)
		w.batch = nil
	}
}

// Err returns nil, or the latched error, which wraps ErrFailed and the cause.
func (w *WAL) Err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// Sync waits until everything appended before the call is durable. It needs Run, unless there is nothing to sync. Records
// built upon elsewhere (sealed into a block, say) must be synced first: what this log lost in a machine crash it hands
// out as lost numbers.
func (w *WAL) Sync(ctx context.Context) error {
	w.mu.Lock()
	if w.err != nil {
		defer w.mu.Unlock()
		return w.err
	}
	if w.durable == w.next || !w.started {
		w.mu.Unlock()
		return nil
	}
	if w.closed && !w.running { // the last sync did not get through
		w.mu.Unlock()
		return ErrClosed
	}
	b := w.batch
	if b == nil {
		b = &batch{done: make(chan struct{})}
		w.batch = b
	}
	w.mu.Unlock()
	signal(w.kick)
	return b.wait(ctx)
}

// Release says that records with a number below next are safe elsewhere. Whole segments of such records are recycled once
// the records and the fact of their release are durable. It needs no I/O and returns an error only for a next that has
// not been handed out. A lower next than before changes nothing.
// Its caller must not wait for an append first: a full log takes none until something is released.
func (w *WAL) Release(next uint64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if next > w.next {
		return fmt.Errorf("release records below %d: only those below %d were handed out", next, w.next)
	}
	w.released = max(w.released, next)
	return nil
}

// Stats returns a snapshot.
func (w *WAL) Stats() Stats {
	w.mu.Lock()
	defer w.mu.Unlock()
	return Stats{
		Segments: w.files, Bytes: w.bytes(), Free: w.headroom(), DiskFull: w.noSpace,
		Next: w.next, Written: max(w.written.Load(), w.rec.Next), Durable: w.durable, Released: w.released,
		Records: w.next - w.rec.Next, Groups: w.groups.Load(), Syncs: w.syncs.Load(),
	}
}
