package bootstrap

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"flag"
	"math/big"
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
	// Certificates from the SPIFFE agent that knhk has its own from; knhk elsewhere.
	{"tls-sds", &configv1.Config{
		Instance:  "a",
		Listeners: &configv1.Listeners{Envoy: "10.0.0.5:8443"},
		Identity:  &configv1.Identity{SpiffeId: "spiffe://knhk.test/knhk", WorkloadApi: "unix:/run/spire/agent.sock", SvidTtl: durationpb.New(6 * time.Minute)},
		Envoy: &configv1.Envoy{
			Listener: "0.0.0.0:443",
			Tls: &configv1.EnvoyTLS{SpiffeId: "spiffe://knhk.test/envoy",
				Clients: []string{"spiffe://knhk.test/shop", "spiffe://knhk.test/ns/a/*"}},
			Clusters: []*configv1.Cluster{
				{Name: "app", Endpoints: []string{"app.internal:8080"}, SpiffeIds: []string{"spiffe://knhk.test/app"}},
				{Name: "grpc", Endpoints: []string{"10.0.0.7:8080"}, Http2: true, SpiffeIds: []string{"spiffe://other.test/*", "spiffe://knhk.test/grpc"}},
			},
		},
		Routes: []*configv1.Route{{Name: "app", Cluster: "app"}, {Name: "grpc", Cluster: "grpc", Prefix: "/grpc/"}},
	}},
	// Certificates in files. Two replicas, each over TLS.
	{"tls-files", &configv1.Config{
		Instance:  "a",
		Listeners: &configv1.Listeners{Envoy: "10.0.0.5:8443"},
		Identity:  &configv1.Identity{SpiffeId: "spiffe://knhk.test/knhk"},
		Envoy: &configv1.Envoy{
			Tls: &configv1.EnvoyTLS{SpiffeId: "spiffe://knhk.test/envoy", Clients: []string{"spiffe://knhk.test/shop"},
				Files: &configv1.TLSFiles{Certificate: pki + "certificate.pem", Key: pki + "key.pem", Ca: pki + "bundle.pem"}},
			Clusters: []*configv1.Cluster{{Name: "app", Endpoints: []string{"10.0.0.7:8080"}}},
			Replicas: []*configv1.Replica{{Instance: "a", Address: "10.0.0.5:8443"}, {Instance: "b", Address: "10.0.0.6:8443"}},
		},
		Routes: []*configv1.Route{{Name: "app", Cluster: "app"}},
	}},
	// Clients of two trust domains, upstreams of one each.
	{"tls-federated", &configv1.Config{
		Instance:  "a",
		Listeners: &configv1.Listeners{Envoy: "unix:/run/knhk/envoy.sock"},
		Identity:  &configv1.Identity{SpiffeId: "spiffe://knhk.test/knhk"},
		Envoy: &configv1.Envoy{
			Tls: &configv1.EnvoyTLS{SpiffeId: "spiffe://knhk.test/envoy", Clients: []string{"spiffe://knhk.test/*", "spiffe://partner.test/shop"},
				Files: &configv1.TLSFiles{Certificate: pki + "certificate.pem", Key: pki + "key.pem", Ca: pki + "bundle.pem",
					Federated: []*configv1.FederatedBundle{{TrustDomain: "partner.test", Ca: pki + "partner.pem"}}}},
			Clusters: []*configv1.Cluster{
				{Name: "app", Endpoints: []string{"10.0.0.7:8080"}, SpiffeIds: []string{"spiffe://knhk.test/app"}},
				{Name: "partner", Endpoints: []string{"10.0.0.8:8080"}, SpiffeIds: []string{"spiffe://partner.test/api"}},
			},
		},
		Routes: []*configv1.Route{{Name: "app", Cluster: "app"}, {Name: "partner", Cluster: "partner", Prefix: "/partner/"}},
	}},
	// ext_authz alone, two replicas.
	{"authz", &configv1.Config{
		Instance:  "a",
		Listeners: &configv1.Listeners{Envoy: "127.0.0.1:8443"},
		Envoy: &configv1.Envoy{
			Filter:   configv1.Filter_EXT_AUTHZ,
			Clusters: []*configv1.Cluster{{Name: "app", Endpoints: []string{"127.0.0.1:8080"}}},
			Replicas: []*configv1.Replica{{Instance: "a", Address: "127.0.0.1:8443"}, {Instance: "b", Address: "unix:/run/b.sock"}},
		},
		Routes: []*configv1.Route{
			{Name: "app", Cluster: "app"},
			{Name: "delta", Cluster: "app", Prefix: "/delta", Policy: &configv1.RoutePolicy{ClassifyBody: true}},
			{Name: "health", Cluster: "app", Prefix: "/healthz", Policy: &configv1.RoutePolicy{Exclude: true}},
		},
	}},
	// ext_authz that only looks, where a route says so.
	{"authz-shadow", &configv1.Config{
		Instance:  "a",
		Listeners: &configv1.Listeners{Envoy: "127.0.0.1:8443"},
		Envoy: &configv1.Envoy{
			Filter: configv1.Filter_EXT_AUTHZ, ShadowMode: true,
			Clusters: []*configv1.Cluster{{Name: "app", Endpoints: []string{"127.0.0.1:8080"}}},
		},
		DefaultRoute: &configv1.RoutePolicy{Exclude: true},
		Routes: []*configv1.Route{
			{Name: "on", Cluster: "app", Prefix: "/on/"},
			{Name: "off", Cluster: "app", Policy: &configv1.RoutePolicy{Exclude: true}},
		},
	}},
	// Both filters, two replicas, full capture.
	{"both", &configv1.Config{
		Instance:  "a",
		Listeners: &configv1.Listeners{Envoy: "127.0.0.1:8443"},
		Envoy: &configv1.Envoy{
			Filter: configv1.Filter_BOTH, Capture: configv1.Capture_FULL,
			Clusters: []*configv1.Cluster{{Name: "app", Endpoints: []string{"127.0.0.1:8080"}}},
			Replicas: []*configv1.Replica{{Instance: "a", Address: "127.0.0.1:8443"}, {Instance: "b", Address: "unix:/run/b.sock"}},
		},
		DefaultRoute: &configv1.RoutePolicy{OnReceiptFailure: configv1.OnReceiptFailure_ALLOW},
		Routes: []*configv1.Route{
			{Name: "app", Cluster: "app", Policy: &configv1.RoutePolicy{OnReceiptFailure: configv1.OnReceiptFailure_ALLOW}},
			{Name: "health", Cluster: "app", Prefix: "/healthz", Policy: &configv1.RoutePolicy{Exclude: true}},
		},
	}},
	// Beside a workload: plain on loopback for it, TLS to the knhk before the upstream, which hears the receipt id.
	{"outbound", &configv1.Config{
		Instance:  "a",
		Listeners: &configv1.Listeners{Envoy: "unix:/run/knhk/envoy.sock"},
		Identity:  &configv1.Identity{SpiffeId: "spiffe://knhk.test/knhk-a"},
		Parents:   []string{"spiffe://knhk.test/envoy-z"}, // of nobody who could come here
		Envoy: &configv1.Envoy{
			Tls: &configv1.EnvoyTLS{SpiffeId: "spiffe://knhk.test/envoy-a", Sds: "unix:/run/spire/agent.sock"},
			Clusters: []*configv1.Cluster{
				{Name: "next", Endpoints: []string{"10.0.0.7:443"}, SpiffeIds: []string{"spiffe://knhk.test/envoy-b"}, SendParent: true},
				{Name: "app", Endpoints: []string{"10.0.0.8:80"}},
			},
		},
		Routes: []*configv1.Route{{Name: "next", Cluster: "next"}, {Name: "app", Cluster: "app", Prefix: "/app/"}},
	}},
	// The one before the upstream: it hears the header of the Envoy it knows.
	{"inbound", &configv1.Config{
		Instance:  "b",
		Listeners: &configv1.Listeners{Envoy: "unix:/run/knhk/envoy.sock"},
		Identity:  &configv1.Identity{SpiffeId: "spiffe://knhk.test/knhk-b", WorkloadApi: "unix:///run/spire/agent.sock"},
		Parents:   []string{"spiffe://knhk.test/envoy-a"},
		Envoy: &configv1.Envoy{
			Listener: "10.0.0.7:443", Filter: configv1.Filter_BOTH,
			Tls:      &configv1.EnvoyTLS{SpiffeId: "spiffe://knhk.test/envoy-b", Clients: []string{"spiffe://knhk.test/envoy-a", "spiffe://knhk.test/job"}},
			Clusters: []*configv1.Cluster{{Name: "app", Endpoints: []string{"127.0.0.1:8080"}}},
		},
		Routes: []*configv1.Route{{Name: "app", Cluster: "app"}},
	}},
}

