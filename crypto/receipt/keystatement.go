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
	dst = optText(dst, `,"ended":`, ks.Ended)
	dst = append(dst, `,"not_before":`...)
	dst = appendTime(dst, ks.NotBefore)
	dst = append(dst, `,"not_after":`...)
	dst = appendTime(dst, ks.NotAfter)
	dst = append(dst, `,"first_size":`...)
	dst = appendUint(dst, ks.FirstSize)
	dst = append(dst, `,"first_root":`...)
	dst = appendBytes(dst, ks.FirstRoot[:])
	if q := ks.Succeeds; q != nil {
		dst = append(dst, `,"succeeds":{"origin":`...)
		dst = appendText(dst, q.Origin)
		dst = append(dst, `,"identity":`...)
		dst = appendText(dst, q.Identity)
		dst = append(dst, `,"size":`...)
		dst = appendUint(dst, q.Size)
		dst = append(dst, `,"root":`...)
		dst = appendBytes(dst, q.Root[:])
		dst = append(dst, '}')
	}
	return append(dst, "}\n"...)
}

var keyMembers = []member[KeyStatement]{
	{"origin", false, func(k *KeyStatement, r reader) error { return r.text(&k.Origin) }},
	{"key", false, func(k *KeyStatement, r reader) error { return r.text(&k.Key) }},
	{"predecessor", true, func(k *KeyStatement, r reader) error { return r.text(&k.Predecessor) }},
	{"ended", true, func(k *KeyStatement, r reader) error { return r.text(&k.Ended) }},
	{"not_before", false, func(k *KeyStatement, r reader) error { return r.time(&k.NotBefore) }},
	{"not_after", false, func(k *KeyStatement, r reader) error { return r.time(&k.NotAfter) }},
	{"first_size", false, func(k *KeyStatement, r reader) error { return r.uint64(&k.FirstSize) }},
	{"first_root", false, func(k *KeyStatement, r reader) error { return r.fixed(k.FirstRoot[:]) }},
	{"succeeds", true, func(k *KeyStatement, r reader) error {
		k.Succeeds = new(Quote)
		return object(r, quoteMembers, k.Succeeds)
	}},
}

var quoteMembers = []member[Quote]{
	{"origin", false, func(q *Quote, r reader) error { return r.text(&q.Origin) }},
	{"identity", false, func(q *Quote, r reader) error { return r.text(&q.Identity) }},
	{"size", false, func(q *Quote, r reader) error { return r.uint64(&q.Size) }},
	{"root", false, func(q *Quote, r reader) error { return r.fixed(q.Root[:]) }},
}

// Validate says what ParseKeyStatement would refuse in ks: keys that are not canonical verifier keys named after the
// origin, a key that is its own predecessor, NotAfter outside (NotBefore, NotBefore+MaxKeyAge]; a first statement (FirstSize 0)
// that names a predecessor, or an end of it, or another root than EmptyRoot; a later one that does not, or that quotes a sealed
// log; a quote of the log itself, of no leaves, or of an identity key that is the new daily key.
func (ks *KeyStatement) Validate() error {
	_, err := ks.keys()
	return err
}

// statementKeys are the keys that a statement names.
type statementKeys struct {
	daily       *key
	predecessor *key // nil for none
	sealed      *key // identity key of the quoted log; nil without a quote
}

