package failclosed

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/knhk/sidecar/crypto/hsm/softhsm"
	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/faultfs"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// logOf is the site with other settings of the log. An outcome that nobody can tell, since Envoy gave up on a decision while it was made,
// is unknown before the test has lost its patience.
func logOf(settings string) string { return "log: {outcome_timeout: 30s, " + settings + "}" + routes }

// untilRefused sends requests to a route of W1 and to one of R1, until both are refused for this reason, or pass without a receipt where
// nothing is denied, and returns how many were admitted before. padding makes requests large.
func (w *site) untilRefused(name string, want refusal, padding int) (admitted int) {
	w.t.Helper()
	w.Eventually("requests are refused", func() (last error) {
		for _, target := range slices.Repeat([]string{"/p", "/hot"}, 1+padding>>10) { // large ones are to fill something: no pause between them
			resp := w.Get(name, target+"?"+strings.Repeat("q", padding)) // the path is evidence and so in the log
			if resp.Status == 200 && resp.Header.Get("X-Knhk-Receipt") != "" {
				admitted++
				last = errors.New("admitted")
				continue
			}
			if !w.denying && resp.Status == 200 {
				w.gap()
			} else if err := want.check(resp); err != nil {
				return err
			}
		}
		return last
	})
	return admitted
}

// walBytes is the size of the segments of the write-ahead log as the file system has them.
func (w *site) walBytes() (n int64) {
	w.t.Helper()
	files, err := os.ReadDir(filepath.Join(w.StateDir, "wal"))
	if err != nil {
		w.t.Fatal(err)
	}
	for _, f := range files {
		if fi, err := f.Info(); err == nil {
			n += fi.Size()
		}
	}
	return n
}

// TestLogFull fills a small write-ahead log before a block is closed: what is in it stands, and nothing else is admitted until a block
// has been closed.
func TestLogFull(t *testing.T) {
	t.Parallel()
	full := refusal{503, "log_full"}
	each(t, "log-full", stack.Config{YAML: logOf("seal_every: 15s, wal_segment_mib: 1, wal_max_mib: 3")}, func(w *site) {
		w.startKnhk("")
		mark := w.mark()
		w.startEnvoy()
		admitted := 0
		// Until the next block is so far off that the log stays full meanwhile.
		for tries, took := 0, time.Hour; took > 6*time.Second; tries++ {
			if tries == 5 {
				t.Fatalf("filling a log of 3 MiB takes %v", took)
			}
			blocks := w.Metric("knhk_log_blocks_total")
			w.serves("before") // a record to be in it
			w.AwaitMetric(blocks+1, "knhk_log_blocks_total")
			begin := time.Now()
			for _, padding := range []int{30 << 10, 2 << 10, 0} {
				admitted += w.untilRefused("fill", full, padding)
			}
			took = time.Since(begin)
		}
		if n := w.walBytes(); n < 3<<20 {
			t.Errorf("the write-ahead log has %d bytes of 3 MiB", n)
		} else {
			w.observed("size of the files in wal/")
		}
		refused := w.refuses("full", full)
		w.passes("gap-full", 4)
		w.counted(w.gaps, w.gaps, 0)
		w.AwaitMetric(float64(refused), "knhk_unreceipted_total", `knhk_kind="refused_unrecorded"`)
		line := w.logged(mark, "decision cannot be recorded", "reason=log_full")
		w.serves("room-again")
		w.counted(w.gaps, w.gaps, 0)
		tr := w.complete(0)
		if n := len(tr.ByCase["fill"]); n != admitted {
			t.Errorf("%d receipts for %d admitted requests", n, admitted)
		}
		w.row("write-ahead log full", full.String(), knhkExact, unrecorded, line)
	})
}

// ownDisk gives the stack a state directory on a disk of its own, in memory.
func ownDisk(t *testing.T, w *site, size string) {
	t.Helper()
	if err := os.MkdirAll(w.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", w.StateDir, "tmpfs", 0, "size="+size+",mode=0700"); err != nil {
		t.Fatal(err)
	}
	w.mounted(w.StateDir)
}

// mounted has a mount undone when the test ends; what still runs on it is ended by then.
func (w *site) mounted(dir string) {
	w.t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			w.t.Error(err)
		}
	})
}

// needRoot skips a test that mounts, and fails it where nothing may be skipped.
func needRoot(t *testing.T) {
	t.Helper()
	need(t, os.Geteuid() == 0, "needs root: it mounts a file system")
}

