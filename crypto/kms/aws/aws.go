// Package aws keeps signing keys in AWS KMS. Asymmetric keys have no versions there, so each version of a label is a KMS key of
// its own, of spec ECC_NIST_EDWARDS25519 or ECC_NIST_P256. Its id is a keys.VersionID, a dot and the KMS key's id, which every
// call names; its description says label and number, and an alias knhk/LABEL/NUMBER has it listed.
//
// It promises, beside what kms.Store does: a KMS key that was not made for a label is never used for it, whatever alias points
// to it. Destroy disables the key at once and schedules its deletion in 7 days; it is told as destroyed, though an
// administrator may cancel that. A crash between the making of a key and of its alias leaves a key that is not listed and never
// used; its description tells what it is.
//
// Limits of the service: an Ed25519 key signs messages of 1 to 4096 bytes (P-256 ones are of any length: their digest is
// sent), which every checkpoint and statement of a log is far below. A few hundred signatures a second for each account.
//
// Permissions: kms:Sign, kms:DescribeKey and kms:GetPublicKey to sign; kms:CreateKey, kms:TagResource, kms:CreateAlias,
// kms:ListAliases, kms:DisableKey and kms:ScheduleKeyDeletion to rotate. Credentials come from AWS's default chain, but the
// metadata address of a virtual machine is asked only when the URI says imds=true. The server uses this package, verification
// never does.
package aws

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	akms "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/kms"
)

// MaxEd25519 is the longest message, in bytes, that the service signs with an Ed25519 key.
const MaxEd25519 = 4096

const (
	pageSize     = 100
	deletionDays = 7 // the fewest that the service takes
	aliasPrefix  = "alias/knhk/"
)

var specs = map[keys.Algorithm]struct {
	key  types.KeySpec
	sign types.SigningAlgorithmSpec
}{
	keys.Ed25519: {types.KeySpecEccNistEdwards25519, types.SigningAlgorithmSpecEd25519Sha512},
	keys.P256:    {types.KeySpecEccNistP256, types.SigningAlgorithmSpecEcdsaSha256},
}

// Open opens the region that an awskms URI names. It makes no call to the service.
func Open(ctx context.Context, u keys.URI, o kms.Options) (*kms.Store, error) {
	b, err := connect(ctx, u)
	if err != nil {
		return nil, fmt.Errorf("awskms: open: %w", err)
	}
	s, err := o.Store(u, b)
	if err != nil {
		return nil, fmt.Errorf("awskms: open: %w", err)
	}
	return s, nil
}

// backend is kms.Backend on the service's own client.
type backend struct {
	region string
	c      *akms.Client
	http   *http.Client
	now    func() time.Time
}

var _ kms.Backend = (*backend)(nil)

func connect(ctx context.Context, u keys.URI) (*backend, error) {
	if u.Scheme != "awskms" {
		return nil, fmt.Errorf("a %q key is none of AWS KMS", u.Scheme)
	}
	b := &backend{region: u.Location, http: kms.HTTPClient(nil), now: time.Now}
	metadata := imds.ClientDisabled
	if u.IMDS {
		metadata = imds.ClientEnabled
	}
	cfg, err := config.LoadDefaultConfig(ctx,
		config.WithRegion(u.Location),
		config.WithHTTPClient(b.http),
		config.WithEC2IMDSClientEnableState(metadata),
		// One try: the circuit breaker of kms.Store sees to the rest.
		config.WithRetryer(func() aws.Retryer { return aws.NopRetryer{} }),
	)
	if err != nil {
		return nil, err
	}
	b.c = akms.NewFromConfig(cfg, func(o *akms.Options) {
		if address, _ := u.Service(); address != "" {
			o.BaseEndpoint = aws.String(address)
		}
	})
	return b, nil
}

func (b *backend) Custody() string { return "AWS KMS, region " + b.region }

func (b *backend) Close() error {
	b.http.CloseIdleConnections()
	return nil
}

// split takes an id apart: the version's number and time, and the id of the KMS key. An id of another form is keys.ErrNotFound.
func split(id string) (version, key string, err error) {
	version, key, ok := strings.Cut(id, ".")
	if _, err := keys.ParseVersionID(version); err != nil || !ok || key == "" || len(key) > 64 {
		return "", "", fmt.Errorf("%w: an id is VERSION.KEY here", keys.ErrNotFound)
	}
	if strings.Trim(key, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" { // what is trimmed from both ends cannot hold anything else
		return "", "", fmt.Errorf("%w: an id is VERSION.KEY here", keys.ErrNotFound)
	}
	return version, key, nil
}

func alias(label, version string) string {
	return aliasPrefix + kms.Escape(label, '_', "-") + "/" + version
}

// description is what tells a KMS key to be a version of a label; it is there from the first moment, unlike the alias.
func description(label, version string) string {
	return fmt.Sprintf("knhk signing key, label %q, version %s", label, version)
}

// errPending says that a KMS key is on its way into another state.
var errPending = fmt.Errorf("%w: not ready", keys.ErrUnavailable)

