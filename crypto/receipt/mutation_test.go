package receipt_test

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"reflect"
	"testing"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/receipt/receipttest"
)

// perField is how many mutations each field gets.
const perField = 1000

func mutateNumber(n uint64, r *rand.Rand) uint64 {
	return []uint64{n + 1, n - 1, n ^ 1<<r.IntN(64), r.Uint64(), r.Uint64N(10)}[r.IntN(5)]
}

func mutateText(r *rand.Rand, s *string) { *s = string(mutate(r, []byte(*s))) }

// mutations change one field of the sample bundle. A change may by chance leave it as it was.
var mutations = []struct {
	name   string
	change func(r *rand.Rand, b *receipt.Bundle)
}{
	{"decision leaf", func(r *rand.Rand, b *receipt.Bundle) { b.Records[0].Leaf = mutate(r, b.Records[0].Leaf) }},
	{"outcome leaf", func(r *rand.Rand, b *receipt.Bundle) { b.Records[1].Leaf = mutate(r, b.Records[1].Leaf) }},
	{"record header", func(r *rand.Rand, b *receipt.Bundle) { b.Records[r.IntN(2)].Header = r.IntN(12) - 4 }},
	{"record index", func(r *rand.Rand, b *receipt.Bundle) { x := &b.Records[r.IntN(2)].Index; *x = mutateNumber(*x, r) }},
	{"record size", func(r *rand.Rand, b *receipt.Bundle) { x := &b.Records[r.IntN(2)].Size; *x = mutateNumber(*x, r) }},
	{"record path", func(r *rand.Rand, b *receipt.Bundle) { mutatePath(r, b) }},
	{"header leaf", func(r *rand.Rand, b *receipt.Bundle) { x := &b.Headers[r.IntN(2)].Leaf; *x = mutate(r, *x) }},
	{"header proof", func(r *rand.Rand, b *receipt.Bundle) { x := &b.Headers[r.IntN(2)].Text; *x = mutate(r, *x) }},
	{"key leaf", func(r *rand.Rand, b *receipt.Bundle) { x := &b.Keys[r.IntN(2)].Leaf; *x = mutate(r, *x) }},
	{"key proof", func(r *rand.Rand, b *receipt.Bundle) { x := &b.Keys[r.IntN(2)].Text; *x = mutate(r, *x) }},
	{"tail leaf", func(r *rand.Rand, b *receipt.Bundle) { b.Tail.Leaf = mutate(r, b.Tail.Leaf) }},
	{"tail proof", func(r *rand.Rand, b *receipt.Bundle) { b.Tail.Text = mutate(r, b.Tail.Text) }},
	{"pin size", func(r *rand.Rand, b *receipt.Bundle) { b.Pins[0].Size = mutateNumber(b.Pins[0].Size, r) }},
	{"pin root", func(r *rand.Rand, b *receipt.Bundle) { b.Pins[0].Root[r.IntN(32)] ^= byte(1 + r.IntN(255)) }},
	{"pin proof", func(r *rand.Rand, b *receipt.Bundle) {
		p := &b.Pins[0].Proof
		switch at := r.IntN(len(*p)); r.IntN(3) {
		case 0:
			(*p)[at][r.IntN(32)] ^= byte(1 + r.IntN(255))
		case 1:
			*p = append((*p)[:at], (*p)[at+1:]...)
		case 2:
			*p = append(*p, (*p)[at])
		}
	}},
	{"checkpoint, everywhere alike", func(r *rand.Rand, b *receipt.Bundle) {
		split := bytes.Index(b.Headers[0].Text, []byte("\n\n")) + 2
		changed := mutate(r, b.Headers[0].Text[split:])
		eachProof(b, func(p *receipt.Proof) {
			split := bytes.Index(p.Text, []byte("\n\n")) + 2
			p.Text = append(bytes.Clone(p.Text[:split]), changed...)
		})
	}},
	{"evidence id", func(r *rand.Rand, b *receipt.Bundle) { mutateText(r, &b.Evidence.ID) }},
	{"evidence salt", func(r *rand.Rand, b *receipt.Bundle) { b.Evidence.Salt[r.IntN(32)] ^= byte(1 + r.IntN(255)) }},
	{"evidence name", func(r *rand.Rand, b *receipt.Bundle) { mutateText(r, &b.Evidence.Fields[r.IntN(6)].Name) }},
	{"evidence value", func(r *rand.Rand, b *receipt.Bundle) { mutateText(r, &b.Evidence.Fields[r.IntN(6)].Value) }},
	{"order of parts", func(r *rand.Rand, b *receipt.Bundle) { reorder(r, b) }},
}