// need skips a test that lacks something; with CI=true it fails.
func need(t *testing.T, have bool, what string) {
	t.Helper()
	switch {
	case have:
	case os.Getenv("CI") == "true":
		t.Fatal(what)
	default:
		t.Skip(what)
	}
}

// TestDiskFull takes the disk away under the log: everything is refused until there is room again, nothing is lost, and knhk goes on
// running. It does not start on a full disk, and says so.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	needRoot(t)
	full := refusal{503, "log_full"}
	each(t, "disk-full", stack.Config{YAML: logOf("wal_segment_mib: 1, wal_max_mib: 4")}, func(w *site) {
		ownDisk(t, w, "48m")
		w.startKnhk("")
		mark := w.mark()
		w.startEnvoy()
		w.serves("before")
		w.fillDisk()
		w.observed("ENOSPC of another writer")
		w.untilRefused("filling", full, 0)
		refused := w.refuses("full", full)
		w.passes("gap-full", 4)
		w.counted(w.gaps, w.gaps, 0)
		w.AwaitMetric(float64(refused), "knhk_unreceipted_total", `knhk_kind="refused_unrecorded"`)
		line := w.logged(mark, "decision cannot be recorded", "reason=log_full")
		if err := os.Remove(w.ballast()); err != nil {
			t.Fatal(err)
		}
		w.serves("room-again")
		w.fillDisk()
		w.KillKnhk()
		if err := w.StartKnhk(t.Context()); err == nil || !strings.Contains(err.Error(), "are free on the volume of state_dir") {
			t.Errorf("knhk on a full disk: %v", err)
		}
		if err := os.Remove(w.ballast()); err != nil {
			t.Fatal(err)
		}
		w.startKnhk("restarted")
		w.complete(0)
		w.row("disk full", full.String(), knhkExact, unrecorded+", knhk_log_refusing", line)
	})
}

func (w *site) ballast() string { return filepath.Join(w.StateDir, "ballast") }

// fillDisk writes until there is no space left.
func (w *site) fillDisk() {
	w.t.Helper()
	f, err := os.Create(w.ballast())
	if err != nil {
		w.t.Fatal(err)
	}
	defer f.Close()
	for block := make([]byte, 4096); err == nil; {
		_, err = f.Write(block)
	}
	if !errors.Is(err, unix.ENOSPC) {
		w.t.Fatal(err)
	}
}

// TestReadOnly makes the state directory read-only while knhk runs: what it has open it can still write, but it can make no new file and
// replace none. Records stay durable and unsigned for max_unsigned, then requests are refused, until the directory can be written again.
// knhk does not start on such a directory, and says so.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	needRoot(t)
	unsigned := refusal{503, "unsigned_too_long"}
	each(t, "log-read-only", stack.Config{YAML: logOf("max_unsigned: 2s")}, func(w *site) {
		w.startKnhk("")
		mark := w.mark()
		w.startEnvoy()
		w.serves("before")
		w.Settle()
		signed := w.Metric("knhk_log_checkpoint")
		w.readOnly()
		w.observed("EROFS of another writer")
		admitted := w.untilRefused("read-only", unsigned, 0)
		if n := w.Metric("knhk_log_checkpoint"); n != signed {
			t.Errorf("the checkpoint went from %v to %v leaves in a read-only directory", signed, n)
		}
		refused := w.refuses("refused", unsigned)
		w.passes("gap-refused", 4)
		w.counted(w.gaps, w.gaps, 0)
		w.AwaitMetric(float64(refused), "knhk_unreceipted_total", `knhk_kind="refused_unrecorded"`)
		line := w.logged(mark, "cannot add to the log", "read-only file system")
		w.writable()
		w.serves("writable-again")
		w.AwaitMetric(signed+1, "knhk_log_checkpoint")

		w.readOnly()
		w.KillKnhk()
		if err := w.StartKnhk(t.Context()); err == nil || !strings.Contains(err.Error(), "read-only file system") {
			t.Errorf("knhk on a read-only directory: %v", err)
		}
		w.refuses("not-started", refusal{503, ""})
		w.writable()
		w.startKnhk("restarted")
		tr := w.complete(0)
		if n := len(tr.ByCase["read-only"]); n != admitted || admitted == 0 {
			t.Errorf("%d receipts for %d admitted requests", n, admitted)
		}
		w.row("log directory read-only", fmt.Sprintf("admitted, durable, unsigned for max_unsigned; then %v; does not start", unsigned), knhkExact,
			unrecorded+", knhk_log_refusing, knhk_log_unsigned_seconds", line)
	})
}

