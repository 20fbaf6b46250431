package receipt

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"
)

// MaxKeyAge is the longest time between NotBefore and NotAfter of a daily key.
const MaxKeyAge = 24 * time.Hour

// KeyText returns the text of the signed note that states ks: KeyPrefix, one JSON object in canonical form, a newline.
func KeyText(ks *KeyStatement) string { return string(appendKeyText(nil, ks)) }

func appendKeyText(dst []byte, ks *KeyStatement) []byte {
	dst = append(dst, KeyPrefix+`{"origin":`...)
	dst = appendText(dst, ks.Origin)
	dst = append(dst, `,"key":`...)
	dst = appendText(dst, ks.Key)
	dst = optText(dst, `,"predecessor":`, ks.Predecessor)
	dst = append(dst, `,"not_before":`...)
	dst = appendTime(dst, ks.NotBefore)
	dst = append(dst, `,"not_after":`...)
	dst = appendTime(dst, ks.NotAfter)
	dst = append(dst, `,"first_size":`...)
	dst = appendUint(dst, ks.FirstSize)
	dst = append(dst, `,"first_root":`...)
	dst = appendBytes(dst, ks.FirstRoot[:])
	return append(dst, "}\n"...)
}

var keyMembers = []member[KeyStatement]{
	{"origin", false, func(k *KeyStatement, r reader) error { return r.text(&k.Origin) }},
	{"key", false, func(k *KeyStatement, r reader) error { return r.text(&k.Key) }},
	{"predecessor", true, func(k *KeyStatement, r reader) error { return r.text(&k.Predecessor) }},
	{"not_before", false, func(k *KeyStatement, r reader) error { return r.time(&k.NotBefore) }},
	{"not_after", false, func(k *KeyStatement, r reader) error { return r.time(&k.NotAfter) }},
	{"first_size", false, func(k *KeyStatement, r reader) error { return r.uint64(&k.FirstSize) }},
	{"first_root", false, func(k *KeyStatement, r reader) error { return r.fixed(k.FirstRoot[:]) }},
}

// Validate says what ParseKeyStatement would refuse in ks: keys that are not canonical verifier keys named after the
// origin, a key that is its own predecessor, NotAfter outside (NotBefore, NotBefore+MaxKeyAge], and a FirstSize of 0 whose
// FirstRoot is not EmptyRoot.
func (ks *KeyStatement) Validate() error {
	_, _, err := ks.keys()
	return err
}

// keys checks ks and returns its key and its predecessor, nil for none.
func (ks *KeyStatement) keys() (daily, predecessor *key, err error) {
	if err := cmp.Or(validOrigin(ks.Origin), validTime("not_before", ks.NotBefore), validTime("not_after", ks.NotAfter)); err != nil {
		return nil, nil, err
	}
	if daily, err = originKey(ks.Origin, ks.Key); err != nil {
		return nil, nil, fmt.Errorf("field %q: %w", "key", err)
	}
	if ks.Predecessor != "" {
		if predecessor, err = originKey(ks.Origin, ks.Predecessor); err != nil {
			return nil, nil, fmt.Errorf("field %q: %w", "predecessor", err)
		}
		if predecessor.same(daily) {
			return nil, nil, fmt.Errorf("field %q: the key itself", "predecessor")
		}
	}
	if age := ks.NotAfter.Sub(ks.NotBefore); age <= 0 || age > MaxKeyAge {
		return nil, nil, fmt.Errorf("field %q: %v after not_before, want more than 0 and at most %v", "not_after", age, MaxKeyAge)
	}
	if ks.FirstSize == 0 && ks.FirstRoot != EmptyRoot {
		return nil, nil, fmt.Errorf("field %q: not the root of the empty log", "first_root")
	}
	return daily, predecessor, nil
}

func originKey(origin, vkey string) (*key, error) {
	k, err := parseKey(vkey)
	if err != nil {
		return nil, err
	}
	if k.verifier.Name() != origin {
		return nil, fmt.Errorf("is named %.64q, not after the origin", k.verifier.Name())
	}
	return k, nil
}

// SignKeyStatement returns the leaf: the signed note over KeyText(ks) with the line of identity and then, when
// ks.Predecessor names a key, the line of predecessor. Both signers are named after the origin; predecessor is nil exactly
// when ks.Predecessor is empty.
func SignKeyStatement(ks *KeyStatement, identity, predecessor note.Signer) ([]byte, error) {
	daily, before, err := ks.keys()
	if err != nil {
		return nil, fmt.Errorf("sign key statement: %w", err)
	}
	if (before == nil) != (predecessor == nil) {
		return nil, errors.New("sign key statement: a predecessor's key and its signer go together")
	}
	signers := []note.Signer{identity}
	if predecessor != nil {
		if predecessor.KeyHash() != before.verifier.KeyHash() || predecessor.Name() != ks.Origin {
			return nil, fmt.Errorf("sign key statement: signer %s+%08x is not the predecessor", predecessor.Name(), predecessor.KeyHash())
		}
		signers = append(signers, predecessor)
	}
	for _, v := range []*key{daily, before} {
		if v != nil && v.verifier.KeyHash() == identity.KeyHash() {
			return nil, errors.New("sign key statement: the identity key cannot be a daily key")
		}
	}
	if identity.Name() != ks.Origin {
		return nil, fmt.Errorf("sign key statement: identity signer is named %q, not after the origin", identity.Name())
	}
	leaf, err := note.Sign(&note.Note{Text: KeyText(ks)}, signers...)
	if err != nil {
		return nil, fmt.Errorf("sign key statement: %w", err)
	}
	return leaf, nil
}

