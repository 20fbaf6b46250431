package wal

import (
	"context"
	"errors"
)

// The steps of Run, so that tests can take them one at a time and in any order.

// Commit is what the committer does when it is woken.
func (w *WAL) Commit() error { return w.commit(0) }

// Idle is what the committer does at every tick of SyncEvery.
func (w *WAL) Idle() error { return w.idle() }

// Prepare is what the preparer does when it is woken.
func (w *WAL) Prepare() error {
	w.mu.Lock()
	want := w.ready == nil && w.err == nil
	w.mu.Unlock()
	if !want {
		return w.Err()
	}
	err := w.prepareOne(context.Background())
	if err != nil && !errors.Is(err, errNoFile) && !errors.Is(err, errDiskFull) {
		return w.fail(err)
	}
	return nil
}

// FooterBytes is the room that records leave free in a segment.
const FooterBytes = footer
