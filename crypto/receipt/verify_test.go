package receipt_test

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"sync"
	"testing"

	"filippo.io/torchwood"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/receipt/receipttest"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

func TestVerifySample(t *testing.T) {
	l, b := receipttest.Sample(t, testOrigin)
	v, err := receipt.Verify(l.Policy(t), b)
	if err != nil {
		t.Fatal(err)
	}
	d, err := receipt.ParseDecision(b.Records[0].Leaf)
	if err != nil || !reflect.DeepEqual(&v.Decision, d) {
		t.Errorf("decision %+v, %v", v.Decision, err)
	}
	o, err := receipt.ParseOutcome(b.Records[1].Leaf)
	if err != nil || len(v.Outcomes) != 1 || !reflect.DeepEqual(&v.Outcomes[0], o) || v.Pending() {
		t.Errorf("outcomes %+v, %v", v.Outcomes, err)
	}
	if v.Origin != testOrigin || v.Identity != l.Identity.VKey || v.Size != uint64(len(l.Leaves)) || v.Root != l.Root(t, len(l.Leaves)) {
		t.Errorf("log %s, identity %s, size %d, root %s", v.Origin, v.Identity, v.Size, v.Root)
	}
	if !reflect.DeepEqual(v.Places, []receipt.Place{{Header: 0, Index: 2}, {Header: 1, Index: 1}}) {
		t.Errorf("places %+v", v.Places)
	}
	for i, block := range []int{3, 5} {
		if h := v.Headers[i]; h.Header != l.Blocks[block].Header || h.Index != uint64(l.Blocks[block].Index) {
			t.Errorf("header %d: %+v", i, h)
		}
	}
	for i, k := range v.Keys {
		if n := len(l.Daily) - 1 - i; k.Key != l.Daily[n].VKey || k.Index != uint64(l.Statements[n]) {
			t.Errorf("key %d: %+v", i, k)
		}
	}
	if !reflect.DeepEqual(v.Evidence, b.Evidence) || v.Evidence == b.Evidence {
		t.Errorf("evidence %+v", v.Evidence)
	}
}

// TestOuterProofIsC2SP has torchwood, which shares no code with our proof parser, verify the outer part.
func TestOuterProofIsC2SP(t *testing.T) {
	l, b := receipttest.Sample(t, testOrigin)
	p, err := torchwood.ParsePolicy(l.PolicyText())
	if err != nil {
		t.Fatal(err)
	}
	eachProof(b, func(proof *receipt.Proof) {
		if err := torchwood.VerifyProof(p, tlog.RecordHash(proof.Leaf), proof.Text); err != nil {
			t.Error(err)
		}
	})
}

// accepted has bundles at the edge of what is refused.
var accepted = map[string]func(testing.TB) (*log, *bundle){
	"one block":  staged(func(s *scene) *bundle { return s.both(unchanged) }),
	"two blocks": staged(func(s *scene) *bundle { return s.apart(unchanged) }),
	"a statement": stated(func(s *scene, ks *statement) (string, []note.Signer) {
		return receipt.KeyText(ks), []note.Signer{s.Identity, s.Daily[0]}
	}),
	"pending": staged(func(s *scene) *bundle {
		return s.Bundle(s.tb, nil, 1, place{Block: s.Seal(s.tb, s.decision(), s.outcome())})
	}),
	"unknown, then late": staged(func(s *scene) *bundle {
		return s.second(func(first, second *receipt.Outcome) { first.Result, second.Late = "unknown", true })
	}),
	"a late one alone": staged(func(s *scene) *bundle { s.o.Late = true; return s.both(unchanged) }),
	"the outcome in the final block of a crash, losses declared": staged(func(s *scene) *bundle {
		return s.apart(func(h *receipt.Header) {
			h.Kind, h.Recovered, h.LostFrom, h.LostTo = receipt.HeaderFinal, true, 2, 100
		})
	}),
	"the outcome in a later incarnation": staged(func(s *scene) *bundle {
		return s.apart(func(h *receipt.Header) { h.Incarnation[0]++; h.Seq = 1 })
	}),
	"ordinals with gaps": staged(func(s *scene) *bundle {
		s.o.Ordinal = 7
		return s.both(func(h *receipt.Header) { h.First, h.Last = 0, 7 })
	}),
	"a decision just not after its block": staged(func(s *scene) *bundle { return s.decisionLate(receipt.MaxSkew) }),
	"an outcome just not after its block": staged(func(s *scene) *bundle { return s.outcomeLate(receipt.MaxSkew) }),
	"a block just at the key's end":       staged(func(s *scene) *bundle { return s.blockAfterKey(0) }),
	"a last leaf just not before a block": staged(func(s *scene) *bundle { return s.tailBefore(0) }),
	"blocks of one time":                  staged(func(s *scene) *bundle { return s.blocksBack(0) }),
	"a witness":                           staged(func(s *scene) *bundle { return s.witnessed(0) }),
	"a witness with a slow clock":         staged(func(s *scene) *bundle { return s.witnessed(-receipt.MaxSkew) }),
	"a key that begins a little late":     staged(func(s *scene) *bundle { return s.keyAfterWitness(receipt.MaxSkew) }),
	"a line by somebody else": sampled(func(_ testing.TB, _ *log, b *bundle) {
		eachProof(b, func(p *receipt.Proof) { p.Text = append(bytes.Clone(p.Text), "— somebody.example AAAAAQA=\n"...) })
	}),
}

