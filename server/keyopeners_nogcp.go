//go:build knhk_nogcp

package server

import (
	"context"
	"errors"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/kms"
)

func openGCP(context.Context, keys.URI, kms.Options) (*kms.Store, error) {
	return nil, errors.New("gcpkms: built without Google Cloud KMS (build tag knhk_nogcp): use a build with it, or name another key")
}
