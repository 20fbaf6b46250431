package envoywire

import (
	"context"
	"encoding/hex"
	"testing"

	"google.golang.org/grpc/metadata"
)

func TestTraceParent(t *testing.T) {
	const trace, span = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
	for _, c := range []struct {
		name string
		in   []string
		ok   bool
	}{
		{"sampled", []string{"00-" + trace + "-" + span + "-01"}, true},
		{"not sampled", []string{"00-" + trace + "-" + span + "-00"}, true},
		{"none", nil, false},
		{"two: nobody knows which", []string{"00-" + trace + "-" + span + "-01", "00-" + trace + "-" + span + "-01"}, false},
		{"another version", []string{"01-" + trace + "-" + span + "-01"}, false},
		{"upper case", []string{"00-4BF92F3577B34DA6A3CE929D0E0E4736-" + span + "-01"}, false},
		{"trailing field", []string{"00-" + trace + "-" + span + "-01-x"}, false},
		{"trace id of zeroes", []string{"00-00000000000000000000000000000000-" + span + "-01"}, false},
		{"span id of zeroes", []string{"00-" + trace + "-0000000000000000-01"}, false},
		{"wrong separators", []string{"00_" + trace + "-" + span + "-01"}, false},
		{"flags not hex", []string{"00-" + trace + "-" + span + "-0g"}, false},
		{"short", []string{"00-" + trace}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx := metadata.NewIncomingContext(context.Background(), metadata.MD{"traceparent": c.in})
			gotTrace, gotSpan := TraceParent(ctx)
			wantTrace, wantSpan := trace, span
			if !c.ok {
				wantTrace, wantSpan = "00000000000000000000000000000000", "0000000000000000"
			}
			if hex.EncodeToString(gotTrace[:]) != wantTrace || hex.EncodeToString(gotSpan[:]) != wantSpan {
				t.Errorf("got %x %x, want %s %s", gotTrace, gotSpan, wantTrace, wantSpan)
			}
		})
	}
}

// FuzzTraceParent checks that what is accepted reads back as it stood.
func FuzzTraceParent(f *testing.F) {
	f.Add("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
	f.Add("00-0-0-0")
	f.Fuzz(func(t *testing.T, s string) {
		trace, span := parseTraceParent(s)
		if trace == [16]byte{} && span == [8]byte{} {
			return
		}
		if want := "00-" + hex.EncodeToString(trace[:]) + "-" + hex.EncodeToString(span[:]) + "-"; len(s) != 55 || s[:53] != want {
			t.Errorf("%q was read as %s", s, want)
		}
	})
}
