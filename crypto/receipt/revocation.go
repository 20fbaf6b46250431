package receipt

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/mod/sumdb/note"
)

// RevocationPrefix begins the text of a revocation: a signed note of this prefix, one JSON object and a newline. It is no leaf.
const RevocationPrefix = "knhk/revocation/v1\n"

// RevocationText returns the text of the signed note that is the revocation r.
func RevocationText(r *Revocation) string { return string(appendRevocationText(nil, r)) }

func appendRevocationText(dst []byte, r *Revocation) []byte {
	dst = append(dst, RevocationPrefix+`{"origin":`...)
	dst = appendText(dst, r.Origin)
	dst = append(dst, `,"key":`...)
	dst = appendText(dst, r.Key)
	dst = append(dst, `,"size":`...)
	dst = appendUint(dst, r.Size)
	dst = append(dst, `,"root":`...)
	dst = appendBytes(dst, r.Root[:])
	dst = append(dst, `,"time":`...)
	dst = appendTime(dst, r.Time)
	dst = optText(dst, `,"reason":`, r.Reason)
	return append(dst, "}\n"...)
}

var revocationMembers = []member[Revocation]{
	{"origin", false, func(x *Revocation, r reader) error { return r.text(&x.Origin) }},
	{"key", false, func(x *Revocation, r reader) error { return r.text(&x.Key) }},
	{"size", false, func(x *Revocation, r reader) error { return r.uint64(&x.Size) }},
	{"root", false, func(x *Revocation, r reader) error { return r.fixed(x.Root[:]) }},
	{"time", false, func(x *Revocation, r reader) error { return r.time(&x.Time) }},
	{"reason", true, func(x *Revocation, r reader) error { return r.text(&x.Reason) }},
}

// Validate says what ParseRevocation would refuse in r: a key that is not a canonical verifier key named after the origin, a size
// of 0, a time before 1970, a reason that is too long or not UTF-8.
func (r *Revocation) Validate() error {
	if err := cmp.Or(validOrigin(r.Origin), validTime("time", r.Time), validReason(r.Reason)); err != nil {
		return err
	}
	if _, err := originKey(r.Origin, r.Key); err != nil {
		return fmt.Errorf("field %q: %w", "key", err)
	}
	if r.Size == 0 {
		return fmt.Errorf("field %q: 0, but no daily key has a successor there", "size")
	}
	return nil
}

// SignRevocation returns the revocation as a signed note with the line of identity, which is named after the origin. Others may
// add their lines.
func SignRevocation(r *Revocation, identity note.Signer) ([]byte, error) {
	if err := r.Validate(); err != nil {
		return nil, fmt.Errorf("sign revocation: %w", err)
	}
	signed, err := signNote(r.Origin, RevocationText(r), []note.Signer{identity})
	if err != nil {
		return nil, fmt.Errorf("sign revocation: %w", err)
	}
	return signed, nil
}

// ParseRevocation parses what SignRevocation made, without looking at its signatures: Policy.Revoke does.
func ParseRevocation(b []byte) (*Revocation, error) {
	r := new(Revocation)
	if _, err := parseNote(b, RevocationPrefix, revocationMembers, r, (*Revocation).Validate, appendRevocationText); err != nil {
		return nil, fmt.Errorf("parse revocation: %w", err)
	}
	return r, nil
}

// revocations is what a policy was told of one log.
type revocations struct {
	pins     []Pin // by size
	keys     []Revocation
	seal     *Seal
	sealLeaf []byte
}

// Revoke makes p heed note: a revocation, or the leaf that is the seal of a log. It is verified under the identity key that p has
// for its origin. From then on
//
//   - a bundle of that log must be consistent with the tree that note pins, and bring the proof (Bundle.Pins);
//   - what a revoked key signed beyond its pin is refused;
//   - nothing beyond a seal verifies; the last that does is the checkpoint whose last leaf is that very seal. A log whose identity
//     key is that of a sealed one does not verify at all.
//
// The same note twice is one. An error leaves p as it was: a note that cannot be verified, or contradicts one that p heeds already,
// as no honest log makes two such: two pins of one size with two roots, two pins for one key, two seals, a pin beyond the
// seal. Revoke must not run while bundles are verified under p.
func (p *Policy) Revoke(note []byte) error {
	var err error
	if bytes.HasPrefix(note, []byte(SealPrefix)) {
		err = p.revokeLog(note)
	} else {
		err = p.revokeKey(note)
	}
	if err != nil {
		return fmt.Errorf("revoke: %w", err)
	}
	return nil
}

