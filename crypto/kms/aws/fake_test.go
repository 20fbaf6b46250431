package aws

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
)

const region = "eu-central-1"

// fake is the service as far as a store sees it: states, pages, refusals, limits. It speaks the real wire, JSON 1.1, and looks
// whether requests are signed (not whether the signature is right).
type fake struct {
	addr   string
	server *http.Server
	page   int
	create time.Duration // how long a key is Creating

	mu      sync.Mutex
	keys    map[string]*key
	aliases map[string]string
	err     map[string]*refused // by operation: every call fails
	hold    chan struct{}       // not nil: signing waits until it is closed or the call ends
	distort func(op string, resp map[string]any)
	calls   map[string]int
}

type key struct {
	id, state, spec, usage, description, origin string
	created                                     time.Time
	ready                                       time.Time
	private                                     crypto.Signer
}

// refused is an error as the service sends it.
type refused struct {
	status int
	code   string
}

func serve(tb testing.TB) *fake {
	tb.Helper()
	for _, name := range []string{"AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SESSION_TOKEN", "AWS_REGION",
		"AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_KMS", "AWS_CA_BUNDLE",
		"AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR"} {
		tb.Setenv(name, "")
	}
	tb.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	tb.Setenv("AWS_ACCESS_KEY_ID", "AKIAFAKE")
	tb.Setenv("AWS_SECRET_ACCESS_KEY", "fake")
	tb.Setenv("AWS_CONFIG_FILE", "/dev/null")
	tb.Setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
	f := &fake{page: 3, keys: map[string]*key{}, aliases: map[string]string{}, err: map[string]*refused{}, calls: map[string]int{}}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	f.addr = l.Addr().String()
	f.listen(l)
	tb.Cleanup(func() { _ = f.server.Close() })
	return f
}

func (f *fake) listen(l net.Listener) {
	f.server = &http.Server{Handler: f, ReadHeaderTimeout: time.Minute}
	go func() { _ = f.server.Serve(l) }()
}

func (f *fake) uri() keys.URI {
	return keys.URI{Scheme: "awskms", Location: region, Label: "daily", Endpoint: "http://" + f.addr}
}

func (f *fake) set(fn func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fn()
}

var signed = regexp.MustCompile(`^AWS4-HMAC-SHA256 Credential=AKIAFAKE/[0-9]{8}/` + region + `/kms/aws4_request, SignedHeaders=[a-z0-9;-]*host[a-z0-9;-]*, Signature=[0-9a-f]{64}$`)

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	op, ok := strings.CutPrefix(r.Header.Get("X-Amz-Target"), "TrentService.")
	body, err := io.ReadAll(r.Body)
	if !ok || r.Method != http.MethodPost || r.URL.Path != "/" || err != nil {
		answer(w, nil, &refused{400, "UnknownOperationException"})
		return
	}
	if !signed.MatchString(r.Header.Get("Authorization")) || r.Header.Get("X-Amz-Date") == "" {
		answer(w, nil, &refused{400, "MissingAuthenticationTokenException"})
		return
	}
	f.mu.Lock()
	f.calls[op]++
	hold, refuse, distort := f.hold, f.err[op], f.distort
	f.mu.Unlock()
	if hold != nil && op == "Sign" {
		select {
		case <-hold:
		case <-r.Context().Done():
			return
		}
	}
	if refuse != nil {
		answer(w, nil, refuse)
		return
	}
	resp, refuse := f.do(op, body)
	if refuse == nil && distort != nil {
		distort(op, resp)
	}
	answer(w, resp, refuse)
}

func answer(w http.ResponseWriter, resp map[string]any, err *refused) {
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	if err != nil {
		w.WriteHeader(err.status)
		resp = map[string]any{"__type": err.code, "message": "the fake says no"}
	}
	if resp == nil {
		return // operations without a result have an empty body
	}
	_ = json.NewEncoder(w).Encode(resp)
}

type request struct {
	KeyId, TargetKeyId, AliasName, KeySpec, KeyUsage, Description, Marker, MessageType, SigningAlgorithm string
	Message                                                                                              []byte
	Limit, PendingWindowInDays                                                                           int
	Tags                                                                                                 []struct{ TagKey, TagValue string }
}

