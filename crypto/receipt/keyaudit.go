package receipt

import (
	"bytes"
	"errors"
	"fmt"
	"time"

	"golang.org/x/mod/sumdb/note"
)

// KeyUse is the time a daily key was in force, as the log's own leaves tell it.
type KeyUse struct {
	KeyStatement
	Index    uint64 // of its statement
	LastSize uint64 // the largest tree it may sign: the index of its successor's statement, or of the seal plus one; 0 while it is in force
	Headers  uint64 // that stand under it
	// First and Last are the times of the first and the last of its headers; zero when it has none.
	First, Last time.Time
}

// KeyAudit checks the key changes of a whole log. Every leaf is given to Leaf, in order, from index 0, which takes no more than
// the log's tiles. It finds what a single bundle cannot show. It demands that
//
//   - the first leaf is the log's first key statement; each statement stands at the index it names, with the root of the tree
//     before it, is signed by the identity key, names the key in force as its predecessor, is signed by that when it says so,
//     does not begin before it and brings in a key that was never in force before, for at most 24 hours;
//   - each header is for the log and names the statement in force; its time is within NotBefore and NotAfter of that, exactly, as
//     one clock made both; no header's time is before that of a header before it;
//   - a seal stands at the index it names, with the root before it, names the statement in force, is signed by the identity key and,
//     if at all, that daily key; its time is not before the last header's; it is the last leaf;
//   - there are no other leaves.
//
// It does not look at signatures of checkpoints, nor at what headers say of records and of each other. After an error the audit
// can go on: the next leaf is judged by what the wrong one said, so that one fault is not told for every leaf after it. Its memory
// does not grow with the log, except for 32 bytes for each key statement. It is not safe for concurrent use.
type KeyAudit struct {
	// Done, if not nil, is called with each key when it is no longer in force: by Leaf for the statement or the seal that ends it.
	Done func(KeyUse)

	origin     string
	identity   note.Verifier
	next       uint64
	headers    uint64
	statements uint64
	current    *KeyUse
	key        *key // of current
	last       time.Time
	seen       map[Hash]struct{} // keys that were in force
	seal       *Seal
}

// NewKeyAudit returns an audit of the log origin, whose identity key is named after it.
func NewKeyAudit(origin string, identity note.Verifier) *KeyAudit {
	return &KeyAudit{origin: origin, identity: identity, seen: map[Hash]struct{}{}}
}

// RootNeeded reports whether KeyAudit.Leaf looks at the root for this leaf: for key statements and seals.
func RootNeeded(leaf []byte) bool {
	return bytes.HasPrefix(leaf, []byte(KeyPrefix)) || bytes.HasPrefix(leaf, []byte(SealPrefix))
}

// Size is the index of the leaf that comes next.
func (a *KeyAudit) Size() uint64 { return a.next }

// Headers counts the headers so far, wrong ones that could be parsed included.
func (a *KeyAudit) Headers() uint64 { return a.headers }

// Statements counts the key statements so far, wrong ones that could be parsed included.
func (a *KeyAudit) Statements() uint64 { return a.statements }

// Current returns the key in force after the leaves so far; false before the first and after a seal.
func (a *KeyAudit) Current() (KeyUse, bool) {
	if a.current == nil || a.seal != nil {
		return KeyUse{}, false
	}
	return *a.current, true
}

// Seal returns the seal, nil while there is none.
func (a *KeyAudit) Seal() *Seal { return a.seal }

// Leaf takes the leaf at index; root is that of the tree of index leaves, and is looked at only where RootNeeded says so. The
// error is one line: the first thing that is wrong with the leaf.
func (a *KeyAudit) Leaf(index uint64, root Hash, leaf []byte) error {
	wrong := a.leaf(index, root, leaf)
	a.next = index + 1
	if wrong != nil {
		return fmt.Errorf("leaf %d: %w", index, wrong)
	}
	return nil
}

