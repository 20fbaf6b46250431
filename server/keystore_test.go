package server

import (
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/soft"
	"github.com/knhk/sidecar/region/receiptlog"
	"github.com/knhk/sidecar/server/config"
)

var quiet = slog.New(slog.DiscardHandler)

// softConfig is a configuration with software keys below dir and a state directory that is not begun.
func softConfig(dir string) *config.Config {
	uri := "soft:" + filepath.Join(dir, "keys")
	return &config.Config{
		Origin: "example.com/keys", Instance: "a", StateDir: filepath.Join(dir, "state"),
		Keys: config.Keys{
			Identity: config.Key{URI: uri, Algorithm: keys.Ed25519}, Daily: config.Key{URI: uri, Algorithm: keys.Ed25519}, RotationInterval: 24 * time.Hour,
		},
		Log: config.Log{SealEvery: 100 * time.Millisecond},
	}
}

// begin makes the directory of a log that has the identity key of cfg, and leaves it as if knhk had stopped.
func begin(t *testing.T, cfg *config.Config) *receiptlog.Log {
	t.Helper()
	k, err := openKeys(t.Context(), cfg, keyOptions{make: true, log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.close() })
	l, err := receiptlog.Open(t.Context(), receiptlog.Config{
		Dir: cfg.StateDir, Origin: cfg.Origin, Instance: cfg.Instance, Identity: k.identity, Daily: k.daily, DailyLabel: k.dailyLabel,
		DailyAlgorithm: keys.Ed25519, DailyMaxAge: 24 * time.Hour, SealEvery: 100 * time.Millisecond, Heartbeat: time.Minute, MaxUnsigned: time.Minute,
		OutcomeTimeout: time.Hour, SegmentBytes: 1 << 20, MaxBytes: 3 << 20, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Succeeds: k.succeeds,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	t.Cleanup(func() {
		l.Stop()
		stop()
		<-done
		l.Close(context.Background())
	})
	return l
}

// refused wants both serve's way to the keys and the check's to end with the same line.
func refused(t *testing.T, what string, cfg *config.Config, want string) {
	t.Helper()
	k, err := openKeys(t.Context(), cfg, keyOptions{make: true, log: quiet})
	if err == nil {
		k.close()
	}
	_, cerr := CheckKeys(t.Context(), cfg, quiet)
	if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
		t.Errorf("%s: %v; want %q", what, err, want)
	}
	if cerr == nil || err != nil && cerr.Error() != err.Error() {
		t.Errorf("%s: serve says %v, the check %v", what, err, cerr)
	}
}

// TestOpenKeys opens and makes keys as the configuration says, and says in one line what is wrong with them, to serve as to a check.
func TestOpenKeys(t *testing.T) {
	dir := t.TempDir()
	cfg := softConfig(dir)
	r, err := CheckKeys(t.Context(), cfg, quiet)
	if err != nil || len(r.Keys) != 2 || r.Keys[0].ID != "" || !strings.Contains(r.Keys[0].State, "will be made") {
		t.Fatalf("a log that is not begun: %+v, %v", r, err)
	}
	if entries, err := filepath.Glob(filepath.Join(dir, "keys", "*", "*")); err != nil || len(entries) > 0 {
		t.Errorf("a check made %v, %v", entries, err)
	}
	k, err := openKeys(t.Context(), cfg, keyOptions{make: true, log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	pub := k.identity.Public()
	k.close()
	if k, err = openKeys(t.Context(), cfg, keyOptions{log: quiet}); err != nil {
		t.Fatal(err)
	}
	if !keys.SamePublic(pub, k.identity.Public()) {
		t.Error("another identity key at the second start")
	}
	k.close()

	p256 := *cfg
	p256.Keys.Identity.Algorithm = keys.P256
	refused(t, "another algorithm", &p256, "the configuration says ecdsa-p256")
	same := *cfg
	same.Keys.Daily.URI += "?label=identity"
	refused(t, "one key for both", &same, "a label of its own")

	store, err := soft.Open(filepath.Join(dir, "keys"))
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	second, err := store.Create(t.Context(), "identity", keys.Ed25519)
	if err != nil {
		t.Fatal(err)
	}
	refused(t, "two identity keys", cfg, "2 enabled versions")
	if err := store.Disable(t.Context(), "identity", second.ID); err != nil {
		t.Fatal(err)
	}
	if k, err := openKeys(t.Context(), cfg, keyOptions{log: quiet}); err != nil {
		t.Errorf("a disabled one beside it: %v", err)
	} else {
		k.close()
	}
	versions, err := store.Versions(t.Context(), "identity")
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Disable(t.Context(), "identity", versions[0].ID); err != nil {
		t.Fatal(err)
	}
	refused(t, "only keys that may not sign", cfg, "disabled")
}

// TestIdentityOfABegunLog: its identity key is the one of log.json, no other and no new one; and the daily key is looked for.
func TestIdentityOfABegunLog(t *testing.T) {
	dir := t.TempDir()
	cfg := softConfig(dir)
	l := begin(t, cfg)
	r, err := CheckKeys(t.Context(), cfg, quiet)
	if err != nil || r.Origin != l.Origin() || !r.Keys[0].CanSign {
		t.Fatalf("beside the log that runs: %+v, %v", r, err)
	}
	lost := *cfg
	lost.Keys.Identity.URI = "soft:" + filepath.Join(dir, "other-keys")
	refused(t, "its key is gone", &lost, `no key "identity", and the log in state_dir was begun with one`)
	store, err := soft.Open(filepath.Join(dir, "other-keys"))
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if _, err := store.Create(t.Context(), "identity", keys.Ed25519); err != nil {
		t.Fatal(err)
	}
	refused(t, "another key", &lost, "is not the one that log "+l.Origin()+" was begun with")
}

// TestSuccession: a successor quotes the sealed log, and never has its identity key: whoever stole that would go on with it.
func TestSuccession(t *testing.T) {
	dir := t.TempDir()
	old := softConfig(dir)
	l := begin(t, old)
	write := func(name string, b []byte) string {
		t.Helper()
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	policy := write("policy", l.Policy())
	k, err := openKeys(t.Context(), old, keyOptions{log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	identity, err := keys.NoteSigner(l.Origin(), k.identity, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	stolen := k.identity.Public()
	defer k.close()
	leaf := sealOf(t, l.Origin(), identity)
	seal := write("seal", leaf)

	next := softConfig(dir)
	next.StateDir = filepath.Join(dir, "next")
	next.Succeeds = config.Succeeds{Seal: seal, Policy: policy}
	refused(t, "the stolen identity key", next, "a successor needs a new one")
	next.Keys.Identity.URI += "?label=identity-2"
	next.Keys.Daily.URI += "?label=daily-2"
	n, err := openKeys(t.Context(), next, keyOptions{make: true, log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	defer n.close()
	if q := n.succeeds; q == nil || q.Origin != l.Origin() || q.Identity != l.IdentityVKey() || q.Size != 7 || keys.SamePublic(n.identity.Public(), stolen) {
		t.Errorf("the quotation: %+v", q)
	}

	bad := *next
	bad.Succeeds.Seal = policy
	refused(t, "a seal that is none", &bad, "holds no seal")
	bad.Succeeds = config.Succeeds{Seal: filepath.Join(dir, "nowhere"), Policy: policy}
	refused(t, "no seal", &bad, "succeeds.seal: stat "+filepath.Join(dir, "nowhere"))
	bad.Succeeds = config.Succeeds{Seal: seal, Policy: seal}
	refused(t, "a policy that is none", &bad, "succeeds.policy: ")
	forger, err := keys.NoteSigner(l.Origin(), n.identity, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	bad.Succeeds = config.Succeeds{Seal: write("forged", sealOf(t, l.Origin(), forger)), Policy: policy}
	refused(t, "a forged seal", &bad, "does not verify under succeeds.policy")
}

func sealOf(t *testing.T, origin string, identity note.Signer) []byte {
	t.Helper()
	leaf, err := receipt.SignSeal(&receipt.Seal{Origin: origin, Size: 7, Time: time.Unix(1_800_000_000, 0).UTC(), Reason: "a test"}, identity, nil)
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}
