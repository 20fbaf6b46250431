package receipt_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/receipt/receipttest"
	"golang.org/x/mod/sumdb/note"
)

const (
	noProof   = "no proof that the log of"
	ofAFork   = "not consistent with the"
	byRevoked = "signed by the revoked daily key"
)

// revokedFamilies cheat with a revoked daily key whose revocation the auditor has, and an identity key that signs every checkpoint.
// They are the forks and extensions that nothing but the revocation shows.
var revokedFamilies = []family{
	{"a fork below the pin, without proof", []string{noProof}, func(x *thief) *receipt.Bundle { return x.below(nil) }},
	{"a fork below the pin, with the proof of the log itself", []string{ofAFork}, func(x *thief) *receipt.Bundle {
		return x.below(func(b *receipt.Bundle, size int) { b.Pins = x.victim.Prove(x.tb, size) })
	}},
	{"a fork below the pin, with a proof from itself", []string{ofAFork}, func(x *thief) *receipt.Bundle {
		return x.below(func(b *receipt.Bundle, size int) {
			for i := range b.Pins {
				b.Pins[i].Proof = append(b.Pins[i].Proof, receipt.Hash{byte(x.r.Uint32())})
			}
		})
	}},
	{"a fork below the pin, with a pin of its own", []string{ofAFork}, func(x *thief) *receipt.Bundle {
		return x.below(func(b *receipt.Bundle, size int) {
			pin := receipt.Pin{Size: uint64(x.last()), Root: rootIn(x.tb, b)}
			b.Pins = []receipt.PinProof{{Pin: pin}}
		})
	}},
	{"a fork of just the pinned size", []string{ofAFork, noProof}, func(x *thief) *receipt.Bundle {
		l := x.victim.Fork(x.tb, x.last()-3-x.r.IntN(2)) // there are 6 heartbeats before the pin
		x.lie(l, x.at(l))
		for len(l.Leaves) < x.last() {
			h := l.NextHeader(receipt.HeaderHeartbeat)
			x.at(l)(&h)
			l.SealHeader(x.tb, h)
		}
		b := x.bundle(l)
		b.Pins = nil
		return b
	}},
	{"a fork above the pin", []string{byRevoked}, func(x *thief) *receipt.Bundle { return x.beyond(x.fork(same)) }},
	{"the pinned tree and more", []string{byRevoked}, func(x *thief) *receipt.Bundle {
		l := x.victim.Fork(x.tb, x.last())
		return x.beyond(x.lie(l, x.at(l)))
	}},
	{"the log as it is and more", []string{byRevoked}, func(x *thief) *receipt.Bundle {
		return x.beyond(x.above(x.at(x.victim.Fork(x.tb, x.last()))))
	}},
	{"what the key signed by right, without proof", []string{noProof}, func(x *thief) *receipt.Bundle {
		b := x.right()
		b.Pins = nil
		return b
	}},
	{"what the key signed by right, with a wrong proof", []string{ofAFork}, func(x *thief) *receipt.Bundle {
		b := x.right()
		p := &b.Pins[x.r.IntN(len(b.Pins))]
		switch n := len(p.Proof); {
		case n > 0 && x.r.IntN(3) > 0:
			p.Proof[x.r.IntN(n)][x.r.IntN(32)] ^= 1 << x.r.IntN(8)
		case n > 0 && x.r.IntN(2) == 0:
			p.Proof = p.Proof[:n-1]
		default:
			p.Root[x.r.IntN(32)] ^= 1 << x.r.IntN(8)
		}
		return b
	}},
	{"pins out of order, or twice", []string{"not in the order of sizes"}, func(x *thief) *receipt.Bundle {
		b := x.right()
		b.Pins = append(b.Pins, b.Pins[x.r.IntN(len(b.Pins))])
		return b
	}},
}

