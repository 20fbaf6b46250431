package config

import (
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
	"github.com/knhk/sidecar/server/access"
)

// checkIdentity judges who knhk is, and who may do what.
func (d *document) checkIdentity(c *configv1.Config) {
	if id := c.GetIdentity(); id != nil {
		own, err := workloadID(id.GetSpiffeId())
		if err != nil && id.GetSpiffeId() != "" { // an empty one is told by the constraints
			d.fault(err.Error(), "identity.spiffe_id")
		}
		switch api, files := id.GetWorkloadApi(), id.GetFiles(); {
		case api == "" && files == nil:
			d.fault("says nowhere where the certificate comes from: give workload_api or files", "identity")
		case api != "" && files != nil:
			d.fault("cannot stand beside identity.workload_api: the certificate comes from one of the two", "identity.files", "identity.workload_api")
		case files != nil:
			d.checkTLSFiles(files, own.TrustDomain(), "identity.files")
		default:
			if addr, err := parseAddress(api); err != nil || addr.Network != "unix" {
				d.fault(fmt.Sprintf("%q is no socket: want unix:/path", printable(api)), "identity.workload_api")
			}
		}
		if c.GetInsecureLoopback() {
			d.fault("cannot stand beside identity: whoever has a certificate and whoever has none cannot both be believed",
				"insecure_loopback", "identity")
		}
	}
	for path, names := range principals(c.GetRoles()) {
		for i, name := range names {
			if _, err := access.ParsePrincipal(name); err != nil {
				d.fault(err.Error(), fmt.Sprintf("%s[%d]", path, i))
			}
		}
	}
}

// checkTLSFiles judges the names of federated trust domains; own is the zero TrustDomain if it is not known.
func (d *document) checkTLSFiles(f *configv1.TLSFiles, own spiffeid.TrustDomain, path string) {
	names := make(map[string]string)
	for i, b := range f.GetFederated() {
		at := fmt.Sprintf("%s.federated[%d].trust_domain", path, i)
		if b.GetTrustDomain() == "" {
			continue // told by the constraints
		}
		td, err := spiffeid.TrustDomainFromString(b.GetTrustDomain())
		switch {
		case err != nil || td.Name() != b.GetTrustDomain():
			d.fault(fmt.Sprintf("%q is not the name of a trust domain, such as partner.example", printable(b.GetTrustDomain())), at)
		case td == own:
			d.fault(fmt.Sprintf("%s is the own trust domain: its authorities are in %s.ca", td, path), at)
		default:
			d.unique(names, td.Name(), at, at)
		}
	}
}

// checkReachable wants TLS, or a word that nobody is to be asked who he is, on a TCP listener of knhk itself.
func (d *document) checkReachable(c *configv1.Config, addr Address, path string) {
	if addr.Network == "unix" || c.GetIdentity() != nil || addr.loopback() && c.GetInsecureLoopback() {
		return
	}
	who := "every process of this machine would be believed"
	if !addr.loopback() {
		who = "it can be reached from other machines, and whoever connects would be believed"
	}
	d.fault(fmt.Sprintf("%s has no TLS: %s; set identity, or use unix:/path, or, for development, a loopback address with "+
		"insecure_loopback: true", addr, who), path)
}

// workloadID reads the SPIFFE ID of a workload: one with a path.
func workloadID(s string) (spiffeid.ID, error) {
	id, err := spiffeid.FromString(s)
	switch {
	case err != nil:
		return id, fmt.Errorf("%q is no SPIFFE ID: %w: want spiffe://domain/path", printable(s), err)
	case id.Path() == "":
		return id, fmt.Errorf("%q names a trust domain, not a workload: want spiffe://domain/path", printable(s))
	}
	return id, nil
}

// principals are the lists of roles, by their paths in knhk.yaml.
func principals(r *configv1.Roles) map[string][]string {
	return map[string][]string{
		"roles.envoy": r.GetEnvoy(), "roles.operator": r.GetOperator(), "roles.auditor": r.GetAuditor(), "roles.peer": r.GetPeer(),
	}
}

