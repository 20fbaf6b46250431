package devissuer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// patience bounds every wait; a machine that is slow has not failed.
const patience = 2 * time.Minute

// asClient has the test binary be another program: it asks the socket named here for its SVID and prints the answer.
const asClient = "KNHK_TEST_WORKLOAD_API"

func TestMain(m *testing.M) {
	if socket := os.Getenv(asClient); socket != "" {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		c, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr("unix:"+socket))
		if err != nil {
			os.Stdout.WriteString(err.Error())
			os.Exit(3)
		}
		os.Stdout.WriteString(c.DefaultSVID().ID.String())
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func self(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

// place is a short directory: a socket's path has 107 bytes, whatever $TMPDIR is.
func place(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "knhk-dev-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// lines is a log that can be read while it is written.
type lines struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// run runs an issuer until the test ends, and returns its socket and log.
func run(t *testing.T, cfg Config) (socket string, log *lines) {
	t.Helper()
	log = &lines{}
	cfg.Socket = filepath.Join(place(t), "s")
	cfg.Log = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	i, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- i.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(cfg.Socket); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the socket is still there: %v", err)
		}
	})
	eventually(t, "the socket is there", func() bool {
		select {
		case err := <-done:
			t.Fatalf("ended: %v", err)
		default:
		}
		c, err := net.Dial("unix", cfg.Socket)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return cfg.Socket, log
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

var (
	alice = spiffeid.RequireFromString("spiffe://a.test/alice")
	bob   = spiffeid.RequireFromString("spiffe://b.local/bob")
)

// A real client, go-spiffe's, gets its SVID and all bundles, and sees them renewed; TLS between two of them works.
func TestWorkloadAPI(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	socket, _ := run(t, Config{Programs: []Program{{self(t), alice}}, Directories: []Directory{{filepath.Join(place(t), "bob"), bob}}, TTL: MinTTL})
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v; want mode 0600", info.Mode(), err)
	}
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix:"+socket)))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	first, err := source.GetX509SVID()
	if err != nil || first.ID != alice {
		t.Fatalf("SVID of %v: %v", first.ID, err)
	}
	if got := first.Certificates[0].NotAfter.Sub(time.Now()); got > MinTTL || got < -patience {
		t.Errorf("lives for %v, want %v", got, MinTTL)
	}
	for _, id := range []spiffeid.ID{alice, bob} {
		b, err := source.GetX509BundleForTrustDomain(id.TrustDomain())
		if err != nil || len(b.X509Authorities()) != 1 {
			t.Fatalf("bundle of %s: %v", id.TrustDomain(), err)
		}
		if _, err := first.Certificates[0].Verify(x509.VerifyOptions{Roots: pool(b.X509Authorities()), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
			CurrentTime: first.Certificates[0].NotBefore}); (err == nil) != (id == alice) {
			t.Errorf("the authority of %s signed for %s: %v", id.TrustDomain(), alice, err)
		}
	}
	bundles, err := workloadapi.FetchX509Bundles(ctx, workloadapi.WithAddr("unix:"+socket))
	if err != nil || bundles.Len() != 2 {
		t.Errorf("%v bundles: %v", bundles, err)
	}
	for range 2 {
		eventually(t, "a renewed SVID", func() bool {
			next, err := source.GetX509SVID()
			if err != nil || next.Certificates[0].SerialNumber.Cmp(first.Certificates[0].SerialNumber) == 0 {
				return false
			}
			first = next
			return true
		})
	}

	ln, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeID(alice)))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.NotFoundHandler()}
	go server.Serve(ln)
	defer server.Close()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(alice))}}
	defer client.CloseIdleConnections()
	eventually(t, "a request with both SVIDs", func() bool { // one may expire between handshake and check on a slow machine
		resp, err := client.Get("https://" + ln.Addr().String())
		if err != nil {
			return false
		}
		resp.Body.Close()
		return true
	})
}

func pool(certs []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AddCert(c)
	}
	return p
}

// Who does not say the security header is refused: a client that was not written for this.
func TestSecurityHeader(t *testing.T) {
	socket, _ := run(t, Config{Programs: []Program{{self(t), alice}}})
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := workload.NewSpiffeWorkloadAPIClient(conn)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := c.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err == nil {
		_, err = s.Recv()
	}
	b, berr := c.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
	if berr == nil {
		_, berr = b.Recv()
	}
	if status.Code(err) != codes.InvalidArgument || status.Code(berr) != codes.InvalidArgument {
		t.Errorf("without the header: %v, %v; want InvalidArgument", err, berr)
	}
}

