package examples

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/spiffe"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// Addresses in the examples.
const (
	adminAddr    = "127.0.0.1:9003"
	probesAddr   = "127.0.0.1:9005"
	listenerAddr = "127.0.0.1:10000"
	appAddr      = "127.0.0.1:8080"
	ordersAddr   = "127.0.0.1:8443"
)

// Who is who in the examples with TLS.
const (
	knhkID  = "spiffe://knhk.test/knhk"
	envoyID = "spiffe://knhk.test/envoy"
)

// site is one example at work.
type site struct {
	t        *testing.T
	name     string // of the directory below examples/
	dir      string // working directory of everything
	bin      string // the knhk program
	envoyBin string
	root     string
	replace  map[string]string // what stands in the example, and what the test has in its place
	app      *harness.Upstream
	who      string // directory with the PEM files of whoever asks for receipts; empty: in the plain
}

// An address in knhk.yaml, and one in what `knhk bootstrap` writes; all of them are on 127.0.0.1.
var (
	address = regexp.MustCompile(`127\.0\.0\.1:[0-9]+`)
	port    = regexp.MustCompile(`\bport_value: ([0-9]+)\b`)
)

// prepare finds the programs, and an address for each that the example names.
func prepare(t *testing.T, name string) *site {
	t.Helper()
	s := &site{t: t, name: name, envoyBin: harness.RequireEnvoy(t), dir: harness.Directory(t, ""), replace: map[string]string{}, app: harness.RunUpstream(t)}
	var err error
	if s.bin, err = stack.Build(); err != nil {
		t.Fatal(err)
	}
	if s.root, err = harness.ModuleRoot(); err != nil {
		t.Fatal(err)
	}
	s.replace[appAddr] = s.app.HTTP()
	files, err := filepath.Glob(filepath.Join(s.root, "examples", name, "*.yaml"))
	if err != nil || len(files) < 2 {
		t.Fatalf("example %s: %d files, %v", name, len(files), err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range address.FindAll(b, -1) {
			if s.replace[string(a)] == "" {
				s.replace[string(a)] = freeAddr(t)
			}
		}
	}
	return s
}

func freeAddr(t *testing.T) string {
	t.Helper()
	a, err := harness.FreeAddr()
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// addr is where the test has what stands in the example under this address.
func (s *site) addr(printed string) string {
	s.t.Helper()
	a, ok := s.replace[printed]
	if !ok {
		s.t.Fatalf("example %s does not name %s", s.name, printed)
	}
	return a
}

// file writes a file of the example, as the test has it, and returns its path below the working directory.
func (s *site) file(name string) string {
	s.t.Helper()
	b, err := os.ReadFile(filepath.Join(s.root, "examples", s.name, name))
	if err != nil {
		s.t.Fatal(err)
	}
	// The longer one first: 127.0.0.1:1000 is no part of 127.0.0.1:10000.
	var pairs []string
	for from := range s.replace {
		pairs = append(pairs, from)
	}
	slices.SortFunc(pairs, func(a, b string) int { return len(b) - len(a) })
	var both []string
	for _, from := range pairs {
		both = append(both, from, s.replace[from])
	}
	dir := filepath.Join("examples", s.name)
	if err := os.MkdirAll(filepath.Join(s.dir, dir), 0o700); err != nil {
		s.t.Fatal(err)
	}
	out := filepath.Join(dir, name)
	text := port.ReplaceAllStringFunc(strings.NewReplacer(both...).Replace(string(b)), func(m string) string {
		_, to, err := net.SplitHostPort(s.addr("127.0.0.1:" + port.FindStringSubmatch(m)[1]))
		if err != nil {
			s.t.Fatal(err)
		}
		return "port_value: " + to
	})
	if err := os.WriteFile(filepath.Join(s.dir, out), []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return out
}

// start starts knhk and Envoy, as the README does.
func (s *site) start(config, envoy string) {
	s.t.Helper()
	ready := s.replace[probesAddr]
	if ready == "" {
		ready = s.addr(adminAddr)
	}
	harness.RunProcess(s.t, harness.ProcessConfig{
		Name: "knhk", Path: s.bin, Args: []string{"serve", "--config", s.file(config)}, Dir: s.dir, Log: filepath.Join(s.dir, "knhk.log"),
		Ready: harness.HTTPReady("http://" + ready + "/readyz"),
	})
	b, err := os.ReadFile(filepath.Join(s.dir, s.file(envoy)))
	if err != nil {
		s.t.Fatal(err)
	}
	harness.RunEnvoy(s.t, harness.EnvoyConfig{Binary: s.envoyBin, Bootstrap: b, Dir: s.dir, Work: s.dir})
}

// knhk runs a command in the working directory and returns its standard output.
func (s *site) knhk(args ...string) []byte {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), harness.Patience)
	defer cancel()
	return s.run(exec.CommandContext(ctx, s.bin, args...))
}

func (s *site) run(cmd *exec.Cmd) []byte {
	s.t.Helper()
	cmd.Dir = s.dir
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		s.t.Fatalf("%s: %v\n%s%s", strings.Join(cmd.Args, " "), err, out.Bytes(), errOut.Bytes())
	}
	return out.Bytes()
}

