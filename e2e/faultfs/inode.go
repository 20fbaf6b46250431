//go:build linux

package faultfs

import (
	"bytes"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

const (
	pageSize   = 4096 // what content is kept in
	sectorSize = 512  // what the disk writes whole
	perPage    = pageSize / sectorSize
)

type (
	page   [pageSize]byte
	sector [sectorSize]byte
)

var zeroPage = new(page) // shared by all pages that are allocated and hold nothing; never written to

// inode is a file, a directory or a socket. The mutex of FS guards it.
type inode struct {
	ino    uint64
	dir    bool
	socket bool // a file without content
	mode   uint32
	nlink  uint32
	mtime  time.Time
	parent *inode // with name: where it was last seen, for its path
	name   string

	lookups uint64 // by the kernel

	// A file.
	size  int64
	pages map[int64]*page
	dirty map[int64][]version // by sector: the synced content, then every one since
	sizes []sizeVersion       // likewise
	last  lastWrite

	// A directory.
	names map[string]*inode // as processes see it
	disk  map[string]*inode // as a power loss with nothing more leaves it
}

// version is the content of a sector; nil is zeros. seq 0 is the synced one.
type version struct {
	seq  uint64
	data *sector
	lost bool // a failed fsync should have made it durable: later ones do not
}

// lastWrite is where the newest content was put.
type lastWrite struct {
	seq       uint64
	off, size int64
}

type sizeVersion struct {
	seq  uint64
	size int64
	lost bool
}

// nameOp is a change of names that is not synced: node gets the name to in dir, or from in fromDir goes, or both.
type nameOp struct {
	seq     uint64
	fromDir *inode
	from    string
	toDir   *inode
	to      string
	node    *inode
}

func newDir(ino uint64, parent *inode, name string) *inode {
	return &inode{ino: ino, dir: true, mode: 0o755, nlink: 2, mtime: time.Now(), parent: parent, name: name,
		names: map[string]*inode{}, disk: map[string]*inode{}}
}

func newFile(ino uint64, parent *inode, name string, mode uint32) *inode {
	return &inode{ino: ino, mode: mode & 0o7777, nlink: 1, mtime: time.Now(), parent: parent, name: name,
		pages: map[int64]*page{}, dirty: map[int64][]version{}}
}

// path is relative to the mount.
func (n *inode) path() string {
	if n.parent == nil {
		return ""
	}
	return join(n.parent, n.name)
}

func join(dir *inode, name string) string {
	if p := dir.path(); p != "" {
		return p + "/" + name
	}
	return name
}

// read copies what stands at off.
func (n *inode) read(b []byte, off int64) int {
	if off >= n.size {
		return 0
	}
	b = b[:min(int64(len(b)), n.size-off)]
	for done := 0; done < len(b); {
		at := off + int64(done)
		to := min(len(b), done+int(pageSize-at%pageSize))
		if p := n.pages[at/pageSize]; p != nil {
			copy(b[done:to], p[at%pageSize:])
		} else {
			clear(b[done:to])
		}
		done = to
	}
	return len(b)
}

// missing is how many pages must be allocated to write size bytes at off.
func (n *inode) missing(off, size int64) (pages int64) {
	for p := off / pageSize; p*pageSize < off+size; p++ {
		if n.pages[p] == nil {
			pages++
		}
	}
	return pages
}

// allocate makes every page from off on exist, and returns how many that took.
func (n *inode) allocate(off, size int64) (pages int64) {
	for p := off / pageSize; p*pageSize < off+size; p++ {
		if n.pages[p] == nil {
			n.pages[p] = zeroPage
			pages++
		}
	}
	return pages
}

// write changes content, page for page allocated before, and remembers what was there.
func (n *inode) write(seq uint64, b []byte, off int64) {
	n.last = lastWrite{seq, off, int64(len(b))}
	for done := 0; done < len(b); {
		at := off + int64(done)
		to := min(len(b), done+int(sectorSize-at%sectorSize))
		n.put(seq, at/sectorSize, int(at%sectorSize), b[done:to])
		done = to
	}
	n.grow(seq, off+int64(len(b)))
}

// put writes b into sector s.
func (n *inode) put(seq uint64, s int64, at int, b []byte) {
	old := n.sector(s)
	var now sector
	if old != nil {
		now = *old
	}
	copy(now[at:], b)
	n.store(seq, s, old, &now)
}

func (n *inode) store(seq uint64, s int64, old, now *sector) {
	versions := n.dirty[s]
	if now != nil && *now == (sector{}) {
		now = nil
	}
	if len(versions) == 0 {
		if old == now || old != nil && now != nil && *old == *now {
			return // nothing is at risk
		}
		versions = []version{{data: old}}
	}
	n.dirty[s] = append(versions, version{seq: seq, data: now})
	n.set(s, now)
}

// sector returns a copy of a sector; nil is zeros.
func (n *inode) sector(s int64) *sector {
	p := n.pages[s/perPage]
	if p == nil || p == zeroPage {
		return nil
	}
	c := sector(p[s%perPage*sectorSize:][:sectorSize])
	if c == (sector{}) {
		return nil
	}
	return &c
}

// set changes a sector and remembers nothing.
func (n *inode) set(s int64, now *sector) {
	p := n.pages[s/perPage]
	if p == nil || p == zeroPage {
		if now == nil {
			return
		}
		p = new(page)
		n.pages[s/perPage] = p
	}
	to := p[s%perPage*sectorSize:][:sectorSize]
	if now == nil {
		clear(to)
		return
	}
	copy(to, now[:])
}

func (n *inode) grow(seq uint64, size int64) {
	if size > n.size {
		n.resize(seq, size)
	}
}

// resize sets the size; what is cut off reads as zeros afterwards. It returns how many pages that gave back.
func (n *inode) resize(seq uint64, size int64) (pages int64) {
	if size == n.size {
		return 0
	}
	if len(n.sizes) == 0 {
		n.sizes = []sizeVersion{{size: n.size}}
	}
	n.sizes = append(n.sizes, sizeVersion{seq: seq, size: size})
	if size < n.size {
		pages = n.cut(size, func(s int64, now *sector) { n.store(seq, s, n.sector(s), now) })
	}
	n.size, n.mtime = size, time.Now()
	return pages
}

// cut clears what stands behind size; store writes a sector.
func (n *inode) cut(size int64, store func(s int64, now *sector)) (pages int64) {
	for _, p := range slices.Collect(maps.Keys(n.pages)) {
		if (p+1)*pageSize <= size {
			continue
		}
		for s := p * perPage; s < (p+1)*perPage; s++ {
			old := n.sector(s)
			if old == nil && len(n.dirty[s]) == 0 || (s+1)*sectorSize <= size {
				continue
			}
			now := new(sector)
			if keep := size - s*sectorSize; keep > 0 && old != nil {
				copy(now[:keep], old[:keep])
			}
			store(s, now)
		}
		if p*pageSize >= size {
			delete(n.pages, p)
			pages++
		}
	}
	return pages
}

// sync makes content and size durable, but for what a failed sync has lost.
func (n *inode) sync() {
	for s, versions := range n.dirty {
		if !versions[len(versions)-1].lost {
			delete(n.dirty, s)
		}
	}
	if k := len(n.sizes); k > 0 && !n.sizes[k-1].lost {
		n.sizes = nil
	}
}

// failSync is a sync that said EIO: Linux marks the pages clean, so nothing tries again.
func (n *inode) failSync() {
	for _, versions := range n.dirty {
		for i := range versions {
			versions[i].lost = true
		}
	}
	for i := range n.sizes {
		n.sizes[i].lost = true
	}
}

// change applies op to names as processes see them, and remembers it.
func (f *FS) change(op *nameOp) {
	f.seq++
	op.seq = f.seq
	now := time.Now()
	if op.fromDir != nil {
		delete(op.fromDir.names, op.from)
		op.fromDir.mtime = now
	}
	if op.toDir != nil {
		op.toDir.names[op.to] = op.node
		op.toDir.mtime = now
		op.node.parent, op.node.name = op.toDir, op.to
	}
	f.ops = append(f.ops, op)
}

func (op *nameOp) persist() {
	if op.fromDir != nil {
		delete(op.fromDir.disk, op.from)
	}
	if op.toDir != nil {
		op.toDir.disk[op.to] = op.node
	}
}

// syncDir makes the names of dir durable.
func (f *FS) syncDir(dir *inode) {
	f.ops = slices.DeleteFunc(f.ops, func(op *nameOp) bool {
		if op.fromDir != dir && op.toDir != dir {
			return false
		}
		op.persist()
		return true
	})
}

// SyncAll makes everything durable, as sync(2) does.
func (f *FS) SyncAll() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, op := range f.ops {
		op.persist()
	}
	f.ops = nil
	var walk func(n *inode)
	walk = func(n *inode) {
		n.dirty, n.sizes = map[int64][]version{}, nil
		for _, child := range n.names {
			walk(child)
		}
	}
	walk(f.root)
}

