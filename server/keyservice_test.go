package server

import (
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/rotation"
)

// TestKeyListNext: what is told as next is what comes next: a rotation that was asked for in vain does not come again by itself, a
// revocation and a seal do.
func TestKeyListNext(t *testing.T) {
	due := time.Unix(2_000_000_000, 0)
	retry := due.Add(-time.Hour)
	for _, c := range []struct {
		name  string
		info  rotation.Info
		phase string
		next  time.Time
	}{
		{"fresh", rotation.Info{Phase: rotation.PhaseFresh}, "fresh", due},
		{"asked in vain", rotation.Info{Phase: rotation.PhaseFresh, NextAttempt: retry}, "fresh", due},
		{"due", rotation.Info{Phase: rotation.PhaseDue, NextAttempt: retry}, "due", retry},
		{"to be revoked", rotation.Info{Phase: rotation.PhaseFresh, NextAttempt: retry, Revoking: "k"}, PhaseRevoking, retry},
		{"to be sealed", rotation.Info{Phase: rotation.PhaseFresh, NextAttempt: retry, Sealing: true}, PhaseSealing, retry},
	} {
		c.info.Due = due
		if l := KeyList("example.com/log", "id", c.info); l.GetPhase() != c.phase || l.GetNextUnixNs() != c.next.UnixNano() {
			t.Errorf("%s: phase %q, next %v", c.name, l.GetPhase(), time.Unix(0, l.GetNextUnixNs()))
		}
	}
	if l := KeyList("example.com/log", "id", rotation.Info{Phase: rotation.PhaseSealed, Seal: []byte("x"), Due: due}); l.GetNextUnixNs() != 0 {
		t.Error("a sealed log has a next change")
	}
}
