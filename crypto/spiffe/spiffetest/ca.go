// Package spiffetest issues SVIDs for tests: a certificate authority in memory, PEM files and a fake Workload API. For tests only: it checks
// nothing and its authority signs whatever it is asked for.
package spiffetest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// CA is the authority of one trust domain.
type CA struct {
	TrustDomain spiffeid.TrustDomain
	Certificate *x509.Certificate

	t   testing.TB
	key *ecdsa.PrivateKey
}

// NewCA makes an authority for a trust domain, such as "knhk.test". It is valid from an hour ago for 10 years.
func NewCA(t testing.TB, td string) *CA {
	t.Helper()
	domain, err := spiffeid.TrustDomainFromString(td)
	if err != nil {
		t.Fatal(err)
	}
	ca := &CA{TrustDomain: domain, t: t, key: newKey(t)}
	now := time.Now()
	ca.Certificate = sign(t, &x509.Certificate{
		SerialNumber: serial(t), Subject: pkix.Name{CommonName: td + " test CA"}, URIs: []*url.URL{domain.ID().URL()},
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(10, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}, nil, &ca.key.PublicKey, ca.key)
	return ca
}

// Option changes the certificate that Issue makes. Later ones win.
type Option func(*x509.Certificate)

// WithNotAfter sets the end of validity. X.509 knows whole seconds. Default: an hour from now.
func WithNotAfter(end time.Time) Option { return func(c *x509.Certificate) { c.NotAfter = end } }

// WithNotBefore sets the beginning of validity. Default: a minute ago.
func WithNotBefore(begin time.Time) Option {
	return func(c *x509.Certificate) { c.NotBefore = begin }
}

// WithURIs sets the URI SANs, whatever they are; none takes the SPIFFE ID away.
func WithURIs(uris ...*url.URL) Option { return func(c *x509.Certificate) { c.URIs = uris } }

// WithDNS sets DNS SANs beside the SPIFFE ID.
func WithDNS(names ...string) Option { return func(c *x509.Certificate) { c.DNSNames = names } }

// With changes the certificate in any way.
func With(change func(*x509.Certificate)) Option { return change }

// Issue makes a key and an SVID, such as of "spiffe://knhk.test/envoy": the leaf alone, signed by the authority. The ID need not be of
// the authority's trust domain. The result is not checked, and is not a valid SVID if options say so.
func (ca *CA) Issue(id string, opts ...Option) *x509svid.SVID {
	ca.t.Helper()
	parsed, err := spiffeid.FromString(id)
	if err != nil {
		ca.t.Fatal(err)
	}
	key := newKey(ca.t)
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: serial(ca.t), Subject: pkix.Name{Organization: []string{"spiffetest"}}, URIs: []*url.URL{parsed.URL()},
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	for _, o := range opts {
		o(template)
	}
	cert := sign(ca.t, template, ca.Certificate, &key.PublicKey, ca.key)
	return &x509svid.SVID{ID: parsed, Certificates: []*x509.Certificate{cert}, PrivateKey: key}
}

// Bundle gives the authority as the bundle of its trust domain.
func (ca *CA) Bundle() *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(ca.TrustDomain, []*x509.Certificate{ca.Certificate})
}

// PEM gives the authority as a CERTIFICATE block.
func (ca *CA) PEM() []byte { return certificatePEM(ca.Certificate) }

// Paths are the names of files that WriteFiles wrote.
type Paths struct{ Certificate, Key, CA string }

// WriteFiles writes certificate.pem, key.pem (PKCS #8, mode 0600) and bundle.pem into dir, each replaced by rename, and gives their names.
func WriteFiles(t testing.TB, dir string, svid *x509svid.SVID, authorities ...*CA) Paths {
	t.Helper()
	p := Paths{filepath.Join(dir, "certificate.pem"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "bundle.pem")}
	var bundle []byte
	for _, ca := range authorities {
		bundle = append(bundle, ca.PEM()...)
	}
	WriteFile(t, p.CA, bundle)
	WriteFile(t, p.Key, KeyPEM(t, svid))
	WriteFile(t, p.Certificate, CertificatePEM(svid))
	return p
}

// WriteFile replaces a file by rename, mode 0600.
func WriteFile(t testing.TB, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(name+".new", content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		t.Fatal(err)
	}
}

// CertificatePEM gives the chain of an SVID, the leaf first.
func CertificatePEM(svid *x509svid.SVID) []byte { return certificatePEM(svid.Certificates...) }

// KeyPEM gives the private key of an SVID, PKCS #8.
func KeyPEM(t testing.TB, svid *x509svid.SVID) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func certificatePEM(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func serial(t testing.TB) *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		t.Fatal(err)
	}
	return n.Add(n, big.NewInt(1)) // zero is no serial
}

// sign makes a certificate; without a parent it signs itself.
func sign(t testing.TB, template, parent *x509.Certificate, pub *ecdsa.PublicKey, key *ecdsa.PrivateKey) *x509.Certificate {
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}
