package receipt

import (
	"errors"
	"fmt"
	"strings"

	"github.com/knhk/sidecar/crypto/keys"
	"golang.org/x/mod/sumdb/note"
)

// key is a verifier key in its one canonical spelling.
type key struct {
	vkey     string
	public   string // algorithm byte and public key
	verifier note.Verifier
}

// parseKey parses a verifier key ("name+hash+base64"; Ed25519 or P-256) and refuses other spellings of the same key.
func parseKey(vkey string) (*key, error) {
	name, rest, _ := strings.Cut(vkey, "+")
	hash, b64, _ := strings.Cut(rest, "+")
	public, err := stdEncoding.DecodeString(b64)
	if err != nil || len(public) < 2 || strings.ContainsAny(b64, "\r\n") {
		return nil, errors.New("malformed verifier key")
	}
	v, err := keys.Verifier(vkey)
	if err != nil {
		return nil, err
	}
	if v.Name() != name || fmt.Sprintf("%08x", v.KeyHash()) != hash {
		return nil, errors.New("verifier key not in canonical form")
	}
	return &key{vkey: vkey, public: string(public), verifier: v}, nil
}

// same reports whether two keys are one key, or cannot be told apart in a signed note.
func (k *key) same(other *key) bool {
	return k.public == other.public || k.verifier.KeyHash() == other.verifier.KeyHash() && k.verifier.Name() == other.verifier.Name()
}
