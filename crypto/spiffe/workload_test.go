package spiffe

import (
	"context"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"

	"github.com/knhk/sidecar/crypto/spiffe/spiffetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func apiConfig(api *spiffetest.WorkloadAPI) Config {
	return Config{ID: spiffeid.RequireFromString(serverID), WorkloadAPI: api.Addr}
}

func TestWorkloadAPI(t *testing.T) {
	ca, partner, other := spiffetest.NewCA(t, "knhk.test"), spiffetest.NewCA(t, "partner.test"), spiffetest.NewCA(t, "other.test")
	api := spiffetest.NewWorkloadAPI(t)
	first := ca.Issue(serverID)
	api.Update([]*x509svid.SVID{other.Issue("spiffe://other.test/knhk"), ca.Issue(clientID), first}, ca, partner, other) // ours is not the default
	var log journal
	var updates, failures atomic.Int64
	cfg := apiConfig(api)
	cfg.Log, cfg.OnUpdate, cfg.OnError = log.logger(), func(time.Time) { updates.Add(1) }, func() { failures.Add(1) }
	s := mustOpen(t, cfg)
	if serialOf(t, s) != serialHex(first.Certificates[0]) || updates.Load() != 1 || s.Ready() != nil || s.ID() != first.ID {
		t.Fatal("not the SVID with our ID")
	}
	for _, known := range []*spiffetest.CA{ca, partner, other} {
		if b, err := s.GetX509BundleForTrustDomain(known.TrustDomain); err != nil || !b.HasX509Authority(known.Certificate) {
			t.Errorf("bundle of %s: %v", known.TrustDomain, err)
		}
	}
	_, err := s.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("unknown.test"))
	wantError(t, "unknown domain", err, "unknown.test")
	b, err := s.GetX509BundleForTrustDomain(partner.TrustDomain)
	if err != nil {
		t.Fatal(err)
	}
	b.AddX509Authority(other.Certificate)
	if b, _ := s.GetX509BundleForTrustDomain(partner.TrustDomain); b.HasX509Authority(other.Certificate) {
		t.Fatal("a caller can change whom we believe")
	}

	second := ca.Issue(serverID)
	api.Update([]*x509svid.SVID{second}, ca)
	eventually(t, "the renewed SVID", func() bool { return serialOf(t, s) == serialHex(second.Certificates[0]) })
	if _, err := s.GetX509BundleForTrustDomain(partner.TrustDomain); err == nil || updates.Load() != 2 {
		t.Errorf("federation that has ended goes on, or %d updates are not 2", updates.Load())
	}

	// What does not hold is not taken, and told.
	for name, bad := range map[string]struct {
		svid *x509svid.SVID
		ca   *spiffetest.CA
		want string
	}{
		"other id":          {ca.Issue(clientID), ca, "offers " + clientID + ", not " + serverID},
		"unknown authority": {spiffetest.NewCA(t, "knhk.test").Issue(serverID), ca, "does not verify"},
		"expired":           {ca.Issue(serverID, spiffetest.WithNotAfter(time.Now().Add(-time.Minute))), ca, "expired at"},
	} {
		before := failures.Load()
		api.Update([]*x509svid.SVID{bad.svid}, bad.ca)
		eventually(t, name, func() bool { return failures.Load() > before && log.count(bad.want) > 0 })
		if serialOf(t, s) != serialHex(second.Certificates[0]) {
			t.Fatalf("%s: it was taken", name)
		}
	}

	// The issuer stops and comes back, also with the code after which the client gives up.
	for _, code := range []codes.Code{codes.Unavailable, codes.Canceled, codes.InvalidArgument} {
		before := failures.Load()
		api.Fail(code)
		eventually(t, code.String(), func() bool { return failures.Load() > before })
		next := ca.Issue(serverID)
		api.Update([]*x509svid.SVID{next}, ca)
		eventually(t, "the SVID after "+code.String(), func() bool { return serialOf(t, s) == serialHex(next.Certificates[0]) })
	}
	api.Stop()
	eventually(t, "the log to say where nobody answers", func() bool { return log.count("there is no socket") > 0 })
	next := ca.Issue(serverID)
	api.Update([]*x509svid.SVID{next}, ca)
	api.Start()
	eventually(t, "the SVID after the restart", func() bool { return serialOf(t, s) == serialHex(next.Certificates[0]) })
}

