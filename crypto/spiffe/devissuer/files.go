package devissuer

import (
	"fmt"
	"os"
	"path/filepath"
)

// writeAll writes every directory.
func (i *Issuer) writeAll() error {
	for id := range i.book.ttls {
		s, _ := i.book.get(id)
		if err := i.write(s); err != nil {
			return err
		}
	}
	return nil
}

// write writes an SVID into the directories of its ID.
func (i *Issuer) write(s *svid) error {
	for _, d := range i.cfg.Directories {
		if d.ID != s.id {
			continue
		}
		if err := os.MkdirAll(d.Dir, 0o700); err != nil {
			return fmt.Errorf("write %s: %w", s.id, err)
		}
		files := map[string][]byte{"key.pem": pemOf("PRIVATE KEY", s.key), "certificate.pem": pemOf("CERTIFICATE", s.cert)}
		for td, a := range i.book.authorities {
			name := "bundle-" + td.Name() + ".pem"
			if td == s.id.TrustDomain() {
				name = "bundle.pem"
			}
			files[name] = pemOf("CERTIFICATE", a.cert.Raw)
		}
		for name, b := range files {
			if err := replace(filepath.Join(d.Dir, name), b); err != nil {
				return fmt.Errorf("write %s: %w", s.id, err)
			}
		}
	}
	return nil
}

// replace has readers find the old file or the new one, never half of one, and nobody but the owner read either. Nothing is synced: after
// a power cut there are no authorities that these certificates could belong to.
func replace(name string, b []byte) error {
	next, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*") // mode 0600
	if err != nil {
		return err
	}
	_, err = next.Write(b)
	if cerr := next.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(next.Name(), name)
	}
	if err != nil {
		os.Remove(next.Name())
	}
	return err
}
