//go:build linux

package receiptlog

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/region/wal"
	"github.com/knhk/sidecar/region/wal/waltest"
)

// TestFileIsSynced: the kernel cannot sync a pipe nor a directory of procfs, and nobody can sync a directory that they may not
// open. Whoever forgets to sync hears of no error.
func TestFileIsSynced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "VERSION")
	if err := unix.Mkfifo(path+".tmp", 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := os.OpenFile(path+".tmp", os.O_RDWR, 0) // so that the writer does not wait for a reader
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := writeFile(path, []byte(stateVersion)); err == nil {
		t.Error("a file of the state was not synced before it got its name")
	}
	if err := syncDir("/proc/self"); err == nil {
		t.Error("a directory of procfs was synced")
	}

	path = filepath.Join(t.TempDir(), "state", "VERSION")
	if err := os.Mkdir(filepath.Dir(path), 0o300); err != nil {
		t.Fatal(err)
	}
	unprivileged(t, filepath.Dir(path))
	if err := writeFile(path, []byte(stateVersion)); err == nil {
		t.Error("a file of the state got its name, and its directory was not synced")
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the write failed before there was something to sync: %v", err)
	}
}

// TestNewDirectoryIsSynced: a new state directory is durable under its name before a log is begun in it.
func TestNewDirectoryIsSynced(t *testing.T) {
	parent := filepath.Join(t.TempDir(), "parent")
	dir, fresh := filepath.Join(parent, "state"), filepath.Join(parent, "fresh")
	if err := os.MkdirAll(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(dir, 0o777), os.Chmod(parent, 0o300)); err != nil { // what cannot be read cannot be opened to be synced
		t.Fatal(err)
	}
	unprivileged(t, parent)
	if err := mkdirAll(fresh); err == nil {
		t.Error("a directory was made, and its name was not synced")
	}
	if _, err := os.Lstat(fresh); err != nil {
		t.Errorf("it failed before there was something to sync: %v", err)
	}
	if err := checkVersion(dir, true); err == nil || !strings.Contains(err.Error(), "sync the directory of state_dir") {
		t.Errorf("a log is begun in a directory whose name was not synced: %v", err)
	}
}

