package stack

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/spire"
)

// Who is who in a stack with Config.Identity.
const (
	TrustDomain = "knhk.test"
	KnhkID      = "spiffe://" + TrustDomain + "/knhk"
	EnvoyID     = "spiffe://" + TrustDomain + "/envoy"
	UpstreamID  = "spiffe://" + TrustDomain + "/upstream"
	OperatorID  = "spiffe://" + TrustDomain + "/operator"
	ClientID    = "spiffe://" + TrustDomain + "/client" // may call Envoy
	BriefID     = "spiffe://" + TrustDomain + "/brief"  // may as well
)

// Identity has everybody in the stack prove who he is: mutual TLS between clients and Envoy, Envoy and knhk, Envoy and the upstream, and
// for the commands. Each one's SVID comes from the Workload API or SDS of an issuer, which knows programs by their executable.
type Identity struct {
	// SPIRE is the directory with SPIRE's programs (see e2e/spire.Build). Empty: the development issuer, `knhk dev-issuer`.
	SPIRE string
	// TTL of SVIDs. Default a minute.
	TTL time.Duration
	// Workloads are more programs: copies of e2e/svid, for Stack.SVID, beside "client", who may call Envoy.
	Workloads []Workload
	// Write has the development issuer keep PEM files for curl and the like, in Dir/client and Dir/operator.
	Write bool
}

// Workload is a program and who it is.
type Workload struct {
	Name string // of the copy
	ID   string // any trust domain below .test
	TTL  time.Duration
}

// svid is what e2e/svid prints.
type svid struct {
	ID          string
	Certificate string
	Key         string
	Bundles     map[string]string
}

// SVID is somebody's certificate and the bundles that came with it.
type SVID struct {
	*x509svid.SVID
	Bundles *x509bundle.Set
}

// issuing is the part of a stack that has issuers.
type issuing struct {
	sockets  map[string]string // by trust domain
	short    string            // directory of the sockets, if it is not below Dir
	dev      *harness.Process
	spires   []*spire.SPIRE
	upstream *workloadapi.X509Source // of this process

	mu     sync.Mutex
	client *SVID // the last one that Do has used
}

var buildSVID = sync.OnceValues(func() (string, error) {
	root, err := harness.ModuleRoot()
	if err != nil {
		return "", err
	}
	bin := filepath.Join(root, "bin", "svid")
	cmd := exec.Command("go", "build", "-o", bin, "./e2e/svid")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build svid: %w\n%s", err, out)
	}
	return bin, nil
})

// Program is the path of a copy of e2e/svid, whether or not it is one of Identity.Workloads.
func (s *Stack) Program(name string) (string, error) {
	bin, err := buildSVID()
	if err != nil {
		return "", err
	}
	to := filepath.Join(s.Dir, "programs", name)
	if _, err := os.Stat(to); err == nil {
		return to, nil
	}
	return to, copyProgram(bin, to)
}

func copyProgram(from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o700)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// registered is everybody who gets an SVID, by executable.
func (s *Stack) registered() ([]spire.Workload, error) {
	envoy, err := harness.FindEnvoy()
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	// Copies: an executable that somebody builds anew is nobody's any more.
	s.server, s.cli = filepath.Join(s.Dir, "programs", "knhk-serve"), filepath.Join(s.Dir, "programs", "knhk")
	if err := errors.Join(copyProgram(cmp.Or(s.race, s.Bin), s.server), copyProgram(s.Bin, s.cli)); err != nil {
		return nil, err
	}
	all := []spire.Workload{{Exe: s.server, ID: KnhkID}, {Exe: envoy, ID: EnvoyID, DNS: []string{"localhost"}}, {Exe: self, ID: UpstreamID}, {Exe: s.cli, ID: OperatorID}}
	for _, w := range append([]Workload{{Name: "client", ID: ClientID}}, s.Identity.Workloads...) {
		exe, err := s.Program(w.Name)
		if err != nil {
			return nil, err
		}
		all = append(all, spire.Workload{Exe: exe, ID: w.ID, TTL: w.TTL})
	}
	for i := range all {
		if all[i].Exe, err = filepath.EvalSymlinks(all[i].Exe); err != nil {
			return nil, err
		}
		if all[i].TTL == 0 {
			all[i].TTL = s.Identity.TTL
		}
	}
	return all, nil
}

