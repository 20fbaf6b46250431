//go:build linux

package faultfs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func mounted(t *testing.T) (*FS, string) {
	t.Helper()
	dir := t.TempDir()
	return Mount(t, dir), dir
}

func syncDir(t *testing.T, dir string) {
	t.Helper()
	d, err := os.Open(dir)
	must(t, err)
	must(t, d.Sync())
	must(t, d.Close())
}

// put writes text into a file, which it makes if need be, and syncs it if asked to.
func put(t *testing.T, name, text string, off int64, sync bool) {
	t.Helper()
	x, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	must(t, err)
	_, err = x.WriteAt([]byte(text), off)
	must(t, err)
	if sync {
		must(t, x.Sync())
	}
	must(t, x.Close())
}

// content is what a file holds, "none" when there is none.
func content(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return "none"
	}
	must(t, err)
	return string(b)
}

// TestSocket: a unix socket can be bound, reached, found dead after its owner, and removed.
func TestSocket(t *testing.T) {
	f, dir := mounted(t)
	d, err := os.Open(dir)
	must(t, err)
	defer d.Close()
	name := fmt.Sprintf("/proc/self/fd/%d/s", d.Fd()) // a socket's address is short
	l, err := net.Listen("unix", name)
	must(t, err)
	go func() {
		if c, err := l.Accept(); err == nil {
			c.Write([]byte("x"))
			c.Close()
		}
	}()
	must(t, os.Chmod(name, 0o600))
	c, err := net.Dial("unix", name)
	must(t, err)
	if b, err := io.ReadAll(c); err != nil || string(b) != "x" {
		t.Errorf("read %q, %v", b, err)
	}
	c.Close()
	if fi, err := os.Lstat(name); err != nil || fi.Mode() != os.ModeSocket|0o600 {
		t.Errorf("%v, %v", fi, err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	must(t, l.Close())
	if _, err := net.Dial("unix", name); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a dead socket: %v", err)
	}
	if _, err := net.Listen("unix", name); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a name that is taken: %v", err)
	}
	must(t, os.Remove(name))
	if got := f.Paths(); len(got) != 0 {
		t.Errorf("left: %v", got)
	}
}

// TestAsAnOrdinaryFileSystem: what programs do with files works, and is there after an unmount that lost nothing.
func TestAsAnOrdinaryFileSystem(t *testing.T) {
	f, dir := mounted(t)
	must(t, os.MkdirAll(filepath.Join(dir, "a/b"), 0o700))
	name := filepath.Join(dir, "a/b/x")
	want := bytes.Repeat([]byte("0123456789abcdef"), 5000)
	must(t, os.WriteFile(name, want, 0o600))
	if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read back %d bytes of %d: %v", len(got), len(want), err)
	}
	must(t, os.Truncate(name, 1000))
	must(t, os.Truncate(name, 9000))
	if got := content(t, name); got != string(want[:1000])+strings.Repeat("\x00", 8000) {
		t.Errorf("cut and grown: %d bytes, not as expected", len(got))
	}
	must(t, os.Rename(name, filepath.Join(dir, "y")))
	must(t, os.Link(filepath.Join(dir, "y"), filepath.Join(dir, "z")))
	must(t, os.Remove(filepath.Join(dir, "y")))
	for i := range 3000 {
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("a/%d", i)), nil, 0o600))
	}
	if list, err := os.ReadDir(filepath.Join(dir, "a")); err != nil || len(list) != 3001 {
		t.Errorf("%d entries: %v", len(list), err)
	}
	must(t, os.RemoveAll(filepath.Join(dir, "a")))
	if got := f.Paths(); len(got) != 1 || got[0] != "z" {
		t.Errorf("paths %v", got)
	}

	l1, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	must(t, err)
	defer l1.Close()
	l2, err := os.Open(filepath.Join(dir, "lock"))
	must(t, err)
	defer l2.Close()
	must(t, unix.Flock(int(l1.Fd()), unix.LOCK_EX|unix.LOCK_NB))
	if err := unix.Flock(int(l2.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("second lock: %v", err)
	}
}

// TestMmap: what is written through a shared mapping arrives with msync, and is as good as its sync.
func TestMmap(t *testing.T) {
	f, dir := mounted(t)
	name := filepath.Join(dir, "x")
	put(t, name, strings.Repeat("a", 8192), 0, true)
	syncDir(t, dir)
	x, err := os.OpenFile(name, os.O_RDWR, 0)
	must(t, err)
	m, err := unix.Mmap(int(x.Fd()), 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, err)
	copy(m, "synced")
	must(t, unix.Msync(m, unix.MS_SYNC))
	copy(m[4096:], "not synced")
	must(t, unix.Munmap(m))
	must(t, x.Close())
	if got := content(t, name); got[:6] != "synced" || got[4096:4106] != "not synced" {
		t.Errorf("a process sees %q, %q", got[:6], got[4096:4106])
	}
	f.lossAs(t, "nothing kept")
	if got := content(t, name); got[:6] != "synced" || got[4096:4106] != "aaaaaaaaaa" {
		t.Errorf("after the power loss: %q, %q", got[:6], got[4096:4106])
	}
}

