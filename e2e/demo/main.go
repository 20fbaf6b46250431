// Command demo shows knhk at work: it starts a real Envoy, an upstream and knhk, sends 1,000 mixed requests, and checks their
// receipts offline, with `knhk verify` and with a Python program that shares no code with it. `make demo` runs it; with --run it
// leaves everything running and says what to try (`make run`).
//
// Every step is checked; the first that fails ends the demo with exit code 1.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/knhk/sidecar/crypto/hsm/softhsm"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// demoConfig keeps the ticks small, so that a burst shows all three verdicts: of 100 requests at once, half of them W1, no machine is so
// slow that two of each tick of 16 ms, and what may wait for one, are all.
const demoConfig = `log: {outcome_timeout: 20s} # of a client that leaves while its request is decided, Envoy may not know the receipt
beat:
  r1: {capacity: 100}
  w1: {capacity: 2}
default_route: {class: W1}
class_rules:
- {name: search-is-hot, when: 'path.startsWith("/search")', class: R1}
routes:
- {name: health, prefix: /healthz, cluster: up, policy: {exclude: true}}
- {name: hot, prefix: /hot, cluster: up, policy: {class: R1, tenant: shop}}
- {name: delta, prefix: /delta, cluster: up, policy: {classify_body: true}}
- {name: broken, prefix: /broken, cluster: dead}
- {name: pages, prefix: /, cluster: up, timeout: 2s}
envoy:
  clusters:
  - {name: up, endpoints: ["UPSTREAM"]}
  - {name: dead, endpoints: ["DEAD"]}
`

const (
	requests = 1000
	warming  = 12 // requests before the burst
)

