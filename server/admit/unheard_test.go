package admit

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/server/accesslog"
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

// TestUnknownInterval: every begin of an access log stream ends an interval of which nothing is known, and is told with both its ends.
func TestUnknownInterval(t *testing.T) {
	p, _, m := newPipeline(t, nil)
	var log bytes.Buffer
	p.log = slog.New(slog.NewTextHandler(&log, nil))
	now := time.Unix(100, 0)
	p.now = func() time.Time { return now }
	p.LogStream("n", accesslog.StreamOpened)
	p.LogStream("n", accesslog.StreamEnded)
	now = now.Add(time.Minute)
	p.LogStream("n", accesslog.StreamOpened)
	for _, want := range []string{
		"node=n since=ever until=1970-01-01T00:01:40Z", "node=n since=1970-01-01T00:01:40Z until=1970-01-01T00:02:40Z",
	} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("no %s in\n%s", want, log.String())
		}
	}
	if n := m.unreceipted["unheard"]; n != 2 {
		t.Errorf("%d intervals are counted", n)
	}
}
