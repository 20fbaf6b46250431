//go:build !knhk_nogcp

package server

import (
	"context"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/kms"
	"github.com/knhk/sidecar/crypto/kms/gcp"
)

func openGCP(ctx context.Context, u keys.URI, o kms.Options) (*kms.Store, error) {
	return gcp.Open(ctx, u, o)
}