func main() {
	keep := flag.Bool("run", false, "leave everything running until interrupted")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	var err error
	if *keep {
		err = run(ctx)
	} else {
		err = demo(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func step(format string, args ...any) {
	fmt.Printf("\n\033[1m%s\033[0m\n", fmt.Sprintf(format, args...))
}
func say(format string, args ...any) { fmt.Printf("  "+format+"\n", args...) }

// begin starts the stack in a fresh directory under run/.
func begin(ctx context.Context, name, yaml string, identity *stack.Identity) (*stack.Stack, error) {
	root, err := harness.ModuleRoot()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(root, "run", name)
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	step("Starting Envoy, an upstream and knhk")
	if _, ok := softhsm.Find(); !ok {
		say("SoftHSM is missing (apt-get install softhsm2): the keys will be files")
	}
	s, err := stack.New(ctx, stack.Config{Dir: dir, YAML: yaml, Identity: identity})
	if err != nil {
		return nil, err
	}
	if err := s.Start(ctx); err != nil {
		return nil, errors.Join(err, s.Stop(context.WithoutCancel(ctx)))
	}
	say("keys: %s", s.Custody)
	if identity != nil {
		say("identities: knhk dev-issuer, DEVELOPMENT ONLY; in production SPIRE or another issuer serves the Workload API")
		say("mutual TLS everywhere: Envoy listens on %s, knhk's admin on %s, the log on %s", s.Listener, s.Admin, s.Tiles)
		return s, nil
	}
	say("Envoy listens on http://%s, knhk's admin on http://%s, the log on http://%s", s.Listener, s.Admin, s.Tiles)
	return s, nil
}

// run leaves the stack running.
func run(ctx context.Context) (err error) {
	yaml := strings.Replace(demoConfig, `endpoints: ["UPSTREAM"]`, `endpoints: ["UPSTREAM"], spiffe_ids: ["`+stack.UpstreamID+`"]`, 1)
	s, err := begin(ctx, "dev", yaml, &stack.Identity{TTL: time.Hour, Write: true})
	if err != nil {
		return err
	}
	defer func() {
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), harness.Patience)
		defer cancel()
		err = errors.Join(err, s.Stop(stop))
	}()
	port := func(addr string) string { return addr[strings.LastIndexByte(addr, ':')+1:] }
	step("Try, in another terminal")
	fmt.Print(strings.NewReplacer("{LISTENER}", "https://localhost:"+port(s.Listener), "{ADMIN}", "localhost:"+port(s.Admin), "{TILES}", "https://localhost:"+port(s.Tiles),
		"{KNHK}", s.CLI(), "{DIR}", s.Dir, "{STATE}", s.StateDir, "{CONFIG}", s.ConfigFile, "{SERVER}", stack.KnhkID, "{API}", s.WorkloadAPI(stack.TrustDomain)).Replace(`
  cd {DIR}
  client() { curl -s --cert client/certificate.pem --key client/key.pem --cacert client/bundle.pem "$@"; }
  client -i {LISTENER}/                    # x-knhk-receipt names the receipt
  client -i {LISTENER}/hot/do/status/404   # class R1, an error from the upstream
  client -i -H 'x-knhk-receipt: forged' {LISTENER}/nowhere
  client -i {LISTENER}/do/echo             # what the upstream is told of the client
  curl -si --cacert client/bundle.pem {LISTENER}/    # refused: no certificate
  export KNHK_ADMIN={ADMIN} KNHK_SERVER_ID={SERVER} SPIFFE_ENDPOINT_SOCKET={API}
  {KNHK} receipts list
  {KNHK} receipts tail
  {KNHK} receipts get --story --wait 3s ID
  {KNHK} receipts get --wait 3s ID > bundle.json
  {KNHK} verify --policy {STATE}/policy bundle.json
  python3 ../../examples/verify.py {STATE}/policy bundle.json
  operator() { curl -s --cert operator/certificate.pem --key operator/key.pem --cacert operator/bundle.pem "$@"; }
  operator https://{ADMIN}/metrics | grep ^knhk
  operator {TILES}/checkpoint

  The configuration is {CONFIG}: change a class or a capacity in it and knhk reloads it.

Ctrl-C ends everything.
`))
	select {
	case <-ctx.Done():
	case <-s.Knhk.Exited():
	case <-s.Envoy.Exited():
	}
	// A terminal's Ctrl-C reaches everybody at once: who ends first then says nothing.
	select {
	case <-ctx.Done():
		fmt.Println()
		return nil
	case <-time.After(100 * time.Millisecond):
	}
	select {
	case <-s.Knhk.Exited():
		return fmt.Errorf("knhk ended:\n%s", s.Knhk.LogTail(2000))
	default:
		return fmt.Errorf("envoy ended:\n%s", s.Envoy.LogTail(2000))
	}
}

func demo(ctx context.Context) (err error) {
	s, err := begin(ctx, "demo", demoConfig, nil) // which may have to build knhk first
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 8*time.Minute)
	defer cancel()
	stopped := false
	defer func() {
		if !stopped {
			err = errors.Join(err, s.Stop(context.WithoutCancel(ctx)))
		}
	}()
	if err := warm(ctx, s); err != nil {
		return err
	}
	step("Sending %d mixed requests through Envoy", requests)
	if err := load(ctx, s); err != nil {
		return err
	}
	bundles, err := export(ctx, s)
	if err != nil {
		return err
	}
	if err := story(ctx, s, bundles); err != nil {
		return err
	}
	if err := tampered(ctx, s); err != nil {
		return err
	}
	stopped = true
	if err := s.Stop(ctx); err != nil {
		return err
	}
	if err := missingBlock(ctx, s); err != nil {
		return err
	}
	step("Done: %d requests, %d receipts, everything as promised. Files are in %s", requests+warming, requests+warming, s.Dir)
	return nil
}

