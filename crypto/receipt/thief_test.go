package receipt_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/receipt/receipttest"
	"golang.org/x/mod/sumdb/note"
)

// thief holds every daily key of a log that has ended. Its identity key signs each checkpoint he shows it, as one in an HSM
// would for whoever reaches it, but no statement, seal or revocation. He can read the whole log.
type thief struct {
	tb     testing.TB
	r      *rand.Rand
	victim *receipttest.Log
	stolen int // the daily key he uses: by its place in victim.Daily, never the one in force
	d      *receipt.Decision
	block  *receipttest.Block // of d
}

// victim makes a log of some days of a few blocks each, all by chance: 3 to 6 daily keys, each ended in any way.
func victim(tb testing.TB, r *rand.Rand, ends ...string) *receipttest.Log {
	tb.Helper()
	l := receipttest.New(tb, testOrigin)
	if len(ends) == 0 {
		ends = []string{receipt.EndedRotated, receipt.EndedExpired, receipt.EndedUntrusted, receipt.EndedLost}
	}
	for day := range 3 + r.IntN(4) {
		if day > 0 {
			l.RotateAs(tb, ends[r.IntN(len(ends))])
		}
		work(tb, l, r)
	}
	return l
}

// work adds a few headers to l.
func work(tb testing.TB, l *receipttest.Log, r *rand.Rand) {
	tb.Helper()
	for range 1 + r.IntN(5) {
		if l.Now = l.Now.Add(time.Duration(r.Int64N(int64(2 * time.Hour)))); r.IntN(4) == 0 {
			l.SealHeader(tb, l.NextHeader(receipt.HeaderHeartbeat))
			continue
		}
		var leaves [][]byte
		for range 1 + r.IntN(3) {
			d, _ := l.NewDecision()
			leaves = append(leaves, receipt.AppendDecision(nil, d))
		}
		l.Seal(tb, leaves...)
	}
}

func newThief(tb testing.TB, r *rand.Rand, l *receipttest.Log) *thief {
	return &thief{tb: tb, r: r, victim: l, stolen: r.IntN(len(l.Daily) - 1)}
}

// first and last are the smallest and the largest tree the stolen key may sign.
func (x *thief) first() int { return x.victim.Statements[x.stolen] + 1 }
func (x *thief) last() int  { return x.victim.Statements[x.stolen+1] }

// key is the stolen key.
func (x *thief) key() receipttest.Key { return x.victim.Daily[x.stolen] }

// lie puts a decision of the thief's own into l, under a header changed by change, and perhaps headers after it.
func (x *thief) lie(l *receipttest.Log, change func(h *receipt.Header)) *receipttest.Log {
	x.tb.Helper()
	x.d, _ = l.NewDecision()
	x.d.Tenant = "thief"
	h := l.NextHeader(receipt.HeaderBlock)
	h.First, h.Last = x.d.Ordinal, x.d.Ordinal
	change(&h)
	x.d.Time = h.Time
	x.block = l.SealHeader(x.tb, h, receipt.AppendDecision(nil, x.d))
	for range x.r.IntN(3) {
		h := l.NextHeader(receipt.HeaderHeartbeat)
		h.Time = x.d.Time
		change(&h)
		l.SealHeader(x.tb, h)
	}
	return l
}

// at gives a header the time of the stolen key's day.
func (x *thief) at(l *receipttest.Log) func(*receipt.Header) {
	ks, err := receipt.ParseKeyStatement(x.victim.Leaves[x.victim.Statements[x.stolen]])
	if err != nil {
		x.tb.Fatal(err)
	}
	when := ks.NotBefore
	if n := len(l.Blocks); n > 0 && l.Blocks[n-1].Header.Time.After(when) {
		when = l.Blocks[n-1].Header.Time
	}
	return func(h *receipt.Header) { h.Time, h.Key = when, uint64(x.victim.Statements[x.stolen]) }
}

// fork is the victim's log up to any size the stolen key signed, and then the lie.
func (x *thief) fork(change func(h *receipt.Header)) *receipttest.Log {
	x.tb.Helper()
	l := x.victim.Fork(x.tb, x.first()+x.r.IntN(x.last()-x.first()+1))
	back := x.at(l)
	return x.lie(l, func(h *receipt.Header) { back(h); change(h) })
}

// above is the whole log, and then the lie.
func (x *thief) above(change func(h *receipt.Header)) *receipttest.Log {
	x.tb.Helper()
	return x.lie(x.victim.Fork(x.tb, len(x.victim.Leaves)), change)
}

