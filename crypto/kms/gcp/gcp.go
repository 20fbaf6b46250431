// Package gcp keeps signing keys in Google Cloud KMS. A label is one CryptoKey of the ring, a version one CryptoKeyVersion,
// named in full at each call; both algorithms are there (EC_SIGN_ED25519, EC_SIGN_P256_SHA256).
//
// It promises, beside what kms.Store does: checksums are checked both ways, the name that signed is compared with the one that
// was asked for. CryptoKeys that it makes have protection level HSM; one that is there already is used as it is. Versions that
// came from outside count as exportable. A destruction is scheduled by the service, 30 days ahead as a rule; the version never
// signs meanwhile unless an administrator restores it, and is told as destroyed.
//
// Roles: roles/cloudkms.signerVerifier signs; to make, disable and destroy versions takes cloudkms.cryptoKeyVersions.create,
// .update and .destroy, and cloudkms.cryptoKeys.create for a new label. The server uses it, verification never does.
package gcp

import (
	"cmp"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"cloud.google.com/go/auth/credentials"
	gkms "cloud.google.com/go/kms/apiv1"
	"cloud.google.com/go/kms/apiv1/kmspb"
	"github.com/googleapis/gax-go/v2"
	"google.golang.org/api/iterator"
	"google.golang.org/api/option"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/kms"
)

const (
	pageSize = 100
	maxName  = 63 // of a CryptoKey
	maxAns   = 4 << 20
	scope    = "https://www.googleapis.com/auth/cloudkms"
)

var (
	algorithms = map[keys.Algorithm]kmspb.CryptoKeyVersion_CryptoKeyVersionAlgorithm{
		keys.Ed25519: kmspb.CryptoKeyVersion_EC_SIGN_ED25519,
		keys.P256:    kmspb.CryptoKeyVersion_EC_SIGN_P256_SHA256,
	}
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// Open opens the ring that a gcpkms URI names. It makes no call to the service, and none to a metadata address when the URI
// names a credentials file.
func Open(ctx context.Context, u keys.URI, o kms.Options) (*kms.Store, error) {
	b, err := connect(ctx, u)
	if err != nil {
		return nil, fmt.Errorf("gcpkms: open: %w", err)
	}
	s, err := o.Store(u, b)
	if err != nil {
		return nil, fmt.Errorf("gcpkms: open: %w", err)
	}
	return s, nil
}

// backend is kms.Backend on the service's own client.
type backend struct {
	ring string
	c    *gkms.KeyManagementClient
	make sync.Mutex // one version at a time: the algorithm of the next one is an attribute of the CryptoKey
}

var _ kms.Backend = (*backend)(nil)

func connect(ctx context.Context, u keys.URI) (*backend, error) {
	if u.Scheme != "gcpkms" {
		return nil, fmt.Errorf("a %q key is none of Google Cloud KMS", u.Scheme)
	}
	opts := []option.ClientOption{
		option.WithTelemetryDisabled(),
		// The client's own pauses between connections grow to two minutes; the circuit breaker tries once a second.
		option.WithGRPCDialOption(grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 5 * time.Second,
		})),
		option.WithGRPCDialOption(grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second})),
		option.WithGRPCDialOption(grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAns))),
	}
	address, plain := u.Service()
	if address != "" {
		opts = append(opts, option.WithEndpoint(address))
	}
	switch {
	case plain:
		opts = append(opts, option.WithoutAuthentication(), option.WithGRPCDialOption(grpc.WithTransportCredentials(insecure.NewCredentials())))
	case u.Credentials != "":
		kind, b, err := readCredentials(strings.TrimPrefix(u.Credentials, "file:"))
		if err != nil {
			return nil, err
		}
		creds, err := credentials.NewCredentialsFromJSON(kind, b, &credentials.DetectOptions{Scopes: []string{scope}})
		if err != nil {
			return nil, fmt.Errorf("credentials %s: %w", u.Credentials, err)
		}
		opts = append(opts, option.WithAuthCredentials(creds))
	default:
		opts = append(opts, option.WithScopes(scope))
	}
	c, err := gkms.NewKeyManagementClient(ctx, opts...)
	if err != nil {
		return nil, err
	}
	return &backend{ring: u.Location, c: c}, nil
}

// readCredentials reads a credentials file. One that holds a secret must be its owner's alone; one of workload identity
// federation only points at a token. Errors do not repeat the content.
func readCredentials(path string) (credentials.CredType, []byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", nil, fmt.Errorf("credentials: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", nil, fmt.Errorf("credentials: %w", err)
	}
	if !info.Mode().IsRegular() || info.Size() > 64<<10 {
		return "", nil, fmt.Errorf("credentials: %s is no credentials file", path)
	}
	b := make([]byte, info.Size())
	if _, err := f.ReadAt(b, 0); err != nil {
		return "", nil, fmt.Errorf("credentials: %w", err)
	}
	var c struct {
		Type credentials.CredType `json:"type"`
	}
	if json.Unmarshal(b, &c) != nil || c.Type == "" {
		return "", nil, fmt.Errorf("credentials: %s is no credentials file", path)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 && c.Type != credentials.ExternalAccount {
		return "", nil, fmt.Errorf("credentials: %s has mode %04o: a secret must be for its owner only (chmod go= %s)", path, mode, path)
	}
	return c.Type, b, nil
}

