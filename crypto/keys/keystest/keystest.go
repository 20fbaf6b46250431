// Package keystest is the conformance suite of keys.Store. Every store of this module passes it, over the real thing
// where one can be had on a developer's machine, else over a fake that speaks the real wire.
//
// It promises that a store which passes keeps the words of package keys: versions in order, refusals with the right
// sentinel, deadlines, restarts. It does not test what is special to one store (permissions, PINs, lost sessions);
// that stands beside each store. Only tests import it.
package keystest

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
)

// slack is how long after the end of its context an operation may take to return before the suite calls it late. The
// contract says 100 ms; the rest is for a loaded machine.
const slack = 2 * time.Second

// algorithms are tried in each case that signs.
var algorithms = []keys.Algorithm{keys.Ed25519, keys.P256}

// Run tests a store. open opens the same underlying store whenever it is called, also while another handle is open; it
// ends the test itself when it cannot. The suite closes each handle. Labels are made from the names of the subtests, so
// a store that still holds keys of an earlier run is emptied first by the caller.
func Run(t *testing.T, open func(t *testing.T) keys.Store) {
	s := suite{open: open}
	t.Run("custody", s.custody)
	for _, alg := range algorithms {
		t.Run(string(alg), func(t *testing.T) {
			t.Run("create", func(t *testing.T) { s.create(t, alg) })
			t.Run("messages", func(t *testing.T) { s.messages(t, alg) })
			t.Run("disable", func(t *testing.T) { s.disable(t, alg) })
			t.Run("destroy", func(t *testing.T) { s.destroy(t, alg) })
			t.Run("restart", func(t *testing.T) { s.restart(t, alg) })
			t.Run("deadline", func(t *testing.T) { s.deadline(t, alg) })
			t.Run("two-handles", func(t *testing.T) { s.twoHandles(t, alg) })
		})
	}
	t.Run("order", s.order)
	t.Run("not-found", s.notFound)
	t.Run("context-over", s.contextOver)
	t.Run("bad-arguments", s.badArguments)
	t.Run("concurrent", s.concurrent)
	t.Run("closed", s.closed)
}

type suite struct{ open func(t *testing.T) keys.Store }

// store opens a handle that the test closes at its end.
func (s suite) store(t *testing.T) keys.Store {
	t.Helper()
	st := s.open(t)
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return st
}

// label is unique to a subtest and short enough for any token.
func label(t *testing.T) string {
	_, name, _ := strings.Cut(t.Name(), "/")
	return "conf-" + strings.NewReplacer("/", ".", "_", "-").Replace(name)
}

func create(t *testing.T, st keys.Store, label string, alg keys.Algorithm) keys.Version {
	t.Helper()
	v, err := st.Create(t.Context(), label, alg)
	if err != nil {
		t.Fatalf("Create(%s, %s): %v", label, alg, err)
	}
	return v
}

func signer(t *testing.T, st keys.Store, v keys.Version) keys.Signer {
	t.Helper()
	sg, err := st.Signer(t.Context(), v.Label, v.ID)
	if err != nil {
		t.Fatalf("Signer(%s, %s): %v", v.Label, v.ID, err)
	}
	return sg
}

// signs asserts that sg signs msg and that the signature verifies under pub in pure Go.
func signs(t *testing.T, sg keys.Signer, pub crypto.PublicKey, msg []byte) {
	t.Helper()
	sig, err := sg.Sign(t.Context(), msg)
	if err != nil {
		t.Fatalf("Sign of %d bytes: %v", len(msg), err)
	}
	if err := keys.Verify(sg.Algorithm(), pub, msg, sig); err != nil {
		t.Fatalf("signature over %d bytes: %v", len(msg), err)
	}
}

func versions(t *testing.T, st keys.Store, label string) []keys.Version {
	t.Helper()
	vs, err := st.Versions(t.Context(), label)
	if err != nil {
		t.Fatalf("Versions(%s): %v", label, err)
	}
	return vs
}

