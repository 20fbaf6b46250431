//go:build linux

package faultfs

import (
	"maps"
	"slices"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// forEver: only the kernel changes anything here, so whatever it remembers stays true.
const forEver = time.Hour

// view is one mount of the file system: what the kernel knows of it. After a power loss there is another one, and a process
// that still uses the old one gets errors.
type view struct {
	fuse.RawFileSystem // what is not implemented: ENOSYS
	*FS
	inodes map[uint64]*inode // those the kernel knows
}

// enter takes the lock, unless the view is no longer the one in force.
func (f *view) enter() bool {
	f.mu.Lock()
	if f.view == f {
		return true
	}
	f.mu.Unlock()
	return false
}

// node returns the inode of a request. The kernel asks only about inodes it was given. mu is held.
func (f *view) node(h *fuse.InHeader) *inode { return f.inodes[h.NodeId] }

func (n *inode) attr(out *fuse.Attr) {
	*out = fuse.Attr{Ino: n.ino, Size: uint64(n.size), Blocks: uint64(len(n.pages)) * perPage, Mode: n.kind() | n.mode, Nlink: n.nlink, Blksize: pageSize}
	out.SetTimes(&n.mtime, &n.mtime, &n.mtime)
}

// kind is the part of the mode that says what n is.
func (n *inode) kind() uint32 {
	switch {
	case n.dir:
		return syscall.S_IFDIR
	case n.socket:
		return syscall.S_IFSOCK
	}
	return syscall.S_IFREG
}

// entry hands n to the kernel. mu is held.
func (f *view) entry(n *inode, out *fuse.EntryOut) {
	n.lookups++
	f.inodes[n.ino] = n
	out.NodeId, out.Generation = n.ino, 1
	out.SetEntryTimeout(forEver)
	out.SetAttrTimeout(forEver)
	n.attr(&out.Attr)
}

// Lookup implements fuse.RawFileSystem.
func (f *view) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.mu.Unlock()
	n := f.node(h).names[name]
	if n == nil {
		return fuse.ENOENT
	}
	f.entry(n, out)
	return fuse.OK
}

// Forget implements fuse.RawFileSystem.
func (f *view) Forget(id, times uint64) {
	if !f.enter() {
		return
	}
	defer f.mu.Unlock()
	if n := f.inodes[id]; n != nil && n != f.root {
		if n.lookups -= min(times, n.lookups); n.lookups == 0 {
			delete(f.inodes, id)
		}
	}
}

// GetAttr implements fuse.RawFileSystem.
func (f *view) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.mu.Unlock()
	f.node(&in.InHeader).attr(&out.Attr)
	out.SetTimeout(forEver)
	return fuse.OK
}

// SetAttr implements fuse.RawFileSystem. Modes and times are durable at once: nobody's promise rests on them.
func (f *view) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.mu.Unlock()
	n := f.node(&in.InHeader)
	after := fuse.OK
	if size, ok := in.GetSize(); ok {
		var before fuse.Status
		if before, after = f.call(OpTruncate, n.path()); !before.Ok() {
			return before
		}
		f.seq++
		f.used -= n.resize(f.seq, int64(size))
	}
	if mode, ok := in.GetMode(); ok {
		n.mode = mode & 0o7777
	}
	if t, ok := in.GetMTime(); ok {
		n.mtime = t
	}
	n.attr(&out.Attr)
	out.SetTimeout(forEver)
	return after
}

// Access implements fuse.RawFileSystem: root may do everything.
func (f *view) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status { return fuse.OK }

// Mkdir implements fuse.RawFileSystem.
func (f *view) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.mu.Unlock()
	before, after := f.call(OpMkdir, join(f.node(&in.InHeader), name))
	if !before.Ok() {
		return before
	}
	dir := f.node(&in.InHeader)
	if dir.names[name] != nil {
		return fuse.Status(syscall.EEXIST)
	}
	f.lastIno++
	n := newDir(f.lastIno, dir, name)
	n.mode = in.Mode & 0o7777
	f.change(&nameOp{toDir: dir, to: name, node: n})
	f.entry(n, out)
	return after
}

