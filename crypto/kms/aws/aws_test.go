package aws

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/keys/keystest"
	"github.com/knhk/sidecar/crypto/kms"
)

func open(tb testing.TB, f *fake, dir string) *kms.Store {
	tb.Helper()
	s, err := Open(tb.Context(), f.uri(), kms.Options{Archive: dir})
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// opened opens a store over a fake of its own for one test, and makes a version.
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
	f.create = 3 * time.Millisecond
	f.aliases["alias/aws/ebs"] = ""
	f.aliases["alias/knhk/zz"] = "foreign"
	dir := t.TempDir()
	keystest.RunWithin(t, func(t *testing.T) keys.Store { return open(t, f, dir) }, keystest.Limits{
		Messages: map[keys.Algorithm][2]int{keys.Ed25519: {1, MaxEd25519}},
	})
}

// TestTampered: whatever is changed in an answer, no signature comes of it.
func TestTampered(t *testing.T) {
	for _, alg := range []keys.Algorithm{keys.Ed25519, keys.P256} {
		f, s, v, sg := opened(t, alg)
		other, err := s.Create(t.Context(), v.Label, alg)
		if err != nil {
			t.Fatal(err)
		}
		_, otherKey, err := split(other.ID)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			why, want string
			change    func(map[string]any)
		}{
			{"a bit of the signature", "does not verify", func(r map[string]any) { r["Signature"].([]byte)[9] ^= 1 }},
			{"another key", "signed with", func(r map[string]any) { r["KeyId"] = "arn:aws:kms:x:1:key/" + otherKey }},
			{"another algorithm", "signed with", func(r map[string]any) { r["SigningAlgorithm"] = "ECDSA_SHA_384" }},
			{"nothing", "signed with", func(r map[string]any) { clear(r) }},
		} {
			f.set(func() {
				f.distort = func(op string, r map[string]any) {
					if op == "Sign" {
						c.change(r)
					}
				}
			})
			if sig, err := sg.Sign(t.Context(), []byte("m")); err == nil || sig != nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s, %s: %d bytes, %v; want %q", alg, c.why, len(sig), err, c.want)
			}
		}
	}
}

// TestCodes: what the service's refusals are to callers.
func TestCodes(t *testing.T) {
	for _, c := range []struct {
		status int
		code   string
		kind   keys.FailureKind
	}{
		{400, "AccessDeniedException", keys.KindCredential},
		{400, "UnrecognizedClientException", keys.KindCredential},
		{400, "ExpiredTokenException", keys.KindCredential},
		{400, "ThrottlingException", keys.KindThrottled},
		{429, "SomethingNew", keys.KindThrottled},
		{500, "KMSInternalException", keys.KindUnavailable},
		{503, "SomethingNew", keys.KindUnavailable},
		{302, "SomethingNew", keys.KindUnavailable},
		{400, "ValidationException", keys.KindOther},
		{400, "DisabledException", keys.KindDisabled},
		{400, "KMSInvalidStateException", keys.KindUnavailable}, // the key is enabled: it is something else, and not for ever
		{400, "NotFoundException", keys.KindUnavailable},        // the key is there: a copy of the service lags behind
	} {
		f, _, _, sg := opened(t, keys.Ed25519)
		f.set(func() { f.err["Sign"] = &refused{c.status, c.code} })
		if _, err := sg.Sign(t.Context(), []byte("m")); keys.Kind(err) != c.kind {
			t.Errorf("%d %s: %v is %q, want %q", c.status, c.code, err, keys.Kind(err), c.kind)
		}
	}
}

// TestNoCredentials: without credentials nothing is asked of a metadata address, and the refusal says what is missing.
func TestNoCredentials(t *testing.T) {
	f := serve(t)
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "")
	t.Setenv("AWS_EC2_METADATA_DISABLED", "")
	s := open(t, f, t.TempDir())
	defer s.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := s.Versions(ctx, "daily"); !errors.Is(err, keys.ErrCredential) {
		t.Errorf("Versions: %v, want %v", err, keys.ErrCredential)
	}
}

