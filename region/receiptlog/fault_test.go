package receiptlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/region/wal"
	"github.com/knhk/sidecar/region/wal/waltest"
)

// eventually waits for what the log's own goroutines do.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// quietWAL waits until everything is synced and the next segment is ready: the sync that comes next is that of the next record.
func quietWAL(t *testing.T, f *fixture, fs *waltest.FS) {
	t.Helper()
	eventually(t, "a quiet WAL", func() bool {
		names, err := fs.ReadDir(filepath.Join(f.cfg.Dir, "wal"))
		segments := 0
		for _, name := range names {
			if strings.HasSuffix(name, ".wal") {
				segments++
			}
		}
		s := f.log.wal.Stats()
		return err == nil && segments == 2 && s.Durable == s.Next
	})
}

func TestOpenRefuses(t *testing.T) {
	f := newFixture(t)
	f.open()
	if _, err := Open(t.Context(), f.cfg); err == nil || !strings.Contains(err.Error(), "another knhk owns it") {
		t.Errorf("second owner: %v", err)
	}
	f.close()
	v, err := f.store.Create(t.Context(), "other", keys.Ed25519)
	if err != nil {
		t.Fatal(err)
	}
	other, err := f.store.Signer(t.Context(), "other", v.ID)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, want string
		change     func(*Config)
	}{
		{"another identity key under the log", "the identity key of a log never changes", func(c *Config) { c.Identity = other }},
		{"another origin", "an origin is for ever", func(c *Config) { c.Origin = "example.com/other" }},
		{"another instance", "receipt ids carry the name", func(c *Config) { c.Instance = "b" }},
		{"a directory with something else in it", "no VERSION file", func(c *Config) {
			c.Dir = t.TempDir()
			os.WriteFile(filepath.Join(c.Dir, "precious"), nil, 0o600)
		}},
		{"a newer layout", "this program reads", func(c *Config) {
			c.Dir = t.TempDir()
			os.WriteFile(filepath.Join(c.Dir, "VERSION"), []byte("knhk-state 3\n"), 0o600)
		}},
		{"a layout that was never released", "made by an older knhk", func(c *Config) {
			c.Dir = t.TempDir()
			os.WriteFile(filepath.Join(c.Dir, "VERSION"), []byte("knhk-state 1\n"), 0o600)
		}},
		{"a daily key for two days", "at most 24h", func(c *Config) { c.DailyMaxAge = 48 * time.Hour }},
	} {
		cfg := f.cfg
		c.change(&cfg)
		if l, err := Open(t.Context(), cfg); err == nil {
			l.Close(context.Background())
			t.Errorf("%s: opened", c.name)
		} else if !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	f.open() // and none of it did any harm
}

// flakyKey fails while told to, as a token that is away does.
type flakyKey struct {
	keys.Signer
	away atomic.Bool
}

func (k *flakyKey) Sign(ctx context.Context, msg []byte) ([]byte, error) {
	if k.away.Load() {
		return nil, keys.ErrUnavailable
	}
	return k.Signer.Sign(ctx, msg)
}

// TestUnsigned takes the identity key away: records stay durable, then requests are refused, and both end when it is back.
func TestUnsigned(t *testing.T) {
	f := newFixture(t)
	k := &flakyKey{Signer: f.cfg.Identity}
	f.cfg.Identity, f.cfg.MaxUnsigned = k, time.Second
	l := f.open()
	f.bundle(f.decide(wal.Durable, "before"), 1)
	k.away.Store(true)
	during := f.decide(wal.Durable, "during") // durable and unsigned is good enough for a while
	eventually(t, "refusal", func() bool { return errors.Is(l.Refusing(), ErrUnsigned) })
	if err := l.Decide(t.Context(), wal.Durable, &receipt.Decision{Class: "W1", Verdict: "admit", Reason: "ok", Capture: "lean"}, &receipt.Request{}); !errors.Is(err, ErrUnsigned) {
		t.Errorf("decide while unsigned: %v", err)
	}
	if s, err := l.Get(t.Context(), during); err != nil || s.State == StateLogged {
		t.Errorf("unsigned receipt is %q, %v", s.State, err)
	}
	k.away.Store(false)
	eventually(t, "admission", func() bool { return l.Refusing() == nil })
	f.bundle(during, 1)
	f.bundle(f.decide(wal.Durable, "after"), 1)
	f.close()
	f.fsckClean()
}

