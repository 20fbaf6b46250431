package rotations

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/hsm/softhsm"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/fault"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
	"github.com/knhk/sidecar/e2e/steady"
)

// site has room for all of the load. Blocks are closed often, so that a change falls into the midst of signing.
const site = `
log: {seal_every: 200ms}
beat:
  cycle: 800ms
  r1: {capacity: 4096}
  w1: {capacity: 4096, max_wait: 800ms}
routes:
- {name: hot, prefix: /hot, cluster: up, policy: {class: R1}}
- {name: pages, prefix: /p, cluster: up}
envoy:
  access_log_flush: 50ms
  clusters:
  - {name: up, endpoints: ["UPSTREAM"]}
`

// world is a stack whose daily key is changed under load.
type world struct {
	*audited.World
	t      *testing.T
	policy string // file: the policy as it was when the log was new
	load   *steady.Load
	kept   *os.File // bundles that were taken before, during and after changes
	keptN  int
}

// daily is the daily key in force and the number of daily keys the log has had.
func (w *world) daily() (vkey string, count int) {
	w.t.Helper()
	out, err := w.Run(w.t.Context(), nil, "keys", "list", "-o", "json", "--config", w.ConfigFile)
	if err != nil {
		w.t.Fatal(err)
	}
	var list struct {
		Running bool
		Keys    []struct {
			VKey, Role string
			InForce    bool `json:"in_force"`
		}
	}
	if err := json.Unmarshal(out, &list); err != nil || !list.Running {
		w.t.Fatalf("keys list: %v: %s", err, out)
	}
	for _, k := range list.Keys {
		if k.Role != "daily" {
			continue
		}
		count++
		if k.InForce {
			vkey = k.VKey
		}
	}
	return vkey, count
}

func admitted(r *steady.Request) bool { return r.Status == http.StatusOK && r.ID != "" }

// keep waits for the bundle of a request that was answered after a moment, and keeps it.
func (w *world) keep(after time.Time) {
	w.t.Helper()
	var id string
	w.Until("a request is answered", func() bool {
		r := w.load.Latest(func(r *steady.Request) bool { return admitted(r) && r.Began.After(after) })
		if r != nil {
			id = r.ID
		}
		return r != nil
	})
	raw, err := w.Run(w.t.Context(), nil, "receipts", "get", "--wait", "2m", id)
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := w.kept.Write(append(bytes.TrimSpace(raw), '\n')); err != nil {
		w.t.Fatal(err)
	}
	w.keptN++
}

// verify has the program verify a file of bundles under the policy from the start.
func (w *world) verify(file string, want int) {
	w.t.Helper()
	out, err := w.Run(w.t.Context(), nil, "verify", "--quiet", "--policy", w.policy, file)
	if err != nil || !bytes.Contains(out, fmt.Appendf(nil, "%d verified, 0 refused", want)) {
		w.t.Errorf("%s: verify of %d bundles: %v\n%s", filepath.Base(file), want, err, out)
	}
}

