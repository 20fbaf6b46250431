package receipt_test

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/receipt/receipttest"
	"golang.org/x/mod/sumdb/note"
)

// attack is a bundle that must be refused although, but for the one thing its name says, all in it is properly made and
// signed. The Python verifier must refuse it too, unless leftToKnhk says why not.
type attack struct {
	name   string
	want   string // in the error
	goOnly bool   // its policy has witnesses, which the Python verifier does not read, or the bundle cannot be written as JSON
	make   func(tb testing.TB) (*receipttest.Log, *receipt.Bundle)
}

type (
	log       = receipttest.Log
	bundle    = receipt.Bundle
	place     = receipttest.Place
	statement = receipt.KeyStatement
)

// sampled changes the sample bundle.
func sampled(change func(tb testing.TB, l *log, b *bundle)) func(testing.TB) (*log, *bundle) {
	return func(tb testing.TB) (*log, *bundle) {
		l, b := receipttest.Sample(tb, testOrigin)
		change(tb, l, b)
		return l, b
	}
}

// scene is a fresh log with a decision and its outcome, not yet sealed.
type scene struct {
	tb testing.TB
	*log
	d *receipt.Decision
	o *receipt.Outcome
}

// staged lets story put records and headers into a fresh log and make the bundle.
func staged(story func(s *scene) *bundle) func(testing.TB) (*log, *bundle) {
	return func(tb testing.TB) (*log, *bundle) {
		s := &scene{tb: tb, log: receipttest.New(tb, testOrigin)}
		s.d, _ = s.NewDecision()
		s.o = s.NewOutcome(s.d)
		b := story(s)
		return s.log, b
	}
}

func (s *scene) decision() []byte { return receipt.AppendDecision(nil, s.d) }
func (s *scene) outcome() []byte  { return receipt.AppendOutcome(nil, s.o) }

// both seals decision and outcome into one block under h and bundles them.
func (s *scene) both(change func(h *receipt.Header)) *bundle {
	h := s.NextHeader(receipt.HeaderBlock)
	h.Last = s.Ordinal - 1
	h.First = h.Last - 1
	change(&h)
	block := s.SealHeader(s.tb, h, s.decision(), s.outcome())
	return s.Bundle(s.tb, nil, 1, place{Block: block, Index: 0}, place{Block: block, Index: 1})
}

// bothThen is both with a heartbeat after it, so that the header is not the tail.
func (s *scene) bothThen(change func(h *receipt.Header)) *bundle {
	s.both(change)
	s.SealHeader(s.tb, s.NextHeader(receipt.HeaderHeartbeat))
	return s.Bundle(s.tb, nil, 1, place{Block: s.Blocks[1], Index: 0}, place{Block: s.Blocks[1], Index: 1})
}

// apart seals decision and outcome into two blocks, the second under a changed header, and bundles them.
func (s *scene) apart(change func(h *receipt.Header)) *bundle {
	h := s.NextHeader(receipt.HeaderBlock)
	first := s.SealHeader(s.tb, h, s.decision())
	h = s.NextHeader(receipt.HeaderBlock)
	h.First, h.Last = 1, 1
	change(&h)
	second := s.SealHeader(s.tb, h, s.outcome())
	return s.Bundle(s.tb, nil, 1, place{Block: first, Index: 0}, place{Block: second, Index: 0})
}

func unchanged(*receipt.Header) {}

// stated is a bundle whose daily key comes from a statement of the test's own making: text is what was to be signed.
func stated(change func(s *scene, ks *statement) (text string, signers []note.Signer)) func(testing.TB) (*log, *bundle) {
	return staged(func(s *scene) *bundle {
		s.tb.Helper()
		ks := &statement{
			Origin: testOrigin, Key: testKeys.daily.VKey, Predecessor: s.Daily[0].VKey, Ended: receipt.EndedRotated, NotBefore: s.Now,
			NotAfter: s.Now.Add(receipt.MaxKeyAge), FirstSize: uint64(len(s.Leaves)), FirstRoot: s.Root(s.tb, len(s.Leaves)),
		}
		text, signers := change(s, ks)
		leaf, err := note.Sign(&note.Note{Text: text}, signers...)
		if err != nil {
			s.tb.Fatal(err)
		}
		s.Daily = append(s.Daily, testKeys.daily)
		s.Statements = append(s.Statements, s.Append(s.tb, leaf))
		return s.both(unchanged)
	})
}

