package config

import (
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
	"github.com/knhk/sidecar/crypto/spiffe"
)

// Parents are the Envoys whose knhk-parent header is believed. The zero value is none.
type Parents struct {
	exact map[string]struct{}
	below []spiffe.Pattern
}

// Match reports whether the header is believed from the client with this SPIFFE ID.
func (p Parents) Match(id string) bool {
	if _, ok := p.exact[id]; ok {
		return true
	}
	if len(p.below) == 0 {
		return false
	}
	parsed, err := spiffeid.FromString(id)
	if err != nil {
		return false
	}
	for _, b := range p.below {
		if b.Match(parsed) {
			return true
		}
	}
	return false
}

func parents(patterns []string) (Parents, error) {
	var out Parents
	for _, s := range patterns {
		p, err := spiffe.ParsePattern(s)
		if err != nil {
			return Parents{}, err
		}
		if strings.HasSuffix(s, "/*") {
			out.below = append(out.below, p)
			continue
		}
		if out.exact == nil {
			out.exact = map[string]struct{}{}
		}
		out.exact[p.String()] = struct{}{}
	}
	return out, nil
}

// dryRun: in shadow mode Envoy lets everything pass, whatever we say.
func dryRun(pb *configv1.Config) bool { return pb.GetDryRun() || pb.GetEnvoy().GetShadowMode() }
