package server

import (
	"context"
	"path/filepath"

	"github.com/knhk/sidecar/crypto/hsm"
	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/kms"
	"github.com/knhk/sidecar/crypto/soft"
	"github.com/knhk/sidecar/server/config"
)

// serviceOpeners open the stores of key services, by the scheme of their URIs. Each stands in a file of its own, which a build tag
// leaves out together with the service's client: knhk_nogcp, knhk_noaws, knhk_noazure, knhk_novault.
var serviceOpeners = map[string]func(context.Context, keys.URI, kms.Options) (*kms.Store, error){
	"gcpkms":   openGCP,
	"awskms":   openAWS,
	"azurekms": openAzure,
	"vault":    openVault,
}

// openStore opens the store that a URI names.
func openStore(ctx context.Context, cfg *config.Config, u keys.URI, o keyOptions) (keys.Store, error) {
	if u.Scheme == "soft" {
		return soft.Open(u.Dir)
	}
	if open, ok := serviceOpeners[u.Scheme]; ok {
		return open(ctx, u, kms.Options{
			Archive: filepath.Join(cfg.StateDir, "archive"), AllowExportable: cfg.Keys.AllowExportable, Log: o.log,
		})
	}
	return hsm.Open(ctx, hsm.Config{
		Module: u.Module, TokenLabel: u.Token, PIN: u.PIN, Sessions: hsmSessions, AllowExportable: cfg.Keys.AllowExportable, Log: o.log,
	})
}