// pki is where the files of a golden stand; validation puts a directory of its own in its place.
const pki = "/run/envoy/tls/"

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
			if bytes.Contains(got, []byte(pki)) {
				file = withFiles(t, g.cfg, got)
			}
			out, err := exec.CommandContext(t.Context(), envoy, "--mode", "validate", "-c", file, "-l", "warning").CombinedOutput()
			if err != nil {
				t.Errorf("envoy refuses %s: %v\n%s", file, err, out)
			}
		})
	}
}

// withFiles writes a golden with its certificates and SDS files, which Envoy wants to find, and returns its name. The SDS files have
// goldens too.
func withFiles(t *testing.T, cfg *configv1.Config, golden []byte) string {
	t.Helper()
	dir := t.TempDir() + "/"
	place := func(b []byte) []byte { return bytes.ReplaceAll(b, []byte(pki), []byte(dir)) }
	secrets, err := Secrets(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range secrets {
		write(t, string(place([]byte(s.Path))), place(s.YAML))
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	for _, name := range []string{"certificate.pem", "bundle.pem", "partner.pem"} {
		write(t, dir+name, cert)
	}
	write(t, dir+"key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))
	write(t, dir+"envoy.yaml", place(golden))
	return dir + "envoy.yaml"
}

func write(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestSecrets: the files that a configuration names, and no others.
func TestSecrets(t *testing.T) {
	for _, g := range goldens {
		secrets, err := Secrets(g.cfg)
		if err != nil {
			t.Errorf("%s: %v", g.name, err)
			continue
		}
		text := string(render(t, g.cfg))
		for _, s := range secrets {
			if !strings.Contains(text, "path: "+s.Path+"\n") {
				t.Errorf("%s: %s is not named", g.name, s.Path)
			}
			file := filepath.Join("testdata", g.name+"."+filepath.Base(s.Path))
			if *update {
				write(t, file, s.YAML)
			}
			if want, err := os.ReadFile(file); err != nil || !bytes.Equal(want, s.YAML) {
				t.Errorf("differs from %s (%v); run `go test ./envoy/bootstrap -update` and read the diff. Got:\n%s", file, err, s.YAML)
			}
		}
		named := make(map[string]bool)
		for _, line := range strings.Split(text, "\n") {
			if p, ok := strings.CutPrefix(strings.TrimSpace(line), "path: "); ok && strings.HasPrefix(p, pki) {
				named[p] = true
			}
		}
		if len(named) != len(secrets) {
			t.Errorf("%s: %d files are named, %d described", g.name, len(named), len(secrets))
		}
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
	us := &configv1.Identity{SpiffeId: "spiffe://knhk.test/knhk", WorkloadApi: "unix:/run/agent.sock"}
	envoyOf := func(id string, clients ...string) *configv1.EnvoyTLS {
		return &configv1.EnvoyTLS{SpiffeId: id, Sds: "unix:/run/agent.sock", Clients: clients}
	}
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
		{"knhk shows a certificate, Envoy has none", &configv1.Config{Listeners: ours, Identity: us}, []string{"identity.spiffe_id: mutual TLS needs envoy.tls"}},
		{"one cluster is in the plain or is not", &configv1.Config{Listeners: ours, Identity: us, Envoy: &configv1.Envoy{Tls: envoyOf("spiffe://knhk.test/envoy"),
			Replicas: []*configv1.Replica{{Instance: "a", Address: "127.0.0.1:8443"}, {Instance: "b", Address: "unix:/run/b.sock"}}}},
			[]string{"envoy.replicas: with identity either all are unix sockets or none is"}},
		{"upstreams with an ID", &configv1.Config{Listeners: ours, Envoy: &configv1.Envoy{Clusters: []*configv1.Cluster{
			{Name: "app", Endpoints: []string{"127.0.0.1:8080"}, SpiffeIds: []string{"spiffe://knhk.test/app"}}}}},
			[]string{"envoy.clusters[0].spiffe_ids: mutual TLS needs envoy.tls"}},
		{"IDs that are none", &configv1.Config{Listeners: ours, Envoy: &configv1.Envoy{Tls: envoyOf("spiffe://knhk.test/envoy",
			"spiffe://knhk.test/a*", "spiffe://knhk.test", "spiffe://knhk.test/*/a", "*", "spiffe://knhk.test//*", "https://knhk.test/a", "")}},
			[]string{"clients[0]", "clients[1]", "clients[2]", "clients[3]", "clients[4]", "clients[5]", "clients[6]"}},
		{"an Envoy that is nobody", &configv1.Config{Listeners: ours, Envoy: &configv1.Envoy{Tls: envoyOf("spiffe://knhk.test")}}, []string{"envoy.tls.spiffe_id"}},
		{"no certificate anywhere", &configv1.Config{Listeners: ours, Envoy: &configv1.Envoy{Tls: &configv1.EnvoyTLS{SpiffeId: "spiffe://knhk.test/envoy"}}},
			[]string{"neither sds nor files"}},
		{"certificates from another machine", &configv1.Config{Listeners: ours, Envoy: &configv1.Envoy{Tls: &configv1.EnvoyTLS{
			SpiffeId: "spiffe://knhk.test/envoy", Sds: "10.0.0.1:80"}}}, []string{"envoy.tls.sds"}},
		{"authorities that nobody has named", &configv1.Config{Listeners: ours, Envoy: &configv1.Envoy{Tls: &configv1.EnvoyTLS{
			SpiffeId: "spiffe://knhk.test/envoy", Clients: []string{"spiffe://partner.test/*"}, Files: &configv1.TLSFiles{Certificate: "c", Key: "k", Ca: "a"}}}},
			[]string{"envoy.tls.clients: envoy.tls.files has no authorities of trust domain partner.test"}},
		{"the name of the SDS cluster is ours", &configv1.Config{Listeners: ours, Envoy: &configv1.Envoy{Tls: envoyOf("spiffe://knhk.test/envoy"),
			Clusters: []*configv1.Cluster{{Name: SDSCluster, Endpoints: []string{"127.0.0.1:1"}}}}}, []string{`name "knhk-sds" is taken`}},
		{"a shadow that enforces", &configv1.Config{Listeners: ours, Envoy: &configv1.Envoy{Filter: configv1.Filter_BOTH, ShadowMode: true}},
			[]string{"envoy.shadow_mode"}},
		{"ext_authz sees no response", &configv1.Config{Listeners: ours, Envoy: &configv1.Envoy{Filter: configv1.Filter_EXT_AUTHZ, Capture: configv1.Capture_FULL}},
			[]string{"envoy.capture"}},
		{"one failure mode for all", &configv1.Config{Listeners: ours, Envoy: &configv1.Envoy{Filter: configv1.Filter_EXT_AUTHZ, Clusters: app},
			Routes: []*configv1.Route{{Name: "r", Cluster: "app", Policy: &configv1.RoutePolicy{OnReceiptFailure: configv1.OnReceiptFailure_ALLOW}}}},
			[]string{"routes[0].policy.on_receipt_failure"}},
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

// A connection, its drain and the last stream of it end before half of a certificate's time is over, whatever that is.
func TestLifetimes(t *testing.T) {
	for _, ttl := range []time.Duration{3 * time.Second, time.Minute, time.Hour, 720 * time.Hour} {
		for _, longest := range []time.Duration{time.Second, 5 * time.Minute, 24 * time.Hour} {
			connection, drain, stream := lifetimes(&configv1.Config{
				Identity: &configv1.Identity{SvidTtl: durationpb.New(ttl)},
				Envoy:    &configv1.Envoy{MaxConnectionDuration: durationpb.New(longest), Tls: &configv1.EnvoyTLS{}},
			})
			if connection <= 0 || drain <= 0 || stream <= 0 || connection > min(longest, ttl/3) || connection+drain+stream > ttl/2 {
				t.Errorf("ttl %v, at most %v: connection %v, drain %v, stream %v", ttl, longest, connection, drain, stream)
			}
		}
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
