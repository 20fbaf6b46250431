//go:build cgo

package hsm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/knhk/sidecar/crypto/keys"
)

// session is one PKCS#11 session, used by its worker alone and only between enter and exit.
type session struct {
	tok     *token
	h       pkcs11.SessionHandle
	gen     uint64
	private map[name]pkcs11.ObjectHandle // handles of private keys that passed usable

	exportable bool // such keys are allowed
}

// name identifies a version in a token.
type name struct{ label, id string }

func (n name) String() string { return fmt.Sprintf("label %q, id %q", n.label, n.id) }

// pair is what a token holds of one version.
type pair struct {
	public     crypto.PublicKey // nil: no public object
	alg        keys.Algorithm
	publicObj  pkcs11.ObjectHandle
	privateObj pkcs11.ObjectHandle
	hasPrivate bool
	canSign    bool  // CKA_SIGN
	half       bool  // the public object has no key in it: the token went while it was made, and nobody was told of the version
	exposed    error // of usable: why the private key is not the token's alone, and allowed all the same
}

func attr(kind uint, value any) *pkcs11.Attribute { return pkcs11.NewAttribute(kind, value) }

// encodeID turns a version's id into CKA_ID; ok is false for ids that decodeID never makes.
func encodeID(id string) (ckaID []byte, ok bool) {
	if _, err := keys.ParseVersionID(id); err == nil {
		return []byte(id), true
	}
	text, ok := strings.CutPrefix(id, "x")
	if !ok {
		return nil, false
	}
	b, err := hex.DecodeString(text)
	return b, err == nil && decodeID(b) == id
}

// decodeID turns CKA_ID into a version's id: as it stands when this module made it, else "x" and hexadecimal.
func decodeID(ckaID []byte) string {
	if _, err := keys.ParseVersionID(string(ckaID)); err == nil {
		return string(ckaID)
	}
	return "x" + hex.EncodeToString(ckaID)
}

// get reads attributes in the order asked for.
func (s *session) get(o pkcs11.ObjectHandle, kinds ...uint) ([][]byte, error) {
	template := make([]*pkcs11.Attribute, len(kinds))
	for i, k := range kinds {
		template[i] = attr(k, nil)
	}
	got, err := s.tok.mod.ck.GetAttributeValue(s.h, o, template)
	if err != nil {
		return nil, err
	}
	values := make([][]byte, len(kinds))
	for i, k := range kinds {
		if i >= len(got) || got[i].Type != k {
			return nil, fmt.Errorf("C_GetAttributeValue: attribute %#x is missing in the answer", k)
		}
		values[i] = got[i].Value
	}
	return values, nil
}

// number reads a CK_ULONG in the byte order of the machine, as miekg/pkcs11 writes it.
func number(kind uint, value []byte) (uint, error) {
	for v := range uint(0x100) { // the values compared with here are small; no byte order to get wrong
		if bytes.Equal(attr(kind, v).Value, value) {
			return v, nil
		}
	}
	return 0, fmt.Errorf("attribute %#x has the value %x", kind, value)
}

func isTrue(value []byte) bool { return len(value) == 1 && value[0] != 0 }

// search finds the objects of a class with the label and, unless all, the CKA_ID.
func (s *session) search(class uint, label string, all bool, ckaID []byte) (found []pkcs11.ObjectHandle, err error) {
	ck := s.tok.mod.ck
	template := []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, class), attr(pkcs11.CKA_LABEL, label)}
	if !all {
		template = append(template, attr(pkcs11.CKA_ID, ckaID))
	}
	if err := ck.FindObjectsInit(s.h, template); err != nil {
		return nil, fmt.Errorf("C_FindObjectsInit: %w", err)
	}
	for {
		some, _, err := ck.FindObjects(s.h, 64)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("C_FindObjects: %w", err), ck.FindObjectsFinal(s.h))
		}
		if len(some) == 0 {
			break
		}
		found = append(found, some...)
	}
	if err := ck.FindObjectsFinal(s.h); err != nil {
		return nil, fmt.Errorf("C_FindObjectsFinal: %w", err)
	}
	return found, nil
}

