package server

import (
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/server/config"
)

// TestServiceOpeners: each scheme of a key service opens its store without a call to it, or says that it was built without it.
func TestServiceOpeners(t *testing.T) {
	for _, name := range []string{
		"GOOGLE_APPLICATION_CREDENTIALS", "AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_CA_BUNDLE", "VAULT_TOKEN", "VAULT_ADDR", "HTTPS_PROXY",
		"https_proxy", "HTTP_PROXY", "http_proxy",
	} {
		t.Setenv(name, "")
	}
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	t.Setenv("AWS_CONFIG_FILE", "/dev/null")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
	dir := t.TempDir()
	cfg := &config.Config{StateDir: filepath.Join(dir, "state")}
	for _, uri := range []string{
		"gcpkms://projects/p/locations/l/keyRings/r?label=daily&endpoint=127.0.0.1:9",
		"awskms://eu-central-1?label=daily&endpoint=http://127.0.0.1:9",
		"azurekms://v.vault.azure.net?label=daily&endpoint=http://127.0.0.1:9&token-source=file:" + filepath.Join(dir, "token"),
		"vault://127.0.0.1:9/transit?label=daily&token-source=env:KNHK_TEST_NO_TOKEN",
	} {
		u, err := keys.ParseURI(uri)
		if err != nil {
			t.Fatal(err)
		}
		if serviceOpeners[u.Scheme] == nil {
			t.Errorf("%s: no opener", u.Scheme)
			continue
		}
		s, err := openStore(t.Context(), cfg, u, keyOptions{log: slog.New(slog.DiscardHandler)})
		if err != nil {
			if !strings.Contains(err.Error(), "built without") {
				t.Errorf("%s: %v", u.Scheme, err)
			}
			continue
		}
		if s.Custody() == "" {
			t.Errorf("%s: no custody", u.Scheme)
		}
		if err := s.Close(); err != nil {
			t.Errorf("%s: Close: %v", u.Scheme, err)
		}
	}
}

func TestSamePlace(t *testing.T) {
	const ring = "gcpkms://projects/p/locations/l/keyRings/r?label=d"
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"soft:keys?label=a", "soft:keys?label=b", true},
		{"soft:keys", "soft:other", false},
		{ring, ring + "&credentials=file:/other", true},
		{ring, "soft:keys", false},
	} {
		if got := samePlace(c.a, c.b); got != c.want {
			t.Errorf("samePlace(%s, %s) = %v", c.a, c.b, got)
		}
	}
}