func (p *Policy) revokeLog(leaf []byte) error {
	s, err := ParseSeal(leaf)
	if err != nil {
		return err
	}
	l := p.logs[s.Origin]
	if l == nil {
		return fmt.Errorf("the policy has no log %.64q", s.Origin)
	}
	if _, err := VerifySeal(leaf, l.identity.verifier); err != nil {
		return err
	}
	r := &l.revoked
	if r.seal != nil {
		if bytes.Equal(r.sealLeaf, leaf) {
			return nil
		}
		return fmt.Errorf("two different seals of %s, at size %d and at size %d", s.Origin, r.seal.Size, s.Size)
	}
	if n := len(r.pins); n > 0 && r.pins[n-1].Size > s.Size {
		return fmt.Errorf("a revocation at size %d is beyond the seal at size %d", r.pins[n-1].Size, s.Size)
	}
	if err := r.pin(Pin{s.Size, s.Root}); err != nil {
		return err
	}
	r.seal, r.sealLeaf = s, bytes.Clone(leaf)
	return nil
}

func (p *Policy) revokeKey(signed []byte) error {
	x, err := ParseRevocation(signed)
	if err != nil {
		return err
	}
	l := p.logs[x.Origin]
	if l == nil {
		return fmt.Errorf("the policy has no log %.64q", x.Origin)
	}
	if err := openByIdentity(signed, x.Origin, l.identity.verifier); err != nil {
		return err
	}
	if k, err := parseKey(x.Key); err != nil || k.same(l.identity) {
		return errors.New("it revokes the identity key as if it were a daily key: the log must be sealed")
	}
	r := &l.revoked
	for i := range r.keys {
		if o := &r.keys[i]; o.Key == x.Key {
			if o.Size == x.Size && o.Root == x.Root {
				return nil
			}
			return fmt.Errorf("two revocations of %s, at size %d and at size %d", shortKey(x.Key), o.Size, x.Size)
		}
	}
	if r.seal != nil && x.Size > r.seal.Size {
		return fmt.Errorf("the revocation at size %d is beyond the seal at size %d", x.Size, r.seal.Size)
	}
	if err := r.pin(Pin{x.Size, x.Root}); err != nil {
		return err
	}
	r.keys = append(r.keys, *x)
	return nil
}

// pin adds a pin in its place.
func (r *revocations) pin(pin Pin) error {
	at, found := slices.BinarySearchFunc(r.pins, pin, func(a, b Pin) int { return cmp.Compare(a.Size, b.Size) })
	switch {
	case found && r.pins[at].Root != pin.Root:
		return fmt.Errorf("another root for size %d than a revocation before: one of them is forged, or the log has forked", pin.Size)
	case found:
		return nil
	case len(r.pins) == MaxPins:
		return fmt.Errorf("more than %d pins for one log", MaxPins)
	}
	r.pins = slices.Insert(r.pins, at, pin)
	return nil
}

// Pins lists what bundles of a log must be consistent with, sorted by size, at most MaxPins.
func (p *Policy) Pins(origin string) []Pin {
	if l := p.logs[origin]; l != nil {
		return slices.Clone(l.revoked.pins)
	}
	return nil
}

// Revocations lists the revocations of a log's keys that p heeds, in the order they were given.
func (p *Policy) Revocations(origin string) []Revocation {
	if l := p.logs[origin]; l != nil {
		return slices.Clone(l.revoked.keys)
	}
	return nil
}

// Seal returns the seal of a log that p heeds, nil for none.
func (p *Policy) Seal(origin string) *Seal {
	l := p.logs[origin]
	if l == nil || l.revoked.seal == nil {
		return nil
	}
	s := *l.revoked.seal
	return &s
}
