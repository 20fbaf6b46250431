package identity

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
	"github.com/knhk/sidecar/crypto/spiffe/spiffetest"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/envoy/bootstrap"
)

// filesEnvoy is an Envoy of envoy/bootstrap with certificates in files.
type filesEnvoy struct {
	*harness.Envoy
	addr string // of the listener
}

func runFilesEnvoy(t *testing.T, cfg *configv1.Config) *filesEnvoy {
	t.Helper()
	secrets, err := bootstrap.Secrets(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range secrets {
		spiffetest.WriteFile(t, s.Path, s.YAML)
	}
	b, err := bootstrap.Bootstrap(cfg)
	if err != nil {
		t.Fatal(err)
	}
	y, err := bootstrap.YAML(b)
	if err != nil {
		t.Fatal(err)
	}
	e := &filesEnvoy{Envoy: harness.RunEnvoy(t, harness.EnvoyConfig{Bootstrap: y})}
	if e.addr, err = e.Listener(t.Context(), bootstrap.ListenerName); err != nil {
		t.Fatal(err)
	}
	return e
}

// tlsFiles issues id and writes its files, and those of federated authorities, into a directory of their own.
func tlsFiles(t *testing.T, ca *spiffetest.CA, id string, federated ...*spiffetest.CA) (*configv1.TLSFiles, string) {
	t.Helper()
	dir := t.TempDir()
	p := spiffetest.WriteFiles(t, dir, ca.Issue(id), ca)
	f := &configv1.TLSFiles{Certificate: p.Certificate, Key: p.Key, Ca: p.CA}
	for _, other := range federated {
		td := other.Bundle().TrustDomain().Name()
		spiffetest.WriteFile(t, dir+"/"+td+".pem", other.PEM())
		f.Federated = append(f.Federated, &configv1.FederatedBundle{TrustDomain: td, Ca: dir + "/" + td + ".pem"})
	}
	return f, dir
}

// clientTLS shows svid (nil: nothing) and takes every server: what it is is looked at by the tests.
func clientTLS(svid *x509svid.SVID) *tls.Config {
	c := &tls.Config{InsecureSkipVerify: true}
	if svid != nil {
		cert := tls.Certificate{PrivateKey: svid.PrivateKey}
		for _, x := range svid.Certificates {
			cert.Certificate = append(cert.Certificate, x.Raw)
		}
		c.Certificates = []tls.Certificate{cert}
	}
	return c
}

// get asks for /do/echo on a new connection. A client whose certificate is refused hears it here, not in the handshake (TLS 1.3).
func get(t *testing.T, addr string, c *tls.Config, header map[string]string) (*harness.Echo, *tls.ConnectionState, error) {
	t.Helper()
	tr := &http.Transport{TLSClientConfig: c, DisableKeepAlives: true}
	defer tr.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(t.Context(), harness.Patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+addr+"/do/echo", nil)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header {
		req.Header.Set(k, v)
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, nil, err
	}
	e := new(harness.Echo)
	if err := json.Unmarshal(body, e); err != nil {
		return nil, nil, fmt.Errorf("status %d, %q: %w", resp.StatusCode, body, err)
	}
	return e, resp.TLS, nil
}

// TestListenerTLS: who may connect to the listener and who not, with files and clients of two trust domains.
func TestListenerTLS(t *testing.T) {
	harness.RequireEnvoy(t)
	ca, partner, stranger := spiffetest.NewCA(t, "knhk.test"), spiffetest.NewCA(t, "partner.test"), spiffetest.NewCA(t, "knhk.test")
	files, dir := tlsFiles(t, ca, "spiffe://knhk.test/envoy", partner)
	up := harness.RunUpstream(t)
	envoy := runFilesEnvoy(t, &configv1.Config{
		Instance:  "a",
		Listeners: &configv1.Listeners{Envoy: "127.0.0.1:1"}, // not asked: the route is excluded
		Envoy: &configv1.Envoy{
			Listener: "127.0.0.1:0", Admin: "127.0.0.1:0",
			Tls:      &configv1.EnvoyTLS{SpiffeId: "spiffe://knhk.test/envoy", Files: files, Clients: []string{"spiffe://knhk.test/ns/a/*", "spiffe://partner.test/shop"}},
			Clusters: []*configv1.Cluster{{Name: "up", Endpoints: []string{up.HTTP()}}},
		},
		Routes: []*configv1.Route{{Name: "open", Cluster: "up", Prefix: "/do/echo", Policy: &configv1.RoutePolicy{Exclude: true}}},
	})

	t.Run("what a client says of itself is replaced", func(t *testing.T) {
		c := clientTLS(ca.Issue("spiffe://knhk.test/ns/a/shop"))
		c.ClientSessionCache = tls.NewLRUClientSessionCache(8)
		for range 2 {
			echo, state, err := get(t, envoy.addr, c, map[string]string{
				"X-Forwarded-Client-Cert": "By=x;URI=spiffe://knhk.test/admin", "Knhk-Parent": "forged"})
			if err != nil {
				t.Fatal(err)
			}
			xfcc := echo.Header.Values("X-Forwarded-Client-Cert")
			if len(xfcc) != 1 || !strings.Contains(xfcc[0], "URI=spiffe://knhk.test/ns/a/shop") || strings.Contains(xfcc[0], "admin") {
				t.Errorf("x-forwarded-client-cert %q", xfcc)
			}
			if p := echo.Header.Values("Knhk-Parent"); len(p) != 0 {
				t.Errorf("knhk-parent %q", p)
			}
			if state.Version != tls.VersionTLS13 || state.CurveID != tls.X25519MLKEM768 {
				t.Errorf("version %x, key exchange %v", state.Version, state.CurveID)
			}
			if state.DidResume {
				t.Error("the session was resumed")
			}
		}
	})
	if _, _, err := get(t, envoy.addr, clientTLS(partner.Issue("spiffe://partner.test/shop")), nil); err != nil {
		t.Errorf("the partner's shop: %v", err)
	}
	old := clientTLS(ca.Issue("spiffe://knhk.test/ns/a/shop"))
	old.MaxVersion = tls.VersionTLS12
	for name, c := range map[string]*tls.Config{
		"TLS 1.2":                        old,
		"no certificate":                 clientTLS(nil),
		"below a path that begins alike": clientTLS(ca.Issue("spiffe://knhk.test/ns/ab")),
		"below it":                       clientTLS(ca.Issue("spiffe://knhk.test/ns/ab/shop")),
		"the path itself":                clientTLS(ca.Issue("spiffe://knhk.test/ns/a")),
		"somebody else of the partner":   clientTLS(partner.Issue("spiffe://partner.test/job")),
		"exact is not a prefix":          clientTLS(partner.Issue("spiffe://partner.test/shop/x")),
		"the partner vouches for ours":   clientTLS(partner.Issue("spiffe://knhk.test/ns/a/shop")),
		"we vouch for the partner":       clientTLS(ca.Issue("spiffe://partner.test/shop")),
		"another authority of our name":  clientTLS(stranger.Issue("spiffe://knhk.test/ns/a/shop")),
		"expired":                        clientTLS(ca.Issue("spiffe://knhk.test/ns/a/shop", spiffetest.WithNotAfter(time.Now().Add(-time.Second)))),
		"the ID as a DNS name":           clientTLS(ca.Issue("spiffe://knhk.test/x", spiffetest.WithDNS("spiffe://knhk.test/ns/a/shop"))),
	} {
		t.Run(name, func(t *testing.T) {
			if echo, _, err := get(t, envoy.addr, c, nil); err == nil {
				t.Errorf("accepted: %+v", echo.Header)
			}
		})
	}

	// The partner's authority is replaced, and then ours, which makes Envoy read both again.
	renewed := spiffetest.NewCA(t, "partner.test")
	spiffetest.WriteFile(t, dir+"/partner.test.pem", renewed.PEM())
	spiffetest.WriteFile(t, dir+"/bundle.pem", append(ca.PEM(), stranger.PEM()...))
	harness.Eventually(t, "the partner's new authority", func() bool {
		_, _, oldErr := get(t, envoy.addr, clientTLS(partner.Issue("spiffe://partner.test/shop")), nil)
		_, _, newErr := get(t, envoy.addr, clientTLS(renewed.Issue("spiffe://partner.test/shop")), nil)
		return oldErr != nil && newErr == nil
	})

	// Renewal: the files are replaced, Envoy shows the new certificate to new connections.
	serial := func(c *tls.Config) *big.Int {
		_, state, err := get(t, envoy.addr, c, nil)
		if err != nil {
			return nil
		}
		return state.PeerCertificates[0].SerialNumber
	}
	next := ca.Issue("spiffe://knhk.test/envoy")
	spiffetest.WriteFiles(t, dir, next, ca)
	harness.Eventually(t, "the renewed certificate", func() bool {
		n := serial(clientTLS(ca.Issue("spiffe://knhk.test/ns/a/shop")))
		return n != nil && n.Cmp(next.Certificates[0].SerialNumber) == 0
	})
	// The authority is replaced: what the old one signed is refused, what the new one signs is taken.
	spiffetest.WriteFiles(t, dir, stranger.Issue("spiffe://knhk.test/envoy"), stranger)
	harness.Eventually(t, "the new authority", func() bool {
		_, _, oldErr := get(t, envoy.addr, clientTLS(ca.Issue("spiffe://knhk.test/ns/a/shop")), nil)
		_, _, newErr := get(t, envoy.addr, clientTLS(stranger.Issue("spiffe://knhk.test/ns/a/shop")), nil)
		return oldErr != nil && newErr == nil
	})
}

// TestLifetimes: no connection outlives a certificate, be it idle or in the middle of a response.
func TestLifetimes(t *testing.T) {
	harness.RequireEnvoy(t)
	const ttl = 6 * time.Second
	ca := spiffetest.NewCA(t, "knhk.test")
	files, _ := tlsFiles(t, ca, "spiffe://knhk.test/envoy")
	up := harness.RunUpstream(t)
	exclude := &configv1.RoutePolicy{Exclude: true}
	envoy := runFilesEnvoy(t, &configv1.Config{
		Instance:  "a",
		Listeners: &configv1.Listeners{Envoy: "127.0.0.1:1"}, // not asked: the routes are excluded
		Identity:  &configv1.Identity{SpiffeId: "spiffe://knhk.test/knhk", SvidTtl: durationpb.New(ttl)},
		Envoy: &configv1.Envoy{
			Listener: "127.0.0.1:0", Admin: "127.0.0.1:0",
			Tls:      &configv1.EnvoyTLS{SpiffeId: "spiffe://knhk.test/envoy", Files: files, Clients: []string{"spiffe://knhk.test/shop"}},
			Clusters: []*configv1.Cluster{{Name: "up", Endpoints: []string{up.HTTP()}}},
		},
		Routes: []*configv1.Route{
			{Name: "echo", Cluster: "up", Prefix: "/do/echo", Policy: exclude},
			{Name: "drip", Cluster: "up", Prefix: "/do/drip/1000/60", Policy: exclude, Timeout: durationpb.New(0)},
		},
	})
	lasts := func(paths ...string) error {
		begun := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), harness.Patience)
		defer cancel()
		c, err := (&tls.Dialer{Config: clientTLS(ca.Issue("spiffe://knhk.test/shop"))}).DialContext(ctx, "tcp", envoy.addr)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SetDeadline(begun.Add(harness.Patience)); err != nil {
			return err
		}
		for _, p := range paths {
			if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", p); err != nil {
				return err
			}
		}
		n, err := io.Copy(io.Discard, c)
		if err, ok := err.(net.Error); ok && err.Timeout() || n == 0 {
			return fmt.Errorf("%d bytes in %v: %w", n, time.Since(begun), err)
		}
		// Half of it is what is promised; the other half is for a slow machine.
		if d := time.Since(begun); d > ttl {
			return fmt.Errorf("lasted %v", d)
		}
		return nil
	}
	var all sync.WaitGroup
	for _, paths := range [][]string{{"/do/echo"}, {"/do/drip/1000/60"}} {
		all.Go(func() {
			if err := lasts(paths...); err != nil {
				t.Errorf("%v: %v", paths, err)
			}
		})
	}
	all.Wait()
}