// present says whether an empty search may be believed: a session that was logged out, or whose token is gone, finds
// nothing without an error (SoftHSM 2.6.1 both).
func (s *session) present() (pkcs11.TokenInfo, error) {
	si, err := s.tok.mod.ck.GetSessionInfo(s.h)
	if err != nil {
		return pkcs11.TokenInfo{}, fmt.Errorf("C_GetSessionInfo: %w", err)
	}
	if si.State != pkcs11.CKS_RW_USER_FUNCTIONS {
		return pkcs11.TokenInfo{}, fmt.Errorf("session is in state %d: %w", si.State, errLost)
	}
	info, err := s.tok.mod.ck.GetTokenInfo(si.SlotID)
	if err != nil {
		return pkcs11.TokenInfo{}, fmt.Errorf("C_GetTokenInfo: %w: %w", errAbsent, err)
	}
	if info.Label != s.tok.label {
		return pkcs11.TokenInfo{}, fmt.Errorf("slot %d now holds token %q: %w", si.SlotID, info.Label, errAbsent)
	}
	return info, nil
}

// pairs reads the key pairs of a label: all, or the one with the id. Two objects of a kind for one id, a private key
// without its public one and a key of a kind this module cannot use are errors: none of them may be guessed away. What the
// token holds by half is told as it is only when it was looked at twice: see sights.
func (s *session) pairs(label string, id *string) (map[name]*pair, error) {
	var ckaID []byte
	if id != nil {
		var ok bool
		if ckaID, ok = encodeID(*id); !ok {
			return nil, nil
		}
	}
	publics, err := s.search(pkcs11.CKO_PUBLIC_KEY, label, id == nil, ckaID)
	if err != nil {
		return nil, err
	}
	privates, err := s.search(pkcs11.CKO_PRIVATE_KEY, label, id == nil, ckaID)
	if err != nil {
		return nil, err
	}
	out := make(map[name]*pair)
	for _, o := range publics {
		v, err := s.get(o, pkcs11.CKA_ID, pkcs11.CKA_KEY_TYPE)
		if err != nil {
			return nil, fmt.Errorf("public key of label %q: %w", label, err)
		}
		n := name{label, decodeID(v[0])}
		p := &pair{publicObj: o}
		p.alg, p.public, err = s.publicKey(o, v[1])
		switch other := out[n]; {
		case errors.Is(err, errHalf):
			if p.half = true; other != nil {
				continue
			}
		case err != nil:
			return nil, fmt.Errorf("%v: public key: %w", n, err)
		case other != nil && !other.half:
			return nil, fmt.Errorf("%v: more than one public key object; exactly one must have this label and id", n)
		}
		out[n] = p
	}
	orphans := make(map[name]bool)
	for _, o := range privates {
		v, err := s.get(o, pkcs11.CKA_ID, pkcs11.CKA_SIGN)
		if err != nil {
			return nil, fmt.Errorf("private key of label %q: %w", label, err)
		}
		n := name{label, decodeID(v[0])}
		p := out[n]
		switch {
		case p == nil:
			orphans[n] = true
			continue
		case len(v[1]) == 0:
			continue // half-made, or hidden by the module: as if it were not there
		case p.hasPrivate:
			return nil, fmt.Errorf("%v: more than one private key object; exactly one must have this label and id", n)
		}
		p.privateObj, p.hasPrivate, p.canSign = o, true, isTrue(v[1])
	}
	if err := s.believe(label, id, out, orphans); err != nil {
		return nil, err
	}
	for n := range orphans {
		return nil, fmt.Errorf("%v: private key without its public key object", n)
	}
	return out, nil
}

