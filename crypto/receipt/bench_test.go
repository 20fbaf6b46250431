package receipt_test

import (
	"testing"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/receipt/receipttest"
)

// Figures of one core of an AMD EPYC with SHA extensions, Go 1.27.4, by
//
//	go test -run '^$' -bench . -cpu 1 ./crypto/receipt
//
// AppendDecision 145 ns and AppendOutcome 111 ns without allocation, LeafHash 0.32 us, ParseDecision 1.7 us, Tree 1.1 ms,
// Path 16 ns, ParseBundle 11 us, Verify 204 us, Verifier 14 us or 74,000 bundles a second.

func BenchmarkAppendID(b *testing.B) {
	b.ReportAllocs()
	var random [10]byte
	buf := make([]byte, 0, 128)
	for b.Loop() {
		buf = receipt.AppendID(buf[:0], 1772366400000, &random, "a")
	}
}

func BenchmarkAppendDecision(b *testing.B) {
	d, _ := receipttest.New(b, "example.org/knhk/1").NewDecision()
	buf := receipt.AppendDecision(nil, d)
	b.SetBytes(int64(len(buf)))
	b.ReportAllocs()
	for b.Loop() {
		buf = receipt.AppendDecision(buf[:0], d)
	}
}

func BenchmarkAppendOutcome(b *testing.B) {
	l := receipttest.New(b, "example.org/knhk/1")
	d, _ := l.NewDecision()
	o := l.NewOutcome(d)
	buf := receipt.AppendOutcome(nil, o)
	b.SetBytes(int64(len(buf)))
	b.ReportAllocs()
	for b.Loop() {
		buf = receipt.AppendOutcome(buf[:0], o)
	}
}

func BenchmarkCommitRequest(b *testing.B) {
	r := receipt.Request{
		Method: "GET", Scheme: "https", Authority: "shop.example.org", Path: "/cart?item=7",
		RequestID: "5f0c9d5e-0000-4000-8000-000000000001", Source: "10.0.0.7:41234",
	}
	var salt [32]byte
	b.ReportAllocs()
	for b.Loop() {
		r.Commit(&salt)
	}
}

func BenchmarkParseDecision(b *testing.B) {
	d, _ := receipttest.New(b, "example.org/knhk/1").NewDecision()
	leaf := receipt.AppendDecision(nil, d)
	b.SetBytes(int64(len(leaf)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := receipt.ParseDecision(leaf); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLeafHash(b *testing.B) {
	d, _ := receipttest.New(b, "example.org/knhk/1").NewDecision()
	leaf := receipt.AppendDecision(nil, d)
	b.SetBytes(int64(len(leaf)))
	b.ReportAllocs()
	for b.Loop() {
		receipt.LeafHash(leaf)
	}
}

// BenchmarkTree builds the tree of a block of 10,000 records.
func BenchmarkTree(b *testing.B) {
	leaves := make([]receipt.Hash, 10_000)
	b.ReportAllocs()
	for b.Loop() {
		receipt.NewTree(leaves)
	}
}

func BenchmarkPath(b *testing.B) {
	t := receipt.NewTree(make([]receipt.Hash, 10_000))
	buf := make([]receipt.Hash, 0, 64)
	b.ReportAllocs()
	for b.Loop() {
		buf = t.AppendPath(buf[:0], 7777)
	}
}

func BenchmarkParseBundle(b *testing.B) {
	_, bundle := receipttest.Sample(b, "example.org/knhk/1")
	data, err := bundle.Marshal()
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := receipt.ParseBundle(data); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkVerify is one bundle by itself: parse and verify, nothing remembered.
func BenchmarkVerify(b *testing.B) {
	l, bundle := receipttest.Sample(b, "example.org/knhk/1")
	data, err := bundle.Marshal()
	if err != nil {
		b.Fatal(err)
	}
	p := l.Policy(b)
	b.ReportAllocs()
	for b.Loop() {
		parsed, err := receipt.ParseBundle(data)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := receipt.Verify(p, parsed); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkVerifier is bulk verification: parse and verify the bundles of 512 requests that share 16 blocks and a checkpoint.
func BenchmarkVerifier(b *testing.B) {
	l := receipttest.New(b, "example.org/knhk/1")
	var places []receipttest.Place
	for range 16 {
		var leaves [][]byte
		for range 32 {
			d, _ := l.NewDecision()
			leaves = append(leaves, receipt.AppendDecision(nil, d), receipt.AppendOutcome(nil, l.NewOutcome(d)))
		}
		block := l.Seal(b, leaves...)
		for i := range leaves {
			places = append(places, receipttest.Place{Block: block, Index: i})
		}
	}
	checkpoint := l.Checkpoint(b)
	var all [][]byte
	for i := 0; i < len(places); i += 2 {
		data, err := l.Bundle(b, checkpoint, 1, places[i], places[i+1]).Marshal()
		if err != nil {
			b.Fatal(err)
		}
		all = append(all, data)
	}
	v := receipt.NewVerifier(l.Policy(b))
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		parsed, err := receipt.ParseBundle(all[i%len(all)])
		if err != nil {
			b.Fatal(err)
		}
		if _, err := v.Verify(parsed); err != nil {
			b.Fatal(err)
		}
		i++
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "bundles/s")
}
