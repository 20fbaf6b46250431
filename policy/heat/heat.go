// Package heat keeps, for each route, the share of requests that a cache answered: recent ones count more.
//
// It promises that what is not known is never taken for a miss: an outcome that says nothing of a cache changes nothing, and a
// share is given only when enough was observed lately. It is bounded by the routes it is made for; all others share one count. The
// evidence is a response header: whoever answers a route's requests decides about its heat.
//
// It is pure: time comes in as an argument. server/admit tells it outcomes and asks it for rules of policy/authz.
package heat

import (
	"math"
	"strings"
	"sync"
	"time"
)

const (
	// HalfLife is the time after which an observation counts half.
	HalfLife = 5 * time.Minute
	// MinEvidence is how many observations, decayed, a share needs to be known.
	MinEvidence = 20
)

// Heat counts. Make one with New. Safe for concurrent use.
type Heat struct {
	routes map[string]*Counter
	rest   *Counter
}

// New makes a Heat for the named routes and the rest. With an old one, which may be nil, it goes on with the counts of the
// routes that both have; both may be used at the same time.
func New(routes []string, old *Heat) *Heat {
	h := &Heat{routes: make(map[string]*Counter, len(routes)), rest: new(Counter)}
	if old != nil {
		h.rest = old.rest
	}
	for _, r := range routes {
		c := new(Counter)
		if old != nil && old.routes[r] != nil {
			c = old.routes[r]
		}
		h.routes[r] = c
	}
	return h
}

// Of returns the counter of a route: its own if it is listed, else that of the rest. It does not allocate.
func (h *Heat) Of(route string) *Counter {
	if c, ok := h.routes[route]; ok {
		return c
	}
	return h.rest
}

// Counter is the count of one route. The zero Counter has seen nothing. Safe for concurrent use.
type Counter struct {
	mu     sync.Mutex
	hits   float64 // as of at
	misses float64
	at     time.Time
}

// Observe counts one request at time now.
func (c *Counter) Observe(hit bool, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.decay(now)
	if hit {
		c.hits++
	} else {
		c.misses++
	}
}

// Heat gives the share of hits, 0 to 1, as of now. known is false, and share 0, when there is too little evidence.
func (c *Counter) Heat(now time.Time) (share float64, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.decay(now)
	sum := c.hits + c.misses
	if sum < MinEvidence {
		return 0, false
	}
	return min(c.hits/sum, 1), true
}

// decay brings the counts to now. Time that goes back leaves them as they are.
func (c *Counter) decay(now time.Time) {
	if elapsed := now.Sub(c.at); elapsed > 0 {
		factor := math.Exp2(-float64(elapsed) / float64(HalfLife))
		c.hits, c.misses, c.at = c.hits*factor, c.misses*factor, now
	}
}

// maxStatus is the length at which policy.Outcome.CacheStatus may have been cut.
const maxStatus = 256

// Judge reads a Cache-Status header (RFC 9211) as policy.Outcome has it. The request was a hit if a cache on its way says so, a miss if
// none does and one says that it went forward. A value that has neither is read as X-Cache of older caches, which begins with the
// word HIT or MISS. known is false for everything else.
func Judge(status string) (hit, known bool) {
	for rest, cut := status, len(status) >= maxStatus; rest != ""; {
		member, after, more := split(rest, ',')
		if !more && cut {
			break // the last one may lack its end
		}
		rest = after
		_, params, _ := split(member, ';')
		for params != "" {
			var p string
			p, params, _ = split(params, ';')
			key, value, hasValue := strings.Cut(strings.TrimSpace(p), "=")
			switch {
			case key == "hit" && (!hasValue || value == "?1"):
				return true, true
			case key == "fwd":
				known = true
			}
		}
	}
	if known {
		return false, true
	}
	if word, _, _ := strings.Cut(status, " "); strings.EqualFold(word, "hit") || strings.EqualFold(word, "miss") {
		return strings.EqualFold(word, "hit"), true
	}
	return false, false
}

// split cuts s at the first sep that is in no quoted string (RFC 9651 section 3.3.3).
func split(s string, sep byte) (before, after string, found bool) {
	quoted := false
	for i := 0; i < len(s); i++ {
		switch {
		case quoted && s[i] == '\\':
			i++
		case s[i] == '"':
			quoted = !quoted
		case s[i] == sep && !quoted:
			return s[:i], s[i+1:], true
		}
	}
	return s, "", false
}
