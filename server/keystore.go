package server

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/region/receiptlog"
	"github.com/knhk/sidecar/server/config"
)

// hsmSessions is how many PKCS#11 sessions a token gets: two signatures per checkpoint, and more sessions than cores gain
// nothing.
const hsmSessions = 2

// The roles of keys, as people and metrics are told.
const (
	roleIdentity = "identity"
	roleDaily    = "daily"
)

// keyring is the identity key and the store of daily keys, opened as the configuration says. A sealed log has neither.
type keyring struct {
	sealed     bool // the log of state_dir has ended: no key store was opened
	origin     string
	pinned     string // verifier key of the log's identity key; empty for a log that is not begun
	identity   keys.Signer
	identityID string // its version; empty when it is still to be made
	store      keys.Store
	label      string
	daily      keys.Store
	dailyLabel string
	succeeds   *receipt.Quote

	opened map[keys.URI]keys.Store // by where the keys live, so that one token is opened once
}

func (k *keyring) close() error {
	var errs []error
	for _, s := range k.opened {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

// custody says where the keys of a role live; nothing for a sealed log.
func (k *keyring) custody(role string) string {
	s := k.store
	if role == roleDaily {
		s = k.daily
	}
	if s == nil {
		return ""
	}
	return s.Custody()
}

// keyOptions say what opening keys may do.
type keyOptions struct {
	make    bool // make the identity key of a log that is not begun
	log     *slog.Logger
	observe func(role string, op keys.Op, failure keys.FailureKind, took time.Duration) // may be nil
}

// openKeys opens the stores and finds the identity key, or makes it when its label has no version yet and the log is not begun. An
// existing log never gets a new identity key: its log.json names the key it was begun with, and no other will do. A successor's
// identity key is none that the sealed log had. `knhk keys check` and serve both come through here, so what one says of a
// configuration's keys, the other does.
func openKeys(ctx context.Context, cfg *config.Config, o keyOptions) (_ *keyring, err error) {
	k := &keyring{opened: map[keys.URI]keys.Store{}}
	opening := new(atomic.Bool)
	opening.Store(true)
	defer opening.Store(false)
	if o.log != nil {
		o.log = slog.New(patient{o.log.Handler(), opening})
	}
	defer func() {
		if err != nil {
			if cerr := k.close(); cerr != nil {
				err = fmt.Errorf("%w (and then: %w)", err, cerr)
			}
		}
	}()
	if k.origin, k.pinned, err = receiptlog.ReadIdentity(cfg.StateDir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if k.sealed, err = receiptlog.IsSealed(cfg.StateDir); err != nil || k.sealed {
		return k, err
	}
	var old crypto.PublicKey
	if k.succeeds, old, err = succession(cfg.Succeeds); err != nil {
		return nil, err
	}
	if k.store, k.label, err = k.open(ctx, cfg, cfg.Keys.Identity, roleIdentity, o); err != nil {
		return nil, fmt.Errorf("keys.identity: %w", err)
	}
	if k.daily, k.dailyLabel, err = k.open(ctx, cfg, cfg.Keys.Daily, roleDaily, o); err != nil {
		return nil, fmt.Errorf("keys.daily: %w", err)
	}
	if samePlace(cfg.Keys.Identity.URI, cfg.Keys.Daily.URI) && k.dailyLabel == k.label {
		return nil, fmt.Errorf("keys.daily: names the same key as keys.identity, %q: give it a label of its own", k.label)
	}
	if err := k.openIdentity(ctx, cfg.Keys.Identity.Algorithm, o.make, old); err != nil {
		return nil, fmt.Errorf("keys.identity: %w", err)
	}
	return k, nil
}

// patient drops errors while stores are opened: they come back as errors there, and are told once.
type patient struct {
	slog.Handler
	opening *atomic.Bool
}

// Enabled implements slog.Handler.
func (p patient) Enabled(ctx context.Context, level slog.Level) bool {
	return (level < slog.LevelError || !p.opening.Load()) && p.Handler.Enabled(ctx, level)
}

// WithAttrs implements slog.Handler.
func (p patient) WithAttrs(a []slog.Attr) slog.Handler {
	return patient{p.Handler.WithAttrs(a), p.opening}
}

// WithGroup implements slog.Handler.
func (p patient) WithGroup(name string) slog.Handler {
	return patient{p.Handler.WithGroup(name), p.opening}
}

// samePlace says whether two key URIs name one store, perhaps with different credentials.
func samePlace(a, b string) bool {
	ua, errA := keys.ParseURI(a)
	ub, errB := keys.ParseURI(b)
	return errA == nil && errB == nil && ua.Place() == ub.Place()
}

func (k *keyring) open(ctx context.Context, cfg *config.Config, key config.Key, role string, o keyOptions) (keys.Store, string, error) {
	u, err := keys.ParseURI(key.URI)
	if err != nil {
		return nil, "", err
	}
	label := role
	if u.Label != "" {
		label = u.Label
	}
	where := u
	where.Label, where.PINSource = "", ""
	s, ok := k.opened[where]
	if !ok {
		s, err = openStore(ctx, cfg, u, o)
		if errors.Is(err, keys.ErrCredential) && u.PINSource != "" {
			return nil, "", fmt.Errorf("%w: correct the PIN in %s, then start again", err, u.PINSource)
		}
		if err != nil {
			return nil, "", err
		}
		k.opened[where] = s
	}
	if o.observe != nil {
		s = keys.Observed(s, func(op keys.Op, failure keys.FailureKind, took time.Duration) { o.observe(role, op, failure, took) })
	}
	return s, label, nil
}

// openIdentity opens the one enabled version of the identity key. old is the identity key of the sealed log that this one
// succeeds, nil without one.
func (k *keyring) openIdentity(ctx context.Context, alg keys.Algorithm, create bool, old crypto.PublicKey) error {
	versions, err := k.store.Versions(ctx, k.label)
	if err != nil {
		return err
	}
	var enabled, disabled []keys.Version
	for _, v := range versions {
		switch v.State {
		case keys.Enabled:
			enabled = append(enabled, v)
		case keys.Disabled:
			disabled = append(disabled, v)
		case keys.Destroyed:
		}
	}
	begun := k.pinned != ""
	switch {
	case len(enabled) > 1:
		return fmt.Errorf("%d enabled versions of key %q: an identity key has one; disable the others", len(enabled), k.label)
	case len(enabled) == 0 && len(disabled) > 0:
		// The store's own words say what is wrong with it. None is made beside it: its owner meant this one.
		_, err := k.store.Signer(ctx, k.label, disabled[len(disabled)-1].ID)
		return fmt.Errorf("%w: let it sign, or name another key", err)
	case len(enabled) == 0 && begun:
		return fmt.Errorf("no key %q, and the log in state_dir was begun with one: restore it, or start a new state_dir", k.label)
	case len(enabled) == 0 && !create:
		return nil
	case len(enabled) == 0:
		v, err := k.store.Create(ctx, k.label, alg)
		if err != nil {
			return err
		}
		enabled = append(enabled, v)
	}
	v := enabled[0]
	if v.Algorithm != alg {
		return fmt.Errorf("key %q is %s, the configuration says %s", k.label, v.Algorithm, alg)
	}
	if old != nil && keys.SamePublic(v.Public, old) {
		return fmt.Errorf("key %q is the identity key of the sealed log, which whoever stole it has too: a successor needs a new one; give it "+
			"another label", k.label)
	}
	if begun {
		pub, err := keys.PublicKey(k.pinned)
		if err != nil {
			return fmt.Errorf("read log.json: %w", err)
		}
		if !keys.SamePublic(v.Public, pub) {
			return fmt.Errorf("key %q is not the one that log %s was begun with, %s: the identity key of a log never changes; restore that key "+
				"or start a new state_dir", k.label, k.origin, k.pinned)
		}
	}
	if k.identity, err = k.store.Signer(ctx, k.label, v.ID); err != nil {
		if i, ierr := keys.Inspect(ctx, k.store, k.label, v.ID); ierr == nil && i.Exportable {
			return fmt.Errorf("%w; keys.allow_exportable takes it as it is", err)
		}
		return err
	}
	k.identityID = v.ID
	return nil
}

// maxNote bounds the files of a succession.
const maxNote = 1 << 20

// succession reads what the successor of a sealed log quotes, and the sealed log's identity key, as the policy that its auditors
// trust has it. Keys are compared, not verifier keys: those hold the name of their log, and so differ for one key of two logs.
func succession(cfg config.Succeeds) (*receipt.Quote, crypto.PublicKey, error) {
	if cfg.IsZero() {
		return nil, nil, nil
	}
	text, err := readSmall(cfg.Policy)
	if err != nil {
		return nil, nil, fmt.Errorf("succeeds.policy: %w", err)
	}
	p, err := receipt.ParsePolicy(text)
	if err != nil {
		return nil, nil, fmt.Errorf("succeeds.policy: %s: %w", cfg.Policy, err)
	}
	leaf, err := readSmall(cfg.Seal)
	if err != nil {
		return nil, nil, fmt.Errorf("succeeds.seal: %w", err)
	}
	seal, err := receipt.ParseSeal(leaf)
	if err != nil {
		return nil, nil, fmt.Errorf("succeeds.seal: %s holds no seal: 'knhk keys revoke --identity --out FILE' writes one: %w", cfg.Seal, err)
	}
	if err := p.Revoke(leaf); err != nil {
		return nil, nil, fmt.Errorf("succeeds.seal: %s does not verify under succeeds.policy: %w", cfg.Seal, err)
	}
	identity, ok := p.Identity(seal.Origin)
	if !ok {
		return nil, nil, fmt.Errorf("succeeds.policy: no log %s", seal.Origin)
	}
	old, err := keys.PublicKey(identity)
	if err != nil {
		return nil, nil, fmt.Errorf("succeeds.policy: %w", err)
	}
	return &receipt.Quote{Origin: seal.Origin, Identity: identity, Size: seal.Size, Root: seal.Root}, old, nil
}

func readSmall(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	switch {
	case err != nil:
		return nil, err
	case !fi.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file", path)
	case fi.Size() > maxNote:
		return nil, fmt.Errorf("%s is %d bytes long: at most %d are read", path, fi.Size(), maxNote)
	}
	return os.ReadFile(path)
}
