// Package waltest has a file system in memory that dies, forgets and fails on demand, for tests of what region/wal and
// the stores above it promise about crashes.
//
// It keeps two states of every file and directory: what a running process sees, and what a machine crash leaves. Between
// them stand the changes not yet synced; Crash keeps any subset of them, page by page and name by name, and a page may
// keep any of the versions it has had since the last sync. A failed sync forgets what it should have made durable even if
// a later one succeeds, as Linux does. It is as bad as POSIX allows, but no worse: what a sync covered is never damaged
// (Corrupt does that), and a page is written whole or not at all.
//
// It is for tests only. All methods are safe for concurrent use.
package waltest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"

	"github.com/knhk/sidecar/region/wal"
)

// Op names a kind of call.
type Op string

// The calls of wal.FS and wal.File.
const (
	OpMkdirAll Op = "mkdirall"
	OpReadDir  Op = "readdir"
	OpOpen     Op = "open"
	OpCreate   Op = "create"
	OpRename   Op = "rename"
	OpRemove   Op = "remove"
	OpSyncDir  Op = "syncdir"
	OpLock     Op = "lock"
	OpRead     Op = "read"
	OpWrite    Op = "write"
	OpSync     Op = "sync"
	OpAllocate Op = "allocate"
	OpSize     Op = "size"
	OpClose    Op = "close"
)

// Call describes a call that is about to happen.
type Call struct {
	Op    Op
	Name  string // full path; the old one of a rename
	N     int    // how many calls of this kind there have been, this one included
	Total int    // how many calls of any kind
}

// Fault is how a call fails. Err is what it returns.
type Fault struct {
	Err     error
	Persist bool // the call does all its work first, a sync included
	Bytes   int  // without Persist: a write writes this many bytes first
}

// DefaultPage is the size of what reaches the disk whole or not at all.
const DefaultPage = 4096

// FS is the file system. New makes one.
type FS struct {
	page int64

	mu    sync.Mutex
	era   int // handles of earlier eras are dead
	dirs  map[string]bool
	names map[string]*inode // as processes see it
	disk  map[string]*inode // as a crash with nothing more leaves it
	ops   []dirOp           // not yet synced
	locks map[string]*lock
	calls map[Op]int
	total int
	hook  func(Call) *Fault
}

var _ wal.FS = (*FS)(nil)

type inode struct {
	data    []byte // as processes see it
	synced  []byte // as a crash with nothing more leaves it
	pending []write
}

type write struct {
	off  int64
	data []byte
	lost bool // by a failed sync
}

// dirOp is a create (to set), a remove (from set) or a rename (both).
type dirOp struct {
	from, to string
	node     *inode
}

// New returns an empty file system whose disk writes pages of the given size whole; 0 means DefaultPage, 512 models a
// disk that tears pages at sectors.
func New(page int) *FS {
	if page == 0 {
		page = DefaultPage
	}
	return &FS{
		page: int64(page), dirs: map[string]bool{}, names: map[string]*inode{}, disk: map[string]*inode{},
		locks: map[string]*lock{}, calls: map[Op]int{},
	}
}

// SetHook has fn asked before every call; a nil Fault lets it pass. fn must not call the FS. A nil fn asks nobody.
func (f *FS) SetHook(fn func(Call) *Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook = fn
}

// FailNth makes the n-th call of kind op from now on fail, once.
func (f *FS) FailNth(op Op, n int, fault Fault) {
	f.mu.Lock()
	at := f.calls[op] + n
	f.mu.Unlock()
	f.SetHook(func(c Call) *Fault {
		if c.Op == op && c.N == at {
			return &fault
		}
		return nil
	})
}

// Calls returns how many calls there have been, by kind.
func (f *FS) Calls() map[Op]int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.calls)
}

// Kill ends the process: every handle and lock is dead, what was written stays.
func (f *FS) Kill() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.kill()
}

func (f *FS) kill() {
	f.era++
	f.locks = map[string]*lock{}
}

