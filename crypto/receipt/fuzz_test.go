package receipt_test

import (
	"bytes"
	"math/rand/v2"
	"os"
	"reflect"
	"testing"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/receipt/receipttest"
)

// fuzzLeaf feeds one parser: what it accepts must be spelled as the appender spells it.
func fuzzLeaf(f *testing.F, name string) {
	for _, k := range kinds {
		if k.name != name {
			continue
		}
		r := rand.New(rand.NewPCG(14, 0))
		for range 8 {
			f.Add(k.append(k.any(r)))
		}
		f.Fuzz(func(t *testing.T, leaf []byte) {
			before := bytes.Clone(leaf)
			x, err := k.parse(leaf)
			if !bytes.Equal(before, leaf) {
				t.Fatal("the parser changed its input")
			}
			if err != nil {
				if bytes.ContainsRune([]byte(err.Error()), '\n') {
					t.Fatalf("an error of several lines: %q", err)
				}
				return
			}
			if text := noteText(x); text != "" {
				if !bytes.HasPrefix(leaf, []byte(text+"\n— ")) {
					t.Fatalf("two spellings of %s", leaf)
				}
				return
			}
			if again := k.append(x); !bytes.Equal(again, leaf) {
				t.Fatalf("two spellings:\n%s\n%s", leaf, again)
			}
		})
	}
}

func FuzzParseDecision(f *testing.F)     { fuzzLeaf(f, "decision") }
func FuzzParseOutcome(f *testing.F)      { fuzzLeaf(f, "outcome") }
func FuzzParseHeader(f *testing.F)       { fuzzLeaf(f, "header") }
func FuzzParseKeyStatement(f *testing.F) { fuzzLeaf(f, "key") }
func FuzzParseSeal(f *testing.F)         { fuzzLeaf(f, "seal") }
func FuzzParseRevocation(f *testing.F)   { fuzzLeaf(f, "revocation") }
func FuzzParseEvidence(f *testing.F)     { fuzzLeaf(f, "evidence") }

func FuzzParseID(f *testing.F) {
	f.Add(testID)
	f.Add("017F22e2-79b0-7cc3-98c4-dc0c0c07398f.a-b")
	f.Fuzz(func(t *testing.T, s string) {
		id, instance, err := receipt.ParseID(s)
		if err == nil && id.String()+"."+instance != s {
			t.Fatalf("two spellings of %q", s)
		}
	})
}

func FuzzParsePolicy(f *testing.F) {
	l, _ := receipttest.Sample(f, testOrigin)
	l.Witnesses = []receipttest.Key{receipttest.Witness(f, "w.example", "w", l.Now)}
	f.Add(l.PolicyText())
	f.Add([]byte("log " + l.Identity.VKey + " # comment\nquorum none"))
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := receipt.ParsePolicy(text)
		if err != nil {
			return
		}
		for _, origin := range p.Origins() {
			if vkey, ok := p.Identity(origin); !ok || !bytes.Contains(text, []byte(vkey)) {
				t.Fatalf("identity %q of %q is not in the file", vkey, origin)
			}
		}
	})
}

// FuzzVerify parses bundles and verifies them under the policy of a log whose records are known: nothing else may verify.
func FuzzVerify(f *testing.F) {
	l, good := receipttest.Sample(f, testOrigin)
	p := l.Policy(f)
	data, err := good.Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	if stored, err := os.ReadFile("testdata/bundle.json"); err == nil {
		f.Add(bytes.ReplaceAll(stored, []byte("  "), nil))
	}
	for _, a := range attacks {
		if _, b := a.make(f); !a.goOnly {
			if data, err := b.Marshal(); err == nil {
				f.Add(data)
			}
		}
	}
	known := map[string]bool{}
	for _, block := range l.Blocks {
		for _, leaf := range block.Leaves {
			known[string(leaf)] = true
		}
	}
	v := receipt.NewVerifier(p)
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := receipt.ParseBundle(data)
		if err != nil {
			return
		}
		again, err := b.Marshal()
		if err != nil && len(data) < receipt.MaxBundle/8 { // indented and escaped, a bundle can outgrow the bound
			t.Fatalf("parsed, but cannot be written: %v", err)
		}
		if err == nil {
			if c, err := receipt.ParseBundle(again); err != nil || !reflect.DeepEqual(b, c) {
				t.Fatalf("changed on the way: %v", err)
			}
		}
		got, err1 := v.Verify(b)
		fresh, err2 := receipt.Verify(p, b)
		if (err1 == nil) != (err2 == nil) || !reflect.DeepEqual(got, fresh) {
			t.Fatalf("remembering changes the verdict: %v, %v", err1, err2)
		}
		if err1 != nil {
			return
		}
		for i, r := range b.Records {
			if !known[string(r.Leaf)] {
				t.Fatalf("record %d was never in the log: %s", i, r.Leaf)
			}
		}
	})
}