// TestChangeUnderLoad replaces the daily key again and again while requests keep coming.
func TestChangeUnderLoad(t *testing.T) {
	harness.RequireEnvoy(t)
	if _, ok := softhsm.Find(); !ok {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs SoftHSM")
		}
		t.Skip("needs SoftHSM")
	}
	run := fault.Begin(t, "keys/change")
	w := &world{World: audited.Start(t, stack.Config{YAML: site}), t: t}
	w.policy = filepath.Join(w.Dir, "pinned-policy")
	policy, err := os.ReadFile(filepath.Join(w.StateDir, "policy"))
	if err == nil {
		err = os.WriteFile(w.policy, policy, 0o600)
	}
	if err == nil {
		w.kept, err = os.Create(filepath.Join(w.Dir, "kept.jsonl"))
	}
	if err != nil {
		t.Fatal(err)
	}
	defer w.kept.Close()

	// R1 has 50 ms to be decided, which a machine that others keep busy may not have: it is in the full run alone.
	targets := []string{"/p", "/p/do/slow/100", "/p/do/bytes/2000"}
	if os.Getenv(fault.EnvFull) == "1" {
		targets = append(targets, "/hot", "/hot/do/slow/100")
	}
	w.Serves("warm", "/p")
	warm := w.Reached("warm")
	w.load = steady.Begin(t.Context(), steady.Config{Addr: w.Listener, Clients: 8, Spacing: 25 * time.Millisecond, Targets: targets})
	defer w.load.End()

	o := newObserver(t, w.Tiles, filepath.Join(w.StateDir, "log"), policy, identity(t, policy))
	watching, stop := context.WithCancel(t.Context())
	defer stop()
	watched := make(chan error, 1)
	w.keep(time.Time{}) // there is a checkpoint
	go func() { watched <- o.watch(watching) }()

	vkeys := map[string]bool{}
	first, count := w.daily()
	vkeys[first] = true
	for i := range run.Rounds() {
		begun := time.Now()
		if i%10 == 0 {
			w.keep(begun)
		}
		was, _ := w.daily()
		during := time.Now()
		out, err := w.Run(t.Context(), nil, "keys", "rotate", "-o", "json", "--config", w.ConfigFile)
		if err != nil {
			t.Fatalf("change %d: %v", i, err)
		}
		run.Max("longest change, ms", float64(time.Since(during).Milliseconds()))
		var said struct{ Old, New string }
		if err := json.Unmarshal(out, &said); err != nil || said.Old != was || vkeys[said.New] {
			t.Fatalf("change %d: %v: %s after %s", i, err, out, was)
		}
		vkeys[said.New] = true
		if now, n := w.daily(); now != said.New || n != count+1 {
			t.Fatalf("change %d: in force is %s of %d keys, was to be %s of %d", i, now, n, said.New, count+1)
		}
		count++
		run.Observed("knhk keys list, another key in force; its signature on a checkpoint; its statement in the log")
		if i%10 == 0 {
			w.keep(during)
		}
		done := time.Now()
		w.Until("requests are answered after the change", func() bool {
			return w.load.Count(func(r *steady.Request) bool { return admitted(r) && r.Began.After(done) }) >= 10
		})
	}
	w.keep(time.Now())
	sent := w.load.End()
	stop()
	if err := <-watched; err != nil {
		t.Fatal(err)
	}
	w.judge(sent, warm)
	tr := w.Settle()
	if len(tr.List) != len(sent)+warm {
		t.Errorf("%d receipts for %d requests", len(tr.List), len(sent)+warm)
	}
	decided := map[string]bool{}
	for _, e := range tr.List {
		decided[e.Decision.ID] = true
	}
	for _, r := range sent {
		if !decided[r.ID] {
			t.Errorf("%s: no receipt %s in the log", r.Target, r.ID)
		}
	}
	w.verify(filepath.Join(w.Dir, "receipts.jsonl"), len(tr.List))
	w.verify(w.kept.Name(), w.keptN)

	leaves, err := o.consistent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if o.witnesses != nil {
		if err := o.witnesses.Untouched(t.Context()); err != nil {
			t.Error(err)
		}
		if o.cosigned != len(o.trees) {
			t.Errorf("%d checkpoints were cosigned of %d that were seen", o.cosigned, len(o.trees))
		}
	}
	statements := 0
	for _, leaf := range leaves {
		if bytes.HasPrefix(leaf, []byte(receipt.KeyPrefix)) {
			statements++
		}
	}
	if statements != run.Rounds()+1 || len(vkeys) != statements {
		t.Errorf("%d key statements in the log, %d keys in force one after the other, after %d changes", statements, len(vkeys), run.Rounds())
	}
	for vkey := range vkeys {
		if parts := strings.Split(vkey, "+"); len(parts) < 3 || o.signers[parts[1]] == 0 {
			t.Errorf("no checkpoint was seen that %s had signed", vkey)
		}
	}
	run.Add("requests", float64(len(sent)))
	run.Add("checkpoints", float64(len(o.trees)))
	run.Add("checkpoints cosigned by litewitness and omniwitness", float64(o.cosigned))
	t.Logf("%d changes, %d requests, %d checkpoints seen, %d cosigned by litewitness and omniwitness, %d leaves, %d bundles kept",
		run.Rounds(), len(sent), len(o.trees), o.cosigned, len(leaves), w.keptN)
	w.destroyed(run.Rounds())
	w.Audit()
	if !t.Failed() {
		for range run.Rounds() {
			run.Done()
		}
	}
}

// judge wants every request answered with a receipt.
func (w *world) judge(sent []*steady.Request, warm int) {
	w.t.Helper()
	var bad []error
	for _, r := range sent {
		if !admitted(r) || r.Err != nil {
			bad = append(bad, fmt.Errorf("%s: status %d, receipt %q, %w: %s", r.Target, r.Status, r.ID, r.Err, r.Body))
		}
	}
	if len(bad) > 0 {
		w.t.Errorf("%d of %d requests failed; the first: %v", len(bad), len(sent), errors.Join(bad[:min(len(bad), 5)]...))
	}
	if n := w.Reached("steady") + warm; n != len(sent)+warm {
		w.t.Errorf("the upstream saw %d requests of %d", n, len(sent)+warm)
	}
}

// destroyed wants the private keys of all daily keys but the one in force gone from the token, after so many changes.
func (w *world) destroyed(changes int) {
	w.t.Helper()
	w.Eventually("retired keys are destroyed", func() error {
		out, err := w.Run(w.t.Context(), nil, "keys", "list", "-o", "json", "--config", w.ConfigFile)
		if err != nil {
			return err
		}
		var list struct{ Undestroyed []string }
		if err := json.Unmarshal(out, &list); err != nil {
			return err
		}
		if len(list.Undestroyed) > 0 {
			return fmt.Errorf("still in the store: %v", list.Undestroyed)
		}
		return nil
	})
	// Each object of a SoftHSM token is a file: private and public half of the identity key, of the daily key and perhaps of a
	// prepared one, and the token itself. Of a key that was destroyed the public half stays.
	objects, err := filepath.Glob(filepath.Join(softhsm.TokenDir(filepath.Join(w.Dir, "token")), "*", "*.object"))
	if err != nil || len(objects) == 0 || len(objects) > 7+changes {
		w.t.Errorf("%d objects in the token: %v, %v", len(objects), objects, err)
	}
}

// identity finds the log's identity key in a policy file: the only log in it.
func identity(t *testing.T, policy []byte) string {
	t.Helper()
	for line := range strings.Lines(string(policy)) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "log" {
			return f[1]
		}
	}
	t.Fatalf("no log in the policy:\n%s", policy)
	return ""
}
