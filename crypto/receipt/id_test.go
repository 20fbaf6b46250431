package receipt_test

import (
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/knhk/sidecar/crypto/receipt"
)

// TestIDVector is the example of RFC 9562 appendix A.6.
func TestIDVector(t *testing.T) {
	random := [10]byte{0x0C, 0xC3, 0x18, 0xC4, 0xDC, 0x0C, 0x0C, 0x07, 0x39, 0x8F}
	got, _ := receipt.NewID(time.UnixMilli(0x017F22E279B0), &random, "a")
	if want := "017f22e2-79b0-7cc3-98c4-dc0c0c07398f.a"; got != want {
		t.Fatalf("got %s, want %s", got, want)
	}
}

func TestIDRoundTrip(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 123_000_000, time.UTC)
	for _, instance := range []string{"a", "knhk-0", strings.Repeat("x", receipt.MaxInstance)} {
		for _, fill := range []byte{0x00, 0xff, 0x5a} {
			var random [10]byte
			for i := range random {
				random[i] = fill
			}
			s, made := receipt.NewID(now, &random, instance)
			id, got, err := receipt.ParseID(s)
			if err != nil || got != instance || id != made {
				t.Fatalf("ParseID(%q) = %q, %v", s, got, err)
			}
			if id.Version() != 7 || id.Variant() != uuid.RFC4122 || !receipt.IDTime(id).Equal(now) {
				t.Errorf("%s: version %d, variant %v, time %v", s, id.Version(), id.Variant(), receipt.IDTime(id))
			}
		}
	}
}

func TestParseIDRefuses(t *testing.T) {
	const good = "017f22e2-79b0-7cc3-98c4-dc0c0c07398f"
	for name, s := range map[string]string{
		"empty":                   "",
		"no instance":             good,
		"empty instance":          good + ".",
		"upper case hex":          strings.ToUpper(good) + ".a",
		"version 4":               "017f22e2-79b0-4cc3-98c4-dc0c0c07398f.a",
		"Microsoft variant":       "017f22e2-79b0-7cc3-d8c4-dc0c0c07398f.a",
		"not hex":                 "017f22e2-79b0-7cc3-98c4-dc0c0c07398g.a",
		"no dashes":               "017f22e279b07cc398c4dc0c0c07398f0000.a",
		"braces":                  "{017f22e2-79b0-7cc3-98c4-dc0c0c07398}.a",
		"upper case instance":     good + ".A",
		"dot in the instance":     good + ".a.b",
		"dash at the end":         good + ".a-",
		"dash at the start":       good + ".-a",
		"line break":              good + ".a\n",
		"too long an instance":    good + "." + strings.Repeat("x", receipt.MaxInstance+1),
		"something before the id": " " + good + ".a",
	} {
		if _, _, err := receipt.ParseID(s); err == nil {
			t.Errorf("%s: %q accepted", name, s)
		}
	}
}

func TestAppendIDDoesNotAllocate(t *testing.T) {
	var random [10]byte
	buf := make([]byte, 0, 64)
	if n := testing.AllocsPerRun(100, func() { buf = receipt.AppendID(buf[:0], 1, &random, "a") }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if _, err := hex.DecodeString(string(buf[:8])); err != nil {
		t.Error(err)
	}
}
