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
const slack = 30 * time.Second

// Run tests a store. open opens the same underlying store whenever it is called, also while another handle is open; it
// ends the test itself when it cannot. The suite closes each handle. Labels are made from the names of the subtests, so
// a store that still holds keys of an earlier run is emptied first by the caller.
func Run(t *testing.T, open func(t *testing.T) keys.Store) { RunWithin(t, open, Limits{}) }

// Limits declares what the service behind a store cannot do, so that the suite asks for what it can, and that the rest is refused.
type Limits struct {
	// Messages are the shortest and the longest message, in bytes, that are signed with an algorithm; without an entry it is 0
	// to keys.MaxMessage.
	Messages map[keys.Algorithm][2]int
	// NoEd25519: Create of an Ed25519 version is an error that wraps errors.ErrUnsupported, and makes nothing.
	NoEd25519 bool
	// NoDestroy: Destroy disables a version, which is listed as keys.Disabled from then on, never as keys.Destroyed.
	NoDestroy bool
}

func (l Limits) messages(alg keys.Algorithm) (shortest, longest int) {
	if m, ok := l.Messages[alg]; ok {
		return m[0], m[1]
	}
	return 0, keys.MaxMessage
}

// RunWithin is Run for a store of declared limits.
func RunWithin(t *testing.T, open func(t *testing.T) keys.Store, limits Limits) {
	s := suite{open: open, limits: limits, algorithms: []keys.Algorithm{keys.Ed25519, keys.P256}, gone: keys.Destroyed}
	if limits.NoEd25519 {
		s.algorithms = s.algorithms[1:]
		t.Run("no-ed25519", s.noEd25519)
	}
	if limits.NoDestroy {
		s.gone = keys.Disabled
	}
	t.Run("custody", s.custody)
	for _, alg := range s.algorithms {
		t.Run(string(alg), func(t *testing.T) {
			t.Run("create", func(t *testing.T) { s.create(t, alg) })
			t.Run("messages", func(t *testing.T) { s.messages(t, alg) })
			t.Run("disable", func(t *testing.T) { s.disable(t, alg) })
			t.Run("destroy", func(t *testing.T) { s.destroy(t, alg) })
			t.Run("restart", func(t *testing.T) { s.restart(t, alg) })
			t.Run("deadline", func(t *testing.T) { s.deadline(t, alg) })
			t.Run("two-handles", func(t *testing.T) { s.twoHandles(t, alg) })
			t.Run("archived", func(t *testing.T) { s.archived(t, alg) })
		})
	}
	t.Run("order", s.order)
	t.Run("not-found", s.notFound)
	t.Run("context-over", s.contextOver)
	t.Run("bad-arguments", s.badArguments)
	t.Run("concurrent", s.concurrent)
	t.Run("cancel-queued", s.cancelQueued)
	t.Run("inspect", s.inspect)
	t.Run("closed", s.closed)
}

