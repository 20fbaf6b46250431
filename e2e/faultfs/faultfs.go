//go:build linux

package faultfs

import (
	"cmp"
	"fmt"
	"log"
	"maps"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// Op names a kind of call.
type Op string

// The calls that are counted and can be made to fail.
const (
	OpWrite    Op = "write"
	OpSync     Op = "fsync"   // fsync and fdatasync of a file, and writes to one opened with O_SYNC
	OpSyncDir  Op = "syncdir" // fsync of a directory
	OpCreate   Op = "create"
	OpRename   Op = "rename" // counted under its new name
	OpLink     Op = "link"   // likewise
	OpMkdir    Op = "mkdir"
	OpTruncate Op = "truncate"
	OpAllocate Op = "fallocate"
	OpUnlink   Op = "unlink" // files and directories
	OpOpen     Op = "open"
	OpRead     Op = "read" // what is not in the page cache
)

// Changes are the operations by which something is written or made durable.
var Changes = []Op{OpWrite, OpSync, OpSyncDir, OpCreate, OpRename, OpLink, OpMkdir, OpTruncate, OpAllocate, OpUnlink}

// Call is a call site as seen from below: the operation and the class of the path it works on.
type Call struct {
	Op    Op
	Class string // the path below the mount, numbers replaced by "#": wal/#.wal, blocks/MANIFEST-#
}

func (c Call) String() string { return string(c.Op) + " " + c.Class }

// Class is the class of a path: every run of digits, and of hex digits that begins with one, becomes "#".
func Class(path string) string { return numbers.ReplaceAllString(path, "#") }

var numbers = regexp.MustCompile(`[0-9][0-9a-f]*`)

// Fault says which calls fail, and how.
type Fault struct {
	Op Op // empty: any of Changes
	// Path is a pattern for the path below the mount; * stands for any number of characters, slashes too. Empty: any. A
	// rename matches by either of its names.
	Path  string
	Class string // if not empty, the path's class must be this
	Errno syscall.Errno
	Skip  int // calls that match and succeed before the first that fails
	Times int // how many fail; 0: all until Clear
	// Persist: the call does its work, then says that it failed.
	Persist bool
	// Delay comes before the call. With Errno 0 the call is slow and succeeds.
	Delay time.Duration
}

// Injected is a fault in force.
type Injected struct {
	fs      *FS
	fault   Fault
	match   *regexp.Regexp
	seen    int
	hits    int
	cleared bool
}

// Hits is how many calls the fault has reached.
func (i *Injected) Hits() int {
	i.fs.mu.Lock()
	defer i.fs.mu.Unlock()
	return i.hits
}

// Clear ends the fault.
func (i *Injected) Clear() {
	i.fs.mu.Lock()
	defer i.fs.mu.Unlock()
	i.cleared = true
}

// FS is a mounted file system. Its methods may be called from any goroutine.
type FS struct {
	dir    string
	server *fuse.Server

	mu       sync.Mutex
	root     *inode
	view     *view // in force; nil while not mounted
	lastIno  uint64
	seq      uint64 // of the last change
	ops      []*nameOp
	faults   []*Injected
	calls    map[Call]int
	patience time.Duration // of an unmount
	capacity int64         // pages
	used     int64         // pages
}

const patience = 2 * time.Minute

// defaultCapacity is 8 GiB.
const defaultCapacity = 8 << 30 / pageSize

// Mount mounts an empty file system on dir, which must exist, and unmounts it when the test ends. Where FUSE cannot be mounted
// the test is skipped; it fails where CI=true is set.
func Mount(t testing.TB, dir string) *FS {
	t.Helper()
	if why := missing(); why != "" {
		if os.Getenv("CI") == "true" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	f := &FS{
		dir: dir, lastIno: 1,
		calls: map[Call]int{}, capacity: defaultCapacity, patience: patience,
	}
	f.root = newDir(1, nil, "")
	if err := f.mount(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Unmount(); err != nil {
			t.Error(err)
			_ = syscall.Unmount(dir, syscall.MNT_DETACH) // nothing may be left behind
		}
	})
	return f
}

func missing() string {
	if os.Geteuid() != 0 {
		return "faultfs: mounting FUSE without a helper program needs root"
	}
	d, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		return fmt.Sprintf("faultfs: no FUSE here: %v", err)
	}
	d.Close()
	return ""
}

func (f *FS) mount() error {
	v := &view{RawFileSystem: fuse.NewDefaultRawFileSystem(), FS: f, inodes: map[uint64]*inode{1: f.root}}
	f.mu.Lock()
	f.view = v
	f.mu.Unlock()
	server, err := fuse.NewServer(v, f.dir, &fuse.MountOptions{
		Name: "faultfs", FsName: "faultfs", MaxWrite: 1 << 20, DisableXAttrs: true, DisableReadDirPlus: true, DirectMountStrict: true,
		Logger: log.New(os.Stderr, "faultfs: ", 0),
	})
	if err != nil {
		return fmt.Errorf("mount faultfs: %w", err)
	}
	f.server = server
	go server.Serve()
	if err := server.WaitMount(); err != nil {
		return fmt.Errorf("mount faultfs: %w", err)
	}
	return nil
}

