package kms

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
)

const (
	archiveFormat = 1 // of record
	tmpPrefix     = ".tmp-"
	maxEntry      = 16 << 10 // bytes; an entry takes about 400
)

// Entry is what the archive keeps of one version.
type Entry struct {
	Label, ID string
	Algorithm keys.Algorithm
	Public    crypto.PublicKey
	Created   time.Time
	Destroyed bool // for ever; never taken back
}

// record is the content of an entry's file.
type record struct {
	Format    int            `json:"format"`
	Place     string         `json:"place"`
	Label     string         `json:"label"`
	ID        string         `json:"id"`
	Algorithm keys.Algorithm `json:"algorithm"`
	PublicKey string         `json:"public_key"` // PKIX, PEM
	Created   time.Time      `json:"created"`
	Destroyed bool           `json:"destroyed,omitempty"`
}

// Archive keeps the public keys of versions in a directory, one file each, because services do not give those of versions that
// are disabled or destroyed, and forget versions altogether. Several processes may use one directory at once. Nothing in it is
// secret. Without it nothing that was signed is lost to verification, which reads public keys from the log; versions that the
// service has forgotten are not listed any more then.
//
// An entry is durable when Put returns. A crash at any point leaves the old entry or the new one.
type Archive struct {
	dir, place string
	mu         sync.Mutex // over changes
}

// OpenArchive opens the archive of one place under dir. Directories that are missing are made by the first Put, durably. Place is
// that of keys.URI.Place; each has a directory of its own.
func OpenArchive(dir, place string) (*Archive, error) {
	if dir == "" {
		return nil, errors.New("kms: open archive: no directory: name one with archive=/DIR")
	}
	scheme, _, _ := strings.Cut(place, ":")
	sum := sha256.Sum256([]byte(place))
	return &Archive{dir: filepath.Join(dir, url.PathEscape(scheme)+"-"+hex.EncodeToString(sum[:8])), place: place}, nil
}

// prefix begins the names of a label's files; the escaped label holds no "@", so no label is a prefix of another.
func prefix(label string) string {
	s := url.QueryEscape(label)
	if len(s) > 96 { // a file name has 255 bytes
		sum := sha256.Sum256([]byte(label))
		s = hex.EncodeToString(sum[:])
	}
	return s + "@"
}

var errLong = errors.New("id is too long for a file name")

func (a *Archive) path(label, id string) (string, error) {
	name := prefix(label) + url.QueryEscape(id) + ".json"
	if len(name) > 255 {
		return "", fmt.Errorf("%w: %d bytes", errLong, len(id))
	}
	return filepath.Join(a.dir, name), nil
}

// Put keeps an entry, durably. One that is there already may only become destroyed: another public key or algorithm under the
// same id is an error. A time of creation that differs is the service's affair; the first stays.
func (a *Archive) Put(e Entry) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	old, ok, err := a.Get(e.Label, e.ID)
	switch {
	case err != nil:
		return err
	case ok && (old.Algorithm != e.Algorithm || !keys.SamePublic(old.Public, e.Public)):
		return fmt.Errorf("kms: archive: %s has another public key than it had (%s): %w", nameOf(e.Label, e.ID), a.dir, errWrong)
	case ok && (old.Destroyed || !e.Destroyed):
		return nil
	case ok:
		e.Created = old.Created
	}
	if err := a.write(e); err != nil {
		return fmt.Errorf("kms: archive: put %s: %w", nameOf(e.Label, e.ID), err)
	}
	return nil
}

// Get returns the entry of one version; ok is false when there is none.
func (a *Archive) Get(label, id string) (e Entry, ok bool, err error) {
	if label == "" || id == "" {
		return Entry{}, false, nil
	}
	path, err := a.path(label, id)
	if err == nil {
		e, err = a.read(path)
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errLong) { // nothing can have been put under an id that is too long
		return Entry{}, false, nil
	}
	if err == nil && (e.Label != label || e.ID != id) {
		err = fmt.Errorf("%s holds the entry of %s", path, nameOf(e.Label, e.ID))
	}
	if err != nil {
		return Entry{}, false, fmt.Errorf("kms: archive: %w", err)
	}
	return e, true, nil
}