// bundle shows the lie under a checkpoint that identity key and stolen key have signed, with the stolen key's statement.
func (x *thief) bundle(l *receipttest.Log) *receipt.Bundle {
	x.tb.Helper()
	return x.bundleSigned(l, l.Identity, x.key())
}

func (x *thief) bundleSigned(l *receipttest.Log, signers ...note.Signer) *receipt.Bundle {
	x.tb.Helper()
	b := l.Bundle(x.tb, l.SignCheckpoint(x.tb, signers...), 1, place{Block: x.block})
	b.Keys[0] = l.Proof(x.tb, x.victim.Statements[x.stolen], x.checkpoint(b))
	return b
}

func (x *thief) checkpoint(b *receipt.Bundle) []byte {
	return b.Tail.Text[bytes.Index(b.Tail.Text, []byte("\n\n"))+2:]
}

// family is a way to cheat and the reasons for which it is refused.
type family struct {
	name    string
	reasons []string
	forge   func(x *thief) *receipt.Bundle
}

func same(*receipt.Header) {}

// stolenFamilies cheat with daily keys that ended without a revocation, under a policy without witnesses.
var stolenFamilies = []family{
	{"the log as it is, signed by the old key", []string{"tail: the key statement in force is at index "}, func(x *thief) *receipt.Bundle {
		return x.bundle(x.above(same))
	}},
	{"any tree of the log above the last size", []string{"tail: the key statement in force is at index "}, func(x *thief) *receipt.Bundle {
		l := x.victim
		size := x.last() + 1 + x.r.IntN(len(l.Leaves)-x.last())
		x.block = l.Blocks[0]
		for _, b := range l.Blocks {
			if b.Header.Count > 0 && b.Index < x.last() {
				x.block = b
			}
		}
		if x.block.Header.Count == 0 { // no record so far: any other will do
			for _, b := range l.Blocks {
				if b.Header.Count > 0 {
					x.block = b
					size = max(size, b.Index+1)
					break
				}
			}
		}
		signed := l.SignCheckpointAt(x.tb, size, l.Identity, x.key())
		b := l.Bundle(x.tb, signed, 1, place{Block: x.block})
		b.Keys[0] = l.Proof(x.tb, l.Statements[x.stolen], signed)
		return b
	}},
	{"headers above the last size that name the old statement", []string{"it names the key statement at index"}, func(x *thief) *receipt.Bundle {
		// As the bundle shows the statement in force, too, they contradict it. TestWhatABundleCannotShow has the bundle that does not.
		l := x.above(func(h *receipt.Header) { h.Key = uint64(x.victim.Statements[x.stolen]) })
		l.SealHeader(x.tb, l.NextHeader(receipt.HeaderHeartbeat))
		return l.Bundle(x.tb, l.SignCheckpoint(x.tb, l.Identity, x.key(), l.Daily[len(l.Daily)-1]), 1+x.r.IntN(9), place{Block: x.block})
	}},
	{"headers above the last size with the times of now", []string{"after the daily key's end"}, func(x *thief) *receipt.Bundle {
		return x.bundle(x.above(func(h *receipt.Header) {
			h.Key, h.Time = uint64(x.victim.Statements[x.stolen]), h.Time.Add(receipt.MaxKeyAge)
		}))
	}},
	{"no tail", []string{"tail: proof: no checkpoint"}, func(x *thief) *receipt.Bundle {
		b := x.bundle(x.above(same))
		b.Tail = receipt.Proof{}
		return b
	}},
	{"a leaf of the stolen key's day for the tail", []string{"is not the last of"}, func(x *thief) *receipt.Bundle {
		l := x.above(same)
		b := x.bundle(l)
		b.Tail = l.Proof(x.tb, x.victim.Statements[x.stolen]+x.r.IntN(x.last()-x.victim.Statements[x.stolen]), x.checkpoint(b))
		return b
	}},
	{"the statement itself for the tail", []string{"is not the last of"}, func(x *thief) *receipt.Bundle {
		b := x.bundle(x.above(same))
		b.Tail = b.Keys[0]
		return b
	}},
	{"the tail of another tree", []string{"another checkpoint"}, func(x *thief) *receipt.Bundle {
		b := x.bundle(x.above(same))
		honest := x.victim.SignCheckpointAt(x.tb, x.last(), x.victim.Identity, x.key())
		b.Tail = x.victim.Proof(x.tb, x.last()-1, honest)
		return b
	}},
	{"the tail of another tree below this checkpoint", []string{"tail: proof: not included"}, func(x *thief) *receipt.Bundle {
		l := x.above(same)
		b := x.bundle(l)
		honest := x.victim.SignCheckpointAt(x.tb, x.last(), x.victim.Identity, x.key())
		other := x.victim.Proof(x.tb, x.last()-1, honest)
		path, _, _ := bytes.Cut(other.Text, []byte("\n\n"))
		b.Tail = receipt.Proof{Leaf: other.Leaf, Text: append(append(bytes.Clone(path), "\n\n"...), x.checkpoint(b)...)}
		return b
	}},
	{"the last header with another key number", []string{"tail: proof: not included"}, func(x *thief) *receipt.Bundle {
		b := x.bundle(x.above(same))
		h, err := receipt.ParseHeader(b.Tail.Leaf)
		if err != nil {
			x.tb.Fatal(err)
		}
		h.Key = uint64(x.victim.Statements[x.stolen])
		b.Tail.Leaf = receipt.AppendHeader(nil, h)
		return b
	}},
	{"the old statement again at the end of the log", []string{"key statement 0: it names size "}, func(x *thief) *receipt.Bundle {
		l := x.victim.Fork(x.tb, len(x.victim.Leaves))
		l.AppendStatement(x.tb, x.key(), l.Leaves[l.Statements[x.stolen]])
		return x.bundleUnder(x.lie(l, same))
	}},
	{"the old statement in its place, over another log", []string{"key statement 0: it names another root"}, func(x *thief) *receipt.Bundle {
		for x.stolen == 0 { // before the first statement there is nothing to change
			x.stolen = x.r.IntN(len(x.victim.Daily) - 1)
		}
		l := x.victim.Fork(x.tb, x.victim.Statements[x.stolen]-1-x.r.IntN(min(3, x.victim.Statements[x.stolen]-2)))
		for len(l.Leaves) < x.victim.Statements[x.stolen] {
			h := l.NextHeader(receipt.HeaderHeartbeat)
			h.Instance = "thief"
			l.SealHeader(x.tb, h)
		}
		l.AppendStatement(x.tb, x.key(), x.victim.Leaves[x.victim.Statements[x.stolen]])
		return x.bundleUnder(x.lie(l, x.at(x.victim.Fork(x.tb, x.first()+1))))
	}},
	{"a statement of his own", []string{"key statement 0: "}, func(x *thief) *receipt.Bundle {
		l := x.victim.Fork(x.tb, x.first()+x.r.IntN(x.last()-x.first()+1))
		mine := receipttest.NewKey(x.tb, testOrigin, fmt.Sprint("thief", x.r.Uint64()))
		ks := l.NextStatement(x.tb)
		ks.Key, ks.Predecessor, ks.Ended = mine.VKey, x.key().VKey, receipt.EndedRotated
		signers := []note.Signer{x.key()}
		switch x.r.IntN(3) {
		case 0:
			ks.Ended = receipt.EndedLost
		case 1:
			signers = append(signers, mine)
		}
		leaf, err := note.Sign(&note.Note{Text: receipt.KeyText(ks)}, signers...)
		if err != nil {
			x.tb.Fatal(err)
		}
		x.victim = l
		l.AppendStatement(x.tb, mine, leaf)
		x.stolen = len(l.Daily) - 1
		return x.bundleUnder(x.lie(l.Fork(x.tb, len(l.Leaves)), same))
	}},
	{"the real statement brought in by a leaf that is not in the log", []string{"key statement 0: proof: not included"}, func(x *thief) *receipt.Bundle {
		l := x.above(same)
		b := x.bundle(l)
		b.Keys[0] = receipt.Proof{Leaf: x.victim.Leaves[x.victim.Statements[x.stolen]],
			Text: l.Proof(x.tb, x.block.Index, x.checkpoint(b)).Text}
		return b
	}},
	{"a chain with a gap", []string{"not the predecessor of the one before"}, func(x *thief) *receipt.Bundle {
		// A true bundle whose chain leaves one out, so that a key looks like the successor of the stolen one.
		l := x.above(same)
		b := l.Bundle(x.tb, nil, 9, place{Block: x.block})
		at := 1 + x.r.IntN(len(b.Keys)-2)
		b.Keys = append(b.Keys[:at:at], b.Keys[at+1:]...)
		return b
	}},
	{"the statement of the key in force, the signature of the old one", []string{"key statement 0: its daily key did not sign"}, func(x *thief) *receipt.Bundle {
		l := x.above(same)
		return l.Bundle(x.tb, l.SignCheckpoint(x.tb, l.Identity, x.key()), 9, place{Block: x.block})
	}},
	{"a fork below the last size, told with the time it has now", []string{"after the daily key's end"}, func(x *thief) *receipt.Bundle {
		return x.bundle(x.fork(func(h *receipt.Header) {
			h.Time = x.victim.Now.Add(receipt.MaxKeyAge + time.Duration(x.r.Int64N(int64(time.Hour))))
		}))
	}},
	{"a fork below the last size with times from before the key", []string{"before the daily key's begin"}, func(x *thief) *receipt.Bundle {
		return x.bundle(x.fork(func(h *receipt.Header) { h.Time = beginning.Add(-time.Duration(x.r.Int64N(int64(time.Hour)))) }))
	}},
	{"a fork below the last size with a time that goes back", []string{"after the last leaf of the log", "before the daily key's begin"}, func(x *thief) *receipt.Bundle {
		l := x.fork(same)
		h := l.NextHeader(receipt.HeaderHeartbeat)
		h.Time, h.Key = x.d.Time.Add(-1-time.Duration(x.r.Int64N(1000))), uint64(x.victim.Statements[x.stolen])
		l.SealHeader(x.tb, h)
		return x.bundle(l)
	}},
	{"a fork whose lie is under no key it could be under", []string{"tail: the key statement in force is at index"}, func(x *thief) *receipt.Bundle {
		return x.bundle(x.fork(func(h *receipt.Header) { h.Key += 1 + x.r.Uint64N(20) }))
	}},
	{"a seal of his own", []string{"tail: "}, func(x *thief) *receipt.Bundle {
		l := x.above(same)
		n := len(l.Leaves)
		leaf, err := note.Sign(&note.Note{Text: receipt.SealText(&receipt.Seal{Origin: testOrigin, Key: uint64(x.victim.Statements[x.stolen]),
			Size: uint64(n), Root: l.Root(x.tb, n), Time: l.Now})}, x.key())
		if err != nil {
			x.tb.Fatal(err)
		}
		l.Append(x.tb, leaf)
		return x.bundle(l)
	}},
	{"a record for the tail", []string{"tail: neither a header nor a key statement nor a seal"}, func(x *thief) *receipt.Bundle {
		l := x.above(same)
		l.Append(x.tb, receipt.AppendDecision(nil, x.d))
		return x.bundle(l)
	}},
}

