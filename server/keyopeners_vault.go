//go:build !knhk_novault

package server

import (
	"context"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/kms"
	"github.com/knhk/sidecar/crypto/kms/vault"
)

func openVault(ctx context.Context, u keys.URI, o kms.Options) (*kms.Store, error) {
	return vault.Open(ctx, u, o)
}
