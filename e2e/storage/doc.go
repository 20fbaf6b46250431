// Package storage tests what knhk keeps of its promises when the disk does not keep its own: power loss with torn and reordered
// writes, calls that fail and disks that are full at each call site in turn, tails cut off, bits flipped.
//
// It promises that the faults are real: the knhk program runs on a file system that forgets and fails (e2e/faultfs), behind a
// real Envoy, and the file system, not knhk, says that the fault happened. After each fault the whole log is audited against
// what the clients and the upstream saw, with `knhk verify`, `knhk fsck` and this package's own reading of the log. It has
// tests only.
package storage
