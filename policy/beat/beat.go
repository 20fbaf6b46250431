// Package beat is the rhythm of admission: cycles of eight ticks, and for each tick so many credits per class.
//
// It promises that the credits granted for a tick never exceed the capacity the tick was prepared with, under any
// interleaving of takers, Advance and Reconfigure, also when Advance skips ticks and when a taker is held up for any
// time between two of its steps; that Take neither locks nor allocates; and that whoever asks first gets the earlier
// tick. It does not promise that a held-up taker uses its credit within the tick it was granted for, and a tick that
// Advance skips is lost, not saved up: a machine that was suspended does not wake up to a burst.
//
// It is pure: time comes in as a tick number, chance as a number. package server calls Advance from one ticker,
// server/admit calls Take.
package beat

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/knhk/sidecar/policy"
)

const (
	// TicksPerCycle is the number of ticks in a cycle; tick numbers divisible by it are pulses.
	TicksPerCycle = 8
	// MaxCapacity is the largest number of credits of one class in one tick.
	MaxCapacity = 1_000_000
	// View is how many ticks after the current one are prepared and can be promised.
	View = TicksPerCycle
)

// A slot is one word: the tick it stands for in the upper 36 bits, in the lower 28 the credits left plus zero. Taking is
// one atomic add of -1, and the word that comes back says what was taken: a credit of the tick that was meant (granted), a
// step below zero (the tick was used up), or a credit of another tick (the taker slept while the ring went round). In the
// two latter cases what was taken is put back, by a compare-and-swap that fails if the slot has since gone to another
// tick. So credits left + granted + not yet put back = capacity at every moment, which is why no tick can be exceeded and
// nothing is stolen for longer than the put-back takes. (One compare-and-swap instead of the add would need no put-back,
// but two CPUs on one slot then pay 38 ns of CPU time for a credit instead of 18.)
//
// A used-up tick is flagged in the word that holds the current tick, so only takers already on their way can step below
// zero: fewer than the 2^27 that fit. 36 bits of ticks of 1 ms are two years: a taker would have to sleep exactly that
// long to mistake the tick.
const (
	creditBits = 28
	zero       = 1 << (creditBits - 1) // credits are counted from here, so that steps below do not borrow from the tick
	creditMask = 1<<creditBits - 1
	tickMask   = 1<<(64-creditBits) - 1
	ringSize   = 16 // a power of two above View, so that the slots in view are distinct
	classes    = 2  // R1 and W1
	flagBits   = classes
	maxTick    = 1<<(64-flagBits) - 1 - View
)

type slot struct {
	word atomic.Uint64
	_    [120]byte // two cache lines: the adjacent-line prefetcher couples pairs
}

// Limits is what one class may take of a tick and how far ahead it may be promised a credit.
type Limits struct {
	Capacity     uint32 // credits per tick, 1 to MaxCapacity
	MaxWaitTicks uint32 // 0 (never waits) to View; must be 0 for R1
}

// Config holds the limits of every class.
type Config struct {
	R1, W1 Limits
}

func (c Config) check() error {
	var errs []error
	for i, l := range [classes]Limits{c.R1, c.W1} {
		class := policy.R1 + policy.Class(i)
		if l.Capacity < 1 || l.Capacity > MaxCapacity {
			errs = append(errs, fmt.Errorf("beat: capacity of %v is %d per tick: want 1 to %d", class, l.Capacity, MaxCapacity))
		}
		if l.MaxWaitTicks > View {
			errs = append(errs, fmt.Errorf("beat: %v may wait %d ticks: want at most %d", class, l.MaxWaitTicks, View))
		}
	}
	if c.R1.MaxWaitTicks != 0 {
		errs = append(errs, fmt.Errorf("beat: R1 may wait %d ticks: want 0, a hot request never waits", c.R1.MaxWaitTicks))
	}
	return errors.Join(errs...)
}

// Beat hands out credits. Make one with New. All methods are safe for concurrent use.
type Beat struct {
	_     [64]byte
	now   atomic.Uint64          // current tick, and a flag per class that has used it up; Advance stores, search flags
	wait  [classes]atomic.Uint32 // MaxWaitTicks
	_     [64]byte               // slots are written all the time, now hardly ever
	slots [classes][ringSize]slot

	mu       sync.Mutex // Advance and Reconfigure; never taken by Take
	capacity [classes]uint32
	prepared uint64 // ticks below it have been prepared or skipped, and never will be again; 0 before the first Advance
}

// New returns a Beat without a current tick: every Take is refused until the first Advance.
func New(cfg Config) (*Beat, error) {
	b := new(Beat)
	if err := b.Reconfigure(cfg); err != nil {
		return nil, err
	}
	return b, nil
}

// Reconfigure sets new limits. Capacities hold for ticks not yet in view, so the change is complete View ticks later and
// no tick is ever given a second helping; waiting times hold at once. On error nothing changes.
func (b *Beat) Reconfigure(cfg Config) error {
	if err := cfg.check(); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, l := range [classes]Limits{cfg.R1, cfg.W1} {
		b.capacity[i] = l.Capacity
		b.wait[i].Store(l.MaxWaitTicks)
	}
	return nil
}

