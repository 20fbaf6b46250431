package receiptlog

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json/v2"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/soft"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/region/wal"
)

// crashEnv makes the test binary a recorder that is meant to be killed: its value is the child's configuration.
const crashEnv = "KNHK_TEST_RECORDER"

type crashChild struct{ Dir, Keys string }

func TestMain(m *testing.M) {
	if c := os.Getenv(crashEnv); c != "" {
		if err := runRecorder(c); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// runRecorder records as fast as it can and prints the id of each decision only when Decide has returned.
func runRecorder(env string) error {
	var c crashChild
	if err := json.Unmarshal([]byte(env), &c); err != nil {
		return err
	}
	store, err := soft.Open(c.Keys)
	if err != nil {
		return err
	}
	vs, err := store.Versions(context.Background(), "identity")
	if err != nil {
		return err
	}
	id, err := store.Signer(context.Background(), "identity", vs[0].ID)
	if err != nil {
		return err
	}
	l, err := Open(context.Background(), Config{
		Dir: c.Dir, Origin: "example.com/test", Instance: "a", Identity: id, Daily: store, DailyLabel: "daily", DailyAlgorithm: keys.Ed25519,
		DailyMaxAge: 24 * time.Hour, SealEvery: 100 * time.Millisecond, Heartbeat: time.Minute, MaxUnsigned: time.Minute,
		OutcomeTimeout: time.Hour, SegmentBytes: 1 << 20, MaxBytes: 64 << 20, Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	if err != nil {
		return err
	}
	go l.Run(context.Background())
	go func() { // a kill may come at any step of a key change
		for {
			if _, err := l.RotateKey(context.Background()); err != nil {
				fmt.Fprintln(os.Stderr, "rotate:", err)
			}
		}
	}()
	var out sync.Mutex
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			level := wal.Durable
			if w%2 == 0 {
				level = wal.Written
			}
			for i := 0; ; i++ {
				d := receipt.Decision{Class: "W1", Verdict: "admit", Reason: "ok", Capture: "lean"}
				if err := l.Decide(context.Background(), level, &d, &receipt.Request{Path: fmt.Sprint(i)}); err != nil {
					continue // full for a moment
				}
				out.Lock()
				fmt.Println(d.ID)
				out.Unlock()
				if i%2 == 0 {
					l.Outcome(context.Background(), d.ID, &policy.Outcome{Source: "als", Result: policy.ResultComplete, Status: 200})
				}
			}
		})
	}
	wg.Wait()
	return nil
}

// TestKill kills a recorder under load and amid changes of its daily key, again and again, and audits what is there: every id that was acknowledged, of either class
// (the machine lives, so R1 survives too), stands in a block exactly once and verifies, its outcome told or unknown.
func TestKill(t *testing.T) {
	rounds := 4
	if testing.Short() {
		rounds = 2
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	f := newFixture(t)
	f.open()
	f.close() // keys and directory are there
	f.store.Close()
	var acked []string
	for round := range rounds {
		ids := killRecorder(t, crashChild{f.cfg.Dir, f.keysDir}, time.Duration(50+rng.IntN(250))*time.Millisecond)
		if len(ids) < 10 {
			t.Fatalf("round %d: the recorder acknowledged %d decisions only", round, len(ids))
		}
		acked = append(acked, ids...)
	}
	store, err := soft.Open(f.keysDir)
	if err != nil {
		t.Fatal(err)
	}
	f.store, f.cfg.Daily = store, store
	vs, err := store.Versions(t.Context(), "identity")
	if err != nil {
		t.Fatal(err)
	}
	if f.cfg.Identity, err = store.Signer(t.Context(), "identity", vs[0].ID); err != nil {
		t.Fatal(err)
	}
	f.open()
	p, err := receipt.ParsePolicy(f.log.Policy())
	if err != nil {
		t.Fatal(err)
	}
	// Each crash left decisions without outcome: wait until they are recorded as unknown, sealed and signed.
	deadline := time.Now().Add(2 * time.Minute)
	for f.log.Stats().Pending > 0 || f.log.UnsignedAge() > 0 {
		if time.Now().After(deadline) {
			t.Fatalf("still pending: %+v", f.log.Stats())
		}
		time.Sleep(20 * time.Millisecond)
	}
	seen := map[string]int{}
	var unknown int
	verifier := receipt.NewVerifier(p)
	for raw, err := range f.log.Export(t.Context(), false) {
		if err != nil {
			t.Fatal(err)
		}
		b, err := receipt.ParseBundle(raw)
		if err != nil {
			t.Fatal(err)
		}
		v, err := verifier.Verify(b)
		if err != nil {
			t.Fatalf("%v\n%s", err, raw)
		}
		seen[v.Decision.ID]++
		if len(v.Outcomes) != 1 {
			t.Errorf("%s has %d outcomes", v.Decision.ID, len(v.Outcomes))
		} else if v.Outcomes[0].Result == string(policy.ResultUnknown) {
			unknown++
		}
	}
	for _, id := range acked {
		if seen[id] != 1 {
			t.Errorf("acknowledged %s is there %d times", id, seen[id])
		}
	}
	t.Logf("%d rounds: %d acknowledged, %d in the log, %d with unknown outcome", rounds, len(acked), len(seen), unknown)
	f.close()
	r := f.fsckClean()
	if want := uint64(rounds + 2); r.Incarnations != want {
		t.Errorf("%d incarnations, want %d", r.Incarnations, want)
	}
}

// killRecorder runs a recorder for d after its first acknowledgement, kills it and returns what it had acknowledged.
func killRecorder(t *testing.T, c crashChild, d time.Duration) []string {
	t.Helper()
	env, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), crashEnv+"="+string(env))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	sc := bufio.NewScanner(out)
	for sc.Scan() {
		if len(ids) == 0 {
			time.AfterFunc(d, func() { cmd.Process.Kill() })
		}
		ids = append(ids, strings.TrimSpace(sc.Text()))
	}
	cmd.Wait()
	if len(ids) == 0 {
		t.Fatalf("the recorder acknowledged nothing:\n%s", stderr.String())
	}
	// The last line may have been cut by the kill.
	if last := ids[len(ids)-1]; !strings.HasSuffix(last, ".a") {
		ids = ids[:len(ids)-1]
	}
	return ids
}
