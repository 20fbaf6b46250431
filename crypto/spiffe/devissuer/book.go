package devissuer

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net/url"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// authorityTTL is longer than anybody develops without a restart; New makes new authorities.
	authorityTTL = 365 * 24 * time.Hour
	// backdate is for clocks that are a little behind.
	backdate = 10 * time.Second
)

// authority signs for one trust domain.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// svid is a certificate and its key, as DER (the key as PKCS #8).
type svid struct {
	id        spiffeid.ID
	cert, key []byte
	serial    string // hex
	renewAt   time.Time
	notAfter  time.Time
}

// book holds the authorities and the current SVID of each ID.
type book struct {
	now         func() time.Time
	authorities map[spiffeid.TrustDomain]*authority // never changes
	ttls        map[spiffeid.ID]time.Duration       // never changes

	mu      sync.Mutex
	current map[spiffeid.ID]*svid
	changed chan struct{} // closed and replaced by renew
}

func newBook(ttls map[spiffeid.ID]time.Duration, now func() time.Time) (*book, error) {
	b := &book{now: now, ttls: ttls, authorities: map[spiffeid.TrustDomain]*authority{}, current: map[spiffeid.ID]*svid{}, changed: make(chan struct{})}
	for id := range ttls {
		td := id.TrustDomain()
		if b.authorities[td] != nil {
			continue
		}
		a, err := newAuthority(td, now())
		if err != nil {
			return nil, fmt.Errorf("authority of %s: %w", td, err)
		}
		b.authorities[td] = a
	}
	_, err := b.renew()
	return b, err
}

func newAuthority(td spiffeid.TrustDomain, now time.Time) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		Subject: pkix.Name{Organization: []string{"knhk DEVELOPMENT ONLY"}, CommonName: td.Name()}, URIs: []*url.URL{td.ID().URL()},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(authorityTTL),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &authority{cert, key}, err
}

// issue makes an SVID as the X509-SVID specification wants a leaf: one URI, no CA, digital signature. The DNS name is for clients
// that check one, such as curl; SPIFFE's do not look at it.
func (a *authority) issue(id spiffeid.ID, ttl time.Duration, now time.Time) (*svid, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		Subject: pkix.Name{Organization: []string{"knhk DEVELOPMENT ONLY"}}, URIs: []*url.URL{id.URL()}, DNSNames: []string{"localhost"},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(ttl),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return &svid{id: id, cert: der, key: pkcs8, serial: fmt.Sprintf("%x", cert.SerialNumber), renewAt: now.Add(ttl / 2), notAfter: cert.NotAfter}, nil
}

// renew replaces every SVID that has reached half of its life, tells who waits, and returns the new ones. What could be renewed is,
// whatever fails.
func (b *book) renew() ([]*svid, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var renewed []*svid
	var errs []error
	now := b.now()
	for id, ttl := range b.ttls {
		if s := b.current[id]; s != nil && now.Before(s.renewAt) {
			continue
		}
		s, err := b.authorities[id.TrustDomain()].issue(id, ttl, now)
		if err != nil {
			errs = append(errs, fmt.Errorf("issue %s: %w", id, err))
			continue
		}
		b.current[id] = s
		renewed = append(renewed, s)
	}
	if len(renewed) > 0 {
		close(b.changed)
		b.changed = make(chan struct{})
	}
	return renewed, errors.Join(errs...)
}

// get returns the current SVID of an ID, and a channel that is closed when any is renewed.
func (b *book) get(id spiffeid.ID) (*svid, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.current[id], b.changed
}

// poll is how often to look whether an SVID is due: often enough for the one that lives shortest.
func (b *book) poll() time.Duration {
	every := time.Second
	for _, ttl := range b.ttls {
		every = min(every, ttl/50)
	}
	return every
}