// right is a bundle that the stolen key has signed while it was in force, under a tree smaller than the pin, with all proofs.
func (x *thief) right() *receipt.Bundle {
	x.tb.Helper()
	for _, b := range x.victim.Blocks {
		if b.Header.Count > 0 && b.Index < x.last()-1 {
			size := max(b.Index+1, x.first())
			return x.victim.Bundle(x.tb, x.victim.CheckpointAt(x.tb, size+x.r.IntN(x.last()-size)), 9, place{Block: b})
		}
	}
	panic("no block")
}

// below is a fork that ends below the pin, with no proof but what change puts in.
func (x *thief) below(change func(b *receipt.Bundle, size int)) *receipt.Bundle {
	x.tb.Helper()
	for {
		l := x.fork(same)
		if len(l.Leaves) >= x.last() {
			continue // by chance too long
		}
		b := x.bundle(l)
		b.Pins = nil
		if change != nil {
			b.Pins = x.victim.Prove(x.tb, len(l.Leaves))
			change(b, len(l.Leaves))
		}
		return b
	}
}

// beyond makes l longer than the pin.
func (x *thief) beyond(l *receipttest.Log) *receipt.Bundle {
	x.tb.Helper()
	for len(l.Leaves) <= x.last() {
		h := l.NextHeader(receipt.HeaderHeartbeat)
		h.Time, h.Key = x.d.Time, uint64(x.victim.Statements[x.stolen])
		l.SealHeader(x.tb, h)
	}
	b := x.bundle(l)
	b.Pins = nil
	if x.r.IntN(2) == 0 {
		b.Pins = l.Prove(x.tb, len(l.Leaves))
	}
	return b
}

// rootIn is the root of the bundle's checkpoint.
func rootIn(tb testing.TB, b *receipt.Bundle) (root receipt.Hash) {
	tb.Helper()
	copy(root[:], b.Tail.Text) // anything that is not the victim's will do
	return root
}

// TestRevoked has thieves with a revoked daily key, and an identity key that signs every checkpoint, before an auditor who
// has the revocation. Honest bundles of the log, from before the revocation and after it, verify.
func TestRevoked(t *testing.T) {
	total := 0
	for i, f := range revokedFamilies {
		t.Run(f.name, func(t *testing.T) {
			n := 0
			for k := range uint64(100) {
				r := rand.New(rand.NewPCG(100+uint64(i), k))
				x, p := revokedThief(t, r)
				if k%20 == 0 {
					honest(t, x.victim, p)
				}
				n += refuse(t, f, p, x, 100+uint64(i), k)
			}
			t.Logf("seeds %d, 0 to 99: %d refused: %s", 100+i, n, strings.Join(f.reasons, ", or "))
			total += n
		})
	}
	t.Logf("%d families, %d forgeries, 0 accepted", len(revokedFamilies), total)
	if total < 1000 && !t.Failed() {
		t.Errorf("only %d forgeries", total)
	}
}

// revokedThief holds the revoked key of a log, which signed at least a few trees.
func revokedThief(t *testing.T, r *rand.Rand) (*thief, *receipt.Policy) {
	t.Helper()
	l := receipttest.New(t, testOrigin)
	for range r.IntN(3) {
		work(t, l, r)
		l.Rotate(t)
	}
	x := &thief{tb: t, r: r, victim: l, stolen: len(l.Daily) - 1}
	d, _ := l.NewDecision()
	l.Seal(t, receipt.AppendDecision(nil, d))
	for range 8 {
		work(t, l, r)
		if l.Now.Sub(beginning) > receipt.MaxKeyAge/2 {
			l.Now = l.Blocks[len(l.Blocks)-1].Header.Time // the day is not over
			break
		}
	}
	for range 6 {
		l.SealHeader(t, l.NextHeader(receipt.HeaderHeartbeat))
	}
	signed := l.Revoke(t, "stolen")
	l.SealHeader(t, l.NextHeader(receipt.HeaderHeartbeat))
	p := l.Policy(t)
	if err := p.Revoke(signed); err != nil {
		t.Fatal(err)
	}
	return x, p
}