// find returns the listed version with v's id.
func find(t *testing.T, st keys.Store, v keys.Version) (keys.Version, bool) {
	t.Helper()
	for _, l := range versions(t, st, v.Label) {
		if l.ID == v.ID {
			return l, true
		}
	}
	return keys.Version{}, false
}

func samePublic(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

func refused(t *testing.T, sg keys.Signer, want error) {
	t.Helper()
	if sig, err := sg.Sign(t.Context(), []byte("refused")); !errors.Is(err, want) || sig != nil {
		t.Errorf("Sign = %d bytes, %v; want no signature and %v", len(sig), err, want)
	}
}

func (s suite) custody(t *testing.T) {
	if c := s.store(t).Custody(); strings.TrimSpace(c) == "" {
		t.Error("Custody is empty; want words that say where private keys live")
	}
}

func (s suite) create(t *testing.T, alg keys.Algorithm) {
	st, l := s.store(t), label(t)
	if vs := versions(t, st, l); len(vs) != 0 {
		t.Fatalf("a label never used has %d versions", len(vs))
	}
	v := create(t, st, l, alg)
	if v.Label != l || v.ID == "" || v.Algorithm != alg || v.State != keys.Enabled || v.Created.IsZero() {
		t.Errorf("Create = %+v", v)
	}
	if got, err := keys.AlgorithmOf(v.Public); err != nil || got != alg {
		t.Errorf("public key of Create: %s, %v; want %s", got, err, alg)
	}
	got, ok := find(t, st, v)
	if !ok || got.State != keys.Enabled || got.Algorithm != alg || !samePublic(got.Public, v.Public) || !got.Created.Equal(v.Created) {
		t.Errorf("Versions lists %+v (%v), Create returned %+v", got, ok, v)
	}
	sg := signer(t, st, v)
	if sg.Algorithm() != alg || !samePublic(sg.Public(), v.Public) {
		t.Errorf("Signer: %s, same public key: %v", sg.Algorithm(), samePublic(sg.Public(), v.Public))
	}
	signs(t, sg, v.Public, []byte("checkpoint"))
	if vs := versions(t, st, l+".other"); len(vs) != 0 {
		t.Errorf("another label lists %d versions", len(vs))
	}
}

func (s suite) messages(t *testing.T, alg keys.Algorithm) {
	st := s.store(t)
	v := create(t, st, label(t), alg)
	sg := signer(t, st, v)
	for _, n := range []int{0, 1, 31, 32, 33, 64, 4096, keys.MaxMessage} {
		signs(t, sg, v.Public, bytes.Repeat([]byte{0xa5}, n))
	}
	signs(t, sg, v.Public, nil)
	if sig, err := sg.Sign(t.Context(), make([]byte, keys.MaxMessage+1)); err == nil || sig != nil {
		t.Errorf("Sign of %d bytes = %d bytes, %v; want an error", keys.MaxMessage+1, len(sig), err)
	}
	// A signature is bound to its message and to its key.
	sig, err := sg.Sign(t.Context(), []byte("one"))
	if err != nil {
		t.Fatal(err)
	}
	if keys.Verify(alg, v.Public, []byte("two"), sig) == nil {
		t.Error("a signature verifies over another message")
	}
	if other := create(t, st, v.Label, alg); keys.Verify(alg, other.Public, []byte("one"), sig) == nil {
		t.Error("a signature verifies under another version's key")
	}
}

func (s suite) disable(t *testing.T, alg keys.Algorithm) {
	st, l := s.store(t), label(t)
	v, other := create(t, st, l, alg), create(t, st, l, alg)
	before, stays := signer(t, st, v), signer(t, st, other)
	signs(t, before, v.Public, []byte("before"))
	for range 2 { // idempotent
		if err := st.Disable(t.Context(), l, v.ID); err != nil {
			t.Fatalf("Disable: %v", err)
		}
	}
	refused(t, before, keys.ErrDisabled)
	if _, err := st.Signer(t.Context(), l, v.ID); !errors.Is(err, keys.ErrDisabled) {
		t.Errorf("Signer of a disabled version: %v, want %v", err, keys.ErrDisabled)
	}
	if !samePublic(before.Public(), v.Public) {
		t.Error("the public key of an open Signer changed")
	}
	if got, ok := find(t, st, v); !ok || got.State != keys.Disabled || !samePublic(got.Public, v.Public) {
		t.Errorf("a disabled version is listed as %+v (%v), want disabled with its public key", got, ok)
	}
	signs(t, stays, other.Public, []byte("the other version is untouched"))
}

func (s suite) destroy(t *testing.T, alg keys.Algorithm) {
	st, l := s.store(t), label(t)
	enabled, disabled, other := create(t, st, l, alg), create(t, st, l, alg), create(t, st, l, alg)
	before := signer(t, st, enabled)
	if err := st.Disable(t.Context(), l, disabled.ID); err != nil {
		t.Fatalf("Disable: %v", err)
	}
	for _, v := range []keys.Version{enabled, disabled} {
		if err := st.Destroy(t.Context(), l, v.ID); err != nil {
			t.Fatalf("Destroy: %v", err)
		}
		got, listed := find(t, st, v)
		if listed && (got.State != keys.Destroyed || !samePublic(got.Public, v.Public)) {
			t.Errorf("a destroyed version is listed as %+v, want destroyed with its public key", got)
		}
		// A store that archives public keys knows the version still; one that does not has forgotten it.
		want := keys.ErrNotFound
		if listed {
			want = keys.ErrDisabled
		}
		if _, err := st.Signer(t.Context(), l, v.ID); !errors.Is(err, want) {
			t.Errorf("Signer of a destroyed version: %v, want %v", err, want)
		}
		if err := st.Destroy(t.Context(), l, v.ID); err != nil && (listed || !errors.Is(err, keys.ErrNotFound)) {
			t.Errorf("second Destroy: %v", err)
		}
	}
	if _, err := before.Sign(t.Context(), []byte("x")); !errors.Is(err, keys.ErrDisabled) && !errors.Is(err, keys.ErrNotFound) {
		t.Errorf("Sign by a Signer opened before Destroy: %v, want %v or %v", err, keys.ErrDisabled, keys.ErrNotFound)
	}
	signs(t, signer(t, st, other), other.Public, []byte("the other version is untouched"))
	// The id of a destroyed version does not come back.
	if v := create(t, st, l, alg); v.ID == enabled.ID || v.ID == disabled.ID {
		t.Errorf("Create reused the id %s", v.ID)
	}
}

func (s suite) restart(t *testing.T, alg keys.Algorithm) {
	l := label(t)
	st := s.open(t)
	var made []keys.Version
	for range 3 {
		made = append(made, create(t, st, l, alg))
	}
	if err := st.Disable(t.Context(), l, made[1].ID); err != nil {
		t.Fatalf("Disable: %v", err)
	}
	sig, err := signer(t, st, made[0]).Sign(t.Context(), []byte("before"))
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	st = s.store(t)
	vs := versions(t, st, l)
	if len(vs) != len(made) {
		t.Fatalf("%d versions after reopening, want %d", len(vs), len(made))
	}
	states := []keys.State{keys.Enabled, keys.Disabled, keys.Enabled}
	for i, v := range vs {
		m := made[i]
		if v.ID != m.ID || v.State != states[i] || v.Algorithm != alg || !samePublic(v.Public, m.Public) || !v.Created.Equal(m.Created) {
			t.Errorf("version %d after reopening: %+v, want %+v in state %s", i, v, m, states[i])
		}
	}
	if err := keys.Verify(alg, vs[0].Public, []byte("before"), sig); err != nil {
		t.Errorf("a signature made before reopening: %v", err)
	}
	signs(t, signer(t, st, vs[0]), made[0].Public, []byte("after"))
	if v := create(t, st, l, alg); versions(t, st, l)[3].ID != v.ID {
		t.Error("a version made after reopening is not listed last")
	}
}

// deadline lets contexts end at moments that sweep over an operation: whatever the moment, the answer is a signature
// that verifies or the context's error, in time, and the message is the caller's again (the race detector looks).
func (s suite) deadline(t *testing.T, alg keys.Algorithm) {
	st := s.store(t)
	v := create(t, st, label(t), alg)
	sg := signer(t, st, v)
	for i := range 40 {
		after := time.Duration(i*i) * 2 * time.Microsecond
		ctx, cancel := context.WithTimeout(t.Context(), after)
		msg := fmt.Appendf(nil, "message %d", i)
		start := time.Now()
		sig, err := sg.Sign(ctx, msg)
		took := time.Since(start)
		cancel()
		switch {
		case err == nil:
			if err := keys.Verify(alg, v.Public, msg, sig); err != nil {
				t.Fatalf("timeout %v: %v", after, err)
			}
		case !errors.Is(err, context.DeadlineExceeded) || sig != nil:
			t.Fatalf("timeout %v: %d bytes, %v; want %v", after, len(sig), err, context.DeadlineExceeded)
		}
		if took > after+slack {
			t.Fatalf("timeout %v: returned after %v", after, took)
		}
		clear(msg)
	}
	signs(t, sg, v.Public, []byte("after abandoned operations"))
}

// twoHandles is the command line tool beside the server: what one does, the other sees.
func (s suite) twoHandles(t *testing.T, alg keys.Algorithm) {
	l, a, b := label(t), s.store(t), s.store(t)
	v := create(t, a, l, alg)
	sg := signer(t, b, v)
	signs(t, sg, v.Public, []byte("made by the other handle"))
	if err := a.Disable(t.Context(), l, v.ID); err != nil {
		t.Fatalf("Disable: %v", err)
	}
	refused(t, sg, keys.ErrDisabled)
	v2 := create(t, b, l, alg)
	if vs := versions(t, a, l); len(vs) != 2 || vs[1].ID != v2.ID {
		t.Errorf("the first handle lists %+v, want the version of the second last", vs)
	}
}

// order makes versions of both algorithms under one label; the list is in the order of creation.
func (s suite) order(t *testing.T) {
	st, l := s.store(t), label(t)
	var want []string
	for i := range 8 {
		want = append(want, create(t, st, l, algorithms[i%len(algorithms)]).ID)
	}
	seen := make(map[string]bool)
	for i, v := range versions(t, st, l) {
		if i >= len(want) || v.ID != want[i] || v.Algorithm != algorithms[i%len(algorithms)] || v.Label != l {
			t.Errorf("version %d is %+v, want ids %v", i, v, want)
		}
		if seen[v.ID] {
			t.Errorf("id %s is listed twice", v.ID)
		}
		seen[v.ID] = true
	}
	if len(seen) != len(want) {
		t.Errorf("%d versions, want %d", len(seen), len(want))
	}
}

func (s suite) notFound(t *testing.T) {
	st, l := s.store(t), label(t)
	v := create(t, st, l, keys.Ed25519)
	for _, c := range []struct{ why, label, id string }{
		{"label never used", l + ".none", v.ID},
		{"id of another form", l, "none"},
		{"id with path characters", l, "../" + v.ID},
		{"id one character short", l, v.ID[:len(v.ID)-1]},
		{"empty id", l, ""},
	} {
		if _, err := st.Signer(t.Context(), c.label, c.id); !errors.Is(err, keys.ErrNotFound) {
			t.Errorf("%s: Signer: %v, want %v", c.why, err, keys.ErrNotFound)
		}
		if err := st.Disable(t.Context(), c.label, c.id); !errors.Is(err, keys.ErrNotFound) {
			t.Errorf("%s: Disable: %v, want %v", c.why, err, keys.ErrNotFound)
		}
		if err := st.Destroy(t.Context(), c.label, c.id); !errors.Is(err, keys.ErrNotFound) {
			t.Errorf("%s: Destroy: %v, want %v", c.why, err, keys.ErrNotFound)
		}
	}
	signs(t, signer(t, st, v), v.Public, []byte("untouched"))
}

// contextOver calls everything with a context that has ended: nothing happens, and the context's error comes back.
func (s suite) contextOver(t *testing.T) {
	st, l := s.store(t), label(t)
	v := create(t, st, l, keys.P256)
	sg := signer(t, st, v)
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	late, cancel2 := context.WithTimeout(t.Context(), 0)
	defer cancel2()
	for _, c := range []struct {
		ctx  context.Context
		want error
	}{{canceled, context.Canceled}, {late, context.DeadlineExceeded}} {
		calls := map[string]func() error{
			"Sign":     func() error { _, err := sg.Sign(c.ctx, []byte("x")); return err },
			"Create":   func() error { _, err := st.Create(c.ctx, l, keys.P256); return err },
			"Versions": func() error { _, err := st.Versions(c.ctx, l); return err },
			"Signer":   func() error { _, err := st.Signer(c.ctx, l, v.ID); return err },
			"Disable":  func() error { return st.Disable(c.ctx, l, v.ID) },
			"Destroy":  func() error { return st.Destroy(c.ctx, l, v.ID) },
		}
		for name, call := range calls {
			if err := call(); !errors.Is(err, c.want) {
				t.Errorf("%s with a context that is over: %v, want %v", name, err, c.want)
			}
		}
	}
	if vs := versions(t, st, l); len(vs) != 1 || vs[0].State != keys.Enabled {
		t.Errorf("calls with a context that was over changed the versions: %+v", vs)
	}
	signs(t, sg, v.Public, []byte("untouched"))
}

func (s suite) badArguments(t *testing.T) {
	st := s.store(t)
	if _, err := st.Create(t.Context(), "", keys.Ed25519); err == nil {
		t.Error("Create with an empty label: no error")
	}
	if _, err := st.Create(t.Context(), label(t), "rsa-2048"); err == nil {
		t.Error("Create with an unknown algorithm: no error")
	}
	if vs := versions(t, st, label(t)); len(vs) != 0 {
		t.Errorf("refused calls left versions: %+v", vs)
	}
}

// concurrent signs from 16 goroutines with two versions of each algorithm while another goroutine lists and creates.
func (s suite) concurrent(t *testing.T) {
	st, l := s.store(t), label(t)
	var vs []keys.Version
	var signers []keys.Signer
	for i := range 4 {
		v := create(t, st, l, algorithms[i%len(algorithms)])
		vs, signers = append(vs, v), append(signers, signer(t, st, v))
	}
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			for i := range 12 {
				k := (g + i) % len(signers)
				msg := fmt.Appendf(nil, "goroutine %d, message %d", g, i)
				sig, err := signers[k].Sign(t.Context(), msg)
				if err != nil {
					t.Errorf("Sign: %v", err)
					return
				}
				if err := keys.Verify(vs[k].Algorithm, vs[k].Public, msg, sig); err != nil {
					t.Errorf("goroutine %d, version %d: %v", g, k, err)
					return
				}
			}
		})
	}
	wg.Go(func() {
		for range 3 {
			if _, err := st.Create(t.Context(), l, keys.P256); err != nil {
				t.Errorf("Create: %v", err)
			}
			if _, err := st.Versions(t.Context(), l); err != nil {
				t.Errorf("Versions: %v", err)
			}
		}
	})
	wg.Wait()
	if got := len(versions(t, st, l)); got != len(vs)+3 {
		t.Errorf("%d versions, want %d", got, len(vs)+3)
	}
}

func (s suite) closed(t *testing.T) {
	st, l := s.open(t), label(t)
	v := create(t, st, l, keys.Ed25519)
	sg := signer(t, st, v)
	for range 2 { // idempotent
		if err := st.Close(); err != nil {
			t.Fatalf("Close: %v", err)
		}
	}
	if sig, err := sg.Sign(t.Context(), []byte("x")); err == nil || sig != nil {
		t.Errorf("Sign after Close = %d bytes, %v; want an error", len(sig), err)
	}
	if _, err := st.Versions(t.Context(), l); err == nil {
		t.Error("Versions after Close: no error")
	}
	if _, err := st.Create(t.Context(), l, keys.Ed25519); err == nil {
		t.Error("Create after Close: no error")
	}
	if !samePublic(sg.Public(), v.Public) {
		t.Error("the public key is gone after Close")
	}
}
