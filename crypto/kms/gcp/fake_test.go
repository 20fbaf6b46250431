package gcp

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/knhk/sidecar/crypto/keys"
)

const ring = "projects/p/locations/europe-west1/keyRings/knhk"

// fake is the service as far as a store sees it: states, checksums, pages, refusals. It speaks the real wire.
type fake struct {
	kmspb.UnimplementedKeyManagementServiceServer
	addr     string
	server   *grpc.Server
	page     int           // most entries in a page
	generate time.Duration // how long a version is PENDING_GENERATION

	mu      sync.Mutex
	keys    map[string]*kmspb.CryptoKey
	vers    map[string][]*version
	err     map[string]error // by method: every call fails
	hold    chan struct{}    // not nil: signing waits until it is closed or the call ends
	distort func(resp proto.Message)
	calls   map[string]int
}

type version struct {
	v     *kmspb.CryptoKeyVersion
	key   crypto.Signer
	pem   string
	ready time.Time
}

// serve starts a fake on a loopback port. It ends with the test.
func serve(tb testing.TB) *fake {
	tb.Helper()
	for _, name := range []string{"GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_API_USE_CLIENT_CERTIFICATE", "GOOGLE_CLOUD_PROJECT",
		"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "GRPC_PROXY_EXP", "SSL_CERT_FILE", "SSL_CERT_DIR"} {
		tb.Setenv(name, "")
	}
	f := &fake{page: 3, keys: map[string]*kmspb.CryptoKey{}, vers: map[string][]*version{}, err: map[string]error{}, calls: map[string]int{}}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	f.addr = l.Addr().String()
	f.listen(l)
	tb.Cleanup(func() { f.server.Stop() })
	return f
}

func (f *fake) listen(l net.Listener) {
	f.server = grpc.NewServer(grpc.UnaryInterceptor(f.intercept))
	kmspb.RegisterKeyManagementServiceServer(f.server, f)
	go func() { _ = f.server.Serve(l) }()
}

func (f *fake) uri() keys.URI {
	return keys.URI{Scheme: "gcpkms", Location: ring, Label: "daily", Endpoint: f.addr}
}

// set changes what the fake does, safely.
func (f *fake) set(fn func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fn()
}

func (f *fake) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	method := info.FullMethod[strings.LastIndexByte(info.FullMethod, '/')+1:]
	f.mu.Lock()
	f.calls[method]++
	err, hold, distort := f.err[method], f.hold, f.distort
	f.mu.Unlock()
	if hold != nil && method == "AsymmetricSign" {
		select {
		case <-hold:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if err != nil {
		return nil, err
	}
	resp, err := next(ctx, req)
	if err == nil && distort != nil {
		distort(resp.(proto.Message))
	}
	return resp, err
}

func (f *fake) GetCryptoKey(_ context.Context, r *kmspb.GetCryptoKeyRequest) (*kmspb.CryptoKey, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	k, ok := f.keys[r.Name]
	if !ok {
		return nil, status.Errorf(codes.NotFound, "CryptoKey %s not found.", r.Name)
	}
	return proto.Clone(k).(*kmspb.CryptoKey), nil
}

func (f *fake) CreateCryptoKey(_ context.Context, r *kmspb.CreateCryptoKeyRequest) (*kmspb.CryptoKey, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range []byte(r.CryptoKeyId) {
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_') {
			return nil, status.Error(codes.InvalidArgument, "crypto_key_id")
		}
	}
	if n := len(r.CryptoKeyId); n == 0 || n > 63 || !r.SkipInitialVersionCreation || r.Parent != ring {
		return nil, status.Error(codes.InvalidArgument, "crypto_key_id, parent or initial version")
	}
	name := r.Parent + "/cryptoKeys/" + r.CryptoKeyId
	if _, ok := f.keys[name]; ok {
		return nil, status.Errorf(codes.AlreadyExists, "CryptoKey %s already exists.", name)
	}
	k := proto.Clone(r.CryptoKey).(*kmspb.CryptoKey)
	k.Name = name
	f.keys[name] = k
	return proto.Clone(k).(*kmspb.CryptoKey), nil
}

