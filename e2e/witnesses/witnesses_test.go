package witnesses

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"testing"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// hashes is the store of a log in memory.
type hashes []tlog.Hash

func (h hashes) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		if x >= int64(len(h)) {
			return nil, fmt.Errorf("no hash %d", x)
		}
		out[i] = h[x]
	}
	return out, nil
}

// tree is a log in memory: leaf by leaf, every size of it can be signed.
type tree struct {
	n int64
	hashes
}

func (l *tree) grow(t *testing.T, n int64, what string) {
	t.Helper()
	for ; l.n < n; l.n++ {
		more, err := tlog.StoredHashes(l.n, fmt.Appendf(nil, "%s %d", what, l.n), l)
		if err != nil {
			t.Fatal(err)
		}
		l.hashes = append(l.hashes, more...)
	}
}

func (l *tree) sign(t *testing.T, signers ...note.Signer) []byte {
	t.Helper()
	root, err := tlog.TreeHash(l.n, l)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := note.Sign(&note.Note{Text: fmt.Sprintf("%s\n%d\n%s\n", signers[0].Name(), l.n, root)}, signers...)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func key(t *testing.T, name string) (note.Signer, string) {
	t.Helper()
	secret, vkey, err := note.GenerateKey(rand.Reader, name)
	if err != nil {
		t.Fatal(err)
	}
	s, err := note.NewSigner(secret)
	if err != nil {
		t.Fatal(err)
	}
	return s, vkey
}

// TestCosign shows that both witnesses look: they follow a log through its second keys, of which they know nothing, and refuse what a
// witness must.
func TestCosign(t *testing.T) {
	programs := Require(t)
	const origin = "log.test/witnesses"
	identity, vkey := key(t, origin)
	s := Start(t, programs, vkey)

	var log tree
	var last []byte
	for _, size := range []int64{1, 2, 3, 300, 300, 301} {
		log.grow(t, size, "leaf")
		daily, _ := key(t, origin) // another each time
		last = log.sign(t, identity, daily)
		if err := s.Cosign(t.Context(), last, &log); err != nil {
			t.Fatalf("%d leaves: %v", size, err)
		}
	}

	var fork tree
	fork.grow(t, 400, "other leaf")
	forked := fork.sign(t, identity)
	daily, _ := key(t, origin)
	log.grow(t, 310, "leaf")
	forged := log.sign(t, daily) // by a key that the log's name has, but not the one that was pinned
	c := s.last
	for _, w := range s.witnesses {
		grown := c.Tree
		grown.N = 400
		_, err := w.cosign(t.Context(), grown, forked, &fork)
		if r, ok := errors.AsType[*Refusal](err); !ok || r.Status != http.StatusUnprocessableEntity {
			t.Errorf("%s, another history: %v", w.name, err)
		}
		grown.N = 310
		_, err = w.cosign(t.Context(), grown, forged, &log)
		// C2SP wants 403; omniwitness says 500.
		if r, ok := errors.AsType[*Refusal](err); !ok || r.Status != http.StatusForbidden && r.Status != http.StatusInternalServerError {
			t.Errorf("%s, another key: %v", w.name, err)
		}
	}
	if err := s.Cosign(t.Context(), bytes.Replace(last, []byte("\n301\n"), []byte("\n302\n"), 1), &log); err == nil {
		t.Error("a checkpoint that was changed is accepted")
	}
	if err := s.Untouched(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := s.witnessctl(t.Context(), "add-key", "-db", s.database(), "-origin", origin, "-key", daily.Name()+"+"); err == nil {
		t.Error("witnessctl takes half a key")
	}
	_, other := key(t, origin)
	if _, err := s.witnessctl(t.Context(), "add-key", "-db", s.database(), "-origin", origin, "-key", other); err != nil {
		t.Fatal(err)
	}
	if err := s.Untouched(t.Context()); err == nil {
		t.Error("a second key in a witness's configuration is not noticed")
	}
}
