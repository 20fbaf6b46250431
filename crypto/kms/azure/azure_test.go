package azure

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/keys/keystest"
	"github.com/knhk/sidecar/crypto/kms"
)

// clean takes the machine's environment away from the client.
func clean(t testing.TB) {
	for _, e := range os.Environ() {
		name, _, _ := strings.Cut(e, "=")
		up := strings.ToUpper(name)
		if strings.HasPrefix(up, "AZURE_") || strings.HasPrefix(up, "IDENTITY_") || strings.HasPrefix(up, "MSI_") ||
			strings.HasSuffix(up, "_PROXY") || strings.HasPrefix(up, "SSL_CERT_") {
			t.Setenv(name, "")
			os.Unsetenv(name)
		}
	}
}

// token is a credential that was logged in elsewhere, and what it was asked for.
type token struct {
	mu     sync.Mutex
	value  string
	scopes []string
	err    error
}

func (c *token) GetToken(_ context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.scopes = append(c.scopes, o.Scopes...)
	return azcore.AccessToken{Token: c.value, ExpiresOn: time.Now().Add(time.Hour)}, c.err
}

// setup is a fake, a credential and a directory for public keys.
type setup struct {
	*fake
	uri     keys.URI
	cred    *token
	roots   *x509.CertPool
	archive string
}

func newSetup(t testing.TB) *setup {
	clean(t)
	s := &setup{fake: newFake(t, true), cred: &token{value: "t0ken"}, roots: x509.NewCertPool(), archive: t.TempDir()}
	s.roots.AddCert(s.srv.Certificate())
	s.uri = parse(t, s.srv.URL)
	return s
}

