package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/envoy/bootstrap"
)

// benchCase is one way to treat a request.
type benchCase struct {
	name    string
	noop    string         // subcommand of this program that serves it
	class   configv1.Class // of knhk; unspecified for the others
	capture configv1.Capture

	process *harness.Process // nil for none
	addr    netip.AddrPort   // Envoy's listener
	service string           // where its gRPC server listens
}

func (c *benchCase) isKnhk() bool { return c.class != configv1.Class_CLASS_UNSPECIFIED }

// allCases returns the cases in the order of the report.
func allCases() []*benchCase {
	return []*benchCase{
		{name: "none"},
		{name: "stock-noop", noop: "stocknoop"},
		{name: "tuned-noop", noop: "tunednoop"},
		{name: "r1-lean", class: configv1.Class_R1, capture: configv1.Capture_LEAN},
		{name: "w1-lean", class: configv1.Class_W1, capture: configv1.Capture_LEAN},
		{name: "r1-full", class: configv1.Class_R1, capture: configv1.Capture_FULL},
		{name: "w1-full", class: configv1.Class_W1, capture: configv1.Capture_FULL},
	}
}

func caseNames() []string {
	var names []string
	for _, c := range allCases() {
		names = append(names, c.name)
	}
	return names
}

// config is the part of knhk.yaml that Envoy's side is made from.
func (c *benchCase) config() *configv1.Config {
	return &configv1.Config{
		Instance:  c.name,
		Listeners: &configv1.Listeners{Envoy: c.service},
		Envoy:     &configv1.Envoy{Listener: "127.0.0.1:0", Admin: "127.0.0.1:0", Capture: c.capture},
	}
}

// knhkYAML is the configuration of a knhk case. Capacity is out of the way: the beat is measured, not its refusals.
const knhkYAML = `origin: "bench.local/knhk/%[1]s"
instance: %[1]s
state_dir: %[2]s
listeners: {envoy: "%[3]s", admin: "%[4]s"}
insecure_loopback: true
keys:
  identity: {uri: "soft:%[5]s"}
  daily: {uri: "soft:%[5]s"}
beat:
  r1: {capacity: 1000000}
  w1: {capacity: 1000000}
default_route: {class: %[6]s}
envoy: {capture: %[7]s}
`

// startService starts the gRPC server of a case and waits until it is ready.
func (c *benchCase) startService(ctx context.Context, dir, knhk string) error {
	if c.noop == "" && !c.isKnhk() {
		return nil
	}
	var err error
	if c.service, err = harness.FreeAddr(); err != nil {
		return err
	}
	p := harness.ProcessConfig{Name: c.name, Log: filepath.Join(dir, c.name+".log"), Ready: harness.TCPReady(c.service)}
	if c.noop != "" {
		if p.Path, err = os.Executable(); err != nil {
			return err
		}
		p.Args = []string{c.noop, c.service}
	} else {
		admin, err := harness.FreeAddr()
		if err != nil {
			return err
		}
		state, keys := filepath.Join(dir, c.name), filepath.Join(dir, c.name+"-keys")
		file := filepath.Join(dir, c.name+".knhk.yaml")
		text := fmt.Sprintf(knhkYAML, c.name, strconv.Quote(state), c.service, admin, keys, c.class, c.capture)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			return err
		}
		p.Path, p.Args = knhk, []string{"serve", "--config", file}
		p.Ready = harness.HTTPReady("http://" + admin + "/readyz")
	}
	c.process, err = harness.StartProcess(ctx, p)
	return err
}

// build builds a program of this module into dir.
func build(ctx context.Context, dir, pkg string) (string, error) {
	root, err := harness.ModuleRoot()
	if err != nil {
		return "", err
	}
	out := filepath.Join(dir, filepath.Base(pkg))
	cmd := exec.CommandContext(ctx, "go", "build", "-o", out, pkg)
	cmd.Dir = root
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build %s: %w\n%s", pkg, err, text)
	}
	return out, nil
}

// envoyFor returns the configuration of one Envoy with a listener per case.
func envoyFor(cases []*benchCase) ([]byte, error) {
	b := &bootstrapv3.Bootstrap{
		Node:            &corev3.Node{Id: "bench", Cluster: "bench"},
		Admin:           &bootstrapv3.Admin{Address: loopback()},
		StaticResources: &bootstrapv3.Bootstrap_StaticResources{},
	}
	for _, c := range cases {
		l, err := c.listener()
		if err != nil {
			return nil, fmt.Errorf("case %s: %w", c.name, err)
		}
		b.StaticResources.Listeners = append(b.StaticResources.Listeners, l)
		if c.service == "" {
			continue
		}
		cluster, err := c.cluster()
		if err != nil {
			return nil, fmt.Errorf("case %s: %w", c.name, err)
		}
		b.StaticResources.Clusters = append(b.StaticResources.Clusters, cluster)
	}
	return bootstrap.YAML(b)
}

func loopback() *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: "127.0.0.1", PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 0}}}}
}

func (c *benchCase) cluster() (*clusterv3.Cluster, error) {
	cluster, err := bootstrap.Sidecar(c.config(), c.name)
	if err != nil {
		return nil, err
	}
	if c.noop != "" {
		cluster.HealthChecks = nil // the no-op servers have no health service
	}
	return cluster, nil
}

