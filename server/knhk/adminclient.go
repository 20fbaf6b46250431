package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/knhk/sidecar/api/knhk/admin/v1/adminv1connect"
	"github.com/knhk/sidecar/crypto/spiffe"
)

// identityWait bounds how long a command waits for its own certificate.
const identityWait = 10 * time.Second

// adminFlags adds the flags of every command that talks to the admin listener.
func adminFlags(cmd *cobra.Command) {
	admin := os.Getenv("KNHK_ADMIN")
	if admin == "" {
		admin = defaultAdmin
	}
	f := cmd.PersistentFlags()
	f.String("admin", admin, "admin listener of knhk: host:port or unix:/path (default from KNHK_ADMIN)")
	f.String("server-id", os.Getenv("KNHK_SERVER_ID"), "SPIFFE ID that the admin listener must have: mutual TLS (default from KNHK_SERVER_ID)")
	f.String("workload-api", os.Getenv("SPIFFE_ENDPOINT_SOCKET"), "with --server-id: Workload API that gives this command its own certificate,\n"+
		"unix:/path (default from SPIFFE_ENDPOINT_SOCKET)")
	f.String("cert", "", "with --server-id: PEM file with the own certificate, instead of --workload-api")
	f.String("key", "", "with --cert: PEM file with its private key")
	f.String("ca", "", "with --cert: PEM file with the authorities of the trust domain")
}

// client talks to the admin listener: in the plain unless --server-id says who must be at the other end.
func client(cmd *cobra.Command) (adminv1connect.ReceiptServiceClient, error) {
	addr, _ := cmd.Flags().GetString("admin")
	t := &http.Transport{}
	url := "http://" + addr
	path, unix := strings.CutPrefix(addr, "unix:")
	if _, _, err := net.SplitHostPort(addr); err != nil && !unix {
		return nil, usageError{fmt.Errorf("--admin %q: want host:port or unix:/path", addr)}
	}
	server, _ := cmd.Flags().GetString("server-id")
	var rt http.RoundTripper = &plainTransport{t}
	if unix || server == "" { // what was given for TLS must not be left unused without a word
		for _, name := range []string{"cert", "key", "ca", "workload-api"} {
			if cmd.Flags().Changed(name) {
				return nil, usageError{fmt.Errorf("--%s is for mutual TLS: it needs a TCP address and --server-id, the SPIFFE ID that the admin listener must have", name)}
			}
		}
	}
	switch {
	case unix && cmd.Flags().Changed("server-id"):
		return nil, usageError{fmt.Errorf("--server-id: %s is a socket of this machine, where there is no TLS: leave it out", addr)}
	case unix:
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}
		url = "http://localhost"
	case server != "":
		var err error
		if rt, err = secureClient(cmd, t, server); err != nil {
			return nil, err
		}
		url = "https://" + addr
	case !loopback(addr):
		return nil, usageError{fmt.Errorf("--admin %s is on another machine, where whoever answers would be believed: say with --server-id which SPIFFE ID it must have", addr)}
	}
	return adminv1connect.NewReceiptServiceClient(&http.Client{Transport: rt}, url), nil
}

// refusal says why one of the two ends does not want the other, and what to do.
type refusal struct{ error }

// Unwrap gives the cause.
func (r refusal) Unwrap() error { return r.error }

// plainTransport is t, which has no TLS, and knows how a listener that has it answers.
type plainTransport struct{ t *http.Transport }

// RoundTrip implements http.RoundTripper.
func (p *plainTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := p.t.RoundTrip(r)
	if err == nil && resp.StatusCode == http.StatusBadRequest && resp.Header.Get("Content-Type") == "" {
		resp.Body.Close() // net/http's answer to plain text on TLS is the only one without a type
		return nil, refusal{errors.New("it wants mutual TLS: --server-id or KNHK_SERVER_ID says which SPIFFE ID it must have, --help how to show one's own")}
	}
	return resp, err
}

// secureTransport is t, which speaks mutual TLS, and knows how the other end refuses a certificate. In TLS 1.3 a client hears of that
// after its own handshake is done, by an alert or, if it was writing, by no more than the end of the connection.
type secureTransport struct {
	t     *http.Transport
	own   spiffeid.ID
	shown atomic.Pointer[shown] // the last connection whose handshake was done
}

// shown is a connection on which the own certificate was shown.
type shown struct {
	net.Conn
	heard atomic.Bool // a byte of an answer: it was accepted
}