// decider stands in for knhk: ext_authz and ext_proc give each request a receipt of the stand-in's name, and note what they heard.
type decider struct {
	authv3.UnimplementedAuthorizationServer
	extprocv3.UnimplementedExternalProcessorServer

	addr, name string

	mu      sync.Mutex
	deny    bool
	checks  []*authv3.CheckRequest
	headers []*extprocv3.ProcessingRequest
}

func runDecider(t *testing.T, name string) *decider {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := &decider{addr: l.Addr().String(), name: name}
	s := grpc.NewServer()
	authv3.RegisterAuthorizationServer(s, d)
	extprocv3.RegisterExternalProcessorServer(s, d)
	var serving sync.WaitGroup
	serving.Go(func() { _ = s.Serve(l) })
	t.Cleanup(func() { s.Stop(); serving.Wait() })
	return d
}

func (d *decider) metadata(t string) *structpb.Struct {
	return &structpb.Struct{Fields: map[string]*structpb.Value{
		bootstrap.MetadataReceipt: structpb.NewStringValue(t + "." + d.name), bootstrap.MetadataClass: structpb.NewStringValue("W1")}}
}

func (d *decider) Check(_ context.Context, r *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.checks = append(d.checks, r)
	if d.deny {
		return &authv3.CheckResponse{Status: &statuspb.Status{Code: int32(codes.PermissionDenied)}, DynamicMetadata: d.metadata("authz"),
			HttpResponse: &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{}}}, nil
	}
	return &authv3.CheckResponse{Status: &statuspb.Status{}, DynamicMetadata: d.metadata("authz"),
		HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{}}}, nil
}

