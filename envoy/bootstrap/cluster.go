package bootstrap

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	upstreamhttpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
)

const (
	defaultMaxRequests   = 100000
	defaultMaxConnection = 5 * time.Minute
	connectTimeout       = time.Second
	bufferLimit          = 32 << 10 // bytes per connection, Envoy's advice for edges; also how much of a body is held
	healthInterval       = time.Second
	optionsKey           = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
)

// Sidecar returns the cluster of knhk's own gRPC services under the given name: listeners.envoy of cfg, or every one of
// envoy.replicas. TCP or unix sockets, HTTP/2. A gRPC health check on HealthService takes a draining replica out where there
// is another; with one replica Envoy's panic mode keeps sending to it, and its answer, not an absence, decides.
func Sidecar(cfg *configv1.Config, name string) (*clusterv3.Cluster, error) {
	addr, err := anyAddress(cfg.GetListeners().GetEnvoy())
	if err != nil {
		return nil, fmt.Errorf("listeners.envoy: %w", err)
	}
	addrs := []*corev3.Address{addr}
	if replicas := replicas(cfg); replicas != nil {
		addrs = nil
		for i, r := range replicas {
			if addr, err = anyAddress(r.GetAddress()); err != nil {
				return nil, fmt.Errorf("envoy.replicas[%d].address: %w", i, err)
			}
			addrs = append(addrs, addr)
		}
	}
	c, err := sidecarCluster(cfg, name, addrs)
	if err != nil {
		return nil, fmt.Errorf("cluster %s: %w", name, err)
	}
	// Every request in flight may have to be retried when a replica leaves: three, Envoy's default, is for upstreams.
	c.CircuitBreakers.Thresholds[0].MaxRetries = wrapperspb.UInt32(maxRequests(cfg))
	c.CircuitBreakers.Thresholds[0].RetryBudget = nil
	c.HealthChecks = []*corev3.HealthCheck{{
		Timeout:            durationpb.New(healthInterval),
		Interval:           durationpb.New(healthInterval),
		NoTrafficInterval:  durationpb.New(healthInterval), // else 60 s until the first request
		UnhealthyThreshold: wrapperspb.UInt32(2),
		HealthyThreshold:   wrapperspb.UInt32(1),
		HealthChecker: &corev3.HealthCheck_GrpcHealthCheck_{GrpcHealthCheck: &corev3.HealthCheck_GrpcHealthCheck{
			ServiceName: HealthService,
		}},
	}}
	return c, nil
}

// replicas returns envoy.replicas where there are several: a list of one says nothing that listeners.envoy does not.
func replicas(cfg *configv1.Config) []*configv1.Replica {
	if r := cfg.GetEnvoy().GetReplicas(); len(r) > 1 {
		return r
	}
	return nil
}

// replicaCluster is the name of the cluster that holds one replica alone.
func replicaCluster(sidecar, instance string) string { return sidecar + "-" + instance }

// replicaClusters returns a cluster for each of several replicas, for its share of the access log. Without a health check: there
// is nowhere else to go, and a replica that leaves must hear what became of its last decisions.
func replicaClusters(cfg *configv1.Config, sidecar string) ([]*clusterv3.Cluster, error) {
	var out []*clusterv3.Cluster
	var errs []error
	for i, r := range replicas(cfg) {
		addr, err := anyAddress(r.GetAddress())
		if err != nil {
			continue // told by Sidecar
		}
		c, err := sidecarCluster(cfg, replicaCluster(sidecar, r.GetInstance()), []*corev3.Address{addr})
		if err != nil {
			errs = append(errs, fmt.Errorf("envoy.replicas[%d]: %w", i, err))
			continue
		}
		out = append(out, c)
	}
	return out, errors.Join(errs...)
}

