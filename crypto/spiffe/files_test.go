package spiffe

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/knhk/sidecar/crypto/spiffe/spiffetest"
)

// What may not be taken into use, with what the error has to say.
func TestFilesRefused(t *testing.T) {
	ca, other := spiffetest.NewCA(t, "knhk.test"), spiffetest.NewCA(t, "other.test")
	second := spiffetest.NewCA(t, "knhk.test") // same name, another key
	now := time.Now()
	good := ca.Issue(serverID)
	write := func(name string, b []byte) { spiffetest.WriteFile(t, name, b) }
	twoURIs := []*url.URL{spiffeid.RequireFromString(serverID).URL(), spiffeid.RequireFromString(clientID).URL()}
	for name, c := range map[string]struct {
		svid   *x509svid.SVID // default: good
		change func(cfg *Config)
		want   []string
	}{
		"other id":          {ca.Issue(clientID), func(c *Config) { c.ID = good.ID }, []string{"is for " + clientID, "identity is " + serverID}},
		"two URI SANs":      {ca.Issue(serverID, spiffetest.WithURIs(twoURIs...)), nil, []string{"more than one URI SAN"}},
		"no URI SAN":        {ca.Issue(serverID, spiffetest.WithURIs(), spiffetest.WithDNS("knhk.test")), nil, []string{"no URI SAN"}},
		"expired":           {ca.Issue(serverID, spiffetest.WithNotAfter(now.Add(-time.Second))), nil, []string{"expired at"}},
		"not yet valid":     {ca.Issue(serverID, spiffetest.WithNotBefore(now.Add(time.Minute))), nil, []string{"not valid before", "clocks"}},
		"another authority": {second.Issue(serverID), nil, []string{"does not verify against the authorities of knhk.test"}},
		"an authority as leaf": {ca.Issue(serverID, spiffetest.With(func(c *x509.Certificate) {
			c.IsCA, c.KeyUsage = true, x509.KeyUsageDigitalSignature|x509.KeyUsageCertSign
		})), nil, []string{"CA flag"}},
		"another key":        {nil, func(c *Config) { write(c.Files.Key, spiffetest.KeyPEM(t, ca.Issue(serverID))) }, []string{"key.pem", "does not match"}},
		"no certificate":     {nil, func(c *Config) { os.Remove(c.Files.Certificate) }, []string{"certificate.pem", "no such file"}},
		"no key":             {nil, func(c *Config) { os.Remove(c.Files.Key) }, []string{"key.pem", "no such file"}},
		"empty certificate":  {nil, func(c *Config) { write(c.Files.Certificate, nil) }, []string{"certificate.pem", "no PEM block"}},
		"empty key":          {nil, func(c *Config) { write(c.Files.Key, nil) }, []string{"key.pem", "no PEM block"}},
		"empty authorities":  {nil, func(c *Config) { write(c.Files.CA, []byte("\n")) }, []string{"bundle.pem", "no PEM block"}},
		"key in certificate": {nil, func(c *Config) { write(c.Files.Certificate, spiffetest.KeyPEM(t, good)) }, []string{"is a PRIVATE KEY"}},
		"leaf as authority":  {nil, func(c *Config) { write(c.Files.CA, spiffetest.CertificatePEM(good)) }, []string{"bundle.pem", "is no authority"}},
		"certificate as key": {nil, func(c *Config) { write(c.Files.Key, spiffetest.CertificatePEM(good)) }, []string{"key.pem", "neither PRIVATE KEY"}},
		"two keys":           {nil, func(c *Config) { k := spiffetest.KeyPEM(t, good); write(c.Files.Key, append(k, k...)) }, []string{"more than one"}},
		"broken certificate": {nil, func(c *Config) {
			write(c.Files.Certificate, []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
		}, []string{"PEM block 1"}},
		"cut certificate":     {nil, func(c *Config) { b := ca.PEM(); write(c.Files.CA, append(b, b[:len(b)/2]...)) }, []string{"bundle.pem", "cut off"}},
		"broken in the midst": {nil, func(c *Config) { b := ca.PEM(); write(c.Files.CA, append(b[:len(b)/2:len(b)/2], b...)) }, []string{"bundle.pem", "broken"}},
		"open key":            {nil, func(c *Config) { os.Chmod(c.Files.Key, 0o640) }, []string{"key.pem has mode 0640", "chmod go="}},
		"key for others":      {nil, func(c *Config) { os.Chmod(c.Files.Key, 0o604) }, []string{"mode 0604"}},
		"a folder":            {nil, func(c *Config) { c.Files.CA = filepath.Dir(c.Files.CA) }, []string{"not a regular file"}},
		"a pipe": {nil, func(c *Config) { os.Remove(c.Files.Key); syscall.Mkfifo(c.Files.Key, 0o600) },
			[]string{"not a regular file"}},
		"too long":             {nil, func(c *Config) { write(c.Files.CA, make([]byte, maxFile+1)) }, []string{"more than 1048576 bytes"}},
		"federated empty":      {nil, func(c *Config) { write(c.Files.Federated[other.TrustDomain], nil) }, []string{"other.test.pem", "no PEM block"}},
		"federated leaf":       {nil, func(c *Config) { write(c.Files.Federated[other.TrustDomain], spiffetest.CertificatePEM(good)) }, []string{"no authority"}},
		"federated own domain": {nil, func(c *Config) { c.Files.Federated[ca.TrustDomain] = c.Files.CA }, []string{"is the own one"}},
		"a name is empty":      {nil, func(c *Config) { c.Files.CA = "" }, []string{"a name is empty"}},
		"both sources":         {nil, func(c *Config) { c.WorkloadAPI = "unix:/nowhere" }, []string{"exactly one"}},
		"no source":            {nil, func(c *Config) { c.Files = nil }, []string{"exactly one"}},
		"no id":                {nil, func(c *Config) { c.ID = spiffeid.ID{} }, []string{"no SPIFFE ID"}},
		"a domain as id":       {nil, func(c *Config) { c.ID = ca.TrustDomain.ID() }, []string{"needs a path"}},
	} {
		svid := c.svid
		if svid == nil {
			svid = good
		}
		cfg := filesOf(t, svid, ca, other)
		if c.change != nil {
			c.change(&cfg)
		}
		s, err := open(t.Context(), cfg, 50*time.Millisecond)
		wantError(t, name, err, c.want...)
		if s != nil {
			t.Errorf("%s: a source beside the error", name)
		}
		if err != nil && strings.Contains(err.Error(), "-----") {
			t.Errorf("%s: the error repeats a file: %s", name, err)
		}
	}
}

// Private keys as openssl and others write them.
func TestKeyForms(t *testing.T) {
	ca := spiffetest.NewCA(t, "knhk.test")
	svid := ca.Issue(serverID)
	der, err := x509.MarshalECPrivateKey(svid.PrivateKey.(*ecdsa.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	sec1 := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
	params := pem.EncodeToMemory(&pem.Block{Type: "EC PARAMETERS", Bytes: []byte{6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7}})
	for name, b := range map[string][]byte{"pkcs8": spiffetest.KeyPEM(t, svid), "sec1": sec1, "with parameters": append(params, sec1...)} {
		cfg := filesOf(t, svid, ca)
		spiffetest.WriteFile(t, cfg.Files.Key, b)
		if _, err := Open(t.Context(), cfg); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err = parseKey([]byte("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"))
	wantError(t, "encrypted", err, "encrypted")
}

// A renewal is taken when all of it is there and holds; until then the last good one stays, and a failure is told once.
func TestFilesReload(t *testing.T) {
	ca, second := spiffetest.NewCA(t, "knhk.test"), spiffetest.NewCA(t, "knhk.test")
	first := ca.Issue(serverID)
	cfg := filesOf(t, first, ca)
	var log journal
	var updates []time.Time
	failures := 0
	cfg.Log, cfg.OnError, cfg.OnUpdate = log.logger(), func() { failures++ }, func(end time.Time) { updates = append(updates, end) }
	now := time.Now()
	cfg.Now = func() time.Time { return now }
	s := mustOpen(t, cfg)
	look := func(times int) {
		for range times {
			s.poll(t.Context())
		}
	}
	check := func(step string, want *x509svid.SVID, wantUpdates, wantFailures int) {
		t.Helper()
		if got := serialOf(t, s); got != serialHex(want.Certificates[0]) {
			t.Fatalf("%s: another certificate is in use", step)
		}
		if len(updates) != wantUpdates || failures != wantFailures || log.count("are not taken") != failures {
			t.Fatalf("%s: %d updates and %d failures, want %d and %d; log:\n%s", step, len(updates), failures, wantUpdates, wantFailures, &log)
		}
	}
	look(3)
	check("nothing changed", first, 1, 0)

	next := ca.Issue(serverID, spiffetest.WithNotAfter(now.Add(2*time.Hour)))
	spiffetest.WriteFile(t, cfg.Files.Certificate, spiffetest.CertificatePEM(next))
	look(1)
	check("torn, at the first look", first, 1, 0)
	spiffetest.WriteFile(t, cfg.Files.Key, spiffetest.KeyPEM(t, next))
	look(2)
	check("whole", next, 2, 0)
	if !updates[1].Equal(next.Certificates[0].NotAfter) {
		t.Fatal("OnUpdate was told another end")
	}

	torn := ca.Issue(serverID)
	spiffetest.WriteFile(t, cfg.Files.Certificate, spiffetest.CertificatePEM(torn))
	look(5)
	check("torn and left so", next, 2, 1)
	spiffetest.WriteFile(t, cfg.Files.Certificate, []byte("-----BEGIN CERT"))
	look(5)
	check("another failure", next, 2, 2)
	os.Remove(cfg.Files.Certificate)
	look(5)
	check("removed", next, 2, 3)
	spiffetest.WriteFile(t, cfg.Files.Certificate, spiffetest.CertificatePEM(next))
	look(2)
	check("back", next, 2, 3)
	os.Remove(cfg.Files.Certificate)
	look(2)
	check("removed again", next, 2, 4)

	future := ca.Issue(serverID, spiffetest.WithNotBefore(now.Add(time.Minute)))
	spiffetest.WriteFiles(t, filepath.Dir(cfg.Files.Certificate), future, ca)
	look(3)
	check("not yet valid", next, 2, 5)
	now = now.Add(2 * time.Minute)
	look(1)
	check("valid by time", future, 3, 5)

	foreign := second.Issue(serverID) // an authority that the bundle does not have
	spiffetest.WriteFiles(t, filepath.Dir(cfg.Files.Certificate), foreign, ca)
	look(2)
	check("unknown authority", future, 3, 6)
	spiffetest.WriteFiles(t, filepath.Dir(cfg.Files.Certificate), foreign, ca, second)
	look(1)
	check("both authorities", foreign, 4, 6)
	spiffetest.WriteFile(t, cfg.Files.CA, second.PEM())
	look(1)
	check("the old authority is gone, same SVID", foreign, 4, 6)
	b, err := s.GetX509BundleForTrustDomain(ca.TrustDomain)
	if err != nil || b.HasX509Authority(ca.Certificate) || !b.HasX509Authority(second.Certificate) {
		t.Fatalf("the bundle in use is the old one, %v", err)
	}
	if os.Chmod(cfg.Files.Key, 0o644) != nil {
		t.Fatal("chmod")
	}
	look(2)
	check("key opened to others", foreign, 4, 7)
}

// Kubernetes swaps a link to a folder under all files at once.
func TestFilesSwappedLinks(t *testing.T) {
	ca := spiffetest.NewCA(t, "knhk.test")
	dir := t.TempDir()
	put := func(version string) *x509svid.SVID {
		svid := ca.Issue(serverID)
		if err := os.Mkdir(filepath.Join(dir, version), 0o700); err != nil {
			t.Fatal(err)
		}
		spiffetest.WriteFiles(t, filepath.Join(dir, version), svid, ca)
		if err := os.Symlink(version, filepath.Join(dir, "new")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "new"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
		return svid
	}
	first := put("..1")
	f := &Files{}
	for name, at := range map[string]*string{"certificate.pem": &f.Certificate, "key.pem": &f.Key, "bundle.pem": &f.CA} {
		*at = filepath.Join(dir, name)
		if err := os.Symlink(filepath.Join("..data", name), *at); err != nil {
			t.Fatal(err)
		}
	}
	s := mustOpen(t, Config{ID: first.ID, Files: f})
	second := put("..2")
	s.poll(t.Context())
	if serialOf(t, s) != serialHex(second.Certificates[0]) {
		t.Fatal("the new SVID is not in use")
	}
}

// Run sees what changes within a second or two, and tells the end of an SVID that nobody renews.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := spiffetest.NewCA(t, "knhk.test")
		cfg := filesOf(t, ca.Issue(serverID), ca)
		var log journal
		cfg.Log = log.logger()
		s := mustOpen(t, cfg)
		ctx, cancel := context.WithCancel(t.Context())
		ran := make(chan error, 1)
		go func() { ran <- s.Run(ctx) }()
		next := ca.Issue(serverID)
		spiffetest.WriteFiles(t, filepath.Dir(cfg.Files.Certificate), next, ca)
		time.Sleep(1500 * time.Millisecond)
		if serialOf(t, s) != serialHex(next.Certificates[0]) {
			t.Error("the renewed SVID is not in use")
		}
		time.Sleep(2 * time.Hour)
		if s.Ready() == nil || log.count("every TLS handshake fails") != 1 {
			t.Errorf("its end was not told once:\n%s", &log)
		}
		last := ca.Issue(serverID)
		spiffetest.WriteFiles(t, filepath.Dir(cfg.Files.Certificate), last, ca)
		time.Sleep(1500 * time.Millisecond)
		if err := s.Ready(); err != nil {
			t.Error(err)
		}
		cancel()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	})
}

// Open waits for files that come, whatever their order, and no longer than it may.
func TestOpenWaitsForFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := spiffetest.NewCA(t, "knhk.test")
		svid := ca.Issue(serverID)
		cfg := filesOf(t, svid, ca)
		os.Remove(cfg.Files.Certificate)
		spiffetest.WriteFile(t, cfg.Files.Key, spiffetest.KeyPEM(t, ca.Issue(serverID)))
		go func() {
			time.Sleep(3 * time.Second)
			spiffetest.WriteFile(t, cfg.Files.Certificate, spiffetest.CertificatePEM(svid))
			time.Sleep(3 * time.Second)
			spiffetest.WriteFile(t, cfg.Files.Key, spiffetest.KeyPEM(t, svid))
		}()
		start := time.Now()
		mustOpen(t, cfg)
		if d := time.Since(start); d > 7*time.Second {
			t.Errorf("it took %s", d)
		}
		os.Remove(cfg.Files.CA)
		start = time.Now()
		_, err := Open(t.Context(), cfg)
		wantError(t, "no authorities", err, "spiffe: open: no SVID within 10s", "bundle.pem", "no such file")
		if d := time.Since(start); d != 10*time.Second {
			t.Errorf("it waited %s", d)
		}
	})
}

func FuzzPEM(f *testing.F) {
	ca := spiffetest.NewCA(f, "knhk.test")
	svid := ca.Issue(serverID)
	f.Add(ca.PEM())
	f.Add(spiffetest.KeyPEM(f, svid))
	f.Add(append(ca.PEM(), ca.PEM()[:80]...))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if certs, err := parseCertificates(b); err == nil {
			if len(certs) == 0 || len(certs) != strings.Count(string(b), "-----BEGIN ") {
				t.Fatal("not as many certificates as blocks")
			}
			checkBundle(certs)
		}
		if key, err := parseKey(b); err == nil {
			if _, err := x509.MarshalPKCS8PrivateKey(key); err != nil {
				if _, ok := key.(ed25519.PrivateKey); !ok {
					t.Skip() // X25519 and the like: refused as keys of SVIDs
				}
				t.Fatal(err)
			}
		}
	})
}