func (d *decider) Process(stream extprocv3.ExternalProcessor_ProcessServer) error {
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		d.mu.Lock()
		d.headers = append(d.headers, r)
		d.mu.Unlock()
		md := &structpb.Struct{Fields: map[string]*structpb.Value{bootstrap.MetadataNamespace: structpb.NewStructValue(d.metadata("proc"))}}
		if err := stream.Send(&extprocv3.ProcessingResponse{DynamicMetadata: md,
			Response: &extprocv3.ProcessingResponse_RequestHeaders{RequestHeaders: &extprocv3.HeadersResponse{}}}); err != nil {
			return err
		}
	}
}

// heard forgets and returns what came.
func (d *decider) heard() ([]*authv3.CheckRequest, []*extprocv3.ProcessingRequest) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c, h := d.checks, d.headers
	d.checks, d.headers = nil, nil
	return c, h
}

func (d *decider) refuse(yes bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.deny = yes
}

func plain(t *testing.T, addr, path string, header map[string]string) (*harness.Response, *harness.Echo) {
	t.Helper()
	resp, err := harness.Do(t.Context(), addr, harness.Request{Target: path, Header: header})
	if err != nil {
		t.Fatal(err)
	}
	e := new(harness.Echo)
	if resp.Status == http.StatusOK {
		if err := json.NewDecoder(bytes.NewReader(resp.Body)).Decode(e); err != nil {
			t.Fatalf("%q: %v", resp.Body, err)
		}
	}
	return resp, e
}

