package spiffe

import (
	"fmt"
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
