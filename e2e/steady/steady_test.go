package steady

import (
	"errors"
	"net"
	"testing"
	"time"

	"github.com/knhk/sidecar/e2e/harness"
)

// Every request that the server saw is in the journal, once.
func TestJournal(t *testing.T) {
	u := harness.RunUpstream(t)
	l := Begin(t.Context(), Config{Addr: u.HTTP(), Clients: 3, Spacing: time.Millisecond, Targets: []string{"/a", "/do/status/503"}})
	ok := func(r *Request) bool { return r.Status == 200 && r.Err == nil }
	harness.Eventually(t, "some answers", func() bool {
		return l.Count(ok) > 10 && l.Count(func(r *Request) bool { return r.Status == 503 }) > 10
	})
	if r := l.Latest(ok); r == nil || r.Ended.Before(r.Began) {
		t.Errorf("the latest: %+v", r)
	}
	seen := map[string]int{}
	for _, r := range l.End() {
		seen[r.Target]++
	}
	for _, s := range u.Seen() {
		seen[s.Path]--
	}
	for target, n := range seen {
		if n != 0 {
			t.Errorf("%s is in the journal %d times too often", target, n)
		}
	}
}

func TestNobodyListens(t *testing.T) {
	addr, err := harness.FreeAddr()
	if err != nil {
		t.Fatal(err)
	}
	l := Begin(t.Context(), Config{Addr: addr, Clients: 1, Spacing: time.Millisecond, Targets: []string{"/"}})
	harness.Eventually(t, "an attempt", func() bool { return l.Count(func(*Request) bool { return true }) > 0 })
	var op *net.OpError
	for _, r := range l.End() {
		if !errors.As(r.Err, &op) {
			t.Errorf("%+v", r)
		}
	}
}