// bundleUnder is bundle for a log that has the statement last.
func (x *thief) bundleUnder(l *receipttest.Log) *receipt.Bundle {
	x.tb.Helper()
	return l.Bundle(x.tb, l.SignCheckpoint(x.tb, l.Identity, l.Daily[len(l.Daily)-1]), 1, place{Block: x.block})
}

const thefts = 50 // of each family, each from a log of its own

// TestStolenDailyKeys has thieves with daily keys that have ended, and an identity key that signs every checkpoint: none of
// what they make up verifies, and each is refused for what is wrong with it.
func TestStolenDailyKeys(t *testing.T) {
	total := 0
	for i, f := range stolenFamilies {
		t.Run(f.name, func(t *testing.T) {
			total += steal(t, f, uint64(i), func(r *rand.Rand) (*receipttest.Log, *receipt.Policy) {
				l := victim(t, r)
				return l, l.Policy(t)
			})
		})
	}
	t.Logf("%d families, %d forgeries, 0 accepted", len(stolenFamilies), total)
	if total < 1000 && !t.Failed() {
		t.Errorf("only %d forgeries", total)
	}
}

// steal forges in one family. Before every tenth forgery, honest bundles of the same log verify under the same policy: of today's log and
// of each key's last size.
func steal(t *testing.T, f family, seed uint64, make func(r *rand.Rand) (*receipttest.Log, *receipt.Policy)) (n int) {
	t.Helper()
	for k := range uint64(thefts) {
		r := rand.New(rand.NewPCG(seed, k))
		l, p := make(r)
		if k%10 == 0 {
			honest(t, l, p)
		}
		b := f.forge(newThief(t, r, l))
		_, err := receipt.Verify(p, b)
		if err == nil {
			t.Fatalf("seed %d, %d: accepted", seed, k)
		}
		if strings.Contains(err.Error(), "\n") {
			t.Fatalf("seed %d, %d: an error of several lines: %q", seed, k, err)
		}
		ok := false
		for _, reason := range f.reasons {
			ok = ok || strings.Contains(err.Error(), reason)
		}
		if !ok {
			t.Fatalf("seed %d, %d: refused for another reason: %v", seed, k, err)
		}
		n++
	}
	t.Logf("seeds %d, 0 to %d: %d refused: %s", seed, thefts-1, n, strings.Join(f.reasons, ", or "))
	return n
}