// upstreamClusters returns envoy.clusters in their order.
func upstreamClusters(cfg *configv1.Config) ([]*clusterv3.Cluster, error) {
	var out []*clusterv3.Cluster
	var errs []error
	seen := map[string]bool{SidecarCluster: true, SDSCluster: sdsSocket(cfg) != ""}
	for i, r := range replicas(cfg) {
		name := replicaCluster(SidecarCluster, r.GetInstance())
		if seen[name] {
			errs = append(errs, fmt.Errorf("envoy.replicas[%d]: instance %q is taken", i, r.GetInstance()))
		}
		seen[name] = true
	}
	for i, u := range cfg.GetEnvoy().GetClusters() {
		if seen[u.GetName()] {
			errs = append(errs, fmt.Errorf("envoy.clusters[%d]: name %q is taken", i, u.GetName()))
			continue
		}
		seen[u.GetName()] = true
		var addrs []*corev3.Address
		for j, e := range u.GetEndpoints() {
			a, err := tcpAddress(e)
			if err != nil {
				errs = append(errs, fmt.Errorf("envoy.clusters[%d].endpoints[%d]: %w", i, j, err))
				continue
			}
			addrs = append(addrs, a)
		}
		c, err := cluster(cfg, u.GetName(), addrs, u.GetHttp2(), maxConnection(cfg))
		if err != nil {
			errs = append(errs, fmt.Errorf("envoy.clusters[%d]: %w", i, err))
			continue
		}
		if ids := u.GetSpiffeIds(); len(ids) > 0 {
			if c.TransportSocket, err = upstreamTLS(cfg, ids, fmt.Sprintf("envoy.clusters[%d].spiffe_ids", i), u.GetHttp2()); err != nil {
				errs = append(errs, err)
			}
		}
		out = append(out, c)
	}
	return out, errors.Join(errs...)
}

// sidecarCluster is a cluster of knhk's own services: in mutual TLS wherever knhk has an identity and is reached over TCP.
func sidecarCluster(cfg *configv1.Config, name string, addrs []*corev3.Address) (*clusterv3.Cluster, error) {
	c, err := cluster(cfg, name, addrs, true, maxConnection(cfg))
	if err != nil || cfg.GetIdentity() == nil {
		return c, err
	}
	tcp := 0
	for _, a := range addrs {
		if a.GetSocketAddress() != nil {
			tcp++
		}
	}
	switch tcp {
	case 0: // the kernel says who is there
		return c, nil
	case len(addrs):
		c.TransportSocket, err = upstreamTLS(cfg, []string{cfg.GetIdentity().GetSpiffeId()}, "identity.spiffe_id", true)
		return c, err
	}
	return nil, errors.New("envoy.replicas: with identity either all are unix sockets or none is")
}

// overTLS reports whether Envoy speaks TLS to knhk.
func overTLS(cfg *configv1.Config) bool {
	return cfg.GetIdentity() != nil && !strings.HasPrefix(cfg.GetListeners().GetEnvoy(), "unix:")
}