// ends sends requests until knhk has ended by itself.
func (w *site) ends(name string) {
	w.t.Helper()
	w.Until("knhk ends", func() bool {
		resp, err := w.Do(w.t.Context(), harness.Request{Host: name + audited.CaseSuffix, Target: "/p"})
		if err == nil && resp.Status != 200 && resp.Status != 503 {
			w.t.Errorf("%s: %d", name, resp.Status)
		}
		if err == nil && resp.Status == 200 && resp.Header.Get("X-Knhk-Receipt") == "" {
			w.gap()
		}
		select {
		case <-w.Knhk.Exited():
			return true
		default:
			return false
		}
	})
}

// checkpoint is what the log has signed last, once what it was signing is through: two readings a few seals apart are equal. A log that
// goes on has a heartbeat, and records of its own to sign; one that has failed must not change it any more.
func (w *site) checkpoint() (text string) {
	w.t.Helper()
	w.Eventually("the log signs nothing more", func() error {
		before := text
		b, err := os.ReadFile(filepath.Join(w.StateDir, "log", "checkpoint"))
		if text = string(b); err == nil && text != before {
			time.Sleep(2 * time.Second) // two of seal_every: what it must not use
			err = errors.New("a checkpoint")
		}
		return err
	})
	return text
}

// TestFailedSync has one fsync of the write-ahead log or of the block store fail. Nothing is admitted and nothing signed after it,
// whatever the disk says later: only a restart, which audits the state, ends it.
func TestFailedSync(t *testing.T) {
	t.Parallel()
	needRoot(t)
	round := 0
	each(t, "failed-fsync", stack.Config{}, func(w *site) {
		place := []string{"wal/*", "blocks/*"}[(round+round/2)%2] // both in both captures, in four rounds
		round++
		if err := os.MkdirAll(w.StateDir, 0o700); err != nil {
			t.Fatal(err)
		}
		disk := faultfs.Mount(w.t, w.StateDir)
		w.t.Cleanup(func() { // before the mount goes
			if w.Knhk != nil {
				w.Knhk.Kill()
			}
		})
		w.startKnhk("")
		w.startEnvoy()
		w.serves("before")
		mark := w.mark()
		failed := disk.Fail(faultfs.Fault{Op: faultfs.OpSync, Path: place, Errno: syscall.EIO, Times: 1})
		want := refusal{503, "log_unavailable"}
		if place == "wal/*" {
			w.untilRefused("failing", want, 0)
			signed := w.checkpoint()
			refused := w.refuses("failed", want)
			w.passes("gap-failed", 4)
			w.counted(w.gaps, w.gaps, 0)
			w.AwaitMetric(float64(refused), "knhk_unreceipted_total", `knhk_kind="refused_unrecorded"`)
			if n := w.Metric("knhk_log_refusing"); n != 1 {
				t.Errorf("knhk_log_refusing is %v", n)
			}
			line := w.logged(mark, "decision cannot be recorded", "reason=log_unavailable", "input/output error")
			disk.ClearFaults()
			w.refuses("disk-is-back", want)
			if after := w.checkpoint(); after != signed {
				t.Errorf("after a failed fsync and\n%s\nthe log signed\n%s", signed, after)
			}
			w.row("failed fsync of the write-ahead log", want.String()+", until restart", knhkExact,
				unrecorded+", knhk_log_refusing", line)
			w.KillKnhk()
		} else { // the block store cannot tell what it has: knhk ends
			w.ends("failing")
			line := w.logged(mark, "block store cannot go on", "input/output error")
			before := w.stat(w.failedOpen)
			w.refuses("failed", refusal{503, ""})
			passed := w.passes("gap-failed", 4)
			if n := w.stat(w.failedOpen) - before; n != float64(passed) {
				t.Errorf("Envoy counts %v gaps of %d", n, passed)
			}
			w.row("failed fsync of the block store", "503, empty: knhk ends", envoyExact,
				"Envoy "+w.failed, line)
		}
		if n := failed.Hits(); n == 1 {
			w.observed("faultfs' count of EIO")
		} else {
			t.Errorf("%d fsyncs failed", n)
		}
		mark = w.mark()
		w.startKnhk("restarted")
		w.logged(mark, "unknown interval", "since=", "until=")
		late := 0
		if !w.denying {
			late = 1 // whose fsync failed: it passed, and its decision may be in the log all the same
		}
		w.complete(late)
	})
}

