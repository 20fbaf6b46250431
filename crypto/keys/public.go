package keys

import (
	"crypto"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"strings"
)

// PublicKey returns the public key in a verifier key text that Verifier reads. Two logs that share one key have different verifier
// keys, for the name is part of them: whoever compares keys compares what this returns.
func PublicKey(vkey string) (crypto.PublicKey, error) {
	if _, err := Verifier(vkey); err != nil {
		return nil, err
	}
	parts := strings.SplitN(vkey, "+", 3)
	key, err := base64.StdEncoding.Strict().DecodeString(parts[2])
	if err != nil {
		return nil, fmt.Errorf("keys: verifier key: %w", err)
	}
	if key[0] == noteEd25519 {
		return ed25519.PublicKey(key[1:]), nil
	}
	return x509.ParsePKIXPublicKey(key[1:])
}

// SamePublic says whether two public keys are one.
func SamePublic(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}
