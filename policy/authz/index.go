package authz

import (
	"fmt"
	"math/bits"
	"strings"

	"github.com/knhk/sidecar/policy"
)

// index finds the rules that can concern a request without a look at each: for a host, a route and a method it has the set of rules
// that name it, and beside it the set of those that name none. Sets are bits by the rule's number, so the order is kept.
type index struct {
	words   int // of a set with every rule
	host    dimension
	below   map[string]sparse // by what stands after "*."
	labels  int               // most labels of a key of below
	hosts   bool              // a rule names hosts
	route   dimension
	method  dimension
	forbids map[string]sparse // methods of rules that forbid: compared in upper case
}

type dimension struct {
	any  []uint64 // rules that name none
	keys map[string]sparse
}

// sparse is a set of rules without its empty words. One set for each key, whole, would take a megabyte for each thousand keys.
type sparse []block

type block struct {
	word int
	bits uint64
}

func (x *index) init(rules int) {
	x.words = (rules + 63) / 64
	for _, d := range []*dimension{&x.host, &x.route, &x.method} {
		*d = dimension{make([]uint64, x.words), map[string]sparse{}}
	}
	x.below, x.forbids = map[string]sparse{}, map[string]sparse{}
}

// put adds rule i, which is not below any other in the set, to the set of key.
func put(m map[string]sparse, key string, i int) {
	set, word := m[key], i/64
	if len(set) == 0 || set[len(set)-1].word != word {
		set = append(set, block{word, 0})
	}
	set[len(set)-1].bits |= 1 << (i % 64)
	m[key] = set
}

func (x *index) add(i int, r *Rule, fault func(field, format string, args ...any)) {
	for _, d := range []struct {
		*dimension
		names []string
	}{{&x.host, r.Hosts}, {&x.route, r.Routes}, {&x.method, r.Methods}} {
		if len(d.names) == 0 {
			d.any[i/64] |= 1 << (i % 64)
		}
	}
	for j, h := range r.Hosts {
		host, below, bad := hostPattern(h)
		switch {
		case bad != "":
			fault(fmt.Sprintf("hosts[%d]", j), "%s", bad)
		case below:
			put(x.below, host, i)
			x.labels = max(x.labels, strings.Count(host, ".")+1)
		default:
			put(x.host.keys, host, i)
		}
		x.hosts = true
	}
	for j, name := range r.Routes {
		if name == "" {
			fault(fmt.Sprintf("routes[%d]", j), "is empty")
		}
		put(x.route.keys, name, i)
	}
	for j, m := range r.Methods {
		if bad := checkMethod(m); bad != "" {
			fault(fmt.Sprintf("methods[%d]", j), "%s", bad)
		}
		put(x.method.keys, m, i)
		if r.Effect == Forbid {
			put(x.forbids, m, i)
		}
	}
}

// walk goes through the candidates of a request in order.
type walk struct {
	x       *index
	word    int // the next to look at
	bits    uint64
	hosts   []sparse // what is left of each set
	route   sparse
	methods [2]sparse
}

// hostSets is room for index.walk: a host that more than this many keys match is rare.
type hostSets [8]sparse

// walk begins at the first candidate. ok is false if the request has no host that rules can be looked up by.
func (x *index) walk(req *policy.Request, room *hostSets) (w walk, ok bool) {
	w.x, w.hosts = x, room[:0]
	if x.hosts {
		var buf [maxHost]byte
		host, isHost := appendHost(buf[:0], req.Authority)
		if !isHost {
			return w, false
		}
		if set := x.host.keys[string(host)]; set != nil {
			w.hosts = append(w.hosts, set)
		}
		// From the end, no deeper than any pattern: the client chooses how many labels there are.
		for i, n := len(host)-1, 0; i > 0 && n < x.labels; i-- {
			if host[i] != '.' {
				continue
			}
			n++
			if set := x.below[string(host[i+1:])]; set != nil {
				w.hosts = append(w.hosts, set)
			}
		}
	}
	w.route = x.route.keys[req.Route]
	w.methods[0] = x.method.keys[req.Method]
	if len(x.forbids) > 0 && len(req.Method) <= maxMethod {
		var buf [maxMethod]byte
		upper, lower := buf[:len(req.Method)], false
		for i := range len(req.Method) {
			upper[i] = req.Method[i]
			if c := upper[i]; c >= 'a' && c <= 'z' {
				upper[i], lower = c-'a'+'A', true
			}
		}
		if lower {
			w.methods[1] = x.forbids[string(upper)]
		}
	}
	return w, true
}

// next gives the number of the next candidate.
func (w *walk) next() (i int, ok bool) {
	for w.bits == 0 {
		if w.word == w.x.words {
			return 0, false
		}
		at := w.word
		w.word++
		set := w.x.host.any[at]
		for j := range w.hosts {
			set |= w.hosts[j].take(at)
		}
		set &= w.x.route.any[at] | w.route.take(at)
		set &= w.x.method.any[at] | w.methods[0].take(at) | w.methods[1].take(at)
		w.bits = set
	}
	i = (w.word-1)*64 + bits.TrailingZeros64(w.bits)
	w.bits &= w.bits - 1
	return i, true
}

// take removes the word from the front of s, if it is there, and gives it.
func (s *sparse) take(word int) uint64 {
	if len(*s) == 0 || (*s)[0].word != word {
		return 0
	}
	b := (*s)[0].bits
	*s = (*s)[1:]
	return b
}
