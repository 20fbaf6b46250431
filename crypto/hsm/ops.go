//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/knhk/sidecar/crypto/keys"
)

// Custody names the token and its model, as the token tells it: "token knhk (SoftHSM v2)".
func (s *Store) Custody() string { return s.custody }

// Create makes a key pair in the token. When ctx ends meanwhile the version is destroyed again; only when that fails, or
// the process dies, one stays that nobody was told of, and Versions lists it.
func (s *Store) Create(ctx context.Context, label string, alg keys.Algorithm) (keys.Version, error) {
	v, err := s.create(ctx, label, alg)
	if err != nil {
		return keys.Version{}, fmt.Errorf("hsm: create: %w", err)
	}
	return v, nil
}

func (s *Store) create(ctx context.Context, label string, alg keys.Algorithm) (keys.Version, error) {
	if err := keys.CheckLabel(label); err != nil {
		return keys.Version{}, err
	}
	if _, err := keys.ParseAlgorithm(string(alg)); err != nil {
		return keys.Version{}, err
	}
	var n name     // kept over repeated tries, so that they do not leave a second version
	var tried bool // n may be in the token
	var made keys.Version
	err := s.do(ctx, &op{
		fn: func(se *session) (err error) {
			if n.id == "" {
				if n, err = se.next(label, s.now()); err != nil {
					return err
				}
			}
			if made, err = se.create(n, alg, &tried); errors.Is(err, errHalf) {
				// The token went while it made the pair. What there is goes, and another id is taken: should the private key turn up
				// after all, it does not stand beside a second one of its id.
				if err = se.erase(n); err != nil {
					return err
				}
				if n, err = se.next(label, s.now()); err != nil {
					return err
				}
				tried = false
				made, err = se.create(n, alg, &tried)
			}
			return err
		},
		undo: func(se *session) error { return se.erase(n) },
	})
	if err != nil {
		return keys.Version{}, err // made may be written still
	}
	return made, nil
}

// errHalf says that a try to make a version left it half-made.
var errHalf = errors.New("the version is half-made")

// next chooses the id that follows those of the token.
func (s *session) next(label string, now time.Time) (name, error) {
	vs, err := s.versions(label)
	if err != nil {
		return name{}, err
	}
	ids := make([]string, len(vs))
	for i, v := range vs {
		ids[i] = v.ID
	}
	return name{label, keys.NextVersionID(ids, now).String()}, nil
}

// create makes n and proves that it signs. What fails is erased, unless the session was lost: then the next try goes on
// with what the token has.
func (s *session) create(n name, alg keys.Algorithm, tried *bool) (keys.Version, error) {
	v, err := s.generateOnce(n, alg, tried)
	// SoftHSM 2.6.1 was seen to say this once, with signatures under way in another session, of a template that it takes at any
	// other time. A token that means it says it again.
	if isCode(err, pkcs11.CKR_TEMPLATE_INCONSISTENT) {
		if err = s.erase(n); err == nil {
			*tried = false
			v, err = s.generateOnce(n, alg, tried)
		}
	}
	if err != nil && !isLost(err) && !errors.Is(err, errHalf) {
		return keys.Version{}, errors.Join(err, s.erase(n))
	}
	return v, err
}

// generateOnce generates n unless an earlier try got so far.
func (s *session) generateOnce(n name, alg keys.Algorithm, tried *bool) (keys.Version, error) {
	var p *pair
	err := keys.ErrNotFound
	if *tried {
		p, err = s.pair(n)
	}
	switch {
	case errors.Is(err, errHalf):
		return keys.Version{}, err
	case errors.Is(err, keys.ErrNotFound):
		*tried = true
		if err := s.generate(n, alg); err != nil {
			return keys.Version{}, err
		}
	case err != nil:
		return keys.Version{}, err
	case !p.hasPrivate:
		return keys.Version{}, fmt.Errorf("%v: %w", n, errHalf)
	}
	return s.prove(n, alg)
}

