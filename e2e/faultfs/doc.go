// Package faultfs is a file system that forgets and fails on demand, mounted (FUSE) under the real program: what a disk does to
// knhk when the power goes, when it is full and when a call fails.
//
// It promises to be as bad as POSIX allows and no worse. A running process sees an ordinary file system, mmap and flock
// included. What was not yet synced is remembered: PowerLoss keeps any part of it, whole writes, sectors of 512 bytes, the
// order reversed, names without content and content without names. What an fsync covered stays; a name stays once its own
// directory was synced; a rename happens whole or not at all. A write that a failed fsync should have covered stays at risk
// whatever later fsyncs say, as in Linux. Fail makes calls fail, and counts how often they did; Calls says which calls there
// are, so that each can be made to fail in turn. SetCapacity makes a small disk.
//
// Content lives in the memory of the test. It needs Linux, root and /dev/fuse: see Mount. For tests only.
package faultfs
