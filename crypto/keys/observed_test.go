package keys

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestKind(t *testing.T) {
	for _, c := range []struct {
		err  error
		want FailureKind
	}{
		{nil, ""},
		{ErrCredential, KindCredential},
		{ErrDisabled, KindDisabled},
		{ErrNotFound, KindNotFound},
		{ErrThrottled, KindThrottled},
		{ErrUnavailable, KindUnavailable},
		{context.DeadlineExceeded, KindTimeout},
		{context.Canceled, KindOther},
		{errors.New("mechanism"), KindOther},
		{fmt.Errorf("%w: %w", ErrUnavailable, context.DeadlineExceeded), KindUnavailable}, // what the store says goes first
		{fmt.Errorf("sign: %w", errors.Join(errors.New("x"), ErrThrottled)), KindThrottled},
	} {
		got := Kind(c.err)
		if got != c.want {
			t.Errorf("Kind(%v) = %q, want %q", c.err, got, c.want)
		}
		if got != "" && !slices.Contains(FailureKinds(), got) {
			t.Errorf("FailureKinds lacks %q", got)
		}
	}
}

// slowStore takes a second for everything and answers with err.
type slowStore struct {
	Store // nil: nothing else is called
	err   error
	key   testSigner
}

func (s slowStore) op() error { time.Sleep(time.Second); return s.err }

func (s slowStore) Create(context.Context, string, Algorithm) (Version, error) {
	return Version{}, s.op()
}
func (s slowStore) Versions(context.Context, string) ([]Version, error) { return nil, s.op() }
func (s slowStore) Disable(context.Context, string, string) error       { return s.op() }
func (s slowStore) Destroy(context.Context, string, string) error       { return s.op() }
func (s slowStore) Signer(context.Context, string, string) (Signer, error) {
	return slowSigner{s.key, s}, s.op()
}
func (s slowStore) Inspect(_ context.Context, _, id string) (Inspection, error) {
	return Inspection{Why: id}, nil
}

type slowSigner struct {
	testSigner
	store slowStore
}

func (g slowSigner) Sign(context.Context, []byte) ([]byte, error) { return []byte("sig"), g.store.op() }

// TestObserved: each operation is told of once, with its kind and the time that the caller waited.
func TestObserved(t *testing.T) {
	key := newSigner(t, Ed25519)
	for _, failure := range []error{nil, fmt.Errorf("x: %w", ErrThrottled)} {
		synctest.Test(t, func(t *testing.T) {
			var got []string
			s := Observed(slowStore{err: failure, key: key}, func(op Op, kind FailureKind, took time.Duration) {
				got = append(got, fmt.Sprintf("%s %q %v", op, kind, took))
			})
			ctx := t.Context()
			_, err := s.Create(ctx, "l", Ed25519)
			_, err1 := s.Versions(ctx, "l")
			err2 := s.Disable(ctx, "l", "1")
			err3 := s.Destroy(ctx, "l", "1")
			sg, err4 := s.Signer(ctx, "l", "1")
			want := []string{"create", "versions", "disable", "destroy", "signer"}
			if failure == nil {
				sig, err := sg.Sign(ctx, nil)
				if string(sig) != "sig" || err != nil || sg.Algorithm() != Ed25519 || sg.Public() == nil {
					t.Errorf("the signer: %q, %v", sig, err)
				}
				want = append(want, "sign")
			} else if sg != nil {
				t.Error("a Signer beside an error")
			}
			for i := range want {
				want[i] += fmt.Sprintf(" %q 1s", Kind(failure))
			}
			if !slices.Equal(got, want) {
				t.Errorf("observed %q, want %q", got, want)
			}
			for _, err := range []error{err, err1, err2, err3, err4} {
				if !errors.Is(err, failure) {
					t.Errorf("error %v, want %v", err, failure)
				}
			}
			if in, err := Inspect(ctx, Observed(s, nil), "l", "7"); err != nil || in.Why != "7" {
				t.Errorf("Inspect through two wrappers: %+v, %v", in, err)
			}
		})
	}
	if _, err := Inspect(t.Context(), Observed(struct{ Store }{}, nil), "l", "1"); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("Inspect of a store that cannot tell: %v, want %v", err, errors.ErrUnsupported)
	}
}

// TestLimits says of each algorithm what the verifier key of this module is, so that the two cannot drift apart.
func TestLimits(t *testing.T) {
	for _, c := range []struct {
		alg     Algorithm
		kind    byte
		foreign bool
		text    string
	}{{Ed25519, 1, true, "every C2SP tool"}, {P256, 2, false, "torchwood, litewitness and golang.org/x/mod do not"}} {
		pub := newSigner(t, c.alg).Public()
		l, err := Limits(pub)
		if err != nil || l.Algorithm != c.alg || l.Type != c.kind || l.Foreign != c.foreign || !strings.Contains(l.Text, c.text) || strings.Contains(l.Text, "\n") {
			t.Errorf("Limits of %s: %+v, %v", c.alg, l, err)
		}
		a, keyA, err1 := encodeNoteKey("a", pub)
		b, _, err2 := encodeNoteKey("b", pub)
		if err := errors.Join(err1, err2); err != nil || keyA[0] != l.Type || (a != b) != l.NameBound {
			t.Errorf("%s: verifier key of type %d, name bound %v, %v; Limits says %+v", c.alg, keyA[0], a != b, err, l)
		}
	}
	if _, err := Limits(p384(t)); err == nil {
		t.Error("Limits of P-384: no error")
	}
}
