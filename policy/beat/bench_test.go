package beat

import (
	"sync/atomic"
	"testing"

	"github.com/knhk/sidecar/policy"
)

func benchBeat(b *testing.B) *Beat {
	bt, err := New(Config{R1: Limits{Capacity: MaxCapacity}, W1: Limits{Capacity: MaxCapacity, MaxWaitTicks: View}})
	if err != nil {
		b.Fatal(err)
	}
	bt.Advance(1)
	return bt
}

func BenchmarkAtomicAdd(b *testing.B) {
	var n atomic.Uint64
	for b.Loop() {
		n.Add(1)
	}
}

func BenchmarkTake(b *testing.B) {
	bt := benchBeat(b)
	tick := uint64(1)
	for b.Loop() {
		if _, ok := bt.Take(policy.R1); !ok {
			tick++
			bt.Advance(tick)
		}
	}
}

func BenchmarkAtomicAddParallel(b *testing.B) {
	var n atomic.Uint64
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			n.Add(1)
		}
	})
}

func BenchmarkTakeParallel(b *testing.B) {
	bt := benchBeat(b)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if g, ok := bt.Take(policy.R1); !ok {
				bt.Advance(g.Tick + 1)
			}
		}
	})
}
