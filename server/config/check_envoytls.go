package config

import (
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
	"github.com/knhk/sidecar/crypto/spiffe"
)

// setEnvoyTLS gives Envoy the SDS server that knhk has its own certificate from, unless it is told another place.
func setEnvoyTLS(c *configv1.Config) {
	if t := c.GetEnvoy().GetTls(); t != nil && t.GetFiles() == nil {
		setString(&t.Sds, c.GetIdentity().GetWorkloadApi())
	}
}

// checkEnvoyTLS judges who the generated Envoy is, and whom it believes.
func (d *document) checkEnvoyTLS(c *configv1.Config) {
	t := c.GetEnvoy().GetTls()
	for i, cl := range c.GetEnvoy().GetClusters() {
		path := fmt.Sprintf("envoy.clusters[%d]", i)
		if t == nil && len(cl.GetSpiffeIds()) > 0 {
			d.fault("needs envoy.tls: mutual TLS needs to know who Envoy is", path+".spiffe_ids")
		}
		if cl.GetSendParent() && len(cl.GetSpiffeIds()) == 0 {
			d.fault("needs spiffe_ids: the knhk there believes the header only if Envoy shows its certificate, and nobody else should hear it",
				path+".send_parent")
		}
	}
	if t == nil {
		return
	}
	own, err := workloadID(t.GetSpiffeId())
	if err != nil && t.GetSpiffeId() != "" { // an empty one is told by the constraints
		d.fault(err.Error(), "envoy.tls.spiffe_id")
	}
	switch files := t.GetFiles(); {
	case files != nil && t.GetSds() != "":
		d.fault("cannot stand beside envoy.tls.files: the certificate comes from one of the two", "envoy.tls.sds", "envoy.tls.files")
	case files != nil:
		d.checkTLSFiles(files, own.TrustDomain(), "envoy.tls.files")
	case t.GetSds() == "":
		d.fault("says nowhere where the certificate comes from: give sds or files", "envoy.tls")
	default:
		if addr, err := parseAddress(t.GetSds()); err != nil || addr.Network != "unix" {
			d.fault(fmt.Sprintf("%q is no socket: want unix:/path", printable(t.GetSds())), "envoy.tls.sds")
		}
	}
	d.checkTrusted(t, own, t.GetClients(), "envoy.tls.clients")
	for i, cl := range c.GetEnvoy().GetClusters() {
		d.checkTrusted(t, own, cl.GetSpiffeIds(), fmt.Sprintf("envoy.clusters[%d].spiffe_ids", i))
	}
	if addr, err := parseAddress(c.GetEnvoy().GetListener()); err == nil && len(t.GetClients()) == 0 && !addr.loopback() {
		d.fault(fmt.Sprintf("%s can be reached from other machines, and without envoy.tls.clients it is plain HTTP that speaks to others with "+
			"Envoy's certificate: name the clients, or use a loopback address", addr), "envoy.listener", "envoy.tls.clients", "envoy.tls")
	}
	d.checkEnvoyRole(c, own)
}

// checkEnvoyRole wants Envoy to be let in where it shows its certificate, and to be able to check that of knhk.
func (d *document) checkEnvoyRole(c *configv1.Config, envoy spiffeid.ID) {
	addr, err := parseAddress(c.GetListeners().GetEnvoy())
	if err != nil || addr.Network == "unix" || c.GetIdentity() == nil || envoy.IsZero() {
		return // told elsewhere, or the kernel says who is there
	}
	t := c.GetEnvoy().GetTls()
	if td, ok := trustDomain(c.GetIdentity().GetSpiffeId()); ok && !hasAuthorities(t, envoy, td) {
		d.fault(fmt.Sprintf("lack the authorities of trust domain %s, which identity.spiffe_id is of: Envoy could not know this knhk", td),
			"envoy.tls.files")
	}
	for i, s := range c.GetRoles().GetEnvoy() {
		if d.isBad(fmt.Sprintf("roles.envoy[%d]", i)) {
			return
		}
		if p, err := spiffe.ParsePattern(s); err == nil && p.Match(envoy) {
			return
		}
	}
	d.fault(fmt.Sprintf("%s does not have role envoy: this knhk would refuse the Envoy that `knhk bootstrap` writes; add it to roles.envoy", envoy),
		"envoy.tls.spiffe_id", "roles.envoy")
}

// checkTrusted judges SPIFFE IDs whose certificates Envoy, which is own, is to accept.
func (d *document) checkTrusted(t *configv1.EnvoyTLS, own spiffeid.ID, ids []string, path string) {
	for i, s := range ids {
		at := fmt.Sprintf("%s[%d]", path, i)
		if _, err := spiffe.ParsePattern(s); err != nil {
			d.fault(err.Error(), at)
		} else if td, ok := trustDomain(s); ok && !hasAuthorities(t, own, td) {
			d.fault(fmt.Sprintf("envoy.tls.files has no authorities of trust domain %s: name them under federated", td), at)
		}
	}
}

// hasAuthorities reports whether Envoy can check certificates of td. What an SDS server knows cannot be told here.
func hasAuthorities(t *configv1.EnvoyTLS, own spiffeid.ID, td spiffeid.TrustDomain) bool {
	if t.GetFiles() == nil || own.IsZero() || td == own.TrustDomain() {
		return true
	}
	for _, f := range t.GetFiles().GetFederated() {
		if f.GetTrustDomain() == td.Name() {
			return true
		}
	}
	return false
}

// trustDomain returns the trust domain of a SPIFFE ID or pattern.
func trustDomain(s string) (spiffeid.TrustDomain, bool) {
	id, err := spiffeid.FromString(strings.TrimSuffix(s, "/*"))
	return id.TrustDomain(), err == nil
}