// unprivileged has the rest of the test touch files as an ordinary user, to whom dir is given. Root may open anything.
func unprivileged(t *testing.T, dir string) {
	t.Helper()
	if os.Geteuid() != 0 {
		return
	}
	const nobody = 65534
	if err := os.Chown(dir, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	for up := filepath.Dir(dir); up != filepath.Clean(os.TempDir()) && len(up) > 1; up = filepath.Dir(up) {
		if err := os.Chmod(up, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	runtime.LockOSThread() // the file system's user is a thread's own
	if err := syscall.Setfsuid(nobody); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Setfsuid(0)
		runtime.UnlockOSThread()
	})
	if d, err := os.Open(dir); err == nil {
		d.Close()
		t.Skip("this user may open anything")
	}
}

// TestKeysSurvivePowerLoss: what the journal of the daily keys has acknowledged is there when everything unsynced is gone: the state,
// and the statement by its place, without which no bundle can be made.
func TestKeysSurvivePowerLoss(t *testing.T) {
	f := newFixture(t)
	disk := vfs.NewCrashableMem()
	f.cfg.BlockFS = disk
	l := f.open()
	want, err := l.store.loadKeys()
	if err != nil || want == nil || want.Current == nil {
		t.Fatalf("no key in force: %+v, %v", want, err)
	}
	want.Floor = want.Floor.Add(time.Second) // a state that nothing else writes
	if err := l.store.saveKeys(want); err != nil {
		t.Fatal(err)
	}
	s, err := openStore(f.cfg.Dir, f.cfg.Log, disk.CrashClone(vfs.CrashCloneCfg{}), false)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	if got, err := s.loadKeys(); err != nil || got == nil || !got.Floor.Equal(want.Floor) {
		t.Errorf("the state of the daily keys is gone: %+v, %v", got, err)
	}
	if index, leaf, err := s.statementAt(1); err != nil || index != 0 || !bytes.Equal(leaf, want.Current.Statement) {
		t.Errorf("the statement is gone: at %d, %v", index, err)
	}
	f.stop()
	<-f.done
	l.Close(t.Context())
	f.log = nil
}

// TestBlockSurvivesPowerLoss: a block whose header is in the log, and whose records the WAL may forget, is on the disk.
func TestBlockSurvivesPowerLoss(t *testing.T) {
	f := newFixture(t)
	disk := vfs.NewCrashableMem()
	f.cfg.BlockFS = disk
	l := f.open()
	id := f.decide(wal.Durable, "a")
	f.bundle(id, 1)
	blocks := l.blocks.Load()
	s, err := openStore(f.cfg.Dir, f.cfg.Log, disk.CrashClone(vfs.CrashCloneCfg{}), false)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	records := uint64(0)
	for n := range blocks {
		h, ok, err := s.parseHeaderAt(n)
		if err != nil || !ok {
			t.Fatalf("block %d of %d is gone: %v", n, blocks, err)
		}
		if _, err := s.records(n, h.Count); err != nil {
			t.Error(err)
		}
		records += h.Count
	}
	if records != 1 {
		t.Errorf("%d records in %d blocks, want 1", records, blocks)
	}
	f.close()
}

// TestNothingIsSealedAheadOfTheWAL: a record whose sync has failed is in no block: nobody knows whether the disk holds it.
func TestNothingIsSealedAheadOfTheWAL(t *testing.T) {
	fs := waltest.New(0)
	f := newFixture(t)
	f.cfg.WALFS = fs
	f.cfg.SealEvery = time.Hour
	l := f.open()
	f.decide(wal.Durable, "a")
	quietWAL(t, f, fs)
	fs.FailNth(waltest.OpSync, 1, waltest.Fault{Err: errors.New("input/output error")})
	f.decide(wal.Written, "b")
	eventually(t, "the fault", func() bool { return l.wal.Err() != nil })
	f.stop()
	<-f.done
	blocks := l.blocks.Load()
	if err := l.seal(t.Context(), receipt.HeaderBlock, headerExtra{}); err == nil || l.blocks.Load() != blocks {
		t.Errorf("a block was sealed over a WAL that has failed: %v, %d blocks, had %d", err, l.blocks.Load(), blocks)
	}
	l.Close(t.Context()) // reports the fault again
	f.log = nil
}

// TestFreeDisk: on a volume with hardly any room nothing is admitted, and with less than a block needs nothing is sealed either.
func TestFreeDisk(t *testing.T) {
	f := newFixture(t)
	if err := os.MkdirAll(f.cfg.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", f.cfg.Dir, "tmpfs", 0, "size=64m,mode=0700"); err != nil {
		t.Skipf("needs a disk of its own, that is root: mount tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if f.log != nil {
			f.close()
		}
		// Tessera's background work ends a moment after it was cancelled, and may have a directory open until then.
		eventually(t, "nothing has a file of the log open", func() bool { return unix.Unmount(f.cfg.Dir, 0) == nil })
	})
	f.cfg.BlockFS = vfs.NewMem() // on another disk, so that a mutant does not take the test along
	ballast := filepath.Join(f.cfg.Dir, "ballast")
	l := f.open()
	f.bundle(f.decide(wal.Durable, "before"), 1)
	leave := func(free uint64) {
		t.Helper()
		have, err := freeBytes(f.cfg.Dir)
		if err != nil {
			t.Fatal(err)
		}
		file, err := os.OpenFile(ballast, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := file.Write(make([]byte, have-free)); err != nil {
			t.Fatal(err)
		}
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
	}
	leave(minFree - 1<<20)
	eventually(t, "requests are refused", func() bool { return errors.Is(l.Refusing(), ErrFull) })
	leave(sealFree - 1<<20)
	blocks := l.blocks.Load()
	l.refusing.Store(nil) // a request that was admitted just before
	d := receipt.Decision{Class: "W1", Verdict: "admit", Reason: "ok", Capture: "lean"}
	if err := l.Decide(t.Context(), wal.Durable, &d, &receipt.Request{}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(5 * f.cfg.SealEvery) // the time in which it must not happen
	if n := l.blocks.Load(); n != blocks {
		t.Errorf("%d blocks were sealed on a full disk", n-blocks)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the block", func() bool { return l.blocks.Load() > blocks })
	eventually(t, "requests are taken", func() bool { return l.Refusing() == nil })
	f.bundle(d.ID, 1)
}

// TestFaultedLogSignsNothing: after a fault the identity key signs no checkpoint until a restart has looked at the state.
func TestFaultedLogSignsNothing(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	if _, err := l.identity.Sign([]byte("x\n")); err != nil {
		t.Fatal(err)
	}
	l.fail(errors.New("input/output error"))
	if _, err := l.identity.Sign([]byte("x\n")); !errors.Is(err, ErrUnavailable) {
		t.Errorf("sign after a fault: %v", err)
	}
	f.stop()
	<-f.done
	l.Close(t.Context()) // reports the fault again
	f.log = nil
}

// TestFsckChain: headers that do not follow each other are named, each for its own reason.
func TestFsckChain(t *testing.T) {
	const origin, instance = "example.com/test/00", "a"
	header := func(seq uint64, kind string, prev receipt.Hash) receipt.Header {
		return receipt.Header{Origin: origin, Instance: instance, Seq: seq, Kind: kind, Prev: prev, Time: time.Unix(1, 0)}
	}
	hash := func(h receipt.Header) receipt.Hash { return receipt.LeafHash(receipt.AppendHeader(nil, &h)) }
	first := header(0, receipt.HeaderOpen, receipt.Hash{})
	for _, c := range []struct {
		name, what string
		second     receipt.Header
	}{
		{"the next one", "", header(1, receipt.HeaderHeartbeat, hash(first))},
		{"a gap", "headers are missing", header(2, receipt.HeaderHeartbeat, hash(first))},
		{"the same seq", "two headers for one seq", header(0, receipt.HeaderHeartbeat, hash(first))},
		{"another predecessor", "does not follow the header before it", header(1, receipt.HeaderHeartbeat, receipt.Hash{1})},
	} {
		a := &audit{id: identity{Origin: origin, Instance: instance, LogID: strings.Repeat("0", 32)}, report: &Report{},
			last: map[[16]byte]receipt.Header{}}
		for i, h := range []receipt.Header{first, c.second} {
			a.chain("log leaf", &h, hash(h))
			if i == 0 && len(a.report.Problems) != 0 {
				t.Fatalf("the first header: %+v", a.report.Problems)
			}
		}
		if p := a.report.Problems; c.what == "" && len(p) != 0 || c.what != "" && (len(p) != 1 || !strings.Contains(p[0].What, c.what)) {
			t.Errorf("%s: %+v, want %q", c.name, p, c.what)
		}
	}
}
