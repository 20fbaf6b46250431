package sidecars

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"testing"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/knhk/sidecar/crypto/spiffe/spiffetest"
	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// Who is who.
const (
	outboundID = "spiffe://knhk.test/envoy/outbound"
	inboundID  = "spiffe://knhk.test/envoy/inbound"
	shopID     = "spiffe://knhk.test/shop"
	jobID      = "spiffe://knhk.test/job"
)

// envoyFiles issues id and gives the `files` of envoy.tls.
func envoyFiles(t *testing.T, ca *spiffetest.CA, id string) string {
	t.Helper()
	p := spiffetest.WriteFiles(t, harness.Directory(t, ""), ca.Issue(id), ca)
	return fmt.Sprintf("{certificate: %s, key: %s, ca: %s}", p.Certificate, p.Key, p.CA)
}

// prepare makes a stack with that configuration, the instance's name in its receipts.
func prepare(t *testing.T, instance, yaml string, cfg stack.Config) *audited.World {
	t.Helper()
	cfg.YAML = yaml
	w := audited.Prepare(t, cfg)
	w.Instance = instance
	if err := w.WriteConfig(yaml); err != nil {
		t.Fatal(err)
	}
	return w
}

// start starts knhk, and Envoy with the files that it reads certificates from.
func start(t *testing.T, w *audited.World) {
	t.Helper()
	if err := w.StartKnhk(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Run(t.Context(), nil, "bootstrap", "--config", w.ConfigFile, "--write-secrets"); err != nil {
		t.Fatal(err)
	}
	if err := w.StartEnvoy(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// client shows an SVID, and takes every server: that servers are known is Envoy's to do, and e2e/identity's to test.
type client struct {
	http *http.Transport
	w    *audited.World
}

func clientOf(t *testing.T, w *audited.World, svid *x509svid.SVID) client {
	c := &tls.Config{InsecureSkipVerify: true}
	if svid != nil {
		cert := tls.Certificate{PrivateKey: svid.PrivateKey}
		for _, x := range svid.Certificates {
			cert.Certificate = append(cert.Certificate, x.Raw)
		}
		c.Certificates = []tls.Certificate{cert}
	}
	tr := &http.Transport{TLSClientConfig: c}
	t.Cleanup(tr.CloseIdleConnections)
	return client{tr, w}
}

// answer is a response, and what the upstream says it was asked, if it was.
type answer struct {
	status  int
	receipt string
	body    string
	echo    *harness.Echo
}

// get asks for target in the name of a case.
func (c client) get(ctx context.Context, name, target string, header http.Header) (*answer, error) {
	ctx, cancel := context.WithTimeout(ctx, harness.Patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+c.w.Listener+target, nil)
	if err != nil {
		return nil, err
	}
	req.Host = name + audited.CaseSuffix
	maps.Copy(req.Header, header)
	resp, err := c.http.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return read(resp.StatusCode, resp.Header, body), err
}

func read(status int, h http.Header, body []byte) *answer {
	a := &answer{status: status, receipt: h.Get("X-Knhk-Receipt"), body: string(body)}
	if e := new(harness.Echo); json.Unmarshal(body, e) == nil {
		a.echo = e
	}
	return a
}

// serves waits until a client gets an answer with a receipt, which may be a refusal.
func (c client) serves(t *testing.T) {
	t.Helper()
	c.w.Eventually("the listener answers with receipts", func() error {
		switch a, err := c.get(t.Context(), "serves", "/do/echo", nil); {
		case err != nil:
			return err
		case a.receipt == "":
			return errors.New("no receipt: " + a.body)
		}
		return nil
	})
}

// story is what the program tells of a receipt.
func story(t *testing.T, w *audited.World, id string) string {
	t.Helper()
	out, err := w.Run(t.Context(), nil, "receipts", "get", "--story", id)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// patient has what nobody tells of end before the test loses its patience.
const patient = "log: {outcome_timeout: 30s, seal_every: 1s}\n"