// TestMutations changes a valid bundle in one field at a time, 1,000 times each, and finds none that still verifies. A
// change that by chance leaves the bundle as it was is no mutation and is drawn again.
func TestMutations(t *testing.T) {
	l, good := receipttest.Sample(t, testOrigin)
	v := receipt.NewVerifier(l.Policy(t))
	if _, err := v.Verify(good); err != nil {
		t.Fatal(err)
	}
	for i, field := range mutations {
		t.Run(field.name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(11, uint64(i)))
			for n := 0; n < perField; {
				b := good.Clone()
				field.change(r, b)
				if reflect.DeepEqual(b, good) {
					continue
				}
				n++
				if _, err := v.Verify(b); err == nil {
					data, _ := b.Marshal()
					t.Fatalf("accepted:\n%s", data)
				}
			}
		})
	}
}

// TestJSONMutations changes the JSON text of a bundle. White space between tokens and escapes of the outer JSON have other
// spellings, so what is parsed to the very same bundle is no mutation; everything else must be refused.
func TestJSONMutations(t *testing.T) {
	l, good := receipttest.Sample(t, testOrigin)
	data, err := good.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	v := receipt.NewVerifier(l.Policy(t))
	r := rand.New(rand.NewPCG(12, 0))
	same, unparsed := 0, 0
	for n := 0; n < 20*perField; {
		b, err := receipt.ParseBundle(mutate(r, data))
		switch {
		case err != nil:
			unparsed++
		case reflect.DeepEqual(b, good):
			same++
			continue
		default:
			if _, err := v.Verify(b); err == nil {
				t.Fatal("accepted")
			}
		}
		n++
	}
	t.Logf("%d refused by the parser, %d by the verifier; %d were spellings of the same bundle", unparsed, 20*perField-unparsed, same)
}

// TestMutatedNumbers replaces each number of the parsed JSON by its neighbours, which no random change finds for sure.
func TestMutatedNumbers(t *testing.T) {
	l, good := receipttest.Sample(t, testOrigin)
	p := l.Policy(t)
	for i := range good.Records {
		for _, delta := range []uint64{1, ^uint64(0)} {
			index, size := good.Clone(), good.Clone()
			index.Records[i].Index += delta
			size.Records[i].Size += delta
			_, err1 := receipt.Verify(p, index)
			_, err2 := receipt.Verify(p, size)
			if err1 == nil || err2 == nil {
				t.Errorf("record %d %+d: %v, %v", i, int64(delta), err1, err2)
			}
		}
	}
}

func mutatePath(r *rand.Rand, b *receipt.Bundle) {
	x := &b.Records[r.IntN(2)]
	at := r.IntN(len(x.Path))
	switch r.IntN(4) {
	case 0:
		x.Path[at][r.IntN(32)] ^= 1 << r.IntN(8)
	case 1:
		x.Path = append(x.Path[:at], x.Path[at+1:]...)
	case 2:
		x.Path = append(x.Path, x.Path[at])
	case 3:
		other := r.IntN(len(x.Path))
		x.Path[at], x.Path[other] = x.Path[other], x.Path[at]
	}
}

// reorder swaps, drops or repeats whole parts. A bundle may be told with less: without its outcome (then it is pending),
// without the older key or without evidence. Those changes are taken back here; TestLess has them.
func reorder(r *rand.Rand, b *receipt.Bundle) {
	switch r.IntN(8) {
	case 0:
		b.Records[0], b.Records[1] = b.Records[1], b.Records[0]
	case 1:
		b.Records = b.Records[1:]
	case 2:
		b.Records = append(b.Records, b.Records[r.IntN(2)])
	case 3:
		b.Headers[0], b.Headers[1] = b.Headers[1], b.Headers[0]
	case 4:
		b.Headers = append(b.Headers, b.Headers[r.IntN(2)])
	case 5:
		b.Headers = b.Headers[:1]
	case 6:
		b.Keys = b.Keys[1:]
	case 7:
		b.Keys = append(b.Keys, b.Keys[r.IntN(2)])
	}
}