// A program that was not named gets nothing, and one is named by its path, not by what is in it.
func TestUnknownProgram(t *testing.T) {
	dir := place(t)
	named, other := filepath.Join(dir, "named"), filepath.Join(dir, "other")
	copyFile(t, self(t), named)
	copyFile(t, self(t), other)
	link := filepath.Join(dir, "link")
	if err := os.Symlink(named, link); err != nil {
		t.Fatal(err)
	}
	socket, log := run(t, Config{Programs: []Program{{link, alice}}})
	ask := func(exe string) (string, error) {
		cmd := exec.CommandContext(t.Context(), exe)
		cmd.Env = append(os.Environ(), asClient+"="+socket)
		out, err := cmd.Output()
		return string(out), err
	}
	if got, err := ask(named); err != nil || got != alice.String() {
		t.Errorf("the program that was named: %s: %v", got, err)
	}
	if got, err := ask(other); err == nil || !strings.Contains(got, "no identity issued") {
		t.Errorf("a copy of it elsewhere: %s: %v", got, err)
	}
	if err := os.Rename(other, named); err != nil {
		t.Fatal(err)
	}
	if got, err := ask(named); err != nil || got != alice.String() { // what this issuer cannot see, as its documentation says
		t.Errorf("another file under the name: %s: %v", got, err)
	}
	if !strings.Contains(log.String(), "refused: a program that was not named") || !strings.Contains(log.String(), other) {
		t.Errorf("the log does not name who was refused:\n%s", log)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Other users are refused twice: by the mode of the socket, and, where somebody has changed that, by what the kernel says of them.
func TestOtherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be another user")
	}
	dir := place(t)
	exe := filepath.Join(dir, "program")
	copyFile(t, self(t), exe)
	socket, log := run(t, Config{Programs: []Program{{exe, alice}}})
	for _, d := range []string{dir, filepath.Dir(socket)} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	ask := func(limit time.Duration) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		cmd := exec.CommandContext(ctx, exe)
		cmd.Dir = "/"
		cmd.Env = []string{asClient + "=" + socket}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.Output()
		return string(out), err
	}
	// go-spiffe goes on trying when it cannot connect.
	if got, err := ask(time.Second); err == nil || strings.Contains(log.String(), "uid=65534") {
		t.Errorf("another user could connect: %s, %v\n%s", got, err, log)
	}
	if err := os.Chmod(socket, 0o666); err != nil {
		t.Fatal(err)
	}
	if got, err := ask(patience); err == nil || !strings.Contains(got, "no identity issued") {
		t.Errorf("another user, past the socket's mode: %s: %v", got, err)
	}
	if !strings.Contains(log.String(), "uid=65534") {
		t.Errorf("the log does not say who was refused:\n%s", log)
	}
}

// Directories hold a certificate, its key and the bundles; the files are replaced whole, and are their owner's.
func TestDirectories(t *testing.T) {
	dir := filepath.Join(place(t), "new", "alice")
	run(t, Config{Directories: []Directory{{dir, alice}, {filepath.Join(place(t), "bob"), bob}}, TTL: MinTTL})
	load := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		block, rest := pem.Decode(b)
		if block == nil || len(rest) != 0 {
			t.Fatalf("%s is no whole PEM file: %q", name, b)
		}
		return block.Bytes
	}
	eventually(t, "the directory is written", func() bool { _, err := os.Stat(filepath.Join(dir, "bundle-b.local.pem")); return err == nil })
	var serials []string
	eventually(t, "three certificates", func() bool {
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "certificate.pem"), filepath.Join(dir, "key.pem"))
		if err != nil {
			return false // between two renames
		}
		ca, err := x509.ParseCertificate(load("bundle.pem"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: pool([]*x509.Certificate{ca}), DNSName: "localhost", CurrentTime: pair.Leaf.NotBefore}); err != nil {
			t.Fatal(err)
		}
		if id, err := spiffeid.FromURI(pair.Leaf.URIs[0]); err != nil || id != alice {
			t.Fatalf("%v: %v", id, err)
		}
		if n := len(serials); n == 0 || serials[n-1] != pair.Leaf.SerialNumber.String() {
			serials = append(serials, pair.Leaf.SerialNumber.String())
		}
		return len(serials) == 3
	})
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", e.Name(), info.Mode())
		}
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory: %v, %v", info, err)
	}
}