// once has the client try once: the circuit breaker of kms.Store sees to the rest.
var once = gax.WithRetry(func() gax.Retryer { return nil })

func (b *backend) Custody() string { return "Google Cloud KMS, " + b.ring }

func (b *backend) Close() error { return b.c.Close() }

var errLong = errors.New("makes a name that is too long")

// cryptoKey is the full name of a label's CryptoKey.
func (b *backend) cryptoKey(label string) (string, error) {
	name := kms.Escape(label, '_', "-")
	if len(name) > maxName {
		return "", fmt.Errorf("label %q %w: %d characters, a CryptoKey has at most %d: use a shorter one of letters, digits and \"-\"",
			label, errLong, len(name), maxName)
	}
	return b.ring + "/cryptoKeys/" + name, nil
}

// version is the full name of a version. An id that no version can have is keys.ErrNotFound.
func (b *backend) version(label, id string) (string, error) {
	key, err := b.cryptoKey(label)
	if err != nil {
		return "", fmt.Errorf("%w: %w", keys.ErrNotFound, err)
	}
	if n, err := strconv.ParseUint(id, 10, 63); err != nil || n == 0 || strconv.FormatUint(n, 10) != id {
		return "", fmt.Errorf("%w: an id is a number here", keys.ErrNotFound)
	}
	return key + "/cryptoKeyVersions/" + id, nil
}

// info reads what the service tells of a version; ok is false for one that is of no use here, or not yet.
func info(v *kmspb.CryptoKeyVersion) (i kms.Info, ok bool) {
	i = kms.Info{ID: v.Name[strings.LastIndexByte(v.Name, '/')+1:], Created: v.CreateTime.AsTime(), Exportable: v.ImportJob != ""}
	for alg, theirs := range algorithms {
		if v.Algorithm == theirs {
			i.Algorithm = alg
		}
	}
	switch v.State {
	case kmspb.CryptoKeyVersion_ENABLED:
		i.State = keys.Enabled
	case kmspb.CryptoKeyVersion_DISABLED:
		i.State = keys.Disabled
	case kmspb.CryptoKeyVersion_DESTROYED, kmspb.CryptoKeyVersion_DESTROY_SCHEDULED,
		kmspb.CryptoKeyVersion_PENDING_EXTERNAL_DESTRUCTION, kmspb.CryptoKeyVersion_EXTERNAL_DESTRUCTION_FAILED:
		i.State = keys.Destroyed
	}
	return i, i.Algorithm != "" && i.State != ""
}

// Create makes the CryptoKey if the label has none, and a version in it. The algorithm of a new version is an attribute of the
// CryptoKey: it is set when it is another one, and looked at in the version, because somebody else may set it meanwhile.
func (b *backend) Create(ctx context.Context, label string, alg keys.Algorithm) (kms.Info, error) {
	b.make.Lock()
	defer b.make.Unlock()
	key, err := b.cryptoKey(label)
	if err != nil {
		return kms.Info{}, err
	}
	for range 5 {
		if err := b.prepare(ctx, key, alg); err != nil {
			return kms.Info{}, sentinel(err)
		}
		v, err := b.c.CreateCryptoKeyVersion(ctx, &kmspb.CreateCryptoKeyVersionRequest{Parent: key, CryptoKeyVersion: &kmspb.CryptoKeyVersion{}}, once)
		if err != nil {
			return kms.Info{}, sentinel(err)
		}
		if !strings.HasPrefix(v.Name, key+"/cryptoKeyVersions/") {
			return kms.Info{}, fmt.Errorf("a version of %s was asked for, the service made %s", key, v.Name)
		}
		if v, err = b.ready(ctx, v); err != nil {
			return kms.Info{}, err
		}
		if v.Algorithm == algorithms[alg] {
			i, ok := info(v)
			if !ok {
				return kms.Info{}, fmt.Errorf("%w: %s is %s already", keys.ErrUnavailable, v.Name, v.State)
			}
			return i, nil
		}
		if _, err := b.c.DestroyCryptoKeyVersion(ctx, &kmspb.DestroyCryptoKeyVersionRequest{Name: v.Name}, once); err != nil {
			return kms.Info{}, sentinel(err)
		}
	}
	return kms.Info{}, fmt.Errorf("%w: somebody else sets the algorithm of %s all the time", keys.ErrUnavailable, key)
}