// info reads what the service tells of a KMS key; it is keys.ErrNotFound when it is not that version of label.
func info(label, version string, m *types.KeyMetadata) (kms.Info, error) {
	key := aws.ToString(m.KeyId)
	i := kms.Info{ID: version + "." + key, Created: aws.ToTime(m.CreationDate), Exportable: m.Origin == types.OriginTypeExternal}
	for alg, s := range specs {
		if m.KeySpec == s.key {
			i.Algorithm = alg
		}
	}
	if aws.ToString(m.Description) != description(label, version) || m.KeyUsage != types.KeyUsageTypeSignVerify || i.Algorithm == "" {
		return kms.Info{}, fmt.Errorf("%w: KMS key %s was not made as version %s of label %q", keys.ErrNotFound, key, version, label)
	}
	switch m.KeyState {
	case types.KeyStateEnabled:
		i.State = keys.Enabled
	case types.KeyStateDisabled:
		i.State = keys.Disabled
	case types.KeyStatePendingDeletion, types.KeyStatePendingReplicaDeletion:
		i.State = keys.Destroyed
	case types.KeyStateCreating, types.KeyStatePendingImport, types.KeyStateUnavailable, types.KeyStateUpdating:
		return kms.Info{}, fmt.Errorf("%w: KMS key %s is %s", errPending, key, m.KeyState)
	default:
		return kms.Info{}, fmt.Errorf("KMS key %s is in a state that is not known here: %s", key, m.KeyState)
	}
	return i, nil
}

func (b *backend) describe(ctx context.Context, label, version, key string) (kms.Info, error) {
	out, err := b.c.DescribeKey(ctx, &akms.DescribeKeyInput{KeyId: aws.String(key)})
	if err != nil {
		return kms.Info{}, sentinel(err)
	}
	if out.KeyMetadata == nil || aws.ToString(out.KeyMetadata.KeyId) != key {
		return kms.Info{}, fmt.Errorf("KMS key %s was asked for, the service tells of another", key)
	}
	return info(label, version, out.KeyMetadata)
}

func (b *backend) Get(ctx context.Context, label, id string) (kms.Info, error) {
	version, key, err := split(id)
	if err != nil {
		return kms.Info{}, err
	}
	return b.describe(ctx, label, version, key)
}

// Create makes a KMS key and its alias. Without the alias it would not be listed, so a key that gets none is deleted.
func (b *backend) Create(ctx context.Context, label string, alg keys.Algorithm) (kms.Info, error) {
	aliases, err := b.aliases(ctx, label)
	if err != nil {
		return kms.Info{}, err
	}
	var ids []string
	for version := range aliases {
		ids = append(ids, version)
	}
	version := keys.NextVersionID(ids, b.now()).String()
	name := alias(label, version)
	if len(name) > 256 {
		return kms.Info{}, fmt.Errorf("label %q makes an alias of %d characters, at most 256 are possible", label, len(name))
	}
	out, err := b.c.CreateKey(ctx, &akms.CreateKeyInput{
		KeySpec: specs[alg].key, KeyUsage: types.KeyUsageTypeSignVerify, Description: aws.String(description(label, version)),
		Tags: []types.Tag{
			{TagKey: aws.String("knhk-label"), TagValue: aws.String(kms.Escape(label, '_', "-. "))},
			{TagKey: aws.String("knhk-version"), TagValue: aws.String(version)},
		},
	})
	if err != nil {
		return kms.Info{}, sentinel(err)
	}
	if out.KeyMetadata == nil {
		return kms.Info{}, fmt.Errorf("%w: the service made a KMS key and does not say which", keys.ErrUnavailable)
	}
	key := aws.ToString(out.KeyMetadata.KeyId) // a crash here leaves the key, without an alias and so unlisted
	if _, err := b.c.CreateAlias(ctx, &akms.CreateAliasInput{AliasName: aws.String(name), TargetKeyId: aws.String(key)}); err != nil {
		err = sentinel(err)
		// ctx may be over: what it leaves behind costs money, and is looked for by nobody.
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if derr := b.destroy(late, key); derr != nil {
			return kms.Info{}, fmt.Errorf("%w (and KMS key %s stays, without an alias: schedule its deletion: %w)", err, key, derr)
		}
		return kms.Info{}, err
	}
	i, err := info(label, version, out.KeyMetadata)
	for pause := 20 * time.Millisecond; errors.Is(err, errPending) || errors.Is(err, keys.ErrNotFound); pause = min(2*pause, time.Second) {
		// Creating, or not known yet to the copy of the service that answered.
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return kms.Info{}, fmt.Errorf("KMS key %s is not enabled yet: %w", key, ctx.Err())
		}
		i, err = b.describe(ctx, label, version, key)
	}
	return i, err
}