// keys checks ks and returns its keys.
func (ks *KeyStatement) keys() (k statementKeys, err error) {
	if err := cmp.Or(validOrigin(ks.Origin), validTime("not_before", ks.NotBefore), validTime("not_after", ks.NotAfter)); err != nil {
		return k, err
	}
	if k.daily, err = originKey(ks.Origin, ks.Key); err != nil {
		return k, fmt.Errorf("field %q: %w", "key", err)
	}
	if age := ks.NotAfter.Sub(ks.NotBefore); age <= 0 || age > MaxKeyAge {
		return k, fmt.Errorf("field %q: %v after not_before, want more than 0 and at most %v", "not_after", age, MaxKeyAge)
	}
	if ks.FirstSize == 0 {
		switch {
		case ks.Predecessor != "":
			return k, fmt.Errorf("field %q: in the first statement of a log", "predecessor")
		case ks.Ended != "":
			return k, fmt.Errorf("field %q: in the first statement of a log", "ended")
		case ks.FirstRoot != EmptyRoot:
			return k, fmt.Errorf("field %q: not the root of the empty log", "first_root")
		case ks.Succeeds != nil:
			k.sealed, err = ks.Succeeds.key(ks.Origin, k.daily)
		}
		return k, err
	}
	if ks.Succeeds != nil {
		return k, fmt.Errorf("field %q: not in the first statement of a log", "succeeds")
	}
	if err := validOneOf("ended", ks.Ended, EndedRotated, EndedExpired, EndedUntrusted, EndedLost, EndedRevoked); err != nil {
		return k, err
	}
	if k.predecessor, err = originKey(ks.Origin, ks.Predecessor); err != nil {
		return k, fmt.Errorf("field %q: %w", "predecessor", err)
	}
	if k.predecessor.same(k.daily) {
		return k, fmt.Errorf("field %q: the key itself", "predecessor")
	}
	return k, nil
}

