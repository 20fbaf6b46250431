//go:build cgo

package hsm

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/asn1"
	"errors"
	"fmt"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/knhk/sidecar/crypto/keys"
)

// life is one run through everything a store does; it returns the versions that must be there afterwards.
func life(t *testing.T, s *Store) (enabled, disabled, destroyed keys.Version, err error) {
	ctx := t.Context()
	var vs [3]keys.Version
	for i, alg := range []keys.Algorithm{keys.Ed25519, keys.P256, keys.Ed25519} {
		if vs[i], err = s.Create(ctx, "log", alg); err != nil {
			return
		}
	}
	enabled, disabled, destroyed = vs[0], vs[1], vs[2]
	if err = s.Disable(ctx, "log", disabled.ID); err != nil {
		return
	}
	if err = s.Destroy(ctx, "log", destroyed.ID); err != nil {
		return
	}
	sg, err := s.Signer(ctx, "log", enabled.ID)
	if err != nil {
		return
	}
	for range 2 {
		if _, err = sg.Sign(ctx, []byte("checkpoint")); err != nil {
			return
		}
	}
	return enabled, disabled, destroyed, s.Check(ctx, "log")
}

// TestEveryCallFails lets each C call of a store's life fail in turn, before it did its work and after, with the loss of
// all sessions. The callers notice nothing, and the token holds exactly what they were told.
func TestEveryCallFails(t *testing.T) {
	run := func(t *testing.T, fail int, after bool) (calls int, hit string) {
		f := newFake()
		s := f.open(t, f.registry(), func(c *Config) { c.Sessions = 1 })
		defer closeStore(t, s)
		f.set(func(f *fake) {
			f.hook = func(call string) (bool, error) {
				calls++ // one worker: one call at a time
				if calls != fail {
					return false, nil
				}
				hit = call
				if !after {
					f.set(func(f *fake) { f.drop() })
				}
				return after, pkcs11.Error(pkcs11.CKR_DEVICE_ERROR)
			}
		})
		enabled, disabled, destroyed, err := life(t, s)
		if err != nil {
			t.Errorf("call %d, %s fails, after its work %v: %v", fail, hit, after, err)
			return calls, hit
		}
		n := calls
		f.set(func(f *fake) { f.hook = nil })
		vs, err := s.Versions(t.Context(), "log")
		if err != nil || len(vs) != 3 || vs[0].ID != enabled.ID || vs[0].State != keys.Enabled ||
			vs[1].ID != disabled.ID || vs[1].State != keys.Disabled || vs[2].ID != destroyed.ID || vs[2].State != keys.Destroyed {
			t.Errorf("call %d, %s fails, after its work %v: the token holds %+v, %v", fail, hit, after, vs, err)
		}
		if len(f.objects) != 5 {
			t.Errorf("call %d, %s fails, after its work %v: %d objects, want 5", fail, hit, after, len(f.objects))
		}
		f.audit(t)
		return n, hit
	}
	calls, _ := run(t, 0, false) // no failure: how many calls there are
	seen := make(map[string]bool)
	for fail := 1; fail <= calls; fail++ {
		for _, after := range []bool{false, true} {
			_, hit := run(t, fail, after)
			seen[hit] = true
		}
	}
	t.Logf("%d calls of %d functions failed in turn, twice", calls, len(seen))
	if calls < 50 || len(seen) < 10 {
		t.Errorf("only %d calls of %d functions", calls, len(seen))
	}
}

// TestReturnValues: what C_Sign answers, for good, decides the sentinel and whether the module is restarted.
func TestReturnValues(t *testing.T) {
	for _, c := range []struct {
		code     uint
		want     error // nil: none of the sentinels
		restarts int   // calls of C_Initialize
	}{
		{pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED, keys.ErrDisabled, 0},
		{pkcs11.CKR_SESSION_HANDLE_INVALID, keys.ErrUnavailable, 1}, // new sessions first, then a restart, then no more
		{pkcs11.CKR_SESSION_CLOSED, keys.ErrUnavailable, 1},
		{pkcs11.CKR_USER_NOT_LOGGED_IN, keys.ErrUnavailable, 1},
		{pkcs11.CKR_KEY_HANDLE_INVALID, keys.ErrUnavailable, 1},
		{pkcs11.CKR_OBJECT_HANDLE_INVALID, keys.ErrUnavailable, 1},
		{pkcs11.CKR_OPERATION_ACTIVE, keys.ErrUnavailable, 1},
		{pkcs11.CKR_DEVICE_ERROR, keys.ErrUnavailable, 1},
		{pkcs11.CKR_GENERAL_ERROR, keys.ErrUnavailable, 1},
		{pkcs11.CKR_DEVICE_REMOVED, keys.ErrUnavailable, 1}, // a restart at once
		{pkcs11.CKR_TOKEN_NOT_PRESENT, keys.ErrUnavailable, 1},
		{pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, keys.ErrUnavailable, 1},
		{pkcs11.CKR_VENDOR_DEFINED + 7, keys.ErrUnavailable, 1},
		{pkcs11.CKR_SESSION_COUNT, keys.ErrUnavailable, 0}, // short of something: no recovery
		{pkcs11.CKR_HOST_MEMORY, keys.ErrUnavailable, 0},
		{pkcs11.CKR_FUNCTION_FAILED, keys.ErrUnavailable, 0},
		{pkcs11.CKR_MECHANISM_INVALID, nil, 0}, // will not get better
		{pkcs11.CKR_KEY_TYPE_INCONSISTENT, nil, 0},
		{pkcs11.CKR_DATA_LEN_RANGE, nil, 0},
		{pkcs11.CKR_PIN_INCORRECT, nil, 0}, // of C_Login alone: here it must not latch, see the signature at the end
		{pkcs11.CKR_PIN_LOCKED, nil, 0},
	} {
		err := pkcs11.Error(c.code)
		t.Run(fmt.Sprintf("%#x", c.code), func(t *testing.T) {
			f := newFake()
			s := f.open(t, f.registry(), nil)
			defer closeStore(t, s)
			impatient(t, s)
			_, sg := mustCreate(t, s, keys.Ed25519)
			before := f.count("C_Initialize")
			f.set(func(f *fake) {
				f.hook = func(call string) (bool, error) {
					if call == "C_Sign" {
						return true, err
					}
					return false, nil
				}
			})
			_, got := sg.Sign(t.Context(), nil)
			if !errors.Is(got, err) {
				t.Errorf("Sign: %v; want %v in it", got, err)
			}
			for _, sentinel := range []error{keys.ErrUnavailable, keys.ErrDisabled, keys.ErrNotFound, keys.ErrCredential} {
				if errors.Is(got, sentinel) != (sentinel == c.want) {
					t.Errorf("Sign: %v; want sentinel %v", got, c.want)
				}
			}
			if n := f.count("C_Initialize") - before; n != c.restarts {
				t.Errorf("%d restarts, want %d", n, c.restarts)
			}
			f.set(func(f *fake) { f.hook = nil })
			mustSign(t, sg)
			f.audit(t)
		})
	}
}

