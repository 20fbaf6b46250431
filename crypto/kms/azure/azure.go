// Package azure keeps keys in Azure Key Vault or Managed HSM.
//
// The versions of a label are the versions of one key, tagged by this package; versions without the tags are somebody else's and
// not seen. They are made in an HSM where the vault has one, else in the vault's software, which the log says. Key Vault has no
// Ed25519, so only P-256 can be made.
//
// It promises what package kms does, but for one thing: Key Vault destroys a key with all its versions or not at all, so Destroy
// disables a version, and Versions goes on to say keys.Disabled. Whoever may update keys can enable it again; the key is gone
// when an administrator deletes and purges it. Who holds the rights keys/sign signs; what is needed is create, get, list, update
// and sign of keys. The service does not tell keys that were imported from its own.
//
// The server calls it for azurekms: URIs.
package azure

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azkeys"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/kms"
)

const (
	tagAlgorithm = "knhk-algorithm" // keys.Algorithm
	tagMade      = "knhk-made"      // nanoseconds since 1970 by the maker's clock: orders versions of one second, which is all that the service tells
	maxName      = 127              // bytes of a key's name
	coordinate   = 32               // bytes of each half of a P-256 point or signature
)

// Open opens the vault that an azurekms URI names. It makes no call to the service.
func Open(_ context.Context, u keys.URI, o kms.Options) (*kms.Store, error) {
	b, err := connect(u, o, nil, nil)
	if err != nil {
		return nil, fmt.Errorf("azurekms: open: %w", err)
	}
	s, err := o.Store(u, b)
	if err != nil {
		return nil, fmt.Errorf("azurekms: open: %w", err)
	}
	return s, nil
}

// backend is kms.Backend on the service's own client.
type backend struct {
	place  string
	http   *http.Client
	client *azkeys.Client
	log    *slog.Logger
	now    func() time.Time
}

var _ kms.Backend = (*backend)(nil)

// connect makes the backend; roots and cred stand for those that the URI and the environment name when they are not nil.
func connect(u keys.URI, o kms.Options, roots *x509.CertPool, cred azcore.TokenCredential) (*backend, error) {
	if u.Scheme != "azurekms" {
		return nil, fmt.Errorf("a %q key is none of Azure Key Vault", u.Scheme)
	}
	b := &backend{place: u.Place(), http: kms.HTTPClient(roots), log: o.Log, now: time.Now}
	if b.log == nil {
		b.log = slog.New(slog.DiscardHandler)
	}
	address, clear := u.Service()
	co := azcore.ClientOptions{
		Transport: b.http,
		Retry:     policy.RetryOptions{MaxRetries: -1}, // none: the circuit breaker of kms.Store sees to them
		Telemetry: policy.TelemetryOptions{Disabled: true},
	}
	switch {
	case clear:
		address = "https" + strings.TrimPrefix(address, "http")
		co.Transport, cred = plain{b.http}, loopback{}
	case cred == nil:
		var err error
		if cred, err = credential(u, co); err != nil {
			return nil, err
		}
	}
	var err error
	b.client, err = azkeys.NewClient(address, cred, &azkeys.ClientOptions{
		ClientOptions: co,
		// The token is for whom the service's challenge names; it must be a domain above the vault's own. A vault behind an endpoint
		// of another name cannot be told so, and whoever wrote the endpoint vouches for it.
		DisableChallengeResourceVerification: u.Endpoint != "",
	})
	if err != nil {
		return nil, err
	}
	return b, nil
}

func (b *backend) Custody() string {
	return "Azure Key Vault, " + b.place + " (what is destroyed here is disabled there)"
}

func (b *backend) Close() error {
	b.http.CloseIdleConnections()
	return nil
}

// name is the name of a label's key: digits and lower-case letters stand for themselves, anything else for "-" and two
// hexadecimal digits, because Key Vault's names hold nothing else and do not tell upper case from lower. ok is false when it is too
// long for any key to have it.
func name(label string) (n string, ok bool) {
	var s strings.Builder
	for _, c := range []byte(label) {
		if 'a' <= c && c <= 'z' || '0' <= c && c <= '9' {
			s.WriteByte(c)
		} else {
			fmt.Fprintf(&s, "-%02x", c)
		}
	}
	return s.String(), s.Len() <= maxName
}

// version checks an id and returns the name of the label's key. An id that no version can have is keys.ErrNotFound.
func version(label, id string) (string, error) {
	n, ok := name(label)
	if !ok {
		return "", fmt.Errorf("%w: no key has a name of %d characters", keys.ErrNotFound, len(n))
	}
	if len(id) != 32 || strings.Trim(id, "0123456789abcdef") != "" {
		return "", fmt.Errorf("%w: an id is 32 hexadecimal digits here", keys.ErrNotFound)
	}
	return n, nil
}

