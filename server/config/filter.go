package config

import (
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
	"github.com/knhk/sidecar/crypto/spiffe"
)

// Parents are the Envoys whose knhk-parent header is believed. The zero value is none.
type Parents struct{ ids spiffe.Index[struct{}] }

// Match reports whether the header is believed from the client with this SPIFFE ID.
func (p Parents) Match(id string) bool {
	parsed, err := spiffeid.FromString(id)
	if err != nil {
		return false
	}
	for range p.ids.Match(parsed) {
		return true
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
		out.ids.Update(p, func(struct{}) struct{} { return struct{}{} })
	}
	return out, nil
}

// dryRun: in shadow mode Envoy lets everything pass, whatever we say.
func dryRun(pb *configv1.Config) bool { return pb.GetDryRun() || pb.GetEnvoy().GetShadowMode() }
