package keys

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	fnote "github.com/transparency-dev/formats/note"
	"golang.org/x/mod/sumdb/note"
)

// testSigner signs in memory.
type testSigner struct {
	alg  Algorithm
	key  crypto.Signer
	wait bool // Sign waits for its context
}

func (s testSigner) Algorithm() Algorithm     { return s.alg }
func (s testSigner) Public() crypto.PublicKey { return s.key.Public() }
func (s testSigner) Sign(ctx context.Context, msg []byte) ([]byte, error) {
	if s.wait {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if s.alg == Ed25519 {
		return s.key.Sign(nil, msg, crypto.Hash(0))
	}
	digest := sha256.Sum256(msg)
	return s.key.Sign(rand.Reader, digest[:], crypto.SHA256)
}

func newSigner(t testing.TB, alg Algorithm) testSigner {
	t.Helper()
	var key crypto.Signer
	var err error
	if alg == Ed25519 {
		_, key, err = ed25519.GenerateKey(rand.Reader)
	} else {
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	if err != nil {
		t.Fatal(err)
	}
	return testSigner{alg: alg, key: key}
}

func p384(t *testing.T) *ecdsa.PublicKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &k.PublicKey
}

func TestVerify(t *testing.T) {
	msg := []byte("message")
	ed, ec := newSigner(t, Ed25519), newSigner(t, P256)
	sigEd, err1 := ed.Sign(t.Context(), msg)
	sigEC, err2 := ec.Sign(t.Context(), msg)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	changed := func(sig []byte) []byte { s := slices.Clone(sig); s[len(s)-1] ^= 1; return s }
	for _, c := range []struct {
		why  string
		alg  Algorithm
		pub  crypto.PublicKey
		msg  string
		sig  []byte
		want bool
	}{
		{"Ed25519", Ed25519, ed.Public(), "message", sigEd, true},
		{"P-256", P256, ec.Public(), "message", sigEC, true},
		{"Ed25519, other message", Ed25519, ed.Public(), "massage", sigEd, false},
		{"P-256, other message", P256, ec.Public(), "massage", sigEC, false},
		{"Ed25519, one bit", Ed25519, ed.Public(), "message", changed(sigEd), false},
		{"P-256, one bit", P256, ec.Public(), "message", changed(sigEC), false},
		{"Ed25519, cut", Ed25519, ed.Public(), "message", sigEd[:63], false},
		{"P-256, bytes after the DER", P256, ec.Public(), "message", append(slices.Clone(sigEC), 0), false},
		{"no signature", Ed25519, ed.Public(), "message", nil, false},
		{"algorithm of the other key", P256, ed.Public(), "message", sigEd, false},
		{"unknown algorithm", "rsa", ed.Public(), "message", sigEd, false},
		{"no key", Ed25519, nil, "message", sigEd, false},
		{"short key (the standard library would panic)", Ed25519, ed.Public().(ed25519.PublicKey)[:31], "message", sigEd, false},
		{"nil P-256 key", P256, (*ecdsa.PublicKey)(nil), "message", sigEC, false},
		{"other curve", P256, p384(t), "message", sigEC, false},
	} {
		if err := Verify(c.alg, c.pub, []byte(c.msg), c.sig); (err == nil) != c.want {
			t.Errorf("%s: %v; want it to verify: %v", c.why, err, c.want)
		}
	}
}

// TestNote signs notes and opens them with this package's verifiers and with those of x/mod and formats.
func TestNote(t *testing.T) {
	for _, c := range []struct {
		alg    Algorithm
		oracle func(string) (note.Verifier, error)
	}{{Ed25519, note.NewVerifier}, {P256, fnote.NewECDSAVerifier}} {
		s := newSigner(t, c.alg)
		ns, err := NoteSigner("example.com/log", s, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		vkey, err := VKey("example.com/log", s.Public())
		if err != nil {
			t.Fatal(err)
		}
		own, err := Verifier(vkey)
		if err != nil {
			t.Fatal(err)
		}
		oracle, err := c.oracle(vkey)
		if err != nil {
			t.Fatal(err)
		}
		if ns.Name() != "example.com/log" || ns.KeyHash() != own.KeyHash() || ns.KeyHash() != oracle.KeyHash() || own.Name() != ns.Name() {
			t.Errorf("%s: signer %s %08x, verifier %s %08x, oracle %08x",
				c.alg, ns.Name(), ns.KeyHash(), own.Name(), own.KeyHash(), oracle.KeyHash())
		}
		signed, err := note.Sign(&note.Note{Text: "example.com/log\n7\nAAAA\n"}, ns)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range []note.Verifier{own, oracle} {
			if n, err := note.Open(signed, note.VerifierList(v)); err != nil || len(n.Sigs) != 1 {
				t.Errorf("%s: Open: %v", c.alg, err)
			}
		}
		if _, err := note.Open([]byte(strings.Replace(string(signed), "7", "8", 1)), note.VerifierList(own)); err == nil {
			t.Errorf("%s: a changed note opens", c.alg)
		}
	}
}

// TestVKeyKnown: verifier keys that others published. The first is that of the Go checksum database; the second stands in
// the documentation of formats/note, with its hash as the code computes it.
func TestVKeyKnown(t *testing.T) {
	const sumdb = "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"
	v, err := Verifier(sumdb)
	if err != nil || v.Name() != "sum.golang.org" || v.KeyHash() != 0x033de0ae {
		t.Fatalf("Verifier: %v, %v", v, err)
	}
	key, err := base64.StdEncoding.DecodeString(sumdb[len("sum.golang.org+033de0ae+"):])
	if err != nil {
		t.Fatal(err)
	}
	if got, err := VKey("sum.golang.org", ed25519.PublicKey(key[1:])); err != nil || got != sumdb {
		t.Errorf("VKey = %s, %v; want %s", got, err, sumdb)
	}
	const rekor = "rekor.sigstore.dev+c0d23d6a+AjBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABNhtmPtrWm3U1eQXBogSMdGvXwBcK5AW5i0hrZLOC96l+s" +
		"mGNM7nwZ4QvFK/4sueRoVj//QP22Ni4Qt9DPfkWLc="
	if v, err := Verifier(rekor); err != nil || v.KeyHash() != 0xc0d23d6a {
		t.Errorf("Verifier of Rekor's key: %v, %v", v, err)
	}
}

func TestVerifierRefuses(t *testing.T) {
	ed, err1 := VKey("log", newSigner(t, Ed25519).Public())
	ec, err2 := VKey("log", newSigner(t, P256).Public())
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	hash := func(vkey string) string { return strings.Split(vkey, "+")[1] }
	key := func(vkey string) string { return strings.SplitN(vkey, "+", 3)[2] }
	typed := func(kind byte, rest ...byte) string {
		return "log+00000000+" + base64.StdEncoding.EncodeToString(append([]byte{kind}, rest...))
	}
	for _, c := range []struct{ why, in string }{
		{"empty", ""}, {"a name", "log"}, {"no key", "log+" + hash(ed)}, {"empty key", "log+" + hash(ed) + "+"},
		{"no name", "+" + hash(ed) + "+" + key(ed)},
		{"space in the name", "l og+" + hash(ed) + "+" + key(ed)},
		{"other name: the hash of Ed25519 binds it", "lag+" + hash(ed) + "+" + key(ed)},
		{"wrong hash", "log+00000000+" + key(ed)}, {"wrong hash, P-256", "log+00000000+" + key(ec)},
		{"hash of 7 digits", "log+" + hash(ec)[1:] + "+" + key(ec)},
		{"hash is no number", "log+zzzzzzzz+" + key(ec)},
		{"not base64", "log+" + hash(ed) + "+!!!!"}, {"base64 with a line break", ed[:len(ed)-4] + "\n" + ed[len(ed)-4:]},
		{"space after it", ed + " "}, {"line break after it", ec + "\n"},
		{"cosignature key", typed(4, make([]byte, 32)...)}, {"type 0", typed(0)}, {"type 2 without a key", typed(2)},
		{"type 2 with an Ed25519 key", func() string {
			der := []byte{0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00}
			return typed(2, append(der, make([]byte, 32)...)...)
		}()},
		{"type 1, key too short", typed(1, make([]byte, 31)...)},
	} {
		if v, err := Verifier(c.in); err == nil {
			t.Errorf("%s: Verifier(%q) = %v; want a refusal", c.why, c.in, v)
		}
	}
}

func TestNoteSignerRefuses(t *testing.T) {
	good := newSigner(t, Ed25519)
	for _, c := range []struct {
		why, name string
		s         Signer
		timeout   time.Duration
	}{
		{"no name", "", good, time.Second},
		{"plus in the name", "a+b", good, time.Second},
		{"space in the name", "a b", good, time.Second},
		{"no timeout", "log", good, 0},
		{"algorithm is not the key's", "log", testSigner{alg: P256, key: good.key}, time.Second},
	} {
		if _, err := NoteSigner(c.name, c.s, c.timeout); err == nil {
			t.Errorf("%s: no error", c.why)
		}
	}
	if _, err := VKey("log", p384(t)); err == nil {
		t.Error("VKey of a P-384 key: no error")
	}
}

func TestNoteSignerTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSigner(t, Ed25519)
		s.wait = true
		ns, err := NoteSigner("log", s, 3*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if _, err := ns.Sign(nil); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != 3*time.Second {
			t.Errorf("Sign: %v after %v; want %v after 3s", err, time.Since(start), context.DeadlineExceeded)
		}
	})
}