// TestUnknownOutcome lets a decision wait for too long, then the truth arrive late.
func TestUnknownOutcome(t *testing.T) {
	f := newFixture(t)
	f.cfg.OutcomeTimeout = time.Second
	l := f.open()
	id := f.decide(wal.Durable, "r")
	v := f.bundle(id, 2)
	if o := v.Outcomes[0]; o.Result != string(policy.ResultUnknown) || o.Details != "outcome_timeout" || o.Source != "recovery" {
		t.Errorf("outcome %+v", o)
	}
	f.outcome(id, 201)
	v = f.bundle(id, 3)
	if o := v.Outcomes[1]; !o.Late || o.Status != 201 {
		t.Errorf("late outcome %+v", o)
	}
	f.outcome(id, 500) // nothing comes after that
	if s := l.Stats(); s.LateOutcomes != 1 || s.UnknownOutcomes != 1 || s.DuplicateOutcomes != 1 {
		t.Errorf("counts %+v", s)
	}
	if err := l.Outcome(t.Context(), "01932c5e-8a4b-7c3d-9e2f-112233445566.b", unknownOutcome("x")); !errors.Is(err, ErrNotFound) {
		t.Errorf("outcome of another replica's decision: %v", err)
	}
	f.close()
	f.fsckClean()
}

// TestFailedSync makes one fdatasync of the WAL fail: from then on nothing is acknowledged, sealed or signed, until a restart.
func TestFailedSync(t *testing.T) {
	fs := waltest.New(0)
	f := newFixture(t)
	f.cfg.WALFS = fs
	l := f.open()
	before := f.decide(wal.Durable, "before")
	f.bundle(before, 1)
	quietWAL(t, f, fs)
	fs.FailNth(waltest.OpSync, 1, waltest.Fault{Err: errors.New("input/output error")})
	d := receipt.Decision{Class: "W1", Verdict: "admit", Reason: "ok", Capture: "lean"}
	err := l.Decide(t.Context(), wal.Durable, &d, &receipt.Request{})
	if !errors.Is(err, ErrUnavailable) {
		t.Fatalf("decide over a failed sync: %v", err)
	}
	eventually(t, "the latch", func() bool { return errors.Is(l.Refusing(), ErrUnavailable) })
	size := l.Stats().CheckpointSize
	if err := l.Decide(t.Context(), wal.Written, &d, &receipt.Request{}); !errors.Is(err, ErrUnavailable) {
		t.Errorf("decide after a failed sync: %v", err)
	}
	f.stop()
	<-f.done
	l.Close(context.Background()) // reports the fault again
	f.log = nil
	if got := l.Stats().CheckpointSize; got != size {
		t.Errorf("the log signed %d leaves after the fault, had %d", got, size)
	}
	f.cfg.WALFS = fs.Clone() // the restart
	f.open()
	f.bundle(before, 1)
	f.close()
	f.fsckClean()
}

