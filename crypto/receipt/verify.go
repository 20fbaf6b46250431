package receipt

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"
)

// MaxSkew is how far times that must be in order may be out of it: clocks step, and witnesses have their own.
const MaxSkew = 5 * time.Minute

// Verified is what a bundle proves. Every value in it was checked as Verify says.
type Verified struct {
	Origin   string // the log
	Identity string // verifier key of its identity key, from the policy
	Decision Decision
	Outcomes []Outcome // none: pending as far as this bundle shows
	Places   []Place   // of the decision and the outcomes, in this order
	Headers  []VerifiedHeader
	Size     uint64 // of the checkpoint
	Root     Hash   // of the checkpoint
	// Keys begins with the daily key that signed the checkpoint; each further one is the predecessor of the one before.
	Keys []VerifiedKey
	// Seal is the last leaf of the log if that is a seal; nil when the log goes on, as far as this bundle shows.
	Seal *Seal
	// Pins are those of the policy, by size: the checkpoint is consistent with each.
	Pins []Pin
	// Cosignatures are those of witnesses in the policy.
	Cosignatures []Cosignature
	Evidence     *Evidence // opens the decision's commitment; nil when not shown
}

// Place is where a record stands.
type Place struct {
	Header int    // index into Verified.Headers
	Index  uint64 // position in the block
}

// VerifiedHeader is a header and its place in the log.
type VerifiedHeader struct {
	Header
	Index uint64
}

// VerifiedKey is a key statement and its place in the log.
type VerifiedKey struct {
	KeyStatement
	Index uint64
}

// Pending reports whether the bundle shows no outcome.
func (v *Verified) Pending() bool { return len(v.Outcomes) == 0 }

// Verify checks b under p. The error is one line that says what is wrong; only with a nil error may anything in b be
// believed. For many bundles a Verifier is faster. Verify demands that
//
//   - all proofs end in one checkpoint, which the policy accepts for its origin: identity key, and quorum if there is one;
//   - the first key statement's daily key signed that checkpoint too, and is the one in force for its size: the last leaf below
//     the checkpoint is that statement, or a header or a seal that names it;
//   - each statement stands in the log at the index it names, with the root of the tree before it, is for that origin and is
//     signed by the identity key and, where it says so, the predecessor; further statements are those predecessors, in the log
//     before it;
//   - the checkpoint is consistent with what revocations and seals in the policy pin, by the bundle's own proofs, and not signed
//     by a revoked key beyond its pin: see Policy.Revoke;
//   - each header stands in the log below the checkpoint, is for that origin, of one log id and instance, and in use; it names
//     the statement in force where it stands, as far as the bundle shows that, and was closed while that key was in force; two
//     headers have different keys and disjoint ordinals;
//   - the first record is the decision, the others are its outcomes in order, at most one, or one with result unknown and a
//     late one; all have the same id, whose instance is the headers', and that origin; each has its own place, its path
//     leads to its header's root with its header's count, its ordinal fits its place and is not declared lost;
//   - no time contradicts another by more than MaxSkew, as the package comment says;
//   - evidence, when given, opens the decision's commitment.
func Verify(p *Policy, b *Bundle) (*Verified, error) { return NewVerifier(p).Verify(b) }

// Verify is the function Verify with a memory for what bundles share: checkpoints, headers and key statements that were
// verified before, byte for byte. Safe for concurrent use.
func (v *Verifier) Verify(b *Bundle) (*Verified, error) {
	out, err := v.verify(b)
	if err != nil {
		return nil, fmt.Errorf("verify: %w", err)
	}
	return out, nil
}

