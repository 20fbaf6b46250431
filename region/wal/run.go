package wal

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"
)

// retryEvery is how long a full disk is left alone before the next attempt to prepare a segment.
const retryEvery = time.Second

// maxTurns bounds how often the committer gives way to appends before it syncs them.
const maxTurns = 8

// Run commits durable appends and prepares segments until ctx ends, Close is called or the log fails. It may be called
// once. When ctx ends it refuses further appends, syncs, ends every ticket, writes the closing group and returns nil.
// When the log has failed it returns the latched error at once; every waiting ticket has got it too.
func (w *WAL) Run(ctx context.Context) error {
	w.mu.Lock()
	err := w.usable()
	if err == nil && w.running {
		err = errors.New("it runs already")
	}
	if err == nil {
		w.running = true
	}
	w.mu.Unlock()
	if err != nil {
		return fmt.Errorf("run write-ahead log: %w", err)
	}
	defer close(w.done)

	prepCtx, stopPrep := context.WithCancel(ctx)
	prepared := make(chan struct{})
	go func() {
		defer close(prepared)
		w.prepareAll(prepCtx)
	}()
	w.commitAll(ctx)
	stopPrep()
	<-prepared
	err = w.finish()
	w.mu.Lock()
	w.running = false
	w.mu.Unlock()
	return err
}

// commitAll is the committer.
func (w *WAL) commitAll(ctx context.Context) {
	tick := time.NewTicker(w.cfg.SyncEvery)
	defer tick.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			return
		case <-w.stop:
			return
		case <-w.kick:
			w.gather()
			err = w.commit(0)
		case <-tick.C:
			err = w.idle()
		}
		if err != nil || w.Err() != nil {
			return
		}
	}
}

// gather lets those whom the last sync woke append first: turns of the scheduler for as long as each brings another record, not a
// wait.
func (w *WAL) gather() {
	for range maxTurns {
		w.mu.Lock()
		before := w.next
		w.mu.Unlock()
		runtime.Gosched()
		w.mu.Lock()
		after := w.next
		w.mu.Unlock()
		if after == before {
			return
		}
	}
}

// idle syncs what nobody waits for, or notes what is durable.
func (w *WAL) idle() error {
	w.wmu.Lock()
	w.mu.Lock()
	pending := w.started && w.durable != w.next
	now := [2]uint64{w.durable, min(w.released, w.durable)}
	// A release that the next segment waits for is worth a sync, and room in the footer.
	urgent := w.ready == nil && w.free == 0 && now[1] > w.pinned && len(w.segs) > 0 && w.segs[0].end <= now[1]
	urgent = urgent && (!w.started || w.active.tail+2*headerSize <= w.active.slot())
	stale := w.started && now != w.marked && w.active.tail+footer <= w.active.size
	if !pending && !urgent && stale {
		list := w.take(kindMark)
		w.mu.Unlock()
		defer w.wmu.Unlock()
		return w.write(list)
	}
	w.mu.Unlock()
	w.wmu.Unlock()
	switch {
	case urgent:
		return w.commit(kindMark)
	case pending:
		return w.commit(0)
	}
	return nil
}

// commit writes everything pending, and a group of kind extra if that is not 0, syncs it and wakes who waits. Only one
// goroutine calls it.
func (w *WAL) commit(extra uint8) error {
	w.wmu.Lock()
	w.mu.Lock()
	if err := w.err; err != nil {
		w.mu.Unlock()
		w.wmu.Unlock()
		return err
	}
	b, upto := w.batch, w.next
	w.batch = nil
	list := w.take(extra)
	started := w.started
	w.mu.Unlock()
	err := w.write(list)
	ceiling, released := w.claimed, w.marked[1]
	segs := w.unsynced
	w.unsynced, w.syncing = w.syncing[:0], segs
	w.wmu.Unlock()

	// Appends go on meanwhile: the next group forms, and Written records reach the page cache.
	for _, s := range segs {
		if err == nil {
			if err = s.f.Sync(); err != nil {
				err = w.fail(fmt.Errorf("sync %s: %w", w.path(s), err))
			} else {
				w.syncs.Add(1)
			}
		}
	}
	var left []*segment
	if err == nil {
		left = w.committed(started, upto, ceiling, released)
	}
	if b != nil {
		b.err = err
		close(b.done)
	}
	if err != nil {
		return err
	}
	return w.mark(left)
}

