package bootstrap

import (
	"errors"
	"fmt"

	mutationv3 "github.com/envoyproxy/go-control-plane/envoy/config/common/mutation_rules/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	extauthzv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_authz/v3"
	headersv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_mutation/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/anypb"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
)

// Words of ext_authz that server/extauthz knows, and of receipts of other Envoys.
const (
	ContextRoute   = "knhk.route"   // context extension of ext_authz: the name of the route, which Envoy does not tell
	ContextCluster = "knhk.cluster" // and that of the cluster it leads to
	ContextBody    = "knhk.body"    // "buffered" where the route is classified by body: the body comes along

	// MetadataAuthz is the dynamic metadata that ext_authz may set: Envoy names it after the filter.
	MetadataAuthz = "envoy.filters.http.ext_authz"
	// HeaderParent carries the receipt id of the Envoy before to the one behind it.
	HeaderParent = "knhk-parent"

	filterAuthz  = "envoy.filters.http.ext_authz"
	filterParent = "knhk.parent" // a header_mutation too; routes configure it by this name

	// classifyBytes of a body say whether it is over the 8 KiB that classify_body reads (policy/class.MaxBody).
	classifyBytes = 8<<10 + 1
)

// authzHeaders are the headers that ext_authz sends us: what a decision reads, and nothing of a client's secrets.
var authzHeaders = []string{":method", ":scheme", ":authority", ":path", "x-request-id", "content-length"}

func usesProc(cfg *configv1.Config) bool {
	return cfg.GetEnvoy().GetFilter() != configv1.Filter_EXT_AUTHZ
}

func usesAuthz(cfg *configv1.Config) bool {
	f := cfg.GetEnvoy().GetFilter()
	return f == configv1.Filter_EXT_AUTHZ || f == configv1.Filter_BOTH
}

// namespaces are the dynamic metadata that can hold the receipt, whoever decides first before the others. Only the filters set them.
func namespaces(cfg *configv1.Config) []string {
	var out []string
	if usesAuthz(cfg) {
		out = append(out, MetadataAuthz)
	}
	if usesProc(cfg) {
		out = append(out, MetadataNamespace)
	}
	return out
}

// deciders are the filters that ask knhk, in the order they stand in: of both, ext_authz decides and ext_proc takes that over.
func deciders(cfg *configv1.Config, sidecar string) ([]*hcmv3.HttpFilter, error) {
	var out []*hcmv3.HttpFilter
	var errs []error
	if usesAuthz(cfg) {
		f, err := authzFilter(cfg, sidecar)
		out, errs = append(out, f), append(errs, err)
	}
	if usesProc(cfg) {
		f, err := processorFilter(cfg, sidecar)
		out, errs = append(out, f), append(errs, err)
	}
	return out, errors.Join(errs...)
}

