package azure

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// fake is a Key Vault as far as this package asks. It was written after the service's documentation, not compared with the service:
// without a token it challenges, names are the same in upper and lower case, lists have short pages in no order, and a version that
// is disabled is neither given nor signs.
type fake struct {
	srv *httptest.Server

	mu     sync.Mutex
	noHSM  bool // a vault of the standard tier
	token  string
	keys   map[string][]*kept // by name in lower case
	calls  []string           // "METHOD path", those that carried a token
	asked  int                // challenges
	before func(f *fake, w http.ResponseWriter, r *http.Request) bool
	after  func(path string, answer map[string]any)
}

type kept struct {
	id, kty, crv     string
	key              *ecdsa.PrivateKey
	enabled, export  bool
	created, expires int64
	tags             map[string]any
}

const page = 2 // versions

func newFake(t testing.TB, tls bool) *fake {
	f := &fake{token: "t0ken", keys: make(map[string][]*kept)}
	if tls {
		f.srv = httptest.NewTLSServer(f)
	} else {
		f.srv = httptest.NewServer(f)
	}
	t.Cleanup(f.srv.Close)
	return f
}

func (f *fake) lock(fn func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fn()
}

func fail(w http.ResponseWriter, status int, code, inner, message string) {
	e := map[string]any{"code": code, "message": message}
	if inner != "" {
		e["innererror"] = map[string]any{"code": inner}
	}
	reply(w, status, map[string]any{"error": e})
}

func reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v)
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Authorization") == "" {
		f.lock(func() { f.asked++ })
		w.Header().Set("WWW-Authenticate", `Bearer authorization="https://login.invalid/00000000-0000-0000-0000-000000000001", resource="https://vault.azure.net"`)
		fail(w, 401, "Unauthorized", "", "AKV10000: Request is missing a Bearer or PoP token.")
		return
	}
	f.mu.Lock()
	f.calls = append(f.calls, r.Method+" "+r.URL.Path)
	before := f.before
	f.mu.Unlock()
	if before != nil && before(f, w, r) {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.Header.Get("Authorization") != "Bearer "+f.token {
		w.Header().Set("WWW-Authenticate", `Bearer authorization="https://login.invalid/00000000-0000-0000-0000-000000000001", resource="https://vault.azure.net"`)
		fail(w, 401, "Unauthorized", "", "AKV10022: Invalid audience.")
		return
	}
	if r.URL.Query().Get("api-version") == "" {
		fail(w, 400, "BadParameter", "", "The api-version query parameter is required.")
		return
	}
	part := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	if len(part) < 2 || part[0] != "keys" || !validName(part[1]) {
		fail(w, 404, "", "", "no such path")
		return
	}
	f.serve(w, r, part[1], part[2:])
}

func validName(s string) bool {
	return len(s) > 0 && len(s) <= 127 && strings.Trim(strings.ToLower(s), "0123456789abcdefghijklmnopqrstuvwxyz-") == ""
}