// Mknod implements fuse.RawFileSystem for what bind(2) makes: a socket is a name, everything else about it is the kernel's.
func (f *view) Mknod(_ <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.mu.Unlock()
	if in.Mode&syscall.S_IFMT != syscall.S_IFSOCK {
		return fuse.EPERM
	}
	before, after := f.call(OpCreate, join(f.node(&in.InHeader), name))
	if !before.Ok() {
		return before
	}
	dir := f.node(&in.InHeader)
	if dir.names[name] != nil {
		return fuse.Status(syscall.EEXIST)
	}
	f.lastIno++
	n := newFile(f.lastIno, dir, name, in.Mode)
	n.socket = true
	f.change(&nameOp{toDir: dir, to: name, node: n})
	f.entry(n, out)
	return after
}

// Create implements fuse.RawFileSystem.
func (f *view) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.mu.Unlock()
	before, after := f.call(OpCreate, join(f.node(&in.InHeader), name))
	if !before.Ok() {
		return before
	}
	dir := f.node(&in.InHeader)
	n := dir.names[name]
	switch {
	case n == nil:
		f.lastIno++
		n = newFile(f.lastIno, dir, name, in.Mode)
		f.change(&nameOp{toDir: dir, to: name, node: n})
	case in.Flags&syscall.O_EXCL != 0:
		return fuse.Status(syscall.EEXIST)
	case in.Flags&syscall.O_TRUNC != 0:
		f.seq++
		f.used -= n.resize(f.seq, 0)
	}
	f.entry(n, &out.EntryOut)
	return after
}

// Open implements fuse.RawFileSystem.
func (f *view) Open(_ <-chan struct{}, in *fuse.OpenIn, _ *fuse.OpenOut) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.mu.Unlock()
	n := f.node(&in.InHeader)
	if before, after := f.call(OpOpen, n.path()); !before.Ok() || !after.Ok() {
		return before | after
	}
	if in.Flags&syscall.O_TRUNC != 0 {
		f.seq++
		f.used -= n.resize(f.seq, 0)
	}
	return fuse.OK
}

// Read implements fuse.RawFileSystem.
func (f *view) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	if !f.enter() {
		return nil, fuse.EIO
	}
	defer f.mu.Unlock()
	n := f.node(&in.InHeader)
	if before, after := f.call(OpRead, n.path()); !before.Ok() || !after.Ok() {
		return nil, before | after
	}
	return fuse.ReadResultData(buf[:n.read(buf, int64(in.Offset))]), fuse.OK
}

// Write implements fuse.RawFileSystem.
func (f *view) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	if !f.enter() {
		return 0, fuse.EIO
	}
	defer f.mu.Unlock()
	n := f.node(&in.InHeader)
	before, after := f.call(OpWrite, n.path())
	if !before.Ok() {
		return 0, before
	}
	off, size := int64(in.Offset), int64(len(data))
	if f.used+n.missing(off, size) > f.capacity {
		return 0, fuse.Status(syscall.ENOSPC)
	}
	f.used += n.allocate(off, size)
	f.seq++
	n.write(f.seq, data, off)
	n.mtime = time.Now()
	return uint32(size), after
}

// Fallocate implements fuse.RawFileSystem.
func (f *view) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.mu.Unlock()
	n := f.node(&in.InHeader)
	before, after := f.call(OpAllocate, n.path())
	if !before.Ok() {
		return before
	}
	const keepSize = 1
	if in.Mode&^keepSize != 0 {
		return fuse.Status(syscall.EOPNOTSUPP)
	}
	off, size := int64(in.Offset), int64(in.Length)
	if f.used+n.missing(off, size) > f.capacity {
		return fuse.Status(syscall.ENOSPC)
	}
	f.used += n.allocate(off, size)
	if in.Mode&keepSize == 0 {
		f.seq++
		n.grow(f.seq, off+size)
	}
	return after
}

// Flush implements fuse.RawFileSystem: a close promises nothing.
func (f *view) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.OK }

// Release implements fuse.RawFileSystem.
func (f *view) Release(<-chan struct{}, *fuse.ReleaseIn) {}

// Fsync implements fuse.RawFileSystem. The kernel sends it for fsync, fdatasync, msync and writes to a file opened with O_SYNC.
func (f *view) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.mu.Unlock()
	n := f.node(&in.InHeader)
	before, after := f.call(OpSync, n.path())
	if !before.Ok() {
		n.failSync()
		return before
	}
	n.sync()
	return after
}

// FsyncDir implements fuse.RawFileSystem.
func (f *view) FsyncDir(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.mu.Unlock()
	n := f.node(&in.InHeader)
	before, after := f.call(OpSyncDir, n.path())
	if !before.Ok() {
		return before
	}
	f.syncDir(n)
	return after
}