// item is what the service tells of a version, and the maker's time beside.
type item struct {
	kms.Info
	made int64
}

// read takes what lists and single answers have in common; ok is false for a version that this package did not make.
func read(kid *azkeys.ID, a *azkeys.KeyAttributes, tags map[string]*string) (i item, n string, ok bool) {
	if kid == nil || a == nil || a.Enabled == nil || a.Created == nil || tags[tagAlgorithm] == nil || tags[tagMade] == nil {
		return item{}, "", false
	}
	i = item{Info: kms.Info{ID: kid.Version(), Algorithm: keys.P256, State: keys.Disabled, Created: *a.Created}}
	i.Exportable = a.Exportable != nil && *a.Exportable
	if *a.Enabled {
		i.State = keys.Enabled
	}
	var err error
	i.made, err = strconv.ParseInt(*tags[tagMade], 10, 64)
	return i, strings.ToLower(kid.Name()), err == nil && *tags[tagAlgorithm] == string(keys.P256) && i.ID != ""
}

// Create makes a version, in an HSM if the vault has one.
func (b *backend) Create(ctx context.Context, label string, alg keys.Algorithm) (kms.Info, error) {
	if alg != keys.P256 {
		return kms.Info{}, fmt.Errorf("no %s keys in Azure Key Vault: use %s, or another store: %w", alg, keys.P256, errors.ErrUnsupported)
	}
	n, ok := name(label)
	if !ok {
		return kms.Info{}, fmt.Errorf("label %q makes a name of %d characters, a key has at most %d: use a shorter one of lower-case letters and digits",
			label, len(n), maxName)
	}
	made := strconv.FormatInt(b.now().UnixNano(), 10)
	p := azkeys.CreateKeyParameters{
		Kty: ptr(azkeys.KeyTypeECHSM), Curve: ptr(azkeys.CurveNameP256), KeyOps: []*azkeys.KeyOperation{ptr(azkeys.KeyOperationSign)},
		KeyAttributes: &azkeys.KeyAttributes{Enabled: ptr(true)},
		Tags:          map[string]*string{tagAlgorithm: ptr(string(alg)), tagMade: &made},
	}
	r, err := b.client.CreateKey(ctx, n, p, nil)
	var a *answer
	if err = sentinel(err); errors.As(err, &a) && a.status == http.StatusBadRequest {
		p.Kty = ptr(azkeys.KeyTypeEC)
		r, err = b.client.CreateKey(ctx, n, p, nil)
		if err = sentinel(err); err == nil {
			b.log.LogAttrs(ctx, slog.LevelWarn, "azurekms: this vault has no HSM keys: the key is made in its software",
				slog.String("place", b.place), slog.String("label", label))
		}
	}
	if err != nil {
		return kms.Info{}, err
	}
	if r.Key == nil {
		return kms.Info{}, fmt.Errorf("%s: an answer without a key", n)
	}
	i, got, ok := read(r.Key.KID, r.Attributes, r.Tags)
	if !ok || got != n {
		return kms.Info{}, fmt.Errorf("a version of %s was asked for, the service made one of %q", n, got)
	}
	return i.Info, nil
}

func (b *backend) List(ctx context.Context, label string) ([]kms.Info, error) {
	n, ok := name(label)
	if !ok {
		return nil, nil // nothing can have been made under it
	}
	var items []item
	for pages := b.client.NewListKeyPropertiesVersionsPager(n, nil); pages.More(); {
		page, err := pages.NextPage(ctx)
		if err = sentinel(err); errors.Is(err, keys.ErrNotFound) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		for _, v := range page.Value {
			if v == nil {
				continue
			}
			i, got, ok := read(v.KID, v.Attributes, v.Tags)
			if !ok {
				continue
			}
			if got != n {
				return nil, fmt.Errorf("versions of %s were asked for, the service lists one of %q", n, got)
			}
			items = append(items, i)
		}
	}
	slices.SortFunc(items, func(x, y item) int {
		return cmp.Or(x.Created.Compare(y.Created), cmp.Compare(x.made, y.made), cmp.Compare(x.ID, y.ID))
	})
	var out []kms.Info
	for _, i := range items {
		out = append(out, i.Info)
	}
	return out, nil
}

