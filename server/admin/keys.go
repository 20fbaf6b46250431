package admin

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/rotation"
	"github.com/knhk/sidecar/server/access"
)

// keySource is what of the log its keys are published from.
type keySource interface {
	Origin() string
	IdentityVKey() string
	Keys() rotation.Info
}

// publishKeys adds what anybody may know of the log's keys: nothing of it is secret, and nothing of it is to be believed without
// a policy file, for whoever stands between could have written it.
func publishKeys(mux *access.Mux, src keySource) {
	mux.HandleFunc("GET /keys", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Write(keysText(src))
	})
	mux.HandleFunc("GET /jwks.json", func(w http.ResponseWriter, _ *http.Request) {
		b, err := jwks(src)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/jwk-set+json")
		w.Header().Set("Cache-Control", "no-cache")
		w.Write(b)
	})
	mux.HandleFunc("GET /revocations", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		info := src.Keys()
		for _, n := range append(info.Revocations[:len(info.Revocations):len(info.Revocations)], info.Seal) {
			if len(n) > 0 {
				w.Write(append(bytes.TrimRight(n, "\n"), '\n'))
			}
		}
	})
}

// keysText lists every key the log has had, one a line: what it is, its verifier key and, for a daily key, the tree sizes that it
// signs, its times and how it ended. A retired key's signature counts within its sizes only.
func keysText(src keySource) []byte {
	info := src.Keys()
	var b bytes.Buffer
	fmt.Fprintf(&b, "# keys of %s\n# role, verifier key; of daily keys: sizes signed (above..up to), from, until, state\nidentity %s\n",
		src.Origin(), src.IdentityVKey())
	for _, k := range info.Keys {
		last, state := "", "in-force"
		if k.LastSize > 0 {
			last = fmt.Sprint(k.LastSize)
		}
		switch {
		case k.Revoked:
			state = "revoked"
		case k.Ended != "":
			state = k.Ended
		case info.Seal != nil:
			state = "sealed"
		}
		fmt.Fprintf(&b, "daily %s %d..%s %s %s %s\n", k.VKey, k.FirstSize, last, stamp(k.NotBefore), stamp(k.NotAfter), state)
	}
	return b.Bytes()
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// jwk is one key of a JSON Web Key Set: RFC 7517, RFC 8037 for Ed25519, RFC 7518 for P-256.
type jwk struct {
	KeyType   string `json:"kty"`
	Curve     string `json:"crv"`
	X         string `json:"x"`
	Y         string `json:"y,omitempty"`
	Use       string `json:"use"`
	Algorithm string `json:"alg"`
	ID        string `json:"kid"` // the key hash of the verifier key, 8 hexadecimal digits
	Role      string `json:"knhk_role"`
	NotBefore int64  `json:"nbf,omitempty"` // Unix seconds
	Expires   int64  `json:"exp,omitempty"`
}

// jwks holds the identity key and the daily key in force. A set cannot bound what a key counts for, and those who read one take
// every key in it for good: so retired and revoked keys are not in it, and /keys lists them with their bounds.
func jwks(src keySource) ([]byte, error) {
	id, err := toJWK(src.IdentityVKey(), "identity")
	if err != nil {
		return nil, err
	}
	set := struct {
		Keys []jwk `json:"keys"`
	}{[]jwk{id}}
	if info := src.Keys(); info.VKey != "" && info.Seal == nil {
		k, err := toJWK(info.VKey, "daily")
		if err != nil {
			return nil, err
		}
		k.NotBefore, k.Expires = info.NotBefore.Unix(), info.NotAfter.Unix()
		set.Keys = append(set.Keys, k)
	}
	b, err := json.MarshalIndent(set, "", "  ")
	return append(b, '\n'), err
}

func toJWK(vkey, role string) (jwk, error) {
	pub, err := keys.PublicKey(vkey)
	if err != nil {
		return jwk{}, fmt.Errorf("%s key as JWK: %w", role, err)
	}
	k := jwk{Use: "sig", ID: strings.SplitN(vkey, "+", 3)[1], Role: role}
	enc := base64.RawURLEncoding.EncodeToString
	switch pub := pub.(type) {
	case ed25519.PublicKey:
		k.KeyType, k.Curve, k.Algorithm, k.X = "OKP", "Ed25519", "EdDSA", enc(pub)
	case *ecdsa.PublicKey:
		point, err := pub.Bytes() // 4, then x and y of 32 bytes each
		if err != nil {
			return jwk{}, fmt.Errorf("%s key as JWK: %w", role, err)
		}
		k.KeyType, k.Curve, k.Algorithm, k.X, k.Y = "EC", "P-256", "ES256", enc(point[1:33]), enc(point[33:])
	default:
		return jwk{}, fmt.Errorf("%s key as JWK: no form for a %T", role, pub)
	}
	return k, nil
}
