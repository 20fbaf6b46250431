package receipt

import (
	"cmp"
	"errors"
	"fmt"
	"unicode/utf8"

	"golang.org/x/mod/sumdb/note"
)

// SealText returns the text of the signed note that is the seal s: SealPrefix, one JSON object in canonical form, a newline.
func SealText(s *Seal) string { return string(appendSealText(nil, s)) }

func appendSealText(dst []byte, s *Seal) []byte {
	dst = append(dst, SealPrefix+`{"origin":`...)
	dst = appendText(dst, s.Origin)
	dst = append(dst, `,"key":`...)
	dst = appendUint(dst, s.Key)
	dst = append(dst, `,"size":`...)
	dst = appendUint(dst, s.Size)
	dst = append(dst, `,"root":`...)
	dst = appendBytes(dst, s.Root[:])
	dst = append(dst, `,"time":`...)
	dst = appendTime(dst, s.Time)
	dst = optText(dst, `,"reason":`, s.Reason)
	return append(dst, "}\n"...)
}

var sealMembers = []member[Seal]{
	{"origin", false, func(s *Seal, r reader) error { return r.text(&s.Origin) }},
	{"key", false, func(s *Seal, r reader) error { return r.uint64(&s.Key) }},
	{"size", false, func(s *Seal, r reader) error { return r.uint64(&s.Size) }},
	{"root", false, func(s *Seal, r reader) error { return r.fixed(s.Root[:]) }},
	{"time", false, func(s *Seal, r reader) error { return r.time(&s.Time) }},
	{"reason", true, func(s *Seal, r reader) error { return r.text(&s.Reason) }},
}

// Validate says what ParseSeal would refuse in s: a bad origin, a time before 1970, a reason that is too long or not UTF-8, and a
// key statement that does not stand before the seal.
func (s *Seal) Validate() error {
	if err := cmp.Or(validOrigin(s.Origin), validTime("time", s.Time), validReason(s.Reason)); err != nil {
		return err
	}
	if s.Key >= s.Size {
		return fmt.Errorf("field %q: %d, in a log of %d leaves", "key", s.Key, s.Size)
	}
	return nil
}

func validReason(reason string) error {
	if len(reason) > MaxReason || !utf8.ValidString(reason) {
		return fmt.Errorf("field %q: want at most %d bytes of UTF-8", "reason", MaxReason)
	}
	return nil
}

// SignSeal returns the leaf: the signed note over SealText(s) with the line of identity and then that of daily, the key in force,
// which is nil when that cannot sign. Both signers are named after the origin.
func SignSeal(s *Seal, identity, daily note.Signer) ([]byte, error) {
	if err := s.Validate(); err != nil {
		return nil, fmt.Errorf("sign seal: %w", err)
	}
	signers := []note.Signer{identity}
	if daily != nil {
		signers = append(signers, daily)
		if daily.KeyHash() == identity.KeyHash() {
			return nil, errors.New("sign seal: the identity key cannot be the daily key")
		}
	}
	leaf, err := signNote(s.Origin, SealText(s), signers)
	if err != nil {
		return nil, fmt.Errorf("sign seal: %w", err)
	}
	return leaf, nil
}

// signNote signs text by signers that are all named origin.
func signNote(origin, text string, signers []note.Signer) ([]byte, error) {
	for _, s := range signers {
		if s.Name() != origin {
			return nil, fmt.Errorf("signer is named %q, not after the origin", s.Name())
		}
	}
	return note.Sign(&note.Note{Text: text}, signers...)
}

// ParseSeal parses a leaf that SignSeal made, without looking at its signatures: see VerifySeal.
func ParseSeal(leaf []byte) (*Seal, error) {
	s, _, err := parseSeal(leaf)
	if err != nil {
		return nil, fmt.Errorf("parse seal: %w", err)
	}
	return s, nil
}

func parseSeal(leaf []byte) (*Seal, []noteLine, error) {
	s := new(Seal)
	lines, err := parseNote(leaf, SealPrefix, sealMembers, s, (*Seal).Validate, appendSealText)
	if err != nil {
		return nil, nil, err
	}
	if len(lines) > 2 {
		return nil, nil, fmt.Errorf("%d signatures, want 1 or 2", len(lines))
	}
	return s, lines, nil
}

// VerifySeal parses leaf and checks the signature by identity, which is named after the origin. A line of the daily key is not
// checked, as the key stands elsewhere: Verify and KeyAudit do.
func VerifySeal(leaf []byte, identity note.Verifier) (*Seal, error) {
	s, _, err := verifySeal(leaf, identity)
	if err != nil {
		return nil, fmt.Errorf("verify seal: %w", err)
	}
	return s, nil
}

// verifySeal returns the line of the daily key as well, nil without one.
func verifySeal(leaf []byte, identity note.Verifier) (s *Seal, daily *noteLine, err error) {
	s, lines, err := parseSeal(leaf)
	if err != nil {
		return nil, nil, err
	}
	if err := openByIdentity(leaf, s.Origin, identity); err != nil {
		return nil, nil, err
	}
	for i, l := range lines {
		if l.name != s.Origin {
			return nil, nil, fmt.Errorf("signed by %.64q, which is not named after the origin", l.name)
		}
		if l.hash != identity.KeyHash() {
			daily = &lines[i]
		}
	}
	return s, daily, nil
}

// openByIdentity checks that identity, which is named after origin, has signed the note msg.
func openByIdentity(msg []byte, origin string, identity note.Verifier) error {
	if identity.Name() != origin {
		return fmt.Errorf("it is for origin %q, the identity key for %q", origin, identity.Name())
	}
	_, err := note.Open(msg, note.VerifierList(identity))
	return err
}

// signedBy checks the line of the daily key of a seal.
func (l *noteLine) signedBy(leaf []byte, daily *key) bool {
	text, _, err := splitNote(leaf)
	return err == nil && l.name == daily.verifier.Name() && l.hash == daily.verifier.KeyHash() && daily.verifier.Verify(text, l.sig)
}
