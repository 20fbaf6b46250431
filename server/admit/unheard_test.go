package admit

import (
	"testing"
	"time"
)

func TestUnheard(t *testing.T) {
	at := func(s int64) time.Time { return time.Unix(s, 0) }
	u := unheard{start: at(1)}
	want := func(node string, s int64) {
		t.Helper()
		if got := u.begin(node); !got.Equal(at(s)) {
			t.Errorf("%s was not heard since %v, want %v", node, got.Unix(), s)
		}
	}
	want("a", 1) // two workers of one Envoy
	want("a", 1)
	want("b", 1)
	u.end("a", at(10))
	u.end("a", at(11))
	want("b", 1) // another worker of another Envoy
	want("a", 10)
	want("a", 11)
	want("a", 1)
	for i := range 2 * maxUnheard { // a peer that invents nodes
		u.end(string(rune(i)), at(20))
		u.end("same", at(20))
	}
	if len(u.ended) > maxUnheard || len(u.ended["same"]) > maxUnheard {
		t.Errorf("%d Envoys, %d ends of one are remembered", len(u.ended), len(u.ended["same"]))
	}
}