// prove reads n from the token and lets it sign.
func (s *session) prove(n name, alg keys.Algorithm) (keys.Version, error) {
	delete(s.private, n) // looked up anew, not from memory
	p, err := s.usable(n)
	if err != nil {
		return keys.Version{}, err
	}
	if p.alg != alg {
		return keys.Version{}, fmt.Errorf("%v: the key is %s, want %s", n, p.alg, alg)
	}
	proof := keys.ProofMessage(n.label, n.id)
	raw, err := s.sign(n, p.alg, p.public, input(p.alg, proof))
	if err != nil {
		return keys.Version{}, err
	}
	if _, err := checked(p.alg, p.public, proof, raw); err != nil {
		return keys.Version{}, fmt.Errorf("%v: %w", n, err)
	}
	return p.version(n), nil
}

// input is what a token signs for a message: P-256 mechanisms take the digest.
func input(alg keys.Algorithm, msg []byte) []byte {
	if alg == keys.P256 {
		digest := sha256.Sum256(msg)
		return digest[:]
	}
	return msg
}

// checked turns a raw signature into the contract's and refuses it when it does not verify.
func checked(alg keys.Algorithm, pub crypto.PublicKey, msg, raw []byte) ([]byte, error) {
	sig, err := finish(alg, raw)
	if err != nil {
		return nil, err
	}
	if err := keys.Verify(alg, pub, msg, sig); err != nil {
		return nil, fmt.Errorf("the token's signature is wrong: %w", err)
	}
	return sig, nil
}

// Versions lists the versions of label; those made by other tools come first and have no time of creation. Two objects
// under one id, or a private key without its public one, is an error and hides nothing.
func (s *Store) Versions(ctx context.Context, label string) (vs []keys.Version, err error) {
	if err := keys.CheckLabel(label); err != nil {
		return nil, fmt.Errorf("hsm: versions: %w", err)
	}
	var found []keys.Version
	err = s.do(ctx, &op{fn: func(se *session) (err error) {
		found, err = se.versions(label)
		return err
	}})
	if err != nil {
		return nil, fmt.Errorf("hsm: versions: %w", err)
	}
	return found, nil
}

// Signer opens one version. A key that can leave the token, or could once, is refused unless Config.AllowExportable.
func (s *Store) Signer(ctx context.Context, label, id string) (keys.Signer, error) {
	n := name{label, id}
	var p *pair
	err := s.do(ctx, &op{fn: func(se *session) (err error) {
		p, err = se.usable(n)
		return err
	}})
	if err != nil {
		return nil, fmt.Errorf("hsm: signer: %w", err)
	}
	if p.exposed != nil {
		s.log.LogAttrs(ctx, slog.LevelWarn, "hsm: an exportable key is used, as configured", slog.String("token", s.tok.label),
			slog.Any("error", p.exposed))
	}
	return &signer{store: s, name: n, alg: p.alg, public: p.public}, nil
}

// Inspect says how a version's private key is kept, without using it. Implements keys.Inspector.
func (s *Store) Inspect(ctx context.Context, label, id string) (keys.Inspection, error) {
	var found keys.Inspection
	err := s.do(ctx, &op{fn: func(se *session) error {
		_, state, exposed, err := se.inspect(name{label, id})
		if err != nil {
			return err
		}
		found = keys.Inspection{CanSign: state == nil && (exposed == nil || se.exportable), Exportable: exposed != nil}
		if why := errors.Join(state, exposed); why != nil {
			found.Why = strings.ReplaceAll(why.Error(), "\n", "; ")
		}
		return nil
	}})
	if err != nil {
		return keys.Inspection{}, fmt.Errorf("hsm: inspect: %w", err)
	}
	return found, nil
}

