package spiffe

import (
	"fmt"
	"iter"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Pattern stands for one SPIFFE ID, or for every ID below a path of a trust domain. The zero Pattern matches nothing.
type Pattern struct {
	id    spiffeid.ID
	below bool
}

// ParsePattern reads "spiffe://domain/path", or "spiffe://domain/path/*" for every ID below a path ("spiffe://domain/*" for all that
// have one). A "*" anywhere else is an error, as is what the SPIFFE ID specification forbids.
func ParsePattern(s string) (Pattern, error) {
	text, below := strings.CutSuffix(s, "/*")
	if strings.Contains(text, "*") {
		return Pattern{}, fmt.Errorf("spiffe id %q: \"*\" may only stand at the end, after a slash", s)
	}
	id, err := spiffeid.FromString(text)
	if err != nil {
		return Pattern{}, fmt.Errorf("spiffe id %q: %w", s, err)
	}
	if !below && id.Path() == "" {
		return Pattern{}, fmt.Errorf("spiffe id %q: names a trust domain, not a workload; %q means all of them", s, s+"/*")
	}
	return Pattern{id, below}, nil
}

// Match reports whether id is meant.
func (p Pattern) Match(id spiffeid.ID) bool {
	if p.id.IsZero() {
		return false
	}
	if !p.below {
		return id == p.id
	}
	return id.TrustDomain() == p.id.TrustDomain() && strings.HasPrefix(id.Path(), p.id.Path()+"/")
}

// TrustDomain is that of the IDs which are meant.
func (p Pattern) TrustDomain() spiffeid.TrustDomain { return p.id.TrustDomain() }

// String gives the pattern as ParsePattern reads it.
func (p Pattern) String() string {
	if p.below {
		return p.id.String() + "/*"
	}
	return p.id.String()
}

// Index holds a value for each of many patterns. To find those that match an ID takes a look at each level of its path, however many there
// are. The zero Index is empty. It may be read by many at once, but not while it is changed.
type Index[V any] struct {
	exact map[string]V // by ID
	below map[string]V // by pattern without its "/*"
}

// Update replaces the value of p, the zero V if it has none yet, by what next makes of it. The zero Pattern matches nothing and is not kept.
func (x *Index[V]) Update(p Pattern, next func(V) V) {
	if p.id.IsZero() {
		return
	}
	m := &x.exact
	if p.below {
		m = &x.below
	}
	if *m == nil {
		*m = map[string]V{}
	}
	(*m)[p.id.String()] = next((*m)[p.id.String()])
}

// Match gives the values of the patterns that match id.
func (x *Index[V]) Match(id spiffeid.ID) iter.Seq[V] {
	return func(yield func(V) bool) {
		if id.IsZero() {
			return
		}
		text := id.String()
		if v, ok := x.exact[text]; ok && !yield(v) {
			return
		}
		for range strings.Count(id.Path(), "/") {
			text = text[:strings.LastIndexByte(text, '/')]
			if v, ok := x.below[text]; ok && !yield(v) {
				return
			}
		}
	}
}
