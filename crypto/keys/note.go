package keys

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	fnote "github.com/transparency-dev/formats/note"
	"golang.org/x/mod/sumdb/note"
)

// Signature types of C2SP signed-note: the first byte of a verifier key.
const (
	noteEd25519 = 1
	noteECDSA   = 2
)

// NoteSigner makes a signed-note signer of s under name. Each Sign waits for the store for at most timeout.
//
// Ed25519 keys become signature type 1 with the key hash of golang.org/x/mod/sumdb/note; P256 keys become type 2 as
// github.com/transparency-dev/formats/note reads it: the key hash is the first 4 bytes of SHA-256 over the key's PKIX
// DER, so the name is not bound, and the signature is over SHA-256 of the note text, DER. torchwood and litewitness read
// only type 1. Errors of Sign are those of the store.
func NoteSigner(name string, s Signer, timeout time.Duration) (note.Signer, error) {
	if timeout <= 0 {
		return nil, fmt.Errorf("keys: note signer: timeout is %v, want more than 0", timeout)
	}
	alg, err := AlgorithmOf(s.Public())
	if err != nil {
		return nil, fmt.Errorf("keys: note signer: %w", err)
	}
	if alg != s.Algorithm() {
		return nil, fmt.Errorf("keys: note signer: signer says %s, its public key is %s", s.Algorithm(), alg)
	}
	hash, _, err := encodeNoteKey(name, s.Public())
	if err != nil {
		return nil, fmt.Errorf("keys: note signer: %w", err)
	}
	return &noteSigner{name: name, hash: hash, signer: s, timeout: timeout}, nil
}

type noteSigner struct {
	name    string
	hash    uint32
	signer  Signer
	timeout time.Duration
}

func (n *noteSigner) Name() string    { return n.name }
func (n *noteSigner) KeyHash() uint32 { return n.hash }

func (n *noteSigner) Sign(msg []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), n.timeout)
	defer cancel()
	return n.signer.Sign(ctx, msg)
}

// VKey returns the verifier key text "NAME+HASH+BASE64" of a public key (C2SP signed-note), for both algorithms. The
// name must not be empty and holds neither spaces nor "+".
func VKey(name string, pub crypto.PublicKey) (string, error) {
	hash, key, err := encodeNoteKey(name, pub)
	if err != nil {
		return "", fmt.Errorf("keys: verifier key: %w", err)
	}
	return fmt.Sprintf("%s+%08x+%s", name, hash, base64.StdEncoding.EncodeToString(key)), nil
}

// Verifier reads a verifier key text, of signature type 1 (Ed25519) or 2 (ECDSA, and here only P-256). Other types,
// wrong key hashes and anything around the text are errors.
func Verifier(vkey string) (note.Verifier, error) {
	name, rest, _ := strings.Cut(vkey, "+")
	hash, key64, _ := strings.Cut(rest, "+")
	// The base64 reader of the standard library skips line breaks; a key with one inside is refused here.
	if !validNoteName(name) || len(hash) != 8 || strings.ContainsAny(key64, "\r\n") {
		return nil, errors.New("keys: verifier key: want NAME+HASH+KEY with a hash of 8 hexadecimal digits")
	}
	key, err := base64.StdEncoding.Strict().DecodeString(key64)
	if err != nil || len(key) == 0 {
		return nil, errors.New("keys: verifier key: the key is not base64")
	}
	switch key[0] {
	case noteEd25519:
		v, err := note.NewVerifier(vkey)
		if err != nil {
			return nil, fmt.Errorf("keys: verifier key: %w", err)
		}
		return v, nil
	case noteECDSA:
		pub, err := x509.ParsePKIXPublicKey(key[1:])
		if err != nil {
			return nil, fmt.Errorf("keys: verifier key: %w", err)
		}
		if alg, err := AlgorithmOf(pub); err != nil {
			return nil, fmt.Errorf("keys: verifier key: %w", err)
		} else if alg != P256 {
			return nil, fmt.Errorf("keys: verifier key: type %d holds a key of %s", noteECDSA, alg)
		}
		v, err := fnote.NewECDSAVerifier(vkey)
		if err != nil {
			return nil, fmt.Errorf("keys: verifier key: %w", err)
		}
		return v, nil
	}
	return nil, fmt.Errorf("keys: verifier key: signature type %d is not supported, want %d (Ed25519) or %d (ECDSA P-256)",
		key[0], noteEd25519, noteECDSA)
}

// encodeNoteKey returns the key hash and the typed key bytes of a verifier key.
func encodeNoteKey(name string, pub crypto.PublicKey) (hash uint32, key []byte, err error) {
	if !validNoteName(name) {
		return 0, nil, fmt.Errorf("name %q is empty or holds a space or \"+\"", name)
	}
	if _, err := AlgorithmOf(pub); err != nil {
		return 0, nil, err
	}
	switch k := pub.(type) {
	case ed25519.PublicKey:
		key = append([]byte{noteEd25519}, k...)
		sum := sha256.Sum256(append([]byte(name+"\n"), key...))
		return binary.BigEndian.Uint32(sum[:]), key, nil
	case *ecdsa.PublicKey:
		der, err := x509.MarshalPKIXPublicKey(k)
		if err != nil {
			return 0, nil, err
		}
		sum := sha256.Sum256(der)
		return binary.BigEndian.Uint32(sum[:]), append([]byte{noteECDSA}, der...), nil
	}
	return 0, nil, fmt.Errorf("public key is a %T", pub) // not reached: AlgorithmOf knows only the types above
}

// validNoteName is the rule of golang.org/x/mod/sumdb/note for names.
func validNoteName(name string) bool {
	return name != "" && utf8.ValidString(name) && !strings.Contains(name, "+") && strings.IndexFunc(name, unicode.IsSpace) < 0
}
