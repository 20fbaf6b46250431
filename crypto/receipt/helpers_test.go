package receipt_test

import (
	"bytes"
	"math/rand/v2"
	"strconv"
	"testing"

	"github.com/knhk/sidecar/crypto/receipt/receipttest"
)

// testKeys are keys of testOrigin.
var testKeys = struct{ identity, daily, other receipttest.Key }{
	receipttest.NewKey(new(testing.T), testOrigin, "identity"),
	receipttest.NewKey(new(testing.T), testOrigin, "daily"),
	receipttest.NewKey(new(testing.T), testOrigin, "other"),
}

// mutate returns a changed copy of b: a flipped bit, a replaced, lost, inserted, swapped or repeated piece, another number,
// a truncation. It may by chance be equal to b.
func mutate(r *rand.Rand, b []byte) []byte {
	c := bytes.Clone(b)
	if len(c) == 0 {
		return []byte{byte(r.Uint32())}
	}
	at := r.IntN(len(c))
	switch r.IntN(9) {
	case 0:
		c[at] ^= 1 << r.IntN(8)
	case 1:
		c[at] = byte(r.Uint32())
	case 2: // text for text
		c[at] = b[r.IntN(len(b))]
	case 3:
		return c[:at]
	case 4:
		return append(c[:at], c[min(len(c), at+1+r.IntN(4)):]...)
	case 5:
		piece := b[at:min(len(b), at+1+r.IntN(40))]
		to := r.IntN(len(c) + 1)
		return append(append(bytes.Clone(c[:to]), piece...), c[to:]...)
	case 6:
		other := r.IntN(len(c))
		c[at], c[other] = c[other], c[at]
	case 7: // a number, if there is one after at
		from := at
		for from < len(c) && (c[from] < '0' || c[from] > '9') {
			from++
		}
		to := from
		for to < len(c) && c[to] >= '0' && c[to] <= '9' {
			to++
		}
		if from == to {
			return append(c, b[at])
		}
		n, _ := strconv.ParseUint(string(c[from:to]), 10, 64)
		n = []uint64{n + 1, n - 1, 0, n * 10, 1 << 63, r.Uint64N(20)}[r.IntN(6)]
		return append(strconv.AppendUint(bytes.Clone(c[:from]), n, 10), c[to:]...)
	case 8:
		return append(append(bytes.Clone(c[:at]), byte(r.Uint32())), c[at:]...)
	}
	return c
}
