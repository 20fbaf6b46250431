package examples

import (
	"context"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/spire"
)

// devIssuer runs `knhk dev-issuer` until the test ends.
func (s *site) devIssuer(socket string, args ...string) {
	s.t.Helper()
	harness.RunProcess(s.t, harness.ProcessConfig{
		Name: "dev-issuer", Path: s.bin, Args: append([]string{"dev-issuer", "--socket", socket}, args...), Dir: s.dir, Log: filepath.Join(s.dir, "dev-issuer.log"),
		Ready: func(context.Context) error {
			_, err := os.Stat(filepath.Join(s.dir, strings.TrimPrefix(socket, s.dir)))
			return err
		},
	})
}

func TestFileTLS(t *testing.T) {
	s := prepare(t, "file-tls")
	if err := os.MkdirAll(filepath.Join(s.dir, "run/file-tls"), 0o700); err != nil {
		t.Fatal(err)
	}
	s.devIssuer("run/file-tls/issuer.sock", "--write", "run/file-tls/knhk="+knhkID, "--write", "run/file-tls/envoy="+envoyID,
		"--write", "run/file-tls/client=spiffe://knhk.test/client/me", "--write", "run/file-tls/operator=spiffe://knhk.test/operator/me")
	s.identity("run/file-tls/operator", "spiffe://knhk.test/operator/me") // the last that is written
	s.knhk("bootstrap", "--config", s.file("knhk.yaml"), "--write-secrets")
	s.who = "run/file-tls/operator"
	s.start("knhk.yaml", "envoy.yaml")

	url := "https://" + s.addr(listenerAddr)
	const me = "spiffe://knhk.test/client/me"
	s.check(url, call{"a client", s.client("run/file-tls/client", me, envoyID), "", "/", map[string]string{"x-forwarded-client-cert": "URI=spiffe://knhk.test/client/other"}, 200,
		judged{"admit", "ok", me, "", false}})
	s.strangers(url, s.client("run/file-tls/operator", "spiffe://knhk.test/operator/me", envoyID))
	// Roles: the client is nobody to knhk.
	s.refused("the client, on the admin listener", s.client("run/file-tls/client", me, knhkID), "https://"+s.addr(adminAddr)+"/metrics")
	s.refused("nobody, on the admin listener", s.stranger(), "https://"+s.addr(adminAddr)+"/metrics")
}

// stranger is a client that speaks TLS, trusts whoever it meets and shows no certificate.
func (s *site) stranger() *http.Client {
	c := s.plain()
	c.Transport.(*http.Transport).TLSClientConfig = trusting()
	return c
}

// strangers wants Envoy to refuse who has no certificate, or the wrong one.
func (s *site) strangers(url string, wrong *http.Client) {
	s.t.Helper()
	s.refused("without a certificate", s.stranger(), url+"/")
	s.refused("in the plain", s.plain(), strings.Replace(url, "https:", "http:", 1)+"/")
	s.refused("with an id that is no client's", wrong, url+"/")
}