// listener is bootstrap's, with a direct response for every route. Cases without knhk keep the HTTP settings and lose
// what is there for knhk.
func (c *benchCase) listener() (*listenerv3.Listener, error) {
	l, err := bootstrap.Listener(c.config(), c.name)
	if err != nil {
		return nil, err
	}
	l.Name = c.name
	packed := l.GetFilterChains()[0].GetFilters()[0]
	hcm := &hcmv3.HttpConnectionManager{}
	if err := packed.GetTypedConfig().UnmarshalTo(hcm); err != nil {
		return nil, err
	}
	hcm.StatPrefix = c.name
	hcm.RouteSpecifier = &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: &routev3.RouteConfiguration{
		Name: c.name, VirtualHosts: []*routev3.VirtualHost{{
			Name: "all", Domains: []string{"*"},
			Routes: []*routev3.Route{{
				Name:  "bench",
				Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
				Action: &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{
					Status: 200, Body: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: "ok"}}}},
			}},
		}}}}
	if !c.isKnhk() {
		if err := c.strip(hcm); err != nil {
			return nil, err
		}
	}
	a, err := anypb.New(hcm)
	if err != nil {
		return nil, err
	}
	packed.ConfigType = &listenerv3.Filter_TypedConfig{TypedConfig: a}
	return l, nil
}

// strip takes out what only knhk needs; the no-op servers get an ext_proc filter with both header phases and nothing
// else set, as one would write it for them.
func (c *benchCase) strip(hcm *hcmv3.HttpConnectionManager) error {
	hcm.AccessLog, hcm.EarlyHeaderMutationExtensions = nil, nil
	filters := hcm.GetHttpFilters()
	router := filters[len(filters)-1]
	hcm.HttpFilters = []*hcmv3.HttpFilter{router}
	if c.noop == "" {
		return nil
	}
	p, err := anypb.New(&extprocv3.ExternalProcessor{
		GrpcService: &corev3.GrpcService{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{
			EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: c.name}}},
		MessageTimeout: durationpb.New(2e9),
		ProcessingMode: &extprocv3.ProcessingMode{
			RequestHeaderMode: extprocv3.ProcessingMode_SEND, ResponseHeaderMode: extprocv3.ProcessingMode_SEND,
		},
	})
	if err != nil {
		return err
	}
	hcm.HttpFilters = []*hcmv3.HttpFilter{
		{Name: "envoy.filters.http.ext_proc", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: p}}, router,
	}
	return nil
}

// startAll starts the services of the cases, then an Envoy before them. What was started is returned even with an
// error, for stopAll.
func startAll(ctx context.Context, opt options, dir string) (cases []*benchCase, envoy *harness.Envoy, err error) {
	for _, c := range allCases() {
		for _, name := range opt.cases {
			if c.name == name {
				cases = append(cases, c)
			}
		}
	}
	knhk := opt.knhk
	for _, c := range cases {
		if c.isKnhk() && knhk == "" {
			if knhk, err = build(ctx, dir, "./server/knhk"); err != nil {
				return cases, nil, err
			}
		}
		if err := c.startService(ctx, dir, knhk); err != nil {
			return cases, nil, err
		}
	}
	config, err := envoyFor(cases)
	if err != nil {
		return cases, nil, err
	}
	if envoy, err = harness.StartEnvoy(ctx, harness.EnvoyConfig{Bootstrap: config, Dir: dir, LogLevel: "error"}); err != nil {
		return cases, nil, err
	}
	for _, c := range cases {
		addr, err := envoy.Listener(ctx, c.name)
		if err != nil {
			return cases, envoy, err
		}
		if c.addr, err = netip.ParseAddrPort(addr); err != nil {
			return cases, envoy, err
		}
		if err := c.answers(ctx); err != nil {
			return cases, envoy, err
		}
	}
	return cases, envoy, nil
}

// answers checks that the case does what it is there to measure.
func (c *benchCase) answers(ctx context.Context) error {
	resp, err := harness.Do(ctx, c.addr.String(), harness.Request{Host: "bench"})
	if err != nil {
		return fmt.Errorf("case %s: %w", c.name, err)
	}
	receipt := resp.Header.Get(bootstrap.HeaderReceipt)
	if resp.Status != 200 || (receipt != "") != c.isKnhk() {
		return fmt.Errorf("case %s: status %d, receipt %q", c.name, resp.Status, receipt)
	}
	if class := resp.Header.Get(bootstrap.HeaderClass); c.isKnhk() && !strings.EqualFold(class, c.class.String()) {
		return fmt.Errorf("case %s: class %q", c.name, class)
	}
	return nil
}

// stopAll ends everything, Envoy first so that no request finds its service gone.
func stopAll(cases []*benchCase, envoy *harness.Envoy) error {
	ctx := context.Background()
	var errs []error
	if envoy != nil {
		errs = append(errs, envoy.Stop(ctx))
	}
	for _, c := range cases {
		if c.process != nil {
			errs = append(errs, c.process.Stop(ctx))
		}
	}
	return errors.Join(errs...)
}
