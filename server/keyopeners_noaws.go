//go:build knhk_noaws

package server

import (
	"context"
	"errors"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/kms"
)

func openAWS(context.Context, keys.URI, kms.Options) (*kms.Store, error) {
	return nil, errors.New("awskms: built without AWS KMS (build tag knhk_noaws): use a build with it, or name another key")
}