// LastUnsynced returns the newest write to a file with a path that ends in suffix that no sync has covered; size 0 if there is
// none.
func (f *FS) LastUnsynced(suffix string) (path string, off, size int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var newest uint64
	var walk func(n *inode)
	walk = func(n *inode) {
		if !n.dir && len(n.dirty) > 0 && n.last.seq > newest && strings.HasSuffix(n.path(), suffix) {
			newest, path, off, size = n.last.seq, n.path(), n.last.off, n.last.size
		}
		for _, child := range n.names {
			walk(child)
		}
	}
	walk(f.root)
	return path, off, size
}

// drop gives back the pages of a file that has no name left.
func (f *FS) drop(n *inode) {
	if n.nlink--; n.nlink == 0 && !n.dir {
		f.used -= int64(len(n.pages))
	}
}

// lose forgets what was not synced, in the given way, and makes what is left what processes see.
func (f *FS) lose(mode string, rng *rand.Rand) Loss {
	l := Loss{Mode: mode}
	cut := rng.Uint64N(f.seq + 1)
	coin, odds := map[uint64]bool{}, []float64{0.1, 0.5, 0.9}[rng.IntN(3)]
	flip := func(seq uint64) bool {
		keep, ok := coin[seq]
		if !ok {
			keep = rng.Float64() < odds
			coin[seq] = keep
		}
		return keep
	}
	keepName := func(seq uint64) bool {
		switch mode {
		case "everything kept", "names only":
			return true
		case "cut in time":
			return seq <= cut
		case "writes at random", "torn sectors":
			return flip(seq)
		}
		return false
	}
	// pick returns the index of the version that is on the disk; seqs has at least two, the first of them synced.
	pick := func(seqs []uint64) int {
		last := len(seqs) - 1
		switch mode {
		case "everything kept", "content only":
			return last
		case "torn sectors":
			return rng.IntN(len(seqs))
		case "cut in time", "writes at random":
			for i := last; i > 0; i-- {
				if mode == "cut in time" && seqs[i] <= cut || mode == "writes at random" && flip(seqs[i]) {
					return i
				}
			}
		}
		return 0
	}
	for _, op := range f.ops {
		l.Names++
		if keepName(op.seq) {
			op.persist()
			l.NamesKept++
		}
	}
	f.ops, f.used = nil, 0
	f.remount(f.root, map[*inode]bool{}, func(n *inode) {
		for _, s := range slices.Sorted(maps.Keys(n.dirty)) {
			versions := n.dirty[s]
			seqs := make([]uint64, len(versions))
			for i, v := range versions {
				seqs[i] = v.seq
			}
			i := pick(seqs)
			n.set(s, versions[i].data)
			l.Sectors++
			if i == len(versions)-1 || same(versions[i].data, versions[len(versions)-1].data) {
				l.Kept++
			}
		}
		if len(n.sizes) > 0 {
			seqs := make([]uint64, len(n.sizes))
			for i, v := range n.sizes {
				seqs[i] = v.seq
			}
			n.size = n.sizes[pick(seqs)].size
			n.cut(n.size, n.set)
		}
		n.dirty, n.sizes = map[int64][]version{}, nil
		f.used += int64(len(n.pages))
	})
	return l
}

func same(a, b *sector) bool {
	if a == nil || b == nil {
		return a == b
	}
	return bytes.Equal(a[:], b[:])
}

// remount makes the names on disk what processes see, and calls settle for every file once.
func (f *FS) remount(dir *inode, done map[*inode]bool, settle func(*inode)) {
	dir.names, dir.nlink, dir.lookups = maps.Clone(dir.disk), 2, 0
	for _, name := range slices.Sorted(maps.Keys(dir.names)) {
		n := dir.names[name]
		n.parent, n.name = dir, name
		switch {
		case n.dir:
			f.remount(n, done, settle)
		case done[n]:
			n.nlink++
		default:
			done[n] = true
			n.nlink, n.lookups = 1, 0
			settle(n)
		}
	}
}
