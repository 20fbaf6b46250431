package keys

import (
	"context"
	"time"
)

// Op names an operation of a Store or Signer, as metrics do.
type Op string

// The operations that Observed tells of.
const (
	OpSign     Op = "sign"
	OpCreate   Op = "create"
	OpVersions Op = "versions"
	OpSigner   Op = "signer"
	OpDisable  Op = "disable"
	OpDestroy  Op = "destroy"
)

// Observed returns s with every operation reported to observe when it ends: which, how it failed ("" when it did not) and
// how long the caller waited, the store's own queue included. Signers it opens report each Sign. observe is called on the
// caller's goroutine, perhaps on many at once, and must not block. Custody and Close are not reported.
//
// The returned store answers Inspect as s does. Unwrap returns s.
func Observed(s Store, observe func(op Op, failure FailureKind, took time.Duration)) Store {
	return &observedStore{Store: s, observe: observe}
}

type observedStore struct {
	Store
	observe func(Op, FailureKind, time.Duration)
}

// Unwrap returns the store behind.
func (o *observedStore) Unwrap() Store { return o.Store }

func (o *observedStore) report(op Op, start time.Time, err error) {
	o.observe(op, Kind(err), time.Since(start))
}

func (o *observedStore) Create(ctx context.Context, label string, alg Algorithm) (Version, error) {
	start := time.Now()
	v, err := o.Store.Create(ctx, label, alg)
	o.report(OpCreate, start, err)
	return v, err
}

func (o *observedStore) Versions(ctx context.Context, label string) ([]Version, error) {
	start := time.Now()
	vs, err := o.Store.Versions(ctx, label)
	o.report(OpVersions, start, err)
	return vs, err
}

func (o *observedStore) Signer(ctx context.Context, label, id string) (Signer, error) {
	start := time.Now()
	sg, err := o.Store.Signer(ctx, label, id)
	o.report(OpSigner, start, err)
	if err != nil {
		return nil, err
	}
	return &observedSigner{Signer: sg, store: o}, nil
}

func (o *observedStore) Disable(ctx context.Context, label, id string) error {
	start := time.Now()
	err := o.Store.Disable(ctx, label, id)
	o.report(OpDisable, start, err)
	return err
}

func (o *observedStore) Destroy(ctx context.Context, label, id string) error {
	start := time.Now()
	err := o.Store.Destroy(ctx, label, id)
	o.report(OpDestroy, start, err)
	return err
}

type observedSigner struct {
	Signer
	store *observedStore
}

func (g *observedSigner) Sign(ctx context.Context, msg []byte) ([]byte, error) {
	start := time.Now()
	sig, err := g.Signer.Sign(ctx, msg)
	g.store.report(OpSign, start, err)
	return sig, err
}
