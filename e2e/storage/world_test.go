//go:build linux

package storage

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/knhk/sidecar/e2e/faultfs"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

const site = `
log: {seal_every: 200ms, wal_segment_mib: 1, wal_max_mib: 8}
beat:
  r1: {capacity: 10000}
  w1: {capacity: 10000}
default_route: {class: W1}
routes:
- {name: hot, prefix: /hot, cluster: up, policy: {class: R1}}
- {name: pages, prefix: /p, cluster: up}
envoy:
  access_log_flush: 50ms
  clusters:
  - {name: up, endpoints: ["UPSTREAM"]}
`

// world is a stack whose state directory and keys are on a disk that forgets and fails, and what was seen of it from outside.
type world struct {
	*stack.Stack
	t      *testing.T
	disk   *faultfs.FS
	boot   string // file with the boot id that knhk sees
	policy string // copy of the log's policy file, taken at the first start, as an auditor has it

	births int // of new state directories

	mu          sync.Mutex
	next        int
	acked       map[string]string // class by receipt id, of every 200 that a client received
	status      map[int]int       // how many responses there were of each status
	checkpoints map[string]bool   // every signed checkpoint that was ever served
	bundles     string            // file with the last export; empty before there is one
}

// newWorld prepares a stack; nothing but the upstream runs yet.
func newWorld(t *testing.T) *world {
	t.Helper()
	harness.RequireEnvoy(t)
	if _, err := exec.LookPath("unshare"); err != nil && os.Getenv("CI") != "true" {
		t.Skipf("needs unshare (util-linux) to show knhk another boot id: %v", err)
	}
	dir := harness.Directory(t, "")
	w := &world{t: t, boot: filepath.Join(dir, "boot_id"), policy: filepath.Join(dir, "policy"),
		acked: map[string]string{}, status: map[int]int{}, checkpoints: map[string]bool{}}
	mount := filepath.Join(dir, "disk")
	if err := os.Mkdir(mount, 0o700); err != nil {
		t.Fatal(err)
	}
	w.disk = faultfs.Mount(t, mount)
	var err error
	if w.Stack, err = stack.New(t.Context(), stack.Config{Dir: dir, Soft: true, YAML: site}); err != nil {
		t.Fatal(err)
	}
	w.newborn()
	t.Cleanup(w.end)
	w.reboot()
	// The kernel's boot id tells knhk whether the machine crashed. This knhk sees one that the test can change.
	script := fmt.Sprintf("#!/bin/sh\nexec unshare --mount sh -c 'mount --bind %s /proc/sys/kernel/random/boot_id && exec %s \"$@\"' sh \"$@\"\n", w.boot, w.Bin)
	w.Bin = filepath.Join(dir, "knhk")
	// A process that another test starts just now would inherit the open script for a moment, in which nobody can run it (ETXTBSY).
	syscall.ForkLock.RLock()
	err = os.WriteFile(w.Bin, []byte(script), 0o700)
	syscall.ForkLock.RUnlock()
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// newborn gives the stack a new, empty state directory and new keys, both on the disk; what was seen of an old log is forgotten.
func (w *world) newborn() {
	w.t.Helper()
	w.births++
	old := filepath.Dir(w.StateDir)
	dir := filepath.Join(w.disk.Dir(), fmt.Sprintf("life-%d", w.births))
	w.must(os.Mkdir(dir, 0o700))
	d, err := os.Open(w.disk.Dir())
	w.must(err)
	w.must(errors.Join(d.Sync(), d.Close())) // what stands above its directories is not knhk's to sync
	config, err := os.ReadFile(w.ConfigFile)
	w.must(err)
	config = []byte(strings.NewReplacer(old+"/state", dir+"/state", old+"/keys", dir+"/keys").Replace(string(config)))
	w.must(os.WriteFile(w.ConfigFile, config, 0o600))
	w.StateDir = filepath.Join(dir, "state")
	w.mu.Lock()
	defer w.mu.Unlock()
	clear(w.acked)
	clear(w.checkpoints)
	w.bundles = ""
	_ = os.Remove(w.policy) // taken again at the next start
	w.Upstream.Forget()
}

// reboot gives the machine a new boot id.
func (w *world) reboot() {
	w.t.Helper()
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails
	if err := os.WriteFile(w.boot, []byte(hex.EncodeToString(id[:])+"\n"), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// end stops what still runs, before the disk is unmounted.
func (w *world) end() {
	if w.Envoy != nil {
		w.Envoy.Kill()
	}
	if w.Knhk != nil {
		w.Knhk.Kill()
	}
	w.Upstream.Close()
	if w.t.Failed() && w.Knhk != nil {
		w.t.Logf("log of knhk:\n%s", w.Knhk.LogTail(6000))
	}
}

// start starts knhk, and Envoy if it does not run yet.
func (w *world) start() error {
	if err := w.StartKnhk(w.t.Context()); err != nil {
		return err
	}
	if _, err := os.Stat(w.policy); err != nil {
		b, err := os.ReadFile(filepath.Join(w.StateDir, "policy"))
		if err == nil {
			err = os.WriteFile(w.policy, b, 0o600)
		}
		if err != nil {
			return err
		}
	}
	if w.Envoy == nil {
		if err := w.StartEnvoy(w.t.Context()); err != nil {
			return err
		}
	}
	return w.eventually(harness.Patience, func() error {
		resp, err := w.send("/p")
		if err == nil && resp != 200 {
			err = fmt.Errorf("status %d", resp)
		}
		return err
	})
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// send sends one request of its own path to Envoy, and notes the receipt of a 200.
func (w *world) send(prefix string) (int, error) {
	c, err := harness.Dial(w.t.Context(), w.Listener)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	return w.sendOn(c, prefix)
}

func (w *world) sendOn(c *harness.Conn, prefix string) (int, error) {
	w.mu.Lock()
	w.next++
	target := fmt.Sprintf("%s/n%d.", prefix, w.next)
	w.mu.Unlock()
	resp, err := c.Do(harness.Request{Host: "disk.test", Target: target})
	if err != nil {
		return 0, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.status[resp.Status]++
	if resp.Status == 200 {
		id, class := resp.Header.Get("X-Knhk-Receipt"), resp.Header.Get("X-Knhk-Class")
		if id == "" || class == "" || w.acked[id] != "" {
			return 0, fmt.Errorf("a 200 with receipt %q, class %q", id, class)
		}
		w.acked[id] = class
	}
	return resp.Status, nil
}

func (w *world) ackedCount() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.acked)
}

// load sends requests on a connection for each prefix, and watches the checkpoint as an auditor would, until stop is called.
func (w *world) load(prefixes ...string) (stop func()) {
	ctx, cancel := context.WithCancel(w.t.Context())
	var wg sync.WaitGroup
	for _, prefix := range prefixes {
		wg.Go(func() {
			var c *harness.Conn
			for ctx.Err() == nil {
				var err error
				if c == nil {
					if c, err = harness.Dial(w.t.Context(), w.Listener); err != nil {
						continue
					}
				}
				status, err := w.sendOn(c, prefix)
				if err != nil {
					c.Close()
					c = nil
				}
				if status != 200 {
					pause(ctx, 5*time.Millisecond)
				}
			}
			if c != nil {
				c.Close()
			}
		})
	}
	wg.Go(func() {
		for ctx.Err() == nil {
			w.watch()
			pause(ctx, 20*time.Millisecond)
		}
	})
	return func() {
		cancel()
		wg.Wait()
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// watch keeps the checkpoint that is served now.
func (w *world) watch() {
	b, err := harness.Get(w.t.Context(), "http://"+w.Tiles+"/checkpoint")
	if err != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.checkpoints[string(b)] = true
}

// eventually polls ok until it returns nil.
func (w *world) eventually(limit time.Duration, ok func() error) error {
	deadline := time.Now().Add(limit)
	for {
		err := ok()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// metric is the sum of a metric's series whose labels contain label.
func (w *world) metric(name, label string) (float64, error) {
	m, err := harness.Metrics(w.t.Context(), w.Admin)
	return m.Sum(name, label), err
}

// settle waits until nothing is pending and everything is signed, and exports every receipt.
func (w *world) settle() (transcript, error) {
	file := filepath.Join(w.Dir, "receipts.new")
	var tr transcript
	err := w.eventually(harness.Patience, func() error {
		pending, err := w.metric("knhk_receipts_pending", "")
		unsigned, err2 := w.metric("knhk_log_unsigned_seconds", "")
		if err := errors.Join(err, err2); err != nil {
			return err
		}
		if pending != 0 || unsigned != 0 {
			return fmt.Errorf("%v pending, unsigned for %v s", pending, unsigned)
		}
		if _, err := w.Run(w.t.Context(), nil, "receipts", "export", "--evidence", "--file", file); err != nil {
			return err
		}
		raw, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		tr, err = readTranscript(raw)
		return err
	})
	if err != nil {
		return tr, fmt.Errorf("the log does not settle: %w", err)
	}
	if err := w.verify(file, len(tr.list)); err != nil {
		return tr, err
	}
	if w.bundles != "" { // taken before: they must still verify, whatever happened since
		if err := w.verify(w.bundles, -1); err != nil {
			return tr, fmt.Errorf("bundles taken before: %w", err)
		}
	}
	w.bundles = filepath.Join(w.Dir, "receipts.jsonl")
	return tr, os.Rename(file, w.bundles)
}

// verify has `knhk verify` look at bundles, with the policy that was taken at the first start.
func (w *world) verify(file string, want int) error {
	out, err := w.Run(w.t.Context(), nil, "verify", "--quiet", "--policy", w.policy, file)
	if err != nil || !bytes.Contains(out, []byte(", 0 refused")) || want >= 0 && !bytes.Contains(out, fmt.Appendf(nil, "%d verified", want)) {
		return fmt.Errorf("verify: %w\n%s", err, out)
	}
	return nil
}

// stop ends knhk in order.
func (w *world) stop() error {
	k := w.Knhk
	w.Knhk = nil
	return k.Stop(w.t.Context())
}

// kill ends knhk at once.
func (w *world) kill() {
	w.Knhk.Kill()
	w.Knhk = nil
}

// fsck audits the state directory of a stopped knhk.
func (w *world) fsck() error {
	out, err := w.Run(w.t.Context(), nil, "fsck", w.StateDir)
	if err != nil || !bytes.Contains(out, []byte("0 problems")) {
		return fmt.Errorf("fsck: %w\n%s", err, out)
	}
	return nil
}

// audit settles the log, compares it with what was seen from outside, stops knhk, runs fsck and reads the log itself.
func (w *world) audit() (transcript, error) {
	tr, err := w.settle()
	if err != nil {
		return tr, err
	}
	w.watch()
	if err := w.stop(); err != nil {
		return tr, err
	}
	if err := w.fsck(); err != nil {
		return tr, err
	}
	return tr, w.compare(&tr)
}
