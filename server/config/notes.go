package config

import (
	"fmt"
	"strings"

	"github.com/knhk/sidecar/crypto/keys"
)

// Notes says what is right but worth knowing, for `knhk check`.
func (c *Config) Notes() []string {
	var notes []string
	if strings.HasPrefix(c.Keys.Identity.URI, "soft:") || strings.HasPrefix(c.Keys.Daily.URI, "soft:") {
		notes = append(notes, "keys live in software: for development only")
	}
	if c.Keys.Identity.Algorithm != keys.Ed25519 {
		notes = append(notes, fmt.Sprintf("keys.identity is %s: torchwood, litewitness and x/mod's note verifier read Ed25519 only", c.Keys.Identity.Algorithm))
	}
	if c.DryRun {
		notes = append(notes, "dry_run: everything passes, whatever is decided")
	}
	return notes
}