// call is a request and what must become of it.
type call struct {
	name   string
	client *http.Client
	method string // default GET
	path   string
	header map[string]string
	status int
	want   judged
}

// judged is what a receipt says of a decision: of a client (its SPIFFE ID), by an authorisation rule.
type judged struct {
	verdict, reason, client, authz string
	dryRun                         bool
}

// check sends the request, and verifies the receipt that comes back.
func (s *site) check(url string, c call) {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), c.method, url+c.path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	for k, v := range c.header {
		req.Header.Set(k, v)
	}
	resp, err := c.client.Do(req)
	if err != nil {
		s.t.Errorf("%s: %v", c.name, err)
		return
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || resp.StatusCode != c.status {
		s.t.Errorf("%s: status %d, want %d: %s (%v)", c.name, resp.StatusCode, c.status, body, err)
		return
	}
	id := resp.Header.Get("x-knhk-receipt")
	if id == "" {
		s.t.Errorf("%s: no receipt: %v", c.name, resp.Header)
		return
	}
	d := s.decision(id)
	got := judged{d.Verdict, d.Reason, d.SPIFFEID, d.Authz, d.DryRun}
	if got != c.want {
		s.t.Errorf("%s: receipt %+v, want %+v", c.name, got, c.want)
	}
}

// decision fetches a receipt with its outcome and verifies it.
func (s *site) decision(id string) receipt.Decision {
	s.t.Helper()
	args := []string{"receipts", "get", "--admin", s.addr(adminAddr), "--wait", "30s", id}
	if s.who != "" {
		pem := filepath.Join(s.dir, s.who)
		args = append(args, "--server-id", knhkID, "--cert", filepath.Join(pem, "certificate.pem"), "--key", filepath.Join(pem, "key.pem"), "--ca", filepath.Join(pem, "bundle.pem"))
	}
	b, err := receipt.ParseBundle(s.knhk(args...))
	if err != nil {
		s.t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(s.dir, "run", s.state(), "state", "policy"))
	if err != nil {
		s.t.Fatal(err)
	}
	p, err := receipt.ParsePolicy(text)
	if err != nil {
		s.t.Fatal(err)
	}
	v, err := receipt.Verify(p, b)
	if err != nil {
		s.t.Fatal(err)
	}
	if v.Pending() {
		s.t.Errorf("receipt %s has no outcome", id)
	}
	return v.Decision
}

// state is the name of the one directory below run/ that has a log.
func (s *site) state() string {
	s.t.Helper()
	found, err := filepath.Glob(filepath.Join(s.dir, "run", "*", "state"))
	if err != nil || len(found) != 1 {
		s.t.Fatalf("%d state directories, %v", len(found), err)
	}
	return filepath.Base(filepath.Dir(found[0]))
}

// plain is a client without a certificate.
func (s *site) plain() *http.Client {
	c := &http.Client{Transport: &http.Transport{}, Timeout: harness.Patience}
	s.t.Cleanup(c.CloseIdleConnections)
	return c
}

// identity opens the PEM files in a directory below the working directory.
func (s *site) identity(dir, id string) *spiffe.Source {
	s.t.Helper()
	dir = filepath.Join(s.dir, dir)
	var src *spiffe.Source
	var err error
	// Whoever writes them writes one after the other.
	harness.Eventually(s.t, "certificate of "+id, func() bool {
		src, err = spiffe.Open(s.t.Context(), spiffe.Config{ID: spiffeid.RequireFromString(id), Files: &spiffe.Files{
			Certificate: filepath.Join(dir, "certificate.pem"), Key: filepath.Join(dir, "key.pem"), CA: filepath.Join(dir, "bundle.pem")}})
		return err == nil
	})
	s.t.Cleanup(func() { _ = src.Close() })
	return src
}

// client is a client with the certificate in a directory, which wants to talk to server and nobody else.
func (s *site) client(dir, id, server string) *http.Client {
	s.t.Helper()
	tr := &http.Transport{TLSClientConfig: s.identity(dir, id).ClientTLS([]string{"http/1.1"}, only(server))}
	s.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: harness.Patience}
}

// trusting is TLS without a certificate that takes whoever answers: what refuses it is the server.
func trusting() *tls.Config { return &tls.Config{InsecureSkipVerify: true} } //nolint:gosec // the server must refuse

func only(want string) func(spiffeid.ID) error {
	return func(id spiffeid.ID) error {
		if id.String() != want {
			return fmt.Errorf("%s is at the other end, not %s", id, want)
		}
		return nil
	}
}

// refused wants no answer at all: the handshake, or what stands for it in TLS 1.3, the first read, fails.
func (s *site) refused(name string, c *http.Client, url string) {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), http.MethodGet, url, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	begun := time.Now()
	resp, err := c.Do(req)
	if err == nil {
		resp.Body.Close()
		s.t.Errorf("%s: %s answers %d", name, url, resp.StatusCode)
	} else if time.Since(begun) >= harness.Patience {
		s.t.Errorf("%s: %s lets it wait: %v", name, url, err)
	}
}
