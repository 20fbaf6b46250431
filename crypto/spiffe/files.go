package spiffe

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sort"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// maxFile bounds a PEM file, in bytes: some hundred authorities.
const maxFile = 1 << 20

// fileWatch compares the files with what was seen of them last. Content is compared, not times or inodes: links that are swapped, as
// Kubernetes mounts secrets, renames and writes in place all show, and a copy of the same does not.
type fileWatch struct {
	id    spiffeid.ID
	files Files
	names []string // all of them, in a fixed order: certificate, key, CA, federated by trust domain
	tds   []spiffeid.TrustDomain

	good [sha256.Size]byte // what is in use
	bad  [sha256.Size]byte // what failed last
	told bool              // bad was reported
}

func newFileWatch(id spiffeid.ID, f Files) (*fileWatch, error) {
	w := &fileWatch{id: id, files: f, names: []string{f.Certificate, f.Key, f.CA}}
	for td := range f.Federated {
		if td == id.TrustDomain() {
			return nil, fmt.Errorf("federated trust domain %s is the own one: its authorities are in ca", td)
		}
		w.tds = append(w.tds, td)
	}
	sort.Slice(w.tds, func(i, j int) bool { return w.tds[i].Compare(w.tds[j]) < 0 })
	for _, td := range w.tds {
		w.names = append(w.names, f.Federated[td])
	}
	for _, name := range w.names {
		if name == "" {
			return nil, errors.New("files need a certificate, a key, a ca and one ca for each federated trust domain: a name is empty")
		}
	}
	return w, nil
}

// errUnfinished is what files show that are being written.
var errUnfinished = errors.New("if the files are being written, that was not finished")

// wait reads the files until they hold, as long as they are missing or unfinished.
func (w *fileWatch) wait(ctx context.Context, timeout time.Duration, now func() time.Time, log *slog.Logger) (*material, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	for told := false; ; told = true {
		m, err := w.first(now())
		if err == nil || !errors.Is(err, os.ErrNotExist) && !errors.Is(err, errUnfinished) {
			return m, err
		}
		if !told {
			log.Warn("waiting for the SVID's files", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("no SVID within %s: %w", timeout, err)
		case <-ticker.C:
		}
	}
}

// first reads the files and takes them into use or says why not.
func (w *fileWatch) first(now time.Time) (*material, error) {
	contents, sum, err := w.read()
	if err != nil {
		return nil, err
	}
	m, err := w.parse(contents, now)
	if err != nil {
		return nil, err
	}
	w.good = sum
	return m, nil
}

// next reads the files again. It gives nil, nil if there is nothing to take or to tell. What does not pass is told once for each content,
// and only if it is still the same at the next look: certificate and key are renewed one after the other, and between the two is no failure.
func (w *fileWatch) next(now time.Time) (*material, error) {
	contents, sum, err := w.read()
	if err == nil {
		if sum == w.good {
			w.bad, w.told = [sha256.Size]byte{}, false
			return nil, nil
		}
		var m *material
		if m, err = w.parse(contents, now); err == nil { // anew at each look: it may have become valid by time
			w.good, w.bad, w.told = sum, [sha256.Size]byte{}, false
			return m, nil
		}
	} else {
		sum = sha256.Sum256([]byte(err.Error()))
	}
	if sum != w.bad {
		w.bad, w.told = sum, false
		return nil, nil
	}
	if w.told {
		return nil, nil
	}
	w.told = true
	return nil, err
}

// read reads all files and gives a digest of what is in them.
func (w *fileWatch) read() ([][]byte, [sha256.Size]byte, error) {
	h := sha256.New()
	contents := make([][]byte, len(w.names))
	for i, name := range w.names {
		b, err := readPEM(name, i == 1)
		if err != nil {
			return nil, [sha256.Size]byte{}, err
		}
		contents[i] = b
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(b))))
		h.Write(b)
	}
	return contents, [sha256.Size]byte(h.Sum(nil)), nil
}

