package receiptlog

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// runWatch follows the signed checkpoint and refuses requests when records have gone unsigned for too long.
func (l *Log) runWatch(ctx context.Context) error {
	tick := time.NewTicker(checkpointPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if _, err := l.checkpoint(ctx); err != nil && ctx.Err() == nil {
			l.log.WarnContext(ctx, "cannot read checkpoint", "error", err)
		}
		l.judge(ctx)
	}
}

// judge decides whether requests are taken: not while records have gone unsigned for too long, nor while the disk is nearly full.
func (l *Log) judge(ctx context.Context) {
	why := l.room()
	if age := l.UnsignedAge(); age > l.cfg.MaxUnsigned {
		why = fmt.Errorf("%w: %v, limit %v", ErrUnsigned, age.Round(time.Second), l.cfg.MaxUnsigned)
	}
	cur := l.refusing.Load()
	switch {
	case why != nil && cur == nil:
		if l.refuse(why) {
			l.log.ErrorContext(ctx, "refusing requests", "error", why)
		}
	case why == nil && cur != nil && (errors.Is(*cur, ErrUnsigned) || errors.Is(*cur, ErrFull)):
		if l.refusing.CompareAndSwap(cur, nil) {
			l.log.InfoContext(ctx, "taking requests again")
		}
	}
}

// UnsignedAge is the age of the oldest record that no signed checkpoint covers; 0 when there is none.
func (l *Log) UnsignedAge() time.Duration {
	l.uncovered.Lock()
	defer l.uncovered.Unlock()
	if cp := l.cp.Load(); cp != nil {
		q := l.uncovered.queue
		for len(q) > 0 {
			idx, known, err := l.store.index(q[0].n)
			if err != nil || !known || idx >= cp.size {
				break
			}
			q = q[1:]
		}
		l.uncovered.queue = q
	}
	var since time.Time
	if len(l.uncovered.queue) > 0 {
		since = l.uncovered.queue[0].since
	} else if !l.ended.Load() { // what comes after the last block was refused
		l.mu.Lock()
		for _, b := range []*block{l.open, l.sealing} { // the older one last
			if b != nil && len(b.recs) > 0 {
				since = b.since
			}
		}
		l.mu.Unlock()
	}
	if since.IsZero() {
		return 0
	}
	return max(l.clock.Now().Sub(since), 0)
}

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