// committed publishes what a sync has made durable and returns the segments left behind by it.
func (w *WAL) committed(started bool, upto, ceiling, released uint64) (left []*segment) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if started {
		w.durable, w.ceiling, w.asked = upto, max(w.ceiling, ceiling), false
	}
	if released > w.pinned {
		w.pinned = released
		w.count()
		signal(w.space)
	}
	for len(w.retired) > 0 && w.retired[0].end < w.durable {
		left = append(left, w.retired[0])
		w.retired = w.retired[1:]
	}
	return left
}

// prepareAll keeps a segment ready.
func (w *WAL) prepareAll(ctx context.Context) {
	for ctx.Err() == nil {
		var retry <-chan time.Time
		w.mu.Lock()
		want := w.ready == nil && w.err == nil
		w.mu.Unlock()
		if want {
			err := w.prepareOne(ctx)
			if err == nil {
				continue
			}
			if ctx.Err() != nil {
				return
			}
			if !errors.Is(err, errNoFile) && !errors.Is(err, errDiskFull) {
				_ = w.fail(err) // latched
				return
			}
			retry = time.After(retryEvery)
		}
		select {
		case <-ctx.Done():
		case <-w.stop:
			return
		case <-w.space:
		case <-retry:
		}
	}
}

func (w *WAL) prepareOne(ctx context.Context) error {
	seg, err := w.prepare(ctx)
	full := errors.Is(err, errDiskFull)
	w.mu.Lock()
	was := w.noSpace
	w.noSpace = full
	started := w.started
	if err == nil && started {
		w.ready = seg
	}
	w.mu.Unlock()
	switch {
	case full && !was:
		w.log.WarnContext(ctx, "no space for the next log segment: appends will be refused", "dir", w.cfg.Dir, "err", err)
	case err == nil && was:
		w.log.InfoContext(ctx, "space for log segments is back", "dir", w.cfg.Dir)
	}
	if err != nil || started {
		return err
	}
	return w.start(seg)
}

// finish refuses appends, syncs what is left and writes the closing group.
func (w *WAL) finish() error {
	w.mu.Lock()
	w.closed = true
	started := w.started
	w.mu.Unlock()
	if err := w.Err(); err != nil {
		return err
	}
	if !started {
		return nil // nothing was appended, and where the last writer ended must stay visible
	}
	if err := w.commit(0); err != nil {
		return err
	}
	return w.commit(kindClose) // a second sync: it vouches for the first
}

// Close ends Run if it runs and waits for it, or else does what Run does at its end; then it gives the directory up. A
// second Close returns nil. The error is that of the last sync, or the latched one.
func (w *WAL) Close() error {
	w.mu.Lock()
	select {
	case <-w.stop:
		w.mu.Unlock()
		return nil
	default:
		close(w.stop)
	}
	running, closed := w.running, w.closed
	w.closed = true
	w.mu.Unlock()
	var err error
	switch {
	case running:
		<-w.done
		err = w.Err()
	case closed:
		err = w.Err()
	default:
		err = w.finish()
	}
	return errors.Join(err, w.closeFiles(), w.lock.Close())
}

// closeFiles closes what is open. Nobody uses the segments any more.
func (w *WAL) closeFiles() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var errs []error
	for _, s := range append([]*segment{w.active, w.ready}, w.retired...) {
		if s != nil && s.f != nil {
			errs = append(errs, s.f.Close())
			s.f = nil
		}
	}
	w.drop(ErrClosed)
	return errors.Join(errs...)
}
