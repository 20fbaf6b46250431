package bootstrap

import (
	"errors"
	"fmt"
	"sort"
	"time"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
)

// defaultRouteTimeout bounds the upstream's answer. It starts when the request has been received and passed on, so our
// budgets, which message_timeout bounds, do not count against it.
const defaultRouteTimeout = 15 * time.Second

// routeConfig returns the routes of cfg that lead to a cluster. Longer prefixes come first, equal ones are an error,
// because the second would never match.
func routeConfig(cfg *configv1.Config) (*routev3.RouteConfiguration, error) {
	clusters := map[string]bool{}
	for _, c := range cfg.GetEnvoy().GetClusters() {
		clusters[c.GetName()] = true
	}
	var errs []error
	var routes []*routev3.Route
	names, prefixes := map[string]bool{}, map[string]string{}
	for i, r := range cfg.GetRoutes() {
		if names[r.GetName()] {
			errs = append(errs, fmt.Errorf("routes[%d]: name %q is taken", i, r.GetName()))
		}
		names[r.GetName()] = true
		if r.GetCluster() == "" {
			continue
		}
		if !clusters[r.GetCluster()] {
			errs = append(errs, fmt.Errorf("routes[%d].cluster: %q is not under envoy.clusters", i, r.GetCluster()))
		}
		if r.GetWebsocket() && r.GetPolicy().GetClassifyBody() {
			// Envoy would wait for the end of a body that has none.
			errs = append(errs, fmt.Errorf("routes[%d]: a websocket route cannot be classified by body", i))
		}
		prefix := orDefault(r.GetPrefix(), "/")
		if other, ok := prefixes[prefix]; ok {
			errs = append(errs, fmt.Errorf("routes[%d].prefix: %q is already taken by route %s", i, prefix, other))
		}
		prefixes[prefix] = r.GetName()
		route, err := oneRoute(cfg, r, prefix)
		if err != nil {
			errs = append(errs, fmt.Errorf("routes[%d]: %w", i, err))
		}
		routes = append(routes, route)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	// Envoy takes the first that matches: whole paths before prefixes, the longer before the shorter.
	sort.SliceStable(routes, func(i, j int) bool {
		a, b := routes[i].GetMatch(), routes[j].GetMatch()
		if (a.GetPath() != "") != (b.GetPath() != "") {
			return a.GetPath() != ""
		}
		return len(a.GetPath())+len(a.GetPrefix()) > len(b.GetPath())+len(b.GetPrefix())
	})
	return &routev3.RouteConfiguration{
		Name: "knhk",
		VirtualHosts: []*routev3.VirtualHost{{
			Name:    "all",
			Domains: []string{"*"},
			Routes:  routes,
		}},
	}, nil
}

func oneRoute(cfg *configv1.Config, r *configv1.Route, prefix string) (*routev3.Route, error) {
	action := &routev3.RouteAction{
		ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: r.GetCluster()},
		Timeout:          durationOr(r.GetTimeout(), defaultRouteTimeout),
	}
	if n := r.GetRetries(); n > 0 {
		// Only where the upstream cannot have begun: a retry must not run a transaction twice.
		action.RetryPolicy = &routev3.RetryPolicy{
			RetryOn:    "connect-failure,refused-stream,reset-before-request",
			NumRetries: wrapperspb.UInt32(n),
			RetryBackOff: &routev3.RetryPolicy_RetryBackOff{
				BaseInterval: durationpb.New(25 * time.Millisecond),
				MaxInterval:  durationpb.New(250 * time.Millisecond),
			},
		}
	}
	if r.GetWebsocket() {
		action.UpgradeConfigs = []*routev3.RouteAction_UpgradeConfig{{UpgradeType: "websocket"}}
	}
	if n := r.GetInternalRedirects(); n > 0 {
		action.InternalRedirectPolicy = &routev3.InternalRedirectPolicy{MaxInternalRedirects: wrapperspb.UInt32(n)}
	}
	overrides := map[string]*anypb.Any{}
	override := func(name string, per *anypb.Any, err error) error {
		if per != nil {
			overrides[name] = per
		}
		return err
	}
	var errs []error
	if usesProc(cfg) {
		per, err := processorOverride(cfg, r.GetPolicy())
		errs = append(errs, override(filterExtProc, per, err))
	}
	if usesAuthz(cfg) {
		per, err := authzOverride(cfg, r)
		errs = append(errs, override(filterAuthz, per, err))
	}
	per, err := parentOverride(cfg, r)
	if err := errors.Join(append(errs, override(filterParent, per, err))...); err != nil {
		return nil, err
	}
	match := &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: prefix}}
	if r.GetPolicy().GetExclude() {
		// The whole path, not a prefix: what follows one (";x", "%3b", "/..;") is read differently by upstreams, and would reach
		// them without a receipt.
		match.PathSpecifier = &routev3.RouteMatch_Path{Path: prefix}
	}
	return &routev3.Route{
		Name:                 r.GetName(),
		Match:                match,
		Action:               &routev3.Route_Route{Route: action},
		TypedPerFilterConfig: overrides,
	}, nil
}

// processorOverride says where a route's policy p differs from default_route, whose settings the filter has; nil if it
// does not.
func processorOverride(cfg *configv1.Config, p *configv1.RoutePolicy) (*anypb.Any, error) {
	def := cfg.GetDefaultRoute()
	if p.GetExclude() {
		if def.GetExclude() {
			return nil, nil
		}
		return anypb.New(&extprocv3.ExtProcPerRoute{Override: &extprocv3.ExtProcPerRoute_Disabled{Disabled: true}})
	}
	o := &extprocv3.ExtProcOverrides{}
	if allows(p) != allows(def) {
		o.FailureModeAllow = wrapperspb.Bool(allows(p))
	}
	if mode := processingMode(cfg, p); !proto.Equal(mode, processingMode(cfg, def)) {
		o.ProcessingMode = mode
	}
	if proto.Size(o) == 0 && !def.GetExclude() {
		return nil, nil
	}
	per, err := anypb.New(&extprocv3.ExtProcPerRoute{Override: &extprocv3.ExtProcPerRoute_Overrides{Overrides: o}})
	if err != nil || !def.GetExclude() {
		return per, err
	}
	// The filter is off by default: FilterConfig turns it on for this route.
	return anypb.New(&routev3.FilterConfig{Config: per})
}
