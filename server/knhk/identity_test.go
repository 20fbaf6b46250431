package main

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/knhk/sidecar/crypto/spiffe/spiffetest"
)

// TestReceiptsTLS: the commands that talk to the admin listener prove who they are, and want to know who is there.
func TestReceiptsTLS(t *testing.T) {
	t.Setenv("KNHK_SERVER_ID", "")
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "")
	dir := t.TempDir()
	ca, other := spiffetest.NewCA(t, "knhk.test"), spiffetest.NewCA(t, "other.test")
	files := func(name, id string, by *spiffetest.CA, authorities ...*spiffetest.CA) []string {
		d := filepath.Join(dir, name)
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
		p := spiffetest.WriteFiles(t, d, by.Issue(id), authorities...)
		return []string{"--cert", p.Certificate, "--key", p.Key, "--ca", p.CA}
	}
	files("knhk", "spiffe://knhk.test/knhk", ca, ca)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	ln.Close()
	file := filepath.Join(dir, "knhk.yaml")
	text := fmt.Sprintf(`origin: example.com/tls
instance: a
state_dir: %[1]s/state
listeners: {envoy: "127.0.0.1:0", admin: %[2]q}
identity:
  spiffe_id: spiffe://knhk.test/knhk
  files: {certificate: %[1]s/knhk/certificate.pem, key: %[1]s/knhk/key.pem, ca: %[1]s/knhk/bundle.pem}
roles: {auditor: ["spiffe://knhk.test/auditor"], envoy: ["spiffe://knhk.test/envoy"]}
keys: {identity: {uri: "soft:%[1]s/keys?label=identity"}, daily: {uri: "soft:%[1]s/keys?label=daily"}}
shutdown: {announce: 0s, drain: 1s}
`, dir, addr)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	defer serve(t, file).stop()

	with := func(id string, args ...string) []string {
		return append([]string{"receipts", "status", "--admin", addr, "--server-id", id}, args...)
	}
	const knhk = "spiffe://knhk.test/knhk"
	auditor := files("auditor", "spiffe://knhk.test/auditor", ca, ca)
	if out := must(t, with(knhk, auditor...)...); !strings.Contains(out, "example.com/tls") {
		t.Errorf("status: %s", out)
	}
	api := spiffetest.NewWorkloadAPI(t)
	api.Update([]*x509svid.SVID{ca.Issue("spiffe://knhk.test/auditor")}, ca)
	for _, text := range []string{api.Addr, strings.Replace(api.Addr, "unix:", "unix://", 1)} {
		must(t, with(knhk, "--workload-api", text)...)
	}
	t.Setenv("KNHK_SERVER_ID", knhk)
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", api.Addr)
	must(t, "receipts", "list", "--admin", addr)
	t.Setenv("KNHK_SERVER_ID", "")
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "")

	mustNot(t, "is at the other end, not", with("spiffe://knhk.test/another", auditor...)...)
	// Whoever is refused is told so, by every command and however the end of the connection is seen, and not that nobody is there.
	for _, who := range [][]string{
		files("stranger", "spiffe://knhk.test/stranger", ca, ca),
		files("envoy", "spiffe://knhk.test/envoy", ca, ca),
	} {
		for _, command := range [][]string{{"status"}, {"list"}, {"get", "--request-id", "x"}, {"tail"}, {"export", "--file", filepath.Join(dir, "all")}} {
			command = append(append([]string{"receipts"}, command...), "--admin", addr, "--server-id", knhk)
			mustNot(t, "that takes role operator or auditor", append(command, who...)...)
		}
	}
	mustNot(t, "hold the authority", with(knhk, files("foreign", "spiffe://other.test/auditor", other, other)...)...)
	mustNot(t, "authority", with(knhk, files("believes", "spiffe://knhk.test/auditor", ca, other)...)...)
	mustNot(t, "belong together", with(knhk, auditor[:4]...)...)
	mustNot(t, "takes a certificate of one's own", with(knhk)...)
	mustNot(t, "want spiffe://domain/path", with("knhk", auditor...)...)
	mustNot(t, "one of the two", with(knhk, append(auditor, "--workload-api", "unix:/x")...)...)
	mustNot(t, "there is no TLS", "receipts", "status", "--admin", "unix:/x", "--server-id", knhk)
	mustNot(t, "own certificate from unix:/nobody", with(knhk, "--workload-api", "unix:/nobody")...)
	for _, command := range [][]string{{"status"}, {"tail"}} { // plain HTTP
		mustNot(t, "it wants mutual TLS", append(append([]string{"receipts"}, command...), "--admin", addr)...)
	}
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	mustNot(t, "does not speak TLS", append([]string{"receipts", "status", "--server-id", knhk, "--admin", plain.Listener.Addr().String()}, auditor...)...)
	ln, err = net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	mustNot(t, "is it running?", append([]string{"receipts", "status", "--server-id", knhk, "--admin", ln.Addr().String()}, auditor...)...)
	// What is meant for TLS does not end in plain HTTP.
	mustNot(t, "needs a TCP address and --server-id", append([]string{"receipts", "status", "--admin", addr}, auditor...)...)
	mustNot(t, "needs a TCP address and --server-id", "receipts", "status", "--admin", addr, "--workload-api", "unix:/x")
	mustNot(t, "needs a TCP address and --server-id", append([]string{"receipts", "status", "--admin", "unix:/x"}, auditor...)...)
	for _, elsewhere := range []string{"192.0.2.1:9003", "[2001:db8::1]:9003", "admin.example:9003"} {
		mustNot(t, "is on another machine", "receipts", "status", "--admin", elsewhere)
	}
}