// lossAs is a power loss in the given way.
func (f *FS) lossAs(t *testing.T, mode string) Loss {
	t.Helper()
	must(t, f.Unmount())
	l := f.lose(mode, rand.New(rand.NewPCG(1, 1)))
	must(t, f.mount())
	return l
}

// TestPowerLoss: what is lost and what not, in the plain ways.
func TestPowerLoss(t *testing.T) {
	for _, tc := range []struct {
		mode             string
		x, created, gone string
		rename           string
	}{
		{"nothing kept", "old", "none", "here", "before"},
		{"everything kept", "new!", "made", "none", "after"},
		{"content only", "new!", "none", "here", "before"},
		{"names only", "old", "", "none", ""}, // the names of files whose content never arrived
	} {
		t.Run(tc.mode, func(t *testing.T) {
			f, dir := mounted(t)
			p := func(n string) string { return filepath.Join(dir, n) }
			put(t, p("x"), "old", 0, true)
			put(t, p("gone"), "here", 0, true)
			put(t, p("target"), "before", 0, true)
			syncDir(t, dir)

			put(t, p("x"), "new!", 0, false)
			put(t, p("created"), "made", 0, false)
			must(t, os.Remove(p("gone")))
			put(t, p("tmp"), "after", 0, false)
			must(t, os.Rename(p("tmp"), p("target")))

			l := f.lossAs(t, tc.mode)
			for name, want := range map[string]string{"x": tc.x, "created": tc.created, "gone": tc.gone, "target": tc.rename} {
				if got := content(t, p(name)); got != want {
					t.Errorf("%s holds %q, want %q (%v)", name, got, want, l)
				}
			}
			if (l.Dropped() == 0) != (tc.mode == "everything kept") || l.Names != 4 {
				t.Errorf("loss %+v", l)
			}
		})
	}
}

// TestPowerLossAnyVersion: over many seeds each of two sectors is seen with each content it has had, in every combination, and
// what was synced with O_SYNC stays.
func TestPowerLossAnyVersion(t *testing.T) {
	f, dir := mounted(t)
	name := filepath.Join(dir, "x")
	pair := func(a, b string) string { return strings.Repeat(a, sectorSize) + strings.Repeat(b, sectorSize) }
	seen := map[string]bool{}
	for seed := range uint64(400) {
		x, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_SYNC, 0o600)
		must(t, err)
		_, err = x.WriteAt([]byte(pair("a", "a")), 0)
		must(t, err)
		must(t, x.Close())
		syncDir(t, dir)
		put(t, name, pair("b", "b"), 0, false)
		put(t, name, pair("c", "c"), 0, false)
		_, err = f.PowerLoss(rand.New(rand.NewPCG(seed, 1)))
		must(t, err)
		got := content(t, name)
		if len(got) != 2*sectorSize {
			t.Fatalf("%d bytes", len(got))
		}
		seen[got[:1]+got[sectorSize:sectorSize+1]] = true
		if got != pair(got[:1], got[sectorSize:sectorSize+1]) {
			t.Fatal("a sector was torn")
		}
	}
	if len(seen) != 9 {
		t.Errorf("saw %v, want all 9", seen)
	}
}

// TestFailedSync: what a failed sync did not save, a later one does not either, unless it was written again.
func TestFailedSync(t *testing.T) {
	f, dir := mounted(t)
	lost, again := filepath.Join(dir, "lost"), filepath.Join(dir, "again")
	put(t, lost, "old", 0, true)
	put(t, again, "old", 0, true)
	syncDir(t, dir)
	for _, name := range []string{lost, again} {
		x, err := os.OpenFile(name, os.O_RDWR, 0)
		must(t, err)
		_, err = x.WriteAt([]byte("new"), 0)
		must(t, err)
		i := f.Fail(Fault{Op: OpSync, Errno: syscall.EIO, Times: 1})
		if err := x.Sync(); !errors.Is(err, syscall.EIO) || i.Hits() != 1 {
			t.Errorf("sync: %v, %d hits", err, i.Hits())
		}
		if name == again {
			_, err = x.WriteAt([]byte("new"), 0)
			must(t, err)
		}
		must(t, x.Sync())
		must(t, x.Close())
	}
	f.lossAs(t, "nothing kept")
	if a, b := content(t, lost), content(t, again); a != "old" || b != "new" {
		t.Errorf("%q, %q", a, b)
	}
}