// Unmount ends the mount. It fails while somebody has a file open in this mount namespace; in another one the process gets
// errors from now on. A second call does nothing.
func (f *FS) Unmount() error {
	if f.server == nil {
		return nil
	}
	f.ClearFaults()
	var err error
	for deadline := time.Now().Add(f.patience); ; time.Sleep(5 * time.Millisecond) {
		// A process that was killed a moment ago may still be closing its files.
		if err = syscall.Unmount(f.dir, 0); err == nil || time.Now().After(deadline) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", f.dir, err)
	}
	// The server ends when the kernel lets go of the mount; a mount namespace that somebody made meanwhile may hold it longer.
	f.server = nil
	f.mu.Lock()
	f.view = nil
	f.mu.Unlock()
	return nil
}

// Dir is where the file system is mounted.
func (f *FS) Dir() string { return f.dir }

// Fail makes calls fail from now on.
func (f *FS) Fail(fault Fault) *Injected {
	pattern := strings.ReplaceAll(regexp.QuoteMeta(cmp.Or(fault.Path, "*")), `\*`, ".*")
	i := &Injected{fs: f, fault: fault, match: regexp.MustCompile("^" + pattern + "$")}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = append(f.faults, i)
	return i
}

// ClearFaults ends every fault.
func (f *FS) ClearFaults() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, i := range f.faults {
		i.cleared = true
	}
	f.faults = nil
}

// Calls returns how many calls there have been since the mount or ResetCalls.
func (f *FS) Calls() map[Call]int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.calls)
}

// ResetCalls begins counting anew.
func (f *FS) ResetCalls() {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.calls)
}

// SetCapacity makes the disk that many bytes large; what is there stays. 0 is the default, 8 GiB.
func (f *FS) SetCapacity(bytes int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.capacity = cmp.Or(bytes/pageSize, defaultCapacity)
}

// Used returns how many bytes are taken.
func (f *FS) Used() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.used * pageSize
}

// call counts a call on the paths and says how it is to fail: before its work, or after it. mu is held; it is let go during a
// delay.
func (f *view) call(op Op, paths ...string) (before, after fuse.Status) {
	class := Class(paths[0])
	f.calls[Call{op, class}]++
	for _, i := range f.faults {
		if i.cleared || i.fault.Op != op && (i.fault.Op != "" || !slices.Contains(Changes, op)) ||
			i.fault.Class != "" && i.fault.Class != class || !slices.ContainsFunc(paths, i.match.MatchString) {
			continue
		}
		if i.seen++; i.seen <= i.fault.Skip || i.fault.Times > 0 && i.hits >= i.fault.Times {
			continue
		}
		i.hits++
		if i.fault.Delay > 0 {
			f.mu.Unlock()
			time.Sleep(i.fault.Delay)
			f.mu.Lock()
			if f.view != f {
				return fuse.EIO, fuse.OK
			}
		}
		if i.fault.Persist {
			return fuse.OK, fuse.Status(i.fault.Errno)
		}
		return fuse.Status(i.fault.Errno), fuse.OK
	}
	return fuse.OK, fuse.OK
}

// Loss is what a PowerLoss took.
type Loss struct {
	Mode          string
	Sectors, Kept int // of 512 bytes, changed since they were last synced; and how many of them have their newest content
	Names         int // creations, renames and removals not synced
	NamesKept     int
}

// Dropped is how much is not as the processes last saw it.
func (l Loss) Dropped() int { return l.Sectors - l.Kept + l.Names - l.NamesKept }

func (l Loss) String() string {
	return fmt.Sprintf("%s: %d of %d unsynced sectors and %d of %d unsynced names lost", l.Mode, l.Sectors-l.Kept, l.Sectors,
		l.Names-l.NamesKept, l.Names)
}

// The ways in which unsynced data is lost.
var modes = []string{"nothing kept", "everything kept", "cut in time", "writes at random", "torn sectors", "names only", "content only"}

// PowerLoss ends the machine: of what was not synced any part may be gone, drawn from rng, and all of it if rng is nil. Every process that used the mount
// must have been killed before: see Unmount. The file system is then mounted again, without faults.
func (f *FS) PowerLoss(rng *rand.Rand) (Loss, error) {
	if err := f.Unmount(); err != nil {
		return Loss{}, fmt.Errorf("power loss: %w", err)
	}
	mode := modes[0]
	if rng != nil {
		mode = modes[rng.IntN(len(modes))]
	} else {
		rng = rand.New(rand.NewPCG(0, 0)) // it decides nothing
	}
	f.mu.Lock()
	loss := f.lose(mode, rng)
	f.mu.Unlock()
	return loss, f.mount()
}
