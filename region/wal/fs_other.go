//go:build unix && !linux

package wal

func (f osFile) Allocate(size int64) error { return growTo(f, size) }
