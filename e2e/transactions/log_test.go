package transactions

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/knhk/sidecar/crypto/hsm/softhsm"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// logOf is site with other settings of the log.
func logOf(settings string) string {
	return strings.Replace(edited(), "log: {seal_every: 200ms}", "log: {"+settings+"}", 1)
}

// refusedFor reports whether resp is the refusal for this reason, as a client should get it.
func refusedFor(resp *harness.Response, reason string) error {
	after, err := strconv.Atoi(resp.Header.Get("Retry-After"))
	said := strings.Contains(string(resp.Body), reason)
	if resp.Status != 503 || err != nil || after < 1 || !said || resp.Header.Get("X-Knhk-Receipt") != "" {
		return fmt.Errorf("status %d, %v: %s", resp.Status, resp.Header, resp.Body)
	}
	return nil
}

// TestLogFull fills a small write-ahead log faster than blocks are closed: requests are refused, pass as counted gaps where
// the route says so, and are admitted again when a block has been closed.
func TestLogFull(t *testing.T) {
	both(t, func(t *testing.T, capture string) {
		w := start(t, stack.Config{Capture: capture, YAML: logOf("seal_every: 3s, wal_segment_mib: 1, wal_max_mib: 3")})
		long := "/p?" + strings.Repeat("q", 30<<10) // the path is evidence and so in the log
		refused, admitted, gaps := 0, 0, 0
		w.eventually("the log is full", time.Minute, func() error {
			for gaps < 3 {
				resp := w.get("fill", long)
				switch {
				case resp.Status == 200:
					admitted++
					continue
				case refusedFor(resp, "log_full") != nil:
					return refusedFor(resp, "log_full")
				}
				refused++
				if resp := w.get("full-allow", "/allow"); resp.Status != 200 {
					return fmt.Errorf("the route allows: %d", resp.Status)
				} else if resp.Header.Get("X-Knhk-Receipt") == "" {
					gaps++
				} else {
					admitted++
				}
			}
			return nil
		})
		if n := w.reached("fill") + w.reached("full-allow"); n != admitted+gaps {
			t.Errorf("the upstream saw %d requests, %d were admitted and %d gaps", n, admitted, gaps)
		}
		w.awaitMetric(float64(gaps), "knhk_gaps_total", `knhk_source="service"`)
		w.awaitMetric(float64(gaps), "knhk_gaps_total", `knhk_source="accesslog"`)
		w.awaitMetric(float64(refused), "knhk_unreceipted_total", `knhk_kind="refused_unrecorded"`)
		w.serves("room-again")
		if n := w.metric("knhk_gaps_total"); n != float64(2*gaps) {
			t.Errorf("%v gaps counted, by the service and the access log together, of %d", n, gaps)
		}
		tr := w.audit()
		if n := len(tr.byCase["fill"]) + len(tr.byCase["full-allow"]); n != admitted {
			t.Errorf("%d receipts for %d admitted requests", n, admitted)
		}
		t.Logf("%d admitted, %d refused, %d gaps", admitted, refused, gaps)
	})
}

// TestDiskFull takes the disk away under the log: everything is refused until there is room again, nothing is lost, and knhk goes on
// running. It does not start on a full disk, and says so.
func TestDiskFull(t *testing.T) {
	both(t, func(t *testing.T, capture string) {
		harness.RequireEnvoy(t)
		dir := directory(t)
		state := filepath.Join(dir, "state")
		if err := os.Mkdir(state, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", state, "tmpfs", 0, "size=48m,mode=0700"); err != nil {
			t.Skipf("needs a disk of its own, that is root: mount tmpfs: %v", err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(state, 0); err != nil {
				t.Error(err)
			}
		})
		w := start(t, stack.Config{Dir: dir, Capture: capture, YAML: logOf("seal_every: 200ms, wal_segment_mib: 1, wal_max_mib: 4")})
		passed := 0
		for range 5 {
			w.wantStatus("before", w.get("before", "/p"), 200)
			passed++
		}
		w.settle()
		ballast := filepath.Join(state, "ballast")
		f, err := os.Create(ballast)
		if err != nil {
			t.Fatal(err)
		}
		for block := make([]byte, 4096); err == nil; {
			_, err = f.Write(block)
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		w.eventually("requests are refused", time.Minute, func() error {
			resp, err := w.Do(t.Context(), harness.Request{Host: "filling" + caseSuffix, Target: "/p?" + strings.Repeat("q", 20<<10)})
			if err != nil {
				return err
			}
			if resp.Status == 200 {
				passed++
				return errors.New("admitted")
			}
			t.Logf("refused: %d %s", resp.Status, resp.Body)
			if resp.Status != 503 {
				return fmt.Errorf("status %d", resp.Status)
			}
			return nil
		})
		reached := len(w.Upstream.Seen())
		w.shut("disk-full")
		// In full capture the one under way when knhk ended may have been at the upstream and got 503 on its way back.
		if n := len(w.Upstream.Seen()); n != reached || n < passed || n > passed+1 {
			t.Errorf("the upstream saw %d, then %d requests, %d were admitted", reached, n, passed)
		}
		w.kill()
		if err := w.StartKnhk(t.Context()); err == nil || !strings.Contains(err.Error(), "are free on the volume of state_dir") {
			t.Errorf("knhk on a full disk: %v", err)
		}
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
		if err := w.StartKnhk(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.serves("after")
		tr := w.audit()
		if n := len(tr.byCase["before"]) + len(tr.byCase["filling"]); n < reached {
			t.Errorf("%d receipts for %d requests that went on", n, reached)
		}
	})
}

// TestTokenAway takes the HSM's token away: records stay durable and unsigned for max_unsigned, then requests are refused and
// readiness falls; when the token is back everything is signed and requests are admitted.
func TestTokenAway(t *testing.T) {
	both(t, func(t *testing.T, capture string) {
		if _, ok := softhsm.Find(); !ok {
			t.Skip("needs SoftHSM")
		}
		w := start(t, stack.Config{Capture: capture, YAML: logOf("seal_every: 200ms, max_unsigned: 2s")})
		w.wantStatus("signed", w.get("signed", "/p"), 200)
		w.settle()
		token, away := filepath.Join(w.Dir, "token"), filepath.Join(w.Dir, "token-away")
		if err := os.Rename(token, away); err != nil {
			t.Fatal(err)
		}
		admitted := 0
		w.eventually("requests are refused", time.Minute, func() error {
			resp := w.get("unsigned", "/p")
			if resp.Status == 200 {
				admitted++
				return errors.New("admitted")
			}
			return refusedFor(resp, "unsigned_too_long")
		})
		if admitted == 0 {
			t.Error("nothing was admitted while the token was away: records may be unsigned for max_unsigned")
		}
		if code, text := w.ready(); code != 503 {
			t.Errorf("readyz: %d %s", code, text)
		}
		if err := os.Rename(away, token); err != nil {
			t.Fatal(err)
		}
		w.until("readyz is back", func() bool { code, _ := w.ready(); return code == 200 })
		w.serves("signed-again")
		tr := w.audit()
		if n := len(tr.byCase["unsigned"]); n != admitted || w.reached("unsigned") != admitted {
			t.Errorf("%d receipts for %d admitted requests, the upstream saw %d", n, admitted, w.reached("unsigned"))
		}
		t.Logf("%d admitted while the token was away", admitted)
	})
}
