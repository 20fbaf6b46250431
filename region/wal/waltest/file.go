package waltest

import (
	"io"
	"io/fs"
	"slices"
)

// handle is an open file.
type handle struct {
	fs     *FS
	era    int
	name   string
	node   *inode
	closed bool
}

// do is FS.do for a live handle.
func (h *handle) do(op Op, work func() error) error {
	h.fs.mu.Lock()
	era, closed := h.fs.era, h.closed
	h.fs.mu.Unlock()
	switch {
	case closed:
		return pathErr(op, h.name, fs.ErrClosed)
	case era != h.era:
		return pathErr(op, h.name, errDead)
	}
	return h.fs.do(op, h.name, func() error {
		if h.fs.era != h.era {
			return pathErr(op, h.name, errDead)
		}
		return work()
	})
}

func (h *handle) ReadAt(p []byte, off int64) (n int, err error) {
	err = h.do(OpRead, func() error {
		if off < int64(len(h.node.data)) {
			n = copy(p, h.node.data[off:])
		}
		return nil
	})
	if err == nil && n < len(p) {
		err = io.EOF
	}
	return n, err
}

func (h *handle) WriteAt(p []byte, off int64) (n int, err error) {
	put := func(p []byte) {
		p = slices.Clone(p)
		h.node.data = store(h.node.data, off, p)
		h.node.pending = append(h.node.pending, write{off: off, data: p})
	}
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	switch {
	case h.closed:
		return 0, pathErr(OpWrite, h.name, fs.ErrClosed)
	case h.fs.era != h.era:
		return 0, pathErr(OpWrite, h.name, errDead)
	}
	fault := h.fs.call(OpWrite, h.name)
	switch {
	case fault == nil:
		put(p)
		return len(p), nil
	case fault.Persist:
		put(p)
		return 0, pathErr(OpWrite, h.name, fault.Err)
	}
	n = min(max(fault.Bytes, 0), len(p))
	if n > 0 {
		put(p[:n])
	}
	return n, pathErr(OpWrite, h.name, fault.Err)
}

func (h *handle) Sync() error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	switch {
	case h.closed:
		return pathErr(OpSync, h.name, fs.ErrClosed)
	case h.fs.era != h.era:
		return pathErr(OpSync, h.name, errDead)
	}
	fault := h.fs.call(OpSync, h.name)
	n := h.node
	if fault != nil && !fault.Persist {
		for i := range n.pending {
			n.pending[i].lost = true
		}
		return pathErr(OpSync, h.name, fault.Err)
	}
	for _, w := range n.pending {
		if !w.lost {
			n.synced = store(n.synced, w.off, w.data)
		}
	}
	n.pending = nil
	if fault != nil {
		return pathErr(OpSync, h.name, fault.Err)
	}
	return nil
}

// Allocate implements wal.File. The length is durable with the next Sync, like content.
func (h *handle) Allocate(size int64) error {
	return h.do(OpAllocate, func() error {
		if grow := size - int64(len(h.node.data)); grow > 0 {
			w := write{off: int64(len(h.node.data)), data: make([]byte, grow)}
			h.node.data = store(h.node.data, w.off, w.data)
			h.node.pending = append(h.node.pending, w)
		}
		return nil
	})
}

func (h *handle) Size() (n int64, err error) {
	err = h.do(OpSize, func() error {
		n = int64(len(h.node.data))
		return nil
	})
	return n, err
}

func (h *handle) Close() error {
	h.fs.mu.Lock()
	dead := h.fs.era != h.era
	h.fs.mu.Unlock()
	if dead {
		return nil
	}
	return h.do(OpClose, func() error {
		h.closed = true
		return nil
	})
}
