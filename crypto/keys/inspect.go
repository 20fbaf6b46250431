package keys

import (
	"context"
	"crypto"
	"errors"
	"fmt"
)

// Inspection is what a store can tell about how one version's private key is kept.
type Inspection struct {
	// CanSign says that the version has its private key, is enabled and may be used as the store was opened: an exportable
	// key of a store that was not told to allow such keys cannot.
	CanSign bool
	// Exportable says that the private key can leave the store, could once, or came from outside: who copied it signs
	// without the store, for ever.
	Exportable bool
	// Why says in one line what is wrong with the version, and the way out; empty when nothing is.
	Why string
}

// Inspector is what a Store may implement beside its contract. Errors are those of Store.Signer, but a version that is
// there and cannot sign is no error.
type Inspector interface {
	Inspect(ctx context.Context, label, id string) (Inspection, error)
}

// Inspect asks s, or the store that it wraps, about one version. errors.ErrUnsupported when the store cannot tell.
func Inspect(ctx context.Context, s Store, label, id string) (Inspection, error) {
	for {
		if i, ok := s.(Inspector); ok {
			return i.Inspect(ctx, label, id)
		}
		w, ok := s.(interface{ Unwrap() Store })
		if !ok {
			return Inspection{}, fmt.Errorf("keys: inspect: %w by this store", errors.ErrUnsupported)
		}
		s = w.Unwrap()
	}
}

// NoteLimits says what a key can be used for in signed notes (C2SP signed-note, tlog-checkpoint).
type NoteLimits struct {
	Algorithm Algorithm
	Type      byte   // signature type, the first byte of a verifier key: 1 Ed25519, 2 ECDSA
	Foreign   bool   // tools that pin the log's key beside knhk (torchwood, litewitness, witnesses) read its signatures
	NameBound bool   // the key hash covers the name, so one key under two names has two hashes
	Text      string // one line for people
}

// Limits returns what signed notes can do with a public key. An error when this module cannot use the key at all.
//
// Ed25519 is type 1, which everything reads. P-256 is type 2: C2SP leaves its encoding to each tool, and only tools built on
// github.com/transparency-dev/formats read it as written here; golang.org/x/mod/sumdb/note, torchwood, litewitness and the
// sumdb refuse the verifier key. That is no loss for a daily key, which foreign tools never see, and a loss for an identity
// key, which they pin.
func Limits(pub crypto.PublicKey) (NoteLimits, error) {
	alg, err := AlgorithmOf(pub)
	if err != nil {
		return NoteLimits{}, fmt.Errorf("keys: limits: %w", err)
	}
	if alg == Ed25519 {
		return NoteLimits{
			Algorithm: alg, Type: noteEd25519, Foreign: true, NameBound: true,
			Text: "signed-note type 1 (Ed25519): every C2SP tool reads it",
		}, nil
	}
	return NoteLimits{
		Algorithm: alg, Type: noteECDSA,
		Text: "signed-note type 2 (ECDSA P-256): knhk and tools on transparency-dev/formats read it; torchwood, litewitness and " +
			"golang.org/x/mod do not, so as an identity key it shuts out foreign verifiers and witnesses: use ed25519 for that",
	}, nil
}