func (v *Verifier) verify(b *Bundle) (*Verified, error) {
	switch {
	case len(b.Records) == 0 || len(b.Records) > 1+MaxOutcomes:
		return nil, fmt.Errorf("%d records, want a decision and at most %d outcomes", len(b.Records), MaxOutcomes)
	case len(b.Headers) == 0 || len(b.Headers) > MaxHeaders:
		return nil, fmt.Errorf("%d headers, want 1 to %d", len(b.Headers), MaxHeaders)
	case len(b.Keys) == 0 || len(b.Keys) > MaxKeys:
		return nil, fmt.Errorf("%d key statements, want 1 to %d", len(b.Keys), MaxKeys)
	}
	c, err := v.checkpoint(b)
	if err != nil {
		return nil, err
	}
	if err := v.policy.sealedIdentity(c.log); err != nil {
		return nil, err
	}
	out := &Verified{
		Origin: c.origin, Identity: c.log.identity.vkey, Size: c.size, Root: c.root,
		Keys:    make([]VerifiedKey, 0, len(b.Keys)),
		Headers: make([]VerifiedHeader, 0, len(b.Headers)),
		Places:  make([]Place, 0, len(b.Records)),
	}
	out.Cosignatures = append(out.Cosignatures, c.cosigned...)
	if err := v.keys(c, b, out); err != nil {
		return nil, err
	}
	if err := checkPins(c, b, out); err != nil {
		return nil, err
	}
	end, err := v.tail(c, b, out)
	if err != nil {
		return nil, err
	}
	if err := v.headers(c, b, out, end); err != nil {
		return nil, err
	}
	if err := checkRecords(b, out); err != nil {
		return nil, err
	}
	if err := checkPlaces(b, out); err != nil {
		return nil, err
	}
	if err := checkTimes(out); err != nil {
		return nil, err
	}
	if b.Evidence != nil {
		if err := CheckEvidence(&out.Decision, b.Evidence); err != nil {
			return nil, err
		}
		e := *b.Evidence
		e.Fields = append([]Field(nil), e.Fields...)
		out.Evidence = &e
	}
	return out, nil
}

// keys checks the chain of key statements.
func (v *Verifier) keys(c *checkpoint, b *Bundle, out *Verified) error {
	var later *statement
	for i, proof := range b.Keys {
		s, err := v.statement(c, proof)
		if err != nil {
			return fmt.Errorf("key statement %d: %w", i, err)
		}
		switch {
		case i == 0 && !s.signed:
			return errors.New("key statement 0: its daily key did not sign the checkpoint")
		case i > 0 && (later.Predecessor == "" || later.Predecessor != s.Key):
			return fmt.Errorf("key statement %d: not the predecessor of the one before", i)
		case i > 0 && (s.Index >= later.Index || s.NotBefore.After(later.NotBefore)):
			return fmt.Errorf("key statement %d: it precedes its predecessor", i-1)
		}
		out.Keys = append(out.Keys, s.VerifiedKey)
		later = s
	}
	return nil
}

// checkPins checks the checkpoint against what the policy was told of revoked keys and seals. Proofs for other pins must be right
// as well: nobody makes them for nothing.
func checkPins(c *checkpoint, b *Bundle, out *Verified) error {
	if len(b.Pins) > MaxPins {
		return fmt.Errorf("%d pins, want at most %d", len(b.Pins), MaxPins)
	}
	r := &c.log.revoked
	for i := range r.keys {
		if k := &r.keys[i]; k.Key == out.Keys[0].Key && c.size > k.Size {
			return fmt.Errorf("signed by the revoked daily key %s, whose last tree had %d leaves, for a tree of %d", shortKey(k.Key), k.Size, c.size)
		}
	}
	for i := range b.Pins {
		if i > 0 && b.Pins[i-1].Size >= b.Pins[i].Size {
			return fmt.Errorf("pin %d: not in the order of sizes", i)
		}
		if err := b.Pins[i].check(c); err != nil {
			return fmt.Errorf("pin %d: %w", i, err)
		}
	}
	for _, pin := range r.pins {
		at, found := slices.BinarySearchFunc(b.Pins, pin, func(a PinProof, b Pin) int { return cmp.Compare(a.Size, b.Size) })
		switch {
		case found && b.Pins[at].Root != pin.Root, !found && pin.Size == c.size && pin.Root != c.root:
			return fmt.Errorf("not consistent with the revocation at size %d: it is of a fork of the log", pin.Size)
		case !found && pin.Size != c.size:
			return fmt.Errorf("no proof that the log of %d leaves is consistent with the revocation at size %d: "+
				"the bundle may be older than that, fetch it anew from the log", c.size, pin.Size)
		}
		out.Pins = append(out.Pins, pin)
	}
	if s := r.seal; s != nil && (c.size > s.Size+1 || c.size == s.Size+1 && !bytes.Equal(b.Tail.Leaf, r.sealLeaf)) {
		return fmt.Errorf("beyond the seal of the log at size %d", s.Size)
	}
	return nil
}

// sealedIdentity refuses a log whose identity key is one of a log that the policy knows to be sealed.
func (p *Policy) sealedIdentity(l *logPolicy) error {
	for origin, o := range p.logs {
		if o != l && o.revoked.seal != nil && o.identity.public == l.identity.public {
			return fmt.Errorf("the identity key is that of the sealed log %s: a successor needs a new one", origin)
		}
	}
	return nil
}

