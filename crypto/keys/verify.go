package keys

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/sha256"
	"errors"
	"fmt"
)

// MaxMessage is the longest message, in bytes, that a Signer signs.
const MaxMessage = 64 << 10

var errSignature = errors.New("signature does not verify")

// AlgorithmOf returns the algorithm that a public key belongs to: Ed25519 for a 32-byte ed25519.PublicKey, P256 for an
// *ecdsa.PublicKey on P-256. Anything else is an error.
func AlgorithmOf(pub crypto.PublicKey) (Algorithm, error) {
	switch k := pub.(type) {
	case ed25519.PublicKey:
		if len(k) != ed25519.PublicKeySize {
			return "", fmt.Errorf("ed25519 public key has %d bytes, want %d", len(k), ed25519.PublicKeySize)
		}
		return Ed25519, nil
	case *ecdsa.PublicKey:
		if k == nil || k.Curve != elliptic.P256() {
			return "", errors.New("ecdsa public key is not on P-256")
		}
		return P256, nil
	}
	return "", fmt.Errorf("public key is a %T, want ed25519.PublicKey or *ecdsa.PublicKey", pub)
}

// Verify checks a signature over the whole message in pure Go: RFC 8032 for Ed25519, ECDSA over SHA-256 with an ASN.1
// DER signature for P256. It returns nil only when the signature verifies and pub is a key of alg.
func Verify(alg Algorithm, pub crypto.PublicKey, msg, sig []byte) error {
	have, err := AlgorithmOf(pub)
	if err != nil {
		return fmt.Errorf("keys: verify: %w", err)
	}
	if have != alg {
		return fmt.Errorf("keys: verify: public key is %s, want %q", have, alg)
	}
	var ok bool
	switch k := pub.(type) {
	case ed25519.PublicKey:
		ok = ed25519.Verify(k, msg, sig)
	case *ecdsa.PublicKey:
		digest := sha256.Sum256(msg)
		ok = ecdsa.VerifyASN1(k, digest[:], sig)
	}
	if !ok {
		return fmt.Errorf("keys: verify: %w", errSignature)
	}
	return nil
}

// ProofMessage is what a store signs to prove that a version signs, when it is made or its health is checked. The first
// line keeps it apart from everything else that is signed with the same key: it is neither a checkpoint nor a statement.
func ProofMessage(label, id string) []byte {
	return fmt.Appendf(nil, "knhk/key-proof/v1\n%d %s\n%d %s\n", len(label), label, len(id), id)
}
