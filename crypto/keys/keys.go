// Package keys is the small contract between the log and whatever holds its keys: a token, a cloud KMS or, for
// development, a file. A Store holds named keys, each in versions; a Signer signs with exactly one version.
//
// It promises that callers never learn which store they talk to, that a Signer never switches versions silently, and
// that verification needs nothing from here: signatures are checked with crypto/ed25519 and crypto/ecdsa alone. It does
// not decide when keys rotate. crypto/keys/keystest is the conformance suite that every Store passes.
package keys

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"time"
)

// Algorithm names a signature scheme.
type Algorithm string

// The algorithms.
const (
	// Ed25519 signs the whole message (RFC 8032, PureEdDSA); signatures are 64 bytes, public keys ed25519.PublicKey.
	Ed25519 Algorithm = "ed25519"
	// P256 is ECDSA over P-256 with SHA-256 of the message; signatures are ASN.1 DER, public keys *ecdsa.PublicKey.
	P256 Algorithm = "ecdsa-p256"
)

// State of a key version.
type State string

// The states. A destroyed version stays listed with its public key: what it signed is verified for ever.
const (
	Enabled   State = "enabled"
	Disabled  State = "disabled"
	Destroyed State = "destroyed"
)

// Version is one version of a named key.
type Version struct {
	Label     string // name of the key, shared by its versions
	ID        string // unique within the label, made by the store; opaque to callers, who neither parse nor order by it
	Algorithm Algorithm
	Public    crypto.PublicKey // ed25519.PublicKey or *ecdsa.PublicKey
	State     State
	Created   time.Time // as the store tells it; not trusted for key age
}

// Signer signs with one version. Safe for concurrent use. Public never fails and never changes.
type Signer interface {
	Algorithm() Algorithm
	Public() crypto.PublicKey
	// Sign signs the whole message (at most 64 KiB). It honours ctx: after ctx ends it returns within 100 ms, though the
	// operation may go on in the store. Errors wrap the sentinels below where they apply.
	Sign(ctx context.Context, message []byte) (signature []byte, err error)
}

// Store holds named keys in versions. Safe for concurrent use.
type Store interface {
	// Custody says in words where private keys live: for people, "token knhk (SoftHSM v2)" or "software keys, development only".
	Custody() string
	// Create makes a new enabled version and proves that it signs. Durable when it returns. It may take seconds. On an error,
	// the end of ctx included, a version may have been made all the same, and Versions lists it then.
	Create(ctx context.Context, label string, alg Algorithm) (Version, error)
	// Versions lists the versions of label in order of creation; none is not an error.
	Versions(ctx context.Context, label string) ([]Version, error)
	// Signer opens one version. ErrNotFound, ErrDisabled.
	Signer(ctx context.Context, label, id string) (Signer, error)
	// Disable makes a version refuse to sign, at once and also for Signers opened before. Idempotent.
	Disable(ctx context.Context, label, id string) error
	// Destroy removes the private key for ever, or has the store remove it after a delay of its own; it never signs again.
	// The version stays listed. Idempotent.
	Destroy(ctx context.Context, label, id string) error
	// Close releases sessions and handles; Signers fail afterwards.
	Close() error
}

// Sentinels that callers branch on.
var (
	ErrNotFound    = errors.New("key version not found")
	ErrDisabled    = errors.New("key version is disabled or destroyed")
	ErrCredential  = errors.New("credential refused")                   // PINs: latched until restart; others: tried again later
	ErrUnavailable = errors.New("key store unavailable")                // token gone, sessions lost, busy: try again
	ErrThrottled   = errors.New("key store refuses more calls for now") // quota: try again, later and less often
)

// ParseAlgorithm accepts the constants of this package.
func ParseAlgorithm(s string) (Algorithm, error) {
	switch a := Algorithm(s); a {
	case Ed25519, P256:
		return a, nil
	}
	return "", fmt.Errorf("unknown key algorithm %q: want %s or %s", s, Ed25519, P256)
}