// tail checks that the key in force for the checkpoint's size has signed it. It returns the time of the last leaf, zero for that of a
// key statement.
func (v *Verifier) tail(c *checkpoint, b *Bundle, out *Verified) (at time.Time, err error) {
	k := &out.Keys[0]
	var index, names uint64
	switch leaf := b.Tail.Leaf; {
	case bytes.HasPrefix(leaf, []byte(HeaderPrefix)):
		h, err := v.header(c, b.Tail)
		if err != nil {
			return at, fmt.Errorf("tail: %w", err)
		}
		if h.Origin != c.origin {
			return at, fmt.Errorf("tail: it is for origin %.64q", h.Origin)
		}
		index, names, at = h.Index, h.Key, h.Time
	case bytes.HasPrefix(leaf, []byte(KeyPrefix)):
		s, err := v.statement(c, b.Tail)
		if err != nil {
			return at, fmt.Errorf("tail: %w", err)
		}
		index, names = s.Index, s.Index
	case bytes.HasPrefix(leaf, []byte(SealPrefix)):
		s, err := v.seal(c, b.Tail)
		if err != nil {
			return at, fmt.Errorf("tail: %w", err)
		}
		index, names, at = s.index, s.Key, s.Time
		seal := s.Seal
		out.Seal = &seal
		if s.daily != nil {
			if daily, err := parseKey(k.Key); err != nil || !s.daily.signedBy(leaf, daily) {
				return at, errors.New("tail: the seal is signed by another daily key than the one in force")
			}
		}
	default:
		return at, errors.New("tail: neither a header nor a key statement nor a seal")
	}
	switch {
	case index != c.size-1:
		return at, fmt.Errorf("tail: leaf %d is not the last of %d", index, c.size)
	case names != k.Index:
		return at, fmt.Errorf("tail: the key statement in force is at index %d, the checkpoint is signed by the daily key stated at %d", names, k.Index)
	}
	if !at.IsZero() && out.Seal == nil {
		if err := withinKey(&Header{Time: at}, &k.KeyStatement); err != nil {
			return at, fmt.Errorf("tail: %w", err)
		}
	}
	return at, nil
}

// checkKey checks that h names the statement in force where it stands. Statements older than those shown can only be right or
// wrong by their place.
func checkKey(h *VerifiedHeader, keys []VerifiedKey) error {
	for i := range keys {
		k := &keys[i]
		if h.Index < k.Index {
			continue
		}
		if h.Key != k.Index {
			return fmt.Errorf("it names the key statement at index %d, where the one at %d is in force", h.Key, k.Index)
		}
		return withinKey(&h.Header, &k.KeyStatement)
	}
	if h.Key >= h.Index {
		return fmt.Errorf("it stands at index %d and names a key statement at %d", h.Index, h.Key)
	}
	return nil
}

// headers checks the headers by themselves and against each other.
func (v *Verifier) headers(c *checkpoint, b *Bundle, out *Verified, end time.Time) error {
	for i, proof := range b.Headers {
		h, err := v.header(c, proof)
		if err != nil {
			return fmt.Errorf("header %d: %w", i, err)
		}
		if h.Origin != c.origin {
			return fmt.Errorf("header %d: it is for origin %.64q", i, h.Origin)
		}
		if h.Count == 0 {
			return fmt.Errorf("header %d: it has no records", i)
		}
		if err := checkKey(h, out.Keys); err != nil {
			return fmt.Errorf("header %d: %w", i, err)
		}
		if !end.IsZero() && h.Time.After(end) {
			return fmt.Errorf("header %d: closed %v after the last leaf of the log", i, h.Time.Sub(end))
		}
		for k := range out.Headers {
			o := &out.Headers[k]
			switch {
			case o.Index < h.Index && o.Time.After(h.Time), o.Index > h.Index && o.Time.Before(h.Time):
				return fmt.Errorf("headers %d and %d: time goes back between them", k, i)
			case o.Index < h.Index && o.Key != h.Key && o.Index >= h.Key, o.Index > h.Index && o.Key != h.Key && h.Index >= o.Key:
				return fmt.Errorf("headers %d and %d name two key statements as in force between them", k, i)
			case o.LogID != h.LogID || o.Instance != h.Instance:
				return fmt.Errorf("headers %d and %d are of different recorders", k, i)
			case o.Incarnation == h.Incarnation && o.Seq == h.Seq:
				return fmt.Errorf("headers %d and %d have one sequence number", k, i)
			case o.First <= h.Last && h.First <= o.Last:
				return fmt.Errorf("headers %d and %d have ordinals in common", k, i)
			}
		}
		out.Headers = append(out.Headers, *h)
	}
	return nil
}

