package wal_test

import (
	"path/filepath"
	"testing"

	"github.com/knhk/sidecar/region/wal/waltest"
)

// TestSegmentIsSyncedFirst: a segment's zeroes are on the disk before it gets its name, so that no commit pays for its blocks.
func TestSegmentIsSyncedFirst(t *testing.T) {
	fs := waltest.New(0)
	made, dirty := 0, false
	fs.SetHook(func(c waltest.Call) *waltest.Fault {
		if filepath.Base(c.Name) != "next.tmp" {
			return nil
		}
		switch c.Op {
		case waltest.OpCreate, waltest.OpAllocate, waltest.OpWrite:
			dirty = true
		case waltest.OpSync:
			dirty = false
		case waltest.OpRename:
			if made++; dirty {
				t.Errorf("segment %d is taken into use before it was synced", made)
			}
		}
		return nil
	})
	w := mustOpen(t, testConfig(fs))
	must(t, w.Prepare())
	must(t, w.Close())
	if made < 2 {
		t.Errorf("%d segments were made, want 2: the test saw nothing", made)
	}
}
