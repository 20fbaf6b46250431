package config

import (
	"fmt"
	"slices"
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
	if len(c.pb.GetAuthzRules()) > 0 {
		var unguarded []string
		for _, r := range c.pb.GetRoutes() {
			if p := c.routes[r.GetName()]; p.Exclude || p.AllowOnFailure {
				unguarded = append(unguarded, r.GetName())
			}
		}
		if c.DefaultRoute.Exclude || c.DefaultRoute.AllowOnFailure {
			unguarded = append(unguarded, "all that are not listed")
		}
		if unguarded != nil {
			notes = append(notes, "authz_rules do not bind routes that exclude takes out, nor those with on_receipt_failure: ALLOW while Envoy gets "+
				"no answer: "+strings.Join(unguarded, ", "))
		}
	}
	notes = append(notes, c.unlistedRoutes()...)
	if len(c.pb.GetParents()) > 0 && len(c.pb.GetEnvoy().GetTls().GetClients()) == 0 {
		notes = append(notes, "parents: the Envoy that `knhk bootstrap` writes removes knhk-parent, because without envoy.tls.clients nobody shows who he is")
	}
	var believed []string
	for _, cl := range c.pb.GetEnvoy().GetClusters() {
		if len(cl.GetSpiffeIds()) == 0 && slices.ContainsFunc(cl.GetEndpoints(), elsewhere) {
			believed = append(believed, cl.GetName())
		}
	}
	if believed != nil {
		notes = append(notes, "envoy.clusters without spiffe_ids are spoken to in the plain, and whoever has their addresses is believed: "+strings.Join(believed, ", "))
	}
	if c.DryRun {
		notes = append(notes, "dry_run: everything passes, whatever is decided")
	}
	return append(notes, c.identityNotes()...)
}

// unlistedRoutes says which rules wait for routes that the configuration does not name. It need not name all of an Envoy whose
// configuration is written by hand, but a rule that forbids and has a slip in the name of its route forbids nothing.
func (c *Config) unlistedRoutes() (notes []string) {
	for _, r := range c.pb.GetAuthzRules() {
		for _, name := range r.GetRoutes() {
			if _, ok := c.routes[name]; !ok {
				notes = append(notes, fmt.Sprintf("authz rule %s is about route %s, which is not under routes: Envoy has to have one of that name", r.GetName(), name))
			}
		}
	}
	return notes
}

// elsewhere reports whether an endpoint, host:port, may be another machine.
func elsewhere(endpoint string) bool {
	addr, err := parseAddress(endpoint)
	return err != nil && !strings.HasPrefix(endpoint, "localhost:") || err == nil && !addr.loopback()
}
