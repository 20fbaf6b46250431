package receipt_test

import (
	"bytes"
	"encoding/base64"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/receipt/receipttest"
	"golang.org/x/mod/sumdb/note"
)

func init() {
	attacks = append(attacks, timeAttacks...)
	attacks = append(attacks, evidenceAttacks...)
	attacks = append(attacks, narrowAttacks...)
}

// Times that contradict each other by more than MaxSkew. TestAccepts has the same up to MaxSkew, which is accepted.
var timeAttacks = []attack{
	{"a decision after its block", "record 0: recorded", false, staged(func(s *scene) *bundle { return s.decisionLate(receipt.MaxSkew + 1) })},
	{"an outcome after its block", "record 1: recorded", false, staged(func(s *scene) *bundle { return s.outcomeLate(receipt.MaxSkew + 1) })},
	{"a block after the daily key's end", "after the daily key's end", false, staged(func(s *scene) *bundle { return s.blockAfterKey(1) })},
	{"a block before the daily key's begin", "before the daily key's begin", false, staged(func(s *scene) *bundle {
		return s.both(func(h *receipt.Header) { h.Time = beginning })
	})},
	{"a block after the last leaf", "after the last leaf", false, staged(func(s *scene) *bundle { return s.tailBefore(1) })},
	{"blocks whose times go back", "time goes back", false, staged(func(s *scene) *bundle { return s.blocksBack(1) })},
	{"a block after a witness saw it", "cosigned it", true, staged(func(s *scene) *bundle {
		return s.witnessed(-receipt.MaxSkew - time.Second)
	})},
	{"a daily key that begins after a witness saw its checkpoint", "after \"w.example\" cosigned", true, staged(func(s *scene) *bundle {
		return s.keyAfterWitness(receipt.MaxSkew + time.Second)
	})},
	{"a daily key that ended before a witness saw its checkpoint", "before \"w.example\" cosigned", true, staged(func(s *scene) *bundle {
		return s.witnessed(receipt.MaxKeyAge + receipt.MaxSkew)
	})},
	{"a witness that did not sign", "checkpoint", true, staged(func(s *scene) *bundle {
		b := s.both(unchanged)
		s.Witnesses = []receipttest.Key{receipttest.Witness(s.tb, "w.example", "w", s.Now)}
		return b
	})},
	{"a witness's signature of another checkpoint", "checkpoint", true, staged(func(s *scene) *bundle {
		w := receipttest.Witness(s.tb, "w.example", "w", s.Now)
		s.Witnesses = []receipttest.Key{w}
		old := s.Checkpoint(s.tb)
		line := old[bytes.LastIndex(old, []byte("— ")):]
		s.Witnesses = nil
		s.both(unchanged)
		b := s.Bundle(s.tb, append(s.Checkpoint(s.tb), line...), 1, place{Block: s.Blocks[1]})
		s.Witnesses = []receipttest.Key{w}
		return b
	})},
}

func (s *scene) decisionLate(by time.Duration) *bundle {
	return s.both(func(h *receipt.Header) { s.d.Time = h.Time.Add(by) })
}

func (s *scene) outcomeLate(by time.Duration) *bundle {
	return s.both(func(h *receipt.Header) { s.o.Time = h.Time.Add(by) })
}

func (s *scene) blockAfterKey(by time.Duration) *bundle {
	return s.both(func(h *receipt.Header) {
		h.Time = beginning.Add(time.Millisecond + receipt.MaxKeyAge + by) // the first key begins a millisecond after the log
	})
}

// beginning is when a log of receipttest begins, before its first key does.
var beginning = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// tailBefore has a last leaf that is so much older than the records' block.
func (s *scene) tailBefore(by time.Duration) *bundle {
	s.both(unchanged)
	h := s.NextHeader(receipt.HeaderHeartbeat)
	h.Time = s.Blocks[1].Header.Time.Add(-by)
	s.SealHeader(s.tb, h)
	return s.Bundle(s.tb, nil, 1, place{Block: s.Blocks[1]}, place{Block: s.Blocks[1], Index: 1})
}

// blocksBack has an outcome in a block that is so much older than the decision's.
func (s *scene) blocksBack(by time.Duration) *bundle {
	s.apart(func(h *receipt.Header) { h.Time = s.Blocks[1].Header.Time.Add(-by) })
	s.SealHeader(s.tb, s.NextHeader(receipt.HeaderHeartbeat))
	return s.Bundle(s.tb, nil, 1, place{Block: s.Blocks[1]}, place{Block: s.Blocks[2]})
}