func TestVersionID(t *testing.T) {
	now := time.Date(2026, 11, 23, 23, 4, 5, 999, time.FixedZone("CET", 3600))
	first := NextVersionID(nil, now)
	if s := first.String(); !strings.HasPrefix(s, "0001-20261123T220405Z-") || len(s) != 30 {
		t.Errorf("the first id is %s", s)
	}
	if got, err := ParseVersionID(first.String()); err != nil || got != first {
		t.Errorf("ParseVersionID(%s) = %v, %v", first, got, err)
	}
	if a, b := NextVersionID(nil, now), NextVersionID(nil, now); a == b {
		t.Errorf("the same id twice: %s", a)
	}
	ids := []string{"0007-20261123T220405Z-00000000", "x01", "", "0010-20200101T000000Z-00000000"}
	if n := NextVersionID(ids, now); n.Number != 11 {
		t.Errorf("after %v comes number %d, want 11", ids, n.Number)
	}
	for _, bad := range []string{
		"", "1", "0001", "1-20261123T220405Z-00000000", "00001-20261123T220405Z-00000000", "0000-20261123T220405Z-00000000",
		"0001-20261123T220405-00000000", "0001-20261323T220405Z-00000000", "0001-20261123T220405Z-0000000",
		"+001-20261123T220405Z-00000000",
		"0001-20261123T220405Z-0000000G", "0001-20261123T220405Z-ABCDEF00", "0001-20261123T220405Z-00000000-",
		"../0001-20261123T220405Z-00000000",
		"0001-20261123T220405.5Z-00000000",
	} {
		if v, err := ParseVersionID(bad); err == nil {
			t.Errorf("ParseVersionID(%q) = %v; want an error", bad, v)
		}
	}
	// By number, also past 9999 and against the clock; foreign ids first.
	want := []string{
		"", "x01", "x02", "0001-20261123T220405Z-00000000", "0002-20261122T220405Z-00000000", "0002-20261123T220405Z-00000000",
		"9999-20261123T220405Z-00000000", "10000-20261123T220405Z-00000000",
	}
	got := slices.Clone(want)
	slices.Reverse(got)
	slices.SortFunc(got, CompareVersionIDs)
	if !slices.Equal(got, want) {
		t.Errorf("order %q, want %q", got, want)
	}
}

