//go:build knhk_noazure

package server

import (
	"context"
	"errors"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/kms"
)

func openAzure(context.Context, keys.URI, kms.Options) (*kms.Store, error) {
	return nil, errors.New("azurekms: built without Azure Key Vault (build tag knhk_noazure): use a build with it, or name another key")
}
