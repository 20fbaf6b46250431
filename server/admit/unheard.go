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