// startIssuer starts the issuer and waits until this process has its SVID.
func (s *Stack) startIssuer(ctx context.Context) error {
	identity := *s.Identity
	identity.TTL = cmp.Or(identity.TTL, time.Minute)
	s.Identity = &identity
	s.issuing = &issuing{sockets: map[string]string{}}
	all, err := s.registered()
	if err != nil {
		return err
	}
	if s.Identity.SPIRE != "" {
		err = s.startSPIRE(ctx, all)
	} else {
		err = s.startDevIssuer(ctx, all)
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, harness.Patience)
	defer cancel()
	s.issuing.upstream, err = workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(s.WorkloadAPI(TrustDomain))))
	if err != nil {
		return fmt.Errorf("SVID of the upstream: %w", err)
	}
	return nil
}

// socketDir is Dir, or a directory below /tmp where its path is too long for a socket's: the kernel takes 107 bytes.
func (s *Stack) socketDir() (dir string, err error) {
	if len(s.Dir) > 70 {
		s.issuing.short, err = os.MkdirTemp("/tmp", "knhk-")
		return s.issuing.short, err
	}
	return s.Dir, nil
}

func (s *Stack) startDevIssuer(ctx context.Context, all []spire.Workload) error {
	dir, err := s.socketDir()
	if err != nil {
		return err
	}
	socket := filepath.Join(dir, "issuer.sock")
	args := []string{"dev-issuer", "--socket", socket, "--ttl", s.Identity.TTL.String(), "--log-level", "debug"}
	for _, w := range all {
		args = append(args, "--id", w.Exe+"="+w.ID)
		s.issuing.sockets[spiffeid.RequireFromString(w.ID).TrustDomain().Name()] = socket
		if w.TTL != s.Identity.TTL {
			args = append(args, "--ttl", w.ID+"="+w.TTL.String())
		}
	}
	if s.Identity.Write {
		args = append(args, "--write", filepath.Join(s.Dir, "client")+"="+ClientID, "--write", filepath.Join(s.Dir, "operator")+"="+OperatorID)
	}
	s.issuing.dev, err = harness.StartProcess(ctx, harness.ProcessConfig{
		Name: "dev-issuer", Path: s.Bin, Args: args, Log: filepath.Join(s.Dir, "dev-issuer.log"),
		Ready: func(context.Context) error { _, err := os.Stat(socket); return err },
	})
	return err
}

// startSPIRE starts a SPIRE for each trust domain.
func (s *Stack) startSPIRE(ctx context.Context, all []spire.Workload) error {
	dir, err := s.socketDir()
	if err != nil {
		return err
	}
	byDomain := map[string][]spire.Workload{}
	for _, w := range all {
		td := spiffeid.RequireFromString(w.ID).TrustDomain().Name()
		byDomain[td] = append(byDomain[td], w)
	}
	for td, workloads := range byDomain {
		one, err := spire.Start(ctx, spire.Config{Programs: s.Identity.SPIRE, Dir: filepath.Join(dir, "spire-"+td), TrustDomain: td, TTL: s.Identity.TTL})
		if err != nil {
			return err
		}
		s.issuing.spires = append(s.issuing.spires, one)
		s.issuing.sockets[td] = one.Socket()
		if err := one.Register(ctx, workloads...); err != nil {
			return err
		}
	}
	return nil
}

func (s *Stack) stopIssuer(ctx context.Context) error {
	if s.issuing == nil {
		return nil
	}
	var errs []error
	if s.issuing.upstream != nil {
		errs = append(errs, s.issuing.upstream.Close())
	}
	if s.issuing.dev != nil {
		errs = append(errs, s.issuing.dev.Stop(ctx))
	}
	for _, one := range s.issuing.spires {
		errs = append(errs, one.Stop(ctx))
	}
	if s.issuing.short != "" {
		errs = append(errs, os.RemoveAll(s.issuing.short))
	}
	return errors.Join(errs...)
}

// WorkloadAPI is the address of a trust domain's Workload API, "unix:/path".
func (s *Stack) WorkloadAPI(trustDomain string) string {
	return "unix:" + s.issuing.sockets[trustDomain]
}