func TestCheckLabel(t *testing.T) {
	for label, ok := range map[string]bool{
		"a": true, "identity": true, "knhk/log @ home (2)": true, strings.Repeat("a", 64): true,
		"": false, strings.Repeat("a", 65): false, " a": false, "a ": false, "a\nb": false, "ü": false, "a\x7f": false, "a\x00": false,
	} {
		if err := CheckLabel(label); (err == nil) != ok {
			t.Errorf("CheckLabel(%q): %v; want it accepted: %v", label, err, ok)
		}
	}
}

func TestProofMessage(t *testing.T) {
	// Lengths keep label and id apart, whatever they hold.
	if a, b := string(ProofMessage("a", "b c")), string(ProofMessage("a b", "c")); a == b {
		t.Errorf("%q stands for two versions", a)
	}
	if m := string(ProofMessage("log", "x01")); m != "knhk/key-proof/v1\n3 log\n3 x01\n" {
		t.Errorf("the message is %q", m)
	}
}

func TestParseAlgorithm(t *testing.T) {
	for s, ok := range map[string]bool{"ed25519": true, "ecdsa-p256": true, "": false, "Ed25519": false, "rsa": false} {
		if alg, err := ParseAlgorithm(s); (err == nil) != ok || ok && string(alg) != s {
			t.Errorf("ParseAlgorithm(%q) = %q, %v", s, alg, err)
		}
	}
}

func FuzzParseVersionID(f *testing.F) {
	f.Add("0003-20261123T220405Z-9f3a61c2")
	f.Add("10000-20261123T220405Z-00000000")
	f.Add("1-2-3")
	f.Fuzz(func(t *testing.T, s string) {
		if v, err := ParseVersionID(s); err == nil && v.String() != s {
			t.Fatalf("%q was accepted as %s", s, v)
		}
	})
}

// FuzzVerifier: what is accepted is the one text of its key, and the libraries accept it too.
func FuzzVerifier(f *testing.F) {
	for _, alg := range []Algorithm{Ed25519, P256} {
		vkey, err := VKey("log", newSigner(f, alg).Public())
		if err != nil {
			f.Fatal(err)
		}
		f.Add(vkey)
		f.Add(strings.Replace(vkey, "+", "+0", 1))
	}
	f.Add("log+00000000+BAAA")
	f.Fuzz(func(t *testing.T, s string) {
		v, err := Verifier(s)
		if err != nil {
			return
		}
		if _, err := fnote.NewVerifier(s); err != nil {
			t.Fatalf("%q was accepted, formats refuses it: %v", s, err)
		}
		if v.Verify([]byte("x"), nil) {
			t.Fatal("no signature verifies")
		}
		if parts := strings.SplitN(s, "+", 3); v.Name() != parts[0] || !strings.EqualFold(fmt.Sprintf("%08x", v.KeyHash()), parts[1]) {
			t.Fatalf("%q gave %s %08x", s, v.Name(), v.KeyHash())
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	for _, alg := range []Algorithm{Ed25519, P256} {
		s := newSigner(b, alg)
		msg := make([]byte, 200)
		sig, err := s.Sign(b.Context(), msg)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(string(alg), func(b *testing.B) {
			for b.Loop() {
				if err := Verify(alg, s.Public(), msg, sig); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