// Disable clears CKA_SIGN and reads it back. A destroyed version refuses already.
func (s *Store) Disable(ctx context.Context, label, id string) error {
	n := name{label, id}
	err := s.do(ctx, &op{fn: func(se *session) error {
		p, err := se.pair(n)
		if err != nil || !p.hasPrivate || !p.canSign {
			return err
		}
		off := []*pkcs11.Attribute{attr(pkcs11.CKA_SIGN, false)}
		if err := se.tok.mod.ck.SetAttributeValue(se.h, p.privateObj, off); err != nil {
			return fmt.Errorf("%v: C_SetAttributeValue: %w", n, err)
		}
		se.tok.sights.note(n, sight{public: true, private: true})
		if p, err = se.pair(n); err != nil {
			return err
		}
		if p.hasPrivate && p.canSign {
			return fmt.Errorf("%v: the token did not clear CKA_SIGN", n)
		}
		return nil
	}})
	if err != nil {
		return fmt.Errorf("hsm: disable: %w", err)
	}
	return nil
}

// Destroy destroys the private object; the public one stays and says that there was a version.
func (s *Store) Destroy(ctx context.Context, label, id string) error {
	n := name{label, id}
	err := s.do(ctx, &op{fn: func(se *session) error {
		p, err := se.pair(n)
		if err != nil || !p.hasPrivate {
			return err
		}
		if err := se.tok.mod.ck.DestroyObject(se.h, p.privateObj); err != nil {
			return fmt.Errorf("%v: C_DestroyObject: %w", n, err)
		}
		se.tok.sights.note(n, sight{public: true})
		if p, err = se.pair(n); err != nil {
			return err
		}
		if p.hasPrivate {
			return fmt.Errorf("%v: the token did not destroy the private key", n)
		}
		return nil
	}})
	if err != nil {
		return fmt.Errorf("hsm: destroy: %w", err)
	}
	return nil
}

// Check proves that the token signs: it looks the newest enabled version of label up anew and lets it sign
// keys.ProofMessage. A session that opens proves nothing: SoftHSM opens them on a token that is gone. ErrNotFound when
// there is no enabled version.
func (s *Store) Check(ctx context.Context, label string) error {
	err := s.do(ctx, &op{fn: func(se *session) error {
		vs, err := se.versions(label)
		if err != nil {
			return err
		}
		for i := len(vs) - 1; i >= 0; i-- {
			if vs[i].State == keys.Enabled {
				_, err := se.prove(name{label, vs[i].ID}, vs[i].Algorithm)
				return err
			}
		}
		return fmt.Errorf("%w: label %q has no enabled version", keys.ErrNotFound, label)
	}})
	if err != nil {
		return fmt.Errorf("hsm: check: %w", err)
	}
	return nil
}

// signer signs with one version. Implements keys.Signer.
type signer struct {
	store  *Store
	name   name
	alg    keys.Algorithm
	public crypto.PublicKey
}

func (g *signer) Algorithm() keys.Algorithm { return g.alg }
func (g *signer) Public() crypto.PublicKey  { return g.public }

// Sign signs in the token and verifies here, on the caller's goroutine.
func (g *signer) Sign(ctx context.Context, msg []byte) ([]byte, error) {
	if len(msg) > keys.MaxMessage {
		return nil, fmt.Errorf("hsm: sign: message has %d bytes, at most %d are signed", len(msg), keys.MaxMessage)
	}
	in := input(g.alg, msg)
	if g.alg == keys.Ed25519 {
		in = bytes.Clone(in) // the token may read it after the caller has gone
	}
	var raw []byte
	err := g.store.do(ctx, &op{fn: func(se *session) (err error) {
		raw, err = se.sign(g.name, g.alg, g.public, in)
		return err
	}})
	if err != nil {
		return nil, fmt.Errorf("hsm: sign: %w", err)
	}
	sig, err := checked(g.alg, g.public, msg, raw)
	if err != nil {
		return nil, fmt.Errorf("hsm: sign: %v: %w", g.name, err)
	}
	return sig, nil
}