// TestFail: faults hit the calls they name, as often as they say, and are counted.
func TestFail(t *testing.T) {
	f, dir := mounted(t)
	p := func(n string) string { return filepath.Join(dir, n) }
	must(t, os.MkdirAll(p("d"), 0o700))
	i := f.Fail(Fault{Op: OpWrite, Path: "d/*", Errno: syscall.ENOSPC, Skip: 1, Times: 2})
	var got []string
	for range 4 {
		err := os.WriteFile(p("d/x1"), []byte("x"), 0o600)
		got = append(got, fmt.Sprint(errors.Is(err, syscall.ENOSPC)))
	}
	must(t, os.WriteFile(p("y"), []byte("x"), 0o600))
	if s := strings.Join(got, " "); s != "false true true false" || i.Hits() != 2 {
		t.Errorf("failed: %s, %d hits", s, i.Hits())
	}
	if n := f.Calls()[Call{OpWrite, "d/x#"}]; n != 4 {
		t.Errorf("%d writes of d/x# in %v", n, f.Calls())
	}
	for op, do := range map[Op]func() error{
		OpCreate:   func() error { return os.WriteFile(p("new"), nil, 0o600) },
		OpRename:   func() error { return os.Rename(p("y"), p("z")) },
		OpMkdir:    func() error { return os.Mkdir(p("e"), 0o700) },
		OpUnlink:   func() error { return os.Remove(p("y")) },
		OpTruncate: func() error { return os.Truncate(p("y"), 7) },
		OpLink:     func() error { return os.Link(p("y"), p("l")) },
		OpAllocate: func() error {
			x, err := os.OpenFile(p("y"), os.O_RDWR, 0)
			must(t, err)
			defer x.Close()
			return unix.Fallocate(int(x.Fd()), 0, 0, 100)
		},
		OpSyncDir: func() error {
			d, err := os.Open(dir)
			must(t, err)
			defer d.Close()
			return d.Sync()
		},
	} {
		i := f.Fail(Fault{Op: op, Errno: syscall.EIO})
		if err := do(); !errors.Is(err, syscall.EIO) || i.Hits() == 0 {
			t.Errorf("%s: %v, %d hits", op, err, i.Hits())
		}
		i.Clear()
	}
	i = f.Fail(Fault{Op: OpRename, Errno: syscall.EIO, Persist: true})
	if err := os.Rename(p("y"), p("z")); !errors.Is(err, syscall.EIO) || content(t, p("z")) != "x" {
		t.Errorf("failed but persisted: %v, %q", err, content(t, p("z")))
	}
	if i.Hits() != 1 {
		t.Errorf("%d hits", i.Hits())
	}
}

// TestCapacity: a full disk says so, to writes, to fallocate and to statfs, and has room again when something is removed.
func TestCapacity(t *testing.T) {
	f, dir := mounted(t)
	f.SetCapacity(1 << 20)
	name := filepath.Join(dir, "x")
	must(t, os.WriteFile(name, make([]byte, 900<<10), 0o600))
	if err := os.WriteFile(filepath.Join(dir, "y"), make([]byte, 200<<10), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write: %v", err)
	}
	must(t, os.Remove(filepath.Join(dir, "y")))
	x, err := os.OpenFile(name, os.O_RDWR, 0)
	must(t, err)
	if err := unix.Fallocate(int(x.Fd()), 0, 0, 2<<20); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("fallocate: %v", err)
	}
	must(t, unix.Fallocate(int(x.Fd()), 0, 0, 1<<20))
	must(t, x.Close())
	var s unix.Statfs_t
	must(t, unix.Statfs(dir, &s))
	if s.Bavail != 0 || f.Used() != 1<<20 {
		t.Errorf("%d blocks free, %d bytes used", s.Bavail, f.Used())
	}
	must(t, os.Remove(name))
	must(t, os.WriteFile(name, make([]byte, 900<<10), 0o600))
}

// TestPowerLossNeedsTheProcessesDead: with a file open it says no, and changes nothing.
func TestPowerLossNeedsTheProcessesDead(t *testing.T) {
	f, dir := mounted(t)
	x, err := os.Create(filepath.Join(dir, "x"))
	must(t, err)
	f.patience = 50 * time.Millisecond
	if _, err := f.PowerLoss(rand.New(rand.NewPCG(1, 1))); err == nil {
		t.Error("the power went while a file was open")
	}
	must(t, x.Close())
	f.patience = patience
	_, err = f.PowerLoss(rand.New(rand.NewPCG(1, 1)))
	must(t, err)
}
