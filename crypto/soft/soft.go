package soft

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
)

var errClosed = errors.New("store is closed")

// staleTemp is the age at which Open takes an unfinished write for abandoned.
const staleTemp = time.Hour

// Store is a directory of keys. Safe for concurrent use. Implements keys.Store.
type Store struct {
	dir    string
	now    func() time.Time
	closed atomic.Bool
	mu     sync.Mutex // held over each read-change-write of a version, and over Create's choice of an id
}

var _ keys.Store = (*Store)(nil)

// Open opens the store in dir and makes the directory (mode 0700; its parents too) where there is none. It reads every
// version, so that a damaged file or one that others can read is found now: all of them are named in one error.
func Open(dir string) (*Store, error) {
	if err := mkdirAll(dir); err != nil {
		return nil, fmt.Errorf("soft: open: %w", err)
	}
	s := &Store{dir: dir, now: time.Now}
	if _, err := s.load(""); err != nil {
		return nil, fmt.Errorf("soft: open: %w", err)
	}
	if err := s.sweep(); err != nil {
		return nil, fmt.Errorf("soft: open: %w", err)
	}
	return s, nil
}

// sweep removes unfinished writes of processes that died; they may hold private keys that nobody lists.
func (s *Store) sweep() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), tmpPrefix) {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // its writer has just put it in place
		} else if err != nil {
			return err
		}
		if s.now().Sub(info.ModTime()) < staleTemp {
			continue
		}
		if err := os.Remove(filepath.Join(s.dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// load reads the versions of a label in order of creation, of all labels when label is "".
func (s *Store) load(label string) ([]version, error) {
	info, err := os.Stat(s.dir)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("%s is not a directory", s.dir)
	}
	if err := ownerOnly(s.dir, info); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	var vs []version
	var errs []error
	for _, e := range entries {
		if !isVersionFile(e.Name()) || label != "" && !strings.HasPrefix(e.Name(), filePrefix(label)) {
			continue
		}
		v, _, err := readVersion(filepath.Join(s.dir, e.Name()))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		vs = append(vs, v)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	slices.SortFunc(vs, func(a, b version) int { return keys.CompareVersionIDs(a.ID, b.ID) })
	return vs, nil
}

// read reads one version; one that is not there is keys.ErrNotFound.
func (s *Store) read(label, id string) (version, fs.FileInfo, error) {
	// The id becomes part of a file name: only ids this package writes get that far.
	if _, err := keys.ParseVersionID(id); err != nil || keys.CheckLabel(label) != nil {
		return version{}, nil, fmt.Errorf("%w: label %q, id %q", keys.ErrNotFound, label, id)
	}
	v, info, err := readVersion(filepath.Join(s.dir, fileName(label, id)))
	if errors.Is(err, fs.ErrNotExist) {
		return version{}, nil, fmt.Errorf("%w: label %q, id %q", keys.ErrNotFound, label, id)
	}
	return v, info, err
}

// begin refuses when the context is over or the store closed.
func (s *Store) begin(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.closed.Load() {
		return errClosed
	}
	return nil
}

// Custody says that these are not production keys.
func (s *Store) Custody() string { return "software keys, development only" }

// Create makes a version. On an error there may be one all the same, when only the last directory sync failed.
func (s *Store) Create(ctx context.Context, label string, alg keys.Algorithm) (keys.Version, error) {
	v, err := s.create(ctx, label, alg)
	if err != nil {
		return keys.Version{}, fmt.Errorf("soft: create: %w", err)
	}
	return v.Version, nil
}

func (s *Store) create(ctx context.Context, label string, alg keys.Algorithm) (version, error) {
	if err := s.begin(ctx); err != nil {
		return version{}, err
	}
	if err := keys.CheckLabel(label); err != nil {
		return version{}, err
	}
	private, err := generate(alg)
	if err != nil {
		return version{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	known, err := s.load(label)
	if err != nil {
		return version{}, err
	}
	ids := make([]string, len(known))
	for i, k := range known {
		ids[i] = k.ID
	}
	id := keys.NextVersionID(ids, s.now())
	v := version{private: private, Version: keys.Version{
		Label: label, ID: id.String(), Algorithm: alg, Public: private.Public(), State: keys.Enabled, Created: id.Created,
	}}
	proof := keys.ProofMessage(v.Label, v.ID)
	sig, err := sign(v, proof)
	if err != nil {
		return version{}, err
	}
	if err := keys.Verify(alg, v.Public, proof, sig); err != nil {
		return version{}, err
	}
	return v, writeVersion(s.dir, v)
}

func generate(alg keys.Algorithm) (crypto.Signer, error) {
	switch alg {
	case keys.Ed25519:
		_, private, err := ed25519.GenerateKey(rand.Reader)
		return private, err
	case keys.P256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	_, err := keys.ParseAlgorithm(string(alg))
	return nil, err
}

func sign(v version, msg []byte) ([]byte, error) {
	if v.Algorithm == keys.Ed25519 {
		return v.private.Sign(nil, msg, crypto.Hash(0))
	}
	digest := sha256.Sum256(msg)
	return v.private.Sign(rand.Reader, digest[:], crypto.SHA256)
}

// Versions lists the versions of label, destroyed ones too.
func (s *Store) Versions(ctx context.Context, label string) ([]keys.Version, error) {
	if err := s.begin(ctx); err != nil {
		return nil, fmt.Errorf("soft: versions: %w", err)
	}
	if err := keys.CheckLabel(label); err != nil {
		return nil, fmt.Errorf("soft: versions: %w", err)
	}
	vs, err := s.load(label)
	if err != nil {
		return nil, fmt.Errorf("soft: versions: %w", err)
	}
	out := make([]keys.Version, len(vs))
	for i, v := range vs {
		out[i] = v.Version
	}
	return out, nil
}

// Signer opens one version.
func (s *Store) Signer(ctx context.Context, label, id string) (keys.Signer, error) {
	if err := s.begin(ctx); err != nil {
		return nil, fmt.Errorf("soft: signer: %w", err)
	}
	v, info, err := s.read(label, id)
	if err != nil {
		return nil, fmt.Errorf("soft: signer: %w", err)
	}
	if v.State != keys.Enabled {
		return nil, fmt.Errorf("soft: signer: %w: label %q, id %q", keys.ErrDisabled, label, id)
	}
	return &signer{store: s, alg: v.Algorithm, public: v.Public, v: v, info: info}, nil
}

// Inspect says how a version's private key is kept: in a file, which whoever can read it can copy. Implements keys.Inspector.
func (s *Store) Inspect(ctx context.Context, label, id string) (keys.Inspection, error) {
	if err := s.begin(ctx); err != nil {
		return keys.Inspection{}, fmt.Errorf("soft: inspect: %w", err)
	}
	v, _, err := s.read(label, id)
	if err != nil {
		return keys.Inspection{}, fmt.Errorf("soft: inspect: %w", err)
	}
	found := keys.Inspection{CanSign: v.State == keys.Enabled, Exportable: v.State != keys.Destroyed}
	switch v.State {
	case keys.Destroyed:
		found.Why = "the private key is destroyed"
	case keys.Disabled:
		found.Why = "the version is disabled; its private key lies in a file and can be copied"
	case keys.Enabled:
		found.Why = "the private key lies in a file and can be copied: use a token in production"
	}
	return found, nil
}

// Disable makes a version refuse to sign. A destroyed one refuses already.
func (s *Store) Disable(ctx context.Context, label, id string) error {
	if err := s.change(ctx, label, id, keys.Disabled); err != nil {
		return fmt.Errorf("soft: disable: %w", err)
	}
	return nil
}

// Destroy takes the private key out of the version's file. The blocks it stood in are the file system's.
func (s *Store) Destroy(ctx context.Context, label, id string) error {
	if err := s.change(ctx, label, id, keys.Destroyed); err != nil {
		return fmt.Errorf("soft: destroy: %w", err)
	}
	return nil
}

func (s *Store) change(ctx context.Context, label, id string, to keys.State) error {
	if err := s.begin(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	v, _, err := s.read(label, id)
	if err != nil {
		return err
	}
	if v.State == to || v.State == keys.Destroyed {
		return nil
	}
	v.State = to
	if to == keys.Destroyed {
		v.private = nil
	}
	return writeVersion(s.dir, v)
}

// Close makes the store and its signers refuse. It holds no handles.
func (s *Store) Close() error {
	s.closed.Store(true)
	return nil
}

// signer signs with one version and looks at its file each time, so that another process can disable it.
type signer struct {
	store  *Store
	alg    keys.Algorithm
	public crypto.PublicKey

	mu   sync.Mutex
	v    version     // as last read
	info fs.FileInfo // of the file it was read from; a change replaces the file
}

func (g *signer) Algorithm() keys.Algorithm { return g.alg }
func (g *signer) Public() crypto.PublicKey  { return g.public }

func (g *signer) Sign(ctx context.Context, msg []byte) ([]byte, error) {
	if err := g.store.begin(ctx); err != nil {
		return nil, fmt.Errorf("soft: sign: %w", err)
	}
	if len(msg) > keys.MaxMessage {
		return nil, fmt.Errorf("soft: sign: message has %d bytes, at most %d are signed", len(msg), keys.MaxMessage)
	}
	v, err := g.current()
	if err != nil {
		return nil, fmt.Errorf("soft: sign: %w", err)
	}
	if v.State != keys.Enabled {
		return nil, fmt.Errorf("soft: sign: %w: label %q, id %q", keys.ErrDisabled, v.Label, v.ID)
	}
	sig, err := sign(v, msg)
	if err != nil {
		return nil, fmt.Errorf("soft: sign: %w", err)
	}
	return sig, nil
}

// current returns the version as it is on disk; the file is read again only when it was replaced.
func (g *signer) current() (version, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	info, err := os.Lstat(filepath.Join(g.store.dir, fileName(g.v.Label, g.v.ID)))
	if err == nil && os.SameFile(info, g.info) && info.ModTime().Equal(g.info.ModTime()) && info.Size() == g.info.Size() &&
		info.Mode() == g.info.Mode() {
		return g.v, nil
	}
	v, info, err := g.store.read(g.v.Label, g.v.ID)
	if err != nil {
		return version{}, err
	}
	if !keys.SamePublic(v.Public, g.public) {
		return version{}, fmt.Errorf("the key of label %q, id %q was replaced by another", v.Label, v.ID)
	}
	g.v, g.info = v, info
	return v, nil
}