// warm sends a few requests, one after the other, and waits for their outcomes. Each of Envoy's workers opens its access log stream with
// the first entry it has, and drops what comes faster than the stream opens: the burst must not be the first.
func warm(ctx context.Context, s *stack.Stack) error {
	step("Sending %d requests, one after the other, and waiting for what became of them", warming)
	for i := range warming {
		resp, err := s.Do(ctx, harness.Request{Target: fmt.Sprintf("/hot/warm/%d", i)})
		if err != nil {
			return err
		}
		if resp.Header.Get("X-Knhk-Receipt") == "" {
			return fmt.Errorf("request %d: status %d without a receipt", i, resp.Status)
		}
	}
	for {
		m, err := harness.Metrics(ctx, s.Admin)
		if err != nil {
			return err
		}
		pending := m.Sum("knhk_receipts_pending")
		if pending == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%v outcomes are still pending: %w", pending, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// load sends the mix: bursts, so that ticks run out of credits, and clients that leave.
func load(ctx context.Context, s *stack.Stack) error {
	var statuses [600]atomic.Int64
	var aborted, failed atomic.Int64
	delta := `{"additions":[{"subject":"s","predicate":"p","object":"o"}],"removals":[]}`
	one := func(i int) error {
		r := harness.Request{Target: fmt.Sprintf("/page/%d", i)}
		switch i % 20 {
		case 0, 1, 2, 3, 4, 5:
			r.Target = fmt.Sprintf("/hot/%d", i)
		case 6, 7, 8:
			r.Target = fmt.Sprintf("/search?q=%d", i)
		case 9:
			r.Method, r.Target, r.Body = "POST", "/delta", delta
		case 10:
			r.Target = "/do/status/500"
		case 11:
			r.Target = "/do/reset"
		case 12:
			r.Target = "/broken/upstream"
		case 13:
			aborted.Add(1)
			return harness.AbortBeforeResponse(ctx, s.Listener, harness.Request{Target: fmt.Sprintf("/do/slow/300?%d", i)}, func() error {
				return wait(ctx, func() bool { return s.Upstream.CountPath(fmt.Sprintf("?%d", i)) > 0 }, 400*time.Millisecond)
			})
		}
		resp, err := s.Do(ctx, r)
		if err != nil {
			return err
		}
		statuses[resp.Status].Add(1)
		return nil
	}
	var wg sync.WaitGroup
	next := atomic.Int64{}
	for range 100 {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= requests {
					return
				}
				if err := one(i); err != nil {
					failed.Add(1)
					fmt.Fprintf(os.Stderr, "request %d: %v\n", i, err)
				}
			}
		})
	}
	wg.Wait()
	for code := range statuses {
		if n := statuses[code].Load(); n > 0 {
			say("%4d answers with status %d", n, code)
		}
	}
	say("%4d clients left before the response", aborted.Load())
	if n := failed.Load(); n > 0 {
		return fmt.Errorf("%d requests failed", n)
	}
	return nil
}

// wait polls ok; giving up after limit is no error: a request that was refused never reaches the upstream.
func wait(ctx context.Context, ok func() bool, limit time.Duration) error {
	for end := time.Now().Add(limit); !ok() && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

// export waits until every receipt has its outcome under a signed checkpoint, exports and verifies them all.
func export(ctx context.Context, s *stack.Stack) ([]byte, error) {
	step("Waiting until all of them are sealed and signed, then verifying them offline")
	file := filepath.Join(s.Dir, "receipts.jsonl")
	var raw []byte
	deadline := time.Now().Add(harness.Patience)
	const want = requests + warming
	for {
		if _, err := s.Run(ctx, nil, "receipts", "export", "--evidence", "--file", file); err != nil {
			return nil, err
		}
		var err error
		if raw, err = os.ReadFile(file); err != nil {
			return nil, err
		}
		done := bytes.Count(raw, []byte(`knhk/outcome/v1`))
		if n := bytes.Count(raw, []byte("\n")); n == want && done == want {
			break
		} else if time.Now().After(deadline) {
			return nil, fmt.Errorf("%d receipts, %d outcomes: want %d of each", n, done, want)
		}
		time.Sleep(200 * time.Millisecond)
	}
	out, err := s.Run(ctx, nil, "verify", "--quiet", "--policy", filepath.Join(s.StateDir, "policy"), file)
	if err != nil {
		return nil, err
	}
	say("knhk verify: %s", bytes.TrimSpace(out))
	if !bytes.Contains(out, fmt.Appendf(nil, "%d verified, 0 refused", want)) {
		return nil, fmt.Errorf("knhk verify said: %s", out)
	}
	verdicts := map[string]int{}
	for line := range bytes.Lines(raw) {
		for _, v := range []string{"admit", "park", "refuse"} {
			for _, c := range []string{"R1", "W1"} {
				if bytes.Contains(line, fmt.Appendf(nil, `\"class\":\"%s\",\"verdict\":\"%s\"`, c, v)) {
					verdicts[c+" "+v]++
				}
			}
		}
	}
	for _, k := range []string{"R1 admit", "R1 refuse", "W1 admit", "W1 park", "W1 refuse"} {
		say("%4d %s", verdicts[k], k)
	}
	if verdicts["W1 park"] == 0 || verdicts["W1 refuse"] == 0 || verdicts["R1 admit"] == 0 {
		return nil, errors.New("the mix did not show every verdict")
	}
	return raw, nil
}

// story tells a parked receipt in words, and has the Python program check it.
func story(ctx context.Context, s *stack.Stack, bundles []byte) error {
	step("One receipt as a story")
	var picked []byte
	for line := range bytes.Lines(bundles) {
		if bytes.Contains(line, []byte(`\"verdict\":\"park\"`)) {
			picked = bytes.TrimSpace(line)
			break
		}
	}
	file := filepath.Join(s.Dir, "bundle.json")
	if err := os.WriteFile(file, picked, 0o600); err != nil {
		return err
	}
	out, err := s.Run(ctx, nil, "verify", "--story", "--policy", filepath.Join(s.StateDir, "policy"), file)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(out)) {
		say("%s", strings.TrimSpace(line))
	}
	step("The same bundle, checked by examples/verify.py, which shares no code with knhk")
	said, err := python(ctx, s, file)
	say("%s", said)
	return err
}