// believe says whether what a search found, and what it did not find, may be told to callers.
func (s *session) believe(label string, id *string, found map[name]*pair, orphans map[name]bool) error {
	sound := len(orphans) == 0
	all := s.tok.sights.expected(label)
	if id != nil {
		all = []name{{label, *id}}
	} else {
		for n := range found {
			all = append(all, n)
		}
		for n := range orphans {
			all = append(all, n)
		}
	}
	var missing []name
	for _, n := range all {
		v := sight{private: orphans[n]}
		if p := found[n]; p != nil {
			v = sight{public: !p.half, private: p.hasPrivate, sign: p.canSign}
		}
		sound = sound && v == whole
		if !s.tok.sights.believe(s.tok.mod.inits, n, v) {
			missing = append(missing, n)
		}
	}
	if sound && len(found) > 0 {
		return nil
	}
	if _, err := s.present(); err != nil {
		return err
	}
	if len(missing) > 0 && !s.tok.mod.foreign { // what is not ours is never initialized anew: it has to be believed
		return fmt.Errorf("%v: %w", missing[0], errDoubt)
	}
	return nil
}

// pair reads one version; keys.ErrNotFound when neither object is there.
func (s *session) pair(n name) (*pair, error) {
	ps, err := s.pairs(n.label, &n.id)
	if err != nil {
		return nil, err
	}
	if p := ps[n]; p != nil && p.half {
		return nil, fmt.Errorf("%w: %v: %w", keys.ErrNotFound, n, errHalf)
	} else if p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("%w: %v", keys.ErrNotFound, n)
}

// version describes a pair.
func (p *pair) version(n name) keys.Version {
	v := keys.Version{Label: n.label, ID: n.id, Algorithm: p.alg, Public: p.public, State: keys.Enabled}
	if id, err := keys.ParseVersionID(n.id); err == nil {
		v.Created = id.Created
	}
	switch {
	case !p.hasPrivate:
		v.State = keys.Destroyed
	case !p.canSign:
		v.State = keys.Disabled
	}
	return v
}

// versions lists the versions of a label in order of creation.
func (s *session) versions(label string) ([]keys.Version, error) {
	ps, err := s.pairs(label, nil)
	if err != nil {
		return nil, err
	}
	vs := make([]keys.Version, 0, len(ps))
	for n, p := range ps {
		if !p.half {
			vs = append(vs, p.version(n))
		}
	}
	slices.SortFunc(vs, func(a, b keys.Version) int { return keys.CompareVersionIDs(a.ID, b.ID) })
	return vs, nil
}

// publicKey reads a public key object.
func (s *session) publicKey(o pkcs11.ObjectHandle, keyType []byte) (keys.Algorithm, crypto.PublicKey, error) {
	if len(keyType) == 0 {
		return "", nil, errHalf
	}
	kind, err := number(pkcs11.CKA_KEY_TYPE, keyType)
	if err != nil || kind != pkcs11.CKK_EC && kind != ckkECEdwards {
		return "", nil, fmt.Errorf("key type %x is neither EC (P-256) nor Edwards (Ed25519)", keyType)
	}
	v, err := s.get(o, pkcs11.CKA_EC_PARAMS, pkcs11.CKA_EC_POINT)
	if err != nil {
		return "", nil, err
	}
	if len(v[0]) == 0 || len(v[1]) == 0 {
		return "", nil, errHalf
	}
	return parsePublic(kind, v[0], v[1])
}

