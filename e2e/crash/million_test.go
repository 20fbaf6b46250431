package crash

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	adminv1 "github.com/knhk/sidecar/api/knhk/admin/v1"
	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/soft"
	"github.com/knhk/sidecar/e2e/fault"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/region/receiptlog"
	"github.com/knhk/sidecar/region/wal"
)

const (
	million      = 1_000_000
	answerless   = 10              // every so many receipts one has no outcome yet
	restartBound = 2 * time.Second // from exec to /readyz 200
	writers      = 64
)

// bigSite has the log's default settings, as somebody who has a million receipts may well have.
const bigSite = `
routes:
- {name: hot, prefix: /hot, cluster: up, policy: {class: R1}}
- {name: pages, prefix: /p, cluster: up, policy: {class: W1}}
envoy:
  access_log_flush: 50ms
  clusters:
  - {name: up, endpoints: ["UPSTREAM"]}
`

// TestRestartMillion kills a knhk that has a million receipts, under load, and wants it ready again within restartBound.
func TestRestartMillion(t *testing.T) {
	harness.RequireEnvoy(t)
	run := fault.Begin(t, "crash/restart-1m")
	ctx := t.Context()
	// Software keys: the log is filled in this process, which must have the same ones.
	v := prepare(t, run, stack.Config{Soft: true, YAML: bigSite}, run.Rand())
	v.plain = true
	if err := v.StartKnhk(ctx); err != nil { // makes keys and state directory
		t.Fatal(err)
	}
	if err := v.Knhk.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	if err := fill(ctx, v.Stack, million); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d receipts in %v", million, time.Since(begun).Round(time.Millisecond))
	begun = time.Now()
	if err := v.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("first start, Envoy's included, in %v", time.Since(begun).Round(time.Millisecond))
	var err error
	if v.a, err = newAuditor(ctx, v.Stack); err != nil {
		t.Fatal(err)
	}
	newest, err := v.a.admin.List(ctx, &adminv1.ListRequest{Limit: 1})
	if err != nil || len(newest.GetReceipts()) != 1 {
		t.Fatalf("list: %v, %v", newest, err)
	}
	v.a.newest = newest.GetReceipts()[0].GetId()
	for i := range run.Rounds() {
		if err := v.round(ctx, i+1); err != nil {
			t.Fatalf("round %d: %v", i+1, err)
		}
		rss, err := v.Knhk.RSS()
		if err != nil {
			t.Fatal(err)
		}
		run.Max("RSS after the round, MiB", float64(rss>>20))
		t.Logf("ready %v after exec, RSS %d MiB after the round", v.restarted.Round(time.Millisecond), rss>>20)
		if v.restarted >= restartBound {
			t.Fatalf("round %d: ready after %v, want less than %v\n%s", i+1, v.restarted, restartBound, v.Knhk.LogTail(2000))
		}
		run.Done()
	}
	if err := v.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	r, err := fsck(ctx, v.Stack)
	if err != nil {
		t.Fatal(err)
	}
	if want := uint64(million + len(v.a.acked)); r.Decisions < want {
		t.Errorf("fsck counts %d decisions, want at least %d", r.Decisions, want)
	}
	run.Add("receipts", float64(r.Decisions))
	if files, err := harness.FilesIn(v.StateDir); err != nil {
		t.Error(err)
	} else {
		run.Max("state directory, MiB", math.Floor(files.Bytes/(1<<20)))
	}
}

// fill puts n receipts, nine of ten with their outcomes, into the log of a stopped stack, through the code that knhk itself uses.
func fill(ctx context.Context, s *stack.Stack, n uint64) (err error) {
	store, err := soft.Open(filepath.Join(s.Dir, "keys"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	versions, err := store.Versions(ctx, "identity")
	if err != nil {
		return err
	}
	identity, err := store.Signer(ctx, "identity", versions[0].ID)
	if err != nil {
		return err
	}
	l, err := receiptlog.Open(ctx, receiptlog.Config{
		Dir: s.StateDir, Origin: "example.com/knhk/e2e", Instance: "a", Identity: identity, Daily: store, DailyLabel: "daily",
		DailyAlgorithm: keys.Ed25519, DailyMaxAge: 24 * time.Hour, SealEvery: time.Second, Heartbeat: time.Minute, MaxUnsigned: 5 * time.Minute,
		OutcomeTimeout: time.Hour, SegmentBytes: 64 << 20, MaxBytes: 1 << 30, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return err
	}
	running, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- l.Run(running) }()
	var next atomic.Uint64
	var wg sync.WaitGroup
	errs := make(chan error, writers)
	for range writers {
		wg.Go(func() {
			for i := next.Add(1); i <= n; i = next.Add(1) {
				if err := fillOne(ctx, l, i); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	stop()
	return errors.Join(<-errs, <-ended, l.Close(ctx))
}

// fillOne records one receipt such as ext_proc and the access log make; it waits while the log is full.
func fillOne(ctx context.Context, l *receiptlog.Log, i uint64) error {
	for {
		d := receipt.Decision{Class: "W1", Verdict: "admit", Reason: "ok", Rule: "route:pages", Capture: "lean", Route: "pages", Cluster: "up"}
		err := l.Decide(ctx, wal.Durable, &d, &receipt.Request{Method: "GET", Scheme: "http", Authority: "shop.example", Source: "192.0.2.1:40000",
			Path: fmt.Sprintf("/p/page?filled=%d", i), RequestID: fmt.Sprintf("00000000-0000-4000-8000-%012d", i)})
		if errors.Is(err, receiptlog.ErrFull) {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if err != nil || i%answerless == 0 {
			return err
		}
		return l.Outcome(ctx, d.ID, &policy.Outcome{Source: "als", Result: policy.ResultComplete, Status: 200, UpstreamStatus: 200,
			Details: "via_upstream", Cluster: "up", UpstreamHost: "192.0.2.2:80", Attempts: 1, BytesOut: 2000, Duration: 3 * time.Millisecond})
	}
}
