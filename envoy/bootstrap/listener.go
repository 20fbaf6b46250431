package bootstrap

import (
	"errors"
	"fmt"
	"slices"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	alsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/grpc/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
)

const (
	defaultMessageTimeout = 2 * time.Second
	defaultAccessLogFlush = 200 * time.Millisecond
	streamIdleTimeout     = 5 * time.Minute
	connectionIdle        = time.Hour
	requestHeadersTimeout = 10 * time.Second
	maxHeadersKiB         = 60
	maxHeaders            = 100
	accessLogBuffer       = 16 << 10 // bytes; what an Envoy that dies takes along is at most this or one flush interval

	filterHeaders = "envoy.filters.http.header_mutation"
	filterExtProc = "envoy.filters.http.ext_proc"
	filterRouter  = "envoy.filters.http.router"
)

// Listener returns the listener for cfg, with ext_proc and access log sent to the cluster named sidecar; with several
// envoy.replicas, the access log also to the clusters of each (see Bootstrap). Faults of cfg are reported all at once.
func Listener(cfg *configv1.Config, sidecar string) (*listenerv3.Listener, error) {
	var errs []error
	addr, err := tcpAddress(orDefault(cfg.GetEnvoy().GetListener(), defaultListener))
	if err != nil {
		errs = append(errs, fmt.Errorf("envoy.listener: %w", err))
	}
	hcm, err := connectionManager(cfg, sidecar)
	if err != nil {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	packed, err := anypb.New(hcm)
	if err != nil {
		return nil, fmt.Errorf("connection manager: %w", err)
	}
	secure, err := downstreamTLS(cfg)
	if err != nil {
		return nil, err
	}
	return &listenerv3.Listener{
		Name:                          ListenerName,
		Address:                       addr,
		PerConnectionBufferLimitBytes: wrapperspb.UInt32(bufferLimit),
		FilterChains: []*listenerv3.FilterChain{{TransportSocket: secure, Filters: []*listenerv3.Filter{{
			Name:       "envoy.filters.network.http_connection_manager",
			ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: packed},
		}}}},
	}, nil
}

func connectionManager(cfg *configv1.Config, sidecar string) (*hcmv3.HttpConnectionManager, error) {
	routes, rerr := routeConfig(cfg)
	strip, serr := stripRequest(cfg)
	headers, herr := receiptHeaders(cfg)
	deciding, perr := deciders(cfg, sidecar)
	parent, aerr := parentHeader()
	router, oerr := filter(filterRouter, &routerv3.Router{})
	logs, lerr := accessLogs(cfg, sidecar)
	if err := errors.Join(rerr, serr, herr, perr, aerr, oerr, lerr); err != nil {
		return nil, err
	}
	hcm := &hcmv3.HttpConnectionManager{
		StatPrefix:                    "knhk",
		CodecType:                     hcmv3.HttpConnectionManager_AUTO,
		ServerName:                    "knhk",
		RouteSpecifier:                &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: routes},
		EarlyHeaderMutationExtensions: []*corev3.TypedExtensionConfig{strip},
		// The order matters: encoder filters run from the last to the first, so headers sees what the deciding filters and the upstream
		// left, local replies included.
		HttpFilters: slices.Concat([]*hcmv3.HttpFilter{headers}, deciding, []*hcmv3.HttpFilter{parent, router}),
		// But for those that go past the filters.
		LocalReplyConfig: localReplies(cfg),
		AccessLog:        logs,
		// Nobody is internal: a client on a private address is a client, whose x-request-id and x-envoy-* are its own claims.
		// An empty list would mean Envoy's default, all private addresses; the broadcast address is nobody's source.
		UseRemoteAddress: wrapperspb.Bool(true),
		InternalAddressConfig: &hcmv3.HttpConnectionManager_InternalAddressConfig{
			CidrRanges: []*corev3.CidrRange{{AddressPrefix: "255.255.255.255", PrefixLen: wrapperspb.UInt32(32)}},
		},
		GenerateRequestId:         wrapperspb.Bool(true),
		PreserveExternalRequestId: false,
		// One spelling of a path: what we classify is what the route matched and the upstream gets.
		NormalizePath:                wrapperspb.Bool(true),
		MergeSlashes:                 true,
		PathWithEscapedSlashesAction: hcmv3.HttpConnectionManager_REJECT_REQUEST,
		CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{
			IdleTimeout:                  durationpb.New(connectionIdle),
			HeadersWithUnderscoresAction: corev3.HttpProtocolOptions_REJECT_REQUEST,
			MaxHeadersCount:              wrapperspb.UInt32(maxHeaders),
		},
		HttpProtocolOptions: &corev3.Http1ProtocolOptions{EnableTrailers: true},
		Http2ProtocolOptions: &corev3.Http2ProtocolOptions{
			MaxConcurrentStreams:        wrapperspb.UInt32(100),
			InitialStreamWindowSize:     wrapperspb.UInt32(64 << 10),
			InitialConnectionWindowSize: wrapperspb.UInt32(1 << 20),
		},
		MaxRequestHeadersKb:   wrapperspb.UInt32(maxHeadersKiB),
		RequestHeadersTimeout: durationpb.New(requestHeadersTimeout),
		// A stream may be long (gRPC, websocket, uploads) but not silent; so no request_timeout, which would bound its length.
		StreamIdleTimeout: durationpb.New(streamIdleTimeout),
	}
	if cfg.GetEnvoy().GetTls() == nil {
		return hcm, nil
	}
	connection, drain, stream := lifetimes(cfg)
	// On a plain listener too: a stream keeps the connections to knhk and to the upstream open.
	hcm.CommonHttpProtocolOptions.MaxStreamDuration = durationpb.New(stream)
	if len(cfg.GetEnvoy().GetTls().GetClients()) > 0 {
		hcm.CommonHttpProtocolOptions.MaxConnectionDuration = durationpb.New(connection)
		hcm.DrainTimeout = durationpb.New(drain)
		// The client's ID as the handshake showed it, in the place of whatever the client says of itself. A plain listener removes
		// the header: that is Envoy's default.
		hcm.ForwardClientCertDetails = hcmv3.HttpConnectionManager_SANITIZE_SET
		hcm.SetCurrentClientCertDetails = &hcmv3.HttpConnectionManager_SetCurrentClientCertDetails{Uri: true}
	}
	return hcm, nil
}