// Crash ends the machine: Kill, and of what was not synced any part may be gone. What stays is drawn from rng, including
// the extremes (all, nothing); the same rng state and the same history give the same result. A nil rng loses everything
// that was not synced.
func (f *FS) Crash(rng *rand.Rand) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.kill()
	keep := func() bool { return false }
	if rng != nil {
		odds := []float64{0, 0.1, 0.5, 0.9, 1}[rng.IntN(5)]
		keep = func() bool { return rng.Float64() < odds }
	}
	disk := f.disk
	for _, op := range f.ops {
		if keep() {
			op.apply(disk)
		}
	}
	done := map[*inode]bool{}
	for _, name := range slices.Sorted(maps.Keys(disk)) {
		if node := disk[name]; !done[node] {
			node.crash(f.page, keep)
			done[node] = true
		}
	}
	f.ops, f.disk, f.names = nil, disk, maps.Clone(disk)
}

func (op dirOp) apply(names map[string]*inode) {
	node := op.node
	if op.from != "" {
		if node = names[op.from]; node == nil {
			return
		}
		delete(names, op.from)
	}
	if op.to != "" {
		names[op.to] = node
	}
}

// crash settles each page on one of its versions since the last sync, and the size on what they need.
func (n *inode) crash(page int64, keep func() bool) {
	settled := map[int64]bool{} // pages whose later versions did not make it
	for _, w := range n.pending {
		if w.lost {
			continue
		}
		for off := w.off; off < w.off+int64(len(w.data)); {
			to := min((off/page+1)*page, w.off+int64(len(w.data)))
			if !settled[off/page] && keep() {
				n.synced = store(n.synced, off, w.data[off-w.off:to-w.off])
			} else {
				settled[off/page] = true
			}
			off = to
		}
	}
	n.pending, n.data = nil, slices.Clone(n.synced)
}

// store writes p at off into b, which grows with zeros as needed.
func store(b []byte, off int64, p []byte) []byte {
	if need := off + int64(len(p)); int64(len(b)) < need {
		b = append(b, make([]byte, need-int64(len(b)))...)
	}
	copy(b[off:], p)
	return b
}

// Clone returns a copy in which every process is dead and nobody fails.
func (f *FS) Clone() *FS {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := New(int(f.page))
	c.dirs = maps.Clone(f.dirs)
	nodes := map[*inode]*inode{}
	clone := func(n *inode) *inode {
		if n == nil {
			return nil
		}
		if nodes[n] == nil {
			pending := slices.Clone(n.pending) // the bytes of a write never change
			nodes[n] = &inode{data: slices.Clone(n.data), synced: slices.Clone(n.synced), pending: pending}
		}
		return nodes[n]
	}
	for name, n := range f.names {
		c.names[name] = clone(n)
	}
	for name, n := range f.disk {
		c.disk[name] = clone(n)
	}
	for _, op := range f.ops {
		c.ops = append(c.ops, dirOp{op.from, op.to, clone(op.node)})
	}
	return c
}

// Names returns the paths of all files as processes see them, sorted.
func (f *FS) Names() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Sorted(maps.Keys(f.names))
}

// Content returns a copy of a file as processes see it; nil if there is none.
func (f *FS) Content(name string) []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := f.names[name]; n != nil {
		return append([]byte{}, n.data...)
	}
	return nil
}

// Corrupt replaces a file's content as processes see it and on disk, or makes the file. Nothing of it is pending after.
func (f *FS) Corrupt(name string, content []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.names[name]
	if n == nil {
		n = &inode{}
		f.names[name], f.disk[name] = n, n
	}
	n.data, n.synced, n.pending = slices.Clone(content), slices.Clone(content), nil
}

// Lose removes a file as processes see it and from the disk.
func (f *FS) Lose(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.names, name)
	delete(f.disk, name)
}

// call counts a call, asks the hook, and says what to do: the work, part of it, and what to return. mu is held.
func (f *FS) call(op Op, name string) *Fault {
	f.calls[op]++
	f.total++
	if f.hook == nil {
		return nil
	}
	return f.hook(Call{Op: op, Name: name, N: f.calls[op], Total: f.total})
}

