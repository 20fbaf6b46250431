package admit

import (
	"sync"
	"time"
)

// maxUnheard bounds the Envoys that unheard remembers: they name themselves.
const maxUnheard = 1024

// unheard remembers since when an access log stream of an Envoy is missing. What passed there without a receipt meanwhile is in
// no counter of ours: all that can be said is from when to when nobody listened.
type unheard struct {
	mu    sync.Mutex
	start time.Time              // for streams of which no earlier one is remembered
	ended map[string][]time.Time // by node: ends that no begin has followed yet, oldest first
	aged  map[string][]time.Time // the same of streams that were ended here, with nothing on its way
}

// reopen is how long after an end for its age a stream of the same Envoy is the same one going on: several flush intervals. Later
// nobody knows whether Envoy had nothing to tell.
const reopen = 30 * time.Second

// rest notes the end of a stream for its age.
func (u *unheard) rest(node string, now time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.aged == nil {
		u.aged = map[string][]time.Time{}
	}
	if ends, ok := u.aged[node]; len(ends) < maxUnheard && (ok || len(u.aged) < maxUnheard) {
		u.aged[node] = append(ends, now)
	}
}

// resume reports whether the stream that begins now goes on where one was ended for its age.
func (u *unheard) resume(node string, now time.Time) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	ends := u.aged[node]
	for len(ends) > 0 && now.Sub(ends[0]) > reopen { // it did not come back in time: missing since
		if u.ended == nil {
			u.ended = map[string][]time.Time{}
		}
		if old := u.ended[node]; len(old) < maxUnheard {
			u.ended[node] = append(old, ends[0])
		}
		ends = ends[1:]
	}
	going := len(ends) > 0
	if going {
		ends = ends[1:]
	}
	if len(ends) == 0 {
		delete(u.aged, node)
	} else {
		u.aged[node] = ends
	}
	return going
}

// end notes the end of a stream.
func (u *unheard) end(node string, now time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.ended == nil {
		u.ended = map[string][]time.Time{}
	}
	if ends, ok := u.ended[node]; len(ends) < maxUnheard && (ok || len(u.ended) < maxUnheard) {
		u.ended[node] = append(ends, now)
	}
}

// begin gives the time since when the stream that begins now was missing: the oldest end of a stream of that Envoy, or the start.
func (u *unheard) begin(node string) time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	ends := u.ended[node]
	switch len(ends) {
	case 0:
		return u.start
	case 1:
		delete(u.ended, node)
	default:
		u.ended[node] = ends[1:]
	}
	return ends[0]
}
