//go:build !cgo

package hsm

import (
	"context"
	"errors"

	"github.com/knhk/sidecar/crypto/keys"
)

// Store is never made in a program that was built without cgo.
type Store struct{ keys.Store }

var _ keys.Store = (*Store)(nil)

var errNoCgo = errors.New("hsm: open: this program was built without PKCS#11; build it with CGO_ENABLED=1 and a C compiler")

// Open returns an error: PKCS#11 modules are C libraries, and this program was built without cgo.
func Open(context.Context, Config) (*Store, error) { return nil, errNoCgo }

// Check returns the error of Open.
func (*Store) Check(context.Context, string) error { return errNoCgo }

// Inspect returns the error of Open.
func (*Store) Inspect(context.Context, string, string) (keys.Inspection, error) {
	return keys.Inspection{}, errNoCgo
}