// TestParentOfAChain: a workload's Envoy (ext_authz) calls the Envoy before the upstream (ext_authz, then ext_proc) over mutual TLS. Only
// what the first Envoy knows of its own decision arrives at the second as the parent, and nothing of it at the upstream.
func TestParentOfAChain(t *testing.T) {
	harness.RequireEnvoy(t)
	ca := spiffetest.NewCA(t, "knhk.test")
	up := harness.RunUpstream(t)
	knhkA, knhkB := runDecider(t, "a"), runDecider(t, "b")
	filesA, _ := tlsFiles(t, ca, "spiffe://knhk.test/envoy-a")
	filesB, _ := tlsFiles(t, ca, "spiffe://knhk.test/envoy-b")
	b := runFilesEnvoy(t, &configv1.Config{
		Instance:  "b",
		Listeners: &configv1.Listeners{Envoy: knhkB.addr},
		Parents:   []string{"spiffe://knhk.test/envoy-a"},
		Envoy: &configv1.Envoy{
			Listener: "127.0.0.1:0", Admin: "127.0.0.1:0", Filter: configv1.Filter_BOTH,
			AccessLogFlush: durationpb.New(10 * time.Millisecond),
			Tls:            &configv1.EnvoyTLS{SpiffeId: "spiffe://knhk.test/envoy-b", Files: filesB, Clients: []string{"spiffe://knhk.test/envoy-a"}},
			Clusters:       []*configv1.Cluster{{Name: "up", Endpoints: []string{up.HTTP()}}},
		},
		Routes: []*configv1.Route{{Name: "all-b", Cluster: "up"}},
	})
	a := runFilesEnvoy(t, &configv1.Config{
		Instance:  "a",
		Listeners: &configv1.Listeners{Envoy: knhkA.addr},
		Parents:   []string{"spiffe://knhk.test/*"}, // nobody can prove to be one of them on a plain listener
		Envoy: &configv1.Envoy{
			Listener: "127.0.0.1:0", Admin: "127.0.0.1:0", Filter: configv1.Filter_EXT_AUTHZ,
			Tls: &configv1.EnvoyTLS{SpiffeId: "spiffe://knhk.test/envoy-a", Files: filesA},
			Clusters: []*configv1.Cluster{
				{Name: "next", Endpoints: []string{b.addr}, SpiffeIds: []string{"spiffe://knhk.test/envoy-b"}, SendParent: true},
				{Name: "quiet", Endpoints: []string{b.addr}, SpiffeIds: []string{"spiffe://knhk.test/*"}},
				{Name: "wrong", Endpoints: []string{b.addr}, SpiffeIds: []string{"spiffe://knhk.test/envoy"}},
			},
		},
		Routes: []*configv1.Route{
			{Name: "next", Cluster: "next"},
			{Name: "quiet", Cluster: "quiet", Prefix: "/quiet/"},
			{Name: "wrong", Cluster: "wrong", Prefix: "/wrong/"},
			{Name: "off", Cluster: "next", Prefix: "/off/do/echo", Policy: &configv1.RoutePolicy{Exclude: true}},
		},
	})
	for _, c := range []struct {
		path, route, parent string // parent as B's knhk hears it
	}{
		{"/do/echo", "next", "authz.a"},
		{"/quiet/do/echo", "quiet", ""},
		{"/off/do/echo", "", ""}, // no decision, no receipt: nothing to tell
	} {
		t.Run(c.path, func(t *testing.T) {
			resp, echo := plain(t, a.addr, c.path, map[string]string{"Knhk-Parent": "forged", "X-Forwarded-Client-Cert": "URI=spiffe://knhk.test/envoy-a"})
			if resp.Status != http.StatusOK {
				t.Fatalf("status %d, %s", resp.Status, resp.Body)
			}
			if p := echo.Header.Values("Knhk-Parent"); len(p) != 0 {
				t.Errorf("the upstream hears the parent %q", p)
			}
			checks, _ := knhkA.heard()
			if c.route == "" {
				if len(checks) != 0 {
					t.Errorf("asked about an excluded route")
				}
			} else {
				if len(checks) != 1 {
					t.Fatalf("%d checks", len(checks))
				}
				at := checks[0].GetAttributes()
				h := at.GetRequest().GetHttp().GetHeaderMap()
				if r := at.GetContextExtensions()[bootstrap.ContextRoute]; r != c.route {
					t.Errorf("route %q", r)
				}
				if headerOf(h, "knhk-parent") != "" || headerOf(h, "x-request-id") == "" || at.GetSource().GetPrincipal() != "" {
					t.Errorf("the first hears %v of %q", h, at.GetSource().GetPrincipal())
				}
			}
			checks, procs := knhkB.heard()
			if len(checks) != 1 || len(procs) != 1 {
				t.Fatalf("%d checks, %d messages", len(checks), len(procs))
			}
			at := checks[0].GetAttributes()
			if p := headerOf(at.GetRequest().GetHttp().GetHeaderMap(), "knhk-parent"); p != c.parent || at.GetSource().GetPrincipal() != "spiffe://knhk.test/envoy-a" {
				t.Errorf("the second hears of parent %q from %q", p, at.GetSource().GetPrincipal())
			}
			// ext_proc behind ext_authz hears what was decided, and the response shows that one receipt.
			md := procs[0].GetMetadataContext().GetFilterMetadata()[bootstrap.MetadataAuthz].GetFields()
			if md[bootstrap.MetadataReceipt].GetStringValue() != "authz.b" {
				t.Errorf("ext_proc hears %v", procs[0].GetMetadataContext())
			}
			if p := headerOf(procs[0].GetRequestHeaders().GetHeaders(), "knhk-parent"); p != c.parent {
				t.Errorf("ext_proc hears of parent %q", p)
			}
		})
	}
	t.Run("the receipt of two filters is one", func(t *testing.T) {
		tr := &http.Transport{TLSClientConfig: clientTLS(ca.Issue("spiffe://knhk.test/envoy-a"))}
		defer tr.CloseIdleConnections()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+b.addr+"/do/forge", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if got := resp.Header.Values(bootstrap.HeaderReceipt); len(got) != 1 || got[0] != "authz.b" {
			t.Errorf("receipt %q", got)
		}
		knhkB.heard()
	})
	t.Run("an upstream with another ID", func(t *testing.T) {
		resp, _ := plain(t, a.addr, "/wrong/do/echo", nil)
		if checks, _ := knhkB.heard(); resp.Status != http.StatusServiceUnavailable || len(checks) != 0 {
			t.Errorf("status %d, %d checks", resp.Status, len(checks))
		}
	})
	t.Run("refused", func(t *testing.T) {
		knhkA.refuse(true)
		resp, _ := plain(t, a.addr, "/do/echo", nil)
		if resp.Status != http.StatusForbidden || strings.Join(resp.Header.Values(bootstrap.HeaderReceipt), ",") != "authz.a" {
			t.Errorf("status %d, receipt %q", resp.Status, resp.Header.Values(bootstrap.HeaderReceipt))
		}
	})
}

