//go:build !knhk_noaws

package server

import (
	"context"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/kms"
	"github.com/knhk/sidecar/crypto/kms/aws"
)

func openAWS(ctx context.Context, u keys.URI, o kms.Options) (*kms.Store, error) {
	return aws.Open(ctx, u, o)
}