func (w *fileWatch) parse(contents [][]byte, now time.Time) (*material, error) {
	certs, err := parseCertificates(contents[0])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", w.files.Certificate, err)
	}
	key, err := parseKey(contents[1])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", w.files.Key, err)
	}
	if signer, ok := key.(crypto.Signer); ok {
		if pub, ok := signer.Public().(interface{ Equal(crypto.PublicKey) bool }); ok && !pub.Equal(certs[0].PublicKey) {
			return nil, fmt.Errorf("%s does not match %s: %w", w.files.Key, w.files.Certificate, errUnfinished)
		}
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", w.files.Key, err)
	}
	var chain []byte
	for _, c := range certs {
		chain = append(chain, c.Raw...)
	}
	svid, err := x509svid.ParseRaw(chain, der)
	if err != nil {
		return nil, fmt.Errorf("%s with %s: %w", w.files.Certificate, w.files.Key, err)
	}
	bundles := x509bundle.NewSet()
	for i, td := range append([]spiffeid.TrustDomain{w.id.TrustDomain()}, w.tds...) {
		authorities, err := parseCertificates(contents[2+i])
		if err == nil {
			err = checkBundle(authorities)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", w.names[2+i], err)
		}
		bundles.Add(x509bundle.FromX509Authorities(td, authorities))
	}
	m, err := checkMaterial(w.id, svid, bundles, now)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", w.files.Certificate, err)
	}
	return m, nil
}

// readPEM reads a regular file, links to one included. A private key must be for its owner only, as every secret here.
func readPEM(path string, secret bool) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO must not hold us up
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat() // of what was opened, not of what the name stands for a moment later
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	if mode := info.Mode().Perm(); secret && mode&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %04o: a private key must be for its owner only (chmod go= %s)", path, mode, path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("%s holds more than %d bytes", path, maxFile)
	}
	return b, nil
}

// parseCertificates reads CERTIFICATE blocks and nothing else; text between them is skipped, as openssl writes it.
func parseCertificates(b []byte) ([]*x509.Certificate, error) {
	blocks, err := parseBlocks(b)
	if err != nil {
		return nil, err
	}
	var certs []*x509.Certificate
	for i, block := range blocks {
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("PEM block %d is a %s, want CERTIFICATE blocks only", i+1, block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("PEM block %d: %w", i+1, err)
		}
		certs = append(certs, c)
	}
	return certs, nil
}

// parseKey reads the one private key of a file. Its errors repeat nothing of it.
func parseKey(b []byte) (crypto.PrivateKey, error) {
	blocks, err := parseBlocks(b)
	if err != nil {
		return nil, err
	}
	var key crypto.PrivateKey
	for _, block := range blocks {
		var k crypto.PrivateKey
		switch block.Type {
		case "EC PARAMETERS": // openssl ecparam writes them before the key, which has them too
			continue
		case "PRIVATE KEY":
			k, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			k, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			k, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		case "ENCRYPTED PRIVATE KEY":
			return nil, errors.New("the private key is encrypted, and nobody is there to be asked for the password")
		default:
			return nil, errors.New("a PEM block is neither PRIVATE KEY, EC PRIVATE KEY nor RSA PRIVATE KEY")
		}
		if err != nil {
			return nil, errors.New("the private key cannot be parsed")
		}
		if key != nil {
			return nil, errors.New("more than one private key")
		}
		key = k
	}
	if key == nil {
		return nil, errors.New("no private key")
	}
	return key, nil
}

// parseBlocks splits a PEM file. A block that is begun and not ended, as in a file that is being written, is an error.
func parseBlocks(b []byte) ([]*pem.Block, error) {
	var blocks []*pem.Block
	for {
		block, rest := pem.Decode(b)
		if block == nil {
			break
		}
		// Decode passes over what it cannot read up to the next block that it can.
		if read := b[:len(b)-len(rest)]; bytes.Count(read, []byte("-----BEGIN ")) != 1 {
			return nil, errors.New("a PEM block is broken")
		}
		blocks, b = append(blocks, block), rest
	}
	if bytes.Contains(b, []byte("-----BEGIN ")) {
		return nil, fmt.Errorf("the last PEM block is broken or cut off: %w", errUnfinished)
	}
	if len(blocks) == 0 {
		return nil, fmt.Errorf("no PEM block: %w", errUnfinished)
	}
	return blocks, nil
}
