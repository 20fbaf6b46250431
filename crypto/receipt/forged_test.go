package receipt_test

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/receipt/receipttest"
)

// shape makes a log of the given origin and two bundles of different receipts in it.
type shape struct {
	name     string
	outcome  bool
	apart    bool // decision and outcome in two blocks
	evidence bool
	block    int // records in the decision's block
	chain    int // key statements
}

var shapes = []shape{
	{name: "decision only, block of 1", block: 1, chain: 1},
	{name: "outcome, block of 2", outcome: true, block: 2, chain: 1},
	{name: "outcome apart, evidence, blocks of 5, two keys", outcome: true, apart: true, evidence: true, block: 5, chain: 2},
	{name: "decision only, evidence, block of 257", evidence: true, block: 257, chain: 1},
}

func (s *shape) make(t testing.TB, origin string) (*receipttest.Log, *receipt.Bundle, *receipt.Bundle) {
	t.Helper()
	l := receipttest.New(t, origin)
	l.Rotate(t)
	fill := func(leaves [][]byte, n int) [][]byte {
		for len(leaves) < n {
			d, _ := l.NewDecision()
			leaves = append(leaves, receipt.AppendDecision(nil, d))
		}
		return leaves
	}
	type receiptAt struct {
		places   []receipttest.Place
		evidence *receipt.Evidence
	}
	var all [2]receiptAt
	for i := range all {
		before := (s.block - 1) / 2
		leaves := fill(nil, before)
		d, e := l.NewDecision()
		leaves = append(leaves, receipt.AppendDecision(nil, d))
		all[i].evidence = e
		if s.outcome && !s.apart {
			leaves = append(leaves, receipt.AppendOutcome(nil, l.NewOutcome(d)))
		}
		block := l.Seal(t, fill(leaves, s.block)...)
		all[i].places = append(all[i].places, receipttest.Place{Block: block, Index: before})
		if s.outcome && !s.apart {
			all[i].places = append(all[i].places, receipttest.Place{Block: block, Index: before + 1})
		}
		if s.apart {
			block = l.Seal(t, fill([][]byte{receipt.AppendOutcome(nil, l.NewOutcome(d))}, s.block)...)
			all[i].places = append(all[i].places, receipttest.Place{Block: block})
		}
	}
	l.SealHeader(t, l.NextHeader(receipt.HeaderHeartbeat))
	var bundles [2]*receipt.Bundle
	checkpoint := l.Checkpoint(t)
	for i := range all {
		bundles[i] = l.Bundle(t, checkpoint, s.chain, all[i].places...)
		if s.evidence {
			bundles[i].Evidence = all[i].evidence
		}
	}
	return l, bundles[0], bundles[1]
}

// TestForged forges bundles of several shapes in every field they have, 1,000 times each, and finds none that is accepted.
// What is the same bundle in another spelling, or an honest one that shows less, is no forgery: it is counted and drawn again.
func TestForged(t *testing.T) {
	n := perField
	if testing.Short() {
		n /= 10
	}
	for i, s := range shapes {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			l, good, other := s.make(t, testOrigin)
			_, foreign, _ := s.make(t, "example.org/knhk/2")
			text := l.PolicyText()
			f, err := receipttest.NewForger(good, text, other, foreign)
			if err != nil {
				t.Fatal(err)
			}
			v := receipt.NewVerifier(l.Policy(t))
			for _, b := range []*receipt.Bundle{good, other} {
				if _, err := v.Verify(b); err != nil {
					t.Fatal(err)
				}
			}
			total := 0
			for k := range f.Fields {
				field := &f.Fields[k]
				c := forge(t, f, field, v, text, n, rand.New(rand.NewPCG(uint64(i), uint64(k))))
				total += c.forged
				t.Logf("%-48s %d forged, %d refused by a parser; besides, %d spelled otherwise, %d shown with less",
					field.Name, c.forged, c.unparsed, c.same, c.less)
			}
			t.Logf("%d fields, %d forgeries, 0 accepted", len(f.Fields), total)
		})
	}
}

type forgeCount struct{ forged, unparsed, same, less int }

func forge(t *testing.T, f *receipttest.Forger, field *receipttest.ForgeField, v *receipt.Verifier, policy []byte, n int, r *rand.Rand) (c forgeCount) {
	t.Helper()
	for draws := 0; c.forged < n; draws++ {
		if draws == 100*n {
			t.Fatalf("%s: only %d of %d changes were forgeries", field.Name, c.forged, draws)
		}
		x := f.Forge(field, r)
		var err error
		switch {
		case x.Same:
			c.same++
			continue
		case x.Bundle == nil:
			c.unparsed++
			err = fmt.Errorf("does not parse")
		case string(x.Policy) == string(policy):
			_, err = v.Verify(x.Bundle)
		default:
			var p *receipt.Policy
			if p, err = receipt.ParsePolicy(x.Policy); err == nil {
				_, err = receipt.Verify(p, x.Bundle)
			}
		}
		if x.Less {
			c.less++
			continue
		}
		if err == nil {
			data, _ := x.Bundle.Marshal()
			t.Fatalf("%s: accepted under\n%s\n%s", field.Name, x.Policy, data)
		}
		c.forged++
	}
	return c
}
