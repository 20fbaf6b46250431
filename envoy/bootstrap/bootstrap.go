// Package bootstrap writes the configuration of an Envoy that gives every request to knhk before it goes on.
//
// It promises that the configuration fails closed (an unreachable, silent or failing knhk refuses the request, unless
// the route says on_receipt_failure: allow), that no client and no upstream can bring a header of ours into a request
// or a response, and that equal configurations give equal bytes. It is pure: no clock, disk or network. With
// envoy.tls, TLS is 1.3 between certificates that both sides show, no session is resumed and no connection outlives a
// certificate that is renewed when half of it is over. It does not promise that the addresses can be bound or that the
// upstreams exist, and it leaves out routes without a cluster: those belong to whoever configures that Envoy otherwise.
//
// `knhk bootstrap` calls Bootstrap and YAML; e2e and the benchmark call Listener and Sidecar for the pieces. The
// settings follow Envoy 1.40's advice for edge proxies (configuration/best_practices/edge); where the code departs
// from it, a comment says why.
package bootstrap

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	overloadv3 "github.com/envoyproxy/go-control-plane/envoy/config/overload/v3"
	downstreamv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/resource_monitors/downstream_connections/v3"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
)

// Names that both sides must agree on: Envoy's configuration here, the services in server/extproc and
// server/accesslog.
const (
	SidecarCluster    = "knhk"           // cluster of the gRPC services that knhk offers to Envoy
	ListenerName      = "knhk"           // the one listener
	LogName           = "knhk"           // log_name in the first message of an access log stream
	MetadataNamespace = "knhk"           // dynamic metadata that ext_proc may set
	MetadataReceipt   = "receipt"        // its key with the receipt id
	MetadataClass     = "class"          // its key with the class
	HeaderPrefix      = "x-knhk-"        // header names we own: stripped from requests and upstream responses
	HeaderReceipt     = "x-knhk-receipt" // response header with the receipt id
	HeaderClass       = "x-knhk-class"   // response header with the class
	HealthService     = "envoy.service.ext_proc.v3.ExternalProcessor"
)

// Listener addresses of a configuration that names none.
const (
	defaultListener = "127.0.0.1:10000"
	defaultAdmin    = "127.0.0.1:9901"
)

// maxDownstreamConnections bounds the connections Envoy accepts over all listeners. Envoy's edge advice is to set a
// bound; the figure is its example's.
const maxDownstreamConnections = 50000

// Bootstrap returns the whole static configuration for cfg. Durations and limits that cfg leaves unset get the defaults
// that api/knhk/config/v1 documents. All faults of cfg are reported at once, each naming the field; nil is an error.
func Bootstrap(cfg *configv1.Config) (*bootstrapv3.Bootstrap, error) {
	if cfg == nil {
		return nil, errors.New("bootstrap: no configuration")
	}
	listener, lerr := Listener(cfg, SidecarCluster)
	sidecar, serr := Sidecar(cfg, SidecarCluster)
	each, rerr := replicaClusters(cfg, SidecarCluster)
	upstreams, uerr := upstreamClusters(cfg)
	secrets, terr := sdsClusters(cfg)
	admin, aerr := tcpAddress(orDefault(cfg.GetEnvoy().GetAdmin(), defaultAdmin))
	if aerr != nil {
		aerr = fmt.Errorf("envoy.admin: %w", aerr)
	}
	limits, oerr := overload()
	if err := errors.Join(lerr, serr, rerr, uerr, terr, aerr, oerr); err != nil {
		return nil, fmt.Errorf("bootstrap: %w", err)
	}
	return &bootstrapv3.Bootstrap{
		// ALS sends the node along: it names the Envoy whose buffer of entries can be lost.
		Node:  &corev3.Node{Id: "envoy-" + orDefault(cfg.GetInstance(), "unnamed"), Cluster: "knhk"},
		Admin: &bootstrapv3.Admin{Address: admin},
		StaticResources: &bootstrapv3.Bootstrap_StaticResources{
			Listeners: []*listenerv3.Listener{listener},
			Clusters:  slices.Concat([]*clusterv3.Cluster{sidecar}, each, secrets, upstreams),
		},
		OverloadManager: limits,
	}, nil
}

// overload bounds what a flood of connections can take. Envoy's advice also names a heap limit; that depends on the
// machine, which a pure function does not know.
func overload() (*overloadv3.OverloadManager, error) {
	monitor, err := anypb.New(&downstreamv3.DownstreamConnectionsConfig{MaxActiveDownstreamConnections: maxDownstreamConnections})
	if err != nil {
		return nil, fmt.Errorf("overload manager: %w", err)
	}
	return &overloadv3.OverloadManager{ResourceMonitors: []*overloadv3.ResourceMonitor{{
		Name:       "envoy.resource_monitors.global_downstream_max_connections",
		ConfigType: &overloadv3.ResourceMonitor_TypedConfig{TypedConfig: monitor},
	}}}, nil
}

// YAML returns b as a YAML document with sorted keys below a comment that says where it came from. Envoy reads it as it
// is (`envoy -c`). The same message gives the same bytes.
func YAML(b *bootstrapv3.Bootstrap) ([]byte, error) {
	var out bytes.Buffer
	out.WriteString("# Written by `knhk bootstrap` from knhk.yaml for Envoy 1.39.1 or later. Change knhk.yaml, not this file.\n")
	if err := encodeYAML(&out, b); err != nil {
		return nil, fmt.Errorf("bootstrap yaml: %w", err)
	}
	return out.Bytes(), nil
}

// encodeYAML writes m in proto names. protojson varies its whitespace on purpose, so its output is decoded and written
// again; yaml.v3 sorts the keys of maps.
func encodeYAML(out *bytes.Buffer, m proto.Message) error {
	js, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(js))
	dec.UseNumber()
	var tree any
	if err := dec.Decode(&tree); err != nil {
		return err
	}
	enc := yaml.NewEncoder(out)
	enc.SetIndent(2)
	if err := enc.Encode(plainNumbers(tree)); err != nil {
		return err
	}
	return enc.Close()
}

// plainNumbers turns json.Number, which YAML would write as a quoted string, into int64 or float64.
func plainNumbers(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			v[k] = plainNumbers(e)
		}
		return v
	case []any:
		for i, e := range v {
			v[i] = plainNumbers(e)
		}
		return v
	case json.Number:
		if i, err := strconv.ParseInt(v.String(), 10, 64); err == nil {
			return i
		}
		if f, err := v.Float64(); err == nil {
			return f
		}
		return v.String()
	default:
		return v
	}
}

func orDefault(s, def string) string {
	if s == "" {
		return def
	}
	return s
}
