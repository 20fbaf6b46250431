package bootstrap

import (
	"fmt"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	previousv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/retry/host/previous_hosts/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
)

// retryBackOff is the base interval between attempts to open a stream. Without one a dying replica stalls requests, and
// without previous_hosts the retry goes to the same one.
const retryBackOff = 5 * time.Millisecond

// requestAttributes are what a decision knows besides headers. Never xds.node: it holds the whole node.
var requestAttributes = []string{
	"xds.route_name", "xds.cluster_name", "source.address", "connection.uri_san_peer_certificate",
}

// responseAttributes are what full capture learns of an outcome. request.* and response.* sizes are not there: they are
// not final before the end, the access log has them.
var responseAttributes = []string{
	"xds.cluster_name", "upstream.address", "upstream.request_attempt_count",
	"response.code", "response.code_details", "response.flags",
}

// forwardedHeaders are the headers that ext_proc sends us, of requests and of responses: fewer headers, less to encode,
// less to decode, and nothing of a client's secrets leaves Envoy.
var forwardedHeaders = []string{
	":method", ":scheme", ":authority", ":path", ":status",
	"x-request-id", "content-length", "content-type", "cache-status", "x-cache", "age",
}

// processorFilter is ext_proc with the settings of default_route; routes that differ carry overrides.
func processorFilter(cfg *configv1.Config, sidecar string) (*hcmv3.HttpFilter, error) {
	service, err := sidecarService(sidecar)
	if err != nil {
		return nil, fmt.Errorf("filter %s: %w", filterExtProc, err)
	}
	service.Timeout = durationpb.New(0) // the stream lives as long as the request
	headers := forwardedHeaders
	if believesParents(cfg) {
		headers = append(headers[:len(headers):len(headers)], HeaderParent)
	}
	p := &extprocv3.ExternalProcessor{
		GrpcService:      service,
		FailureModeAllow: allows(cfg.GetDefaultRoute()),
		MessageTimeout:   durationOr(cfg.GetEnvoy().GetMessageTimeout(), defaultMessageTimeout),
		StatusOnError:    &typev3.HttpStatus{Code: typev3.StatusCode_ServiceUnavailable},
		ProcessingMode:   processingMode(cfg, cfg.GetDefaultRoute()),
		ForwardRules: &extprocv3.HeaderForwardingRules{AllowedHeaders: &matcherv3.ListStringMatcher{
			Patterns: exact(headers)}},
		RequestAttributes: requestAttributes,
		MetadataOptions: &extprocv3.MetadataOptions{ReceivingNamespaces: &extprocv3.MetadataOptions_MetadataNamespaces{
			Untyped: []string{MetadataNamespace}}},
		// We never change a body, so its length stays true; without this a buffered body would go on chunked.
		AllowContentLengthHeader: true,
		// Nothing of ours is a routing input: a route chosen once stays the route that was decided about.
		RouteCacheAction: extprocv3.ExternalProcessor_RETAIN,
	}
	if usesAuthz(cfg) {
		// What ext_authz decided is decided: the receipt goes along.
		p.MetadataOptions.ForwardingNamespaces = &extprocv3.MetadataOptions_MetadataNamespaces{Untyped: []string{MetadataAuthz}}
	}
	if full(cfg) {
		p.ResponseAttributes = responseAttributes
	}
	f, err := filter(filterExtProc, p)
	if err != nil {
		return nil, err
	}
	f.Disabled = cfg.GetDefaultRoute().GetExclude()
	return f, nil
}

// sidecarService is how a filter calls knhk: with retries on another replica, so that one that leaves loses no request. The timeout is the
// filter's.
func sidecarService(sidecar string) (*corev3.GrpcService, error) {
	previous, err := anypb.New(&previousv3.PreviousHostsPredicate{})
	if err != nil {
		return nil, err
	}
	return &corev3.GrpcService{
		TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{
			ClusterName: sidecar, SkipEnvoyHeaders: true}},
		// Here, not in EnvoyGrpc: that one is for xDS streams alone and does nothing for a filter.
		RetryPolicy: &corev3.RetryPolicy{
			RetryOn:      "connect-failure,refused-stream,unavailable,reset-before-request",
			NumRetries:   wrapperspb.UInt32(3),
			RetryBackOff: &corev3.BackoffStrategy{BaseInterval: durationpb.New(retryBackOff)},
			RetryHostPredicate: []*corev3.RetryPolicy_RetryHostPredicate{{
				Name:       "envoy.retry_host_predicates.previous_hosts",
				ConfigType: &corev3.RetryPolicy_RetryHostPredicate_TypedConfig{TypedConfig: previous},
			}},
			HostSelectionRetryMaxAttempts: 3,
		},
	}, nil
}

// processingMode says what ext_proc sends for a route with this policy. Lean: the request headers, nothing else. Full:
// response headers and trailers too; waiting for trailers is what keeps the stream open until the end of the response,
// whose way of ending is then seen. Classified by body: the body as far as the buffer limit holds it, in one piece
// (BUFFERED would answer 413 to a larger one), and the trailers: a request of headers and trailers alone has no body
// message, and would go on without a decision if nothing came after its headers.
func processingMode(cfg *configv1.Config, p *configv1.RoutePolicy) *extprocv3.ProcessingMode {
	m := &extprocv3.ProcessingMode{
		RequestHeaderMode:   extprocv3.ProcessingMode_SEND,
		ResponseHeaderMode:  extprocv3.ProcessingMode_SKIP,
		RequestBodyMode:     extprocv3.ProcessingMode_NONE,
		ResponseBodyMode:    extprocv3.ProcessingMode_NONE,
		RequestTrailerMode:  extprocv3.ProcessingMode_SKIP,
		ResponseTrailerMode: extprocv3.ProcessingMode_SKIP,
	}
	if full(cfg) {
		m.ResponseHeaderMode = extprocv3.ProcessingMode_SEND
		m.ResponseTrailerMode = extprocv3.ProcessingMode_SEND
	}
	if p.GetClassifyBody() {
		m.RequestBodyMode = extprocv3.ProcessingMode_BUFFERED_PARTIAL
		m.RequestTrailerMode = extprocv3.ProcessingMode_SEND
	}
	return m
}

func full(cfg *configv1.Config) bool { return cfg.GetEnvoy().GetCapture() == configv1.Capture_FULL }

func allows(p *configv1.RoutePolicy) bool {
	return p.GetOnReceiptFailure() == configv1.OnReceiptFailure_ALLOW
}

func exact(names []string) []*matcherv3.StringMatcher {
	out := make([]*matcherv3.StringMatcher, len(names))
	for i, n := range names {
		out[i] = &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: n}}
	}
	return out
}
