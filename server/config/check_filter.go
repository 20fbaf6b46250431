package config

import (
	"fmt"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
	"github.com/knhk/sidecar/crypto/spiffe"
)

// checkFilter judges which filter asks us, and what it cannot do.
func (d *document) checkFilter(c *configv1.Config) {
	e := c.GetEnvoy()
	authz := e.GetFilter() == configv1.Filter_EXT_AUTHZ
	if e.GetShadowMode() && !authz {
		d.fault("needs envoy.filter EXT_AUTHZ: ext_proc has no shadow mode; dry_run does the same for it", "envoy.shadow_mode", "envoy.filter")
	}
	if e.GetCapture() == configv1.Capture_FULL && authz {
		d.fault("FULL needs envoy.filter EXT_PROC or BOTH: ext_authz sees no response", "envoy.capture", "envoy.filter")
	}
	if authz || e.GetFilter() == configv1.Filter_BOTH {
		all := c.GetDefaultRoute().GetOnReceiptFailure()
		for i, r := range c.GetRoutes() {
			if p := r.GetPolicy(); !p.GetExclude() && p.GetOnReceiptFailure() != all {
				path := fmt.Sprintf("routes[%d]", i)
				d.fault(fmt.Sprintf("route %q says %v, default_route says %v: Envoy's ext_authz has one failure_mode_allow for all routes; "+
					"make them the same, or use envoy.filter EXT_PROC", printable(r.GetName()), p.GetOnReceiptFailure(), all),
					path+".policy.on_receipt_failure", path+".policy", path+".name", "envoy.filter")
			}
		}
	}
}

// checkParents wants SPIFFE IDs, or patterns of them.
func (d *document) checkParents(c *configv1.Config) {
	seen := make(map[string]string)
	for i, s := range c.GetParents() {
		path := fmt.Sprintf("parents[%d]", i)
		if _, err := spiffe.ParsePattern(s); err != nil {
			d.fault(err.Error(), path, "parents")
			continue
		}
		if first, dup := seen[s]; dup {
			d.fault(fmt.Sprintf("%q stands in %s already", printable(s), first), path, "parents")
		}
		seen[s] = path
	}
}