// Read implements net.Conn.
func (s *shown) Read(b []byte) (int, error) {
	n, err := s.Conn.Read(b)
	if n > 0 {
		s.heard.Store(true)
	}
	return n, err
}

// RoundTrip implements http.RoundTripper.
func (s *secureTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := s.t.RoundTrip(r)
	if c := s.shown.Load(); err != nil && r.Context().Err() == nil && c != nil && !c.heard.Load() {
		return nil, refusal{fmt.Errorf("it does not take the certificate of %s (%w): that takes role operator or auditor in `roles` of its knhk.yaml, "+
			"an authority it knows, and a certificate that has not expired; its log says what was missing", s.own, err)}
	}
	return resp, err
}

// dial has connect make connections, and says what is wrong if their other end is not whom we want.
func (s *secureTransport) dial(connect func(ctx context.Context, network, addr string) (net.Conn, error)) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		s.shown.Store(nil)
		conn, err := connect(ctx, network, addr)
		var op *net.OpError
		switch {
		case err == nil:
			c := &shown{Conn: conn}
			s.shown.Store(c)
			return c, nil
		case ctx.Err() != nil, errors.As(err, &op) && op.Op == "dial":
			return nil, err
		}
		var record tls.RecordHeaderError
		if errors.As(err, &record) {
			return nil, refusal{errors.New("it does not speak TLS: leave out --server-id and KNHK_SERVER_ID")}
		}
		return nil, refusal{fmt.Errorf("%w; --server-id must name it, and --ca, or the Workload API, hold the authority of its trust domain", err)}
	}
}

// loopback reports whether host:port does not leave this machine.
func loopback(addr string) bool {
	host, _, _ := net.SplitHostPort(addr)
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// secureClient has t speak mutual TLS to the one server. The certificate is held until the command ends.
func secureClient(cmd *cobra.Command, t *http.Transport, server string) (*secureTransport, error) {
	want, err := spiffeid.FromString(server)
	if err != nil || want.Path() == "" {
		return nil, usageError{fmt.Errorf("--server-id %q: want spiffe://domain/path", server)}
	}
	cfg, err := ownIdentity(cmd)
	if err != nil {
		return nil, err
	}
	cfg.Log = slog.New(slog.DiscardHandler)
	src, err := spiffe.Open(cmd.Context(), cfg)
	if err != nil {
		return nil, err
	}
	context.AfterFunc(cmd.Context(), func() { _ = src.Close() }) // the command is over
	s := &secureTransport{t: t, own: cfg.ID}
	t.DialTLSContext = s.dial(src.DialTLS([]string{"http/1.1"}, func(id spiffeid.ID) error {
		if id != want {
			return fmt.Errorf("%s is at the other end, not %s", id, want)
		}
		return nil
	}))
	return s, nil
}

// ownIdentity says where the command's own certificate comes from. Whatever ID it has is the own one: nobody told another.
func ownIdentity(cmd *cobra.Command) (cfg spiffe.Config, err error) {
	flag := func(name string) string { s, _ := cmd.Flags().GetString(name); return s }
	cert, key, ca, api := flag("cert"), flag("key"), flag("ca"), flag("workload-api")
	files := cert != "" || key != "" || ca != ""
	switch {
	case files && cmd.Flags().Changed("workload-api"):
		return cfg, usageError{errors.New("--workload-api and --cert: the certificate comes from one of the two")}
	case files && (cert == "" || key == "" || ca == ""):
		return cfg, usageError{errors.New("--cert, --key and --ca belong together")}
	case files:
		svid, err := x509svid.Load(cert, key)
		if err != nil {
			return cfg, fmt.Errorf("own certificate: %w", err)
		}
		return spiffe.Config{ID: svid.ID, Files: &spiffe.Files{Certificate: cert, Key: key, CA: ca}}, nil
	case api == "":
		return cfg, usageError{errors.New("--server-id takes a certificate of one's own: --workload-api unix:/path (or SPIFFE_ENDPOINT_SOCKET), or --cert, --key and --ca")}
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), identityWait)
	defer cancel()
	svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(api))
	if err != nil {
		return cfg, fmt.Errorf("own certificate from %s: %w; it takes an issuer that listens there, unix:/path, and knows this program", api, err)
	}
	// The two forms of the specification, unix:/path and unix:///path, are one.
	return spiffe.Config{ID: svid.ID, WorkloadAPI: "unix:" + strings.TrimPrefix(strings.TrimPrefix(api, "unix:"), "//")}, nil
}
