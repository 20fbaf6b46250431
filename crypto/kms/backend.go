package kms

import (
	"context"
	"crypto"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
)

// Info is what a service tells of one version.
type Info struct {
	ID        string // as keys.Version.ID: it names the version in full, beside the label
	Algorithm keys.Algorithm
	State     keys.State // a destruction that is scheduled is keys.Destroyed
	Created   time.Time
	// Exportable says that the private key can leave the service, or came from outside; Store refuses to sign with it unless
	// Config.AllowExportable.
	Exportable bool
}

// Backend is one service as Store needs it. Safe for concurrent use.
//
// Store calls with a context that ends after Config.Timeout at the latest; a call that goes on after that costs one of
// Config.Calls places until it returns. Labels have passed keys.CheckLabel. Errors wrap keys.ErrNotFound, ErrDisabled,
// ErrCredential, ErrThrottled or ErrUnavailable where they apply, or context.DeadlineExceeded when time ran out: one function
// of each service says which (codes.go). Only a service that answers may say ErrNotFound or ErrDisabled.
type Backend interface {
	// Custody is keys.Store's, and needs no call to the service.
	Custody() string
	// Create makes an enabled version. On an error one may have been made; List lists it then. keys.ErrUnavailable when the
	// service has made it and is not ready in time.
	Create(ctx context.Context, label string, alg keys.Algorithm) (Info, error)
	// List lists the versions of label in order of creation, those scheduled for destruction too, and those destroyed if the
	// service still knows them. Versions of algorithms or purposes that this module does not know are left out.
	List(ctx context.Context, label string) ([]Info, error)
	// Get returns one version. Any id may be asked for: what no version can be called is keys.ErrNotFound.
	Get(ctx context.Context, label, id string) (Info, error)
	// PublicKey returns the public key of an enabled version, as keys.Version has it; keys.ErrDisabled where the service does
	// not give those of others.
	PublicKey(ctx context.Context, label, id string) (crypto.PublicKey, error)
	// Sign signs with exactly this version: input is the message for Ed25519 and its SHA-256 digest for P256. The signature is
	// as keys.Algorithm says (ASN.1 DER for P256). input is not kept after the return.
	Sign(ctx context.Context, label, id string, alg keys.Algorithm, input []byte) ([]byte, error)
	// Disable and Destroy are keys.Store's; idempotent. Where a service cannot destroy one version, Destroy disables it and
	// Get goes on to say keys.Disabled.
	Disable(ctx context.Context, label, id string) error
	Destroy(ctx context.Context, label, id string) error
	// Close lets go of connections. Called once, after the last call has returned or was given up.
	Close() error
}

// Renewer is what a Backend may implement beside: Renewed says that the credential is another one than the one that was refused
// last, so that it is worth a try before the wait is over. It makes no call to the service.
type Renewer interface{ Renewed() bool }

// Options is what the packages of the services take beside the URI.
type Options struct {
	// Archive is the directory for public keys when the URI names none (archive=). It is made when it is not there.
	Archive string
	// AllowExportable is Config.AllowExportable.
	AllowExportable bool
	// Log hears of the circuit breaker and refused credentials. Default: nobody.
	Log *slog.Logger
}

// Store opens the archive and the store of a URI over b. On an error b is closed.
func (o Options) Store(u keys.URI, b Backend) (*Store, error) {
	dir := u.Archive
	if dir == "" {
		dir = o.Archive
	}
	a, err := OpenArchive(dir, u.Place())
	if err == nil {
		var s *Store
		if s, err = Open(Config{Backend: b, Archive: a, Place: u.Place(), AllowExportable: o.AllowExportable, Log: o.Log}); err == nil {
			return s, nil
		}
	}
	if cerr := b.Close(); cerr != nil {
		err = fmt.Errorf("%w (and then: %w)", err, cerr)
	}
	return nil, err
}

// Escape writes a label as a name that holds only letters, digits and safe: every other byte, and esc itself, becomes esc and
// two upper-case hexadecimal digits. Two labels never have one name.
func Escape(label string, esc byte, safe string) string {
	var b strings.Builder
	for _, c := range []byte(label) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c != esc && strings.IndexByte(safe, c) >= 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%c%02X", esc, c)
		}
	}
	return b.String()
}

// Unescape reads what Escape wrote; ok is false for anything else.
func Unescape(name string, esc byte, safe string) (label string, ok bool) {
	var b strings.Builder
	for i := 0; i < len(name); i++ {
		if name[i] != esc {
			b.WriteByte(name[i])
			continue
		}
		var c byte
		if i+2 >= len(name) {
			return "", false
		}
		if _, err := fmt.Sscanf(name[i+1:i+3], "%02X", &c); err != nil {
			return "", false
		}
		b.WriteByte(c)
		i += 2
	}
	label = b.String()
	return label, Escape(label, esc, safe) == name
}
