package gcp

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/keys/keystest"
	"github.com/knhk/sidecar/crypto/kms"
)

// open opens a store over the fake, with the archive in dir.
func open(tb testing.TB, f *fake, dir string) *kms.Store {
	tb.Helper()
	s, err := Open(tb.Context(), f.uri(), kms.Options{Archive: dir})
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// opened is open for one test, and a version made.
func opened(tb testing.TB, alg keys.Algorithm) (*fake, *kms.Store, keys.Version, keys.Signer) {
	tb.Helper()
	f := serve(tb)
	s := open(tb, f, tb.TempDir())
	tb.Cleanup(func() {
		if err := s.Close(); err != nil {
			tb.Error(err)
		}
	})
	v, err := s.Create(tb.Context(), "daily", alg)
	if err != nil {
		tb.Fatal(err)
	}
	sg, err := s.Signer(tb.Context(), v.Label, v.ID)
	if err != nil {
		tb.Fatal(err)
	}
	return f, s, v, sg
}

func TestConformance(t *testing.T) {
	f := serve(t)
	f.generate = 3 * time.Millisecond
	dir := t.TempDir()
	keystest.Run(t, func(t *testing.T) keys.Store { return open(t, f, dir) })
}

// TestTampered: whatever is changed in an answer, no signature comes of it.
func TestTampered(t *testing.T) {
	for _, alg := range []keys.Algorithm{keys.Ed25519, keys.P256} {
		f, s, v, sg := opened(t, alg)
		other, err := s.Create(t.Context(), v.Label, alg)
		if err != nil {
			t.Fatal(err)
		}
		otherName := ring + "/cryptoKeys/daily/cryptoKeyVersions/" + other.ID
		for _, c := range []struct {
			why, want string
			change    func(*kmspb.AsymmetricSignResponse)
		}{
			{"a bit of the signature", "wrong checksum", func(r *kmspb.AsymmetricSignResponse) { r.Signature[9] ^= 1 }},
			{"a bit of it, with its checksum", "does not verify", func(r *kmspb.AsymmetricSignResponse) {
				r.Signature[9] ^= 1
				r.SignatureCrc32C = checksum(r.Signature)
			}},
			{"no checksum", "wrong checksum", func(r *kmspb.AsymmetricSignResponse) { r.SignatureCrc32C = nil }},
			{"the message's checksum was not looked at", "did not check", func(r *kmspb.AsymmetricSignResponse) {
				r.VerifiedDataCrc32C, r.VerifiedDigestCrc32C = false, false
			}},
			{"another version", "signed with", func(r *kmspb.AsymmetricSignResponse) { r.Name = otherName }},
			{"nothing", "does not verify", func(r *kmspb.AsymmetricSignResponse) { r.Signature, r.SignatureCrc32C = nil, checksum(nil) }},
		} {
			f.set(func() {
				f.distort = func(m proto.Message) {
					if r, ok := m.(*kmspb.AsymmetricSignResponse); ok {
						c.change(r)
					}
				}
			})
			if sig, err := sg.Sign(t.Context(), []byte("m")); err == nil || sig != nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s, %s: %d bytes, %v; want %q", alg, c.why, len(sig), err, c.want)
			}
		}
		// A service that signs with another key, and says it did not.
		f.set(func() {
			f.distort = nil
			vs := f.vers[ring+"/cryptoKeys/daily"]
			vs[0].key, vs[1].key = vs[1].key, vs[0].key
		})
		if sig, err := sg.Sign(t.Context(), []byte("m")); err == nil || sig != nil || !strings.Contains(err.Error(), "does not verify") {
			t.Errorf("%s, keys exchanged: %d bytes, %v", alg, len(sig), err)
		}
	}
}