// cluster returns a cluster with breakers that do not stand in the way: at Envoy's default of 1024 requests an overload
// turns into refusals that nobody decided. Its connections end after life; 0 is no end.
func cluster(cfg *configv1.Config, name string, addrs []*corev3.Address, http2 bool, life time.Duration) (*clusterv3.Cluster, error) {
	opts := &upstreamhttpv3.HttpProtocolOptions{}
	if life > 0 {
		// A connection that lives for ever never meets a new replica behind the same address, and outlives its certificate.
		opts.CommonHttpProtocolOptions = &corev3.HttpProtocolOptions{MaxConnectionDuration: durationpb.New(life)}
	}
	// No HTTP/2 keepalive pings: grpc-go answers more than one in five minutes with GOAWAY ENHANCE_YOUR_CALM.
	if http2 {
		opts.UpstreamProtocolOptions = &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig_{
			ExplicitHttpConfig: &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig{
				ProtocolConfig: &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{
					Http2ProtocolOptions: &corev3.Http2ProtocolOptions{},
				}}}
	} else {
		opts.UpstreamProtocolOptions = &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig_{
			ExplicitHttpConfig: &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig{
				ProtocolConfig: &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig_HttpProtocolOptions{
					HttpProtocolOptions: &corev3.Http1ProtocolOptions{EnableTrailers: true},
				}}}
	}
	packed, err := anypb.New(opts)
	if err != nil {
		return nil, fmt.Errorf("protocol options: %w", err)
	}
	kind := clusterv3.Cluster_STATIC
	var lbs []*endpointv3.LbEndpoint
	for _, a := range addrs {
		if sa := a.GetSocketAddress(); sa != nil {
			if _, err := netip.ParseAddr(sa.GetAddress()); err != nil {
				kind = clusterv3.Cluster_STRICT_DNS
			}
		}
		lbs = append(lbs, &endpointv3.LbEndpoint{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{
			Endpoint: &endpointv3.Endpoint{Address: a}}})
	}
	n := maxRequests(cfg)
	return &clusterv3.Cluster{
		Name:                          name,
		ClusterDiscoveryType:          &clusterv3.Cluster_Type{Type: kind},
		ConnectTimeout:                durationpb.New(connectTimeout),
		PerConnectionBufferLimitBytes: wrapperspb.UInt32(bufferLimit),
		LoadAssignment: &endpointv3.ClusterLoadAssignment{
			ClusterName: name,
			Endpoints:   []*endpointv3.LocalityLbEndpoints{{LbEndpoints: lbs}},
		},
		CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
			MaxConnections:     wrapperspb.UInt32(n),
			MaxPendingRequests: wrapperspb.UInt32(n),
			MaxRequests:        wrapperspb.UInt32(n),
			// Upstream retries stay a fraction of the traffic, so that they cannot feed an outage.
			RetryBudget: &clusterv3.CircuitBreakers_Thresholds_RetryBudget{
				BudgetPercent:       &typev3.Percent{Value: 20},
				MinRetryConcurrency: wrapperspb.UInt32(3),
			},
			TrackRemaining: true,
		}}},
		TypedExtensionProtocolOptions: map[string]*anypb.Any{optionsKey: packed},
	}, nil
}

func maxRequests(cfg *configv1.Config) uint32 {
	if n := cfg.GetEnvoy().GetMaxRequests(); n > 0 {
		return n
	}
	return defaultMaxRequests
}

// durationOr returns d, or def where d is unset.
func durationOr(d *durationpb.Duration, def time.Duration) *durationpb.Duration {
	if d == nil {
		return durationpb.New(def)
	}
	return d
}

// anyAddress reads "host:port" or "unix:/path".
func anyAddress(s string) (*corev3.Address, error) {
	if path, ok := strings.CutPrefix(s, "unix:"); ok {
		if path == "" {
			return nil, errors.New("address \"unix:\" has no path")
		}
		return &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: path}}}, nil
	}
	return tcpAddress(s)
}

// tcpAddress reads "host:port" with a numeric port; IPv6 hosts stand in brackets. An empty host is an error: which
// interface is meant should be said.
func tcpAddress(s string) (*corev3.Address, error) {
	host, port, err := splitHostPort(s)
	if err != nil {
		return nil, err
	}
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address:       host,
		PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
	}}}, nil
}

func splitHostPort(s string) (host string, port uint32, err error) {
	i := strings.LastIndexByte(s, ':')
	if i <= 0 {
		return "", 0, fmt.Errorf("address %q: want host:port", s)
	}
	host = s[:i]
	if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
		host = host[1 : len(host)-1]
	} else if strings.ContainsAny(host, ":[]") {
		return "", 0, fmt.Errorf("address %q: want host:port, IPv6 in brackets", s)
	}
	n, err := strconv.ParseUint(s[i+1:], 10, 16)
	if err != nil || host == "" {
		return "", 0, fmt.Errorf("address %q: want host:port", s)
	}
	return host, uint32(n), nil
}