// accessLogs send each finished stream to knhk: in lean capture it is where outcomes come from, in both it is the audit
// of completeness. An access log stream lives as long as its connection while every request may be decided by another
// replica: with several, each has a log of its own, which holds the entries whose receipt id ends in its instance, and what
// nobody decided goes to any of them. So each entry is still sent once.
func accessLogs(cfg *configv1.Config, sidecar string) ([]*accesslogv3.AccessLog, error) {
	all := replicas(cfg)
	if all == nil {
		log, err := accessLog(cfg, sidecar, nil)
		return []*accesslogv3.AccessLog{log}, err
	}
	var out []*accesslogv3.AccessLog
	var errs []error
	for _, r := range all {
		log, err := accessLog(cfg, replicaCluster(sidecar, r.GetInstance()), receiptFilter(cfg, &matcherv3.ValueMatcher{
			MatchPattern: &matcherv3.ValueMatcher_StringMatch{StringMatch: &matcherv3.StringMatcher{
				MatchPattern: &matcherv3.StringMatcher_Suffix{Suffix: "." + r.GetInstance()}}}}))
		out, errs = append(out, log), append(errs, err)
	}
	var none []*accesslogv3.AccessLogFilter
	for _, ns := range namespaces(cfg) {
		none = append(none, noReceipt(ns))
	}
	rest, err := accessLog(cfg, sidecar, allOf(none))
	return append(out, rest), errors.Join(append(errs, err)...)
}

// receiptFilter passes exchanges whose receipt id matches: the id in the first namespace that has one.
func receiptFilter(cfg *configv1.Config, id *matcherv3.ValueMatcher) *accesslogv3.AccessLogFilter {
	var any, before []*accesslogv3.AccessLogFilter
	for _, ns := range namespaces(cfg) {
		any = append(any, allOf(append(before[:len(before):len(before)], metadataFilter(ns, id, false))))
		before = append(before, noReceipt(ns))
	}
	if len(any) == 1 {
		return any[0]
	}
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_OrFilter{
		OrFilter: &accesslogv3.OrFilter{Filters: any}}}
}

// noReceipt passes exchanges without an id in a namespace: one that is there is never null.
func noReceipt(ns string) *accesslogv3.AccessLogFilter {
	return metadataFilter(ns, &matcherv3.ValueMatcher{
		MatchPattern: &matcherv3.ValueMatcher_NullMatch_{NullMatch: &matcherv3.ValueMatcher_NullMatch{}}}, true)
}

// metadataFilter passes exchanges whose receipt id in a namespace matches; none says whether those without an id pass.
func metadataFilter(ns string, id *matcherv3.ValueMatcher, none bool) *accesslogv3.AccessLogFilter {
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_MetadataFilter{
		MetadataFilter: &accesslogv3.MetadataFilter{
			Matcher: &matcherv3.MetadataMatcher{
				Filter: ns,
				Path: []*matcherv3.MetadataMatcher_PathSegment{{
					Segment: &matcherv3.MetadataMatcher_PathSegment_Key{Key: MetadataReceipt}}},
				Value: id,
			},
			MatchIfKeyNotFound: wrapperspb.Bool(none),
		}}}
}

func allOf(filters []*accesslogv3.AccessLogFilter) *accesslogv3.AccessLogFilter {
	if len(filters) == 1 {
		return filters[0]
	}
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_AndFilter{
		AndFilter: &accesslogv3.AndFilter{Filters: filters}}}
}

// accessLog sends the entries that pass the filter (nil: all) to a cluster. Dynamic metadata, request id, route, cluster, flags
// and sizes are in the common properties.
func accessLog(cfg *configv1.Config, to string, pass *accesslogv3.AccessLogFilter) (*accesslogv3.AccessLog, error) {
	packed, err := anypb.New(&alsv3.HttpGrpcAccessLogConfig{
		CommonConfig: &alsv3.CommonGrpcAccessLogConfig{
			LogName:             LogName,
			TransportApiVersion: corev3.ApiVersion_V3,
			GrpcService: &corev3.GrpcService{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{
				EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: to}}},
			BufferFlushInterval: durationOr(cfg.GetEnvoy().GetAccessLogFlush(), defaultAccessLogFlush),
			BufferSizeBytes:     wrapperspb.UInt32(accessLogBuffer),
		},
		// Whether a cache answered: Cache-Status (RFC 9211), else what older caches say.
		AdditionalResponseHeadersToLog: []string{"cache-status", "x-cache", "age"},
	})
	if err != nil {
		return nil, fmt.Errorf("access log: %w", err)
	}
	return &accesslogv3.AccessLog{
		Name:       "envoy.access_loggers.http_grpc",
		Filter:     pass,
		ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: packed},
	}, nil
}

func filter(name string, m proto.Message) (*hcmv3.HttpFilter, error) {
	packed, err := anypb.New(m)
	if err != nil {
		return nil, fmt.Errorf("filter %s: %w", name, err)
	}
	return &hcmv3.HttpFilter{Name: name, ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: packed}}, nil
}