// TestShadow: in shadow mode everything passes, with the receipt of what would have been decided, and without one when nobody answers.
func TestShadow(t *testing.T) {
	harness.RequireEnvoy(t)
	up := harness.RunUpstream(t)
	knhk := runDecider(t, "a")
	knhk.refuse(true)
	run := func(addr string) *filesEnvoy {
		return runFilesEnvoy(t, &configv1.Config{
			Instance:  "a",
			Listeners: &configv1.Listeners{Envoy: addr},
			Envoy: &configv1.Envoy{
				Listener: "127.0.0.1:0", Admin: "127.0.0.1:0", Filter: configv1.Filter_EXT_AUTHZ, ShadowMode: true,
				Clusters: []*configv1.Cluster{{Name: "up", Endpoints: []string{up.HTTP()}}},
			},
			Routes: []*configv1.Route{{Name: "all", Cluster: "up"}},
		})
	}
	resp, _ := plain(t, run(knhk.addr).addr, "/do/echo", nil)
	if resp.Status != http.StatusOK || resp.Header.Get(bootstrap.HeaderReceipt) != "authz.a" {
		t.Errorf("refused: status %d, receipt %q", resp.Status, resp.Header.Get(bootstrap.HeaderReceipt))
	}
	if resp, _ := plain(t, run("127.0.0.1:1").addr, "/do/echo", nil); resp.Status != http.StatusOK {
		t.Errorf("nobody there: status %d", resp.Status)
	}
}

func headerOf(m *corev3.HeaderMap, name string) string {
	for _, h := range m.GetHeaders() {
		if h.GetKey() == name {
			return string(h.GetRawValue())
		}
	}
	return ""
}
