// Package vault keeps keys in the transit engine of HashiCorp Vault or OpenBao.
//
// Each version is a transit key of its own, "knhk.LABEL.ID", and signs with that key's version 1 alone. The versions that a
// transit key has of itself would not do: they share one algorithm, the lower ones can only be refused together, and none can be
// destroyed while a lower one stays. A version is disabled by rotating its key and raising min_encryption_version past 1, which
// an administrator can take back; it is destroyed by deleting its key, which is allowed only right before. Vault forgets a key
// that is deleted, so the list of such versions and their public keys come from the archive.
//
// It promises what package kms does. It does not renew the token: it reads it anew before each call, so an agent that writes
// the file is enough. Who holds a token that may "create" or "update" sign/knhk.* signs; what the token needs is create, read,
// update and delete on keys/knhk.* (with /config and /rotate below), list on keys, update on sign/knhk.*. Keys that can be
// exported, backed up in plain text or were imported are told as exportable.
//
// The server calls it for vault: URIs.
package vault

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/kms"
)

const (
	prefix      = "knhk." // of the names of transit keys; they must begin with a letter or digit
	tokenSource = "env:VAULT_TOKEN"
)

// Open opens the transit engine that a vault URI names. It makes no call to the service.
func Open(_ context.Context, u keys.URI, o kms.Options) (*kms.Store, error) {
	b, err := connect(u)
	if err != nil {
		return nil, fmt.Errorf("vault: open: %w", err)
	}
	s, err := o.Store(u, b)
	if err != nil {
		return nil, fmt.Errorf("vault: open: %w", err)
	}
	return s, nil
}

// backend is kms.Backend on Vault's own client.
type backend struct {
	mount, place, source string
	http                 *http.Client
	client               *api.Client
	now                  func() time.Time

	mu      sync.Mutex
	token   string            // that client has
	refused [sha256.Size]byte // of the token that was refused last
}

var (
	_ kms.Backend = (*backend)(nil)
	_ kms.Renewer = (*backend)(nil)
)

func connect(u keys.URI) (*backend, error) {
	if u.Scheme != "vault" {
		return nil, fmt.Errorf("a %q key is none of Vault", u.Scheme)
	}
	b := &backend{mount: u.Mount, place: u.Place(), source: u.TokenSource, now: time.Now}
	if b.source == "" {
		b.source = tokenSource
	}
	var roots *x509.CertPool
	if u.CA != "" {
		var err error
		if roots, err = kms.Roots(u.CA); err != nil {
			return nil, err
		}
	}
	address, _ := u.Service()
	b.http = kms.HTTPClient(roots)
	var err error
	// No retries: the circuit breaker of kms.Store sees to them. No redirects: they would carry the token elsewhere.
	b.client, err = api.NewClient(&api.Config{Address: address, HttpClient: b.http, MaxRetries: 0, DisableRedirects: true})
	if err != nil {
		return nil, err
	}
	// What the environment says of tokens, namespaces and headers is for Vault's own tools.
	b.client.ClearToken()
	b.client.SetHeaders(http.Header{api.RequestHeaderName: {"true"}})
	if u.Namespace != "" {
		b.client.SetNamespace(u.Namespace)
	}
	return b, nil
}

func (b *backend) Custody() string { return "Vault transit, " + b.place }

func (b *backend) Close() error {
	b.http.CloseIdleConnections()
	return nil
}

