package transactions

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"go.yaml.in/yaml/v3"

	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// quicHost is whom the certificate of the QUIC listener is for.
const quicHost = "127.0.0.1"

// certificate makes a self-signed certificate for quicHost, as PEM, and the pool that trusts it.
func certificate(t *testing.T) (cert, key string, roots *x509.CertPool) {
	t.Helper()
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "knhk test"}, IPAddresses: []net.IP{net.ParseIP(quicHost)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &priv.PublicKey, priv)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots = x509.NewCertPool()
	roots.AddCert(leaf)
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})), roots
}

// withQUIC adds to the generated configuration a listener for HTTP/3 on the UDP port of the same number, as an operator might: the
// generated one but for transport and codec.
func withQUIC(t *testing.T, bootstrap []byte, cert, key string) []byte {
	t.Helper()
	var tree map[string]any
	if err := yaml.Unmarshal(bootstrap, &tree); err != nil {
		t.Fatal(err)
	}
	static := tree["static_resources"].(map[string]any)
	tcp := static["listeners"].([]any)[0].(map[string]any)
	addr := maps.Clone(tcp["address"].(map[string]any)["socket_address"].(map[string]any))
	addr["protocol"] = "UDP"
	filter := maps.Clone(tcp["filter_chains"].([]any)[0].(map[string]any)["filters"].([]any)[0].(map[string]any))
	hcm := maps.Clone(filter["typed_config"].(map[string]any))
	hcm["codec_type"] = "HTTP3"
	filter["typed_config"] = hcm
	static["listeners"] = []any{tcp, map[string]any{
		"name":                "quic",
		"address":             map[string]any{"socket_address": addr},
		"udp_listener_config": map[string]any{"quic_options": map[string]any{}},
		"filter_chains": []any{map[string]any{
			"filters": []any{filter},
			"transport_socket": map[string]any{"name": "envoy.transport_sockets.quic", "typed_config": map[string]any{
				"@type": "type.googleapis.com/envoy.extensions.transport_sockets.quic.v3.QuicDownstreamTransport",
				"downstream_tls_context": map[string]any{"common_tls_context": map[string]any{"tls_certificates": []any{map[string]any{
					"certificate_chain": map[string]any{"inline_string": cert},
					"private_key":       map[string]any{"inline_string": key},
				}}}},
			}},
		}},
	}}
	out, err := yaml.Marshal(tree)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestHTTP3 sends transactions over QUIC: each has one receipt, with the outcome that the client saw. Of a client that leaves, Envoy
// 1.40 tells neither that it was the client nor how: such outcomes are "aborted", which side did it is not known.
func TestHTTP3(t *testing.T) {
	audited.Both(t, func(t *testing.T, capture string) {
		cert, key, roots := certificate(t)
		w := start(t, stack.Config{YAML: edited(), Capture: capture, EditBootstrap: func(b []byte) []byte { return withQUIC(t, b, cert, key) }})
		client := func() *http3.Transport {
			return &http3.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13},
				QUICConfig: &quic.Config{HandshakeIdleTimeout: harness.Patience, MaxIdleTimeout: harness.Patience}}
		}
		// do sends one request on a connection of its own, and has use look at the response; cancel resets the stream.
		do := func(name, method, target, body string, use func(resp *http.Response, err error, cancel func(), tr *http3.Transport)) {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), harness.Patience)
			defer cancel()
			var r io.Reader
			if body != "" {
				r = strings.NewReader(body)
			}
			req, err := http.NewRequestWithContext(ctx, method, "https://"+w.Listener+target, r)
			if err != nil {
				t.Fatal(err)
			}
			req.Host = name + audited.CaseSuffix
			req.Header.Set("X-Knhk-Receipt", "forged")
			tr := client()
			defer tr.Close()
			if strings.HasSuffix(target, "/never") { // it leaves once the upstream has the request
				go func() {
					defer cancel()
					for ctx.Err() == nil && w.Reached(name) == 0 {
						time.Sleep(5 * time.Millisecond)
					}
				}()
			}
			resp, err := tr.RoundTrip(req)
			if err == nil {
				defer resp.Body.Close()
				if ids := resp.Header["X-Knhk-Receipt"]; len(ids) != 1 || ids[0] == "forged" || resp.ProtoMajor != 3 {
					t.Errorf("%s: %s %v", name, resp.Proto, resp.Header)
				} else {
					w.IDs[name] = append(w.IDs[name], ids[0])
				}
			}
			use(resp, err, cancel, tr)
		}
		whole := func(name string, resp *http.Response, err error, status int) []byte {
			t.Helper()
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			b, err := io.ReadAll(resp.Body)
			if err != nil || resp.StatusCode != status {
				t.Errorf("%s: %s, %v", name, resp.Status, err)
			}
			return b
		}
		// some reads the beginning of a response that goes on.
		some := func(name string, resp *http.Response, err error) {
			t.Helper()
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if _, err := io.ReadFull(resp.Body, make([]byte, 3)); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		play(t, w, []transaction{
			{name: "h3-get", reached: 2, send: func(_ *world, name string) {
				do(name, "GET", "/hot/do/bytes/40000", "", func(resp *http.Response, err error, _ func(), _ *http3.Transport) {
					if n := len(whole(name, resp, err, 200)); n != 40000 {
						t.Errorf("%s: %d bytes", name, n)
					}
				})
				do(name, "GET", "/p/do/status/404", "", func(resp *http.Response, err error, _ func(), _ *http3.Transport) {
					whole(name, resp, err, 404)
				})
			}, want: []string{"R1 admit ok by route:hot" + ok200, "W1 admit ok by route:pages | als complete 404 up=404 via_upstream"}},
			{name: "h3-post", reached: 1, send: func(_ *world, name string) {
				do(name, "POST", "/p/do/echo", strings.Repeat("b", 100_000), func(resp *http.Response, err error, _ func(), _ *http3.Transport) {
					var e harness.Echo
					if err := json.Unmarshal(whole(name, resp, err, 200), &e); err != nil || e.Body != 100_000 {
						t.Errorf("%s: %v, %d bytes arrived", name, err, e.Body)
					}
					for k := range e.Header {
						if strings.HasPrefix(k, "X-Knhk-") {
							t.Errorf("%s: %s reached the upstream", name, k)
						}
					}
				})
			}, want: []string{"W1 admit ok by route:pages" + ok200}},
			{name: "h3-delta", reached: 1, send: func(_ *world, name string) {
				do(name, "POST", "/delta/do/echo", hotDelta, func(resp *http.Response, err error, _ func(), _ *http3.Transport) {
					whole(name, resp, err, 200)
				})
			}, want: []string{"R1 admit ok by delta:hot" + ok200}},
			{name: "h3-trailers", reached: 1, send: func(_ *world, name string) {
				do(name, "GET", "/p/do/trailers", "", func(resp *http.Response, err error, _ func(), _ *http3.Transport) {
					whole(name, resp, err, 200)
				})
			}, want: []string{"W1 admit ok by route:pages" + ok200}},
			{name: "h3-reset-mid-response", reached: 1, send: func(w *world, name string) {
				do(name, "GET", "/p/do/drip/100000/5", "", func(resp *http.Response, err error, cancel func(), _ *http3.Transport) {
					some(name, resp, err)
					cancel()
					w.Until("its outcome is told", func() bool { return w.Metric("knhk_receipts_pending") == 0 })
				})
			}, want: []string{"W1 admit ok by route:pages | als aborted 200 up=200 via_upstream"}},
			{name: "h3-reset-before-response", reached: 1, send: func(w *world, name string) {
				do(name, "GET", "/p/do/never", "", func(resp *http.Response, err error, _ func(), _ *http3.Transport) {
					if err == nil {
						t.Errorf("%s: an answer: %s", name, resp.Status)
					}
				})
			}, want: []string{"W1 admit ok by route:pages | als aborted "}},
			{name: "h3-connection-closed", reached: 1, send: func(_ *world, name string) {
				do(name, "GET", "/p/do/drip/100000/5", "", func(resp *http.Response, err error, _ func(), tr *http3.Transport) {
					some(name, resp, err)
					if err := tr.Close(); err != nil {
						t.Error(err)
					}
				})
			}, want: []string{"W1 admit ok by route:pages | als aborted 200 up=200 via_upstream"}},
		})
		if n, err := w.Envoy.Stat(t.Context(), "http.knhk.downstream_rq_http3_total"); err != nil || n < 8 {
			t.Errorf("Envoy says that %v requests were HTTP/3: %v", n, err)
		}
		for _, kind := range []string{"panic", "malformed", "unexpected"} {
			if n := w.Metric("knhk_extproc_events_total", fmt.Sprintf("knhk_event=%q", kind)); n != 0 {
				t.Errorf("%v ext_proc events %s", n, kind)
			}
		}
		w.Audit()
	})
}