func (a *KeyAudit) leaf(index uint64, root Hash, leaf []byte) error {
	if index != a.next {
		return fmt.Errorf("follows leaf %d of the audit: every leaf is needed, in order", int64(a.next)-1)
	}
	if a.seal != nil {
		return fmt.Errorf("stands after the seal at index %d", a.seal.Size)
	}
	switch {
	case bytes.HasPrefix(leaf, []byte(KeyPrefix)):
		return a.statement(index, root, leaf)
	case bytes.HasPrefix(leaf, []byte(SealPrefix)):
		return a.sealed(index, root, leaf)
	case bytes.HasPrefix(leaf, []byte(HeaderPrefix)):
		return a.header(leaf)
	}
	return errors.New("neither a header nor a key statement nor a seal")
}

func (a *KeyAudit) header(leaf []byte) error {
	h, err := ParseHeader(leaf)
	if err != nil {
		return err
	}
	a.headers++
	last := a.last
	if h.Time.After(last) {
		a.last = h.Time
	}
	k := a.current
	if k == nil {
		return errors.New("a header before the first key statement")
	}
	if k.Headers == 0 {
		k.First = h.Time
	}
	k.Headers++
	k.Last = h.Time
	switch {
	case h.Origin != a.origin:
		return fmt.Errorf("a header for origin %.64q", h.Origin)
	case h.Key != k.Index:
		return fmt.Errorf("a header that names the key statement at %d, where the one at %d is in force", h.Key, k.Index)
	case h.Time.Before(last):
		return fmt.Errorf("a header whose time is %v before that of a header before it", last.Sub(h.Time))
	}
	return withinKey(h, &k.KeyStatement)
}

// withinKey checks that a header was closed while its daily key was in force.
func withinKey(h *Header, ks *KeyStatement) error {
	switch {
	case h.Time.Before(ks.NotBefore):
		return fmt.Errorf("closed %v before the daily key's begin", ks.NotBefore.Sub(h.Time))
	case h.Time.After(ks.NotAfter):
		return fmt.Errorf("closed %v after the daily key's end", h.Time.Sub(ks.NotAfter))
	}
	return nil
}

func (a *KeyAudit) statement(index uint64, root Hash, leaf []byte) error {
	ks, err := ParseKeyStatement(leaf)
	if err != nil {
		return err
	}
	k, err := ks.keys()
	if err != nil {
		return err
	}
	a.statements++
	before := a.current
	a.end(index)
	a.current, a.key = &KeyUse{KeyStatement: *ks, Index: index}, k.daily
	id := LeafHash([]byte(k.daily.public))
	_, again := a.seen[id]
	a.seen[id] = struct{}{}
	if _, _, err := verifyKeyStatement(leaf, a.identity); err != nil {
		return fmt.Errorf("key statement: %w", err)
	}
	switch {
	case ks.FirstSize != index:
		return fmt.Errorf("a key statement that names size %d", ks.FirstSize)
	case ks.FirstRoot != root:
		return fmt.Errorf("a key statement that names another root than that of the %d leaves before it", index)
	case before != nil && ks.Predecessor != before.Key:
		return errors.New("a key statement whose predecessor is not the key in force")
	case before != nil && ks.NotBefore.Before(before.NotBefore):
		return errors.New("a key statement that begins before its predecessor")
	case again:
		return errors.New("a key statement for a key that was in force before")
	}
	return nil
}

func (a *KeyAudit) sealed(index uint64, root Hash, leaf []byte) error {
	s, daily, err := verifySeal(leaf, a.identity)
	if err != nil {
		return fmt.Errorf("seal: %w", err)
	}
	a.end(index + 1)
	a.seal = s
	k := a.current
	switch {
	case k == nil:
		return errors.New("a seal before the first key statement")
	case s.Size != index:
		return fmt.Errorf("a seal that names size %d", s.Size)
	case s.Root != root:
		return fmt.Errorf("a seal that names another root than that of the %d leaves before it", index)
	case s.Key != k.Index:
		return fmt.Errorf("a seal that names the key statement at %d, where the one at %d is in force", s.Key, k.Index)
	case daily != nil && !daily.signedBy(leaf, a.key):
		return errors.New("a seal signed by another daily key than the one in force")
	case s.Time.Before(a.last):
		return fmt.Errorf("a seal whose time is %v before that of the last header", a.last.Sub(s.Time))
	}
	return nil
}

// end tells that the key in force signs trees of at most size leaves.
func (a *KeyAudit) end(size uint64) {
	if a.current == nil {
		return
	}
	a.current.LastSize = size
	if a.Done != nil {
		a.Done(*a.current)
	}
}
