package wal_test

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/knhk/sidecar/region/wal"
)

// BenchmarkAppend appends 400-byte records from 1, 16 and 64 goroutines at both levels to a real directory (TMPDIR), with
// a Release for each 32 MiB so that segments are recycled as in service. cpu-us/rec is user and system time of the whole
// process, the committer's and the preparer's included.
func BenchmarkAppend(b *testing.B) {
	for _, level := range []wal.Level{wal.Written, wal.Durable} {
		for _, writers := range []int{1, 16, 64} {
			name := map[wal.Level]string{wal.Written: "written", wal.Durable: "durable"}[level]
			b.Run(fmt.Sprintf("%s/writers=%d", name, writers), func(b *testing.B) {
				benchmarkAppend(b, level, writers)
			})
		}
	}
}

func benchmarkAppend(b *testing.B, level wal.Level, writers int) {
	dir := b.TempDir()
	w, err := wal.Open(wal.Config{Dir: dir, SegmentBytes: 64 << 20, MaxBytes: 512 << 20, ReserveBytes: 1 << 20})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error)
	go func() { done <- w.Run(ctx) }()
	for ready := 0; ready < 2; time.Sleep(10 * time.Millisecond) { // the second segment is filled with zeros under another name
		names, err := filepath.Glob(filepath.Join(dir, "*.wal"))
		if err != nil {
			b.Fatal(err)
		}
		ready = len(names)
	}
	rec := make([]byte, 400)
	var left, refused atomic.Int64
	left.Store(int64(b.N))
	var wg sync.WaitGroup
	b.ReportAllocs()
	before := usage(b)
	b.ResetTimer()
	for range writers {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				t, err := w.Append(level, false, func(uint64) []byte { return rec })
				if err != nil {
					refused.Add(1)
					time.Sleep(time.Millisecond)
					left.Add(1)
					continue
				}
				if err := t.Wait(ctx); err != nil {
					b.Error(err)
					return
				}
				if t.Seq()%(32<<20/400) == 0 {
					if err := w.Release(t.Seq()); err != nil {
						b.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric((usage(b)-before).Seconds()*1e6/float64(b.N), "cpu-us/rec")
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "rec/s")
	b.ReportMetric(float64(b.N)/float64(max(w.Stats().Syncs, 1)), "rec/sync")
	if n := refused.Load(); n > 0 {
		b.ReportMetric(float64(n), "refused")
	}
	cancel()
	if err := <-done; err != nil {
		b.Error(err)
	}
	if err := w.Close(); err != nil {
		b.Error(err)
	}
}

func usage(b *testing.B) time.Duration {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
