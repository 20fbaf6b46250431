package soft

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
)

const (
	format    = 1 // of record
	tmpPrefix = ".tmp-"
	maxFile   = 16 << 10 // bytes; a version takes about 700
)

// record is the content of a version's file. Who can read private_key can sign with this version for ever.
type record struct {
	Format     int            `json:"format"`
	Label      string         `json:"label"`
	ID         string         `json:"id"`
	Algorithm  keys.Algorithm `json:"algorithm"`
	State      keys.State     `json:"state"`
	Created    time.Time      `json:"created"`
	PublicKey  string         `json:"public_key"`            // PKIX, PEM
	PrivateKey string         `json:"private_key,omitempty"` // PKCS#8, PEM; gone when destroyed
}

// version is a record with its keys parsed.
type version struct {
	keys.Version
	private crypto.Signer // nil when destroyed
}

// filePrefix begins the names of a label's files; the escaped label holds no "@", so no label is a prefix of another.
func filePrefix(label string) string { return url.QueryEscape(label) + "@" }

func fileName(label, id string) string { return filePrefix(label) + id + ".json" }

// isVersionFile tells version files from anything else that may lie in the directory.
func isVersionFile(name string) bool {
	return strings.HasSuffix(name, ".json") && strings.Contains(name, "@") && !strings.HasPrefix(name, tmpPrefix)
}

// ownerOnly refuses a file or directory that group or others may use.
func ownerOnly(path string, info fs.FileInfo) error {
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return fmt.Errorf("%s has mode %04o: private keys must be for their owner only (chmod go= %s)", path, mode, path)
	}
	return nil
}

// encodeVersion makes the bytes of a version's file.
func encodeVersion(v version) ([]byte, error) {
	pub, err := x509.MarshalPKIXPublicKey(v.Public)
	if err != nil {
		return nil, err
	}
	r := record{
		Format: format, Label: v.Label, ID: v.ID, Algorithm: v.Algorithm, State: v.State, Created: v.Created,
		PublicKey: string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pub})),
	}
	if v.private != nil {
		der, err := x509.MarshalPKCS8PrivateKey(v.private)
		if err != nil {
			return nil, err
		}
		r.PrivateKey = string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	}
	b, err := json.MarshalIndent(r, "", "  ")
	return append(b, '\n'), err
}

// decodeVersion reads a version's file strictly: unknown fields, keys that do not belong together, and states that do
// not fit the keys are errors. Errors never repeat the content.
func decodeVersion(b []byte) (version, error) {
	var r record
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return version{}, errors.New("not a key version in JSON")
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return version{}, errors.New("data after the JSON object")
	}
	if r.Format != format {
		return version{}, fmt.Errorf("format %d is not known, want %d", r.Format, format)
	}
	if err := keys.CheckLabel(r.Label); err != nil {
		return version{}, err
	}
	if _, err := keys.ParseVersionID(r.ID); err != nil {
		return version{}, err
	}
	der, err := unPEM("public_key", "PUBLIC KEY", r.PublicKey)
	if err != nil {
		return version{}, err
	}
	pub, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return version{}, errors.New("public_key is not a PKIX public key")
	}
	if alg, err := keys.AlgorithmOf(pub); err != nil {
		return version{}, fmt.Errorf("public_key: %w", err)
	} else if alg != r.Algorithm {
		return version{}, fmt.Errorf("public_key is %s, algorithm says %q", alg, r.Algorithm)
	}
	v := version{Version: keys.Version{
		Label: r.Label, ID: r.ID, Algorithm: r.Algorithm, Public: pub, State: r.State, Created: r.Created,
	}}
	switch r.State {
	case keys.Destroyed:
		if r.PrivateKey != "" {
			return version{}, errors.New("destroyed, and yet there is a private_key")
		}
		return v, nil
	case keys.Enabled, keys.Disabled:
	default:
		return version{}, fmt.Errorf("state %q is not known", r.State)
	}
	if der, err = unPEM("private_key", "PRIVATE KEY", r.PrivateKey); err != nil {
		return version{}, err
	}
	private, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return version{}, errors.New("private_key is not a PKCS#8 private key")
	}
	s, ok := private.(crypto.Signer)
	if !ok || !keys.SamePublic(s.Public(), pub) {
		return version{}, errors.New("private_key does not belong to public_key")
	}
	v.private = s
	return v, nil
}

func unPEM(field, kind, text string) ([]byte, error) {
	block, rest := pem.Decode([]byte(text))
	if block == nil || block.Type != kind || len(rest) != 0 {
		return nil, fmt.Errorf("%s is not one PEM block %q", field, kind)
	}
	return block.Bytes, nil
}

// readVersion reads one file and checks its mode and that its name is that of its content.
func readVersion(path string) (version, fs.FileInfo, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return version{}, nil, err
	}
	if !info.Mode().IsRegular() {
		return version{}, nil, fmt.Errorf("%s is not a regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return version{}, nil, err
	}
	defer f.Close()
	if info, err = f.Stat(); err != nil {
		return version{}, nil, err
	}
	if err := ownerOnly(path, info); err != nil {
		return version{}, nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return version{}, nil, err
	}
	v, err := decodeVersion(b)
	if err != nil {
		return version{}, nil, fmt.Errorf("%s: %w", path, err)
	}
	if want := fileName(v.Label, v.ID); filepath.Base(path) != want {
		return version{}, nil, fmt.Errorf("%s holds the version that belongs into %s", path, want)
	}
	return v, info, nil
}

// writeVersion puts a version's file in place: a crash at any point leaves the old file or the new one.
func writeVersion(dir string, v version) (err error) {
	b, err := encodeVersion(v)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, tmpPrefix+"*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	if err = fill(f, b); err != nil { // a crash from here on leaves a complete file under its temporary name
		return err
	}
	if err = os.Rename(f.Name(), filepath.Join(dir, fileName(v.Label, v.ID))); err != nil {
		return err
	}
	return syncDir(dir) // until here a crash may bring the old file back
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