// An issuer that dies: the last SVID serves until it expires, then nothing does.
func TestWorkloadAPIDies(t *testing.T) {
	ca := spiffetest.NewCA(t, "knhk.test")
	api := spiffetest.NewWorkloadAPI(t)
	svid := ca.Issue(serverID)
	api.Update([]*x509svid.SVID{svid}, ca)
	var ahead atomic.Int64
	var log journal
	cfg := apiConfig(api)
	cfg.Log, cfg.Now = log.logger(), func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	s := mustOpen(t, cfg)
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- s.Run(ctx) }()
	api.Stop()
	eventually(t, "the failure to be told", func() bool { return log.count("the last one stays in use") == 1 })
	if err := s.Ready(); err != nil {
		t.Fatal(err)
	}
	ahead.Store(int64(2 * time.Hour))
	wantError(t, "Ready", s.Ready(), "expired at", api.Addr)
	_, err := s.GetX509SVID()
	wantError(t, "GetX509SVID", err, "expired at")
	eventually(t, "the end to be told", func() bool { return log.count("every TLS handshake fails") == 1 })
	cancel()
	if err := <-ran; err != nil {
		t.Fatal(err)
	}
}

// A federated domain's bundle that does not hold is left out and takes nobody down; our own is refused.
func TestWorkloadAPIHostileBundle(t *testing.T) {
	ca, partner := spiffetest.NewCA(t, "knhk.test"), spiffetest.NewCA(t, "partner.test")
	leaf := partner.Issue("spiffe://partner.test/envoy").Certificates[0]
	svid := ca.Issue(serverID)
	chain, key, err := svid.MarshalRaw()
	if err != nil {
		t.Fatal(err)
	}
	api := spiffetest.NewWorkloadAPI(t)
	response := func(own, federated []byte) *workload.X509SVIDResponse {
		return &workload.X509SVIDResponse{Svids: []*workload.X509SVID{{SpiffeId: serverID, X509Svid: chain, X509SvidKey: key, Bundle: own}},
			FederatedBundles: map[string][]byte{partner.TrustDomain.IDString(): federated}}
	}
	for name, federated := range map[string][]byte{"a leaf": leaf.Raw, "nothing": nil} {
		api.UpdateRaw(response(ca.Certificate.Raw, federated))
		var log journal
		cfg := apiConfig(api)
		cfg.Log = log.logger()
		s := mustOpen(t, cfg)
		if _, err := s.GetX509BundleForTrustDomain(partner.TrustDomain); err == nil || log.count("is left out") != 1 {
			t.Errorf("%s: it is believed, or nobody was told:\n%s", name, &log)
		}
	}
	for name, own := range map[string][]byte{"no authority": nil, "a leaf": leaf.Raw, "rubbish": []byte("rubbish")} {
		api.UpdateRaw(response(own, partner.Certificate.Raw))
		if _, err := open(t.Context(), apiConfig(api), 300*time.Millisecond); err == nil {
			t.Errorf("%s: it is taken", name)
		}
	}
}

// Open says what is wrong and what to do about it.
func TestWorkloadAPIOpenFails(t *testing.T) {
	ca := spiffetest.NewCA(t, "knhk.test")
	api := spiffetest.NewWorkloadAPI(t)
	dir, err := os.MkdirTemp("/tmp", "spiffe")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	try := func(what, addr string, want ...string) {
		t.Helper()
		s, err := open(t.Context(), Config{ID: spiffeid.RequireFromString(serverID), WorkloadAPI: addr}, 300*time.Millisecond)
		wantError(t, what, err, want...)
		if err == nil {
			s.Close()
		}
	}
	try("no socket", "unix:"+dir+"/none", "no SVID within 300ms", "there is no socket "+dir+"/none", "start the SPIFFE agent")
	try("a file", "unix:"+file, "is no socket")
	try("not registered", api.Addr, "knows no workload like this process", "register "+serverID, "PermissionDenied")
	api.Update([]*x509svid.SVID{ca.Issue(clientID), ca.Issue("spiffe://knhk.test/x")}, ca)
	try("other ids", api.Addr, "offers "+clientID+", spiffe://knhk.test/x, not "+serverID, "identity.spiffe_id")
	for _, addr := range []string{"tcp://127.0.0.1:8081", "/run/agent.sock", "unix:agent.sock", "unix://host/path", "unix:", "unix:///a?b=c"} {
		try(addr, addr, "workload api")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = Open(ctx, Config{ID: spiffeid.RequireFromString(serverID), WorkloadAPI: "unix:" + dir + "/none"})
	wantError(t, "cancelled", err, "canceled")
	api.Update([]*x509svid.SVID{ca.Issue(serverID)}, ca)
	s, err := Open(t.Context(), Config{ID: spiffeid.RequireFromString(serverID), WorkloadAPI: "unix://" + api.Addr[len("unix:"):]})
	if err != nil {
		t.Fatal(err) // the form of SPIFFE_ENDPOINT_SOCKET
	}
	s.Close()
}