// ParseKeyStatement parses a leaf that SignKeyStatement made, without looking at its signatures: see VerifyKeyStatement.
func ParseKeyStatement(leaf []byte) (*KeyStatement, error) {
	ks := new(KeyStatement)
	if len(leaf) > MaxLeaf {
		return nil, fmt.Errorf("parse key statement: %d bytes: at most %d are read", len(leaf), MaxLeaf)
	}
	text, lines, err := splitNote(leaf)
	if err != nil {
		return nil, fmt.Errorf("parse key statement: %w", err)
	}
	if err := parseLeaf(text, KeyPrefix, keyMembers, ks, (*KeyStatement).Validate, appendKeyText); err != nil {
		return nil, fmt.Errorf("parse key statement: %w", err)
	}
	want := 1
	if ks.Predecessor != "" {
		want = 2
	}
	if len(lines) != want {
		return nil, fmt.Errorf("parse key statement: %d signatures, want %d", len(lines), want)
	}
	return ks, nil
}

// VerifyKeyStatement parses leaf and checks its signatures: by identity, which is named after the origin, and by the
// predecessor that the statement names, if it does. A non-nil predecessor must be that one; nil takes the key from the
// statement, which shows that its holder signed but not that it ever was a key of this log.
func VerifyKeyStatement(leaf []byte, identity, predecessor note.Verifier) (*KeyStatement, error) {
	ks, _, err := verifyKeyStatement(leaf, identity)
	if err != nil {
		return nil, fmt.Errorf("verify key statement: %w", err)
	}
	if predecessor != nil && ks.Predecessor == "" {
		return nil, errors.New("verify key statement: it names no predecessor")
	}
	if predecessor != nil {
		// The other line is the identity key's: this finds no signature unless the predecessor is the one that was named. The
		// 32 bits of a key hash do not identify a key, so the signature counts, under the caller's own key.
		n, err := note.Open(leaf, note.VerifierList(predecessor))
		if err != nil {
			return nil, fmt.Errorf("verify key statement: predecessor: %w", err)
		}
		if sig := n.Sigs[0]; sig.Name == identity.Name() && sig.Hash == identity.KeyHash() {
			return nil, errors.New("verify key statement: the identity key is no predecessor")
		}
	}
	return ks, nil
}

func verifyKeyStatement(leaf []byte, identity note.Verifier) (*KeyStatement, *key, error) {
	ks, err := ParseKeyStatement(leaf)
	if err != nil {
		return nil, nil, err
	}
	daily, before, err := ks.keys()
	if err != nil {
		return nil, nil, err
	}
	if identity.Name() != ks.Origin {
		return nil, nil, fmt.Errorf("it is for origin %q, the identity key for %q", ks.Origin, identity.Name())
	}
	known := []note.Verifier{identity}
	if before != nil {
		known = append(known, before.verifier)
	}
	for _, v := range []*key{daily, before} {
		if v != nil && v.verifier.KeyHash() == identity.KeyHash() {
			return nil, nil, errors.New("it states the identity key as a daily key")
		}
	}
	n, err := note.Open(leaf, note.VerifierList(known...))
	if err != nil {
		return nil, nil, err
	}
	// ParseKeyStatement counted the lines; none may be unknown or a repetition.
	if len(n.Sigs) != len(known) || len(n.UnverifiedSigs) != 0 {
		return nil, nil, errors.New("it is not signed by the identity key and the predecessor")
	}
	return ks, daily, nil
}

// noteLine is one signature line of a signed note.
type noteLine struct {
	name string
	hash uint32
	sig  []byte
}

// splitNote splits a signed note into its text and its signature lines, which must be in canonical form and from distinct
// keys. It verifies nothing.
func splitNote(msg []byte) (text []byte, lines []noteLine, err error) {
	split := bytes.LastIndex(msg, []byte("\n\n"))
	if split < 0 || msg[len(msg)-1] != '\n' {
		return nil, nil, errors.New("not a signed note")
	}
	text = msg[:split+1]
	for rest := string(msg[split+2:]); rest != ""; {
		var line string
		line, rest, _ = strings.Cut(rest, "\n")
		line, ok := strings.CutPrefix(line, "— ")
		name, b64, ok2 := strings.Cut(line, " ")
		raw, err := stdEncoding.DecodeString(b64)
		if !ok || !ok2 || name == "" || err != nil || len(raw) < 5 || strings.Contains(b64, "\r") {
			return nil, nil, fmt.Errorf("signature line %d is malformed", len(lines)+1)
		}
		l := noteLine{name, uint32(raw[0])<<24 | uint32(raw[1])<<16 | uint32(raw[2])<<8 | uint32(raw[3]), raw[4:]}
		for _, other := range lines {
			if other.name == l.name && other.hash == l.hash {
				return nil, nil, fmt.Errorf("two signature lines by %.64s+%08x", l.name, l.hash)
			}
		}
		if lines = append(lines, l); len(lines) > maxSignatures {
			return nil, nil, fmt.Errorf("more than %d signature lines", maxSignatures)
		}
	}
	if len(lines) == 0 {
		return nil, nil, errors.New("a note without signatures")
	}
	return text, lines, nil
}

const maxSignatures = 64
