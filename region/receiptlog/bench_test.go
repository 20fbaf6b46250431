package receiptlog

import (
	"context"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/region/wal"
)

// BenchmarkReceipts takes b.N receipts from decision and outcome into signed blocks, with 16 callers that each hold back their
// outcomes for 64 requests, as a load of that many transactions under way would. cpu-us/rec is user and system time of the whole
// process, sealing and signing included; blocks-B/rec and log-B/rec are what sealed blocks (records, evidence, indices) and tiles
// take on disk afterwards. -benchtime 10000x against 1000000x says whether the cost grows with the log.
func BenchmarkReceipts(b *testing.B) {
	for name, level := range map[string]Level{"R1": wal.Written, "W1": wal.Durable} {
		b.Run(name, func(b *testing.B) { benchmarkReceipts(b, level) })
	}
}

func benchmarkReceipts(b *testing.B, level Level) {
	f := newFixture(b)
	f.cfg.SealEvery, f.cfg.SegmentBytes, f.cfg.MaxBytes = time.Second, 64<<20, 1<<30
	l := f.open()
	for ready := 0; ready < 2; time.Sleep(10 * time.Millisecond) { // zero-filling segments is not what is measured
		names, err := filepath.Glob(filepath.Join(f.cfg.Dir, "wal", "*.wal"))
		if err != nil {
			b.Fatal(err)
		}
		ready = len(names)
	}
	var left atomic.Int64
	left.Store(int64(b.N))
	var wg sync.WaitGroup
	b.ReportAllocs()
	before := cpuTime(b)
	b.ResetTimer()
	for range 16 {
		wg.Go(func() {
			var open []string
			flush := func() {
				for _, id := range open {
					err := l.Outcome(context.Background(), id, &policy.Outcome{
						Source: "als", Result: policy.ResultComplete, Status: 200, UpstreamStatus: 200, Details: "via_upstream", Cluster: "app",
						UpstreamHost: "127.0.0.1:8080", Attempts: 1, BytesIn: 120, BytesOut: 2048, Duration: 1234567,
					})
					if err != nil {
						b.Error(err)
					}
				}
				open = open[:0]
			}
			defer func() { flush() }()
			for n := left.Add(-1); n >= 0; n = left.Add(-1) {
				d := receipt.Decision{Class: "R1", Verdict: "admit", Reason: "ok", Rule: "route:all", Capture: "lean", Route: "all", Cluster: "app", Tick: uint64(n)}
				err := l.Decide(context.Background(), level, &d, &receipt.Request{
					Method: "GET", Scheme: "http", Authority: "shop.example.com", Path: fmt.Sprintf("/items/%d?lang=en", n),
					RequestID: fmt.Sprintf("6f1c0a52-7c1e-4b02-9a53-%012x", n), Source: "10.1.2.3:40000",
				})
				if err != nil {
					b.Error(err)
					return
				}
				if open = append(open, d.ID); len(open) == 64 {
					flush()
				}
			}
		})
	}
	wg.Wait()
	if err := l.wal.Sync(b.Context()); err != nil {
		b.Fatal(err)
	}
	for l.wal.Stats().Released < l.wal.Stats().Next { // until everything stands in a block
		time.Sleep(10 * time.Millisecond)
	}
	b.StopTimer()
	b.ReportMetric((cpuTime(b)-before).Seconds()*1e6/float64(b.N), "cpu-us/rec")
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "rec/s")
	f.close()
	b.ReportMetric(diskBytes(b, filepath.Join(f.cfg.Dir, "blocks"))/float64(b.N), "blocks-B/rec")
	b.ReportMetric(diskBytes(b, filepath.Join(f.cfg.Dir, "log"))/float64(b.N), "log-B/rec")
}

// BenchmarkExport exports a log of 50,000 receipts again and again; one operation is one bundle.
func BenchmarkExport(b *testing.B) {
	f := newFixture(b)
	f.cfg.SealEvery, f.cfg.SegmentBytes, f.cfg.MaxBytes = time.Second, 64<<20, 1<<30
	l := f.open()
	for i := range 50_000 {
		f.outcome(f.decide(wal.Written, fmt.Sprint(i)), 200)
	}
	last := f.decide(wal.Written, "last")
	f.bundle(last, 1)
	b.ReportAllocs()
	b.ResetTimer()
	before := cpuTime(b)
	for n := 0; n < b.N; {
		for bundle, err := range l.Export(b.Context(), false) {
			if err != nil || len(bundle) == 0 {
				b.Fatalf("bundle %d: %v", n, err)
			}
			if n++; n == b.N {
				break
			}
		}
	}
	b.ReportMetric((cpuTime(b)-before).Seconds()*1e6/float64(b.N), "cpu-us/op")
}

func cpuTime(b *testing.B) time.Duration {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

func diskBytes(b *testing.B, dir string) (n float64) {
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		i, err := d.Info()
		if err == nil {
			n += float64(i.Size())
		}
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	return n
}
