package vault

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// fake is a Vault with one transit engine at mount "transit", as far as this package asks. What it answers and refuses, with which
// status and words, was written after Vault's documentation of the transit API, not compared with a running Vault.
type fake struct {
	srv *httptest.Server

	mu     sync.Mutex
	token  string
	ns     string
	keys   map[string]*transitKey
	calls  []string                                                       // "METHOD path"
	before func(f *fake, w http.ResponseWriter, r *http.Request) bool     // true: it has answered
	after  func(path string, data map[string]any) (answer map[string]any) // may change what is answered
}

type transitKey struct {
	kind                                   string
	derived, exportable, deletable, backup bool
	minEnc, minDec                         int
	versions                               []crypto.Signer
	made                                   []time.Time
}

var keyName = regexp.MustCompile(`^\w(([\w.-]+)?\w)?$`)

func newFake(t testing.TB) *fake {
	f := &fake{token: "t0ken", keys: make(map[string]*transitKey)}
	f.srv = httptest.NewServer(f)
	t.Cleanup(f.srv.Close)
	return f
}

func (f *fake) lock(fn func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fn()
}

func fail(w http.ResponseWriter, status int, messages ...string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if messages == nil {
		messages = []string{}
	}
	json.NewEncoder(w).Encode(map[string]any{"errors": messages})
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	f.calls = append(f.calls, r.Method+" "+r.URL.Path)
	before := f.before
	f.mu.Unlock()
	if before != nil && before(f, w, r) {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.Header.Get("X-Vault-Request") != "true" {
		fail(w, 412, "required 'X-Vault-Request' header")
		return
	}
	if r.Header.Get("X-Vault-Token") != f.token {
		fail(w, 403, "permission denied", "invalid token")
		return
	}
	path, ok := strings.CutPrefix(r.URL.Path, "/v1/transit/")
	if !ok || r.Header.Get("X-Vault-Namespace") != f.ns {
		fail(w, 404, fmt.Sprintf("no handler for route %q. route entry not found.", r.URL.Path))
		return
	}
	var in map[string]any
	if r.Method == http.MethodPut {
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			fail(w, 400, "failed to parse JSON input: "+err.Error())
			return
		}
	}
	status, data := f.serve(r, path, in)
	if msg, is := data["error"].(string); is {
		fail(w, status, msg)
		return
	}
	if status == 404 {
		fail(w, 404)
		return
	}
	if data == nil {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	if f.after != nil {
		data = f.after(path, data)
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(map[string]any{"request_id": "1", "lease_duration": 0, "data": data, "warnings": nil})
}

func no(msg string) (int, map[string]any) { return 400, map[string]any{"error": msg} }

func (f *fake) serve(r *http.Request, path string, in map[string]any) (int, map[string]any) {
	part := strings.Split(path, "/")
	if path == "keys" && r.Method == http.MethodGet && r.URL.Query().Get("list") == "true" {
		if len(f.keys) == 0 {
			return 404, nil
		}
		return 200, map[string]any{"keys": slices.Sorted(maps.Keys(f.keys))}
	}
	if len(part) < 2 || !keyName.MatchString(part[1]) {
		return 404, map[string]any{"error": "unsupported path"}
	}
	k := f.keys[part[1]]
	switch op := part[0] + " " + strings.Join(part[2:], "/") + " " + r.Method; op {
	case "keys  PUT":
		if k != nil {
			return 200, f.tell(part[1], k) // with a warning that it existed
		}
		k = &transitKey{kind: in["type"].(string)}
		k.exportable, _ = in["exportable"].(bool)
		k.backup, _ = in["allow_plaintext_backup"].(bool)
		k.derived, _ = in["derived"].(bool)
		if !k.add() {
			return no(fmt.Sprintf("unknown key type %v", in["type"]))
		}
		f.keys[part[1]] = k
		return 200, f.tell(part[1], k)
	case "keys  GET":
		if k == nil {
			return 404, nil
		}
		return 200, f.tell(part[1], k)
	case "keys  DELETE":
		if k == nil {
			return no(fmt.Sprintf("error deleting policy %s: could not delete key; not found", part[1]))
		}
		if !k.deletable {
			return no(fmt.Sprintf("error deleting policy %s: deletion is not allowed for this key", part[1]))
		}
		delete(f.keys, part[1])
		return 204, nil
	case "keys rotate PUT":
		if k == nil {
			return no("key not found")
		}
		k.add()
		return 200, f.tell(part[1], k)
	case "keys config PUT":
		if k == nil {
			return no(fmt.Sprintf("no existing key named %s could be found", part[1]))
		}
		if v, ok := in["deletion_allowed"].(bool); ok {
			k.deletable = v
		}
		if v, ok := in["min_encryption_version"].(float64); ok {
			if int(v) > len(k.versions) {
				return no(fmt.Sprintf("cannot set min encryption version of %d, latest key version is %d", int(v), len(k.versions)))
			}
			k.minEnc = int(v)
		}
		return 200, f.tell(part[1], k)
	case "sign  PUT", "sign sha2-256 PUT":
		return f.sign(k, in)
	}
	return 405, map[string]any{"error": "unsupported operation"}
}

func (f *fake) sign(k *transitKey, in map[string]any) (int, map[string]any) {
	if k == nil {
		return no("signing key not found")
	}
	input, err := base64.StdEncoding.DecodeString(in["input"].(string))
	if err != nil {
		return no("unable to decode input as base64")
	}
	v := len(k.versions)
	if x, _ := in["key_version"].(float64); x > 0 {
		v = int(x)
	}
	if v > len(k.versions) || v < k.minEnc || v < k.minDec {
		return no("cannot sign: requested version for signing is less than the minimum encryption key version")
	}
	var sig []byte
	switch key := k.versions[v-1].(type) {
	case ed25519.PrivateKey:
		sig = ed25519.Sign(key, input)
	case *ecdsa.PrivateKey:
		if in["prehashed"] != true {
			h := sha256.Sum256(input)
			input = h[:]
		}
		sig, _ = ecdsa.SignASN1(rand.Reader, key, input)
	default:
		return no("key type does not support signing")
	}
	return 200, map[string]any{"signature": fmt.Sprintf("vault:v%d:%s", v, base64.StdEncoding.EncodeToString(sig)), "key_version": v}
}

func (k *transitKey) add() bool {
	var s crypto.Signer
	switch k.kind {
	case "ed25519":
		_, s, _ = ed25519.GenerateKey(nil)
	case "ecdsa-p256":
		s, _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "ecdsa-p384":
		s, _ = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "aes256-gcm96":
	default:
		return false
	}
	k.versions, k.made = append(k.versions, s), append(k.made, time.Now())
	return true
}

func (f *fake) tell(name string, k *transitKey) map[string]any {
	vs := map[string]any{}
	for i, s := range k.versions {
		if i+1 < k.minDec {
			continue
		}
		v := map[string]any{"creation_time": k.made[i].Format(time.RFC3339Nano), "certificate_chain": ""}
		switch key := s.(type) {
		case nil:
			vs[strconv.Itoa(i+1)] = k.made[i].Unix()
			continue
		case ed25519.PrivateKey:
			v["name"], v["public_key"] = "ed25519", base64.StdEncoding.EncodeToString(key.Public().(ed25519.PublicKey))
		default:
			der, _ := x509.MarshalPKIXPublicKey(s.Public())
			v["name"], v["public_key"] = k.kind, string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
		}
		vs[strconv.Itoa(i+1)] = v
	}
	return map[string]any{
		"name": name, "type": k.kind, "derived": k.derived, "exportable": k.exportable, "allow_plaintext_backup": k.backup,
		"imported_key": false, "deletion_allowed": k.deletable, "latest_version": len(k.versions), "min_available_version": 0,
		"min_decryption_version": max(k.minDec, 1), "min_encryption_version": k.minEnc, "keys": vs,
		"supports_signing": k.kind != "aes256-gcm96",
	}
}

func newTLS(t testing.TB, f *fake) *httptest.Server {
	srv := httptest.NewTLSServer(f)
	t.Cleanup(srv.Close)
	return srv
}