// get returns a version that is enabled; the service does not give others.
func (b *backend) get(ctx context.Context, label, id string) (kms.Info, *azkeys.JSONWebKey, error) {
	n, err := version(label, id)
	if err != nil {
		return kms.Info{}, nil, err
	}
	r, err := b.client.GetKey(ctx, n, id, nil)
	if err != nil {
		return kms.Info{}, nil, sentinel(err)
	}
	if r.Key == nil || r.Key.KID == nil {
		return kms.Info{}, nil, fmt.Errorf("%s/%s: an answer without a key", n, id)
	}
	if !names(r.Key.KID, n, id) {
		return kms.Info{}, nil, fmt.Errorf("%s/%s was asked for, the service tells of %s", n, id, *r.Key.KID)
	}
	i, _, ok := read(r.Key.KID, r.Attributes, r.Tags)
	if !ok {
		return kms.Info{}, nil, fmt.Errorf("%w: %s/%s was not made here", keys.ErrNotFound, n, id)
	}
	return i.Info, r.Key, nil
}

func names(kid *azkeys.ID, n, id string) bool {
	return kid != nil && strings.EqualFold(kid.Name(), n) && kid.Version() == id
}

// Get looks into the list for a version that the service does not give because it is disabled.
func (b *backend) Get(ctx context.Context, label, id string) (kms.Info, error) {
	i, _, err := b.get(ctx, label, id)
	if !errors.Is(err, keys.ErrDisabled) {
		return i, err
	}
	list, lerr := b.List(ctx, label)
	if lerr != nil {
		return kms.Info{}, lerr
	}
	for _, l := range list {
		if l.ID == id {
			l.State = keys.Disabled // enabled it may be, and past its dates
			return l, nil
		}
	}
	return kms.Info{}, fmt.Errorf("%w: it is not in the list", keys.ErrNotFound)
}

func (b *backend) PublicKey(ctx context.Context, label, id string) (crypto.PublicKey, error) {
	_, k, err := b.get(ctx, label, id)
	if err != nil {
		return nil, err
	}
	if k.Kty == nil || (*k.Kty != azkeys.KeyTypeEC && *k.Kty != azkeys.KeyTypeECHSM) || k.Crv == nil || *k.Crv != azkeys.CurveNameP256 ||
		len(k.X) > coordinate || len(k.Y) > coordinate {
		return nil, fmt.Errorf("%s is tagged %s and is no P-256 key", *k.KID, keys.P256)
	}
	point := make([]byte, 1+2*coordinate)
	point[0] = 4 // uncompressed
	copy(point[1+coordinate-len(k.X):], k.X)
	copy(point[1+2*coordinate-len(k.Y):], k.Y)
	pub, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
	if err != nil {
		return nil, fmt.Errorf("the public key of %s: %w", *k.KID, err)
	}
	return pub, nil
}

func (b *backend) Sign(ctx context.Context, label, id string, alg keys.Algorithm, input []byte) ([]byte, error) {
	n, err := version(label, id)
	if err != nil {
		return nil, err
	}
	if alg != keys.P256 {
		return nil, fmt.Errorf("no %s keys in Azure Key Vault: %w", alg, errors.ErrUnsupported)
	}
	r, err := b.client.Sign(ctx, n, id, azkeys.SignParameters{Algorithm: ptr(azkeys.SignatureAlgorithmES256), Value: input}, nil)
	if err != nil {
		return nil, sentinel(err)
	}
	if !names(r.KID, n, id) {
		return nil, fmt.Errorf("%s/%s was to sign, another key did", n, id)
	}
	if len(r.Result) != 2*coordinate {
		return nil, fmt.Errorf("%s/%s: the signature has %d bytes, want %d", n, id, len(r.Result), 2*coordinate)
	}
	return asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(r.Result[:coordinate]), new(big.Int).SetBytes(r.Result[coordinate:])})
}

func (b *backend) Disable(ctx context.Context, label, id string) error {
	n, err := version(label, id)
	if err != nil {
		return err
	}
	// The update would disable whatever version is there: only what this package made is touched.
	if i, err := b.Get(ctx, label, id); err != nil || i.State != keys.Enabled {
		return err
	}
	_, err = b.client.UpdateKey(ctx, n, id, azkeys.UpdateKeyParameters{KeyAttributes: &azkeys.KeyAttributes{Enabled: ptr(false)}}, nil)
	return sentinel(err)
}

// Destroy disables: Key Vault destroys no single version.
func (b *backend) Destroy(ctx context.Context, label, id string) error {
	return b.Disable(ctx, label, id)
}

func ptr[T any](v T) *T { return &v }