// key checks a quote in the first statement of the log origin and returns the sealed log's identity key.
func (q *Quote) key(origin string, daily *key) (*key, error) {
	if err := validOrigin(q.Origin); err != nil {
		return nil, fmt.Errorf("field %q: %w", "succeeds", err)
	}
	k, err := originKey(q.Origin, q.Identity)
	switch {
	case err != nil:
		return nil, fmt.Errorf("field %q: %w", "succeeds", err)
	case q.Origin == origin:
		return nil, fmt.Errorf("field %q: the log itself", "succeeds")
	case q.Size == 0:
		return nil, fmt.Errorf("field %q: a log without leaves", "succeeds")
	case k.public == daily.public:
		return nil, fmt.Errorf("field %q: the sealed log's identity key as daily key", "succeeds")
	}
	return k, nil
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

// SignKeyStatement returns the leaf: the signed note over KeyText(ks) with the line of identity and then, when ks.Ended is
// EndedRotated, the line of predecessor. Both signers are named after the origin; predecessor is nil for any other end. It
// refuses an identity key that is the one of the log ks succeeds.
func SignKeyStatement(ks *KeyStatement, identity, predecessor note.Signer) ([]byte, error) {
	k, err := ks.keys()
	if err != nil {
		return nil, fmt.Errorf("sign key statement: %w", err)
	}
	signers := []note.Signer{identity}
	switch {
	case (ks.Ended == EndedRotated) != (predecessor != nil):
		return nil, fmt.Errorf("sign key statement: the predecessor signs when it ended as %q, and only then", EndedRotated)
	case predecessor != nil:
		if predecessor.KeyHash() != k.predecessor.verifier.KeyHash() || predecessor.Name() != ks.Origin {
			return nil, fmt.Errorf("sign key statement: signer %s+%08x is not the predecessor", predecessor.Name(), predecessor.KeyHash())
		}
		signers = append(signers, predecessor)
	}
	for _, v := range []*key{k.daily, k.predecessor} {
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
	if signedLike(leaf, identity, k.sealed) {
		return nil, errSealedIdentity("sign key statement: ")
	}
	return leaf, nil
}

func errSealedIdentity(operation string) error {
	return errors.New(operation + "the identity key is the one of the sealed log: a successor needs a new one")
}

// signedLike reports whether the line of identity in leaf is a signature by other, whatever other is called: then both are one
// key. A nil other has signed nothing.
func signedLike(leaf []byte, identity interface {
	Name() string
	KeyHash() uint32
}, other *key) bool {
	if other == nil {
		return false
	}
	text, lines, err := splitNote(leaf)
	if err != nil {
		return false
	}
	for _, l := range lines {
		if l.name == identity.Name() && l.hash == identity.KeyHash() && other.verifier.Verify(text, l.sig) {
			return true
		}
	}
	return false
}

// ParseKeyStatement parses a leaf that SignKeyStatement made, without looking at its signatures: see VerifyKeyStatement.
func ParseKeyStatement(leaf []byte) (*KeyStatement, error) {
	ks := new(KeyStatement)
	lines, err := parseNote(leaf, KeyPrefix, keyMembers, ks, (*KeyStatement).Validate, appendKeyText)
	if err != nil {
		return nil, fmt.Errorf("parse key statement: %w", err)
	}
	want := 1
	if ks.Ended == EndedRotated {
		want = 2
	}
	if len(lines) != want {
		return nil, fmt.Errorf("parse key statement: %d signatures, want %d", len(lines), want)
	}
	return ks, nil
}

// parseNote parses a signed note whose text is one leaf and a newline, and returns its signature lines, unverified.
func parseNote[T any](leaf []byte, prefix string, members []member[T], x *T, valid func(*T) error, again func([]byte, *T) []byte) ([]noteLine, error) {
	if len(leaf) > MaxLeaf {
		return nil, fmt.Errorf("%d bytes: at most %d are read", len(leaf), MaxLeaf)
	}
	text, lines, err := splitNote(leaf)
	if err != nil {
		return nil, err
	}
	return lines, parseLeaf(text, prefix, members, x, valid, again)
}

// VerifyKeyStatement parses leaf and checks its signatures: by identity, which is named after the origin, and, when it says
// that the predecessor was rotated, by the predecessor it names. A non-nil predecessor must be that one: it is compared by the
// signature or, where the predecessor did not sign, by name and key hash. nil takes the key from the statement, which shows
// that its holder signed but not that it ever was a key of this log. A statement that succeeds a sealed log with the sealed
// log's own identity key is refused. Where it stands in the log is for the caller to check: KeyAudit and Verify do.
func VerifyKeyStatement(leaf []byte, identity, predecessor note.Verifier) (*KeyStatement, error) {
	ks, k, err := verifyKeyStatement(leaf, identity)
	if err != nil {
		return nil, fmt.Errorf("verify key statement: %w", err)
	}
	if predecessor == nil {
		return ks, nil
	}
	switch {
	case k.predecessor == nil:
		return nil, errors.New("verify key statement: it names no predecessor")
	case predecessor.Name() != k.predecessor.verifier.Name() || predecessor.KeyHash() != k.predecessor.verifier.KeyHash():
		return nil, errors.New("verify key statement: it names another predecessor")
	case ks.Ended == EndedRotated:
		// The 32 bits of a key hash do not identify a key, so the signature counts, under the caller's own key.
		if _, err := note.Open(leaf, note.VerifierList(predecessor)); err != nil {
			return nil, fmt.Errorf("verify key statement: predecessor: %w", err)
		}
	}
	return ks, nil
}

func verifyKeyStatement(leaf []byte, identity note.Verifier) (*KeyStatement, statementKeys, error) {
	ks, err := ParseKeyStatement(leaf)
	if err != nil {
		return nil, statementKeys{}, err
	}
	k, err := ks.keys()
	if err != nil {
		return nil, k, err
	}
	if identity.Name() != ks.Origin {
		return nil, k, fmt.Errorf("it is for origin %q, the identity key for %q", ks.Origin, identity.Name())
	}
	known := []note.Verifier{identity}
	if ks.Ended == EndedRotated {
		known = append(known, k.predecessor.verifier)
	}
	for _, v := range []*key{k.daily, k.predecessor} {
		if v != nil && v.verifier.KeyHash() == identity.KeyHash() {
			return nil, k, errors.New("it states the identity key as a daily key")
		}
	}
	n, err := note.Open(leaf, note.VerifierList(known...))
	if err != nil {
		return nil, k, err
	}
	// ParseKeyStatement counted the lines; none may be unknown or a repetition.
	if len(n.Sigs) != len(known) || len(n.UnverifiedSigs) != 0 {
		return nil, k, errors.New("it is not signed by the identity key and, where it rotates, the predecessor")
	}
	if signedLike(leaf, identity, k.sealed) {
		return nil, k, errSealedIdentity("")
	}
	return ks, k, nil
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
