//go:build cgo

package hsm

import "sync"

// looks is how many initializations of the module must miss an object before it is believed to be gone.
const looks = 2

// maxSights bounds what is remembered of a token; beyond it all is forgotten, which costs a few restarts of the module.
const maxSights = 4096

// sight is what was seen of a version: its objects, and whether the private one may sign.
type sight struct{ public, private, sign bool }

var whole = sight{true, true, true}

// sights remembers what a token was seen to hold, because a module may hide objects that exist. SoftHSM 2.6.1 takes an object
// that it looks at while the token is away for invalid, and skips it in searches until the next C_Initialize, also when the
// token has long been back, without any error: a version then looks destroyed, disabled, or as if it had never been. Its key
// would be given up for lost. So what was there and is missing, and what is there by half, is believed only when it looks the
// same after a new C_Initialize. What is whole is believed at once, and what this process has done itself.
type sights struct {
	mu      sync.Mutex
	settled map[name]sight
	doubted map[name]doubt
}

type doubt struct {
	what  sight
	init  uint64 // initialization in which it looked so last
	looks int
}

// believe says whether v may be told to callers; init numbers the initialization in which n looks like v.
func (s *sights) believe(init uint64, n name, v sight) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old, ok := s.settled[n]; ok && old == v || v == whole {
		s.settle(n, v)
		return true
	}
	d := s.doubted[n]
	if d.what != v {
		d = doubt{what: v}
	}
	if d.looks == 0 || d.init != init {
		d.init = init
		d.looks++
	}
	if d.looks >= looks {
		s.settle(n, v)
		return true
	}
	if s.doubted == nil || len(s.doubted) >= maxSights {
		s.doubted = make(map[name]doubt)
	}
	s.doubted[n] = d
	return false
}

// note records what this process has made so itself.
func (s *sights) note(n name, v sight) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.settle(n, v)
}

func (s *sights) settle(n name, v sight) {
	if s.settled == nil || len(s.settled) >= maxSights {
		s.settled = make(map[name]sight)
	}
	s.settled[n] = v
	delete(s.doubted, n)
}

// expected returns the versions of a label of which something was there.
func (s *sights) expected(label string) (ns []name) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for n, v := range s.settled {
		if n.label == label && v != (sight{}) {
			ns = append(ns, n)
		}
	}
	return ns
}