type suite struct {
	open       func(t *testing.T) keys.Store
	limits     Limits
	algorithms []keys.Algorithm // are tried in each case that signs; the first where any will do
	gone       keys.State       // of a version after Destroy
}

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
	if !ok || got.State != keys.Enabled || got.Algorithm != alg || !keys.SamePublic(got.Public, v.Public) || !got.Created.Equal(v.Created) {
		t.Errorf("Versions lists %+v (%v), Create returned %+v", got, ok, v)
	}
	sg := signer(t, st, v)
	if sg.Algorithm() != alg || !keys.SamePublic(sg.Public(), v.Public) {
		t.Errorf("Signer: %s, same public key: %v", sg.Algorithm(), keys.SamePublic(sg.Public(), v.Public))
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
	shortest, longest := s.limits.messages(alg)
	for _, n := range []int{0, 1, 31, 32, 33, 64, 4096, keys.MaxMessage, longest, longest + 1} {
		if shortest <= n && n <= longest {
			signs(t, sg, v.Public, bytes.Repeat([]byte{0xa5}, n))
		} else if sig, err := sg.Sign(t.Context(), make([]byte, n)); err == nil || sig != nil {
			t.Errorf("Sign of %d bytes = %d bytes, %v; want an error", n, len(sig), err)
		}
	}
	if shortest == 0 {
		signs(t, sg, v.Public, nil)
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
	if !keys.SamePublic(before.Public(), v.Public) {
		t.Error("the public key of an open Signer changed")
	}
	if got, ok := find(t, st, v); !ok || got.State != keys.Disabled || !keys.SamePublic(got.Public, v.Public) {
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
		if _, err := st.Signer(t.Context(), l, v.ID); !errors.Is(err, keys.ErrDisabled) {
			t.Errorf("Signer of a destroyed version: %v, want %v", err, keys.ErrDisabled)
		}
		for what, again := range map[string]func(context.Context, string, string) error{"Destroy": st.Destroy, "Disable": st.Disable} {
			if err := again(t.Context(), l, v.ID); err != nil {
				t.Errorf("%s of a destroyed version: %v", what, err)
			}
		}
		if got, listed := find(t, st, v); !listed || got.State != s.gone {
			t.Errorf("a destroyed version is listed as %+v (%v), want %s", got, listed, s.gone)
		}
	}
	refused(t, before, keys.ErrDisabled)
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
		if v.ID != m.ID || v.State != states[i] || v.Algorithm != alg || !keys.SamePublic(v.Public, m.Public) || !v.Created.Equal(m.Created) {
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

// archived: what a version signed is verified for ever, so its public key outlives the private one, for every handle and over
// a restart. It is destroyed by a handle that did not make it, under a Signer of the one that did.
func (s suite) archived(t *testing.T, alg keys.Algorithm) {
	l := label(t)
	a, b := s.store(t), s.open(t)
	v, stays := create(t, a, l, alg), create(t, b, l, alg)
	sg := signer(t, a, v)
	sig, err := sg.Sign(t.Context(), []byte("signed by a version that is gone"))
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Destroy(t.Context(), l, v.ID); err != nil {
		t.Fatalf("Destroy through another handle: %v", err)
	}
	refused(t, sg, keys.ErrDisabled)
	listed := func(st keys.Store, where string) {
		t.Helper()
		got, ok := find(t, st, v)
		if !ok || got.State != s.gone || got.Algorithm != alg || !keys.SamePublic(got.Public, v.Public) {
			t.Fatalf("%s: a destroyed version is listed as %+v (%v), want %s with its public key", where, got, ok, s.gone)
		}
		if err := keys.Verify(got.Algorithm, got.Public, []byte("signed by a version that is gone"), sig); err != nil {
			t.Errorf("%s: %v", where, err)
		}
		if got, ok := find(t, st, stays); !ok || got.State != keys.Enabled {
			t.Errorf("%s: the other version is listed as %+v (%v)", where, got, ok)
		}
	}
	listed(a, "the handle that made it")
	listed(b, "the handle that destroyed it")
	if err := b.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	listed(s.store(t), "a handle opened later")
	signs(t, signer(t, a, stays), stays.Public, []byte("untouched"))
}

// cancelQueued asks for far more signatures than a store makes at a time and gives up every other one. Who gave up gets the
// context's error or a signature that was ready, in time; nobody else notices.
func (s suite) cancelQueued(t *testing.T) {
	st := s.store(t)
	v := create(t, st, label(t), s.algorithms[0])
	sg := signer(t, st, v)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	var started sync.WaitGroup
	for g := range 64 {
		started.Add(1)
		wg.Go(func() {
			own := t.Context()
			if g%2 == 0 {
				own = ctx
			}
			msg := fmt.Appendf(nil, "goroutine %d", g)
			started.Done()
			sig, err := sg.Sign(own, msg)
			switch {
			case err == nil:
				if err := keys.Verify(v.Algorithm, v.Public, msg, sig); err != nil {
					t.Errorf("goroutine %d: %v", g, err)
				}
			case g%2 != 0 || !errors.Is(err, context.Canceled) || sig != nil:
				t.Errorf("goroutine %d: Sign = %d bytes, %v", g, len(sig), err)
			}
		})
	}
	started.Wait()
	cancel()
	wg.Wait()
	signs(t, sg, v.Public, []byte("after the cancelled ones"))
}

// inspect is for stores that can tell how they keep keys.
func (s suite) inspect(t *testing.T) {
	st, l := s.store(t), label(t)
	v := create(t, st, l, s.algorithms[0])
	got, err := keys.Inspect(t.Context(), st, l, v.ID)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip("the store cannot tell")
	}
	if err != nil || !got.CanSign || got.Exportable != (got.Why != "") || strings.Contains(got.Why, "\n") {
		t.Errorf("Inspect of an enabled version: %+v, %v", got, err)
	}
	if _, err := keys.Inspect(t.Context(), st, l, "none"); !errors.Is(err, keys.ErrNotFound) {
		t.Errorf("Inspect of no version: %v, want %v", err, keys.ErrNotFound)
	}
	for _, end := range []func(context.Context, string, string) error{st.Disable, st.Destroy} {
		if err := end(t.Context(), l, v.ID); err != nil {
			t.Fatal(err)
		}
		if got, err := keys.Inspect(t.Context(), st, l, v.ID); err != nil || got.CanSign || got.Why == "" || strings.Contains(got.Why, "\n") {
			t.Errorf("Inspect of a version that does not sign: %+v, %v; want why", got, err)
		}
	}
}

func (s suite) noEd25519(t *testing.T) {
	st, l := s.store(t), label(t)
	if _, err := st.Create(t.Context(), l, keys.Ed25519); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("Create of an Ed25519 version: %v, want %v", err, errors.ErrUnsupported)
	}
	if vs := versions(t, st, l); len(vs) != 0 {
		t.Errorf("the refused call left versions: %+v", vs)
	}
}

// order makes versions of both algorithms under one label; the list is in the order of creation.
func (s suite) order(t *testing.T) {
	st, l := s.store(t), label(t)
	var want []string
	for i := range 8 {
		want = append(want, create(t, st, l, s.algorithms[i%len(s.algorithms)]).ID)
	}
	seen := make(map[string]bool)
	for i, v := range versions(t, st, l) {
		if i >= len(want) || v.ID != want[i] || v.Algorithm != s.algorithms[i%len(s.algorithms)] || v.Label != l {
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
	v := create(t, st, l, s.algorithms[0])
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

// concurrent signs from 16 goroutines with two versions of each algorithm while others create, sign and list.
func (s suite) concurrent(t *testing.T) {
	st, l := s.store(t), label(t)
	var vs []keys.Version
	var signers []keys.Signer
	for i := range 4 {
		v := create(t, st, l, s.algorithms[i%len(s.algorithms)])
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
	const creators = 3
	for c := range creators { // each signs with what it has just made, while the others make theirs
		wg.Go(func() {
			for i := range 2 {
				alg := s.algorithms[(c+i)%len(s.algorithms)]
				v, err := st.Create(t.Context(), l, alg)
				if err != nil {
					t.Errorf("Create: %v", err)
					return
				}
				sg, err := st.Signer(t.Context(), l, v.ID)
				if err != nil {
					t.Errorf("Signer of a version just made: %v", err)
					return
				}
				sig, err := sg.Sign(t.Context(), []byte(v.ID))
				if err == nil {
					err = keys.Verify(alg, v.Public, []byte(v.ID), sig)
				}
				if err != nil {
					t.Errorf("Sign with a version just made: %v", err)
				}
				if _, err := st.Versions(t.Context(), l); err != nil {
					t.Errorf("Versions: %v", err)
				}
			}
		})
	}
	wg.Wait()
	ids := make(map[string]bool)
	for _, v := range versions(t, st, l) {
		ids[v.ID] = true
	}
	if want := len(vs) + 2*creators; len(ids) != want {
		t.Errorf("%d versions of different ids, want %d", len(ids), want)
	}
}

func (s suite) closed(t *testing.T) {
	st, l := s.open(t), label(t)
	v := create(t, st, l, s.algorithms[0])
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
	if !keys.SamePublic(sg.Public(), v.Public) {
		t.Error("the public key is gone after Close")
	}
}