// List returns the entries of label by time of creation, then id. What a crash left half-written is passed over.
func (a *Archive) List(label string) ([]Entry, error) {
	files, err := os.ReadDir(a.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("kms: archive: %w", err)
	}
	var es []Entry
	for _, f := range files {
		if !strings.HasPrefix(f.Name(), prefix(label)) || !strings.HasSuffix(f.Name(), ".json") {
			continue
		}
		e, err := a.read(filepath.Join(a.dir, f.Name()))
		if err != nil {
			return nil, fmt.Errorf("kms: archive: %w", err)
		}
		if want, err := a.path(e.Label, e.ID); err != nil || e.Label != label || filepath.Base(want) != f.Name() {
			return nil, fmt.Errorf("kms: archive: %s holds the entry of %s", f.Name(), nameOf(e.Label, e.ID))
		}
		es = append(es, e)
	}
	slices.SortFunc(es, func(x, y Entry) int {
		if c := x.Created.Compare(y.Created); c != 0 {
			return c
		}
		return keys.CompareVersionIDs(x.ID, y.ID)
	})
	return es, nil
}

func (a *Archive) read(path string) (Entry, error) {
	f, err := os.Open(path)
	if err != nil {
		return Entry{}, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxEntry))
	if err != nil {
		return Entry{}, err
	}
	e, err := a.decode(b)
	if err != nil {
		return Entry{}, fmt.Errorf("%s: %w: remove the file, if the service still has the version", path, err)
	}
	return e, nil
}

// decode reads an entry strictly.
func (a *Archive) decode(b []byte) (Entry, error) {
	var r record
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return Entry{}, fmt.Errorf("no entry in JSON: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Entry{}, errors.New("data after the JSON object")
	}
	if r.Format != archiveFormat {
		return Entry{}, fmt.Errorf("format %d is not known, want %d", r.Format, archiveFormat)
	}
	if r.Place != a.place {
		return Entry{}, fmt.Errorf("entry of %q, not of %q", r.Place, a.place)
	}
	block, rest := pem.Decode([]byte(r.PublicKey))
	if block == nil || block.Type != "PUBLIC KEY" || len(rest) != 0 {
		return Entry{}, errors.New("public_key is not one PEM block")
	}
	pub, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return Entry{}, errors.New("public_key is not a PKIX public key")
	}
	if alg, err := keys.AlgorithmOf(pub); err != nil || alg != r.Algorithm {
		return Entry{}, fmt.Errorf("public_key is %q, algorithm says %q", alg, r.Algorithm)
	}
	return Entry{Label: r.Label, ID: r.ID, Algorithm: r.Algorithm, Public: pub, Created: r.Created, Destroyed: r.Destroyed}, nil
}

func (a *Archive) write(e Entry) (err error) {
	path, err := a.path(e.Label, e.ID)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKIXPublicKey(e.Public)
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(record{
		Format: archiveFormat, Place: a.place, Label: e.Label, ID: e.ID, Algorithm: e.Algorithm,
		PublicKey: string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), Created: e.Created, Destroyed: e.Destroyed,
	}, "", "  ")
	if err != nil {
		return err
	}
	if err := mkdirAll(a.dir); err != nil {
		return err
	}
	f, err := os.CreateTemp(a.dir, tmpPrefix+"*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	if err = fill(f, append(b, '\n')); err != nil { // a crash from here on leaves a complete file under its temporary name
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(a.dir) // until here a crash may bring the old entry back
}

// fill writes b to f, makes it durable and closes f.
func fill(f *os.File, b []byte) error {
	_, err := f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// mkdirAll makes dir and what is missing above it, each durable under its name before the next.
func mkdirAll(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent := filepath.Dir(dir)
	if err := mkdirAll(parent); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(parent)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