func TestParsePublic(t *testing.T) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	point, err := k.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	octets := func(b []byte) []byte {
		der, err := asn1.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	edwards := bytes.Repeat([]byte{9}, 32)
	// A raw point whose second byte makes it look like an OCTET STRING of its own length: 04 3f and 63 bytes.
	lookalike := append([]byte{4, 63}, make([]byte, 63)...)
	for _, c := range []struct {
		why           string
		keyType       uint
		params, point []byte
		want          keys.Algorithm // "": refused
	}{
		{"P-256, DER", pkcs11.CKK_EC, paramsP256, octets(point), keys.P256},
		{"P-256, raw", pkcs11.CKK_EC, paramsP256, point, keys.P256},
		{"Ed25519, DER", ckkECEdwards, paramsEd25519, octets(edwards), keys.Ed25519},
		{"Ed25519, raw", ckkECEdwards, paramsEd25519, edwards, keys.Ed25519},
		{"Ed25519, curve by OID", ckkECEdwards, paramsEd25519OID, octets(edwards), keys.Ed25519},
		{"raw, looks like DER, not on the curve", pkcs11.CKK_EC, paramsP256, lookalike, ""},
		{"P-256 point of an Edwards key", ckkECEdwards, paramsEd25519, octets(point), ""},
		{"EC key type with the Edwards curve", pkcs11.CKK_EC, paramsEd25519, octets(edwards), ""},
		{"Edwards key type with P-256", ckkECEdwards, paramsP256, octets(point), ""},
		{"other curve", pkcs11.CKK_EC, []byte{6, 5, 0x2b, 0x81, 4, 0, 0x22}, octets(point), ""},
		{"compressed point", pkcs11.CKK_EC, paramsP256, octets(append([]byte{2}, point[1:33]...)), ""},
		{"one byte after the DER", pkcs11.CKK_EC, paramsP256, append(octets(point), 0), ""},
		{"off the curve", pkcs11.CKK_EC, paramsP256, octets(append([]byte{4}, make([]byte, 64)...)), ""},
		{"empty", pkcs11.CKK_EC, paramsP256, nil, ""},
	} {
		alg, pub, err := parsePublic(c.keyType, c.params, c.point)
		if alg != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s: %q, %v; want %q", c.why, alg, err, c.want)
		}
		if err == nil {
			if got, err := keys.AlgorithmOf(pub); err != nil || got != alg {
				t.Errorf("%s: public key of %s, %v", c.why, got, err)
			}
		}
	}
}

func FuzzParsePublic(f *testing.F) {
	f.Add(uint(pkcs11.CKK_EC), paramsP256, append([]byte{4, 65, 4}, make([]byte, 64)...))
	f.Add(uint(ckkECEdwards), paramsEd25519, append([]byte{4, 32}, make([]byte, 32)...))
	f.Add(uint(ckkECEdwards), paramsEd25519OID, make([]byte, 32))
	f.Fuzz(func(t *testing.T, keyType uint, params, point []byte) {
		alg, pub, err := parsePublic(keyType, params, point)
		if err != nil {
			return
		}
		if got, err := keys.AlgorithmOf(pub); err != nil || got != alg {
			t.Fatalf("accepted a key of %s as %s, %v", got, alg, err)
		}
	})
}

func FuzzID(f *testing.F) {
	f.Add([]byte("0003-20261123T220405Z-9f3a61c2"))
	f.Add([]byte{1})
	f.Add([]byte{})
	f.Add([]byte("x01"))
	f.Fuzz(func(t *testing.T, ckaID []byte) {
		id := decodeID(ckaID)
		back, ok := encodeID(id)
		if !ok || !bytes.Equal(back, ckaID) {
			t.Fatalf("CKA_ID %x became id %q and then %x, %v", ckaID, id, back, ok)
		}
		// An id stands for one CKA_ID only: what encodeID accepts is what decodeID makes.
		if again, ok := encodeID(string(ckaID)); ok && decodeID(again) != string(ckaID) {
			t.Fatalf("id %q stands for CKA_ID %x, whose id is %q", ckaID, again, decodeID(again))
		}
	})
}