func TestAccepts(t *testing.T) {
	for name, fn := range accepted {
		t.Run(name, func(t *testing.T) {
			l, b := fn(t)
			v, err := receipt.Verify(l.Policy(t), b)
			if err != nil {
				t.Fatal(err)
			}
			if len(v.Cosignatures) != len(l.Witnesses) {
				t.Errorf("cosignatures %v", v.Cosignatures)
			}
			for _, line := range receipt.Describe(v) {
				if line == "" || strings.Contains(line, "\n") {
					t.Errorf("describe: %q", line)
				}
			}
		})
	}
}

func TestAttacks(t *testing.T) {
	for _, a := range attacks {
		t.Run(a.name, func(t *testing.T) {
			l, b := a.make(t)
			_, err := receipt.Verify(l.Policy(t), b)
			if err == nil || !strings.Contains(err.Error(), a.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want one line with %q", err, a.want)
			}
		})
	}
}

// TestVerifierRemembersOnlyTruth gives one Verifier good bundles and attacks in turn: what it remembers of the good ones
// must not let an attack pass, nor the reverse.
func TestVerifierRemembersOnlyTruth(t *testing.T) {
	l, good := receipttest.Sample(t, testOrigin)
	v := receipt.NewVerifier(l.Policy(t))
	want, err := v.Verify(good)
	if err != nil {
		t.Fatal(err)
	}
	want.Headers[0].Count, want.Keys[0].Key, want.Evidence.Fields[0].Value = 99, "changed", "changed" // by a careless caller
	for _, a := range attacks {
		other, b := a.make(t)
		if len(other.Witnesses) > 0 {
			continue // it is refused under its own policy only
		}
		if _, err := v.Verify(b); err == nil {
			t.Errorf("%s: accepted", a.name)
		}
		if _, err := v.Verify(good); err != nil {
			t.Fatalf("after %s: %v", a.name, err)
		}
	}
	again, err := v.Verify(good)
	if err != nil {
		t.Fatal(err)
	}
	fresh, err := receipt.Verify(l.Policy(t), good)
	if err != nil || !reflect.DeepEqual(again, fresh) {
		t.Errorf("remembered %+v, fresh %+v, %v", again, fresh, err)
	}
}

// TestVerifierForgets verifies more headers than a Verifier remembers, twice.
func TestVerifierForgets(t *testing.T) {
	l := receipttest.New(t, testOrigin)
	for range 2500 {
		d, _ := l.NewDecision()
		l.Seal(t, receipt.AppendDecision(nil, d))
	}
	checkpoint := l.Checkpoint(t)
	var bundles []*bundle
	for _, block := range l.Blocks[1:] {
		bundles = append(bundles, l.Bundle(t, checkpoint, 1, place{Block: block}))
	}
	v := receipt.NewVerifier(l.Policy(t))
	var wg sync.WaitGroup
	errs := make([]error, 2)
	for i := range errs {
		wg.Go(func() {
			for _, b := range bundles {
				_, err := v.Verify(b)
				errs[i] = errors.Join(errs[i], err)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}