// honest verifies a bundle of each block under today's checkpoint, and one under the last checkpoint of each daily key.
func honest(t *testing.T, l *receipttest.Log, p *receipt.Policy) {
	t.Helper()
	v := receipt.NewVerifier(p)
	today := l.Checkpoint(t)
	for _, block := range l.Blocks {
		if block.Header.Count == 0 {
			continue
		}
		signed := [][]byte{today}
		for _, size := range append(l.Statements[1:len(l.Statements):len(l.Statements)], len(l.Leaves)) {
			if size > block.Index {
				signed = append(signed, l.CheckpointAt(t, size))
				break
			}
		}
		for _, c := range signed {
			if _, err := v.Verify(l.Bundle(t, c, 9, place{Block: block})); err != nil {
				t.Fatalf("an honest bundle: %v", err)
			}
		}
	}
}

// TestWhatABundleCannotShow has the fork that only a witness, a revocation or a second checkpoint shows: the log as it was at a
// size the stolen key signed, with headers of the thief's own and times from its day. It verifies until one of those is there.
func TestWhatABundleCannotShow(t *testing.T) {
	r := rand.New(rand.NewPCG(31, 0))
	for k := range 50 {
		l := victim(t, r, receipt.EndedRevoked)
		x := newThief(t, r, l)
		var forked *receipttest.Log
		if k%2 == 0 {
			forked = x.fork(same)
		} else { // the log as it is now, and the thief's headers after it
			forked = x.above(x.at(l.Fork(t, x.last())))
		}
		b := x.bundle(forked)
		if _, err := receipt.Verify(l.Policy(t), b); err != nil {
			t.Fatalf("%d: the package comment says that this verifies: %v", k, err)
		}
		pin := receipt.Pin{Size: uint64(x.last()), Root: l.Root(t, x.last())}
		p := l.Policy(t)
		if err := p.Revoke(revocation(t, l, x.stolen, pin)); err != nil {
			t.Fatal(err)
		}
		if _, err := receipt.Verify(p, b); err == nil {
			t.Fatalf("%d: a fork was accepted in spite of the revocation", k)
		}
		audit, found := auditOf(t, l), false
		for i, leaf := range forked.Leaves {
			found = audit.Leaf(uint64(i), forked.Root(t, i), leaf) != nil || found
		}
		if !found && k%2 == 1 {
			t.Fatalf("%d: the audit finds nothing in the log as it is now with the thief's headers", k)
		}
		// A witness, even one that signs forks, has a clock.
		w := receipttest.Witness(t, "w.example", "w", l.Now.Add(receipt.MaxKeyAge+receipt.MaxSkew+time.Second))
		l.Witnesses = []receipttest.Key{w}
		signed := x.bundleSigned(forked, l.Identity, x.key(), w)
		if _, err := receipt.Verify(l.Policy(t), signed); err == nil || !strings.Contains(err.Error(), "cosigned the checkpoint") {
			t.Fatalf("%d: cosigned after the key's end: %v", k, err)
		}
		if _, err := receipt.Verify(l.Policy(t), b); err == nil || !strings.Contains(err.Error(), "checkpoint: ") {
			t.Fatalf("%d: a fork that no witness saw: %v", k, err)
		}
	}
}

// revocation revokes the daily key number n of l.
func revocation(t *testing.T, l *receipttest.Log, n int, pin receipt.Pin) []byte {
	t.Helper()
	signed, err := receipt.SignRevocation(&receipt.Revocation{
		Origin: l.Origin, Key: l.Daily[n].VKey, Size: pin.Size, Root: pin.Root, Time: l.Now, Reason: "stolen",
	}, l.Identity)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

func auditOf(t *testing.T, l *receipttest.Log) *receipt.KeyAudit {
	t.Helper()
	return receipt.NewKeyAudit(l.Origin, verifierOf(t, l.Identity))
}