func python(ctx context.Context, s *stack.Stack, bundle string) (string, error) {
	root, err := harness.ModuleRoot()
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "python3", filepath.Join(root, "examples", "verify.py"), filepath.Join(s.StateDir, "policy"), bundle)
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(strings.ReplaceAll(string(out), s.Dir+"/", "")), err
}

// tampered changes one status in the bundle: both verifiers must refuse it.
func tampered(ctx context.Context, s *stack.Stack) error {
	step("A tampered bundle: the recorded verdict changed from park to admit")
	raw, err := os.ReadFile(filepath.Join(s.Dir, "bundle.json"))
	if err != nil {
		return err
	}
	forged := bytes.Replace(raw, []byte(`\"verdict\":\"park\"`), []byte(`\"verdict\":\"admit\"`), 1)
	if bytes.Equal(raw, forged) {
		return errors.New("nothing to tamper with")
	}
	file := filepath.Join(s.Dir, "tampered.json")
	if err := os.WriteFile(file, forged, 0o600); err != nil {
		return err
	}
	var exit *exec.ExitError
	out, err := s.Run(ctx, nil, "verify", "--policy", filepath.Join(s.StateDir, "policy"), file)
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		return fmt.Errorf("knhk verify did not refuse the tampered bundle: %w: %s", err, out)
	}
	say("knhk verify: %s", strings.ReplaceAll(string(bytes.TrimSpace(out)), s.Dir+"/", ""))
	said, err := python(ctx, s, file)
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		return fmt.Errorf("verify.py did not refuse the tampered bundle: %w: %s", err, said)
	}
	say("verify.py:   %s", said)
	return nil
}

// missingBlock deletes a block from a copy of the state directory; fsck must name it.
func missingBlock(ctx context.Context, s *stack.Stack) error {
	step("knhk is stopped. An audit of its directory, then of a copy with one block deleted")
	out, err := s.Run(ctx, nil, "fsck", s.StateDir)
	if err != nil {
		return err
	}
	say("%s", bytes.TrimSpace(out))
	broken := filepath.Join(s.Dir, "broken")
	if err := os.CopyFS(broken, os.DirFS(s.StateDir)); err != nil {
		return err
	}
	db, err := pebble.Open(filepath.Join(broken, "blocks"), &pebble.Options{Logger: quiet{}})
	if err != nil {
		return err
	}
	// Block 1 is the first with records: see the key spaces in region/receiptlog. Its records are chunks under 'C'.
	first, last := append([]byte{'C'}, 0, 0, 0, 0, 0, 0, 0, 1), append([]byte{'C'}, 0, 0, 0, 0, 0, 0, 0, 2)
	if err := errors.Join(db.DeleteRange(first, last, pebble.Sync), db.Close()); err != nil {
		return err
	}
	var exit *exec.ExitError
	out, err = s.Run(ctx, nil, "fsck", "-o", "json", broken)
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		return fmt.Errorf("knhk fsck did not see the missing block: %w: %s", err, out)
	}
	var report struct {
		Problems []struct{ Where, What string }
	}
	if err := json.Unmarshal(out, &report); err != nil {
		return err
	}
	named := false
	for _, p := range report.Problems {
		if len(report.Problems) < 4 || strings.HasPrefix(p.Where, "block 1 ") {
			say("WRONG %s: %s", p.Where, p.What)
		}
		named = named || strings.HasPrefix(p.Where, "block 1 ")
	}
	if !named {
		return fmt.Errorf("knhk fsck does not name block 1: %s", out)
	}
	return nil
}

type quiet struct{}

func (quiet) Infof(string, ...any)  {}
func (quiet) Errorf(string, ...any) {}
func (quiet) Fatalf(f string, a ...any) {
	panic(fmt.Sprintf(f, a...))
}
