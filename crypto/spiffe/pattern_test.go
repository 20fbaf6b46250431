package spiffe

import (
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestParsePattern(t *testing.T) {
	for _, c := range []struct{ in, want string }{ // want: part of the error; empty, it is read and written as it is
		{"spiffe://knhk.test/envoy", ""},
		{"spiffe://knhk.test/*", ""},
		{"spiffe://knhk.test/ns/prod/*", ""},
		{"spiffe://knhk.test", "names a trust domain"},
		{"spiffe://knhk.test/", "slash"},
		{"spiffe://knhk.test/a*", "only stand at the end"},
		{"spiffe://knhk.test/*/b", "only stand at the end"},
		{"spiffe://knhk.test/*/*", "only stand at the end"},
		{"spiffe://*/a", "only stand at the end"},
		{"spiffe://*", "scheme"},
		{"*", "only stand at the end"},
		{"/*", "empty"},
		{"", "empty"},
		{"https://knhk.test/a", "scheme"},
		{"spiffe://KNHK.test/a", "trust domain"},
		{"spiffe://knhk.test/a/../b", "dot"},
		{"spiffe://knhk.test/a//*", "trailing slash"},
		{"spiffe://knhk.test//*", "slash"},
		{"spiffe://knhk.test/a?b", "path"},
		{"spiffe://user@knhk.test/a", "trust domain"},
		{"spiffe://knhk.test:8443/a", "trust domain"},
	} {
		p, err := ParsePattern(c.in)
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%q: %v", c.in, err)
		case c.want == "" && p.String() != c.in:
			t.Errorf("%q is written as %q", c.in, p)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%q: error %v, want %q in it", c.in, err, c.want)
		}
	}
}

func TestPatternMatch(t *testing.T) {
	for _, c := range []struct {
		pattern, id string
		want        bool
	}{
		{"spiffe://a.test/envoy", "spiffe://a.test/envoy", true},
		{"spiffe://a.test/envoy", "spiffe://a.test/envoy/1", false},
		{"spiffe://a.test/envoy", "spiffe://a.test/Envoy", false},
		{"spiffe://a.test/envoy", "spiffe://b.test/envoy", false}, // same path, other domain
		{"spiffe://a.test/envoy/*", "spiffe://a.test/envoy/1", true},
		{"spiffe://a.test/envoy/*", "spiffe://a.test/envoy/1/2", true},
		{"spiffe://a.test/envoy/*", "spiffe://a.test/envoy", false}, // itself is not below
		{"spiffe://a.test/envoy/*", "spiffe://a.test/envoy2/1", false},
		{"spiffe://a.test/envoy/*", "spiffe://b.test/envoy/1", false},
		{"spiffe://a.test/*", "spiffe://a.test/x", true},
		{"spiffe://a.test/*", "spiffe://a.test", false}, // the authority is no workload
		{"spiffe://a.test/*", "spiffe://a.test.b/x", false},
		{"spiffe://a.test/*", "spiffe://b.a.test/x", false},
	} {
		p, err := ParsePattern(c.pattern)
		if err != nil {
			t.Fatal(err)
		}
		id := spiffeid.RequireFromString(c.id)
		if got := p.Match(id); got != c.want {
			t.Errorf("%s matches %s: %v, want %v", c.pattern, c.id, got, c.want)
		}
		var x Index[int]
		for range 2 {
			x.Update(Pattern{}, func(int) int { return 100 })
			x.Update(p, func(n int) int { return n + 1 })
		}
		if got := slices.Collect(x.Match(id)); c.want != slices.Equal(got, []int{2}) || !c.want && len(got) > 0 {
			t.Errorf("an index of %s twice has %v for %s, want %v", c.pattern, got, c.id, c.want)
		}
		for range x.Match(id) {
			break // no more is asked for
		}
	}
	id := spiffeid.RequireFromString("spiffe://a.test/x")
	if (Pattern{}).Match(id) || (Pattern{}).Match(spiffeid.ID{}) {
		t.Error("the zero pattern matches")
	}
}

func FuzzParsePattern(f *testing.F) {
	f.Add("spiffe://a.test/*", "spiffe://a.test/x")
	f.Add("spiffe://a.test/x/y", "spiffe://a.test/x/y")
	f.Add("spiffe://a.test//*", "spiffe://a.test")
	f.Fuzz(func(t *testing.T, pattern, id string) {
		p, err := ParsePattern(pattern)
		if err != nil {
			return
		}
		if again, err := ParsePattern(p.String()); err != nil || again != p || p.String() != pattern {
			t.Fatalf("%q is read as %q, and that as %q, %v", pattern, p, again, err)
		}
		who, err := spiffeid.FromString(id)
		if err != nil || !p.Match(who) {
			return
		}
		prefix, below := strings.CutSuffix(pattern, "*")
		if below && !strings.HasPrefix(id, prefix) || !below && id != pattern {
			t.Fatalf("%q matches %q", pattern, id)
		}
	})
}
