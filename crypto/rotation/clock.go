package rotation

import (
	"sync"
	"time"
)

// Clock is the time used for key age and record order: never behind the time that the log has already seen, so that a wall
// clock set back extends nothing. Between readings of the wall the monotonic clock counts. Safe for concurrent use.
type Clock struct {
	now func() (wall time.Time, mono time.Duration) // mono: monotonic time since some moment, of the same reading

	mu    sync.Mutex
	floor time.Time     // latest time known
	at    time.Duration // of mono when floor was set
}

// NewClock makes the clock of a log. wall is time.Now, or a test's; its readings' monotonic part is used where there is one.
// floor is the latest time that is durable anywhere in the log; zero for a new log. Open raises it by what its state holds.
func NewClock(wall func() time.Time, floor time.Time) *Clock {
	start := wall()
	// One reading for both: of two, the floor would creep ahead of the wall by the time between them.
	return makeClock(func() (time.Time, time.Duration) {
		w := wall()
		return w, w.Sub(start)
	}, floor)
}

func makeClock(now func() (time.Time, time.Duration), floor time.Time) *Clock {
	_, at := now()
	return &Clock{now: now, floor: floor.Round(0).UTC(), at: at}
}

// Now returns max(wall, floor + monotonic time since), in UTC. It never goes back.
func (c *Clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, _ := c.read()
	return now
}

// Behind says how far the wall clock is behind Now; 0 when it is not.
func (c *Clock) Behind() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	now, wall := c.read()
	return now.Sub(wall)
}

// raise makes t the least that Now returns.
func (c *Clock) raise(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now, _ := c.read(); t.After(now) {
		c.floor = t.Round(0).UTC()
	}
}

// read advances the floor. The caller holds mu.
func (c *Clock) read() (now, wall time.Time) {
	wall, mono := c.now()
	wall = wall.Round(0).UTC()
	if mono > c.at {
		c.floor, c.at = c.floor.Add(mono-c.at), mono
	}
	if wall.After(c.floor) {
		c.floor = wall
	}
	return c.floor, wall
}