func (f *fake) UpdateCryptoKey(_ context.Context, r *kmspb.UpdateCryptoKeyRequest) (*kmspb.CryptoKey, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	k, ok := f.keys[r.CryptoKey.Name]
	if !ok {
		return nil, status.Error(codes.NotFound, r.CryptoKey.Name)
	}
	if p := r.UpdateMask.GetPaths(); len(p) != 1 || p[0] != "version_template.algorithm" {
		return nil, status.Error(codes.InvalidArgument, "update_mask")
	}
	k.VersionTemplate.Algorithm = r.CryptoKey.VersionTemplate.Algorithm
	return proto.Clone(k).(*kmspb.CryptoKey), nil
}

func (f *fake) CreateCryptoKeyVersion(_ context.Context, r *kmspb.CreateCryptoKeyVersionRequest) (*kmspb.CryptoKeyVersion, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	k, ok := f.keys[r.Parent]
	if !ok {
		return nil, status.Error(codes.NotFound, r.Parent)
	}
	var s crypto.Signer
	switch k.VersionTemplate.Algorithm {
	case kmspb.CryptoKeyVersion_EC_SIGN_P256_SHA256:
		s, _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case kmspb.CryptoKeyVersion_EC_SIGN_ED25519:
		_, s, _ = ed25519.GenerateKey(rand.Reader)
	default:
		return nil, status.Errorf(codes.InvalidArgument, "algorithm %v", k.VersionTemplate.Algorithm)
	}
	der, err := x509.MarshalPKIXPublicKey(s.Public())
	if err != nil {
		return nil, err
	}
	v := &version{
		v: &kmspb.CryptoKeyVersion{
			Name: r.Parent + "/cryptoKeyVersions/" + strconv.Itoa(len(f.vers[r.Parent])+1), Algorithm: k.VersionTemplate.Algorithm,
			ProtectionLevel: k.VersionTemplate.ProtectionLevel, State: kmspb.CryptoKeyVersion_PENDING_GENERATION, CreateTime: timestamppb.Now(),
		},
		key: s, pem: string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), ready: time.Now().Add(f.generate),
	}
	f.vers[r.Parent] = append(f.vers[r.Parent], v)
	return v.tell(), nil
}

// tell returns what the service says of a version now.
func (v *version) tell() *kmspb.CryptoKeyVersion {
	if v.v.State == kmspb.CryptoKeyVersion_PENDING_GENERATION && !time.Now().Before(v.ready) {
		v.v.State = kmspb.CryptoKeyVersion_ENABLED
	}
	return proto.Clone(v.v).(*kmspb.CryptoKeyVersion)
}

// find is called with mu held.
func (f *fake) find(name string) (*version, error) {
	key, _, _ := strings.Cut(name, "/cryptoKeyVersions/")
	for _, v := range f.vers[key] {
		if v.v.Name == name {
			v.tell()
			return v, nil
		}
	}
	return nil, status.Errorf(codes.NotFound, "CryptoKeyVersion %s not found.", name)
}

func (f *fake) GetCryptoKeyVersion(_ context.Context, r *kmspb.GetCryptoKeyVersionRequest) (*kmspb.CryptoKeyVersion, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v, err := f.find(r.Name)
	if err != nil {
		return nil, err
	}
	return v.tell(), nil
}

func (f *fake) ListCryptoKeyVersions(_ context.Context, r *kmspb.ListCryptoKeyVersionsRequest) (*kmspb.ListCryptoKeyVersionsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.keys[r.Parent]; !ok {
		return nil, status.Errorf(codes.NotFound, "CryptoKey %s not found.", r.Parent)
	}
	vs := f.vers[r.Parent]
	// The newest first: the order of the answer is not promised.
	start, _ := strconv.Atoi(r.PageToken)
	out := &kmspb.ListCryptoKeyVersionsResponse{TotalSize: int32(len(vs))}
	for i := start; i < min(start+f.page, len(vs)); i++ {
		out.CryptoKeyVersions = append(out.CryptoKeyVersions, vs[len(vs)-1-i].tell())
	}
	if start+f.page < len(vs) {
		out.NextPageToken = strconv.Itoa(start + f.page)
	}
	return out, nil
}