// do runs work unless the call is to fail before it.
func (f *FS) do(op Op, name string, work func() error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	fault := f.call(op, name)
	if fault == nil {
		return work()
	}
	if fault.Persist {
		if err := work(); err != nil {
			return err
		}
	}
	return pathErr(op, name, fault.Err)
}

func pathErr(op Op, name string, err error) error {
	return &fs.PathError{Op: string(op), Path: name, Err: err}
}

// MkdirAll implements wal.FS. Directories are durable at once.
func (f *FS) MkdirAll(dir string, _ fs.FileMode) error {
	return f.do(OpMkdirAll, dir, func() error {
		f.dirs[dir] = true
		return nil
	})
}

// ReadDir implements wal.FS.
func (f *FS) ReadDir(dir string) (names []string, err error) {
	err = f.do(OpReadDir, dir, func() error {
		for name := range f.names {
			if filepath.Dir(name) == dir {
				names = append(names, filepath.Base(name))
			}
		}
		slices.Sort(names)
		return nil
	})
	return names, err
}

// Open implements wal.FS.
func (f *FS) Open(name string) (file wal.File, err error) {
	err = f.do(OpOpen, name, func() error {
		n := f.names[name]
		if n == nil {
			return pathErr(OpOpen, name, fs.ErrNotExist)
		}
		file = &handle{fs: f, era: f.era, name: name, node: n}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return file, nil
}

// Create implements wal.FS.
func (f *FS) Create(name string) (file wal.File, err error) {
	err = f.do(OpCreate, name, func() error {
		if f.names[name] != nil {
			return pathErr(OpCreate, name, fs.ErrExist)
		}
		if !f.dirs[filepath.Dir(name)] {
			return pathErr(OpCreate, name, fs.ErrNotExist)
		}
		n := &inode{}
		f.change(dirOp{to: name, node: n})
		file = &handle{fs: f, era: f.era, name: name, node: n}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return file, nil
}

func (f *FS) change(op dirOp) {
	op.apply(f.names)
	f.ops = append(f.ops, op)
}

// Rename implements wal.FS.
func (f *FS) Rename(oldname, newname string) error {
	return f.do(OpRename, oldname, func() error {
		if f.names[oldname] == nil {
			return pathErr(OpRename, oldname, fs.ErrNotExist)
		}
		f.change(dirOp{from: oldname, to: newname})
		return nil
	})
}

// Remove implements wal.FS.
func (f *FS) Remove(name string) error {
	return f.do(OpRemove, name, func() error {
		if f.names[name] == nil {
			return pathErr(OpRemove, name, fs.ErrNotExist)
		}
		f.change(dirOp{from: name})
		return nil
	})
}

// SyncDir implements wal.FS.
func (f *FS) SyncDir(dir string) error {
	return f.do(OpSyncDir, dir, func() error {
		rest := f.ops[:0:0]
		for _, op := range f.ops {
			if name := max(op.from, op.to); filepath.Dir(name) != dir { // a rename stays within its directory
				rest = append(rest, op)
				continue
			}
			op.apply(f.disk)
		}
		f.ops = rest
		return nil
	})
}

type lock struct {
	fs   *FS
	name string
}

// Lock implements wal.FS. Unlike a real one it leaves no file.
func (f *FS) Lock(name string) (c io.Closer, err error) {
	err = f.do(OpLock, name, func() error {
		if f.locks[name] != nil {
			return fmt.Errorf("lock %s: %w", name, wal.ErrLocked)
		}
		l := &lock{fs: f, name: name}
		f.locks[name], c = l, l
		return nil
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (l *lock) Close() error {
	l.fs.mu.Lock()
	defer l.fs.mu.Unlock()
	if l.fs.locks[l.name] == l {
		delete(l.fs.locks, l.name)
	}
	return nil
}

var errDead = errors.New("the process that opened this file is dead")
