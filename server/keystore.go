package server

import (
	"context"
	"errors"
	"fmt"

	"github.com/knhk/sidecar/crypto/hsm"
	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/soft"
	"github.com/knhk/sidecar/server/config"
)

// hsmSessions is how many PKCS#11 sessions a token gets: two signatures per checkpoint, and more sessions than cores gain
// nothing.
const hsmSessions = 2

// keyring is the identity key and the store of daily keys, opened as the configuration says.
type keyring struct {
	identity   keys.Signer
	daily      keys.Store
	dailyLabel string
	stores     map[string]keys.Store // by where the keys live, so that one token is opened once
}

func (k *keyring) close() error {
	var errs []error
	for _, s := range k.stores {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

// openKeys opens the stores and finds the identity key, or makes it when its label has no version yet and create is true: a new
// log's first start. An existing log never gets a new identity key this way, for its log.json names the key it was begun with.
func openKeys(ctx context.Context, cfg *config.Keys, create bool) (_ *keyring, err error) {
	k := &keyring{stores: map[string]keys.Store{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, k.close())
		}
	}()
	store, label, err := k.open(ctx, cfg.Identity, "identity")
	if err != nil {
		return nil, fmt.Errorf("keys.identity: %w", err)
	}
	if k.identity, err = identityKey(ctx, store, label, cfg.Identity.Algorithm, create); err != nil {
		return nil, fmt.Errorf("keys.identity: %w", err)
	}
	if k.daily, k.dailyLabel, err = k.open(ctx, cfg.Daily, "daily"); err != nil {
		return nil, fmt.Errorf("keys.daily: %w", err)
	}
	if k.daily == store && k.dailyLabel == label {
		return nil, fmt.Errorf("keys.daily: names the same key as keys.identity, %q: give it a label of its own", label)
	}
	return k, nil
}

func (k *keyring) open(ctx context.Context, key config.Key, label string) (keys.Store, string, error) {
	u, err := keys.ParseURI(key.URI)
	if err != nil {
		return nil, "", err
	}
	if u.Label != "" {
		label = u.Label
	}
	where := u.Scheme + "\x00" + u.Dir + "\x00" + u.Module + "\x00" + u.Token
	if s, ok := k.stores[where]; ok {
		return s, label, nil
	}
	var s keys.Store
	if u.Scheme == "soft" {
		s, err = soft.Open(u.Dir)
	} else {
		s, err = hsm.Open(ctx, hsm.Config{Module: u.Module, TokenLabel: u.Token, PIN: u.PIN, Sessions: hsmSessions})
	}
	if err != nil {
		return nil, "", err
	}
	k.stores[where] = s
	return s, label, nil
}

// identityKey opens the one enabled version of the identity key.
func identityKey(ctx context.Context, s keys.Store, label string, alg keys.Algorithm, create bool) (keys.Signer, error) {
	versions, err := s.Versions(ctx, label)
	if err != nil {
		return nil, err
	}
	var enabled []keys.Version
	for _, v := range versions {
		if v.State == keys.Enabled {
			enabled = append(enabled, v)
		}
	}
	switch {
	case len(enabled) > 1:
		return nil, fmt.Errorf("%d enabled versions of key %q: an identity key has one; disable the others", len(enabled), label)
	case len(enabled) == 0 && !create:
		return nil, fmt.Errorf("no key %q, and the log in state_dir was begun with one: restore it, or start a new state_dir", label)
	case len(enabled) == 0:
		v, err := s.Create(ctx, label, alg)
		if err != nil {
			return nil, err
		}
		enabled = append(enabled, v)
	}
	if enabled[0].Algorithm != alg {
		return nil, fmt.Errorf("key %q is %s, the configuration says %s", label, enabled[0].Algorithm, alg)
	}
	return s.Signer(ctx, label, enabled[0].ID)
}