// TestLess shows what a bundle still proves when honest parts are left out, as the package comment says.
func TestLess(t *testing.T) {
	l, good := receipttest.Sample(t, testOrigin)
	b := good.Clone()
	b.Records, b.Headers, b.Keys, b.Evidence = b.Records[:1], b.Headers[:1], b.Keys[:1], nil
	v, err := receipt.Verify(l.Policy(t), b)
	if err != nil || !v.Pending() || v.Evidence != nil || len(v.Keys) != 1 {
		t.Errorf("%+v, %v", v, err)
	}
}

func TestBundleJSON(t *testing.T) {
	_, good := receipttest.Sample(t, testOrigin)
	for _, change := range []func(b *receipt.Bundle){
		func(b *receipt.Bundle) {},
		func(b *receipt.Bundle) { b.Evidence = nil },
		func(b *receipt.Bundle) { b.Evidence.Fields[0].Value = "\xff\x00" },
		func(b *receipt.Bundle) { b.Records[0].Path = nil },
	} {
		b := good.Clone()
		change(b)
		data, err := b.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		got, err := receipt.ParseBundle(data)
		if err != nil || !reflect.DeepEqual(got, b) {
			t.Errorf("%v\n%+v\n%+v", err, got, b)
		}
		var compact bytes.Buffer
		if err := json.Compact(&compact, data); err != nil {
			t.Fatal(err)
		}
		if got, err := receipt.ParseBundle(compact.Bytes()); err != nil || !reflect.DeepEqual(got, b) {
			t.Errorf("compact: %v", err)
		}
	}
	for name, change := range map[string]func(b *receipt.Bundle){
		"a leaf that is not UTF-8": func(b *receipt.Bundle) { b.Records[0].Leaf = []byte("\xff") },
		"an empty leaf":            func(b *receipt.Bundle) { b.Records[0].Leaf = nil },
		"a negative header":        func(b *receipt.Bundle) { b.Records[0].Header = -1 },
		"64 hashes":                func(b *receipt.Bundle) { b.Records[0].Path = make([]receipt.Hash, 64) },
		"too large":                func(b *receipt.Bundle) { b.Keys[0].Text = bytes.Repeat([]byte("x"), receipt.MaxBundle) },
		"evidence without fields":  func(b *receipt.Bundle) { b.Evidence.Fields = nil },
	} {
		b := good.Clone()
		change(b)
		if _, err := b.Marshal(); err == nil {
			t.Errorf("%s: marshalled", name)
		}
	}
}

func TestParseBundleRefuses(t *testing.T) {
	_, good := receipttest.Sample(t, testOrigin)
	data, err := good.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	replace := func(old, new string) []byte {
		if !bytes.Contains(data, []byte(old)) {
			t.Fatalf("no %q in the bundle", old)
		}
		return bytes.Replace(data, []byte(old), []byte(new), 1)
	}
	for name, b := range map[string][]byte{
		"empty":                  nil,
		"an array":               []byte("[]"),
		"another version":        replace("bundle/v1", "bundle/v2"),
		"no version":             replace(`"bundle": "knhk/bundle/v1",`, ""),
		"an unknown member":      replace(`"records"`, `"x": 1, "records"`),
		"members swapped":        replace(`"index": "2",`+"\n      "+`"size": "5"`, `"size": "5", "index": "2"`),
		"a member twice":         replace(`"index": "2"`, `"index": "2", "index": "2"`),
		"an index as a number":   replace(`"index": "2"`, `"index": 2`),
		"a header as a string":   replace(`"header": 0`, `"header": "0"`),
		"a header of 8":          replace(`"header": 0`, `"header": 8`),
		"a null path":            replace(`"path": [`, `"path": null, "x": [`),
		"a second object":        append(bytes.Clone(data), data...),
		"text after it":          append(bytes.Clone(data), 'x'),
		"a comment":              replace(`"records"`, `/* */ "records"`),
		"a truncated one":        data[:len(data)/2],
		"deep nesting":           bytes.Repeat([]byte("["), 200_000),
		"more than a mebibyte":   append(bytes.Clone(data), bytes.Repeat([]byte(" "), receipt.MaxBundle)...),
		"evidence that is null":  replace(`"evidence": {`, `"evidence": null, "x": {`),
		"evidence of a v2":       replace("evidence/v1", "evidence/v2"),
		"a byte that isn't UTF8": replace("shop", "sh\xffp"),
	} {
		if got, err := receipt.ParseBundle(b); err == nil {
			t.Errorf("%s: accepted: %+v", name, got)
		} else if bytes.Contains([]byte(err.Error()), []byte("\n")) {
			t.Errorf("%s: %q", name, err)
		}
	}
}
