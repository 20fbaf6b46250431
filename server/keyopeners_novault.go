//go:build knhk_novault

package server

import (
	"context"
	"errors"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/kms"
)

func openVault(context.Context, keys.URI, kms.Options) (*kms.Store, error) {
	return nil, errors.New("vault: built without Vault's transit engine (build tag knhk_novault): use a build with it, or name another key")
}
