package devissuer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// Run writes the directories, serves the socket and renews SVIDs until ctx ends; that is no error. It takes the socket away at the end.
func (i *Issuer) Run(ctx context.Context) error {
	ln, err := i.listen(ctx)
	if err != nil {
		return fmt.Errorf("development issuer: %w", err)
	}
	if err := i.writeAll(); err != nil {
		return errors.Join(fmt.Errorf("development issuer: %w", err), ln.Close())
	}
	server := grpc.NewServer(grpc.Creds(peerCredentials{}), grpc.StreamInterceptor(secured))
	workload.RegisterSpiffeWorkloadAPIServer(server, &workloadAPI{i: i})
	secretv3.RegisterSecretDiscoveryServiceServer(server, &secretService{i: i})
	i.log.WarnContext(ctx, "DEVELOPMENT ONLY: issuing SVIDs to programs of this user", "socket", i.cfg.Socket, "programs", len(i.byExe), "directories", len(i.cfg.Directories))
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return server.Serve(ln) })
	g.Go(func() error {
		defer server.Stop()
		i.keepRenewing(ctx)
		return nil
	})
	if err := g.Wait(); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("development issuer: %w", err)
	}
	return nil
}

// keepRenewing looks at the clock rather than sleeping until an SVID is due: a machine that was suspended has other clocks than timers.
func (i *Issuer) keepRenewing(ctx context.Context) {
	tick := time.NewTicker(i.book.poll())
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		renewed, err := i.book.renew()
		if err != nil {
			i.log.ErrorContext(ctx, "renew SVIDs", "error", err)
		}
		for _, s := range renewed {
			i.log.DebugContext(ctx, "SVID renewed", "id", s.id.String(), "serial", s.serial, "not_after", s.notAfter)
			if err := i.write(s); err != nil {
				i.log.ErrorContext(ctx, "write a renewed SVID", "id", s.id.String(), "error", err)
			}
		}
	}
}

// listen makes the socket, for its owner only from its first moment on: it gets its name when its mode is right. A socket that a dead
// process left is replaced; one that somebody serves is not.
func (i *Issuer) listen(ctx context.Context) (net.Listener, error) {
	name := i.cfg.Socket
	switch info, err := os.Lstat(name); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case info.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("listen on %s: something else is there, not a socket", name)
	default:
		if c, err := net.DialTimeout("unix", name, time.Second); err == nil {
			c.Close()
			return nil, fmt.Errorf("listen on %s: somebody is serving there", name)
		}
		if err := os.Remove(name); err != nil {
			return nil, err
		}
	}
	// The mode of a socket's file is that of the descriptor when it is bound (unix(7)), so that no moment is left to connect in.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmod error
		if err := c.Control(func(fd uintptr) { chmod = unix.Fchmod(int(fd), 0o600) }); err != nil {
			return err
		}
		return chmod
	}}
	ln, err := lc.Listen(ctx, "unix", name)
	if err != nil {
		return nil, err
	}
	if info, err := os.Lstat(name); err != nil || info.Mode().Perm()&0o077 != 0 {
		return nil, errors.Join(fmt.Errorf("listen on %s: others than its owner could connect: %w", name, err), ln.Close())
	}
	return ln, nil
}

// caller says who asks: the program at the other end of the connection, as the kernel names it.
func (i *Issuer) caller(ctx context.Context) (spiffeid.ID, error) {
	p, _ := peer.FromContext(ctx)
	info, ok := p.AuthInfo.(peerInfo)
	if !ok {
		return spiffeid.ID{}, status.Error(codes.PermissionDenied, "no identity issued: the caller is unknown")
	}
	if info.uid != i.uid {
		i.log.WarnContext(ctx, "refused: a process of another user", "exe", info.exe, "uid", info.uid)
		return spiffeid.ID{}, status.Error(codes.PermissionDenied, "no identity issued")
	}
	id, ok := i.byExe[info.exe]
	if !ok {
		i.log.WarnContext(ctx, "refused: a program that was not named", "exe", info.exe, "pid", info.pid)
		return spiffeid.ID{}, status.Error(codes.PermissionDenied, "no identity issued")
	}
	return id, nil
}

// peerInfo is what the kernel says of the process that made a connection.
type peerInfo struct {
	credentials.CommonAuthInfo
	uid uint32
	pid int32
	exe string // " (deleted)" at its end when the file was replaced since the program began: it is nobody then
}

// AuthType names it for gRPC.
func (peerInfo) AuthType() string { return "peercred" }

// peerCredentials has the kernel say who connects (unix(7), SO_PEERCRED). Nothing is encrypted: it never leaves the kernel.
type peerCredentials struct{}

// ServerHandshake asks once, when the connection is made. A process that is gone, or of another PID namespace, has no executable and is
// not let in.
func (peerCredentials) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, nil, errors.New("not a unix socket")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return nil, nil, err
	}
	if credErr != nil {
		return nil, nil, credErr
	}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", cred.Pid))
	if err != nil {
		return nil, nil, fmt.Errorf("executable of process %d: %w", cred.Pid, err)
	}
	return c, peerInfo{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, uid: cred.Uid, pid: cred.Pid, exe: exe}, nil
}

// ClientHandshake is not for us.
func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("for servers only")
}

// Info names the protocol for gRPC.
func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}

// Clone returns itself: there is nothing to change.
func (p peerCredentials) Clone() credentials.TransportCredentials { return p }

// OverrideServerName does nothing; grpc-go still asks for it.
func (peerCredentials) OverrideServerName(string) error { return nil }

// secured asks for the header that keeps requests out which a browser or proxy was tricked into sending (SPIFFE Workload Endpoint,
// section 3). SDS has none.
func secured(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if _, ok := srv.(*workloadAPI); ok {
		if md, _ := metadata.FromIncomingContext(stream.Context()); len(md.Get("workload.spiffe.io")) != 1 || md.Get("workload.spiffe.io")[0] != "true" {
			return status.Error(codes.InvalidArgument, "security header missing from request")
		}
	}
	return next(srv, stream)
}

// workloadAPI is the X.509 part of the SPIFFE Workload API. JWT-SVIDs are not issued.
type workloadAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	i *Issuer
}

// FetchX509SVID sends the caller's SVID, and each one that follows it.
func (w *workloadAPI) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	id, err := w.i.caller(stream.Context())
	if err != nil {
		return err
	}
	federated := map[string][]byte{}
	for td, a := range w.i.book.authorities {
		if td != id.TrustDomain() {
			federated[td.IDString()] = a.cert.Raw
		}
	}
	var sent *svid
	for {
		s, changed := w.i.book.get(id)
		if s != sent {
			if err := stream.Send(&workload.X509SVIDResponse{FederatedBundles: federated, Svids: []*workload.X509SVID{{
				SpiffeId: id.String(), X509Svid: s.cert, X509SvidKey: s.key, Bundle: w.i.book.authorities[id.TrustDomain()].cert.Raw,
			}}}); err != nil {
				return err
			}
			sent = s
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return nil
		}
	}
}

// FetchX509Bundles sends the bundles of all trust domains, which never change.
func (w *workloadAPI) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	if _, err := w.i.caller(stream.Context()); err != nil {
		return err
	}
	bundles := map[string][]byte{}
	for td, a := range w.i.book.authorities {
		bundles[td.IDString()] = a.cert.Raw
	}
	if err := stream.Send(&workload.X509BundlesResponse{Bundles: bundles}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}