// login gives the client the token that the source has now.
func (b *backend) login() error {
	token, err := keys.ReadSecret(b.source)
	if err != nil {
		return fmt.Errorf("%w: token: %w", keys.ErrCredential, err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if token != b.token {
		b.client.SetToken(token)
		b.token = token
	}
	return nil
}

// Renewed says whether the source has another token than the one that was refused. Implements kms.Renewer.
func (b *backend) Renewed() bool {
	token, err := keys.ReadSecret(b.source)
	if err != nil {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return sha256.Sum256([]byte(token)) != b.refused
}

// call asks Vault; method is GET, LIST, PUT or DELETE. out may be nil.
func (b *backend) call(ctx context.Context, method, path string, in map[string]any, out any) error {
	if err := b.login(); err != nil {
		b.mu.Lock()
		b.refused = [sha256.Size]byte{}
		b.mu.Unlock()
		return err
	}
	path = b.mount + "/" + path
	var resp *api.Response
	var err error
	l := b.client.Logical()
	switch method {
	case "GET":
		resp, err = l.ReadRawWithContext(ctx, path)
	case "LIST":
		resp, err = l.ReadRawWithDataWithContext(ctx, path, map[string][]string{"list": {"true"}})
	case "DELETE":
		resp, err = l.DeleteRawWithContext(ctx, path)
	default:
		var body []byte
		if body, err = json.Marshal(in); err != nil {
			return err
		}
		resp, err = l.WriteRawWithContext(ctx, path, body)
	}
	if resp != nil {
		defer resp.Body.Close()
	}
	if err != nil {
		if err = sentinel(err); errors.Is(err, keys.ErrCredential) {
			b.mu.Lock()
			b.refused = sha256.Sum256([]byte(b.token))
			b.mu.Unlock()
		}
		return err
	}
	if resp.StatusCode >= 300 {
		return fmt.Errorf("%w: status %d, a standby node that redirects: name the active node or let standbys forward", keys.ErrUnavailable, resp.StatusCode)
	}
	if out == nil {
		return nil
	}
	var answer struct {
		Data json.RawMessage `json:"data"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%w: no answer of Vault's: %w", keys.ErrUnavailable, err)
	}
	if err := json.Unmarshal(answer.Data, out); err != nil {
		return fmt.Errorf("%s: an answer without the data that was asked for: %w", path, err)
	}
	return nil
}

// stem begins the names of a label's keys. The escaped label holds no ".", so no label's stem begins another's.
func stem(label string) string { return prefix + kms.Escape(label, '_', "-") + "." }

// name is the transit key of a version. An id that no version can have is keys.ErrNotFound.
func name(label, id string) (string, error) {
	if _, err := keys.ParseVersionID(id); err != nil {
		return "", fmt.Errorf("%w: %w", keys.ErrNotFound, err)
	}
	return stem(label) + id, nil
}

// key is what Vault tells of a transit key.
type key struct {
	Name       string `json:"name"`
	Type       string `json:"type"`
	Derived    bool   `json:"derived"`
	Exportable bool   `json:"exportable"`
	Backup     bool   `json:"allow_plaintext_backup"`
	Imported   bool   `json:"imported_key"`
	Deleted    bool   `json:"soft_deleted"`
	Latest     int    `json:"latest_version"`
	Available  int    `json:"min_available_version"`
	Encryption int    `json:"min_encryption_version"`
	Keys       map[string]struct {
		Public  string    `json:"public_key"`
		Created time.Time `json:"creation_time"`
	} `json:"keys"`
}

func (b *backend) read(ctx context.Context, label, id string) (key, error) {
	n, err := name(label, id)
	if err != nil {
		return key{}, err
	}
	// The keys of symmetric types have another form: the type is looked at first.
	var raw struct {
		key
		Keys json.RawMessage `json:"keys"`
	}
	if err := b.call(ctx, "GET", "keys/"+n, nil, &raw); err != nil {
		return key{}, err
	}
	k := raw.key
	if k.Name != n {
		return key{}, fmt.Errorf("%s was asked for, Vault tells of %q", n, k.Name)
	}
	if algorithm(k) == "" {
		return key{}, fmt.Errorf("%w: %s is of type %q", keys.ErrNotFound, n, k.Type)
	}
	if err := json.Unmarshal(raw.Keys, &k.Keys); err != nil {
		return key{}, fmt.Errorf("%s: its versions: %w", n, err)
	}
	return k, nil
}

// algorithm is empty for a key of no use here.
func algorithm(k key) keys.Algorithm {
	if alg := keys.Algorithm(k.Type); !k.Derived && (alg == keys.Ed25519 || alg == keys.P256) { // Vault's names are ours
		return alg
	}
	return ""
}

func info(id string, k key) kms.Info {
	i := kms.Info{ID: id, Algorithm: algorithm(k), State: keys.Enabled, Created: k.Keys["1"].Created, Exportable: k.Exportable || k.Backup || k.Imported}
	_, there := k.Keys["1"]
	switch {
	case k.Available > 1: // trimmed
		i.State = keys.Destroyed
	case !there || k.Encryption > 1 || k.Deleted: // below min_decryption_version it is kept, but neither shown nor used
		i.State = keys.Disabled
	}
	if v, err := keys.ParseVersionID(id); err == nil && i.Created.IsZero() {
		i.Created = v.Created
	}
	return i
}

// ids lists the ids of a label's versions, of whatever algorithm, in order.
func (b *backend) ids(ctx context.Context, label string) ([]string, error) {
	var list struct {
		Keys []string `json:"keys"`
	}
	if err := b.call(ctx, "LIST", "keys", nil, &list); err != nil && !errors.Is(err, keys.ErrNotFound) { // not found: no keys at all
		return nil, err
	}
	var ids []string
	for _, n := range list.Keys {
		if id, ok := strings.CutPrefix(n, stem(label)); ok {
			if _, err := keys.ParseVersionID(id); err == nil {
				ids = append(ids, id)
			}
		}
	}
	slices.SortFunc(ids, keys.CompareVersionIDs)
	return ids, nil
}

// Create makes a key. The random part of the id keeps two callers from making one key together.
func (b *backend) Create(ctx context.Context, label string, alg keys.Algorithm) (kms.Info, error) {
	ids, err := b.ids(ctx, label)
	if err != nil {
		return kms.Info{}, err
	}
	id := keys.NextVersionID(ids, b.now()).String()
	n, err := name(label, id)
	if err != nil {
		return kms.Info{}, err
	}
	err = b.call(ctx, "PUT", "keys/"+n, map[string]any{
		"type": string(alg), "derived": false, "exportable": false, "allow_plaintext_backup": false,
	}, nil)
	if err != nil {
		return kms.Info{}, err // a crash or an error from here on leaves a key that List lists
	}
	return b.Get(ctx, label, id)
}

// List asks for each key by itself: Vault lists names alone.
func (b *backend) List(ctx context.Context, label string) ([]kms.Info, error) {
	ids, err := b.ids(ctx, label)
	if err != nil {
		return nil, err
	}
	var out []kms.Info
	for _, id := range ids {
		i, err := b.Get(ctx, label, id)
		if errors.Is(err, keys.ErrNotFound) { // deleted meanwhile, or of another type
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, i)
	}
	return out, nil
}

func (b *backend) Get(ctx context.Context, label, id string) (kms.Info, error) {
	k, err := b.read(ctx, label, id)
	if err != nil {
		return kms.Info{}, err
	}
	return info(id, k), nil
}

func (b *backend) PublicKey(ctx context.Context, label, id string) (crypto.PublicKey, error) {
	k, err := b.read(ctx, label, id)
	if err != nil {
		return nil, err
	}
	v, ok := k.Keys["1"]
	if !ok {
		return nil, fmt.Errorf("%w: %s does not show version 1", keys.ErrDisabled, k.Name)
	}
	if algorithm(k) == keys.Ed25519 {
		pub, err := base64.StdEncoding.DecodeString(v.Public)
		if err != nil || len(pub) != ed25519.PublicKeySize {
			return nil, fmt.Errorf("the public key of %s is not %d bytes in base64", k.Name, ed25519.PublicKeySize)
		}
		return ed25519.PublicKey(pub), nil
	}
	block, rest := pem.Decode([]byte(v.Public))
	if block == nil || block.Type != "PUBLIC KEY" || strings.TrimSpace(string(rest)) != "" {
		return nil, fmt.Errorf("the public key of %s is not one PEM block", k.Name)
	}
	pub, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("the public key of %s: %w", k.Name, err)
	}
	return pub, nil
}

func (b *backend) Sign(ctx context.Context, label, id string, alg keys.Algorithm, input []byte) ([]byte, error) {
	n, err := name(label, id)
	if err != nil {
		return nil, err
	}
	path, in := "sign/"+n, map[string]any{"input": base64.StdEncoding.EncodeToString(input), "key_version": 1}
	if alg == keys.P256 {
		path += "/sha2-256"
		in["prehashed"], in["marshaling_algorithm"] = true, "asn1"
	}
	var out struct {
		Signature string `json:"signature"`
	}
	if err := b.call(ctx, "PUT", path, in, &out); err != nil {
		return nil, b.why(ctx, label, id, err)
	}
	text, ok := strings.CutPrefix(out.Signature, "vault:v1:")
	if !ok {
		return nil, fmt.Errorf("version 1 of %s was to sign, Vault answers %.12q", n, out.Signature)
	}
	sig, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("the signature of %s is not in base64", n)
	}
	return sig, nil
}

// why asks what a refusal is about: a bad request stands for a version that is disabled or deleted, and for much else.
func (b *backend) why(ctx context.Context, label, id string, err error) error {
	if !badRequest(err) {
		return err
	}
	i, gerr := b.Get(ctx, label, id)
	if gerr != nil {
		return fmt.Errorf("%w (after %s)", gerr, err.Error())
	}
	if i.State != keys.Enabled {
		return fmt.Errorf("%w: %w", keys.ErrDisabled, err)
	}
	return err
}

// Disable takes two steps; a crash between them leaves a key that has a version 2 and still signs, and the next Disable goes on
// from there.
func (b *backend) Disable(ctx context.Context, label, id string) error {
	k, err := b.read(ctx, label, id)
	if err != nil {
		return err
	}
	if info(id, k).State != keys.Enabled {
		return nil
	}
	if k.Latest < 2 {
		if err := b.call(ctx, "PUT", "keys/"+k.Name+"/rotate", map[string]any{}, nil); err != nil {
			return err
		}
	}
	return b.call(ctx, "PUT", "keys/"+k.Name+"/config", map[string]any{"min_encryption_version": 2}, nil)
}

// Destroy takes two steps; a crash between them leaves a key that still signs and may be deleted.
func (b *backend) Destroy(ctx context.Context, label, id string) error {
	n, err := name(label, id)
	if err != nil {
		return err
	}
	err = b.call(ctx, "PUT", "keys/"+n+"/config", map[string]any{"deletion_allowed": true}, nil)
	if err == nil {
		err = b.call(ctx, "DELETE", "keys/"+n, nil, nil)
	}
	if badRequest(err) {
		if _, gerr := b.Get(ctx, label, id); errors.Is(gerr, keys.ErrNotFound) {
			return nil // deleted: by us, when an answer was lost, or by somebody else
		}
	}
	return err
}