// Advance makes tick the current one and prepares the ticks in view that have not been prepared before. Ticks between
// the last call's view and this tick are lost. A tick that is not later than the current one changes nothing: the rhythm
// never goes back. Tick numbers need not begin at 0; those above 2^62-9 are ignored.
func (b *Beat) Advance(tick uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.prepared > 0 && tick <= b.Now() || tick > maxTick {
		return
	}
	// Slots first, the tick after: whoever reads the new tick finds its slots. Each tick is stored once, because prepared
	// only grows; a second time would be a second helping.
	for t := max(b.prepared, tick); t <= tick+View; t++ {
		for class := range b.slots {
			b.slots[class][t%ringSize].word.Store(t&tickMask<<creditBits | zero + uint64(b.capacity[class]))
		}
	}
	b.prepared = tick + View + 1
	b.now.Store(tick << flagBits)
}

// Now returns the current tick, 0 before the first Advance.
func (b *Beat) Now() uint64 { return b.now.Load() >> flagBits }

// Grant is a credit of one tick, or the advice that comes with a refusal.
type Grant struct {
	Tick  uint64 // the tick whose credit was taken; refused: the current tick
	Wait  uint32 // ticks from the current one to Tick: 0 goes on at once, else the request is parked
	Retry uint32 // refused: ticks until one with a free credit, View+1 when none is in view; 0 when granted
}

// Take takes one credit for class: of the current tick, or of the first later tick within the class's waiting time that
// has one. It reports false when there is none, when the class is unknown, and before the first Advance.
func (b *Beat) Take(class policy.Class) (Grant, bool) {
	i := uint(class - policy.R1)
	if i >= classes {
		return Grant{Tick: b.Now(), Retry: View + 1}, false
	}
	return b.takeAt(i, b.now.Load())
}

// takeAt is Take for whoever read now some time ago.
func (b *Beat) takeAt(class uint, now uint64) (Grant, bool) {
	if now>>class&1 == 0 {
		tick := now >> flagBits
		s := &b.slots[class][tick%ringSize]
		w := s.word.Add(^uint64(0))
		if w>>creditBits == tick&tickMask && w&creditMask >= zero {
			return Grant{Tick: tick}, true
		}
		s.putBack(w)
	}
	return b.search(class)
}

// putBack undoes an add of -1 that gave w, unless the slot has gone to another tick and there is nothing to undo.
func (s *slot) putBack(w uint64) {
	for {
		cur := s.word.Load()
		if cur>>creditBits != w>>creditBits || s.word.CompareAndSwap(cur, cur+1) {
			return
		}
	}
}

// search is the rest of Take: the tick is used up, or it is over.
func (b *Beat) search(class uint) (Grant, bool) {
	for {
		now, limit := b.now.Load(), b.wait[class].Load()
		tick := now >> flagBits
		ahead := uint32(0)
		for ; ahead <= View; ahead++ {
			free, taken := b.take(class, tick+uint64(ahead), ahead <= limit)
			if taken {
				return Grant{Tick: tick + uint64(ahead), Wait: ahead}, true
			}
			if free {
				break
			}
			if ahead == 0 && now>>class&1 == 0 {
				// Failing is fine: another taker set a flag, or the tick is over. A credit put back after this is found
				// by search, which looks at the slot and not at the flag.
				b.now.CompareAndSwap(now, now|1<<class)
			}
		}
		// A refusal must rest on one moment: if the tick moved meanwhile, slots seen as used up may have been past ones.
		if b.Now() == tick {
			return Grant{Tick: tick, Retry: ahead}, false
		}
	}
}

// take reports whether the slot of tick had a credit, and whether it was taken, which is tried only if want is set.
func (b *Beat) take(class uint, tick uint64, want bool) (free, taken bool) {
	s := &b.slots[class][tick%ringSize].word
	for {
		w := s.Load()
		if w>>creditBits != tick&tickMask || w&creditMask <= zero {
			return false, false
		}
		if !want {
			return true, false
		}
		if s.CompareAndSwap(w, w-1) {
			return true, true
		}
	}
}

// RetryAfter turns a refusal's Retry ticks into a time to wait: between ticks and ticks + one cycle, chosen by jitter,
// any random number, so that those refused together do not come back together. It saturates instead of overflowing.
func RetryAfter(ticks uint32, tickLen time.Duration, jitter uint64) time.Duration {
	if tickLen <= 0 {
		return 0
	}
	hi, lo := bits.Mul64(uint64(ticks), uint64(tickLen))
	spreadHi, spread := bits.Mul64(TicksPerCycle, uint64(tickLen))
	extra, _ := bits.Mul64(jitter, spread)
	if hi != 0 || spreadHi != 0 || lo > math.MaxInt64 || extra > math.MaxInt64-lo {
		return math.MaxInt64
	}
	return time.Duration(lo + extra)
}