// TestTamperedPublicKey: a public key is checked when it is read, and is the same ever after.
func TestTamperedPublicKey(t *testing.T) {
	f, _, v, _ := opened(t, keys.Ed25519)
	for _, c := range []struct {
		why, want string
		change    func(*kmspb.PublicKey)
	}{
		{"checksum", "wrong checksum", func(p *kmspb.PublicKey) { p.PemCrc32C.Value++ }},
		{"no checksum", "wrong checksum", func(p *kmspb.PublicKey) { p.PemCrc32C = nil }},
		{"name", "gave that of", func(p *kmspb.PublicKey) { p.Name += "0" }},
		{"no key", "not one PEM block", func(p *kmspb.PublicKey) { p.Pem, p.PemCrc32C = "x", checksum([]byte("x")) }},
	} {
		f.set(func() {
			f.distort = func(m proto.Message) {
				if p, ok := m.(*kmspb.PublicKey); ok {
					c.change(p)
				}
			}
		})
		s := open(t, f, t.TempDir())
		if _, err := s.Signer(t.Context(), v.Label, v.ID); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want %q", c.why, err, c.want)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestCodes: what the service's refusals are to callers.
func TestCodes(t *testing.T) {
	for _, c := range []struct {
		code codes.Code
		kind keys.FailureKind
	}{
		{codes.PermissionDenied, keys.KindCredential},
		{codes.Unauthenticated, keys.KindCredential},
		{codes.ResourceExhausted, keys.KindThrottled},
		{codes.Unavailable, keys.KindUnavailable},
		{codes.Internal, keys.KindUnavailable},
		{codes.InvalidArgument, keys.KindOther},
		{codes.FailedPrecondition, keys.KindUnavailable}, // the version is enabled: it is something else, and not for ever
		{codes.NotFound, keys.KindUnavailable},           // the version is there: a copy of the service lags behind
	} {
		f, _, _, sg := opened(t, keys.Ed25519)
		f.set(func() { f.err["AsymmetricSign"] = status.Error(c.code, "injected") })
		if _, err := sg.Sign(t.Context(), []byte("m")); keys.Kind(err) != c.kind {
			t.Errorf("%s: %v is %q, want %q", c.code, err, keys.Kind(err), c.kind)
		}
	}
}

// TestThrottled: a service that throttles is not asked by everybody, and is found again.
func TestThrottled(t *testing.T) {
	f, _, _, sg := opened(t, keys.P256)
	f.set(func() {
		f.err["AsymmetricSign"], f.calls["AsymmetricSign"] = status.Error(codes.ResourceExhausted, "quota"), 0
	})
	start := time.Now()
	for range 50 {
		if _, err := sg.Sign(t.Context(), []byte("m")); !errors.Is(err, keys.ErrThrottled) {
			t.Fatalf("Sign: %v, want %v", err, keys.ErrThrottled)
		}
	}
	f.set(func() {
		if most := 4 + int(time.Since(start)/time.Second); f.calls["AsymmetricSign"] > most {
			t.Errorf("%d calls reached the service, want at most %d", f.calls["AsymmetricSign"], most)
		}
		delete(f.err, "AsymmetricSign")
	})
	recovers(t, sg)
}

// recovers waits until a signature is made again.
func recovers(t *testing.T, sg keys.Signer) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		_, err := sg.Sign(t.Context(), []byte("m"))
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still not: %v", err)
		}
	}
}

// TestServerDown: a service that is gone is unavailable at once, and found when it is back.
func TestServerDown(t *testing.T) {
	f, _, _, sg := opened(t, keys.Ed25519)
	f.server.Stop()
	for range 10 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		_, err := sg.Sign(ctx, []byte("m"))
		cancel()
		if !errors.Is(err, keys.ErrUnavailable) {
			t.Fatalf("Sign: %v, want %v", err, keys.ErrUnavailable)
		}
	}
	l, err := net.Listen("tcp", f.addr)
	if err != nil {
		t.Skipf("somebody else has taken the port: %v", err)
	}
	f.listen(l)
	recovers(t, sg)
}

// TestSilent: a service that does not answer costs the caller no more than its own time.
func TestSilent(t *testing.T) {
	f, _, _, sg := opened(t, keys.Ed25519)
	hold := make(chan struct{})
	f.set(func() { f.hold = hold })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := sg.Sign(ctx, []byte("m")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Sign: %v, want %v", err, context.DeadlineExceeded)
	}
	f.set(func() { f.hold = nil })
	close(hold)
	recovers(t, sg)
}

