//go:build !knhk_noazure

package server

import (
	"context"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/kms"
	"github.com/knhk/sidecar/crypto/kms/azure"
)

func openAzure(ctx context.Context, u keys.URI, o kms.Options) (*kms.Store, error) {
	return azure.Open(ctx, u, o)
}