// parsePublic decodes CKA_EC_POINT, which PKCS#11 wants as a DER OCTET STRING and some tokens give raw. The two are told
// apart by length, because a raw uncompressed point begins with the tag of an OCTET STRING.
func parsePublic(keyType uint, params, point []byte) (keys.Algorithm, crypto.PublicKey, error) {
	alg, size := keys.P256, 65
	switch {
	case keyType == pkcs11.CKK_EC && bytes.Equal(params, paramsP256):
	case keyType == ckkECEdwards && (bytes.Equal(params, paramsEd25519) || bytes.Equal(params, paramsEd25519OID)):
		alg, size = keys.Ed25519, ed25519.PublicKeySize
	default:
		return "", nil, fmt.Errorf("curve parameters %x are neither P-256 nor edwards25519", params)
	}
	raw := point
	if len(point) != size {
		var inner []byte
		if rest, err := asn1.Unmarshal(point, &inner); err != nil || len(rest) != 0 || len(inner) != size {
			return "", nil, fmt.Errorf("CKA_EC_POINT of %d bytes holds no point of %s", len(point), alg)
		}
		raw = inner
	}
	if alg == keys.Ed25519 {
		return alg, ed25519.PublicKey(bytes.Clone(raw)), nil
	}
	pub, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), raw)
	if err != nil {
		return "", nil, fmt.Errorf("CKA_EC_POINT: %w", err)
	}
	return alg, pub, nil
}

// inspect looks a version up and says in one line each what speaks against its signing: state is keys.ErrDisabled when it
// cannot sign, exposed says that its private key is not the token's alone.
func (s *session) inspect(n name) (p *pair, state, exposed error, err error) {
	if p, err = s.pair(n); err != nil {
		return nil, nil, nil, err
	}
	if !p.hasPrivate {
		return p, fmt.Errorf("%w: %v: its private key is destroyed", keys.ErrDisabled, n), nil, nil
	}
	v, err := s.get(p.privateObj, pkcs11.CKA_SENSITIVE, pkcs11.CKA_EXTRACTABLE, pkcs11.CKA_NEVER_EXTRACTABLE)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("%v: private key: %w", n, err)
	}
	switch {
	case isTrue(v[1]):
		exposed = fmt.Errorf("%v: the private key is exportable (CKA_EXTRACTABLE is true): make a key in the token that is not", n)
	case !isTrue(v[2]):
		exposed = fmt.Errorf("%v: the private key was exportable or imported once (CKA_NEVER_EXTRACTABLE is false): "+
			"make a key in the token that never was", n)
	case !isTrue(v[0]):
		exposed = fmt.Errorf("%v: the private key can be read in the clear (CKA_SENSITIVE is false): "+
			"make a key in the token that is sensitive", n)
	}
	if !p.canSign {
		return p, fmt.Errorf("%w: %v: CKA_SIGN is false: it was disabled, or made without permission to sign", keys.ErrDisabled, n), exposed, nil
	}
	switch v, err := s.get(p.privateObj, pkcs11.CKA_ALWAYS_AUTHENTICATE); {
	case isCode(err, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID): // an older token, which knows no such keys
	case err != nil:
		return nil, nil, nil, fmt.Errorf("%v: private key: %w", n, err)
	case isTrue(v[0]):
		state = fmt.Errorf("%v: the token wants the PIN for each signature (CKA_ALWAYS_AUTHENTICATE is true): "+
			"make a key without that", n)
	}
	return p, state, exposed, nil
}

// usable returns a version that may sign: enabled, and its private key born in the token and unable to leave it, unless the
// store was told to allow others.
func (s *session) usable(n name) (*pair, error) {
	p, state, exposed, err := s.inspect(n)
	switch {
	case err != nil:
		return nil, err
	case state != nil:
		return nil, state
	case exposed != nil && !s.exportable:
		return nil, exposed
	}
	p.exposed = exposed
	return p, nil
}