// TestFsckNames damages a directory in ways that an audit must name.
func TestFsckNames(t *testing.T) {
	f := newFixture(t)
	f.open()
	for i := range 30 {
		f.outcome(f.decide(wal.Durable, fmt.Sprint(i)), 200)
	}
	f.close()
	f.fsckClean()
	whole := f.cfg.Dir
	edit := func(dir string, change func(db *pebble.DB) error) {
		db, err := pebble.Open(filepath.Join(dir, "blocks"), &pebble.Options{Logger: pebbleLog{f.cfg.Log}})
		if err == nil {
			err = errors.Join(change(db), db.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name, where, what string
		damage            func(dir string)
	}{
		{"a block's records are deleted", "block 1 ", "is missing", func(dir string) {
			edit(dir, func(db *pebble.DB) error { return db.Delete(key(kRecords, 1, 0), pebble.Sync) })
		}},
		{"a block and its header are deleted", "incarnation ", "records are gone", func(dir string) {
			edit(dir, func(db *pebble.DB) error {
				return errors.Join(db.Delete(key(kRecords, 1, 0), pebble.Sync), db.Delete(key(kHeader, 1), pebble.Sync))
			})
		}},
		{"a block's records are swapped for another's", "block 1 ", "do not hash to the root", func(dir string) {
			edit(dir, func(db *pebble.DB) error {
				s, err := newStore(db)
				if err != nil {
					return err
				}
				recs, err := s.records(1, headerCount(t, s, 1))
				if err != nil {
					return err
				}
				recs[0] = bytes.Replace(recs[0], []byte("admit"), []byte("park"), 1)
				var plain []byte
				for _, r := range recs {
					plain = appendChunk(plain, r)
				}
				return db.Set(key(kRecords, 1, 0), s.enc.EncodeAll(plain, nil), pebble.Sync)
			})
		}},
		{"the checkpoint is another's", "checkpoint", "not signed by the identity key", func(dir string) {
			os.WriteFile(filepath.Join(dir, "log", "checkpoint"), []byte("x\n1\nAAAA\n\n— x AAAA\n"), 0o600)
		}},
		{"a leaf of the log is changed", "log", "do not match the signed checkpoint", func(dir string) {
			files, err := filepath.Glob(filepath.Join(dir, "log", "tile", "entries", "*", "*"))
			if err != nil || len(files) == 0 {
				t.Fatal(files, err)
			}
			for _, p := range files {
				b, err := os.ReadFile(p)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(p, bytes.Replace(b, []byte(`"kind":"block"`), []byte(`"kind":"blocq"`), 1), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}},
	} {
		dir := filepath.Join(t.TempDir(), "copy")
		if err := os.CopyFS(dir, os.DirFS(whole)); err != nil {
			t.Fatal(err)
		}
		c.damage(dir)
		f.cfg.Dir = dir
		r := f.fsck()
		named := false
		for _, p := range r.Problems {
			named = named || strings.HasPrefix(p.Where, c.where) && strings.Contains(p.What, c.what)
		}
		if !named {
			t.Errorf("%s: not named: %+v", c.name, r.Problems)
		}
	}
}

func headerCount(t *testing.T, s *store, n uint64) uint64 {
	t.Helper()
	h, ok, err := s.parseHeaderAt(n)
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	return h.Count
}

// TestStateBehindLog restores an older copy of the blocks and the WAL under a newer log, one of a log that was closed and one of
// a log that was running: the incarnation that the log has seen more of is not continued, so that no (incarnation, seq) ever gets
// a second header.
func TestStateBehindLog(t *testing.T) {
	for _, running := range []bool{false, true} {
		t.Run(fmt.Sprintf("running=%v", running), func(t *testing.T) {
			f := newFixture(t)
			f.open()
			f.bundle(f.decide(wal.Durable, "old"), 1)
			if !running {
				f.close()
			}
			old := filepath.Join(t.TempDir(), "old")
			if err := os.CopyFS(old, os.DirFS(f.cfg.Dir)); err != nil { // nothing is written while nothing is asked
				t.Fatal(err)
			}
			if !running {
				f.open()
			}
			f.bundle(f.decide(wal.Durable, "forgotten"), 1)
			f.close()
			for _, part := range []string{"blocks", "wal"} {
				p := filepath.Join(f.cfg.Dir, part)
				if err := errors.Join(os.RemoveAll(p), os.CopyFS(p, os.DirFS(filepath.Join(old, part)))); err != nil {
					t.Fatal(err)
				}
			}
			f.open()
			f.bundle(f.decide(wal.Durable, "new"), 1)
			f.close()
			r := f.fsck()
			gone := false
			for _, p := range r.Problems {
				gone = gone || strings.Contains(p.What, "records are gone")
				if strings.Contains(p.What, "equivocation") {
					t.Errorf("%s: %s", p.Where, p.What)
				}
			}
			if !gone {
				t.Errorf("fsck does not name the forgotten block: %+v", r.Problems)
			}
		})
	}
}

// TestTooLarge refuses what could not be read back or written, before anything of it is anywhere.
func TestTooLarge(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	before := f.decide(wal.Durable, "before")
	for name, c := range map[string]struct {
		d receipt.Decision
		r receipt.Request
	}{
		"more evidence than is kept":         {r: receipt.Request{Path: strings.Repeat("x", 97<<10)}},
		"evidence that escapes to too much":  {r: receipt.Request{Path: strings.Repeat("\"", 80<<10)}},
		"a decision that could not be read":  {d: receipt.Decision{SPIFFEID: strings.Repeat("x", 70<<10)}},
		"both together for a segment's part": {d: receipt.Decision{Route: strings.Repeat("x", 60<<10)}, r: receipt.Request{Path: strings.Repeat("y", 90<<10)}},
	} {
		c.d.Class, c.d.Verdict, c.d.Reason, c.d.Capture = "W1", "admit", "ok", "lean"
		if err := l.Decide(t.Context(), wal.Durable, &c.d, &c.r); !errors.Is(err, ErrTooLarge) || c.d.ID != "" {
			t.Errorf("%s: %v, id %q", name, err, c.d.ID)
		}
	}
	id := f.decide(wal.Durable, "after")
	if err := l.Outcome(t.Context(), id, &policy.Outcome{Source: "als", Result: policy.ResultComplete, Details: strings.Repeat("x", 70<<10)}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("outcome: %v", err)
	}
	f.outcome(id, 200)
	f.bundle(before, 1)
	f.bundle(id, 2)
	f.close()
	f.fsckClean()
}

// TestClockSetBack corrects a clock that was an hour fast: receipts of before and after are found by their ids.
func TestClockSetBack(t *testing.T) {
	var offset atomic.Int64
	offset.Store(int64(time.Hour))
	f := newFixture(t)
	f.cfg.Now = func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
	f.open()
	fast := f.decide(wal.Durable, "fast")
	f.bundle(fast, 1)
	f.close()
	offset.Store(0)
	f.open()
	right := f.decide(wal.Durable, "right")
	f.bundle(fast, 1)
	f.bundle(right, 1)
	if sums, err := f.log.List(t.Context(), 10, ""); err != nil || len(sums) != 2 {
		t.Errorf("list: %d receipts, %v", len(sums), err)
	}
}

// TestLateOutcomes gives many late outcomes at once: one of them is recorded.
func TestLateOutcomes(t *testing.T) {
	f := newFixture(t)
	f.cfg.OutcomeTimeout = 300 * time.Millisecond
	l := f.open()
	id := f.decide(wal.Durable, "r")
	f.bundle(id, 2)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			l.Outcome(context.Background(), id, &policy.Outcome{Source: "als", Result: policy.ResultComplete, Status: 200})
		})
	}
	wg.Wait()
	if v := f.bundle(id, 3); len(v.Outcomes) != 2 {
		t.Errorf("%d outcomes", len(v.Outcomes))
	}
	f.close()
	f.open() // and it is found again far from its decision
	for range 10 {
		f.bundle(f.decide(wal.Durable, "more"), 1)
	}
	f.bundle(id, 3)
	f.close()
	f.fsckClean()
}

// TestUnsignedOverRestart: how long records have gone unsigned does not begin again with a restart.
func TestUnsignedOverRestart(t *testing.T) {
	f := newFixture(t)
	k := &flakyKey{Signer: f.cfg.Identity}
	f.cfg.Identity, f.cfg.MaxUnsigned = k, time.Hour
	l := f.open()
	f.bundle(f.decide(wal.Durable, "signed"), 1)
	k.away.Store(true)
	id := f.decide(wal.Durable, "unsigned")
	eventually(t, "a sealed block", func() bool { s, err := l.Get(t.Context(), id); return err == nil && s.State == StateSealed })
	time.Sleep(1100 * time.Millisecond) // the age that must be remembered
	f.stop()
	<-f.done
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // no waiting for a signature
	l.Close(ctx)
	f.cfg.MaxUnsigned = time.Second
	l, err := Open(t.Context(), f.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if !errors.Is(l.Refusing(), ErrUnsigned) {
		t.Errorf("after the restart: %v, unsigned for %v", l.Refusing(), l.UnsignedAge())
	}
	k.away.Store(false)
	if err := l.Close(context.Background()); err != nil {
		t.Error(err)
	}
	f.log = nil
	f.fsckClean()
}

// TestRotationFails keeps failing to state a new daily key: the token must not fill up with keys.
func TestRotationFails(t *testing.T) {
	f := newFixture(t)
	k := &flakyKey{Signer: f.cfg.Identity}
	f.cfg.Identity = k
	l := f.open()
	k.away.Store(true)
	for range 3 {
		if _, err := l.RotateKey(t.Context()); !errors.Is(err, keys.ErrUnavailable) {
			t.Errorf("rotate: %v", err)
		}
	}
	if vs, err := f.store.Versions(t.Context(), "daily"); err != nil || len(vs) != 2 {
		t.Errorf("%d versions of the daily key, %v: want the one in force and one to be stated", len(vs), err)
	}
	k.away.Store(false)
	if _, err := l.RotateKey(t.Context()); err != nil {
		t.Error(err)
	}
	f.bundle(f.decide(wal.Durable, "r"), 1)
	f.close()
	f.fsckClean()
}

// TestWALReplaced deletes the WAL alone: its numbers would be given out twice.
func TestWALReplaced(t *testing.T) {
	f := newFixture(t)
	f.open()
	f.bundle(f.decide(wal.Durable, "r"), 1)
	f.close()
	if err := os.RemoveAll(filepath.Join(f.cfg.Dir, "wal")); err != nil {
		t.Fatal(err)
	}
	if l, err := Open(t.Context(), f.cfg); err == nil || !strings.Contains(err.Error(), "replaced or restored alone") {
		t.Errorf("opened: %v, %v", l, err)
	}
}

// TestMachineCrash loses what was not synced: R1 decisions that went with it are declared by range, W1 decisions are there.
func TestMachineCrash(t *testing.T) {
	fs := waltest.New(0)
	f := newFixture(t)
	f.cfg.WALFS = fs
	f.cfg.SealEvery = time.Hour // nothing is sealed before the crash
	l := f.open()
	warm := f.decide(wal.Durable, "warm")
	quietWAL(t, f, fs)
	fs.FailNth(waltest.OpSync, 1, waltest.Fault{Err: errors.New("the machine dies")})
	hot := f.decide(wal.Written, "hot")
	after := fs.Clone()
	eventually(t, "the fault", func() bool { return l.Refusing() != nil })
	f.stop()
	<-f.done
	l.Close(context.Background())
	after.Crash(nil) // everything unsynced is gone
	f.cfg.WALFS, f.cfg.SealEvery = after, 100*time.Millisecond
	f.cfg.BootID = func() (string, error) { return "the next boot", nil }
	l = f.open()
	f.bundle(warm, 2)
	if _, err := l.Get(t.Context(), hot); !errors.Is(err, ErrNotFound) {
		t.Errorf("the hot decision: %v, want it lost", err)
	}
	f.close()
	f.fsckClean()
	s, err := openStore(f.cfg.Dir, f.cfg.Log, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	declared := false
	for n := range uint64(100) {
		if h, ok, _ := s.parseHeaderAt(n); ok && h.LostFrom <= 2 && h.LostTo > 2 {
			declared = true
		}
	}
	if !declared {
		t.Error("no header declares ordinal 2 lost")
	}
}