// refuse makes one forgery, which must be refused for a reason of its family.
func refuse(t *testing.T, f family, p *receipt.Policy, x *thief, seeds ...uint64) int {
	t.Helper()
	_, err := receipt.Verify(p, f.forge(x))
	if err == nil {
		t.Fatalf("seeds %d: accepted", seeds)
	}
	for _, reason := range f.reasons {
		if strings.Contains(err.Error(), reason) && !strings.Contains(err.Error(), "\n") {
			return 1
		}
	}
	t.Fatalf("seeds %d: refused for another reason: %v", seeds, err)
	return 0
}

const beyondSeal = "beyond the seal of the log at size"

// sealedFamilies hold the identity key and every daily key of a sealed log, whose seal the auditor has.
var sealedFamilies = []family{
	{"more after the seal", []string{beyondSeal}, func(x *thief) *receipt.Bundle { return x.honestly(x.above(same)) }},
	{"more in place of the seal", []string{beyondSeal}, func(x *thief) *receipt.Bundle {
		return x.honestly(x.lie(x.victim.Fork(x.tb, len(x.victim.Leaves)-1), same))
	}},
	{"another seal", []string{beyondSeal}, func(x *thief) *receipt.Bundle {
		l := x.victim.Fork(x.tb, len(x.victim.Leaves)-1)
		l.Pins = nil
		l.Now = l.Now.Add(1)
		l.SealLog(x.tb, "another")
		for _, b := range l.Blocks {
			if b.Header.Count > 0 {
				x.block = b
			}
		}
		return x.honestly(l)
	}},
	{"a daily key after the seal", []string{beyondSeal}, func(x *thief) *receipt.Bundle {
		l := x.victim.Fork(x.tb, len(x.victim.Leaves))
		l.Rotate(x.tb)
		return x.honestly(x.lie(l, same))
	}},
	{"a daily key of his own before the seal", []string{ofAFork, beyondSeal}, func(x *thief) *receipt.Bundle {
		l := x.victim.Fork(x.tb, 1+x.r.IntN(len(x.victim.Leaves)-1))
		l.RotateTo(x.tb, receipttest.NewKey(x.tb, testOrigin, fmt.Sprint("thief", x.r.Uint64())), l.NextStatement(x.tb))
		return x.honestly(x.lie(l, same))
	}},
	{"a shorter log, without proof", []string{noProof}, func(x *thief) *receipt.Bundle {
		b := x.victim.Bundle(x.tb, x.victim.CheckpointAt(x.tb, len(x.victim.Leaves)-2), 9, place{Block: x.victim.Blocks[1]})
		b.Pins = nil
		return b
	}},
}

// honestly makes the bundle that l would make, with what proofs the victim's pins allow.
func (x *thief) honestly(l *receipttest.Log) *receipt.Bundle {
	x.tb.Helper()
	b := l.Bundle(x.tb, nil, 9, place{Block: x.block})
	prover := l
	if l.Pins = x.victim.Pins; l.Pins[0].Size > uint64(len(l.Leaves)) {
		prover = x.victim
	}
	b.Pins = prover.Prove(x.tb, len(l.Leaves))
	return b
}

// TestSealed has thieves with every key of a sealed log before an auditor who has the seal.
func TestSealed(t *testing.T) {
	total := 0
	for i, f := range sealedFamilies {
		t.Run(f.name, func(t *testing.T) {
			for k := range uint64(170) {
				r := rand.New(rand.NewPCG(200+uint64(i), k))
				l := receipttest.New(t, testOrigin)
				for range 1 + r.IntN(3) {
					d, _ := l.NewDecision()
					l.Seal(t, receipt.AppendDecision(nil, d))
					work(t, l, r)
					l.Rotate(t)
				}
				seal := l.SealLog(t, "the identity key is in the wrong hands")
				p := l.Policy(t)
				if err := p.Revoke(seal); err != nil {
					t.Fatal(err)
				}
				if k%30 == 0 {
					honest(t, l, p)
				}
				total += refuse(t, f, p, &thief{tb: t, r: r, victim: l}, 200+uint64(i), k)
			}
		})
	}
	t.Logf("seeds 200 to %d, 0 to 169 each: %d families, %d forgeries, 0 accepted", 199+len(sealedFamilies), len(sealedFamilies), total)

	l := receipttest.New(t, testOrigin)
	d, _ := l.NewDecision()
	block := l.Seal(t, receipt.AppendDecision(nil, d))
	seal := l.SealLog(t, "lost")
	p := l.Policy(t)
	b := l.Bundle(t, nil, 1, place{Block: block})
	for _, told := range []bool{false, true} {
		if told {
			if err := p.Revoke(seal); err != nil {
				t.Fatal(err)
			}
		}
		v, err := receipt.Verify(p, b)
		if err != nil || v.Seal == nil || v.Seal.Reason != "lost" || len(v.Pins) > 0 != told {
			t.Fatalf("told %v: the last bundle of the log: %+v, %v", told, v, err)
		}
		if story := strings.Join(receipt.Describe(v), "\n"); !strings.Contains(story, "The log was sealed at") {
			t.Errorf("no seal in the story:\n%s", story)
		}
	}
}