// witnessed is cosigned that much after its header, whose time is on the second, as cosignatures are.
func (s *scene) witnessed(after time.Duration) *bundle {
	s.both(func(h *receipt.Header) { h.Time = h.Time.Truncate(time.Second).Add(time.Second) })
	s.Witnesses = []receipttest.Key{receipttest.Witness(s.tb, "w.example", "w", s.Blocks[1].Header.Time.Add(after))}
	return s.Bundle(s.tb, nil, 1, place{Block: s.Blocks[1]}, place{Block: s.Blocks[1], Index: 1})
}

// keyAfterWitness has a daily key that begins that much after the cosignature.
func (s *scene) keyAfterWitness(by time.Duration) *bundle {
	at := s.Now.Truncate(time.Second).Add(time.Second)
	s.RotateTo(s.tb, testKeys.daily, &receipt.KeyStatement{
		Origin: testOrigin, NotBefore: at.Add(by), NotAfter: at.Add(by + 1), FirstSize: 2, FirstRoot: s.Root(s.tb, 2),
	})
	s.Witnesses = []receipttest.Key{receipttest.Witness(s.tb, "w.example", "w", at)}
	return s.both(func(h *receipt.Header) { h.Time = at.Add(by) })
}

var evidenceAttacks = []attack{
	{"evidence of another receipt", "it is for receipt", false, sampled(func(_ testing.TB, l *log, b *bundle) {
		_, b.Evidence = l.NewDecision()
	})},
	{"another receipt's salt", "does not open", false, sampled(func(_ testing.TB, l *log, b *bundle) {
		_, e := l.NewDecision()
		b.Evidence.Salt = e.Salt
	})},
	{"another value", "does not open", false, sampled(func(_ testing.TB, _ *log, b *bundle) { b.Evidence.Fields[3].Value = "/cart?item=8" })},
	{"another name", "does not open", false, sampled(func(_ testing.TB, _ *log, b *bundle) { b.Evidence.Fields[3].Name = "url" })},
	{"a field less", "does not open", false, sampled(func(_ testing.TB, _ *log, b *bundle) { b.Evidence.Fields = b.Evidence.Fields[1:] })},
	{"fields in another order", "does not open", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		f := b.Evidence.Fields
		f[0], f[1] = f[1], f[0]
	})},
	{"a byte moved from value to name", "does not open", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		f := b.Evidence.Fields
		f[0] = receipt.Field{Name: "methodG", Value: "ET"}
	})},
	{"no fields", "0 fields", true, sampled(func(_ testing.TB, _ *log, b *bundle) { b.Evidence.Fields = nil })},
	{"two fields of one name", "two named", true, sampled(func(_ testing.TB, _ *log, b *bundle) { b.Evidence.Fields[1].Name = "method" })},
}

