package kms

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"
)

// maxAnswer bounds the body of an answer, in bytes. The longest that services give, a page of a list, has far less.
const maxAnswer = 4 << 20

// errAnswer ends the reading of a body that is too long.
var errAnswer = fmt.Errorf("the service's answer has more than %d bytes", maxAnswer)

// HTTPClient makes the client that services are spoken with: TLS 1.2 or later, proxies as the environment says, no redirects (the
// redirect itself is the answer: it would carry a credential elsewhere), bodies of bounded length, and limits on every step;
// the whole is limited by the call's context. roots are the certificates to trust, nil for the system's. The caller closes
// idle connections when it is done.
func HTTPClient(roots *x509.CertPool) *http.Client {
	return &http.Client{
		Transport: limited{&http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			DialContext:            (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
			TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots},
			TLSHandshakeTimeout:    5 * time.Second,
			ResponseHeaderTimeout:  30 * time.Second,
			ExpectContinueTimeout:  time.Second,
			IdleConnTimeout:        90 * time.Second,
			MaxIdleConns:           32,
			MaxIdleConnsPerHost:    16,
			MaxConnsPerHost:        32,
			MaxResponseHeaderBytes: 64 << 10,
			ForceAttemptHTTP2:      true,
		}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// Roots reads the certificates of a PEM file, as a URI's ca names it.
func Roots(path string) (*x509.CertPool, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("kms: read certificates: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("kms: read certificates: %s holds none in PEM", path)
	}
	return pool, nil
}

// limited bounds the bodies of answers.
type limited struct{ *http.Transport }

// RoundTrip implements http.RoundTripper.
func (l limited) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := l.Transport.RoundTrip(r)
	if err == nil {
		if resp.StatusCode >= 300 && resp.StatusCode < 400 {
			// Before it asks CheckRedirect, http.Client rewinds the request's body, which may still be read from: a data race.
			resp.Header.Del("Location")
		}
		resp.Body = &body{resp.Body, maxAnswer}
	}
	return resp, err
}

type body struct {
	io.ReadCloser
	left int64
}

func (b *body) Read(p []byte) (int, error) {
	if b.left < 0 {
		return 0, errAnswer
	}
	if int64(len(p)) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.ReadCloser.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, errAnswer
	}
	return n, err
}
