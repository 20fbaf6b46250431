package admin

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/rotation"
	"github.com/knhk/sidecar/server/access"
)

type fakeLog struct {
	identity string
	info     rotation.Info
}

func (f *fakeLog) Origin() string       { return "example.com/log" }
func (f *fakeLog) IdentityVKey() string { return f.identity }
func (f *fakeLog) Keys() rotation.Info  { return f.info }

func vkey(t *testing.T, pub crypto.PublicKey) string {
	t.Helper()
	v, err := keys.VKey("example.com/log", pub)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// TestPublishedKeys: everything of /keys with its bounds, only what signs now in the JWKS, and every note at /revocations.
func TestPublishedKeys(t *testing.T) {
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	old, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	f := &fakeLog{identity: vkey(t, ed), info: rotation.Info{
		VKey: vkey(t, &ec.PublicKey), NotBefore: at.Add(time.Hour), NotAfter: at.Add(2 * time.Hour),
		Keys: []rotation.Record{
			{VKey: vkey(t, old), NotBefore: at, NotAfter: at.Add(24 * time.Hour), LastSize: 7, Ended: "revoked", Revoked: true},
			{VKey: vkey(t, &ec.PublicKey), NotBefore: at.Add(time.Hour), NotAfter: at.Add(2 * time.Hour), Index: 7, FirstSize: 7},
		},
		Revocations: [][]byte{[]byte("note one\n\n— x AAAA\n"), []byte("note two")},
	}}
	mux := &access.Mux{}
	publishKeys(mux, f)
	srv := httptest.NewServer(mux)
	defer srv.Close()
	get := func(path string) string {
		t.Helper()
		resp, err := http.Get(srv.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %d, %v", path, resp.StatusCode, err)
		}
		return string(b)
	}
	text := get("/keys")
	for _, want := range []string{
		"\nidentity " + f.identity + "\n",
		"\ndaily " + vkey(t, old) + " 0..7 2026-11-23T12:00:00Z 2026-11-24T12:00:00Z revoked\n",
		"\ndaily " + f.info.VKey + " 7.. 2026-11-23T13:00:00Z 2026-11-23T14:00:00Z in-force\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("/keys lacks %q:\n%s", want, text)
		}
	}
	if got := get("/revocations"); got != "note one\n\n— x AAAA\nnote two\n" {
		t.Errorf("/revocations: %q", got)
	}
	var set struct{ Keys []map[string]any }
	if err := json.Unmarshal([]byte(get("/jwks.json")), &set); err != nil || len(set.Keys) != 2 {
		t.Fatalf("/jwks.json: %+v, %v", set, err)
	}
	part := func(k map[string]any, name string) []byte {
		b, err := base64.RawURLEncoding.DecodeString(k[name].(string))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	id, daily := set.Keys[0], set.Keys[1]
	if id["kty"] != "OKP" || id["crv"] != "Ed25519" || id["alg"] != "EdDSA" || !ed.Equal(ed25519.PublicKey(part(id, "x"))) ||
		id["kid"] != strings.Split(f.identity, "+")[1] || id["exp"] != nil {
		t.Errorf("identity key: %v", id)
	}
	x, y := new(big.Int).SetBytes(part(daily, "x")), new(big.Int).SetBytes(part(daily, "y"))
	if daily["kty"] != "EC" || daily["crv"] != "P-256" || daily["alg"] != "ES256" || daily["exp"] != float64(at.Add(2*time.Hour).Unix()) ||
		!ec.PublicKey.Equal(&ecdsa.PublicKey{Curve: elliptic.P256(), X: x, Y: y}) {
		t.Errorf("daily key: %v", daily)
	}

	f.info.Seal, f.info.Keys[1].LastSize = []byte("the seal\n"), 9
	if got := get("/revocations"); !strings.HasSuffix(got, "note two\nthe seal\n") {
		t.Errorf("/revocations of a sealed log: %q", got)
	}
	if got := get("/jwks.json"); strings.Contains(got, `"daily"`) {
		t.Errorf("a sealed log has a daily key: %s", got)
	}
	if got := get("/keys"); !strings.Contains(got, " 7..9 2026-11-23T13:00:00Z 2026-11-23T14:00:00Z sealed\n") {
		t.Errorf("/keys of a sealed log:\n%s", got)
	}
}
