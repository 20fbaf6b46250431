// Package devissuer issues X.509 SVIDs to the programs of one developer's machine, where no SPIRE is at hand: the SPIFFE Workload API
// and Envoy's SDS on one unix socket, and PEM files for programs that speak neither.
//
// It is for development and tests only, and proves nothing about anybody. Its authorities live in memory and are made anew at every
// start, without a file, a token or an audit behind them. A program is known by the path of its executable, which the kernel says; but
// every process of the same user can run that program, trace it or write its file, so whoever has a shell as this user can have every
// SVID. It promises that users other than its own get nothing, that a program which was not named gets nothing, and that it issues for
// trust domains below .dev, .test and .local only, so that what it signs cannot be taken for a certificate of a real domain.
//
// `knhk dev-issuer` runs it. The service never does.
package devissuer

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// How long SVIDs may live.
const (
	DefaultTTL = time.Hour
	MinTTL     = 2 * time.Second
	MaxTTL     = 24 * time.Hour
)

// tops are the ends of trust domains that it issues for. No public authority has .test or .local (RFC 6761, RFC 6762); .dev is what
// developers use.
var tops = []string{".dev", ".test", ".local"}

// Program is an executable and who it is.
type Program struct {
	Exe string // path; symbolic links are followed, as the kernel does
	ID  spiffeid.ID
}

// Directory gets certificate.pem (the leaf), key.pem (PKCS #8), bundle.pem (the authority of the ID's trust domain) and, for every other
// trust domain that is issued for, bundle-DOMAIN.pem. Each file is replaced by a rename when the SVID is renewed, and is its owner's
// alone; between two renames key and certificate do not belong together, and who reads them then has to read again.
type Directory struct {
	Dir string // made if it is not there
	ID  spiffeid.ID
}

// Config says to whom what is issued.
type Config struct {
	Socket      string // path of the unix socket; at most 107 bytes; required
	Programs    []Program
	Directories []Directory
	TTL         time.Duration                 // how long an SVID lives, renewed at half of that; default DefaultTTL
	TTLs        map[spiffeid.ID]time.Duration // of single IDs, instead of TTL
	Log         *slog.Logger                  // default: nothing is logged
	Now         func() time.Time              // default time.Now
}

// Issuer is a development issuer. Its methods may be called from several goroutines.
type Issuer struct {
	cfg   Config
	log   *slog.Logger
	byExe map[string]spiffeid.ID
	uid   uint32 // whose processes are served
	book  *book
}

// New checks cfg, all of it, and makes the authorities and a first SVID of each ID. Nothing listens and nothing is written before Run.
func New(cfg Config) (*Issuer, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	cfg.TTL = cmp.Or(cfg.TTL, DefaultTTL)
	i := &Issuer{cfg: cfg, log: cfg.Log, byExe: map[string]spiffeid.ID{}, uid: uint32(os.Geteuid())}
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if cfg.Socket == "" {
		bad("no socket: say where to serve")
	} else if len(cfg.Socket) > 107 {
		bad("socket %s: its path has %d bytes, the kernel takes 107", cfg.Socket, len(cfg.Socket))
	}
	if len(cfg.Programs)+len(cfg.Directories) == 0 {
		bad("nobody to issue to: name a program or a directory")
	}
	ttls := map[spiffeid.ID]time.Duration{}
	know := func(id spiffeid.ID) {
		if err := permitted(id); err != nil {
			errs = append(errs, err)
			return
		}
		ttls[id] = cfg.TTL
	}
	for _, p := range cfg.Programs {
		know(p.ID)
		exe, err := program(p.Exe)
		if err != nil {
			errs = append(errs, err)
		} else if _, twice := i.byExe[exe]; twice {
			bad("program %s is named twice: it can have one id", exe)
		} else {
			i.byExe[exe] = p.ID
		}
	}
	var dirs []string
	for _, d := range cfg.Directories {
		know(d.ID)
		switch dir := filepath.Clean(d.Dir); {
		case d.Dir == "":
			bad("a directory for %s has no name", d.ID)
		case slices.Contains(dirs, dir):
			bad("directory %s is named twice", dir)
		default:
			dirs = append(dirs, dir)
		}
	}
	for id, ttl := range cfg.TTLs {
		if _, known := ttls[id]; !known {
			bad("a lifetime for %s, which is issued to nobody", id)
		}
		ttls[id] = ttl
	}
	for _, ttl := range append([]time.Duration{cfg.TTL}, values(cfg.TTLs)...) {
		if ttl < MinTTL || ttl > MaxTTL {
			bad("lifetime %v: want %v to %v", ttl, MinTTL, MaxTTL)
		}
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	var err error
	if i.book, err = newBook(ttls, cfg.Now); err != nil {
		return nil, err
	}
	return i, nil
}

func values(m map[spiffeid.ID]time.Duration) (out []time.Duration) {
	for _, v := range m {
		out = append(out, v)
	}
	slices.Sort(out)
	return out
}

// permitted refuses IDs that mean something outside of this machine.
func permitted(id spiffeid.ID) error {
	if id.IsZero() || id.Path() == "" {
		return fmt.Errorf("id %q: want spiffe://domain/path", id)
	}
	name := id.TrustDomain().Name()
	for _, top := range tops {
		if len(name) > len(top) && strings.HasSuffix(name, top) {
			return nil
		}
	}
	return fmt.Errorf("trust domain %s: a development issuer serves domains below %s only", name, strings.Join(tops, ", "))
}

// program gives the path by which the kernel will name a program.
func program(exe string) (string, error) {
	if exe == "" {
		return "", errors.New("a program has no path")
	}
	path, err := filepath.Abs(exe)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return "", fmt.Errorf("program %s: %w", exe, err)
	}
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("program %s: %w", exe, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return "", fmt.Errorf("program %s: no executable file", exe)
	}
	// A script runs as its interpreter, and whoever runs that would have the ID.
	var magic [2]byte
	if _, err := io.ReadFull(f, magic[:]); err == nil && bytes.Equal(magic[:], []byte("#!")) {
		return "", fmt.Errorf("program %s is a script, and would be known by its interpreter: name the program that it starts", exe)
	}
	return path, nil
}