// Unlink implements fuse.RawFileSystem.
func (f *view) Unlink(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.mu.Unlock()
	before, after := f.call(OpUnlink, join(f.node(h), name))
	if !before.Ok() {
		return before
	}
	dir := f.node(h)
	n := dir.names[name]
	if n == nil {
		return fuse.ENOENT
	}
	f.change(&nameOp{fromDir: dir, from: name})
	f.drop(n)
	return after
}

// Rmdir implements fuse.RawFileSystem.
func (f *view) Rmdir(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.mu.Unlock()
	before, after := f.call(OpUnlink, join(f.node(h), name))
	if !before.Ok() {
		return before
	}
	dir := f.node(h)
	n := dir.names[name]
	switch {
	case n == nil:
		return fuse.ENOENT
	case len(n.names) > 0:
		return fuse.Status(syscall.ENOTEMPTY)
	}
	f.change(&nameOp{fromDir: dir, from: name})
	return after
}

// Rename implements fuse.RawFileSystem.
func (f *view) Rename(_ <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.mu.Unlock()
	if in.Flags != 0 {
		return fuse.Status(syscall.EINVAL)
	}
	before, after := f.call(OpRename, join(f.inodes[in.Newdir], newName), join(f.node(&in.InHeader), oldName))
	if !before.Ok() {
		return before
	}
	from, to := f.node(&in.InHeader), f.inodes[in.Newdir]
	n, old := from.names[oldName], to.names[newName]
	switch {
	case n == nil:
		return fuse.ENOENT
	case n == old:
		return after
	case old != nil && old.dir && len(old.names) > 0:
		return fuse.Status(syscall.ENOTEMPTY)
	}
	f.change(&nameOp{fromDir: from, from: oldName, toDir: to, to: newName, node: n})
	if old != nil {
		f.drop(old)
	}
	return after
}

// Link implements fuse.RawFileSystem.
func (f *view) Link(_ <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.mu.Unlock()
	before, after := f.call(OpLink, join(f.node(&in.InHeader), name), f.inodes[in.Oldnodeid].path())
	if !before.Ok() {
		return before
	}
	dir, n := f.node(&in.InHeader), f.inodes[in.Oldnodeid]
	if dir.names[name] != nil {
		return fuse.Status(syscall.EEXIST)
	}
	n.nlink++
	f.change(&nameOp{toDir: dir, to: name, node: n})
	f.entry(n, out)
	return after
}

// OpenDir implements fuse.RawFileSystem.
func (f *view) OpenDir(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.OK }

// ReleaseDir implements fuse.RawFileSystem.
func (f *view) ReleaseDir(*fuse.ReleaseIn) {}

// ReadDir implements fuse.RawFileSystem. The offset of an entry is its inode's number: it stays right while others come and go.
func (f *view) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.mu.Unlock()
	dir := f.node(&in.InHeader)
	type named struct {
		*inode
		name string
	}
	list := make([]named, 0, len(dir.names))
	for name, n := range dir.names {
		list = append(list, named{n, name})
	}
	slices.SortFunc(list, func(a, b named) int { return int(int64(a.ino) - int64(b.ino)) })
	for _, n := range list {
		if n.ino <= in.Offset {
			continue
		}
		if !out.AddDirEntry(fuse.DirEntry{Mode: n.kind(), Name: n.name, Ino: n.ino, Off: n.ino}) {
			break
		}
	}
	return fuse.OK
}

// StatFs implements fuse.RawFileSystem.
func (f *view) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	if !f.enter() {
		return fuse.EIO
	}
	defer f.mu.Unlock()
	free := uint64(max(0, f.capacity-f.used))
	*out = fuse.StatfsOut{Blocks: uint64(f.capacity), Bfree: free, Bavail: free, Files: 1 << 20, Ffree: 1 << 19, Bsize: pageSize, Frsize: pageSize, NameLen: 255}
	return fuse.OK
}

// Paths lists every file as processes see it, sorted.
func (f *FS) Paths() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []string
	var walk func(dir *inode)
	walk = func(dir *inode) {
		for _, name := range slices.Sorted(maps.Keys(dir.names)) {
			if n := dir.names[name]; n.dir {
				walk(n)
			} else {
				list = append(list, join(dir, name))
			}
		}
	}
	walk(f.root)
	return list
}