func parse(t testing.TB, endpoint string) keys.URI {
	u, err := keys.ParseURI("azurekms://knhk.vault.azure.net?label=x&endpoint=" + endpoint)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func (s *setup) open(t testing.TB) *kms.Store {
	b, err := connect(s.uri, kms.Options{}, s.roots, s.cred)
	if err != nil {
		t.Fatal(err)
	}
	st, err := kms.Options{Archive: s.archive}.Store(s.uri, b)
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

func (s *setup) made(t testing.TB) (*kms.Store, keys.Version, keys.Signer) {
	return made(t, s.store(t))
}

func made(t testing.TB, st *kms.Store) (*kms.Store, keys.Version, keys.Signer) {
	v, err := st.Create(t.Context(), "daily", keys.P256)
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
	s := newSetup(t)
	keystest.RunWithin(t, func(t *testing.T) keys.Store { return s.open(t) }, keystest.Limits{NoEd25519: true, NoDestroy: true})
	s.cred.mu.Lock()
	defer s.cred.mu.Unlock()
	for _, scope := range s.cred.scopes {
		if scope != "https://vault.azure.net/.default" {
			t.Errorf("a token was asked for %q", scope)
		}
	}
}

// TestPlain: a stand-in on this machine is spoken with in plain text and is shown no real credential.
func TestPlain(t *testing.T) {
	clean(t)
	t.Setenv("AZURE_TENANT_ID", "t")
	t.Setenv("AZURE_CLIENT_ID", "c")
	t.Setenv("AZURE_CLIENT_SECRET", "s3cret")
	f := newFake(t, false)
	f.token = "loopback"
	st, err := Open(t.Context(), parse(t, f.srv.URL), kms.Options{Archive: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	made(t, st)
}

// TestCredential: which credential is chosen is a matter of the URI and the environment, and no call is made for it.
func TestCredential(t *testing.T) {
	for _, c := range []struct {
		why, uri string
		env      map[string]string
		want     string
	}{
		{"nothing", "", nil, ""},
		{"a tenant alone", "", map[string]string{"AZURE_TENANT_ID": "t", "AZURE_CLIENT_ID": "c"}, ""},
		{"secret", "", map[string]string{"AZURE_TENANT_ID": "t", "AZURE_CLIENT_ID": "c", "AZURE_CLIENT_SECRET": "s"}, "*azidentity.EnvironmentCredential"},
		{
			"workload identity", "", map[string]string{"AZURE_TENANT_ID": "t", "AZURE_CLIENT_ID": "c", "AZURE_FEDERATED_TOKEN_FILE": "/run/token"},
			"*azidentity.WorkloadIdentityCredential",
		},
		{"token-source", "&token-source=file:/run/token", map[string]string{"AZURE_TENANT_ID": "t", "AZURE_CLIENT_ID": "c"}, "*azidentity.WorkloadIdentityCredential"},
		{"token-source without a tenant", "&token-source=file:/run/token", nil, ""},
		{"managed identity", "&imds=true", nil, "*azidentity.ManagedIdentityCredential"},
	} {
		t.Run(c.why, func(t *testing.T) {
			clean(t)
			for k, v := range c.env {
				t.Setenv(k, v)
			}
			u, err := keys.ParseURI("azurekms://knhk.vault.azure.net?label=x" + c.uri)
			if err != nil {
				t.Fatal(err)
			}
			got, err := credential(u, azcore.ClientOptions{})
			if have := fmt.Sprintf("%T", got); (err != nil) != (c.want == "") || err == nil && have != c.want {
				t.Errorf("credential = %s, %v; want %q", have, err, c.want)
			}
			if c.want == "" {
				if _, err := Open(t.Context(), u, kms.Options{Archive: t.TempDir()}); err == nil {
					t.Error("Open: no error")
				}
			}
		})
	}
}

// TestAnswers: what each answer to a signature means for callers.
func TestAnswers(t *testing.T) {
	says := func(status int, code, inner string) func(*fake, http.ResponseWriter, *http.Request) bool {
		return func(_ *fake, w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Location", "http://127.0.0.1:1/elsewhere")
			fail(w, status, code, inner, "a message\nof two lines")
			return true
		}
	}
	page := func(status int, body string) func(*fake, http.ResponseWriter, *http.Request) bool {
		return func(_ *fake, w http.ResponseWriter, _ *http.Request) bool {
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
		{"no right", says(403, "Forbidden", "ForbiddenByRbac"), keys.ErrCredential},
		{"no right by policy", says(403, "Forbidden", "AccessDenied"), keys.ErrCredential},
		{"disabled", says(403, "Forbidden", "KeyDisabled"), keys.ErrDisabled},
		{"expired", says(403, "Forbidden", "KeyExpired"), keys.ErrDisabled},
		{"throttled", says(429, "Throttled", ""), keys.ErrThrottled},
		{"internal", says(500, "InternalServerError", ""), keys.ErrUnavailable},
		{"in maintenance", says(503, "ServiceUnavailable", ""), keys.ErrUnavailable},
		{"being deleted", says(409, "Conflict", "ObjectIsBeingDeleted"), keys.ErrUnavailable},
		{"a redirect", says(307, "", ""), keys.ErrUnavailable},
		{"a proxy's 404", page(404, "<html>not found</html>"), keys.ErrUnavailable},
		{"a proxy's 502", page(502, "<html>bad gateway</html>"), keys.ErrUnavailable},
		{"a page instead of an answer", page(200, "<html>hello</html>"), keys.ErrUnavailable},
		{"an answer cut short", page(200, `{"kid":"htt`), keys.ErrUnavailable},
		{"a broken connection", func(_ *fake, _ http.ResponseWriter, _ *http.Request) bool { panic(http.ErrAbortHandler) }, keys.ErrUnavailable},
	} {
		t.Run(c.why, func(t *testing.T) {
			s := newSetup(t)
			_, v, sg := s.made(t)
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
			if strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), "t0ken") {
				t.Errorf("error on several lines or with the token: %q", err)
			}
			s.lock(func() { s.before = nil })
			if sg, err = s.store(t).Signer(t.Context(), "daily", v.ID); err != nil {
				t.Fatalf("the version was given up: %v", err)
			}
			if _, err := sg.Sign(t.Context(), []byte("x")); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

// TestForged: answers that do not belong to what was asked are refused.
func TestForged(t *testing.T) {
	b64 := base64.RawURLEncoding.EncodeToString
	for _, c := range []struct {
		why  string
		sign bool // bends the answer to a signature, else to a key
		bend func(a map[string]any)
	}{
		{"signed by another version", true, func(a map[string]any) { a["kid"] = a["kid"].(string)[:len(a["kid"].(string))-1] + "g" }},
		{"signed by nobody", true, func(a map[string]any) { delete(a, "kid") }},
		{"signature over something else", true, func(a map[string]any) { a["value"] = b64(make([]byte, 64)) }},
		{"signature too short", true, func(a map[string]any) { a["value"] = b64(make([]byte, 63)) }},
		{"no signature", true, func(a map[string]any) { delete(a, "value") }},
		{"another key's name", false, func(a map[string]any) {
			k := a["key"].(map[string]any)
			k["kid"] = strings.Replace(k["kid"].(string), "/daily/", "/other/", 1)
		}},
		{"no key", false, func(a map[string]any) { delete(a, "key") }},
		{"another curve", false, func(a map[string]any) { a["key"].(map[string]any)["crv"] = "P-384" }},
		{"another type", false, func(a map[string]any) { a["key"].(map[string]any)["kty"] = "RSA" }},
		{"no point of the curve", false, func(a map[string]any) { a["key"].(map[string]any)["x"] = b64(make([]byte, 32)) }},
		{"coordinate too long", false, func(a map[string]any) { a["key"].(map[string]any)["x"] = b64(make([]byte, 33)) }},
		{"no point", false, func(a map[string]any) { delete(a["key"].(map[string]any), "y") }},
	} {
		t.Run(c.why, func(t *testing.T) {
			s := newSetup(t)
			_, v, _ := s.made(t)
			s.lock(func() {
				s.after = func(path string, a map[string]any) {
					if strings.HasSuffix(path, "/sign") == c.sign {
						c.bend(a)
					}
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

// TestElsewhere: what an administrator does is seen at the next call; Destroy never says more than what is so.
func TestElsewhere(t *testing.T) {
	s := newSetup(t)
	st, v, sg := s.made(t)
	state := func(want keys.State, sign error) {
		t.Helper()
		if _, err := sg.Sign(t.Context(), []byte("x")); !errors.Is(err, sign) {
			t.Errorf("Sign: %v, want %v", err, sign)
		}
		vs, err := st.Versions(t.Context(), "daily")
		if err != nil || len(vs) != 1 || vs[0].ID != v.ID || vs[0].State != want || vs[0].Public == nil {
			t.Errorf("Versions: %+v, %v; want one that is %s", vs, err, want)
		}
	}
	s.lock(func() { s.keys["daily"][0].enabled = false })
	state(keys.Disabled, keys.ErrDisabled)
	s.lock(func() { s.keys["daily"][0].enabled = true })
	state(keys.Enabled, nil)
	if err := st.Destroy(t.Context(), "daily", v.ID); err != nil {
		t.Fatal(err)
	}
	state(keys.Disabled, keys.ErrDisabled)
	if !strings.Contains(st.Custody(), "disabled") {
		t.Errorf("Custody does not say that nothing is destroyed: %q", st.Custody())
	}
	s.lock(func() { s.keys["daily"][0].enabled, s.keys["daily"][0].export = true, true })
	if _, err := st.Signer(t.Context(), "daily", v.ID); err == nil || !strings.Contains(err.Error(), "exportable") {
		t.Errorf("Signer of a key that became exportable: %v", err)
	}
	s.lock(func() { delete(s.keys, "daily") })
	// Made by that handle a moment ago, it might be unknown to a node that lags; a handle opened later believes it.
	if _, err := s.store(t).Signer(t.Context(), "daily", v.ID); !errors.Is(err, keys.ErrDisabled) {
		t.Errorf("Signer of a deleted key: %v, want %v", err, keys.ErrDisabled)
	}
}

// TestForeign: versions of others under the same name are neither seen nor touched.
func TestForeign(t *testing.T) {
	s := newSetup(t)
	st, v, _ := s.made(t)
	var theirs string
	s.lock(func() {
		theirs = s.add("daily", "EC").id
		s.add("daily", "RSA").tags = map[string]any{"owner": "payments"}
		s.add("daily", "EC").tags = map[string]any{tagAlgorithm: "ed25519", tagMade: "1"}
		s.add("daily", "EC").tags = map[string]any{tagAlgorithm: "ecdsa-p256", tagMade: "yesterday"}
	})
	vs, err := st.Versions(t.Context(), "daily")
	if err != nil || len(vs) != 1 || vs[0].ID != v.ID {
		t.Errorf("Versions: %+v, %v; want the one that was made", vs, err)
	}
	if err := st.Disable(t.Context(), "daily", theirs); !errors.Is(err, keys.ErrNotFound) {
		t.Errorf("Disable of somebody else's version: %v, want %v", err, keys.ErrNotFound)
	}
	s.lock(func() {
		if !s.keys["daily"][1].enabled {
			t.Error("somebody else's version is disabled")
		}
	})
}

// TestTier: a vault without HSM keys makes them in software; where both can be had it is the HSM.
func TestTier(t *testing.T) {
	s := newSetup(t)
	s.made(t)
	s.lock(func() { s.noHSM = true })
	s.made(t)
	s.lock(func() {
		if a, b := s.keys["daily"][0].kty, s.keys["daily"][1].kty; a != "EC-HSM" || b != "EC" {
			t.Errorf("made %s, then %s", a, b)
		}
	})
}

// TestName: no two labels have one name, also where names do not tell upper case from lower.
func TestName(t *testing.T) {
	for label, want := range map[string]string{"daily": "daily", "Daily": "-44aily", "a-b": "a-2db", "a.b c": "a-2eb-20c"} {
		if got, ok := name(label); !ok || got != want {
			t.Errorf("name(%q) = %q, %v; want %q", label, got, ok, want)
		}
	}
	s := newSetup(t)
	long := strings.Repeat("A", 64)
	if _, err := s.store(t).Create(t.Context(), long, keys.P256); err == nil || !strings.Contains(err.Error(), "shorter") {
		t.Errorf("Create under a label whose name is too long: %v", err)
	}
	if vs, err := s.store(t).Versions(t.Context(), long); err != nil || len(vs) != 0 {
		t.Errorf("Versions of it: %+v, %v", vs, err)
	}
}

// TestLogin: a refused login is tried again later, not at each call.
func TestLogin(t *testing.T) {
	s := newSetup(t)
	s.lock(func() { s.fake.token = "another" })
	st := s.store(t)
	for range 5 {
		if _, err := st.Versions(t.Context(), "daily"); !errors.Is(err, keys.ErrCredential) {
			t.Fatalf("Versions: %v, want %v", err, keys.ErrCredential)
		}
	}
	s.lock(func() {
		if n := len(s.calls); n > 2 {
			t.Errorf("a refused token was shown %d times", n)
		}
	})
}

// TestLoginAnswers: what the login's answers mean; none of them gives a version up.
func TestLoginAnswers(t *testing.T) {
	for status, want := range map[int]error{
		0: keys.ErrUnavailable, 400: keys.ErrCredential, 401: keys.ErrCredential, 429: keys.ErrThrottled, 500: keys.ErrUnavailable,
	} {
		s := newSetup(t)
		failed := &azidentity.AuthenticationFailedError{}
		if status != 0 {
			failed.RawResponse = &http.Response{StatusCode: status, Body: http.NoBody, Request: &http.Request{Method: "POST", URL: new(url.URL)}}
		}
		s.cred.err = failed
		_, err := s.store(t).Versions(t.Context(), "daily")
		if !errors.Is(err, want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("login with status %d: %v, want %v", status, err, want)
		}
	}
}

// TestSilent: a vault that does not answer holds nobody up beyond the caller's time, and is asked again when it is back.
func TestSilent(t *testing.T) {
	s := newSetup(t)
	_, _, sg := s.made(t)
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
	s := newSetup(t)
	_, _, sg := s.made(t)
	s.lock(func() {
		s.calls = nil
		s.before = func(_ *fake, w http.ResponseWriter, _ *http.Request) bool {
			fail(w, 429, "Throttled", "", "Request was not processed because too many requests were received.")
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

func BenchmarkSign(b *testing.B) { // against the fake: what this side costs, and nothing about Key Vault
	s := newSetup(b)
	_, _, sg := s.made(b)
	for b.Loop() {
		if _, err := sg.Sign(b.Context(), []byte("checkpoint")); err != nil {
			b.Fatal(err)
		}
	}
}
