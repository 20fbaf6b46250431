package rotation

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

// states are those of a log's life.
func states(t testing.TB) [][]byte {
	w := newWorld(t, 1)
	var out [][]byte
	mustNil(t, w.start(func(string) (fault, error) {
		if n := len(out); w.d.state != nil && (n == 0 || !bytes.Equal(out[n-1], w.d.state)) {
			out = append(out, w.d.state)
		}
		return works, nil
	}))
	mustNil(t, w.m.Settle(t.Context()))
	mustNil(t, w.publishes())
	_, err := w.m.Rotate(t.Context())
	mustNil(t, err)
	w.time.pass(17 * time.Hour)
	mustNil(t, w.m.Settle(t.Context()))
	_, err = w.m.Revoke(t.Context(), "", "a \"reason\"")
	mustNil(t, err)
	_, err = w.m.Seal(t.Context(), "end")
	mustNil(t, err)
	return append(out, w.d.state)
}

func TestParseStateRefuses(t *testing.T) {
	all := states(t)
	for _, b := range all {
		s, err := ParseState(b)
		mustNil(t, err)
		again, err := s.Marshal()
		mustNil(t, err)
		if !bytes.Equal(again, b) {
			t.Errorf("%s\nbecomes\n%s", b, again)
		}
	}
	last := string(all[len(all)-1])
	for _, c := range []struct{ why, in string }{
		{"empty", ""}, {"null", "null"}, {"array", "[]"}, {"cut", last[:len(last)-1]}, {"something after it", last + " "}, {"twice", last + last},
		{"unknown member", strings.Replace(last, `{"floor"`, `{"more":1,"floor"`, 1)},
		{"repeated member", strings.Replace(last, `{"floor"`, `{"floor":"2026-01-01T00:00:00Z","floor"`, 1)},
		{"other case", strings.Replace(last, `"floor"`, `"Floor"`, 1)},
		{"white space", strings.Replace(last, `{"floor"`, `{ "floor"`, 1)},
		{"a zero member written out", strings.Replace(last, `{"floor"`, `{"loose":0,"floor"`, 1)},
		{"no key in force", `{"floor":"2026-01-01T00:00:00Z","past":[{"vkey":"x","not_before":"2026-01-01T00:00:00Z","not_after":"2026-01-01T01:00:00Z",` +
			`"index":0,"last_size":3,"last_root":[],"ended":"rotated"}]}`},
		{"published and not sealed", `{"floor":"2026-01-01T00:00:00Z","seal_published":true}`},
		{"sealed without a seal", `{"floor":"2026-01-01T00:00:00Z","sealed":true}`},
		{"distrust of another kind", `{"floor":"2026-01-01T00:00:00Z","distrust":"why"}`},
		{"another index than the statement's", strings.Replace(last, `"ended":"revoked","statement"`, `"ended":"rotated","statement"`, 1)},
	} {
		if c.in == last {
			t.Errorf("%s: the case changes nothing", c.why)
		}
		if _, err := ParseState([]byte(c.in)); err == nil {
			t.Errorf("%s: ParseState takes it", c.why)
		}
	}
	if s, err := ParseState([]byte(`{"floor":"0001-01-01T00:00:00Z"}`)); err != nil || s.Records() != nil {
		t.Errorf("the zero state: %v", err)
	}
}

func FuzzParseState(f *testing.F) {
	for _, b := range states(f) {
		f.Add(b)
	}
	f.Add([]byte(`{"floor":"0001-01-01T00:00:00Z"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := ParseState(b)
		if err != nil {
			return
		}
		s.Records()
		again, err := s.Marshal()
		if err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%q becomes %q, %v", b, again, err)
		}
	})
}
