//go:build cgo

package hsm

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"log/slog"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/knhk/sidecar/crypto/keys"
)

// TestSoftHSMDuplicates: tokens accept a second object under one label and id; the store does not.
func TestSoftHSMDuplicates(t *testing.T) {
	s := newSoftToken(t).open(t)
	v, sg := mustCreate(t, s, keys.Ed25519)
	mustSign(t, sg) // its handle is known now
	raw(t, s, func(se *session) error { return se.generate(name{v.Label, v.ID}, keys.Ed25519) })
	_, errSigner := s.Signer(t.Context(), v.Label, v.ID)
	_, errList := s.Versions(t.Context(), v.Label)
	for what, err := range map[string]error{
		"Signer": errSigner, "Versions": errList, "Check": s.Check(t.Context(), v.Label),
		"Disable": s.Disable(t.Context(), v.Label, v.ID), "Destroy": s.Destroy(t.Context(), v.Label, v.ID),
	} {
		if err == nil || !strings.Contains(err.Error(), "more than one") || !strings.Contains(err.Error(), v.ID) {
			t.Errorf("%s with two key pairs under one id: %v; want a refusal that names it", what, err)
		}
	}
}

// TestSoftHSMForeignKeys: key pairs that other tools made are used when they are as safe as ours, else refused in words.
func TestSoftHSMForeignKeys(t *testing.T) {
	tok := newSoftToken(t)
	s := tok.open(t)
	made := func(label string, id []byte, private ...*pkcs11.Attribute) func(*session) error {
		return func(se *session) error {
			_, _, err := se.tok.mod.ck.GenerateKeyPair(se.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
				[]*pkcs11.Attribute{
					attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_VERIFY, true), attr(pkcs11.CKA_EC_PARAMS, paramsP256),
					attr(pkcs11.CKA_LABEL, label), attr(pkcs11.CKA_ID, id),
				},
				append([]*pkcs11.Attribute{
					attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_PRIVATE, true), attr(pkcs11.CKA_LABEL, label), attr(pkcs11.CKA_ID, id),
				}, private...))
			return err
		}
	}
	for _, c := range []struct {
		label string
		make  func(*session) error
		want  string // "": usable
	}{
		{"as safe as ours", made("as safe as ours", []byte{1, 2}, attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, false),
			attr(pkcs11.CKA_SIGN, true)), ""},
		{"exportable", made("exportable", []byte{1, 2}, attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, true),
			attr(pkcs11.CKA_SIGN, true)), "CKA_EXTRACTABLE is true"},
		{"exportable once", func(se *session) error {
			if err := made("exportable once", []byte{1, 2}, attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, true),
				attr(pkcs11.CKA_SIGN, true))(se); err != nil {
				return err
			}
			p, err := se.pair(name{"exportable once", "x0102"})
			if err != nil {
				return err
			}
			return se.tok.mod.ck.SetAttributeValue(se.h, p.privateObj, []*pkcs11.Attribute{attr(pkcs11.CKA_EXTRACTABLE, false)})
		}, "CKA_NEVER_EXTRACTABLE is false"},
		{"in the clear", made("in the clear", []byte{1, 2}, attr(pkcs11.CKA_SENSITIVE, false), attr(pkcs11.CKA_EXTRACTABLE, false),
			attr(pkcs11.CKA_SIGN, true)), "CKA_SENSITIVE is false"},
		{"cannot sign", made("cannot sign", []byte{1, 2}, attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, false),
			attr(pkcs11.CKA_SIGN, false), attr(pkcs11.CKA_DERIVE, true)), keys.ErrDisabled.Error()},
		{"no public key", func(se *session) error {
			if err := made("no public key", []byte{1, 2}, attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_SIGN, true))(se); err != nil {
				return err
			}
			p, err := se.pair(name{"no public key", "x0102"})
			if err != nil {
				return err
			}
			return se.tok.mod.ck.DestroyObject(se.h, p.publicObj)
		}, "without its public key"},
		{"rsa", rsaPublic("rsa", []byte{1, 2}), "neither EC"},
		{"other curve", func(se *session) error {
			secp384r1 := []byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22}
			_, _, err := se.tok.mod.ck.GenerateKeyPair(se.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
				[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_EC_PARAMS, secp384r1),
					attr(pkcs11.CKA_LABEL, "other curve"), attr(pkcs11.CKA_ID, []byte{1, 2})},
				[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_LABEL, "other curve"), attr(pkcs11.CKA_ID, []byte{1, 2})})
			return err
		}, "neither P-256 nor edwards25519"},
	} {
		t.Run(c.label, func(t *testing.T) {
			raw(t, s, c.make)
			sg, err := s.Signer(t.Context(), c.label, "x0102")
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("Signer: %v; want %q", err, c.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			mustSign(t, sg)
			own, err := s.Create(t.Context(), c.label, keys.Ed25519)
			if err != nil {
				t.Fatal(err)
			}
			vs, err := s.Versions(t.Context(), c.label)
			if err != nil || len(vs) != 2 || vs[0].ID != "x0102" || !vs[0].Created.IsZero() || vs[1].ID != own.ID {
				t.Errorf("Versions: %+v, %v; want the foreign one first", vs, err)
			}
		})
	}
}

