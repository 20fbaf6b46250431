package receipt_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/receipt/receipttest"
)

func init() {
	attacks = append(attacks, timeAttacks...)
	attacks = append(attacks, evidenceAttacks...)
}

// Times that contradict each other by more than MaxSkew. TestAccepts has the same up to MaxSkew, which is accepted.
var timeAttacks = []attack{
	{"a decision after its block", "record 0: recorded", false, staged(func(s *scene) *bundle { return s.decisionLate(receipt.MaxSkew + 1) })},
	{"an outcome after its block", "record 1: recorded", false, staged(func(s *scene) *bundle { return s.outcomeLate(receipt.MaxSkew + 1) })},
	{"a block after the daily key's end", "after the daily key's end", false, staged(func(s *scene) *bundle {
		return s.blockAfterKey(receipt.MaxSkew + 1)
	})},
	{"a block after a witness saw it", "cosigned it", true, staged(func(s *scene) *bundle {
		return s.witnessed(-receipt.MaxSkew - time.Second)
	})},
	{"a daily key that begins after a witness saw its checkpoint", "cosigned the checkpoint", true, staged(func(s *scene) *bundle {
		return s.keyAfterWitness(receipt.MaxSkew + time.Second)
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
		h.Time = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC).Add(receipt.MaxKeyAge + by)
	})
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
	return s.both(unchanged)
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
