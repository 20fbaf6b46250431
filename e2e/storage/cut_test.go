//go:build linux

package storage

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/knhk/sidecar/e2e/fault"
	"github.com/knhk/sidecar/e2e/harness"
)

// TestTailCut cuts the write-ahead log at each byte of the last batch that was not synced when the power went: what was
// acknowledged as durable is there, what was cut is declared.
func TestTailCut(t *testing.T) {
	t.Parallel()
	run := fault.Begin(t, "storage/tail-cut")
	w := newWorld(t)
	for done := 0; done < run.Rounds(); {
		im, path, off, size := w.cutImage()
		acked := maps.Clone(w.acked)
		step := max(1, int(size)/(run.Rounds()-done)) // fewer rounds than bytes: spread over the batch
		for cut := 0; cut < int(size) && done < run.Rounds(); cut += step {
			w.restore(im)
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			w.must(err)
			_, err = f.WriteAt(make([]byte, int(size)-cut), off+int64(cut))
			w.must(err)
			w.must(f.Close())
			w.reboot()
			run.Observed("the file system's count of the bytes that no sync had covered")
			where := fmt.Sprintf("%s cut at byte %d of the last %d unsynced", filepath.Base(path), cut, size)
			if err := w.StartKnhk(t.Context()); err != nil {
				t.Fatalf("%s: %v", where, err)
			}
			tr, err := w.settle()
			if err != nil {
				t.Fatalf("%s: %v", where, err)
			}
			w.kill()
			if err := w.fsck(); err != nil {
				t.Fatalf("%s: %v", where, err)
			}
			if err := w.compare(&tr); err != nil {
				t.Fatalf("%s: %v", where, err)
			}
			run.Max("bytes_of_a_batch", float64(size))
			run.Max("r1_lost_and_declared", float64(tr.missing))
			maps.Copy(w.acked, acked) // the next round begins with the same image
			run.Done()
			done++
		}
	}
}

// cutImage kills a new log under load, at a moment at which a batch was written and not synced.
func (w *world) cutImage() (im *image, path string, off, size int64) {
	w.t.Helper()
	for range 50 {
		w.newborn()
		w.must(w.start())
		stop := w.load(mixes[0]...)
		w.must(w.eventually(harness.Patience, func() error {
			if n := w.ackedCount(); n < 60 {
				return fmt.Errorf("%d requests answered", n)
			}
			return nil
		}))
		w.must(w.eventually(harness.Patience, func() error {
			if _, _, n := w.disk.LastUnsynced(".wal"); n == 0 {
				return fmt.Errorf("everything is synced")
			}
			return nil
		}))
		w.kill()
		stop()
		var name string
		if name, off, size = w.disk.LastUnsynced(".wal"); size > 0 {
			return w.image(), filepath.Join(w.disk.Dir(), name), off, size
		}
	}
	w.t.Fatal("never a batch that was not synced")
	return nil, "", 0, 0
}
