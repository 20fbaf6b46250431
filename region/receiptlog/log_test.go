package receiptlog

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/soft"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/region/wal"
)

// fixture is a directory with its keys, opened and closed as a test wants.
type fixture struct {
	t     testing.TB
	cfg   Config
	store *soft.Store
	log   *Log
	stop  context.CancelFunc
	done  chan error

	keysDir string
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	keysDir := t.TempDir() + "/keys"
	store, err := soft.Open(keysDir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	v, err := store.Create(t.Context(), "identity", keys.Ed25519)
	if err != nil {
		t.Fatal(err)
	}
	id, err := store.Signer(t.Context(), "identity", v.ID)
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{t: t, store: store, keysDir: keysDir, cfg: Config{
		Dir: t.TempDir() + "/state", Origin: "example.com/test", Instance: "a", Identity: id, Daily: store, DailyLabel: "daily",
		DailyAlgorithm: keys.Ed25519, DailyMaxAge: 24 * time.Hour, SealEvery: 100 * time.Millisecond, Heartbeat: time.Minute,
		MaxUnsigned: time.Minute, OutcomeTimeout: time.Hour, SegmentBytes: 1 << 20, MaxBytes: 16 << 20,
		Log: slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelWarn})),
	}}
	t.Cleanup(func() {
		if f.log != nil {
			f.close()
		}
	})
	return f
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Logf("%s", b)
	return len(b), nil
}

func (f *fixture) open() *Log {
	f.t.Helper()
	l, err := Open(f.t.Context(), f.cfg)
	if err != nil {
		f.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	f.log, f.stop, f.done = l, cancel, make(chan error, 1)
	go func() { f.done <- l.Run(ctx) }()
	return l
}

// close stops in order.
func (f *fixture) close() {
	f.t.Helper()
	f.log.Stop()
	f.stop()
	if err := <-f.done; err != nil {
		f.t.Error(err)
	}
	if err := f.log.Close(context.Background()); err != nil {
		f.t.Error(err)
	}
	f.log = nil
}

func (f *fixture) decide(level Level, requestID string) string {
	f.t.Helper()
	d := receipt.Decision{Class: "W1", Verdict: "admit", Reason: "ok", Rule: "route:*", Capture: "lean", Route: "r"}
	rand.Read(d.TraceID[:])
	if err := f.log.Decide(f.t.Context(), level, &d, &receipt.Request{Method: "GET", Scheme: "http", Authority: "h", Path: "/p", RequestID: requestID, Source: "127.0.0.1:1"}); err != nil {
		f.t.Fatal(err)
	}
	return d.ID
}

func (f *fixture) outcome(id string, status int) {
	f.t.Helper()
	if err := f.log.Outcome(f.t.Context(), id, &policy.Outcome{Source: "als", Result: policy.ResultComplete, Status: status, Details: "via_upstream"}); err != nil {
		f.t.Fatal(err)
	}
}

// bundle waits until the receipt has records of the given number under a signed checkpoint, and verifies them.
func (f *fixture) bundle(id string, records int) *receipt.Verified {
	f.t.Helper()
	p, err := receipt.ParsePolicy(f.log.Policy())
	if err != nil {
		f.t.Fatal(err)
	}
	deadline := time.Now().Add(2 * time.Minute)
	for {
		raw, err := f.log.Bundle(f.t.Context(), id, true)
		if err == nil {
			b, perr := receipt.ParseBundle(raw)
			if perr != nil {
				f.t.Fatalf("parse own bundle: %v\n%s", perr, raw)
			}
			if len(b.Records) >= records {
				v, err := receipt.Verify(p, b)
				if err != nil {
					f.t.Fatalf("verify own bundle: %v\n%s", err, raw)
				}
				return v
			}
		}
		if time.Now().After(deadline) {
			f.t.Fatalf("no bundle of %s with %d records: %v", id, records, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (f *fixture) fsck() *Report {
	f.t.Helper()
	r, err := fsckOn(f.t.Context(), f.cfg.Dir, wal.Config{Dir: filepath.Join(f.cfg.Dir, "wal"), FS: f.cfg.WALFS, BootID: f.cfg.BootID}, slog.New(slog.NewTextHandler(io.Discard, nil)), func(uint64, uint64) {})
	if err != nil {
		f.t.Fatal(err)
	}
	return r
}

func (f *fixture) fsckClean() *Report {
	f.t.Helper()
	r := f.fsck()
	for _, p := range r.Problems {
		f.t.Errorf("fsck: %s: %s", p.Where, p.What)
	}
	return r
}

// TestReceipts takes receipts from decision to verified bundle, finds them in every way, and finds them again after restarts.
func TestReceipts(t *testing.T) {
	f := newFixture(t)
	f.open()
	var ids []string
	for i := range 20 {
		level := wal.Durable
		if i%2 == 0 {
			level = wal.Written
		}
		ids = append(ids, f.decide(level, fmt.Sprintf("req-%d", i)))
	}
	for _, id := range ids[:10] {
		f.outcome(id, 200)
	}
	for i, id := range ids {
		want := 1
		if i < 10 {
			want = 2
		}
		v := f.bundle(id, want)
		if v.Decision.ID != id {
			t.Errorf("bundle of %s proves %s", id, v.Decision.ID)
		}
	}
	if got, err := f.log.ByRequestID("req-7"); err != nil || len(got) != 1 || got[0] != ids[7] {
		t.Errorf("by request id: %v, %v, want %s", got, err, ids[7])
	}
	v := f.bundle(ids[3], 2)
	if got, err := f.log.ByTraceID(fmt.Sprintf("%x", v.Decision.TraceID)); err != nil || len(got) != 1 || got[0] != ids[3] {
		t.Errorf("by trace id: %v, %v, want %s", got, err, ids[3])
	}
	f.outcome(ids[0], 500) // a second outcome is dropped
	if n := f.log.Stats().DuplicateOutcomes; n != 1 {
		t.Errorf("%d duplicate outcomes counted, want 1", n)
	}
	sums, err := f.log.List(t.Context(), 5, ids[10])
	if err != nil || len(sums) != 5 || sums[0].ID != ids[9] {
		t.Errorf("list before %s: %v, %v", ids[10], sums, err)
	}
	f.close()
	f.open()
	for _, id := range ids[10:] { // pending over a clean restart
		f.outcome(id, 204)
	}
	for _, id := range ids {
		if v := f.bundle(id, 2); len(v.Outcomes) != 1 {
			t.Errorf("%s has %d outcomes", id, len(v.Outcomes))
		}
	}
	n := 0
	p, _ := receipt.ParsePolicy(f.log.Policy())
	vr := receipt.NewVerifier(p)
	for raw, err := range f.log.Export(t.Context(), false) {
		if err != nil {
			t.Fatal(err)
		}
		b, err := receipt.ParseBundle(raw)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := vr.Verify(b); err != nil {
			t.Error(err)
		}
		n++
	}
	if n != len(ids) {
		t.Errorf("exported %d receipts, want %d", n, len(ids))
	}
	f.close()
	r := f.fsckClean()
	if r.Decisions != 20 || r.Outcomes != 20 || r.Incarnations != 2 {
		t.Errorf("fsck counts %d decisions, %d outcomes, %d incarnations: want 20, 20, 2", r.Decisions, r.Outcomes, r.Incarnations)
	}
}