// TestSealedIdentity has a log with the identity key of a sealed one: under a policy that has the seal nothing of it verifies, and
// its first statement cannot quote the sealed log.
func TestSealedIdentity(t *testing.T) {
	old := receipttest.New(t, oldLog)
	quoted := old.SealLog(t, "stolen")
	next := func(identity receipttest.Key) (*receipttest.Log, *receipt.Bundle) {
		l := receipttest.New(t, testOrigin).Fork(t, 0)
		l.Identity = identity
		l.Rotate(t)
		d, _ := l.NewDecision()
		return l, l.Bundle(t, nil, 1, place{Block: l.Seal(t, receipt.AppendDecision(nil, d))})
	}
	for _, c := range []struct {
		name, seed string
		refused    bool
	}{{"a key of its own", "new", false}, {"the sealed log's", oldLog + " identity", true}} {
		l, b := next(receipttest.NewKey(t, testOrigin, c.seed))
		p, err := receipt.ParsePolicy(append(old.PolicyText(), bytes.Replace(l.PolicyText(), []byte("quorum none\n"), nil, 1)...))
		if err != nil {
			t.Fatal(err)
		}
		v := receipt.NewVerifier(p)
		if _, err := v.Verify(b); err != nil {
			t.Fatalf("%s, before the seal is known: %v", c.name, err)
		}
		if err := p.Revoke(quoted); err != nil {
			t.Fatal(err)
		}
		if _, err := v.Verify(b); (err != nil) != c.refused || err != nil && !strings.Contains(err.Error(), "that of the sealed log") {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// TestSuccessor has a log that quotes a sealed one: with a new identity key it verifies; with the sealed log's it does not, even under a
// policy that knows nothing of the seal.
func TestSuccessor(t *testing.T) {
	old := receipttest.New(t, oldLog)
	old.SealLog(t, "stolen")
	l := receipttest.NewSuccessor(t, testOrigin, testKeys.identity, old)
	show := func() *receipt.Bundle {
		d, _ := l.NewDecision()
		return l.Bundle(t, nil, 1, place{Block: l.Seal(t, receipt.AppendDecision(nil, d))})
	}
	v, err := receipt.Verify(l.Policy(t), show())
	if err != nil || v.Keys[0].Succeeds == nil || *v.Keys[0].Succeeds != *old.Quote(t) {
		t.Fatalf("a successor: %+v, %v", v, err)
	}
	if _, wrong, _ := walk(t, l); len(wrong) > 0 {
		t.Fatal(wrong[0])
	}
	first, err := receipt.ParseKeyStatement(l.Leaves[0])
	if err != nil {
		t.Fatal(err)
	}
	l = l.Fork(t, 0)
	l.Identity = receipttest.NewKey(t, testOrigin, oldLog+" identity")
	leaf, err := note.Sign(&note.Note{Text: receipt.KeyText(first)}, l.Identity)
	if err != nil {
		t.Fatal(err)
	}
	daily := receipttest.NewKey(t, testOrigin, testOrigin+" daily 0")
	l.AppendStatement(t, daily, leaf)
	if _, err := receipt.Verify(l.Policy(t), show()); err == nil || !strings.Contains(err.Error(), "the identity key is the one of the sealed log") {
		t.Errorf("a successor with the sealed log's identity key: %v", err)
	}
	if _, wrong, _ := walk(t, l); len(wrong) == 0 {
		t.Error("the audit finds nothing in it")
	}
}

// TestRevoke has the notes that a policy does not take.
func TestRevoke(t *testing.T) {
	l := receipttest.New(t, testOrigin)
	first := l.Revoke(t, "stolen")
	second := l.Revoke(t, "stolen again")
	l.SealHeader(t, l.NextHeader(receipt.HeaderHeartbeat))
	seal := l.SealLog(t, "sealed")
	pin := func(size uint64, root byte, key int) []byte {
		return revocation(t, l, key, receipt.Pin{Size: size, Root: receipt.Hash{root}})
	}
	other := l.Fork(t, len(l.Leaves)-1)
	other.Now = other.Now.Add(1)
	elsewhere := receipttest.New(t, "example.org/knhk/2").Revoke(t, "x")
	forged := receipttest.New(t, testOrigin)
	forged.Identity = testKeys.other
	forgedNote := revocation(t, forged, 0, receipt.Pin{Size: 5})
	for _, c := range []struct {
		name, want string
		notes      [][]byte
		pins       int
	}{
		{"two revocations and a seal", "", [][]byte{first, second, seal}, 3},
		{"the same again", "", [][]byte{first, first, seal, seal}, 2},
		{"in another order", "", [][]byte{seal, second, first}, 3},
		{"another log", "the policy has no log", [][]byte{elsewhere}, 0},
		{"another identity key", "note has no verifiable signatures", [][]byte{forgedNote}, 0},
		{"no note", "not a signed note", [][]byte{[]byte("knhk/revocation/v1\n{}\n")}, 0},
		{"a key statement", "does not begin with", [][]byte{l.Leaves[0]}, 0},
		{"a changed one", "invalid signature", [][]byte{bytes.Replace(first, []byte(`"size":"2"`), []byte(`"size":"3"`), 1)}, 0},
		{"two pins for one key", "two revocations of", [][]byte{first, pin(3, 1, 0)}, 1},
		{"two roots for one size", "another root for size", [][]byte{first, pin(2, 1, 1)}, 1},
		{"a pin beyond the seal", "is beyond the seal", [][]byte{seal, pin(9, 1, 0)}, 1},
		{"a seal before a pin", "is beyond the seal", [][]byte{pin(9, 1, 0), seal}, 1},
		{"two seals", "two different seals", [][]byte{seal, other.SealLog(t, "another")}, 1},
		{"the identity key as a daily key", "must be sealed", [][]byte{func() []byte {
			x := l.Fork(t, len(l.Leaves))
			x.Daily[0] = l.Identity
			return revocation(t, x, 0, receipt.Pin{Size: 2})
		}()}, 0},
	} {
		p := l.Policy(t)
		var err error
		for _, n := range c.notes {
			if err = p.Revoke(n); err != nil {
				break
			}
		}
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%s: got %v, want %q", c.name, err, c.want)
		}
		pins := p.Pins(testOrigin)
		if len(pins) != c.pins {
			t.Errorf("%s: pins %v", c.name, pins)
		}
		for i := range pins[min(1, len(pins)):] {
			if pins[i].Size >= pins[i+1].Size {
				t.Errorf("%s: pins %v are not in order", c.name, pins)
			}
		}
	}
	p := l.Policy(t)
	for n := range receipt.MaxPins + 1 {
		k := receipttest.NewKey(t, testOrigin, fmt.Sprint("k", n))
		x := &receipttest.Log{Origin: testOrigin, Identity: l.Identity, Daily: []receipttest.Key{k}, Now: l.Now}
		if err := p.Revoke(revocation(t, x, 0, receipt.Pin{Size: uint64(n + 1)})); (err != nil) != (n == receipt.MaxPins) {
			t.Fatalf("pin %d: %v", n, err)
		}
	}
}