// sign makes a raw signature with one version, over the message (Ed25519) or its digest (P-256). pub is what the version's
// public key must still be.
func (s *session) sign(n name, alg keys.Algorithm, pub crypto.PublicKey, input []byte) ([]byte, error) {
	o, cached := s.private[n]
	again := false
	for {
		if !cached {
			p, err := s.usable(n)
			if err != nil {
				return nil, err
			}
			if k, ok := p.public.(interface{ Equal(crypto.PublicKey) bool }); !ok || !k.Equal(pub) {
				return nil, fmt.Errorf("%v: the token now holds another key under this label and id", n)
			}
			o = p.privateObj
			s.private[n] = o
		}
		sig, err := s.signWith(o, alg, input)
		if err == nil {
			return sig, nil
		}
		delete(s.private, n)
		switch {
		case cached && isCode(err, pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_OBJECT_HANDLE_INVALID):
			cached = false // destroyed meanwhile, perhaps: the search will tell
		case isCode(err, pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED):
			// Disabled, or the module has lost sight of CKA_SIGN, or the token has reasons of its own, as a key's end date.
			if _, looked := s.usable(n); looked != nil {
				return nil, looked
			}
			if !again {
				cached, again = false, true // it may sign, says the token: once more
				continue
			}
			return nil, fmt.Errorf("%w: %v: the token does not let it sign, though CKA_SIGN is true: %w", keys.ErrDisabled, n, err)
		default:
			return nil, err
		}
	}
}

func (s *session) signWith(o pkcs11.ObjectHandle, alg keys.Algorithm, input []byte) ([]byte, error) {
	ck := s.tok.mod.ck
	mechanism := uint(ckmEdDSA)
	if alg == keys.P256 {
		mechanism = pkcs11.CKM_ECDSA
	}
	if err := ck.SignInit(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(mechanism, nil)}, o); err != nil {
		return nil, fmt.Errorf("C_SignInit: %w", err)
	}
	sig, err := ck.Sign(s.h, input)
	if err != nil {
		return nil, fmt.Errorf("C_Sign: %w", err)
	}
	return sig, nil
}

// finish turns a token's raw signature into that of the contract: r||s becomes DER.
func finish(alg keys.Algorithm, raw []byte) ([]byte, error) {
	if len(raw) != 64 {
		return nil, fmt.Errorf("the token returned a signature of %d bytes, want 64", len(raw))
	}
	if alg == keys.Ed25519 {
		return raw, nil
	}
	return asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(raw[:32]), new(big.Int).SetBytes(raw[32:])})
}

// generate makes a key pair in the token.
func (s *session) generate(n name, alg keys.Algorithm) error {
	ckaID, ok := encodeID(n.id)
	if !ok {
		return fmt.Errorf("%v: not an id", n)
	}
	mechanism, params := uint(ckmECEdwardsKeyPairGen), paramsEd25519
	if alg == keys.P256 {
		mechanism, params = pkcs11.CKM_EC_KEY_PAIR_GEN, paramsP256
	}
	public := []*pkcs11.Attribute{
		attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_PRIVATE, false), attr(pkcs11.CKA_VERIFY, true),
		attr(pkcs11.CKA_EC_PARAMS, params), attr(pkcs11.CKA_LABEL, n.label), attr(pkcs11.CKA_ID, ckaID),
	}
	private := []*pkcs11.Attribute{
		attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_PRIVATE, true), attr(pkcs11.CKA_SENSITIVE, true),
		attr(pkcs11.CKA_EXTRACTABLE, false), attr(pkcs11.CKA_SIGN, true), attr(pkcs11.CKA_LABEL, n.label), attr(pkcs11.CKA_ID, ckaID),
	}
	_, _, err := s.tok.mod.ck.GenerateKeyPair(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(mechanism, nil)}, public, private)
	if err != nil {
		return fmt.Errorf("C_GenerateKeyPair: %w", err)
	}
	return nil
}

// erase destroys what there is of a version, the public object too.
func (s *session) erase(n name) error {
	ckaID, ok := encodeID(n.id)
	if !ok {
		return nil
	}
	var errs []error
	for _, class := range []uint{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_PUBLIC_KEY} {
		objects, err := s.search(class, n.label, false, ckaID)
		errs = append(errs, err)
		for _, o := range objects {
			errs = append(errs, s.tok.mod.ck.DestroyObject(s.h, o))
		}
	}
	return errors.Join(errs...)
}