func TestSPIRE(t *testing.T) {
	s := prepare(t, "spire")
	for _, d := range []string{"server", "agent"} {
		s.replace["/tmp/spire-"+d] = filepath.Join(s.dir, d)
		if err := os.MkdirAll(filepath.Join(s.dir, "run/spire", d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	s.replace["/usr/local/bin/knhk"], s.replace["/usr/local/bin/envoy"] = real(t, s.bin), real(t, s.envoyBin)
	for _, d := range []string{"server/private", "agent/public"} {
		if err := os.MkdirAll(filepath.Join(s.dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	const shop, report, operator, orders = "spiffe://knhk.test/client/shop", "spiffe://knhk.test/client/report/daily", "spiffe://knhk.test/operator/me", "spiffe://knhk.test/orders"
	people := map[string]string{"run/spire/shop": shop, "run/spire/report": report, "run/spire/operator": operator, "run/spire/orders": orders}
	if os.Getenv("KNHK_ISSUER") == "spire" {
		s.spire(people)
	} else {
		args := []string{"--id", s.bin + "=" + knhkID, "--id", s.envoyBin + "=" + envoyID}
		for dir, id := range people {
			args = append(args, "--write", dir+"="+id)
		}
		s.devIssuer(filepath.Join(s.dir, "agent/public/api.sock"), args...)
	}
	// The orders service: it lets in Envoy and nobody else.
	up, err := harness.StartUpstreamTLS(s.identity("run/spire/orders", orders).ServerTLS([]string{"http/1.1"}, only(envoyID)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(up.Close)
	s.replace[ordersAddr] = up.HTTP()
	s.who = "run/spire/operator"
	s.start("knhk.yaml", "envoy.yaml")

	url := "https://" + s.addr(listenerAddr)
	asShop, asReport := s.client("run/spire/shop", shop, envoyID), s.client("run/spire/report", report, envoyID)
	asOperator := s.client("run/spire/operator", operator, envoyID)
	for _, c := range []call{
		{"the shop reads", asShop, "", "/", nil, 200, judged{"admit", "ok", shop, "reading-by-clients", false}},
		{"the shop orders", asShop, http.MethodPost, "/orders/1", nil, 200, judged{"admit", "ok", shop, "orders-by-the-shop", false}},
		{"the shop writes elsewhere", asShop, http.MethodPost, "/", nil, 403, judged{"refuse", "authz_no_rule", shop, "", false}},
		{"a report reads", asReport, "", "/", nil, 200, judged{"admit", "ok", report, "reading-by-clients", false}},
		{"a report orders", asReport, http.MethodPost, "/orders/2", nil, 403, judged{"refuse", "authz_forbidden", report, "reports-never-write", false}},
		{"a report reads orders", asReport, "", "/orders/3", nil, 403, judged{"refuse", "authz_no_rule", report, "", false}},
	} {
		s.check(url, c)
	}
	if n := len(up.Seen()); n != 1 {
		t.Errorf("the orders service saw %d requests, want the one of the shop", n)
	}
	s.strangers(url, asOperator)
	s.refused("nobody, at the orders service", s.stranger(), "https://"+up.HTTP()+"/")
	s.refused("the shop, at the orders service without Envoy", s.client("run/spire/shop", shop, orders), "https://"+up.HTTP()+"/")
	s.refused("the shop, on the admin listener", s.client("run/spire/shop", shop, knhkID), "https://"+s.addr(adminAddr)+"/metrics")
}

// real follows symbolic links, as the kernel does when it names a program.
func real(t *testing.T, name string) string {
	t.Helper()
	out, err := filepath.EvalSymlinks(name)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

var joinToken = regexp.MustCompile(`(?m)^Token: (\S+)$`)

// spire runs the SPIRE that the example configures, step by step as the README does.
func (s *site) spire(people map[string]string) {
	s.t.Helper()
	dir, err := spire.Build(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	// The server's port stands alone in both files.
	_, port, err := net.SplitHostPort(freeAddr(s.t))
	if err != nil {
		s.t.Fatal(err)
	}
	s.replace[`_port = "8081"`] = `_port = "` + port + `"`
	server := func(args ...string) []byte {
		s.t.Helper()
		ctx, cancel := context.WithTimeout(s.t.Context(), harness.Patience)
		defer cancel()
		return s.run(exec.CommandContext(ctx, filepath.Join(dir, "spire-server"), args...))
	}
	socket := []string{"-socketPath", filepath.Join(s.dir, "server/private/api.sock")}
	harness.RunProcess(s.t, harness.ProcessConfig{
		Path: filepath.Join(dir, "spire-server"), Args: []string{"run", "-config", s.file("server.conf")}, Dir: s.dir, Log: filepath.Join(s.dir, "spire-server.log"),
		Ready: func(ctx context.Context) error {
			return exec.CommandContext(ctx, filepath.Join(dir, "spire-server"), append([]string{"healthcheck"}, socket...)...).Run()
		},
	})
	if err := os.WriteFile(filepath.Join(s.dir, "run/spire/bundle.pem"), server(append([]string{"bundle", "show"}, socket...)...), 0o600); err != nil {
		s.t.Fatal(err)
	}
	out := server(append([]string{"token", "generate", "-spiffeID", "spiffe://knhk.test/agent"}, socket...)...)
	token := joinToken.FindSubmatch(out)
	if token == nil {
		s.t.Fatalf("no join token in %q", out)
	}
	server(append([]string{"entry", "create", "-data", s.file("entries.json")}, socket...)...)
	harness.RunProcess(s.t, harness.ProcessConfig{
		Path: filepath.Join(dir, "spire-agent"), Args: []string{"run", "-config", s.file("agent.conf"), "-joinToken", string(token[1])},
		Dir: s.dir, Log: filepath.Join(s.dir, "spire-agent.log"),
		Ready: func(context.Context) error {
			_, err := os.Stat(filepath.Join(s.dir, "agent/public/api.sock"))
			return err
		},
	})
	for to, id := range people {
		if err := os.MkdirAll(filepath.Join(s.dir, to), 0o700); err != nil {
			s.t.Fatal(err)
		}
		server(append([]string{"x509", "mint", "-spiffeID", id, "-write", to}, socket...)...)
		if err := os.Rename(filepath.Join(s.dir, to, "svid.pem"), filepath.Join(s.dir, to, "certificate.pem")); err != nil {
			s.t.Fatal(err)
		}
	}
}