// prepare has the CryptoKey make versions of alg.
func (b *backend) prepare(ctx context.Context, key string, alg keys.Algorithm) error {
	k, err := b.c.GetCryptoKey(ctx, &kmspb.GetCryptoKeyRequest{Name: key}, once)
	if isCode(err, codes.NotFound) {
		_, err = b.c.CreateCryptoKey(ctx, &kmspb.CreateCryptoKeyRequest{
			Parent: b.ring, CryptoKeyId: key[strings.LastIndexByte(key, '/')+1:], SkipInitialVersionCreation: true,
			CryptoKey: &kmspb.CryptoKey{
				Purpose:         kmspb.CryptoKey_ASYMMETRIC_SIGN,
				VersionTemplate: &kmspb.CryptoKeyVersionTemplate{ProtectionLevel: kmspb.ProtectionLevel_HSM, Algorithm: algorithms[alg]},
			},
		}, once)
		if isCode(err, codes.InvalidArgument) {
			return fmt.Errorf("%w: a location without HSM for %s needs a CryptoKey %s made by hand, with another protection level", err, alg, key)
		}
		if !isCode(err, codes.AlreadyExists) {
			return err
		}
		k, err = b.c.GetCryptoKey(ctx, &kmspb.GetCryptoKeyRequest{Name: key}, once)
	}
	if err != nil {
		return err
	}
	if k.Purpose != kmspb.CryptoKey_ASYMMETRIC_SIGN {
		return fmt.Errorf("%s has purpose %s, want ASYMMETRIC_SIGN: name another label", key, k.Purpose)
	}
	if k.VersionTemplate.GetAlgorithm() == algorithms[alg] {
		return nil
	}
	_, err = b.c.UpdateCryptoKey(ctx, &kmspb.UpdateCryptoKeyRequest{
		CryptoKey:  &kmspb.CryptoKey{Name: key, VersionTemplate: &kmspb.CryptoKeyVersionTemplate{Algorithm: algorithms[alg]}},
		UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"version_template.algorithm"}},
	}, once)
	return err
}

// ready waits until the service has generated a version.
func (b *backend) ready(ctx context.Context, v *kmspb.CryptoKeyVersion) (*kmspb.CryptoKeyVersion, error) {
	for pause := 20 * time.Millisecond; v.State == kmspb.CryptoKeyVersion_PENDING_GENERATION; pause = min(2*pause, time.Second) {
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, fmt.Errorf("%s is still being generated: %w", v.Name, ctx.Err())
		}
		next, err := b.c.GetCryptoKeyVersion(ctx, &kmspb.GetCryptoKeyVersionRequest{Name: v.Name}, once)
		if err != nil {
			return nil, sentinel(err)
		}
		v = next
	}
	if v.State == kmspb.CryptoKeyVersion_GENERATION_FAILED {
		return nil, fmt.Errorf("the service did not generate %s: %s", v.Name, v.GenerationFailureReason)
	}
	return v, nil
}

func (b *backend) List(ctx context.Context, label string) ([]kms.Info, error) {
	key, err := b.cryptoKey(label)
	if errors.Is(err, errLong) {
		return nil, nil // nothing can have been made under it
	}
	var out []kms.Info
	it := b.c.ListCryptoKeyVersions(ctx, &kmspb.ListCryptoKeyVersionsRequest{Parent: key, PageSize: pageSize}, once)
	for {
		v, err := it.Next()
		if errors.Is(err, iterator.Done) {
			break
		}
		if isCode(err, codes.NotFound) {
			return nil, nil
		}
		if err != nil {
			return nil, sentinel(err)
		}
		i, ok := info(v)
		if name, err := b.version(label, i.ID); err != nil || name != v.Name {
			return nil, fmt.Errorf("versions of %s were asked for, the service lists %s", key, v.Name)
		}
		if ok {
			out = append(out, i)
		}
	}
	slices.SortFunc(out, func(x, y kms.Info) int { // numbers grow with time; shorter ones are smaller
		return cmp.Or(cmp.Compare(len(x.ID), len(y.ID)), cmp.Compare(x.ID, y.ID))
	})
	return out, nil
}

func (b *backend) Get(ctx context.Context, label, id string) (kms.Info, error) {
	name, err := b.version(label, id)
	if err != nil {
		return kms.Info{}, err
	}
	v, err := b.c.GetCryptoKeyVersion(ctx, &kmspb.GetCryptoKeyVersionRequest{Name: name}, once)
	if err != nil {
		return kms.Info{}, sentinel(err)
	}
	if v.Name != name {
		return kms.Info{}, fmt.Errorf("%s was asked for, the service tells of %s", name, v.Name)
	}
	i, ok := info(v)
	switch {
	case i.Algorithm == "":
		return kms.Info{}, fmt.Errorf("%w: %s is of algorithm %s", keys.ErrNotFound, name, v.Algorithm)
	case !ok:
		return kms.Info{}, fmt.Errorf("%w: %s is %s", keys.ErrUnavailable, name, v.State)
	}
	return i, nil
}

