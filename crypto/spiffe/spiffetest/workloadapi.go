package spiffetest

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// WorkloadAPI is a fake SPIFFE Workload API on a unix socket: it speaks the protocol to the real client, but gives everybody who can open
// the socket whatever the test has set, and asks nobody who he is.
type WorkloadAPI struct {
	// Addr is where it serves, as Config.WorkloadAPI wants it: "unix:/path".
	Addr string

	t    testing.TB
	path string

	mu      sync.Mutex
	current *workload.X509SVIDResponse
	failure error
	changed chan struct{} // closed and replaced when something changes
	server  *grpc.Server
}

// NewWorkloadAPI serves on a socket of its own below /tmp until the test ends. Until Update or Fail it refuses everybody with
// PermissionDenied, as an agent does that does not know the workload.
func NewWorkloadAPI(t testing.TB) *WorkloadAPI {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "spiffetest") // a socket's path has 107 bytes, whatever $TMPDIR is
	if err != nil {
		t.Fatal(err)
	}
	w := &WorkloadAPI{
		t: t, path: filepath.Join(dir, "api.sock"),
		failure: status.Error(codes.PermissionDenied, "no identity issued"), changed: make(chan struct{}),
	}
	w.Addr = "unix:" + w.path
	w.Start()
	t.Cleanup(func() {
		w.Stop()
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return w
}

// Update gives these SVIDs to every stream, also to those that are open, in this order. Each one's bundle is that of the own authority with
// its trust domain; the authorities of other trust domains are federated. Several of one trust domain make one bundle.
func (w *WorkloadAPI) Update(svids []*x509svid.SVID, authorities ...*CA) {
	w.t.Helper()
	bundles := map[string][]byte{}
	for _, ca := range authorities {
		id := ca.TrustDomain.IDString()
		bundles[id] = append(bundles[id], ca.Certificate.Raw...)
	}
	r := &workload.X509SVIDResponse{FederatedBundles: map[string][]byte{}}
	own := map[string]bool{}
	for _, s := range svids {
		key, err := x509.MarshalPKCS8PrivateKey(s.PrivateKey)
		if err != nil {
			w.t.Fatal(err)
		}
		var chain []byte
		for _, c := range s.Certificates {
			chain = append(chain, c.Raw...)
		}
		td := s.ID.TrustDomain().IDString()
		own[td] = true
		r.Svids = append(r.Svids, &workload.X509SVID{SpiffeId: s.ID.String(), X509Svid: chain, X509SvidKey: key, Bundle: bundles[td]})
	}
	for id, der := range bundles {
		if !own[id] {
			r.FederatedBundles[id] = der
		}
	}
	w.set(r, nil)
}

// UpdateRaw gives this response, whatever is in it.
func (w *WorkloadAPI) UpdateRaw(r *workload.X509SVIDResponse) { w.set(r, nil) }

// Fail ends every stream with an error of this code, also those to come.
func (w *WorkloadAPI) Fail(code codes.Code) { w.set(nil, status.Error(code, "as the test wants it")) }

// Stop ends the server and its streams, and takes the socket away. Stopping twice does nothing.
func (w *WorkloadAPI) Stop() {
	w.mu.Lock()
	server := w.server
	w.server = nil
	w.mu.Unlock()
	if server != nil {
		server.Stop()
	}
}

// Start serves again after Stop, on the same address.
func (w *WorkloadAPI) Start() {
	w.t.Helper()
	l, err := net.Listen("unix", w.path)
	if err != nil {
		w.t.Fatal(err)
	}
	server := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(server, &workloadService{w: w})
	w.mu.Lock()
	w.server = server
	w.mu.Unlock()
	go func() {
		if err := server.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			w.t.Error(err)
		}
	}()
}

func (w *WorkloadAPI) set(r *workload.X509SVIDResponse, failure error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.current, w.failure = r, failure
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *WorkloadAPI) get() (*workload.X509SVIDResponse, <-chan struct{}, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.current, w.changed, w.failure
}

type workloadService struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	w *WorkloadAPI
}

func (s *workloadService) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if err := secured(stream.Context()); err != nil {
		return err
	}
	for {
		r, changed, failure := s.w.get()
		if failure != nil {
			return failure
		}
		if err := stream.Send(r); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return nil
		}
	}
}

// secured asks for the header that keeps other protocols out (SPIFFE Workload Endpoint, section 3).
func secured(ctx context.Context) error {
	if md, _ := metadata.FromIncomingContext(ctx); len(md.Get("workload.spiffe.io")) != 1 {
		return status.Error(codes.InvalidArgument, "security header missing from request")
	}
	return nil
}