// checkRecords parses the records and checks that they are one receipt.
func checkRecords(b *Bundle, out *Verified) error {
	d, err := ParseDecision(b.Records[0].Leaf)
	if err != nil {
		return fmt.Errorf("record 0: %w", err)
	}
	out.Decision = *d
	_, instance, err := ParseID(d.ID)
	if err != nil {
		return err
	}
	if d.Origin != out.Origin {
		return fmt.Errorf("record 0: it is for origin %.64q", d.Origin)
	}
	if instance != out.Headers[0].Instance {
		return fmt.Errorf("record 0: instance %s in the id, %s in the header", instance, out.Headers[0].Instance)
	}
	last := d.Ordinal
	for i := 1; i < len(b.Records); i++ {
		o, err := ParseOutcome(b.Records[i].Leaf)
		switch {
		case err != nil:
			return fmt.Errorf("record %d: %w", i, err)
		case o.ID != d.ID:
			return fmt.Errorf("record %d: it belongs to receipt %s", i, o.ID)
		case o.Origin != d.Origin:
			return fmt.Errorf("record %d: it is for origin %.64q", i, o.Origin)
		case o.Ordinal <= last:
			return fmt.Errorf("record %d: ordinal %d after %d", i, o.Ordinal, last)
		case i == 2 && (!o.Late || out.Outcomes[0].Late || out.Outcomes[0].Result != "unknown"):
			return errors.New("record 2: a second outcome that is not the late one after an unknown one")
		}
		last = o.Ordinal
		out.Outcomes = append(out.Outcomes, *o)
	}
	return nil
}

// checkPlaces checks that the records stand where the bundle says.
func checkPlaces(b *Bundle, out *Verified) error {
	var used [MaxHeaders]bool
	for i := range b.Records {
		r := &b.Records[i]
		if r.Header < 0 || r.Header >= len(out.Headers) {
			return fmt.Errorf("record %d: no header %d", i, r.Header)
		}
		used[r.Header] = true
		h := &out.Headers[r.Header]
		if r.Size != h.Count {
			return fmt.Errorf("record %d: a block of %d, the header says %d", i, r.Size, h.Count)
		}
		if err := VerifyPath(h.Root, h.Count, r.Index, LeafHash(r.Leaf), r.Path); err != nil {
			return fmt.Errorf("record %d: %w", i, err)
		}
		// Ordinals grow along the block, so Index records come before this one and Count-1-Index after it.
		ordinal, _ := out.record(i)
		if ordinal < h.First || ordinal > h.Last || ordinal-h.First < r.Index || h.Last-ordinal < h.Count-1-r.Index {
			return fmt.Errorf("record %d: ordinal %d cannot be record %d of ordinals %d to %d", i, ordinal, r.Index, h.First, h.Last)
		}
		for k := range out.Headers {
			if lost := &out.Headers[k]; lost.LostFrom <= ordinal && ordinal < lost.LostTo {
				return fmt.Errorf("record %d: header %d declares ordinal %d lost", i, k, ordinal)
			}
		}
		out.Places = append(out.Places, Place{r.Header, r.Index})
	}
	for i := range out.Headers {
		if !used[i] {
			return fmt.Errorf("header %d: no record is in it", i)
		}
	}
	return nil
}

// record returns ordinal and time of record i.
func (v *Verified) record(i int) (uint64, time.Time) {
	if i == 0 {
		return v.Decision.Ordinal, v.Decision.Time
	}
	return v.Outcomes[i-1].Ordinal, v.Outcomes[i-1].Time
}

// checkTimes refuses times that contradict each other.
func checkTimes(out *Verified) error {
	for i, p := range out.Places {
		if _, t := out.record(i); t.After(out.Headers[p.Header].Time.Add(MaxSkew)) {
			return fmt.Errorf("record %d: recorded %v after its block was closed", i, t.Sub(out.Headers[p.Header].Time))
		}
	}
	for i := range out.Headers {
		t := out.Headers[i].Time
		for _, c := range out.Cosignatures {
			if t.After(c.Time.Add(MaxSkew)) {
				return fmt.Errorf("header %d: closed %v after %.64q cosigned it", i, t.Sub(c.Time), c.Name)
			}
		}
	}
	for _, c := range out.Cosignatures {
		if c.Time.After(out.Keys[0].NotAfter.Add(MaxSkew)) {
			return fmt.Errorf("key statement 0: ended %v before %.64q cosigned the checkpoint", c.Time.Sub(out.Keys[0].NotAfter), c.Name)
		}
		if out.Keys[0].NotBefore.After(c.Time.Add(MaxSkew)) {
			return fmt.Errorf("key statement 0: begins %v after %.64q cosigned the checkpoint", out.Keys[0].NotBefore.Sub(c.Time), c.Name)
		}
	}
	return nil
}