// why says whether the service refused because the version is not enabled. FailedPrecondition alone does not tell.
func (b *backend) why(ctx context.Context, label, id string, err error) error {
	if !isCode(err, codes.FailedPrecondition) {
		return sentinel(err)
	}
	i, gerr := b.Get(ctx, label, id)
	if gerr != nil {
		return fmt.Errorf("%w (after %s)", gerr, err.Error())
	}
	if i.State == keys.Enabled {
		return fmt.Errorf("%w: %w", keys.ErrUnavailable, err)
	}
	return fmt.Errorf("%w: %w", keys.ErrDisabled, err)
}

func checksum(b []byte) *wrapperspb.Int64Value {
	return wrapperspb.Int64(int64(crc32.Checksum(b, castagnoli)))
}

func same(crc *wrapperspb.Int64Value, b []byte) bool {
	return crc != nil && crc.Value == checksum(b).Value
}

func (b *backend) PublicKey(ctx context.Context, label, id string) (crypto.PublicKey, error) {
	name, err := b.version(label, id)
	if err != nil {
		return nil, err
	}
	p, err := b.c.GetPublicKey(ctx, &kmspb.GetPublicKeyRequest{Name: name}, once)
	if err != nil {
		return nil, b.why(ctx, label, id, err)
	}
	if p.Name != name {
		return nil, fmt.Errorf("the public key of %s was asked for, the service gave that of %s", name, p.Name)
	}
	if !same(p.PemCrc32C, []byte(p.Pem)) {
		return nil, fmt.Errorf("the public key of %s was damaged on its way: wrong checksum", name)
	}
	block, rest := pem.Decode([]byte(p.Pem))
	if block == nil || block.Type != "PUBLIC KEY" || len(strings.TrimSpace(string(rest))) != 0 {
		return nil, fmt.Errorf("the public key of %s is not one PEM block", name)
	}
	pub, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("the public key of %s: %w", name, err)
	}
	return pub, nil
}

func (b *backend) Sign(ctx context.Context, label, id string, alg keys.Algorithm, input []byte) ([]byte, error) {
	name, err := b.version(label, id)
	if err != nil {
		return nil, err
	}
	req := &kmspb.AsymmetricSignRequest{Name: name}
	if alg == keys.P256 {
		req.Digest, req.DigestCrc32C = &kmspb.Digest{Digest: &kmspb.Digest_Sha256{Sha256: input}}, checksum(input)
	} else {
		req.Data, req.DataCrc32C = input, checksum(input)
	}
	r, err := b.c.AsymmetricSign(ctx, req, once)
	if err != nil {
		return nil, b.why(ctx, label, id, err)
	}
	switch {
	case r.Name != name:
		return nil, fmt.Errorf("%s was to sign, the service signed with %s", name, r.Name)
	case alg == keys.P256 && !r.VerifiedDigestCrc32C, alg != keys.P256 && !r.VerifiedDataCrc32C:
		return nil, fmt.Errorf("%s: the service did not check the message's checksum", name)
	case !same(r.SignatureCrc32C, r.Signature):
		return nil, fmt.Errorf("%s: the signature was damaged on its way: wrong checksum", name)
	}
	return r.Signature, nil
}

func (b *backend) Disable(ctx context.Context, label, id string) error {
	name, err := b.version(label, id)
	if err != nil {
		return err
	}
	_, err = b.c.UpdateCryptoKeyVersion(ctx, &kmspb.UpdateCryptoKeyVersionRequest{
		CryptoKeyVersion: &kmspb.CryptoKeyVersion{Name: name, State: kmspb.CryptoKeyVersion_DISABLED},
		UpdateMask:       &fieldmaskpb.FieldMask{Paths: []string{"state"}},
	}, once)
	return b.ended(ctx, label, id, err)
}

func (b *backend) Destroy(ctx context.Context, label, id string) error {
	name, err := b.version(label, id)
	if err != nil {
		return err
	}
	_, err = b.c.DestroyCryptoKeyVersion(ctx, &kmspb.DestroyCryptoKeyVersionRequest{Name: name}, once)
	return b.ended(ctx, label, id, err)
}

// ended forgives a refusal because the version is destroyed already: by us, when an answer was lost, or by somebody else.
func (b *backend) ended(ctx context.Context, label, id string, err error) error {
	if isCode(err, codes.FailedPrecondition) {
		if i, gerr := b.Get(ctx, label, id); gerr == nil && i.State == keys.Destroyed {
			return nil
		}
	}
	return sentinel(err)
}
