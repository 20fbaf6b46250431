package bootstrap

import (
	"bytes"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// goldens are whole configurations; each has testdata/NAME.yaml.
var goldens = []struct {
	name string
	cfg  *configv1.Config
}{
	// What a first knhk.yaml leads to: one upstream, every default.
	{"lean", &configv1.Config{
		Instance:  "a",
		Listeners: &configv1.Listeners{Envoy: "127.0.0.1:8443"},
		Envoy:     &configv1.Envoy{Clusters: []*configv1.Cluster{{Name: "app", Endpoints: []string{"127.0.0.1:8080"}}}},
		Routes:    []*configv1.Route{{Name: "app", Cluster: "app"}},
	}},
	// Both phases, over a unix socket.
	{"full", &configv1.Config{
		Instance:  "a",
		Listeners: &configv1.Listeners{Envoy: "unix:/run/knhk/envoy.sock"},
		Envoy: &configv1.Envoy{
			Capture:  configv1.Capture_FULL,
			Clusters: []*configv1.Cluster{{Name: "app", Endpoints: []string{"127.0.0.1:8080"}}},
		},
		Routes: []*configv1.Route{{Name: "app", Cluster: "app"}},
	}},
	// Everything set: routes in the wrong order, one without a cluster, DNS names, IPv6, HTTP/2, every override.
	{"every", &configv1.Config{
		Instance:  "b",
		Listeners: &configv1.Listeners{Envoy: "[::1]:8443"},
		Envoy: &configv1.Envoy{
			Listener: "0.0.0.0:80", Admin: "127.0.0.1:9000",
			Clusters: []*configv1.Cluster{
				{Name: "app", Endpoints: []string{"10.0.0.1:8080", "10.0.0.2:8080"}},
				{Name: "grpc", Endpoints: []string{"grpc.internal:9090"}, Http2: true},
			},
			MessageTimeout: durationpb.New(3 * time.Second), AccessLogFlush: durationpb.New(50 * time.Millisecond),
			MaxRequests: 5000, MaxConnectionDuration: durationpb.New(time.Minute),
		},
		DefaultRoute: &configv1.RoutePolicy{OnReceiptFailure: configv1.OnReceiptFailure_ALLOW},
		Routes: []*configv1.Route{
			{Name: "rest", Cluster: "app", Policy: &configv1.RoutePolicy{OnReceiptFailure: configv1.OnReceiptFailure_ALLOW}},
			{Name: "pay", Cluster: "app", Prefix: "/pay/", Policy: &configv1.RoutePolicy{Class: configv1.Class_W1},
				Retries: 2, InternalRedirects: 3, Timeout: durationpb.New(5 * time.Second)},
			{Name: "delta", Cluster: "app", Prefix: "/pay/delta/", Policy: &configv1.RoutePolicy{ClassifyBody: true}},
			{Name: "health", Cluster: "app", Prefix: "/healthz", Policy: &configv1.RoutePolicy{Exclude: true}},
			{Name: "chat", Cluster: "app", Prefix: "/chat", Websocket: true, Timeout: durationpb.New(0)},
			{Name: "rpc", Cluster: "grpc", Prefix: "/grpc.testing.TestService/"},
			{Name: "elsewhere", Policy: &configv1.RoutePolicy{Class: configv1.Class_R1}},
		},
	}},
	// Two replicas, the second behind a unix socket: ext_proc asks either, each has its own access log, one holds the rest.
	{"replicas", &configv1.Config{
		Instance:  "a",
		Listeners: &configv1.Listeners{Envoy: "127.0.0.1:8443"},
		Envoy: &configv1.Envoy{
			Clusters: []*configv1.Cluster{{Name: "app", Endpoints: []string{"127.0.0.1:8080"}}},
			Replicas: []*configv1.Replica{{Instance: "a", Address: "127.0.0.1:8443"}, {Instance: "b", Address: "unix:/run/b.sock"}},
		},
		Routes: []*configv1.Route{{Name: "app", Cluster: "app"}},
	}},
	// Nothing gets a receipt unless a route says so: the filter is off and turned on per route.
	{"optin", &configv1.Config{
		Instance:     "a",
		Listeners:    &configv1.Listeners{Envoy: "127.0.0.1:8443"},
		Envoy:        &configv1.Envoy{Clusters: []*configv1.Cluster{{Name: "app", Endpoints: []string{"127.0.0.1:8080"}}}},
		DefaultRoute: &configv1.RoutePolicy{Exclude: true},
		Routes: []*configv1.Route{
			{Name: "on", Cluster: "app", Prefix: "/on/"},
			{Name: "off", Cluster: "app", Policy: &configv1.RoutePolicy{Exclude: true}},
		},
	}},
}

func TestGolden(t *testing.T) {
	envoy := findEnvoy(t)
	for _, g := range goldens {
		t.Run(g.name, func(t *testing.T) {
			got := render(t, g.cfg)
			if again := render(t, g.cfg); !bytes.Equal(got, again) {
				t.Fatal("the same configuration gave different bytes")
			}
			file := filepath.Join("testdata", g.name+".yaml")
			if *update {
				if err := os.WriteFile(file, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("differs from %s; run `go test ./envoy/bootstrap -update` and read the diff. Got:\n%s", file, got)
			}
			if envoy == "" {
				t.Log("not validated: no envoy (set ENVOY)")
				return
			}
			out, err := exec.CommandContext(t.Context(), envoy, "--mode", "validate", "-c", file, "-l", "warning").CombinedOutput()
			if err != nil {
				t.Errorf("envoy refuses %s: %v\n%s", file, err, out)
			}
		})
	}
}

func render(t *testing.T, cfg *configv1.Config) []byte {
	t.Helper()
	b, err := Bootstrap(cfg)
	if err != nil {
		t.Fatal(err)
	}
	out, err := YAML(b)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// findEnvoy returns the path of an Envoy, or "" if there is none; with CI=true that fails the test.
func findEnvoy(t *testing.T) string {
	t.Helper()
	if path := os.Getenv("ENVOY"); path != "" {
		return path
	}
	if path, err := filepath.Abs(filepath.Join("..", "..", ".venv", "bin", "envoy")); err == nil {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("no envoy: set ENVOY or install .venv/bin/envoy")
	}
	return ""
}

func TestBootstrapErrors(t *testing.T) {
	app := []*configv1.Cluster{{Name: "app", Endpoints: []string{"127.0.0.1:8080"}}}
	ours := &configv1.Listeners{Envoy: "127.0.0.1:8443"}
	for _, c := range []struct {
		name string
		cfg  *configv1.Config
		want []string // all of them, in one error
	}{
		{"no configuration", nil, []string{"no configuration"}},
		{"where we listen is not said", &configv1.Config{}, []string{"listeners.envoy"}},
		{"all faults at once", &configv1.Config{
			Listeners: &configv1.Listeners{Envoy: "unix:"},
			Envoy:     &configv1.Envoy{Listener: "80", Admin: ":1", Clusters: []*configv1.Cluster{{Name: "app", Endpoints: []string{"x"}}}},
			Routes:    []*configv1.Route{{Name: "r", Cluster: "other"}},
		}, []string{"envoy.listener", "envoy.admin", "listeners.envoy", "envoy.clusters[0].endpoints[0]", "routes[0].cluster"}},
		{"our cluster's name is ours", &configv1.Config{Listeners: ours, Envoy: &configv1.Envoy{
			Clusters: []*configv1.Cluster{{Name: SidecarCluster, Endpoints: []string{"127.0.0.1:1"}}}}},
			[]string{`envoy.clusters[0]: name "knhk" is taken`}},
		{"the cluster of a replica is ours too", &configv1.Config{Listeners: ours, Envoy: &configv1.Envoy{
			Clusters: []*configv1.Cluster{{Name: "knhk-b", Endpoints: []string{"127.0.0.1:1"}}},
			Replicas: []*configv1.Replica{{Instance: "a", Address: "127.0.0.1:8443"}, {Instance: "b", Address: "127.0.0.1:8444"}}}},
			[]string{`envoy.clusters[0]: name "knhk-b" is taken`}},
		{"two replicas of a name, one nowhere", &configv1.Config{Listeners: ours, Envoy: &configv1.Envoy{
			Replicas: []*configv1.Replica{{Instance: "a", Address: "127.0.0.1:8443"}, {Instance: "a", Address: "b"}}}},
			[]string{`envoy.replicas[1]: instance "a" is taken`, "envoy.replicas[1].address"}},
		{"two clusters of a name", &configv1.Config{Listeners: ours, Envoy: &configv1.Envoy{Clusters: append(app, app...)}},
			[]string{`envoy.clusters[1]: name "app" is taken`}},
		{"two routes of a name, the second elsewhere", &configv1.Config{Listeners: ours, Envoy: &configv1.Envoy{Clusters: app},
			Routes: []*configv1.Route{{Name: "r", Cluster: "app"}, {Name: "r"}}}, []string{`routes[1]: name "r" is taken`}},
		{"a prefix that never matches", &configv1.Config{Listeners: ours, Envoy: &configv1.Envoy{Clusters: app},
			Routes: []*configv1.Route{{Name: "r", Cluster: "app", Prefix: "/"}, {Name: "s", Cluster: "app"}}},
			[]string{`routes[1].prefix: "/" is already taken by route r`}},
		{"a websocket has no body to wait for", &configv1.Config{Listeners: ours, Envoy: &configv1.Envoy{Clusters: app},
			Routes: []*configv1.Route{{Name: "r", Cluster: "app", Websocket: true, Policy: &configv1.RoutePolicy{ClassifyBody: true}}}},
			[]string{"routes[0]: a websocket route"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b, err := Bootstrap(c.cfg)
			if err == nil {
				t.Fatalf("no error, got %v", b)
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q does not say %q", err, want)
				}
			}
		})
	}
}

// The configuration must not depend on fields that nil parents hide.
func TestListenerOfEmptyConfig(t *testing.T) {
	if _, err := Listener(&configv1.Config{}, SidecarCluster); err != nil {
		t.Errorf("Listener: %v", err)
	}
	if _, err := Listener(nil, SidecarCluster); err != nil {
		t.Errorf("Listener of nil: %v", err)
	}
}

func TestAddresses(t *testing.T) {
	for _, c := range []struct {
		in, host string
		port     uint32
		bad      bool
	}{
		{in: "127.0.0.1:80", host: "127.0.0.1", port: 80},
		{in: "[::1]:80", host: "::1", port: 80},
		{in: "app.internal:0", host: "app.internal"},
		{in: "app.internal", bad: true},
		{in: ":80", bad: true},       // which interface is not said
		{in: "::1:80", bad: true},    // is 80 the port?
		{in: "a:65536", bad: true},   // no such port
		{in: "a:http", bad: true},    // names of ports differ between machines
		{in: "[]:80", bad: true},     // empty host in brackets
		{in: "unix:/x:1", bad: true}, // an upstream is TCP
		{in: "", bad: true},
	} {
		host, port, err := splitHostPort(c.in)
		if c.bad != (err != nil) || host != c.host || port != c.port {
			t.Errorf("%q: got %q, %d, %v", c.in, host, port, err)
		}
	}
}

func FuzzAddress(f *testing.F) {
	for _, s := range []string{"127.0.0.1:80", "[::1]:80", "unix:/run/knhk.sock", "a:", ":", "[", "unix:"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := anyAddress(s)
		if err != nil {
			return
		}
		if a.GetPipe().GetPath() == "" && (a.GetSocketAddress().GetAddress() == "" || a.GetSocketAddress().GetPortValue() > 65535) {
			t.Errorf("%q was accepted as %v", s, a)
		}
	})
}