func (f *fake) serve(w http.ResponseWriter, r *http.Request, name string, rest []string) {
	var in struct {
		Kty        string         `json:"kty"`
		Crv        string         `json:"crv"`
		Tags       map[string]any `json:"tags"`
		Alg        string         `json:"alg"`
		Value      string         `json:"value"`
		Attributes struct {
			Enabled *bool `json:"enabled"`
		} `json:"attributes"`
	}
	if r.Method != http.MethodGet {
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			fail(w, 400, "BadParameter", "", "Invalid JSON")
			return
		}
	}
	low := strings.ToLower(name)
	if r.Method == http.MethodPost && slices.Equal(rest, []string{"create"}) {
		if in.Crv != "P-256" || in.Kty != "EC" && in.Kty != "EC-HSM" {
			fail(w, 400, "BadParameter", "", "Property has invalid value")
			return
		}
		if in.Kty == "EC-HSM" && f.noHSM {
			fail(w, 400, "BadParameter", "", "The key type EC-HSM is not supported by this vault's SKU")
			return
		}
		v := f.add(low, in.Kty)
		v.tags = in.Tags
		f.answer(w, r, f.bundle(low, v))
		return
	}
	vs := f.keys[low]
	if len(vs) == 0 {
		fail(w, 404, "KeyNotFound", "", fmt.Sprintf("A key with (name/id) %s was not found in this key vault.", name))
		return
	}
	if r.Method == http.MethodGet && slices.Equal(rest, []string{"versions"}) {
		f.list(w, r, low)
		return
	}
	i := slices.IndexFunc(vs, func(v *kept) bool { return len(rest) > 0 && v.id == rest[0] })
	if i < 0 {
		fail(w, 404, "KeyNotFound", "", fmt.Sprintf("A key with (name/id) %s/%v was not found in this key vault.", name, rest))
		return
	}
	v := vs[i]
	what := r.Method + " " + strings.Join(rest[1:], "/")
	if what != "PATCH " && !v.enabled {
		fail(w, 403, "Forbidden", "KeyDisabled", "Operation is not allowed on a disabled key.")
		return
	}
	switch what {
	case "GET ":
		f.answer(w, r, f.bundle(low, v))
	case "PATCH ":
		if in.Attributes.Enabled != nil {
			v.enabled = *in.Attributes.Enabled
		}
		f.answer(w, r, f.bundle(low, v))
	case "POST sign":
		if v.expires != 0 && v.expires < time.Now().Unix() {
			fail(w, 403, "Forbidden", "KeyExpired", "Operation is not allowed on an expired key.")
			return
		}
		digest, err := base64.RawURLEncoding.DecodeString(in.Value)
		if err != nil || len(digest) != 32 || in.Alg != "ES256" {
			fail(w, 400, "BadParameter", "", "Property  has invalid value")
			return
		}
		x, y, _ := ecdsa.Sign(rand.Reader, v.key, digest)
		sig := make([]byte, 64)
		x.FillBytes(sig[:32])
		y.FillBytes(sig[32:])
		f.answer(w, r, map[string]any{"kid": f.kid(low, v), "value": base64.RawURLEncoding.EncodeToString(sig)})
	default:
		fail(w, 405, "MethodNotAllowed", "", "no")
	}
}

func (f *fake) answer(w http.ResponseWriter, r *http.Request, v map[string]any) {
	if f.after != nil {
		f.after(r.URL.Path, v)
	}
	reply(w, 200, v)
}

func (f *fake) add(name, kty string) *kept {
	var id [16]byte
	rand.Read(id[:])
	k, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	v := &kept{id: hex.EncodeToString(id[:]), kty: kty, crv: "P-256", key: k, enabled: true, created: time.Now().Unix()}
	f.keys[name] = append(f.keys[name], v)
	return v
}

func (f *fake) kid(name string, v *kept) string { return f.srv.URL + "/keys/" + name + "/" + v.id }

func (v *kept) attributes() map[string]any {
	return map[string]any{
		"enabled": v.enabled, "created": v.created, "updated": v.created, "exportable": v.export,
		"recoveryLevel": "Recoverable+Purgeable", "recoverableDays": 90,
	}
}

func (f *fake) bundle(name string, v *kept) map[string]any {
	point, _ := v.key.PublicKey.Bytes()
	return map[string]any{
		"attributes": v.attributes(), "tags": v.tags,
		"key": map[string]any{
			"kid": f.kid(name, v), "kty": v.kty, "crv": v.crv, "key_ops": []string{"sign"},
			"x": base64.RawURLEncoding.EncodeToString(point[1:33]), "y": base64.RawURLEncoding.EncodeToString(point[33:]),
		},
	}
}

// list gives the versions by id, which is no order, a few at a time.
func (f *fake) list(w http.ResponseWriter, r *http.Request, name string) {
	vs := slices.Clone(f.keys[name])
	slices.SortFunc(vs, func(a, b *kept) int { return strings.Compare(a.id, b.id) })
	from, _ := strconv.Atoi(r.URL.Query().Get("$skiptoken"))
	from = min(from, len(vs))
	to := min(from+page, len(vs))
	items := []any{}
	for _, v := range vs[from:to] {
		items = append(items, map[string]any{"kid": f.kid(name, v), "attributes": v.attributes(), "tags": v.tags})
	}
	out := map[string]any{"value": items, "nextLink": nil}
	if to < len(vs) {
		out["nextLink"] = fmt.Sprintf("%s/keys/%s/versions?api-version=7.6&$skiptoken=%d", f.srv.URL, name, to)
	}
	f.answer(w, r, out)
}