// TestSoftHSMExportable: what is refused is allowed when the configuration says so, is used with a warning, and is told of either way.
func TestSoftHSMExportable(t *testing.T) {
	tok := newSoftToken(t)
	strict := tok.open(t)
	cfg := tok.config()
	var logged bytes.Buffer
	cfg.AllowExportable, cfg.Log = true, slog.New(slog.NewTextHandler(&logged, nil))
	lax, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer closeStore(t, lax)
	for _, c := range []struct {
		label   string
		private []*pkcs11.Attribute
		want    string // of Inspect; "": as safe as ours
		signs   bool   // when allowed
	}{
		{"safe", []*pkcs11.Attribute{attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, false), attr(pkcs11.CKA_SIGN, true)}, "", true},
		{"exportable", []*pkcs11.Attribute{attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, true), attr(pkcs11.CKA_SIGN, true)},
			"is exportable (CKA_EXTRACTABLE is true)", true},
		{"clear", []*pkcs11.Attribute{attr(pkcs11.CKA_SENSITIVE, false), attr(pkcs11.CKA_EXTRACTABLE, false), attr(pkcs11.CKA_SIGN, true)},
			"can be read in the clear (CKA_SENSITIVE is false)", true},
		{"no sign", []*pkcs11.Attribute{attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, false), attr(pkcs11.CKA_SIGN, false)},
			"CKA_SIGN is false", false},
		{"no sign, exportable", []*pkcs11.Attribute{attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, true), attr(pkcs11.CKA_SIGN, false)},
			"CKA_SIGN is false", false},
		{"asks each time", []*pkcs11.Attribute{attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, false), attr(pkcs11.CKA_SIGN, true),
			attr(pkcs11.CKA_ALWAYS_AUTHENTICATE, true)}, "wants the PIN for each signature", false},
	} {
		raw(t, strict, func(se *session) error {
			_, _, err := se.tok.mod.ck.GenerateKeyPair(se.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
				[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_EC_PARAMS, paramsP256),
					attr(pkcs11.CKA_LABEL, c.label), attr(pkcs11.CKA_ID, []byte{1})},
				append([]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_PRIVATE, true),
					attr(pkcs11.CKA_LABEL, c.label), attr(pkcs11.CKA_ID, []byte{1})}, c.private...))
			return err
		})
		exposed := strings.Contains(c.label, "exportable") || c.label == "clear"
		for _, s := range []*Store{strict, lax} {
			allowed := c.signs && (s == lax || !exposed)
			in, err := keys.Inspect(t.Context(), s, c.label, "x01")
			if err != nil || in.CanSign != allowed || in.Exportable != exposed || !strings.Contains(in.Why, c.want) ||
				(in.Why == "") != (c.want == "") || strings.Contains(in.Why, "\n") {
				t.Errorf("%s, allowed %v: Inspect: %+v, %v; want %q", c.label, s == lax, in, err, c.want)
			}
			sg, err := s.Signer(t.Context(), c.label, "x01")
			if (err == nil) != allowed || err != nil && (!strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n")) {
				t.Errorf("%s, allowed %v: Signer: %v; want it %v, or %q", c.label, s == lax, err, allowed, c.want)
			}
			if err == nil {
				mustSign(t, sg)
			}
		}
		if warned := strings.Contains(logged.String(), `label \"`+c.label+`\"`); warned != (exposed && c.signs) {
			t.Errorf("%s: warned %v\n%s", c.label, warned, &logged)
		}
	}
}

// rsaPublic puts an RSA public key under the label.
func rsaPublic(label string, id []byte) func(*session) error {
	return func(se *session) error {
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			return err
		}
		_, err = se.tok.mod.ck.(*pkcs11.Ctx).CreateObject(se.h, []*pkcs11.Attribute{
			attr(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA), attr(pkcs11.CKA_TOKEN, true),
			attr(pkcs11.CKA_LABEL, label), attr(pkcs11.CKA_ID, id),
			attr(pkcs11.CKA_MODULUS, key.N.Bytes()), attr(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}),
		})
		return err
	}
}