// buildIdentity fills in what checkIdentity has judged.
func (c *Config) buildIdentity(pb *configv1.Config) error {
	c.InsecureLoopback = pb.GetInsecureLoopback()
	if id := pb.GetIdentity(); id != nil {
		own, err := workloadID(id.GetSpiffeId())
		if err != nil {
			return fmt.Errorf("config: %w", err)
		}
		c.Identity = Identity{ID: own, WorkloadAPI: id.GetWorkloadApi(), SVIDTTL: id.GetSvidTtl().AsDuration()}
		if f := id.GetFiles(); f != nil {
			c.Identity.Files = &TLSFiles{Certificate: f.GetCertificate(), Key: f.GetKey(), CA: f.GetCa(), Federated: map[spiffeid.TrustDomain]string{}}
			for _, b := range f.GetFederated() {
				td, err := spiffeid.TrustDomainFromString(b.GetTrustDomain())
				if err != nil {
					return fmt.Errorf("config: %w", err)
				}
				c.Identity.Files.Federated[td] = b.GetCa()
			}
		}
	}
	c.Roles = make(map[access.Role][]access.Principal)
	lists := principals(pb.GetRoles())
	for _, role := range access.Roles {
		for _, name := range lists["roles."+role.Name] {
			p, err := access.ParsePrincipal(name)
			if err != nil {
				return fmt.Errorf("config: %w", err)
			}
			c.Roles[role.Role] = append(c.Roles[role.Role], p)
		}
	}
	return nil
}

// identityNotes says which roles nobody has where they count.
func (c *Config) identityNotes() []string {
	if c.InsecureLoopback {
		notes := []string{"insecure_loopback: every process of this machine may have receipts written and read them all: for development only"}
		if len(c.Roles) > 0 {
			notes = append(notes, "roles count on unix sockets only: insecure_loopback gives every role to whoever connects over TCP")
		}
		return notes
	}
	var notes []string
	for _, l := range []struct {
		role access.Role
		name string
		addr Address
	}{
		{access.Envoy, "envoy", c.Listeners.Envoy}, {access.Operator, "admin", c.Listeners.Admin},
		{access.Auditor, "admin", c.Listeners.Admin}, {access.Peer, "tiles", c.Listeners.Tiles},
	} {
		if l.addr.IsZero() {
			continue
		}
		users := l.addr.Network == "unix"
		some := false
		for _, p := range c.Roles[l.role] {
			some = some || p.User() == users
		}
		switch {
		case some:
		case users && len(c.Roles[l.role]) > 0:
			notes = append(notes, fmt.Sprintf("nobody has role %s but root and the own user: listeners.%s is a unix socket, where only uid:N counts", l.role, l.name))
		case users:
			notes = append(notes, fmt.Sprintf("nobody has role %s but root and the own user", l.role))
		case len(c.Roles[l.role]) > 0:
			notes = append(notes, fmt.Sprintf("nobody has role %s: listeners.%s has TLS, where only SPIFFE IDs count", l.role, l.name))
		default:
			notes = append(notes, fmt.Sprintf("nobody has role %s", l.role))
		}
	}
	if e := c.pb.GetEnvoy(); c.Listeners.Envoy.Network != "unix" && !c.Identity.ID.IsZero() && e.GetTls() == nil && len(e.GetClusters()) > 0 {
		notes = append(notes, "envoy.tls is not there: knhk bootstrap writes no Envoy that could prove to this knhk who it is")
	}
	return append(notes, c.strangeDomains()...)
}

// strangeDomains says which principals nobody can be, since no authority of their trust domain is there to vouch for them. What a Workload
// API gives is not known here.
func (c *Config) strangeDomains() (notes []string) {
	files := c.Identity.Files
	if files == nil {
		return nil
	}
	for _, role := range access.Roles {
		for _, p := range c.Roles[role.Role] {
			td, ok := p.TrustDomain()
			if _, federated := files.Federated[td]; ok && td != c.Identity.ID.TrustDomain() && !federated {
				notes = append(notes, fmt.Sprintf("nobody can be %s, of role %s: identity.files.federated has no authority of %s", p, role.Name, td))
			}
		}
	}
	return notes
}