func notEnabled(v *version) error {
	return status.Errorf(codes.FailedPrecondition, "%s is not enabled, current state is: %s.", v.v.Name, v.v.State)
}

func (f *fake) GetPublicKey(_ context.Context, r *kmspb.GetPublicKeyRequest) (*kmspb.PublicKey, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v, err := f.find(r.Name)
	if err != nil {
		return nil, err
	}
	if v.v.State != kmspb.CryptoKeyVersion_ENABLED {
		return nil, notEnabled(v)
	}
	return &kmspb.PublicKey{Name: v.v.Name, Pem: v.pem, PemCrc32C: checksum([]byte(v.pem)), Algorithm: v.v.Algorithm}, nil
}

func (f *fake) UpdateCryptoKeyVersion(_ context.Context, r *kmspb.UpdateCryptoKeyVersionRequest) (*kmspb.CryptoKeyVersion, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v, err := f.find(r.CryptoKeyVersion.Name)
	if err != nil {
		return nil, err
	}
	if p := r.UpdateMask.GetPaths(); len(p) != 1 || p[0] != "state" {
		return nil, status.Error(codes.InvalidArgument, "update_mask")
	}
	if s := v.v.State; s != kmspb.CryptoKeyVersion_ENABLED && s != kmspb.CryptoKeyVersion_DISABLED {
		return nil, status.Errorf(codes.FailedPrecondition, "%s cannot be updated in state %s.", v.v.Name, s)
	}
	v.v.State = r.CryptoKeyVersion.State
	return v.tell(), nil
}

func (f *fake) DestroyCryptoKeyVersion(_ context.Context, r *kmspb.DestroyCryptoKeyVersionRequest) (*kmspb.CryptoKeyVersion, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v, err := f.find(r.Name)
	if err != nil {
		return nil, err
	}
	if s := v.v.State; s != kmspb.CryptoKeyVersion_ENABLED && s != kmspb.CryptoKeyVersion_DISABLED {
		return nil, status.Errorf(codes.FailedPrecondition, "%s cannot be destroyed in state %s.", v.v.Name, s)
	}
	v.v.State, v.v.DestroyTime = kmspb.CryptoKeyVersion_DESTROY_SCHEDULED, timestamppb.New(time.Now().Add(30*24*time.Hour))
	return v.tell(), nil
}

func (f *fake) AsymmetricSign(_ context.Context, r *kmspb.AsymmetricSignRequest) (*kmspb.AsymmetricSignResponse, error) {
	f.mu.Lock()
	v, err := f.find(r.Name)
	if err == nil && v.v.State != kmspb.CryptoKeyVersion_ENABLED {
		err = notEnabled(v)
	}
	f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	out := &kmspb.AsymmetricSignResponse{Name: r.Name}
	switch v.key.(type) {
	case ed25519.PrivateKey:
		if r.Digest != nil || len(r.Data) > 64<<10 {
			return nil, status.Error(codes.InvalidArgument, "EC_SIGN_ED25519 needs data of at most 64 KiB")
		}
		if r.DataCrc32C != nil {
			if r.DataCrc32C.Value != checksum(r.Data).Value {
				return nil, status.Error(codes.InvalidArgument, "data_crc32c mismatch")
			}
			out.VerifiedDataCrc32C = true
		}
		out.Signature, err = v.key.Sign(rand.Reader, r.Data, crypto.Hash(0))
	default:
		d := r.Digest.GetSha256()
		if len(d) != 32 || len(r.Data) != 0 {
			return nil, status.Error(codes.InvalidArgument, "digest.sha256 must have 32 bytes")
		}
		if r.DigestCrc32C != nil {
			if r.DigestCrc32C.Value != checksum(d).Value {
				return nil, status.Error(codes.InvalidArgument, "digest_crc32c mismatch")
			}
			out.VerifiedDigestCrc32C = true
		}
		out.Signature, err = v.key.Sign(rand.Reader, d, crypto.SHA256)
	}
	out.SignatureCrc32C = checksum(out.Signature)
	return out, err
}
