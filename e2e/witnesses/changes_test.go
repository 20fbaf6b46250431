package witnesses

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"filippo.io/torchwood"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/soft"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/region/receiptlog"
)

// openLog opens a log with software keys and runs it until the test ends.
func openLog(t *testing.T, dir string) *receiptlog.Log {
	t.Helper()
	store, err := soft.Open(filepath.Join(dir, "keys"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	v, err := store.Create(t.Context(), "identity", keys.Ed25519)
	if err != nil {
		t.Fatal(err)
	}
	identity, err := store.Signer(t.Context(), "identity", v.ID)
	if err != nil {
		t.Fatal(err)
	}
	l, err := receiptlog.Open(t.Context(), receiptlog.Config{
		Dir: filepath.Join(dir, "state"), Origin: "log.test", Instance: "a", Identity: identity, Daily: store, DailyLabel: "daily",
		DailyAlgorithm: keys.Ed25519, DailyMaxAge: 24 * time.Hour, SealEvery: 100 * time.Millisecond, Heartbeat: 100 * time.Millisecond,
		MaxUnsigned: time.Minute, OutcomeTimeout: time.Hour, SegmentBytes: 1 << 20, MaxBytes: 16 << 20, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("the log: %v", err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), harness.Patience)
		defer cancel()
		if err := l.Close(ctx); err != nil {
			t.Errorf("close the log: %v", err)
		}
	})
	return l
}

// TestHundredChanges has both witnesses and torchwood's library follow a log of ours through 100 changes of its daily key, a
// checkpoint of each key at least. e2e/rotations does so under load.
func TestHundredChanges(t *testing.T) {
	programs := Require(t)
	changes := 100
	if testing.Short() {
		changes = 5
	}
	dir := harness.Directory(t, "")
	l := openLog(t, dir)
	s := Start(t, programs, l.IdentityVKey())
	policy, err := torchwood.ParsePolicy(l.Policy())
	if err != nil {
		t.Fatal(err)
	}
	tiles, err := torchwood.NewTileFS(os.DirFS(filepath.Join(dir, "state", "log")))
	if err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, "the first checkpoint", func() bool { return len(l.Checkpoint()) > 0 })
	daily := map[string]bool{}
	for change := range changes + 1 {
		if change > 0 {
			if _, err := l.RotateKey(t.Context()); err != nil {
				t.Fatalf("change %d: %v", change, err)
			}
		}
		raw := l.Checkpoint()
		c, n, err := torchwood.VerifyCheckpoint(raw, policy)
		if err != nil {
			t.Fatalf("change %d: torchwood refuses the checkpoint: %v\n%s", change, err, raw)
		}
		if len(n.UnverifiedSigs) != 1 {
			t.Fatalf("change %d: want a daily key's signature beside the identity's:\n%s", change, raw)
		}
		daily[fmt.Sprintf("%08x", n.UnverifiedSigs[0].Hash)] = true
		if err := s.Cosign(t.Context(), raw, torchwood.TileHashReaderWithContext(t.Context(), c.Tree, tiles)); err != nil {
			t.Fatalf("change %d: %v", change, err)
		}
	}
	if len(daily) != changes+1 {
		t.Errorf("checkpoints by %d daily keys, want %d", len(daily), changes+1)
	}
	if err := s.Untouched(t.Context()); err != nil {
		t.Error(err)
	}
	t.Logf("%d changes, %d leaves", changes, s.last.N)
}