// TestTokenAway takes the HSM's token away: records stay durable and unsigned for max_unsigned, then requests are refused; when the
// token is back everything is signed and requests are admitted.
func TestTokenAway(t *testing.T) {
	t.Parallel()
	_, ok := softhsm.Find()
	need(t, ok, "needs SoftHSM")
	unsigned := refusal{503, "unsigned_too_long"}
	each(t, "token-away", stack.Config{YAML: logOf("max_unsigned: 2s")}, func(w *site) {
		w.startKnhk("")
		mark := w.mark()
		w.startEnvoy()
		w.serves("before")
		w.Settle()
		signed := w.Metric("knhk_log_checkpoint")
		if !w.token() {
			t.Fatal("softhsm2-util does not see the token")
		}
		token, away := filepath.Join(w.Dir, "token"), filepath.Join(w.Dir, "token-away")
		if err := os.Rename(token, away); err != nil {
			t.Fatal(err)
		}
		before := w.gaps
		admitted := w.untilRefused("unsigned", unsigned, 0)
		passed := w.gaps - before
		if admitted == 0 {
			t.Error("nothing was admitted while the token was away: records may be unsigned for max_unsigned")
		}
		if n := w.Metric("knhk_log_checkpoint"); n != signed {
			t.Errorf("the checkpoint went from %v to %v leaves without a token", signed, n)
		}
		if w.token() {
			t.Error("softhsm2-util still sees the token")
		} else {
			w.observed("softhsm2-util sees no token")
		}
		refused := w.refuses("refused", unsigned)
		w.passes("gap-refused", 4)
		w.counted(w.gaps, w.gaps, 0)
		w.AwaitMetric(float64(refused), "knhk_unreceipted_total", `knhk_kind="refused_unrecorded"`)
		if n := w.Metric("knhk_log_refusing"); n != 1 {
			t.Errorf("knhk_log_refusing is %v", n)
		}
		if code, text := w.Ready(); code != 503 {
			t.Errorf("readyz: %d %s", code, text)
		}
		line := w.logged(mark, "decision cannot be recorded", "reason=unsigned_too_long")
		if err := os.Rename(away, token); err != nil {
			t.Fatal(err)
		}
		w.Until("readyz is back", func() bool { code, _ := w.Ready(); return code == 200 })
		w.serves("signed-again")
		w.AwaitMetric(signed+1, "knhk_log_checkpoint")
		tr := w.complete(0)
		if n := len(tr.ByCase["unsigned"]); n != admitted || w.Reached("unsigned") != admitted+passed {
			t.Errorf("%d receipts for %d admitted requests, the upstream saw %d", n, admitted, w.Reached("unsigned"))
		}
		w.runs[0].Add("durable while unsigned", float64(admitted))
		w.row("HSM gone", fmt.Sprintf("admitted, durable, unsigned for max_unsigned; then %v", unsigned), knhkExact,
			unrecorded+", knhk_log_refusing, knhk_log_unsigned_seconds", line)
	})
}

// token reports whether SoftHSM's own tool sees the token.
func (w *site) token() bool {
	w.t.Helper()
	tool, err := exec.LookPath("softhsm2-util")
	if err != nil {
		w.t.Fatal(err)
	}
	cmd := exec.CommandContext(w.t.Context(), tool, "--show-slots")
	cmd.Env = append(os.Environ(), softhsm.ConfEnv+"="+filepath.Join(w.Dir, "token", "softhsm2.conf"))
	out, err := cmd.CombinedOutput()
	return err == nil && strings.Contains(string(out), "knhk")
}

// readOnly covers the state directory with itself, read-only.
func (w *site) readOnly() {
	w.t.Helper()
	if err := unix.Mount(w.StateDir, w.StateDir, "", unix.MS_BIND, ""); err != nil {
		w.t.Fatal(err)
	}
	w.mounted(w.StateDir)
	if err := unix.Mount("", w.StateDir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.StateDir, "probe"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		w.t.Fatalf("another writer: %v", err)
	}
}

func (w *site) writable() {
	w.t.Helper()
	if err := unix.Unmount(w.StateDir, unix.MNT_DETACH); err != nil {
		w.t.Fatal(err)
	}
}