// upstreamTLS lets Envoy in, and nobody else.
func (s *Stack) upstreamTLS() *tls.Config {
	if s.issuing == nil {
		return nil
	}
	id := spiffeid.RequireFromString(EnvoyID)
	return tlsconfig.MTLSServerConfig(s.issuing.upstream, s.issuing.upstream, tlsconfig.AuthorizeID(id))
}

// identityYAML is what knhk.yaml says of identities, and what envoy says of it.
func (s *Stack) identityYAML() (head, envoy string) {
	if s.issuing == nil {
		return "insecure_loopback: true\n", ""
	}
	head = fmt.Sprintf("identity: {spiffe_id: %q, workload_api: %q, svid_ttl: %s}\nroles: {envoy: [%q], operator: [%q]}\n",
		KnhkID, s.WorkloadAPI(TrustDomain), s.Identity.TTL, EnvoyID, OperatorID)
	return head, fmt.Sprintf("  tls: {spiffe_id: %q, clients: [%q, %q]}\n", EnvoyID, ClientID, BriefID)
}

// ErrNoIdentity says that the issuer gives nothing to a program.
var ErrNoIdentity = errors.New("no identity issued")

// SVID has a program fetch its SVID from the issuer of a trust domain. A program that is one of the workloads waits for it, others do not:
// they get ErrNoIdentity.
func (s *Stack) SVID(ctx context.Context, name, trustDomain string) (*SVID, error) {
	exe, err := s.Program(name)
	if err != nil {
		return nil, err
	}
	args := []string{"-socket", s.WorkloadAPI(trustDomain)}
	known := func(w Workload) bool { return w.Name == name && strings.HasPrefix(w.ID, "spiffe://"+trustDomain+"/") }
	if name == "client" || slices.ContainsFunc(s.Identity.Workloads, known) {
		args = append(args, "-wait", harness.Patience.String())
	}
	out, err := exec.CommandContext(ctx, exe, args...).Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		err = fmt.Errorf("SVID of %s: %s", name, strings.TrimSpace(string(exit.Stderr)))
		if exit.ExitCode() == 3 {
			err = fmt.Errorf("%w: %w", ErrNoIdentity, err)
		}
	}
	if err != nil {
		return nil, err
	}
	var raw svid
	if err := json.Unmarshal(out, &raw); err != nil {
		return nil, fmt.Errorf("SVID of %s: %w", name, err)
	}
	own, err := x509svid.Parse([]byte(raw.Certificate), []byte(raw.Key))
	if err != nil {
		return nil, fmt.Errorf("SVID of %s: %w", name, err)
	}
	set := x509bundle.NewSet()
	for td, pem := range raw.Bundles {
		b, err := x509bundle.Parse(spiffeid.RequireTrustDomainFromString(td), []byte(pem))
		if err != nil {
			return nil, fmt.Errorf("SVID of %s: %w", name, err)
		}
		set.Add(b)
	}
	return &SVID{own, set}, nil
}

// TLS is mutual TLS with v to a server that must have this ID.
func (v *SVID) TLS(server string) *tls.Config {
	return tlsconfig.MTLSClientConfig(v, v.Bundles, tlsconfig.AuthorizeID(spiffeid.RequireFromString(server)))
}

// Client is the SVID of "client", fetched anew when half of its life has passed, as issuers renew it.
func (s *Stack) Client(ctx context.Context) (*SVID, error) {
	s.issuing.mu.Lock()
	defer s.issuing.mu.Unlock()
	if v := s.issuing.client; v != nil && time.Until(v.Certificates[0].NotAfter) > s.Identity.TTL/2 {
		return v, nil
	}
	v, err := s.SVID(ctx, "client", TrustDomain)
	if err == nil {
		s.issuing.client = v
	}
	return v, err
}

// Dial connects to Envoy as "client" does: with TLS if there is Config.Identity.
func (s *Stack) Dial(ctx context.Context) (*harness.Conn, error) {
	if s.issuing == nil {
		return harness.Dial(ctx, s.Listener)
	}
	v, err := s.Client(ctx)
	if err != nil {
		return nil, err
	}
	return harness.DialTLS(ctx, s.Listener, v.TLS(EnvoyID))
}