func (f *fake) do(op string, body []byte) (map[string]any, *refused) {
	var in request
	if err := json.Unmarshal(body, &in); err != nil {
		return nil, &refused{400, "SerializationException"}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch op {
	case "CreateKey":
		return f.createKey(in)
	case "ListAliases":
		return f.listAliases(in)
	}
	if in.TargetKeyId != "" {
		in.KeyId = in.TargetKeyId
	}
	k := f.keys[in.KeyId]
	if k == nil {
		return nil, &refused{400, "NotFoundException"}
	}
	k.settle()
	switch op {
	case "DescribeKey":
		return map[string]any{"KeyMetadata": k.metadata()}, nil
	case "CreateAlias":
		if !regexp.MustCompile(`^alias/[a-zA-Z0-9/_-]+$`).MatchString(in.AliasName) || len(in.AliasName) > 256 {
			return nil, &refused{400, "InvalidAliasNameException"}
		}
		if _, ok := f.aliases[in.AliasName]; ok {
			return nil, &refused{400, "AlreadyExistsException"}
		}
		if k.state == "PendingDeletion" {
			return nil, &refused{400, "KMSInvalidStateException"}
		}
		f.aliases[in.AliasName] = k.id
		return nil, nil
	case "DisableKey":
		if k.state == "PendingDeletion" || k.state == "Creating" {
			return nil, &refused{400, "KMSInvalidStateException"}
		}
		k.state = "Disabled"
		return nil, nil
	case "ScheduleKeyDeletion":
		if k.state == "PendingDeletion" || in.PendingWindowInDays < 7 || in.PendingWindowInDays > 30 {
			return nil, &refused{400, "KMSInvalidStateException"}
		}
		k.state = "PendingDeletion"
		return map[string]any{"KeyId": k.arn(), "KeyState": k.state, "PendingWindowInDays": in.PendingWindowInDays}, nil
	}
	if k.state == "Disabled" {
		return nil, &refused{400, "DisabledException"}
	}
	if k.state != "Enabled" {
		return nil, &refused{400, "KMSInvalidStateException"}
	}
	switch op {
	case "GetPublicKey":
		der, err := x509.MarshalPKIXPublicKey(k.private.Public())
		if err != nil {
			return nil, &refused{500, "KMSInternalException"}
		}
		return map[string]any{"KeyId": k.arn(), "PublicKey": der, "KeySpec": k.spec, "KeyUsage": k.usage}, nil
	case "Sign":
		return k.sign(in)
	}
	return nil, &refused{400, "UnknownOperationException"}
}

func (f *fake) createKey(in request) (map[string]any, *refused) {
	var b [16]byte
	_, _ = rand.Read(b[:])
	k := &key{
		id: fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:]), state: "Creating", spec: in.KeySpec, usage: in.KeyUsage,
		description: in.Description, origin: "AWS_KMS", created: time.Now().Truncate(time.Millisecond), ready: time.Now().Add(f.create),
	}
	switch in.KeySpec {
	case "ECC_NIST_P256":
		k.private, _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "ECC_NIST_EDWARDS25519":
		_, k.private, _ = ed25519.GenerateKey(rand.Reader)
	default:
		return nil, &refused{400, "ValidationException"}
	}
	for _, t := range in.Tags {
		if !regexp.MustCompile(`^[\p{L}\p{Z}\p{N}_.:/=+\-@]*$`).MatchString(t.TagValue) {
			return nil, &refused{400, "TagException"}
		}
	}
	if in.KeyUsage != "SIGN_VERIFY" || len(in.Description) > 8192 {
		return nil, &refused{400, "ValidationException"}
	}
	k.settle()
	f.keys[k.id] = k
	return map[string]any{"KeyMetadata": k.metadata()}, nil
}

func (f *fake) listAliases(in request) (map[string]any, *refused) {
	names := slices.Sorted(maps.Keys(f.aliases))
	start := 0
	if in.Marker != "" {
		if start = slices.Index(names, in.Marker); start < 0 {
			return nil, &refused{400, "InvalidMarkerException"}
		}
	}
	list := []map[string]any{}
	out := map[string]any{"Truncated": false}
	for i := start; i < len(names); i++ {
		if len(list) == min(f.page, in.Limit) {
			out["Truncated"], out["NextMarker"] = true, names[i]
			break
		}
		a := map[string]any{"AliasName": names[i]}
		if id := f.aliases[names[i]]; id != "" { // the service's own aliases may have no key
			a["TargetKeyId"] = id
		}
		list = append(list, a)
	}
	out["Aliases"] = list
	return out, nil
}

// settle is called with the fake's mu held.
func (k *key) settle() {
	if k.state == "Creating" && !time.Now().Before(k.ready) {
		k.state = "Enabled"
	}
}

func (k *key) arn() string { return "arn:aws:kms:" + region + ":111122223333:key/" + k.id }

func (k *key) metadata() map[string]any {
	return map[string]any{
		"KeyId": k.id, "Arn": k.arn(), "KeyState": k.state, "KeySpec": k.spec, "KeyUsage": k.usage, "Description": k.description,
		"CreationDate": float64(k.created.UnixMilli()) / 1000, "Origin": k.origin, "Enabled": k.state == "Enabled",
	}
}

func (k *key) sign(in request) (map[string]any, *refused) {
	var sig []byte
	var err error
	switch p := k.private.(type) {
	case ed25519.PrivateKey:
		if in.SigningAlgorithm != "ED25519_SHA_512" || in.MessageType != "RAW" || len(in.Message) < 1 || len(in.Message) > 4096 {
			return nil, &refused{400, "ValidationException"}
		}
		sig = ed25519.Sign(p, in.Message)
	case *ecdsa.PrivateKey:
		if in.SigningAlgorithm != "ECDSA_SHA_256" || in.MessageType != "DIGEST" || len(in.Message) != 32 {
			return nil, &refused{400, "ValidationException"}
		}
		sig, err = ecdsa.SignASN1(rand.Reader, p, in.Message)
	}
	if err != nil {
		return nil, &refused{500, "KMSInternalException"}
	}
	return map[string]any{"KeyId": k.arn(), "Signature": sig, "SigningAlgorithm": in.SigningAlgorithm}, nil
}