// aliases returns the KMS keys that stand under aliases of label, by version.
func (b *backend) aliases(ctx context.Context, label string) (map[string]string, error) {
	out := make(map[string]string)
	prefix := alias(label, "")
	pages := akms.NewListAliasesPaginator(b.c, &akms.ListAliasesInput{Limit: aws.Int32(pageSize)}, func(o *akms.ListAliasesPaginatorOptions) {
		o.StopOnDuplicateToken = true
	})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, sentinel(err)
		}
		for _, a := range page.Aliases {
			version, ok := strings.CutPrefix(aws.ToString(a.AliasName), prefix)
			if _, err := keys.ParseVersionID(version); ok && err == nil && a.TargetKeyId != nil {
				out[version] = *a.TargetKeyId
			}
		}
	}
	return out, nil
}

// List describes every KMS key that stands under an alias of label: the one way to know its state.
func (b *backend) List(ctx context.Context, label string) ([]kms.Info, error) {
	aliases, err := b.aliases(ctx, label)
	if err != nil {
		return nil, err
	}
	var out []kms.Info
	for version, key := range aliases {
		i, err := b.describe(ctx, label, version, key)
		if errors.Is(err, keys.ErrNotFound) || errors.Is(err, errPending) {
			continue // deleted between the two calls, somebody's alias in our name, or still being made
		} else if err != nil {
			return nil, err
		}
		out = append(out, i)
	}
	slices.SortFunc(out, func(x, y kms.Info) int {
		vx, _, _ := split(x.ID)
		vy, _, _ := split(y.ID)
		return keys.CompareVersionIDs(vx, vy)
	})
	return out, nil
}

// why says whether the service refused because the key is to be deleted.
func (b *backend) why(ctx context.Context, label, id string, err error) error {
	if !isCode(err, invalidState) {
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

func (b *backend) PublicKey(ctx context.Context, label, id string) (crypto.PublicKey, error) {
	_, key, err := split(id)
	if err != nil {
		return nil, err
	}
	out, err := b.c.GetPublicKey(ctx, &akms.GetPublicKeyInput{KeyId: aws.String(key)})
	if err != nil {
		return nil, b.why(ctx, label, id, err)
	}
	if !isKey(aws.ToString(out.KeyId), key) || out.KeyUsage != types.KeyUsageTypeSignVerify {
		return nil, fmt.Errorf("the public key of KMS key %s was asked for, the service gave that of another", key)
	}
	pub, err := x509.ParsePKIXPublicKey(out.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("the public key of KMS key %s: %w", key, err)
	}
	return pub, nil
}

// isKey says whether an answer's key id, which may be an ARN, is key.
func isKey(answer, key string) bool { return answer == key || strings.HasSuffix(answer, ":key/"+key) }

func (b *backend) Sign(ctx context.Context, label, id string, alg keys.Algorithm, input []byte) ([]byte, error) {
	_, key, err := split(id)
	if err != nil {
		return nil, err
	}
	in := &akms.SignInput{KeyId: aws.String(key), Message: input, MessageType: types.MessageTypeRaw, SigningAlgorithm: specs[alg].sign}
	if alg == keys.P256 {
		in.MessageType = types.MessageTypeDigest
	} else if len(input) == 0 || len(input) > MaxEd25519 {
		return nil, fmt.Errorf("message has %d bytes, AWS KMS signs 1 to %d with an Ed25519 key: ecdsa-p256 has no such limit", len(input), MaxEd25519)
	}
	out, err := b.c.Sign(ctx, in)
	if err != nil {
		return nil, b.why(ctx, label, id, err)
	}
	if !isKey(aws.ToString(out.KeyId), key) || out.SigningAlgorithm != in.SigningAlgorithm {
		return nil, fmt.Errorf("KMS key %s was to sign as %s, the service signed with %s as %s", key, in.SigningAlgorithm, aws.ToString(out.KeyId),
			out.SigningAlgorithm)
	}
	return out.Signature, nil
}

func (b *backend) Disable(ctx context.Context, label, id string) error {
	i, err := b.Get(ctx, label, id) // also: never somebody else's key
	if err != nil || i.State != keys.Enabled {
		return err
	}
	_, key, err := split(id)
	if err != nil {
		return err
	}
	_, err = b.c.DisableKey(ctx, &akms.DisableKeyInput{KeyId: aws.String(key)})
	return b.ended(ctx, label, id, err)
}

func (b *backend) Destroy(ctx context.Context, label, id string) error {
	i, err := b.Get(ctx, label, id)
	if err != nil || i.State == keys.Destroyed {
		return err
	}
	_, key, err := split(id)
	if err != nil {
		return err
	}
	return b.ended(ctx, label, id, b.destroy(ctx, key))
}

// destroy schedules the deletion, which disables the key at once.
func (b *backend) destroy(ctx context.Context, key string) error {
	_, err := b.c.ScheduleKeyDeletion(ctx, &akms.ScheduleKeyDeletionInput{
		KeyId: aws.String(key), PendingWindowInDays: aws.Int32(deletionDays),
	})
	return err
}

// ended forgives a refusal because the key is to be deleted already.
func (b *backend) ended(ctx context.Context, label, id string, err error) error {
	if isCode(err, invalidState) {
		if i, gerr := b.Get(ctx, label, id); gerr == nil && i.State == keys.Destroyed {
			return nil
		}
	}
	return sentinel(err)
}