// Bundles that one single check refuses: without it they would pass for whoever wrote the other checks with care.
var narrowAttacks = []attack{
	{"a decision marked as an outcome", "record 0: parse decision", false, staged(func(s *scene) *bundle {
		leaf := bytes.Replace(s.decision(), []byte(receipt.DecisionPrefix), []byte(receipt.OutcomePrefix), 1)
		return s.Bundle(s.tb, nil, 1, place{Block: s.Seal(s.tb, leaf, s.outcome())})
	})},
	{"a header marked as a decision", "header 0: parse header", false, staged(func(s *scene) *bundle {
		b := s.both(unchanged)
		leaf := bytes.Replace(b.Headers[0].Leaf, []byte(receipt.HeaderPrefix), []byte(receipt.DecisionPrefix), 1)
		index := s.Append(s.tb, leaf)
		s.SealHeader(s.tb, s.NextHeader(receipt.HeaderHeartbeat))
		checkpoint := s.Checkpoint(s.tb)
		b.Headers[0], b.Keys[0], b.Tail = s.Proof(s.tb, index, checkpoint), s.Proof(s.tb, 0, checkpoint), s.Proof(s.tb, len(s.Leaves)-1, checkpoint)
		return b
	})},
	{"a key statement marked as a header", "key statement 0", false, stated(func(s *scene, ks *statement) (string, []note.Signer) {
		text := strings.Replace(receipt.KeyText(ks), receipt.KeyPrefix, receipt.HeaderPrefix, 1)
		return text, []note.Signer{s.Identity, s.Daily[0]}
	})},
	{"a key of this log for another", "not after the origin", false, stated(func(s *scene, ks *statement) (string, []note.Signer) {
		ks.Origin = "example.org/knhk/2"
		return receipt.KeyText(ks), []note.Signer{s.Identity, s.Daily[0]}
	})},
	{"a daily key named after another log, in force", "not after the origin", false, staged(func(s *scene) *bundle {
		other := receipttest.NewKey(s.tb, "example.org/knhk/2", "daily")
		text := receipt.KeyText(&statement{
			Origin: testOrigin, Key: other.VKey, NotBefore: s.Now, NotAfter: s.Now.Add(time.Hour), FirstRoot: receipt.EmptyRoot,
		})
		leaf, err := note.Sign(&note.Note{Text: text}, s.Identity)
		if err != nil {
			s.tb.Fatal(err)
		}
		s.Statements = append(s.Statements, s.Append(s.tb, leaf))
		block := s.Seal(s.tb, s.decision(), s.outcome())
		return s.Bundle(s.tb, s.SignCheckpoint(s.tb, s.Identity, other), 1, place{Block: block})
	})},
	{"an ordinal too high for its index", "ordinal 5 cannot be record 0", false, staged(func(s *scene) *bundle {
		s.d.Ordinal = 5
		h := s.NextHeader(receipt.HeaderBlock)
		h.First, h.Last = 4, 5
		return s.Bundle(s.tb, nil, 1, place{Block: s.SealHeader(s.tb, h, s.decision(), s.outcome())})
	})},
	{"an ordinal too low for its index", "ordinal 4 cannot be record 1", false, staged(func(s *scene) *bundle {
		s.d.Ordinal = 4
		h := s.NextHeader(receipt.HeaderBlock)
		h.First, h.Last = 4, 5
		return s.Bundle(s.tb, nil, 1, place{Block: s.SealHeader(s.tb, h, s.outcome(), s.decision()), Index: 1})
	})},
	{"a hash before a record's path", "record 0: verify path", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		b.Records[0].Path = slices.Insert(b.Records[0].Path, 0, receipt.Hash{})
	})},
	{"a hash before a header's path", "header 0: proof: not included", false, sampled(func(_ testing.TB, _ *log, b *bundle) {
		line := "index 5\n" + receipt.EmptyRoot.String() + "\n"
		b.Headers[0].Text = bytes.Replace(b.Headers[0].Text, []byte("index 5\n"), []byte(line), 1)
	})},
	{"an index after the last leaf", "index 3 in a log of 3", false, staged(func(s *scene) *bundle {
		b := s.both(unchanged)
		b.Headers[0].Text = bytes.Replace(b.Headers[0].Text, []byte("index 2\n"), []byte("index 3\n"), 1)
		return b
	})},
	// RFC 8032 section 5.1.7: S is less than the order of the group, or everybody could turn a signature into another.
	{"a signature with the order added to S", "checkpoint", false, resigned(func(sig []byte) []byte {
		order, _ := new(big.Int).SetString("7237005577332262213973186563042994240857116359379907606001950938285454250989", 10)
		s := slices.Clone(sig[32:])
		slices.Reverse(s) // S is little endian
		new(big.Int).Add(new(big.Int).SetBytes(s), order).FillBytes(s)
		slices.Reverse(s)
		return append(slices.Clone(sig[:32]), s...)
	})},
	{"a signature with a byte more", "checkpoint", false, resigned(func(sig []byte) []byte { return append(sig, 0) })},
	{"no signature, only the key's hash", "checkpoint", false, resigned(func(sig []byte) []byte { return sig[:1] })},
}

// resigned changes the identity key's signature of the checkpoint, in all proofs alike.
func resigned(change func(sig []byte) []byte) func(testing.TB) (*log, *bundle) {
	return sampled(func(tb testing.TB, _ *log, b *bundle) {
		eachProof(b, func(p *receipt.Proof) {
			at := bytes.Index(p.Text, []byte("— "))
			line, rest, _ := strings.Cut(string(p.Text[at:]), "\n")
			space := strings.LastIndexByte(line, ' ')
			raw, err := base64.StdEncoding.DecodeString(line[space+1:])
			if err != nil {
				tb.Fatal(err)
			}
			raw = append(raw[:4:4], change(raw[4:])...) // after the key's hash
			p.Text = []byte(string(p.Text[:at]) + line[:space+1] + base64.StdEncoding.EncodeToString(raw) + "\n" + rest)
		})
	})
}
