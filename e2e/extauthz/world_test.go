package extauthz

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// knhkYAML is the configuration of knhk, after what the stack adds. FILTER is envoy.filter.
const knhkYAML = `
default_route: {class: R1}
routes:
- {name: w1, policy: {class: W1}, prefix: /w1, cluster: up}
- {name: none, policy: {exclude: true}, prefix: /none, cluster: up}
- {name: body, policy: {class: W1, classify_body: true}, prefix: /body, cluster: up}
envoy:
  filter: FILTER
  access_log_flush: 0.05s
  clusters: [{name: up, endpoints: ["UPSTREAM"]}]
`

// authz is the ext_authz filter; EXTRA is for what a test adds.
const authz = `
          - name: envoy.filters.http.ext_authz
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz
              transport_api_version: V3
              grpc_service: {envoy_grpc: {cluster_name: knhk}, timeout: 2s}
              status_on_error: {code: ServiceUnavailable}
              encode_raw_headers: true
              allowed_headers:
                patterns: [{exact: ":method"}, {exact: ":scheme"}, {exact: ":authority"}, {exact: ":path"}, {exact: x-request-id}, {exact: content-length}, {exact: knhk-parent}]
              metadata_context_namespaces: [knhk]
              EXTRA`

// proc is the ext_proc filter.
const proc = `
          - name: envoy.filters.http.ext_proc
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor
              grpc_service: {envoy_grpc: {cluster_name: knhk}, timeout: 0s}
              status_on_error: {code: ServiceUnavailable}
              message_timeout: 2s
              processing_mode: {request_header_mode: SEND, response_header_mode: SKIP}
              request_attributes: [xds.route_name, xds.cluster_name, source.address]
              metadata_options:
                receiving_namespaces: {untyped: [knhk]}
                forwarding_namespaces: {untyped: [envoy.filters.http.ext_authz]}`

const envoyYAML = `
node: {id: envoy-1, cluster: test}
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}
static_resources:
  clusters:
  - name: knhk
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment: {cluster_name: knhk, endpoints: [{lb_endpoints: [{endpoint: {address: KNHK}}]}]}
  - name: up
    connect_timeout: 1s
    load_assignment: {cluster_name: up, endpoints: [{lb_endpoints: [{endpoint: {address: UPSTREAM}}]}]}
  listeners:
  - name: http
    address: HTTP
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: http
          generate_request_id: true
          use_remote_address: true
          access_log:
          - name: envoy.access_loggers.http_grpc
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig
              common_config: {log_name: knhk, transport_api_version: V3, buffer_flush_interval: 0.05s, grpc_service: {envoy_grpc: {cluster_name: knhk}}}
          http_filters:FILTERS
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - name: none
                match: {prefix: /none}
                route: {cluster: up}
                typed_per_filter_config: {envoy.filters.http.ext_authz: {"@type": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute, check_settings: {context_extensions: {knhk.route: none}}}}
              - name: w1
                match: {prefix: /w1}
                route: {cluster: up, internal_redirect_policy: {max_internal_redirects: 2, redirect_response_codes: [302]}, retry_policy: {retry_on: 5xx, num_retries: 2}}
                typed_per_filter_config: {envoy.filters.http.ext_authz: {"@type": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute, check_settings: {context_extensions: {knhk.route: w1, knhk.cluster: up}}}}
              - name: body
                match: {prefix: /body}
                route: {cluster: up}
                typed_per_filter_config: {envoy.filters.http.ext_authz: {"@type": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute, check_settings: {context_extensions: {knhk.route: body, knhk.body: buffered}, with_request_body: {max_request_bytes: 8193, allow_partial_message: true, pack_as_bytes: true}}}}
              - name: forgot
                match: {prefix: /forgot}
                route: {cluster: up}
                typed_per_filter_config: {envoy.filters.http.ext_authz: {"@type": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute, check_settings: {context_extensions: {knhk.route: body}}}}
              - name: rest
                match: {prefix: /}
                route: {cluster: up}
  - name: tcp
    address: TCP
    filter_chains:
    - filters:
      - name: envoy.filters.network.ext_authz
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.ext_authz.v3.ExtAuthz
          stat_prefix: tcp
          transport_api_version: V3
          grpc_service: {envoy_grpc: {cluster_name: knhk}, timeout: 2s}
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: tcp
          cluster: up
          access_log:
          - name: envoy.access_loggers.tcp_grpc
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.TcpGrpcAccessLogConfig
              common_config: {log_name: knhk, transport_api_version: V3, buffer_flush_interval: 0.05s, grpc_service: {envoy_grpc: {cluster_name: knhk}}}
`

// world is a stack whose Envoy has the configuration above.
type world struct {
	*audited.World
	t   *testing.T
	tcp string // address of the TCP listener
}

// start runs knhk with envoy.filter filter and an Envoy with these HTTP filters; edit may change knhk's configuration.
func start(t *testing.T, filter string, edit func(string) string, filters ...string) *world {
	t.Helper()
	yaml := strings.Replace(knhkYAML, "FILTER", filter, 1)
	if edit != nil {
		yaml = edit(yaml)
	}
	w := &world{World: audited.Prepare(t, stack.Config{Soft: true, YAML: yaml}), t: t}
	if err := w.StartKnhk(t.Context()); err != nil {
		t.Fatal(err)
	}
	var err error
	if w.tcp, err = harness.FreeAddr(); err != nil {
		t.Fatal(err)
	}
	chain := strings.Join(filters, "")
	if !strings.Contains(chain, "\n") {
		t.Fatal("no filters")
	}
	text := strings.NewReplacer("KNHK", socket(w.Sidecar), "UPSTREAM", socket(w.Upstream.HTTP()), "HTTP\n", socket(w.Listener)+"\n",
		"TCP\n", socket(w.tcp)+"\n", "FILTERS", strings.ReplaceAll(chain, "EXTRA", "")).Replace(envoyYAML)
	if w.Envoy, err = harness.StartEnvoy(t.Context(), harness.EnvoyConfig{Bootstrap: []byte(text), Dir: w.Dir}); err != nil {
		if log, e := os.ReadFile(filepath.Join(w.Dir, "envoy.log")); e == nil {
			t.Logf("%s", log)
		}
		t.Fatal(err)
	}
	return w
}

// socket is an address of Envoy's configuration.
func socket(addr string) string {
	host, port, _ := strings.Cut(addr, ":")
	return "{socket_address: {address: " + host + ", port_value: " + port + "}}"
}