func TestRefused(t *testing.T) {
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	id := spiffeid.RequireFromString
	ok := []Program{{self(t), alice}}
	for name, c := range map[string]struct {
		cfg  Config
		says []string
	}{
		"nothing":               {Config{}, []string{"no socket", "nobody to issue to"}},
		"a long socket":         {Config{Socket: strings.Repeat("s", 108), Programs: ok}, []string{"107"}},
		"a real trust domain":   {Config{Programs: []Program{{self(t), id("spiffe://example.org/a")}}}, []string{"trust domain example.org", ".test"}},
		"an end in the name":    {Config{Programs: []Program{{self(t), id("spiffe://mytest/a")}}}, []string{"trust domain mytest"}},
		"the end alone":         {Config{Directories: []Directory{{"d", id("spiffe://test/a")}}}, []string{"trust domain test"}},
		"localhost":             {Config{Directories: []Directory{{"d", id("spiffe://localhost/a")}}}, []string{"trust domain localhost"}},
		"a domain, no workload": {Config{Programs: []Program{{self(t), id("spiffe://a.test")}}}, []string{"want spiffe://domain/path"}},
		"no program there":      {Config{Programs: []Program{{"/nowhere/at/all", alice}}}, []string{"/nowhere/at/all", "no such file"}},
		"a directory":           {Config{Programs: []Program{{t.TempDir(), alice}}}, []string{"no executable file"}},
		"a script":              {Config{Programs: []Program{{script, alice}}}, []string{"interpreter"}},
		"a program twice":       {Config{Programs: []Program{{self(t), alice}, {self(t), bob}}}, []string{"named twice"}},
		"a directory twice":     {Config{Directories: []Directory{{"d", alice}, {"./d", bob}}}, []string{"named twice"}},
		"too short":             {Config{Programs: ok, TTL: time.Second}, []string{"lifetime 1s"}},
		"too long":              {Config{Programs: ok, TTLs: map[spiffeid.ID]time.Duration{alice: 25 * time.Hour}}, []string{"lifetime 25h"}},
		"a lifetime of nobody":  {Config{Programs: ok, TTLs: map[spiffeid.ID]time.Duration{bob: time.Hour}}, []string{"issued to nobody"}},
	} {
		if c.cfg.Socket == "" && name != "nothing" {
			c.cfg.Socket = "/tmp/never"
		}
		_, err := New(c.cfg)
		for _, want := range c.says {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %q in it", name, err, want)
			}
		}
	}
}

// A socket that somebody serves is left alone, as is what is none; one that nobody serves is replaced.
func TestSocketInTheWay(t *testing.T) {
	dir := place(t)
	name := filepath.Join(dir, "s")
	i, err := New(Config{Socket: name, Programs: []Program{{self(t), alice}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := i.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("over a file: %v", err)
	}
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", name)
	if err != nil {
		t.Fatal(err)
	}
	if err := i.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "somebody is serving") {
		t.Errorf("over one that serves: %v", err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	ln.Close()
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if err := i.Run(ctx); err != nil {
		t.Errorf("over what a dead process left: %v", err)
	}
}

// SVIDs are renewed at half of their life and not before, each at its own time.
func TestRenewAtHalf(t *testing.T) {
	now := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	b, err := newBook(map[spiffeid.ID]time.Duration{alice: time.Hour, bob: 10 * time.Second}, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for range 11 {
		now = now.Add(time.Second)
		renewed, err := b.renew()
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range renewed {
			got = append(got, now.Format("05 ")+s.id.Path())
			if want := now.Add(10 * time.Second); !s.notAfter.Equal(want) {
				t.Errorf("lives until %v, want %v", s.notAfter, want)
			}
		}
	}
	if want := "05 /bob, 10 /bob"; strings.Join(got, ", ") != want {
		t.Errorf("renewed %v, want %s", got, want)
	}
	now = now.Add(time.Hour) // the machine slept
	if renewed, err := b.renew(); err != nil || len(renewed) != 2 {
		t.Errorf("after an hour: %d renewed, %v", len(renewed), err)
	}
}