// authzFilter is ext_authz. Its failure_mode_allow is one for all routes: Envoy knows none per route.
func authzFilter(cfg *configv1.Config, sidecar string) (*hcmv3.HttpFilter, error) {
	e := cfg.GetEnvoy()
	if e.GetShadowMode() && e.GetFilter() != configv1.Filter_EXT_AUTHZ {
		return nil, errors.New("envoy.shadow_mode: only with filter EXT_AUTHZ: ext_proc behind it would enforce")
	}
	if full(cfg) && !usesProc(cfg) {
		return nil, errors.New("envoy.capture: FULL needs ext_proc: with filter EXT_AUTHZ outcomes come from the access log")
	}
	for i, r := range cfg.GetRoutes() {
		if !r.GetPolicy().GetExclude() && allows(r.GetPolicy()) != allows(cfg.GetDefaultRoute()) {
			return nil, fmt.Errorf("routes[%d].policy.on_receipt_failure differs from default_route: ext_authz has one for all routes", i)
		}
	}
	service, err := sidecarService(sidecar)
	if err != nil {
		return nil, fmt.Errorf("filter %s: %w", filterAuthz, err)
	}
	service.Timeout = durationOr(e.GetMessageTimeout(), defaultMessageTimeout)
	// Envoy (1.40) takes the longest back-off for the time of one attempt too, ten times the base interval if nothing is said: 50 ms.
	service.RetryPolicy.RetryBackOff.MaxInterval = service.Timeout
	headers := authzHeaders
	if believesParents(cfg) {
		headers = append(headers[:len(headers):len(headers)], HeaderParent)
	}
	f, err := filter(filterAuthz, &extauthzv3.ExtAuthz{
		Services:            &extauthzv3.ExtAuthz_GrpcService{GrpcService: service},
		TransportApiVersion: corev3.ApiVersion_V3,
		FailureModeAllow:    allows(cfg.GetDefaultRoute()),
		StatusOnError:       &typev3.HttpStatus{Code: typev3.StatusCode_ServiceUnavailable},
		AllowedHeaders:      &matcherv3.ListStringMatcher{Patterns: exact(headers)},
		// As they are: else two of a name come as one, and bytes that are no UTF-8 as others.
		EncodeRawHeaders: true,
		ShadowMode:       e.GetShadowMode(),
	})
	if err != nil {
		return nil, err
	}
	f.Disabled = cfg.GetDefaultRoute().GetExclude()
	return f, nil
}

// authzOverride is what ext_authz does on route r: every route says its name and where it leads.
func authzOverride(cfg *configv1.Config, r *configv1.Route) (*anypb.Any, error) {
	def := cfg.GetDefaultRoute()
	if r.GetPolicy().GetExclude() {
		if def.GetExclude() {
			return nil, nil
		}
		return anypb.New(&extauthzv3.ExtAuthzPerRoute{Override: &extauthzv3.ExtAuthzPerRoute_Disabled{Disabled: true}})
	}
	s := &extauthzv3.CheckSettings{ContextExtensions: map[string]string{ContextRoute: r.GetName(), ContextCluster: r.GetCluster()}}
	if r.GetPolicy().GetClassifyBody() {
		// Partial: a larger body is no error, only not read to its end.
		s.ContextExtensions[ContextBody] = "buffered"
		s.WithRequestBody = &extauthzv3.BufferSettings{MaxRequestBytes: classifyBytes, AllowPartialMessage: true, PackAsBytes: true}
	}
	per, err := anypb.New(&extauthzv3.ExtAuthzPerRoute{Override: &extauthzv3.ExtAuthzPerRoute_CheckSettings{CheckSettings: s}})
	if err != nil || !def.GetExclude() {
		return per, err
	}
	// The filter is off by default: FilterConfig turns it on for this route.
	return anypb.New(&routev3.FilterConfig{Config: per})
}

// believesParents reports whether the parent header may come in at all: only over a listener whose clients show who they are.
func believesParents(cfg *configv1.Config) bool {
	return len(cfg.GetParents()) > 0 && len(cfg.GetEnvoy().GetTls().GetClients()) > 0
}

// parentHeader takes what a client said of a parent off the request, once knhk has heard it; routes to a cluster with send_parent put this
// request's own receipt there. It stands behind the deciding filters, so that it cannot be asked for anything else.
func parentHeader() (*hcmv3.HttpFilter, error) {
	return filter(filterParent, &headersv3.HeaderMutation{Mutations: &headersv3.Mutations{
		RequestMutations: []*mutationv3.HeaderMutation{remove(HeaderParent)}}})
}

// parentOverride puts the receipt into the parent header where r leads to a cluster that is to hear it; nil where not.
func parentOverride(cfg *configv1.Config, r *configv1.Route) (*anypb.Any, error) {
	for _, c := range cfg.GetEnvoy().GetClusters() {
		if c.GetName() == r.GetCluster() && c.GetSendParent() {
			return anypb.New(&headersv3.HeaderMutationPerRoute{Mutations: &headersv3.Mutations{
				RequestMutations: fromMetadata(cfg, HeaderParent, MetadataReceipt)}})
		}
	}
	return nil, nil
}
