package wal

import (
	"io"
	"io/fs"
)

// FS is the part of a file system the log uses. Names are full paths. Implementations are safe for concurrent use.
//
// The log trusts it with this much and no more: what a File.Sync that returned nil covered is still there after a
// machine crash, under the name it has had since a SyncDir that returned nil; anything else may be there, in part and in
// any order. What was written is there after the death of the process. A Sync that failed has promised nothing about
// anything since the Sync before, and repeating it proves nothing (Linux drops the dirty pages with the error).
type FS interface {
	MkdirAll(dir string, perm fs.FileMode) error
	// ReadDir returns the names in dir, without dir, in no particular order.
	ReadDir(dir string) ([]string, error)
	// Open opens an existing file for reading and writing; fs.ErrNotExist if there is none.
	Open(name string) (File, error)
	// Create makes a new empty file of mode 0600; fs.ErrExist if the name is taken.
	Create(name string) (File, error)
	// Rename replaces newname if it exists.
	Rename(oldname, newname string) error
	Remove(name string) error
	// SyncDir makes names created, renamed and removed in dir durable.
	SyncDir(dir string) error
	// Lock takes the exclusive lock that name stands for, creating it, or fails at once with ErrLocked. It ends with Close
	// or with the process.
	Lock(name string) (io.Closer, error)
}

// File is an open file. WriteAt extends the file when needed and writes everything or fails.
type File interface {
	io.ReaderAt
	io.WriterAt
	// Sync makes content and size durable (fdatasync).
	Sync() error
	// Allocate reserves space for size bytes and makes the file that long if it is shorter. The content of what was added
	// reads as zeros.
	Allocate(size int64) error
	Size() (int64, error)
	Close() error
}
