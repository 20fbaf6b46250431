package vault

import (
	"context"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/keys/keystest"
	"github.com/knhk/sidecar/crypto/kms"
)

// clean takes the machine's environment away from the client.
func clean(t testing.TB) {
	for _, e := range os.Environ() {
		name, _, _ := strings.Cut(e, "=")
		up := strings.ToUpper(name)
		if strings.HasPrefix(up, "VAULT_") || strings.HasPrefix(up, "BAO_") || strings.HasSuffix(up, "_PROXY") || strings.HasPrefix(up, "SSL_CERT_") {
			t.Setenv(name, "")
			os.Unsetenv(name)
		}
	}
}

// setup is a fake, a token file and a directory for public keys.
type setup struct {
	*fake
	uri     keys.URI
	token   string // file
	archive string
}

func newSetup(t testing.TB, more string) *setup {
	clean(t)
	s := &setup{fake: newFake(t), archive: t.TempDir()}
	s.token = filepath.Join(t.TempDir(), "token")
	s.write(t, "t0ken")
	return s.at(t, more)
}

func (s *setup) at(t testing.TB, more string) *setup {
	var err error
	place := "vault://" + strings.TrimPrefix(s.srv.URL, "http://") + "/transit?label=x&token-source=file:" + s.token
	if s.uri, err = keys.ParseURI(place + more); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *setup) write(t testing.TB, token string) {
	if err := os.WriteFile(s.token, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (s *setup) open(t testing.TB) *kms.Store {
	st, err := Open(t.Context(), s.uri, kms.Options{Archive: s.archive})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func (s *setup) store(t testing.TB) *kms.Store {
	st := s.open(t)
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return st
}

// made is a store with one version and its signer.
func (s *setup) made(t testing.TB, alg keys.Algorithm) (*kms.Store, keys.Version, keys.Signer) {
	st := s.store(t)
	v, err := st.Create(t.Context(), "daily", alg)
	if err != nil {
		t.Fatal(err)
	}
	sg, err := st.Signer(t.Context(), "daily", v.ID)
	if err != nil {
		t.Fatal(err)
	}
	return st, v, sg
}

func TestConformance(t *testing.T) {
	s := newSetup(t, "")
	keystest.Run(t, func(t *testing.T) keys.Store { return s.open(t) })
}

// TestAnswers: what each answer to a signature means for callers.
func TestAnswers(t *testing.T) {
	page := func(status int, body string) func(*fake, http.ResponseWriter, *http.Request) bool {
		return func(_ *fake, w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Location", "http://127.0.0.1:1/elsewhere")
			w.WriteHeader(status)
			fmt.Fprint(w, body)
			return true
		}
	}
	for _, c := range []struct {
		why    string
		before func(*fake, http.ResponseWriter, *http.Request) bool
		want   error
	}{
		{"token without the right", page(403, `{"errors":["1 error occurred:\n\t* permission denied\n\n"]}`), keys.ErrCredential},
		{"no token got through", page(400, `{"errors":["missing client token"]}`), keys.ErrCredential},
		{"rate limit quota", page(429, `{"errors":["request path \"transit/sign/x\": rate limit quota exceeded"]}`), keys.ErrThrottled},
		{"sealed", page(503, `{"errors":["Vault is sealed"]}`), keys.ErrUnavailable},
		{"no active node", page(500, `{"errors":["local node not active but active cluster node not found"]}`), keys.ErrUnavailable},
		{"a standby lags behind", page(412, `{"errors":["required index state not present"]}`), keys.ErrUnavailable},
		{"engine not mounted", page(404, `{"errors":["no handler for route \"transit/sign/x\". route entry not found."]}`), keys.ErrUnavailable},
		{"a proxy's 404", page(404, `<html>not found</html>`), keys.ErrUnavailable},
		{"an empty 404", page(404, ``), keys.ErrUnavailable},
		{"a proxy's 502", page(502, `<html>bad gateway</html>`), keys.ErrUnavailable},
		{"a standby that redirects", page(307, ``), keys.ErrUnavailable},
		{"a page instead of an answer", page(200, `<html>hello</html>`), keys.ErrUnavailable},
		{"an answer cut short", page(200, `{"data":{"signa`), keys.ErrUnavailable},
		{"a broken connection", func(_ *fake, w http.ResponseWriter, _ *http.Request) bool {
			c, _, _ := w.(http.Hijacker).Hijack()
			c.Close()
			return true
		}, keys.ErrUnavailable},
	} {
		t.Run(c.why, func(t *testing.T) {
			s := newSetup(t, "")
			_, v, sg := s.made(t, keys.Ed25519)
			s.lock(func() { s.before = c.before })
			sig, err := sg.Sign(t.Context(), []byte("x"))
			if !errors.Is(err, c.want) || sig != nil {
				t.Fatalf("Sign = %d bytes, %v; want %v", len(sig), err, c.want)
			}
			for _, other := range []error{keys.ErrNotFound, keys.ErrDisabled, keys.ErrCredential, keys.ErrThrottled, keys.ErrUnavailable} {
				if other != c.want && errors.Is(err, other) {
					t.Errorf("Sign: %v is %v too", err, other)
				}
			}
			if strings.ContainsAny(err.Error(), "\n\t") || strings.Contains(err.Error(), "t0ken") {
				t.Errorf("error on several lines or with the token: %q", err)
			}
			s.lock(func() { s.before = nil })
			if c.want == keys.ErrCredential { // the same token waits: TestTokenRenewed
				return
			}
			if _, err := sg.Sign(t.Context(), []byte("x")); err != nil {
				t.Errorf("afterwards: %v", err)
			}
			if got, err := s.store(t).Signer(t.Context(), "daily", v.ID); err != nil || got == nil {
				t.Errorf("the version was given up: %v", err)
			}
		})
	}
}

// TestForged: answers that do not belong to what was asked are refused.
func TestForged(t *testing.T) {
	for _, c := range []struct {
		why  string
		path string
		bend func(data map[string]any)
	}{
		{"signed by another version", "sign/", func(d map[string]any) {
			d["signature"] = strings.Replace(d["signature"].(string), ":v1:", ":v2:", 1)
		}},
		{"signature over something else", "sign/", func(d map[string]any) {
			d["signature"] = "vault:v1:" + base64.StdEncoding.EncodeToString(make([]byte, 64))
		}},
		{"no base64", "sign/", func(d map[string]any) { d["signature"] = "vault:v1:%" }},
		{"no signature", "sign/", func(d map[string]any) { delete(d, "signature") }},
		{"another key's name", "keys/", func(d map[string]any) { d["name"] = "other" }},
		{"versions of another form", "keys/", func(d map[string]any) { d["keys"] = map[string]any{"1": 17} }},
		{"public key cut short", "keys/", func(d map[string]any) {
			d["keys"].(map[string]any)["1"].(map[string]any)["public_key"] = "AAAA"
		}},
		{"another key", "keys/", func(d map[string]any) {
			d["keys"].(map[string]any)["1"].(map[string]any)["public_key"] = base64.StdEncoding.EncodeToString(make([]byte, 32))
		}},
	} {
		t.Run(c.why, func(t *testing.T) {
			s := newSetup(t, "")
			_, v, _ := s.made(t, keys.Ed25519)
			s.lock(func() {
				s.after = func(path string, d map[string]any) map[string]any {
					if strings.HasPrefix(path, c.path) {
						c.bend(d)
					}
					return d
				}
			})
			sg, err := s.store(t).Signer(t.Context(), "daily", v.ID)
			if err == nil {
				_, err = sg.Sign(t.Context(), []byte("x"))
			}
			if err == nil || errors.Is(err, keys.ErrNotFound) || errors.Is(err, keys.ErrDisabled) {
				t.Errorf("%v; want an error that does not give the version up", err)
			}
		})
	}
}

// TestTokenRenewed: a refused token is not tried again, another one in its place at once, and nothing is kept of the first.
func TestTokenRenewed(t *testing.T) {
	s := newSetup(t, "")
	_, _, sg := s.made(t, keys.P256)
	s.lock(func() { s.fake.token, s.calls = "next", nil })
	for range 5 {
		if _, err := sg.Sign(t.Context(), []byte("x")); !errors.Is(err, keys.ErrCredential) {
			t.Fatalf("Sign with a token that expired: %v", err)
		}
	}
	s.lock(func() {
		if len(s.calls) != 1 {
			t.Errorf("a refused token was tried %d times", len(s.calls))
		}
	})
	s.write(t, "next")
	if _, err := sg.Sign(t.Context(), []byte("x")); err != nil {
		t.Errorf("Sign with another token: %v", err)
	}
	if err := os.Chmod(s.token, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := sg.Sign(t.Context(), []byte("x")); !errors.Is(err, keys.ErrCredential) || !strings.Contains(err.Error(), "0644") {
		t.Errorf("Sign with a token that everybody can read: %v", err)
	}
	if err := os.Chmod(s.token, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := sg.Sign(t.Context(), []byte("x")); err != nil {
		t.Errorf("Sign after the file was closed: %v", err)
	}
}

// TestEnvironment: without token-source the token is VAULT_TOKEN; what else the environment says of Vault changes nothing.
func TestEnvironment(t *testing.T) {
	s := newSetup(t, "")
	s.uri.TokenSource = ""
	for name, v := range map[string]string{
		"VAULT_TOKEN": "t0ken", "VAULT_ADDR": "http://127.0.0.1:1", "VAULT_NAMESPACE": "elsewhere", "VAULT_AGENT_ADDR": "http://127.0.0.1:1",
		"VAULT_HEADERS": `{"X-Other":"1"}`, "VAULT_MAX_RETRIES": "7",
	} {
		t.Setenv(name, v)
	}
	s.made(t, keys.Ed25519)
}

func TestNamespace(t *testing.T) {
	s := newSetup(t, "&namespace=team%2Fa")
	s.lock(func() { s.ns = "team/a" })
	s.made(t, keys.Ed25519)
	s.at(t, "&namespace=team%2Fb")
	if _, err := s.store(t).Versions(t.Context(), "daily"); !errors.Is(err, keys.ErrUnavailable) {
		t.Errorf("Versions in a namespace that is not there: %v, want %v", err, keys.ErrUnavailable)
	}
}

// TestForeign: keys of others, also under names like ours, are neither seen nor touched.
func TestForeign(t *testing.T) {
	s := newSetup(t, "")
	st, v, _ := s.made(t, keys.Ed25519)
	id := keys.NextVersionID(nil, time.Unix(1e9, 0)).String()
	s.lock(func() {
		for name, k := range map[string]*transitKey{
			"payments":                    {kind: "aes256-gcm96"},
			stem("daily") + id:            {kind: "aes256-gcm96"},
			stem("daily") + id[:29] + "x": {kind: "ed25519"},
			stem("daily.x") + id:          {kind: "ed25519"},
			stem("daily") + "0002-20010909T014640Z-00000000": {kind: "ecdsa-p384"},
			stem("daily") + "0003-20010909T014640Z-00000000": {kind: "ed25519", derived: true},
		} {
			k.add()
			s.keys[name] = k
		}
	})
	vs, err := st.Versions(t.Context(), "daily")
	if err != nil || len(vs) != 1 || vs[0].ID != v.ID {
		t.Errorf("Versions: %+v, %v; want the one that was made", vs, err)
	}
	if err := st.Destroy(t.Context(), "daily", id); !errors.Is(err, keys.ErrNotFound) {
		t.Errorf("Destroy of a key of another type: %v, want %v", err, keys.ErrNotFound)
	}
	s.lock(func() {
		if len(s.keys) != 7 {
			t.Errorf("%d keys, want 7", len(s.keys))
		}
	})
}

// TestElsewhere: what an administrator does is seen at the next call, and what Vault can undo is undone.
func TestElsewhere(t *testing.T) {
	s := newSetup(t, "")
	st, v, sg := s.made(t, keys.P256)
	n := stem("daily") + v.ID
	state := func(want keys.State, sign error) {
		t.Helper()
		if _, err := sg.Sign(t.Context(), []byte("x")); !errors.Is(err, sign) {
			t.Errorf("Sign: %v, want %v", err, sign)
		}
		vs, err := st.Versions(t.Context(), "daily")
		if err != nil || len(vs) != 1 || vs[0].State != want || vs[0].Public == nil {
			t.Errorf("Versions: %+v, %v; want one that is %s", vs, err, want)
		}
	}
	s.lock(func() { s.keys[n].add() })
	state(keys.Enabled, nil) // rotated: version 1 signs on
	s.lock(func() { s.keys[n].minEnc = 2 })
	state(keys.Disabled, keys.ErrDisabled)
	s.lock(func() { s.keys[n].minEnc = 0 })
	state(keys.Enabled, nil)
	s.lock(func() { s.keys[n].minDec = 2 })
	state(keys.Disabled, keys.ErrDisabled)
	s.lock(func() { s.keys[n].minDec = 0; s.keys[n].exportable = true })
	if _, err := st.Signer(t.Context(), "daily", v.ID); err == nil || !strings.Contains(err.Error(), "exportable") {
		t.Errorf("Signer of a key that became exportable: %v", err)
	}
	s.lock(func() { delete(s.keys, n) })
	// Made by this handle a moment ago, it might be unknown to a node that lags; a handle opened later believes it.
	if _, err := s.store(t).Signer(t.Context(), "daily", v.ID); !errors.Is(err, keys.ErrDisabled) {
		t.Errorf("Signer of a deleted key: %v, want %v", err, keys.ErrDisabled)
	}
}

// TestHalfDone: each step of Disable and Destroy fails, and fails though done; the next call ends what was begun.
func TestHalfDone(t *testing.T) {
	for _, op := range []string{"Disable", "Destroy"} {
		for step := range 2 {
			for _, done := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%d/%v", op, step, done), func(t *testing.T) {
					s := newSetup(t, "")
					st, v, sg := s.made(t, keys.Ed25519)
					changes := 0
					s.lock(func() {
						s.before = func(f *fake, w http.ResponseWriter, r *http.Request) bool {
							if r.Method == http.MethodGet {
								return false
							}
							if changes++; changes != step+1 {
								return false
							}
							f.lock(func() { f.before = nil })
							if done {
								f.ServeHTTP(discard{}, r)
							}
							fail(w, 500, "internal error")
							return true
						}
					})
					call := map[string]func(context.Context, string, string) error{"Disable": st.Disable, "Destroy": st.Destroy}[op]
					if err := call(t.Context(), "daily", v.ID); !errors.Is(err, keys.ErrUnavailable) {
						t.Fatalf("%s: %v, want %v", op, err, keys.ErrUnavailable)
					}
					if err := s.open(t).Close(); err != nil {
						t.Fatal(err)
					}
					again := s.store(t)
					call = map[string]func(context.Context, string, string) error{"Disable": again.Disable, "Destroy": again.Destroy}[op]
					if err := call(t.Context(), "daily", v.ID); err != nil {
						t.Fatalf("%s again: %v", op, err)
					}
					vs, err := again.Versions(t.Context(), "daily")
					want := map[string]keys.State{"Disable": keys.Disabled, "Destroy": keys.Destroyed}[op]
					if err != nil || len(vs) != 1 || vs[0].State != want {
						t.Errorf("Versions: %+v, %v; want one that is %s", vs, err, want)
					}
					if sig, err := sg.Sign(t.Context(), []byte("x")); err == nil || sig != nil {
						t.Errorf("Sign afterwards: %v", err)
					}
				})
			}
		}
	}
}

type discard struct{}

func (discard) Header() http.Header         { return http.Header{} }
func (discard) Write(b []byte) (int, error) { return len(b), nil }
func (discard) WriteHeader(int)             {}

// TestSilent: a Vault that does not answer holds nobody up beyond the caller's time, and is asked again when it is back.
func TestSilent(t *testing.T) {
	s := newSetup(t, "")
	_, _, sg := s.made(t, keys.Ed25519)
	release := make(chan struct{})
	s.lock(func() {
		s.before = func(_ *fake, _ http.ResponseWriter, r *http.Request) bool {
			select {
			case <-release:
			case <-r.Context().Done():
			}
			return false
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := sg.Sign(ctx, []byte("x")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Sign: %v, want %v", err, context.DeadlineExceeded)
	}
	if took := time.Since(start); took > 30*time.Second {
		t.Errorf("returned after %v", took)
	}
	close(release)
	if _, err := sg.Sign(t.Context(), []byte("x")); err != nil {
		t.Errorf("Sign afterwards: %v", err)
	}
}

// TestThrottled: throttling opens the circuit breaker, which says so and asks no more.
func TestThrottled(t *testing.T) {
	s := newSetup(t, "")
	_, _, sg := s.made(t, keys.Ed25519)
	s.lock(func() {
		s.calls = nil
		s.before = func(_ *fake, w http.ResponseWriter, _ *http.Request) bool {
			fail(w, 429, "rate limit quota exceeded")
			return true
		}
	})
	for range 50 {
		if _, err := sg.Sign(t.Context(), []byte("x")); !errors.Is(err, keys.ErrThrottled) {
			t.Fatalf("Sign: %v, want %v", err, keys.ErrThrottled)
		}
	}
	s.lock(func() {
		if len(s.calls) >= 50 {
			t.Errorf("%d calls for 50 signatures: the breaker stayed closed", len(s.calls))
		}
		s.before = nil
	})
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if _, err := sg.Sign(t.Context(), []byte("x")); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("the breaker did not close: %v", err)
		}
	}
}

// TestTLS: with ca the connection is TLS, under those certificates alone, also on a loopback host.
func TestTLS(t *testing.T) {
	s := newSetup(t, "")
	s.srv.Close()
	tls := newTLS(t, s.fake)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: tls.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	uri := "vault://" + strings.TrimPrefix(tls.URL, "https://") + "/transit?label=x&token-source=file:" + s.token
	u, err := keys.ParseURI(uri + "&ca=" + ca)
	if err != nil {
		t.Fatal(err)
	}
	s.uri = u
	s.made(t, keys.P256)
	other, err := connect(u)
	if err != nil {
		t.Fatal(err)
	}
	other.http.CloseIdleConnections()
	u.CA = filepath.Join(t.TempDir(), "none.pem")
	if _, err := Open(t.Context(), u, kms.Options{Archive: s.archive}); err == nil {
		t.Error("Open with certificates that are not there: no error")
	}
}

func BenchmarkSign(b *testing.B) { // against the fake: what this side costs, and nothing about Vault
	for _, alg := range []keys.Algorithm{keys.Ed25519, keys.P256} {
		b.Run(string(alg), func(b *testing.B) {
			s := newSetup(b, "")
			_, _, sg := s.made(b, alg)
			for b.Loop() {
				if _, err := sg.Sign(b.Context(), []byte("checkpoint")); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