// TestThrottled: a service that throttles is not asked by everybody, and is found again.
func TestThrottled(t *testing.T) {
	f, _, _, sg := opened(t, keys.P256)
	f.set(func() { f.err["Sign"], f.calls["Sign"] = &refused{400, "ThrottlingException"}, 0 })
	start := time.Now()
	for range 50 {
		if _, err := sg.Sign(t.Context(), []byte("m")); !errors.Is(err, keys.ErrThrottled) {
			t.Fatalf("Sign: %v, want %v", err, keys.ErrThrottled)
		}
	}
	f.set(func() {
		if most := 4 + int(time.Since(start)/time.Second); f.calls["Sign"] > most {
			t.Errorf("%d calls reached the service, want at most %d", f.calls["Sign"], most)
		}
		delete(f.err, "Sign")
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
	if err := f.server.Close(); err != nil {
		t.Fatal(err)
	}
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

// TestElsewhere: what an administrator does in the console is seen at the next call.
func TestElsewhere(t *testing.T) {
	f, s, v, sg := opened(t, keys.Ed25519)
	_, id, err := split(v.ID)
	if err != nil {
		t.Fatal(err)
	}
	for _, state := range []string{"Disabled", "PendingDeletion"} {
		f.set(func() { f.keys[id].state = state })
		if _, err := sg.Sign(t.Context(), []byte("m")); !errors.Is(err, keys.ErrDisabled) {
			t.Errorf("%s: %v, want %v", state, err, keys.ErrDisabled)
		}
		vs, err := s.Versions(t.Context(), v.Label)
		if err != nil || len(vs) != 1 || vs[0].Public == nil || vs[0].State == keys.Enabled {
			t.Errorf("%s: %+v, %v", state, vs, err)
		}
	}
}

// TestForgotten: the service forgets a key a week after Destroy; the archive does not.
func TestForgotten(t *testing.T) {
	f := serve(t)
	dir := t.TempDir()
	s := open(t, f, dir)
	v, err := s.Create(t.Context(), "daily", keys.P256)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	f.set(func() {
		clear(f.keys)
		clear(f.aliases)
	})
	s = open(t, f, dir)
	defer s.Close()
	vs, err := s.Versions(t.Context(), "daily")
	if err != nil || len(vs) != 1 || vs[0].ID != v.ID || vs[0].State != keys.Destroyed || !v.Public.(*ecdsa.PublicKey).Equal(vs[0].Public) {
		t.Errorf("Versions: %+v, %v; want the version, destroyed, with its public key", vs, err)
	}
	if _, err := s.Signer(t.Context(), "daily", v.ID); !errors.Is(err, keys.ErrDisabled) {
		t.Errorf("Signer: %v, want %v", err, keys.ErrDisabled)
	}
	next, err := s.Create(t.Context(), "daily", keys.P256)
	if err != nil {
		t.Fatal(err)
	}
	if vs, err := s.Versions(t.Context(), "daily"); err != nil || len(vs) != 2 || vs[1].ID != next.ID {
		t.Errorf("Versions: %+v, %v; want the new version last", vs, err)
	}
}

// TestForeignAlias: an alias in our name that points to somebody else's key makes it no version of ours.
func TestForeignAlias(t *testing.T) {
	f, s, v, _ := opened(t, keys.Ed25519)
	version, id, err := split(v.ID)
	if err != nil {
		t.Fatal(err)
	}
	f.set(func() {
		foreign := *f.keys[id]
		foreign.id, foreign.description = "00000000-0000", "payroll"
		f.keys[foreign.id] = &foreign
		f.aliases["alias/knhk/daily/0009-20260101T000000Z-00000000"] = foreign.id
	})
	if vs, err := s.Versions(t.Context(), "daily"); err != nil || len(vs) != 1 {
		t.Errorf("Versions: %+v, %v; want ours alone", vs, err)
	}
	for _, id := range []string{version + ".00000000-0000", "0009-20260101T000000Z-00000000.00000000-0000", "0009-20260101T000000Z-00000000." + id} {
		for name, end := range map[string]func(context.Context, string, string) error{"Disable": s.Disable, "Destroy": s.Destroy} {
			if err := end(t.Context(), "daily", id); !errors.Is(err, keys.ErrNotFound) {
				t.Errorf("%s(%s): %v, want %v", name, id, err, keys.ErrNotFound)
			}
		}
	}
	f.set(func() {
		if st := f.keys["00000000-0000"].state; st != "Enabled" {
			t.Errorf("somebody else's key is %s", st)
		}
	})
}

// TestNoAlias: a key that gets no alias is not left behind.
func TestNoAlias(t *testing.T) {
	f, s, _, _ := opened(t, keys.Ed25519)
	f.set(func() { f.err["CreateAlias"] = &refused{400, "LimitExceededException"} })
	if _, err := s.Create(t.Context(), "daily", keys.P256); !errors.Is(err, keys.ErrThrottled) {
		t.Errorf("Create: %v, want %v", err, keys.ErrThrottled)
	}
	f.set(func() {
		var left int
		for _, k := range f.keys {
			if k.state != "PendingDeletion" {
				left++
			}
		}
		if left != 1 {
			t.Errorf("%d keys are left, want the one made before", left)
		}
	})
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
