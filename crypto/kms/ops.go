package kms

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
)

// settle is how long a version that this process has made may be unknown to the service before it is called missing: services
// answer from copies that lag behind.
const settle = time.Minute

// known is what never changes of a version.
type known struct {
	public crypto.PublicKey
	made   time.Time // when this process made it; zero when another did
}

func nameOf(label, id string) string { return fmt.Sprintf("%q version %q", label, id) }

func mapKey(label, id string) string { return label + "\x00" + id }

// Create makes a version, keeps its public key and has it sign. A version that does not sign is destroyed again.
func (s *Store) Create(ctx context.Context, label string, alg keys.Algorithm) (keys.Version, error) {
	v, err := s.create(ctx, label, alg)
	if err != nil {
		return keys.Version{}, fmt.Errorf("kms: create: %w", err)
	}
	return v, nil
}

func (s *Store) create(ctx context.Context, label string, alg keys.Algorithm) (keys.Version, error) {
	if err := keys.CheckLabel(label); err != nil {
		return keys.Version{}, err
	}
	if _, err := keys.ParseAlgorithm(string(alg)); err != nil {
		return keys.Version{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.CreateTimeout)
	defer cancel()
	var info Info
	err := s.do(ctx, keys.OpCreate, label, s.cfg.CreateTimeout, func(ctx context.Context) (err error) {
		info, err = s.cfg.Backend.Create(ctx, label, alg)
		return err
	})
	if err != nil {
		return keys.Version{}, err // a crash or an error from here on leaves a version that Versions lists
	}
	v, err := s.prove(ctx, label, alg, info)
	if err != nil && ctx.Err() == nil && !errors.Is(err, keys.ErrUnavailable) && !errors.Is(err, keys.ErrThrottled) {
		derr := s.do(ctx, keys.OpDestroy, label, s.cfg.Timeout, func(ctx context.Context) error {
			return s.cfg.Backend.Destroy(ctx, label, info.ID)
		})
		if derr != nil {
			err = fmt.Errorf("%w (and it was not destroyed: %w)", err, derr)
		}
	}
	return v, err
}

// prove reads the public key of a new version, keeps it and verifies a signature under it.
func (s *Store) prove(ctx context.Context, label string, alg keys.Algorithm, info Info) (keys.Version, error) {
	if info.Algorithm != alg || info.State != keys.Enabled || info.ID == "" {
		return keys.Version{}, fmt.Errorf("the service made a version %q, %s and %s, want %s", info.ID, info.Algorithm, info.State, alg)
	}
	s.mu.Lock()
	s.public[mapKey(label, info.ID)] = known{made: s.cfg.now()}
	s.mu.Unlock()
	v, err := s.version(ctx, label, info)
	if err != nil {
		return keys.Version{}, err
	}
	proof := keys.ProofMessage(label, info.ID)
	if _, err := s.sign(ctx, label, info.ID, alg, v.Public, proof); err != nil {
		return keys.Version{}, fmt.Errorf("%s does not prove itself: %w", nameOf(label, info.ID), err)
	}
	return v, nil
}

// version completes what the service tells with the public key, from memory, from the service while it gives it, or from the
// archive. The service is asked once in the life of a Store, and must say what the archive says.
func (s *Store) version(ctx context.Context, label string, info Info) (keys.Version, error) {
	v := keys.Version{Label: label, ID: info.ID, Algorithm: info.Algorithm, State: info.State, Created: info.Created}
	s.mu.Lock()
	k := s.public[mapKey(label, info.ID)]
	s.mu.Unlock()
	if v.Public = k.public; v.Public != nil {
		return v, s.matches(v)
	}
	if info.State != keys.Enabled {
		e, ok, err := s.cfg.Archive.Get(label, info.ID)
		if err != nil || !ok { // not ok: listed without its public key, which nobody has kept here
			return v, err
		}
		v.Public = e.Public
		return v, s.matches(v)
	}
	err := s.do(ctx, keys.OpVersions, label, s.cfg.Timeout, func(ctx context.Context) error {
		pub, err := s.cfg.Backend.PublicKey(ctx, label, info.ID)
		if err == nil {
			k.public = pub
		}
		return err
	})
	if err != nil {
		return keys.Version{}, fmt.Errorf("public key of %s: %w", nameOf(label, info.ID), err)
	}
	v.Public = k.public
	if err := s.matches(v); err != nil {
		return keys.Version{}, err
	}
	if err := s.cfg.Archive.Put(Entry{
		Label: label, ID: info.ID, Algorithm: info.Algorithm, Public: v.Public, Created: info.Created,
	}); err != nil {
		return keys.Version{}, err
	}
	s.mu.Lock()
	s.public[mapKey(label, info.ID)] = k
	s.mu.Unlock()
	return v, nil
}

func (s *Store) matches(v keys.Version) error {
	alg, err := keys.AlgorithmOf(v.Public)
	if err != nil || alg != v.Algorithm {
		return fmt.Errorf("%s is %s, its public key is %s: %w", nameOf(v.Label, v.ID), v.Algorithm, alg, errors.Join(err, errWrong))
	}
	return nil
}

// errWrong says that the service contradicts itself, or what it said before.
var errWrong = errors.New("the service's answers do not fit together")

// Versions lists what the service knows, and what only the archive knows: versions that the service has forgotten, as
// destroyed. A version that neither is enabled nor was ever seen enabled from here has no Public.
func (s *Store) Versions(ctx context.Context, label string) ([]keys.Version, error) {
	if err := keys.CheckLabel(label); err != nil {
		return nil, fmt.Errorf("kms: versions: %w", err)
	}
	for again := 0; ; again++ {
		vs, err := s.versions(ctx, label)
		switch {
		case err == nil:
			return vs, nil
		case again < 2 && (errors.Is(err, keys.ErrDisabled) || errors.Is(err, keys.ErrNotFound)):
			// A version was disabled between the list and its public key: the list is out of date.
		default:
			return nil, fmt.Errorf("kms: versions: %w", err)
		}
	}
}

func (s *Store) versions(ctx context.Context, label string) ([]keys.Version, error) {
	// Read before the service is asked, so that what another handle makes meanwhile is not in the archive alone.
	kept, err := s.cfg.Archive.List(label)
	if err != nil {
		return nil, err
	}
	var list []Info
	err = s.do(ctx, keys.OpVersions, label, s.cfg.Timeout, func(ctx context.Context) error {
		l, err := s.cfg.Backend.List(ctx, label)
		if err == nil {
			list = l
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	listed := make(map[string]bool, len(list))
	var live []keys.Version
	for _, info := range list {
		listed[info.ID] = true
		v, err := s.version(ctx, label, info)
		if err != nil {
			return nil, err
		}
		live = append(live, v)
	}
	var vs []keys.Version
	for _, e := range kept {
		if listed[e.ID] {
			continue
		}
		v := keys.Version{Label: label, ID: e.ID, Algorithm: e.Algorithm, Public: e.Public, State: keys.Destroyed, Created: e.Created}
		if !e.Destroyed {
			info, err := s.get(ctx, label, e.ID)
			if err != nil {
				return nil, err
			}
			v.State = info.State
		}
		// Among those listed it stands where its time of creation belongs; the order of the service's own is the service's.
		vs = append(vs, v)
	}
	return merge(vs, live), nil
}

// merge puts versions that the service has forgotten among the listed ones, by time of creation.
func merge(kept, live []keys.Version) []keys.Version {
	out := make([]keys.Version, 0, len(kept)+len(live))
	for _, v := range live {
		for len(kept) > 0 && !kept[0].Created.After(v.Created) {
			out, kept = append(out, kept[0]), kept[1:]
		}
		out = append(out, v)
	}
	return append(out, kept...)
}

// get asks for one version, and the archive for one that the service does not know.
func (s *Store) get(ctx context.Context, label, id string) (Info, error) {
	if keys.CheckLabel(label) != nil {
		return Info{}, fmt.Errorf("%s: %w", nameOf(label, id), keys.ErrNotFound)
	}
	var info Info
	err := s.do(ctx, keys.OpSigner, label, s.cfg.Timeout, func(ctx context.Context) error {
		i, err := s.cfg.Backend.Get(ctx, label, id)
		if err == nil {
			info = i
		}
		return err
	})
	if err == nil {
		if info.State == keys.Destroyed {
			err = s.buried(label, id)
		}
		return info, err
	}
	if !errors.Is(err, keys.ErrNotFound) {
		return Info{}, err
	}
	e, ok, aerr := s.cfg.Archive.Get(label, id)
	if aerr != nil {
		return Info{}, aerr
	}
	if !ok {
		return Info{}, fmt.Errorf("%s: %w", nameOf(label, id), err)
	}
	s.mu.Lock()
	made := s.public[mapKey(label, id)].made
	s.mu.Unlock()
	if !e.Destroyed && !made.IsZero() && s.cfg.now().Before(made.Add(settle)) {
		return Info{}, fmt.Errorf("%w: the service does not know %s yet, made a moment ago", keys.ErrUnavailable, nameOf(label, id))
	}
	if err := s.buried(label, id); err != nil {
		return Info{}, err
	}
	return Info{ID: id, Algorithm: e.Algorithm, State: keys.Destroyed, Created: e.Created}, nil
}

// buried notes in the archive that a version is destroyed, if it is there.
func (s *Store) buried(label, id string) error {
	e, ok, err := s.cfg.Archive.Get(label, id)
	if err != nil || !ok || e.Destroyed {
		return err
	}
	e.Destroyed = true
	return s.cfg.Archive.Put(e)
}

// Signer opens one version.
func (s *Store) Signer(ctx context.Context, label, id string) (keys.Signer, error) {
	g, err := s.signer(ctx, label, id)
	if err != nil {
		return nil, fmt.Errorf("kms: signer: %w", err)
	}
	return g, nil
}

func (s *Store) signer(ctx context.Context, label, id string) (*signer, error) {
	info, err := s.get(ctx, label, id)
	if err != nil {
		return nil, err
	}
	if info.State != keys.Enabled {
		return nil, fmt.Errorf("%s is %s: %w", nameOf(label, id), info.State, keys.ErrDisabled)
	}
	if info.Exportable && !s.cfg.AllowExportable {
		return nil, fmt.Errorf("%s: %s", nameOf(label, id), exportable)
	}
	v, err := s.version(ctx, label, info)
	if err != nil {
		return nil, err
	}
	return &signer{store: s, label: label, id: id, alg: v.Algorithm, public: v.Public}, nil
}

const exportable = "exportable key (refused unless allowed): it can leave the service or came from outside; make one in the service"

// Inspect says how a version is kept. Implements keys.Inspector.
func (s *Store) Inspect(ctx context.Context, label, id string) (keys.Inspection, error) {
	info, err := s.get(ctx, label, id)
	if err != nil {
		return keys.Inspection{}, fmt.Errorf("kms: inspect: %w", err)
	}
	i := keys.Inspection{CanSign: info.State == keys.Enabled && (!info.Exportable || s.cfg.AllowExportable), Exportable: info.Exportable}
	switch {
	case info.State != keys.Enabled:
		i.Why = fmt.Sprintf("%s is %s", nameOf(label, id), info.State)
	case info.Exportable:
		i.Why = exportable
	}
	return i, nil
}

// Disable makes a version refuse to sign.
func (s *Store) Disable(ctx context.Context, label, id string) error {
	if err := s.end(ctx, keys.OpDisable, label, id, s.cfg.Backend.Disable); err != nil {
		return fmt.Errorf("kms: disable: %w", err)
	}
	return nil
}

// Destroy has the service destroy the private key, now or after the delay that the service has for it.
func (s *Store) Destroy(ctx context.Context, label, id string) error {
	if err := s.end(ctx, keys.OpDestroy, label, id, s.cfg.Backend.Destroy); err != nil {
		return fmt.Errorf("kms: destroy: %w", err)
	}
	return nil
}

// end disables or destroys. The public key is kept first: afterwards the service may not give it any more.
func (s *Store) end(ctx context.Context, op keys.Op, label, id string, fn func(context.Context, string, string) error) error {
	info, err := s.get(ctx, label, id)
	if err != nil {
		return err
	}
	if info.State == keys.Destroyed || op == keys.OpDisable && info.State == keys.Disabled {
		return nil
	}
	if _, err := s.version(ctx, label, info); err != nil && !errors.Is(err, keys.ErrDisabled) {
		return err
	}
	if err := s.do(ctx, op, label, s.cfg.Timeout, func(ctx context.Context) error { return fn(ctx, label, id) }); err != nil {
		return fmt.Errorf("%s: %w", nameOf(label, id), err)
	}
	if op == keys.OpDestroy {
		// A service that does not know it from here on has destroyed it: it is not one that was made a moment ago.
		s.mu.Lock()
		k := s.public[mapKey(label, id)]
		k.made = time.Time{}
		s.public[mapKey(label, id)] = k
		s.mu.Unlock()
	}
	if info, err = s.get(ctx, label, id); err != nil { // notes in the archive what the service says now
		return err
	}
	if info.State == keys.Enabled {
		return fmt.Errorf("%s is still enabled: %w", nameOf(label, id), errWrong)
	}
	return nil
}

// signer signs with one version. Implements keys.Signer.
type signer struct {
	store     *Store
	label, id string
	alg       keys.Algorithm
	public    crypto.PublicKey
}

func (g *signer) Algorithm() keys.Algorithm { return g.alg }
func (g *signer) Public() crypto.PublicKey  { return g.public }

// Sign has the service sign and verifies here.
func (g *signer) Sign(ctx context.Context, msg []byte) ([]byte, error) {
	sig, err := g.store.sign(ctx, g.label, g.id, g.alg, g.public, msg)
	if err != nil {
		return nil, fmt.Errorf("kms: sign: %w", err)
	}
	return sig, nil
}

func (s *Store) sign(ctx context.Context, label, id string, alg keys.Algorithm, pub crypto.PublicKey, msg []byte) ([]byte, error) {
	if len(msg) > keys.MaxMessage {
		return nil, fmt.Errorf("message has %d bytes, at most %d are signed", len(msg), keys.MaxMessage)
	}
	var input []byte
	if alg == keys.P256 {
		digest := sha256.Sum256(msg)
		input = digest[:]
	} else {
		input = bytes.Clone(msg) // the client may read it after the caller has gone
	}
	var sig []byte
	err := s.do(ctx, keys.OpSign, label, s.cfg.Timeout, func(ctx context.Context) error {
		b, err := s.cfg.Backend.Sign(ctx, label, id, alg, input)
		if err == nil {
			sig = b
		}
		return err
	})
	if errors.Is(err, keys.ErrNotFound) {
		// Gone for good or not known yet: get tells, from the archive.
		info, gerr := s.get(ctx, label, id)
		switch {
		case gerr != nil:
			return nil, gerr
		case info.State != keys.Enabled:
			err = fmt.Errorf("%w: %w", keys.ErrDisabled, err)
		default: // not found by one call and there for the next
			err = fmt.Errorf("%w: the service does not find what it has: %s", keys.ErrUnavailable, err.Error())
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", nameOf(label, id), err)
	}
	if err := keys.Verify(alg, pub, msg, sig); err != nil {
		return nil, fmt.Errorf("%s: the service's signature is wrong: %w", nameOf(label, id), err)
	}
	return sig, nil
}