var attacks = []attack{
	// Signatures of the checkpoint.
	{"no identity signature", "checkpoint", false, staged(func(s *scene) *bundle {
		block := s.Seal(s.tb, s.decision(), s.outcome())
		return s.Bundle(s.tb, s.SignCheckpoint(s.tb, s.Daily[0]), 1, place{Block: block})
	})},
	{"no identity signature, but the witness's", "checkpoint", true, staged(func(s *scene) *bundle {
		block := s.Seal(s.tb, s.decision(), s.outcome())
		s.Witnesses = []receipttest.Key{receipttest.Witness(s.tb, "w.example", "w", s.Now)}
		return s.Bundle(s.tb, s.SignCheckpoint(s.tb, s.Daily[0], s.Witnesses[0]), 1, place{Block: block})
	})},
	{"no daily signature", "daily key did not sign", false, staged(func(s *scene) *bundle {
		block := s.Seal(s.tb, s.decision(), s.outcome())
		return s.Bundle(s.tb, s.SignCheckpoint(s.tb, s.Identity), 1, place{Block: block})
	})},
	{"a daily key that was never stated", "daily key did not sign", false, staged(func(s *scene) *bundle {
		block := s.Seal(s.tb, s.decision(), s.outcome())
		return s.Bundle(s.tb, s.SignCheckpoint(s.tb, s.Identity, testKeys.other), 1, place{Block: block})
	})},
	{"the daily key before", "daily key did not sign", false, staged(func(s *scene) *bundle {
		s.Rotate(s.tb)
		block := s.Seal(s.tb, s.decision(), s.outcome())
		return s.Bundle(s.tb, s.SignCheckpoint(s.tb, s.Identity, s.Daily[0]), 1, place{Block: block})
	})},
	{"another identity key of the same name", "checkpoint", false, staged(func(s *scene) *bundle {
		block := s.Seal(s.tb, s.decision(), s.outcome())
		b := s.Bundle(s.tb, s.SignCheckpoint(s.tb, testKeys.other, s.Daily[0]), 1, place{Block: block})
		return b
	})},
	{"another log", "policy has no log", false, func(tb testing.TB) (*log, *bundle) {
		_, b := receipttest.Sample(tb, "example.org/knhk/2")
		l, _ := receipttest.Sample(tb, testOrigin)
		return l, b
	}},
	{"a second line of the identity key", "two signature lines", false, sampled(func(_ testing.TB, l *log, b *bundle) {
		eachProof(b, func(p *receipt.Proof) {
			line := p.Text[bytes.Index(p.Text, []byte("— ")):]
			p.Text = append(bytes.Clone(p.Text), line[:bytes.IndexByte(line, '\n')+1]...)
		})
	})},
	// Proofs.
	{"proofs swapped between headers", "not included", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		b.Headers[0].Text, b.Headers[1].Text = b.Headers[1].Text, b.Headers[0].Text
	})},
	{"proofs swapped between header and key", "not included", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		b.Headers[0].Text, b.Keys[0].Text = b.Keys[0].Text, b.Headers[0].Text
	})},
	{"an index moved to a leaf that is not there", "index 9 in a log of 9", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		b.Headers[0].Text = bytes.Replace(b.Headers[0].Text, []byte("index 5"), []byte("index 9"), 1)
	})},
	{"proofs below two checkpoints", "another checkpoint", false, staged(func(s *scene) *bundle {
		block := s.Seal(s.tb, s.decision(), s.outcome())
		old := s.Bundle(s.tb, nil, 1, place{Block: block})
		s.SealHeader(s.tb, s.NextHeader(receipt.HeaderHeartbeat))
		b := s.Bundle(s.tb, nil, 1, place{Block: block})
		b.Keys = old.Keys
		return b
	})},
	{"an extra line in a proof", "index line", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		b.Headers[0].Text = bytes.Replace(b.Headers[0].Text, []byte("index"), []byte("extra aGk=\nindex"), 1)
	})},
	{"an index with a leading zero", "plain decimal", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		b.Headers[0].Text = bytes.Replace(b.Headers[0].Text, []byte("index 5"), []byte("index 05"), 1)
	})},
	{"a hash with loose bits", "hash 0 is malformed", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		end := bytes.Index(b.Headers[0].Text, []byte("=\n"))
		b.Headers[0].Text[end-1]++
	})},
	{"64 hashes", "more than 63 hashes", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		line := append([]byte(receipt.EmptyRoot.String()), '\n')
		at := bytes.Index(b.Headers[0].Text, []byte("\n\n")) + 1
		b.Headers[0].Text = slices.Insert(bytes.Clone(b.Headers[0].Text), at, bytes.Repeat(line, 64)...)
	})},
	// Leaf types.
	{"a header as the decision", "record 0: parse decision", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		b.Records[0].Leaf = b.Headers[0].Leaf
	})},
	{"a header as a record of a block", "record 0: parse decision", false, staged(func(s *scene) *bundle {
		h := s.NextHeader(receipt.HeaderBlock)
		block := s.SealHeader(s.tb, h, s.Blocks[0].Leaf)
		return s.Bundle(s.tb, nil, 1, place{Block: block})
	})},
	{"a record as a header of the log", "header 0: parse header", false, staged(func(s *scene) *bundle {
		b := s.both(unchanged)
		index := s.Append(s.tb, s.decision())
		s.SealHeader(s.tb, s.NextHeader(receipt.HeaderHeartbeat))
		checkpoint := s.Checkpoint(s.tb)
		return &bundle{
			Records: []receipt.Record{{Leaf: b.Records[0].Leaf, Size: 1}}, Headers: []receipt.Proof{s.Proof(s.tb, index, checkpoint)},
			Keys: []receipt.Proof{s.Proof(s.tb, 0, checkpoint)}, Tail: s.Proof(s.tb, len(s.Leaves)-1, checkpoint),
		}
	})},
	{"a key statement as a header", "header 0: parse header", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		b.Headers[0] = b.Keys[0]
	})},
	{"a header as a key statement", "key statement 0: parse", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		b.Keys[0] = b.Headers[0]
	})},
	{"an outcome first", "record 0: parse decision", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		b.Records = b.Records[1:]
		b.Records[0].Header, b.Headers = 0, b.Headers[1:]
	})},
	{"two decisions", "record 1: parse outcome", false, staged(func(s *scene) *bundle {
		block := s.Seal(s.tb, s.decision(), s.decision())
		return s.Bundle(s.tb, nil, 1, place{Block: block}, place{Block: block, Index: 1})
	})},
	{"the same decision twice", "record 1: parse outcome", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		b.Records[1] = b.Records[0]
	})},
	// Records.
	{"the outcome of another receipt", "belongs to receipt", false, staged(func(s *scene) *bundle {
		other, _ := s.NewDecision()
		s.o = s.NewOutcome(other)
		return s.apart(func(h *receipt.Header) { h.First, h.Last = s.o.Ordinal, s.o.Ordinal })
	})},
	{"the outcome of another log", "record 1: it is for origin", false, staged(func(s *scene) *bundle {
		s.o.Origin = "example.org/knhk/2"
		return s.both(unchanged)
	})},
	{"the decision of another log", "record 0: it is for origin", false, staged(func(s *scene) *bundle {
		s.d.Origin = "example.org/knhk/2"
		return s.both(unchanged)
	})},
	{"the decision of another instance", "instance b in the id", false, staged(func(s *scene) *bundle {
		s.d.ID = strings.TrimSuffix(s.d.ID, ".a") + ".b"
		s.o.ID = s.d.ID
		return s.both(unchanged)
	})},
	{"an outcome before its decision", "ordinal 0 after 1", false, staged(func(s *scene) *bundle {
		s.d.Ordinal, s.o.Ordinal = 1, 0
		h := s.NextHeader(receipt.HeaderBlock)
		h.Last = 1
		block := s.SealHeader(s.tb, h, s.outcome(), s.decision())
		return s.Bundle(s.tb, nil, 1, place{Block: block, Index: 1}, place{Block: block, Index: 0})
	})},
	{"the outcome twice", "ordinal 9 after 9", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		b.Records = append(b.Records, b.Records[1])
	})},
	{"two outcomes, neither late", "second outcome", false, staged(func(s *scene) *bundle {
		return s.second(func(first, second *receipt.Outcome) {})
	})},
	{"a late outcome after a known one", "second outcome", false, staged(func(s *scene) *bundle {
		return s.second(func(first, second *receipt.Outcome) { second.Late = true })
	})},
	{"two late outcomes", "second outcome", false, staged(func(s *scene) *bundle {
		return s.second(func(first, second *receipt.Outcome) { first.Result, first.Late, second.Late = "unknown", true, true })
	})},
	{"four records", "4 records", true, sampled(func(_ testing.TB, _ *log, b *bundle) {
		b.Records = append(b.Records, b.Records[1], b.Records[1])
	})},
	{"no records", "0 records", false, sampled(func(_ testing.TB, _ *log, b *bundle) { b.Records = nil })},
	{"no headers", "0 headers", false, sampled(func(_ testing.TB, _ *log, b *bundle) { b.Headers = nil })},
	{"no keys", "0 key statements", false, sampled(func(_ testing.TB, _ *log, b *bundle) { b.Keys = nil })},
	{"nine headers", "9 headers", true, sampled(func(_ testing.TB, _ *log, b *bundle) {
		for len(b.Headers) < 9 {
			b.Headers = append(b.Headers, b.Headers[0])
		}
	})},
	{"65 keys", "65 key statements", true, sampled(func(_ testing.TB, _ *log, b *bundle) {
		for len(b.Keys) < 65 {
			b.Keys = append(b.Keys, b.Keys[0])
		}
	})},
	// Places.
	{"another index", "record 0: verify path", false, sampled(func(_ testing.TB, _ *log, b *bundle) { b.Records[0].Index++ })},
	{"an index outside the block", "index 5 in a tree of 5", false, sampled(func(_ testing.TB, _ *log, b *bundle) { b.Records[0].Index = 5 })},
	{"another size", "a block of 6", false, sampled(func(_ testing.TB, _ *log, b *bundle) { b.Records[0].Size++ })},
	{"size 0", "a block of 0", false, sampled(func(_ testing.TB, _ *log, b *bundle) { b.Records[0].Size = 0 })},
	{"another record's path", "record 0: verify path", false, sampled(func(_ testing.TB, l *log, b *bundle) {
		b.Records[0].Path = l.Blocks[3].Tree.Path(3)
	})},
	{"a path too long", "record 0: verify path", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		b.Records[0].Path = append(b.Records[0].Path, receipt.Hash{})
	})},
	{"another header", "a block of", false, sampled(func(_ testing.TB, _ *log, b *bundle) { b.Records[0].Header = 1 })},
	{"a header that is not there", "no header 2", false, sampled(func(_ testing.TB, _ *log, b *bundle) { b.Records[0].Header = 2 })},
	{"a negative header", "no header -1", true, sampled(func(_ testing.TB, _ *log, b *bundle) { b.Records[0].Header = -1 })},
	{"an ordinal that does not fit the index", "cannot be record 0", false, staged(func(s *scene) *bundle {
		s.d.Ordinal = 5
		return s.both(func(h *receipt.Header) { h.First, h.Last = 4, 5; s.o.Ordinal = 6 })
	})},
	{"an ordinal outside the header's", "cannot be record 0", false, staged(func(s *scene) *bundle {
		return s.both(func(h *receipt.Header) { h.First, h.Last = 4, 5 })
	})},
	{"an ordinal declared lost", "declares ordinal 0 lost", false, staged(func(s *scene) *bundle {
		return s.apart(func(h *receipt.Header) { h.LostFrom, h.LostTo = 0, 1 })
	})},
	// Headers.
	{"the header of another log", "header 0: it is for origin", false, staged(func(s *scene) *bundle {
		return s.bothThen(func(h *receipt.Header) { h.Origin = "example.org/knhk/2" })
	})},
	{"a heartbeat with records", "header 0: parse header", false, staged(func(s *scene) *bundle {
		return s.bothThen(func(h *receipt.Header) { h.Kind = receipt.HeaderHeartbeat })
	})},
	{"a heartbeat as header", "it has no records", false, sampled(func(tb testing.TB, l *log, b *bundle) {
		b.Headers[0] = l.Proof(tb, l.Blocks[2].Index, l.Checkpoint(tb))
	})},
	{"a header twice", "one sequence number", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		b.Headers = append(b.Headers, b.Headers[0])
	})},
	{"a header without a record", "no record is in it", false, sampled(func(tb testing.TB, l *log, b *bundle) {
		b.Headers = append(b.Headers, l.Proof(tb, l.Blocks[4].Index, l.Checkpoint(tb)))
	})},
	{"headers of two logs' directories", "different recorders", false, staged(func(s *scene) *bundle {
		return s.apart(func(h *receipt.Header) { h.LogID[0]++ })
	})},
	{"headers of two instances", "different recorders", false, staged(func(s *scene) *bundle {
		return s.apart(func(h *receipt.Header) { h.Instance = "b" })
	})},
	{"two headers for one sequence number", "one sequence number", false, staged(func(s *scene) *bundle {
		return s.apart(func(h *receipt.Header) { h.Seq-- })
	})},
	{"headers with ordinals in common", "ordinals in common", false, staged(func(s *scene) *bundle {
		return s.apart(func(h *receipt.Header) { h.First = 0 })
	})},
	// Keys.
	{"a key statement by another identity", "key statement 0", false, stated(func(s *scene, ks *statement) (string, []note.Signer) {
		return receipt.KeyText(ks), []note.Signer{testKeys.other, s.Daily[0]}
	})},
	{"a key statement without its predecessor", "1 signatures, want 2", false, stated(func(s *scene, ks *statement) (string, []note.Signer) {
		return receipt.KeyText(ks), []note.Signer{s.Identity}
	})},
	{"a key statement signed by another predecessor", "not signed by the identity key and, where it rotates, the predecessor", false,
		stated(func(s *scene, ks *statement) (string, []note.Signer) {
			return receipt.KeyText(ks), []note.Signer{s.Identity, testKeys.other}
		})},
	{"a predecessor that is not named", "2 signatures, want 1", false, stated(func(s *scene, ks *statement) (string, []note.Signer) {
		first(ks)
		return receipt.KeyText(ks), []note.Signer{s.Identity, s.Daily[0]}
	})},
	{"a key for another log", "it is for origin", false, stated(func(s *scene, ks *statement) (string, []note.Signer) {
		name := "example.org/knhk/2"
		first(ks)
		ks.Origin, ks.Key = name, receipttest.NewKey(s.tb, name, "daily").VKey
		return receipt.KeyText(ks), []note.Signer{s.Identity}
	})},
	{"a key named after another log", "not after the origin", false, stated(func(s *scene, ks *statement) (string, []note.Signer) {
		ks.Key = receipttest.NewKey(s.tb, "example.org/knhk/2", "daily").VKey
		return receipt.KeyText(ks), []note.Signer{s.Identity, s.Daily[0]}
	})},
	{"a key for more than a day", "not_after", false, stated(func(s *scene, ks *statement) (string, []note.Signer) {
		ks.NotAfter = ks.NotAfter.Add(1)
		return receipt.KeyText(ks), []note.Signer{s.Identity, s.Daily[0]}
	})},
	{"a key for no time", "not_after", false, stated(func(s *scene, ks *statement) (string, []note.Signer) {
		ks.NotAfter = ks.NotBefore
		return receipt.KeyText(ks), []note.Signer{s.Identity, s.Daily[0]}
	})},
	{"a key stated before its first size", "names size 3, but stands at index 2", false, stated(func(s *scene, ks *statement) (string, []note.Signer) {
		ks.FirstSize++
		return receipt.KeyText(ks), []note.Signer{s.Identity, s.Daily[0]}
	})},
	{"a key stated after its first size", "names size 1, but stands at index 2", false, stated(func(s *scene, ks *statement) (string, []note.Signer) {
		ks.FirstSize, ks.FirstRoot = 1, s.Root(s.tb, 1)
		return receipt.KeyText(ks), []note.Signer{s.Identity, s.Daily[0]}
	})},
	{"a key stated over another root", "names another root", false, stated(func(s *scene, ks *statement) (string, []note.Signer) {
		ks.FirstRoot[0]++
		return receipt.KeyText(ks), []note.Signer{s.Identity, s.Daily[0]}
	})},
	{"a rotated key that did not sign, and does not say so", "1 signatures, want 2", false, stated(func(s *scene, ks *statement) (string, []note.Signer) {
		return receipt.KeyText(ks), []note.Signer{s.Identity}
	})},
	{"a lost key that signed all the same", "2 signatures, want 1", false, stated(func(s *scene, ks *statement) (string, []note.Signer) {
		ks.Ended = receipt.EndedLost
		return receipt.KeyText(ks), []note.Signer{s.Identity, s.Daily[0]}
	})},
	{"a first root of nothing that is not", "first_root", false, stated(func(s *scene, ks *statement) (string, []note.Signer) {
		root := ks.FirstRoot
		first(ks)
		ks.FirstRoot = root
		return receipt.KeyText(ks), []note.Signer{s.Identity}
	})},
	{"a key statement in another spelling", "canonical", false, stated(func(s *scene, ks *statement) (string, []note.Signer) {
		return strings.Replace(receipt.KeyText(ks), `,"key"`, `, "key"`, 1), []note.Signer{s.Identity, s.Daily[0]}
	})},
	{"the identity key as daily key", "identity key as a daily key", false, staged(func(s *scene) *bundle {
		ks := &statement{
			Origin: testOrigin, Key: s.Identity.VKey, NotBefore: s.Now, NotAfter: s.Now.Add(time.Hour), FirstRoot: receipt.EmptyRoot,
		}
		leaf, err := note.Sign(&note.Note{Text: receipt.KeyText(ks)}, s.Identity)
		if err != nil {
			s.tb.Fatal(err)
		}
		s.Statements = append(s.Statements, s.Append(s.tb, leaf))
		block := s.Seal(s.tb, s.decision(), s.outcome())
		return s.Bundle(s.tb, s.SignCheckpoint(s.tb, s.Identity), 1, place{Block: block})
	})},
	{"a key statement that is not in the log", "key statement 0: proof: not included", false, staged(func(s *scene) *bundle {
		s.both(unchanged)
		checkpoint := s.SignCheckpoint(s.tb, s.Identity, testKeys.daily)
		ks := &statement{Origin: testOrigin, Key: testKeys.daily.VKey, NotBefore: s.Now, NotAfter: s.Now.Add(1), FirstRoot: receipt.EmptyRoot}
		leaf, err := receipt.SignKeyStatement(ks, s.Identity, nil)
		if err != nil {
			s.tb.Fatal(err)
		}
		b := s.Bundle(s.tb, checkpoint, 1, place{Block: s.Blocks[1]})
		b.Keys[0].Leaf = leaf
		return b
	})},
	{"the chain of keys backwards", "daily key did not sign", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		b.Keys[0], b.Keys[1] = b.Keys[1], b.Keys[0]
	})},
	{"a key that is not the predecessor", "not the predecessor", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		b.Keys[1] = b.Keys[0]
	})},
	{"a key stated before its predecessor", "it precedes its predecessor", false, staged(func(s *scene) *bundle {
		ks := s.NextStatement(s.tb)
		before := s.Daily[0]
		s.Daily[0] = testKeys.other // its statement comes later
		s.RotateTo(s.tb, testKeys.daily, ks)
		s.Daily[1] = before
		s.RotateTo(s.tb, testKeys.other, s.NextStatement(s.tb))
		h := s.NextHeader(receipt.HeaderBlock)
		h.First, h.Last = 0, 1
		block := s.SealHeader(s.tb, h, s.decision(), s.outcome())
		checkpoint := s.SignCheckpoint(s.tb, s.Identity, testKeys.daily)
		b := s.Bundle(s.tb, checkpoint, 1, place{Block: block})
		b.Keys = []receipt.Proof{s.Proof(s.tb, 2, checkpoint), s.Proof(s.tb, 3, checkpoint)}
		return b
	})},
}

// first makes ks the first statement of a log, wherever it stands.
func first(ks *statement) {
	ks.Predecessor, ks.Ended, ks.FirstSize, ks.FirstRoot = "", "", 0, receipt.EmptyRoot
}

// second is a bundle with two outcomes.
func (s *scene) second(change func(first, second *receipt.Outcome)) *bundle {
	late := s.NewOutcome(s.d)
	change(s.o, late)
	block := s.Seal(s.tb, s.decision(), s.outcome(), receipt.AppendOutcome(nil, late))
	return s.Bundle(s.tb, nil, 1, place{Block: block}, place{Block: block, Index: 1}, place{Block: block, Index: 2})
}

func eachProof(b *bundle, fn func(*receipt.Proof)) {
	for _, proofs := range [][]receipt.Proof{b.Headers, b.Keys} {
		for i := range proofs {
			fn(&proofs[i])
		}
	}
	fn(&b.Tail)
}