// TestElsewhere: what an administrator does in the console is seen at the next call, and restored versions come back.
func TestElsewhere(t *testing.T) {
	f, s, v, sg := opened(t, keys.Ed25519)
	name := ring + "/cryptoKeys/daily/cryptoKeyVersions/" + v.ID
	state := func(st kmspb.CryptoKeyVersion_CryptoKeyVersionState) {
		f.set(func() {
			fv, err := f.find(name)
			if err != nil {
				t.Fatal(err)
			}
			fv.v.State = st
		})
	}
	for _, st := range []kmspb.CryptoKeyVersion_CryptoKeyVersionState{
		kmspb.CryptoKeyVersion_DISABLED, kmspb.CryptoKeyVersion_DESTROY_SCHEDULED, kmspb.CryptoKeyVersion_DESTROYED,
	} {
		state(st)
		if _, err := sg.Sign(t.Context(), []byte("m")); !errors.Is(err, keys.ErrDisabled) {
			t.Errorf("%s: %v, want %v", st, err, keys.ErrDisabled)
		}
		if vs, err := s.Versions(t.Context(), v.Label); err != nil || len(vs) != 1 || vs[0].Public == nil || vs[0].State == keys.Enabled {
			t.Errorf("%s: %+v, %v", st, vs, err)
		}
	}
	state(kmspb.CryptoKeyVersion_ENABLED)
	if _, err := sg.Sign(t.Context(), []byte("m")); err != nil {
		t.Errorf("restored: %v", err)
	}
}

// TestOthers: versions of other algorithms are not listed, a CryptoKey of another purpose is refused, imported keys do not sign.
func TestOthers(t *testing.T) {
	f, s, v, _ := opened(t, keys.Ed25519)
	key := ring + "/cryptoKeys/daily"
	f.set(func() {
		foreign := *f.vers[key][0]
		foreign.v = proto.Clone(foreign.v).(*kmspb.CryptoKeyVersion)
		foreign.v.Name, foreign.v.Algorithm = key+"/cryptoKeyVersions/2", kmspb.CryptoKeyVersion_RSA_SIGN_PSS_2048_SHA256
		f.vers[key] = append(f.vers[key], &foreign)
		f.keys[ring+"/cryptoKeys/box"] = &kmspb.CryptoKey{Name: ring + "/cryptoKeys/box", Purpose: kmspb.CryptoKey_ENCRYPT_DECRYPT}
		f.vers[key][0].v.ImportJob = ring + "/importJobs/j"
	})
	if vs, err := s.Versions(t.Context(), v.Label); err != nil || len(vs) != 1 {
		t.Errorf("Versions: %+v, %v", vs, err)
	}
	if _, err := s.Signer(t.Context(), v.Label, "2"); !errors.Is(err, keys.ErrNotFound) {
		t.Errorf("Signer of a foreign version: %v", err)
	}
	if _, err := s.Create(t.Context(), "box", keys.Ed25519); err == nil || !strings.Contains(err.Error(), "purpose") {
		t.Errorf("Create in a CryptoKey of another purpose: %v", err)
	}
	if _, err := s.Signer(t.Context(), v.Label, v.ID); err == nil || !strings.Contains(err.Error(), "exportable") {
		t.Errorf("Signer of an imported key: %v", err)
	}
	if _, err := s.Create(t.Context(), strings.Repeat("l", 64), keys.Ed25519); err == nil || !strings.Contains(err.Error(), "at most 63") {
		t.Errorf("Create under a label that is too long: %v", err)
	}
}

// TestCredentialsFile: a file that others can read is refused, and no error repeats it.
func TestCredentialsFile(t *testing.T) {
	const secret = "S3cr3t"
	file := filepath.Join(t.TempDir(), "key.json")
	for _, c := range []struct {
		why, content, want string
		mode               os.FileMode
	}{
		{"readable by others", `{"type":"service_account","private_key":"` + secret + `"}`, "for its owner only", 0o644},
		{"broken", secret, "no credentials file", 0o600},
		{"no type", `{"private_key":"` + secret + `"}`, "no credentials file", 0o600},
	} {
		if err := os.WriteFile(file, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(file, c.mode); err != nil {
			t.Fatal(err)
		}
		_, err := Open(t.Context(), keys.URI{Scheme: "gcpkms", Location: ring, Label: "l", Credentials: "file:" + file}, kms.Options{Archive: t.TempDir()})
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %v; want %q", c.why, err, c.want)
		}
	}
}

// BenchmarkSign is against the fake in this process: what store and client cost, not what the service does.
func BenchmarkSign(b *testing.B) {
	for _, alg := range []keys.Algorithm{keys.Ed25519, keys.P256} {
		b.Run(string(alg), func(b *testing.B) {
			_, _, _, sg := opened(b, alg)
			for b.Loop() {
				if _, err := sg.Sign(b.Context(), []byte("checkpoint")); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
