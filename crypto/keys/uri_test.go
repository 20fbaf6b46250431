package keys

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const pkcs11Tail = "?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/run/secrets/pin"

func TestParseURI(t *testing.T) {
	module := "/usr/lib/softhsm/libsofthsm2.so"
	for _, c := range []struct {
		why, in string
		want    URI
	}{
		{"soft, relative", "soft:run/keys", URI{Scheme: "soft", Dir: "run/keys"}},
		{"soft, absolute, with a label", "soft:/var/lib/knhk/keys?label=identity",
			URI{Scheme: "soft", Dir: "/var/lib/knhk/keys", Label: "identity"}},
		{"soft, percent-encoding; + stays +", "soft:/a%20b/100%25/c+d?label=a%3Fb+c",
			URI{Scheme: "soft", Dir: "/a b/100%/c+d", Label: "a?b+c"}},
		{"pkcs11, PIN in a file", "pkcs11:token=knhk;object=identity" + pkcs11Tail,
			URI{Scheme: "pkcs11", Token: "knhk", Label: "identity", Module: module, PINSource: "file:/run/secrets/pin"}},
		{"pkcs11, any order, PIN in the environment", "pkcs11:object=identity;token=knhk?pin-source=env:KNHK_PIN&module-path=" + module,
			URI{Scheme: "pkcs11", Token: "knhk", Label: "identity", Module: module, PINSource: "env:KNHK_PIN"}},
		{"pkcs11, three slashes are one (RFC 8089)", "pkcs11:token=knhk;object=i?module-path=/m.so&pin-source=file:///p",
			URI{Scheme: "pkcs11", Token: "knhk", Label: "i", Module: "/m.so", PINSource: "file:/p"}},
		{"pkcs11, percent-encoding hides separators", "pkcs11:token=a%3Bb%3Dc;object=o%26%3F%25?module-path=%2Fm.so&pin-source=file%3A%2Fp%26q",
			URI{Scheme: "pkcs11", Token: "a;b=c", Label: "o&?%", Module: "/m.so", PINSource: "file:/p&q"}},
		{"pkcs11, token names are UTF-8", "pkcs11:token=schl%C3%BCssel;object=i?module-path=/m.so&pin-source=file:/p",
			URI{Scheme: "pkcs11", Token: "schlüssel", Label: "i", Module: "/m.so", PINSource: "file:/p"}},
	} {
		got, err := ParseURI(c.in)
		if err != nil || got != c.want {
			t.Errorf("%s: ParseURI(%q) = %+v, %v; want %+v", c.why, c.in, got, err, c.want)
			continue
		}
		if again, err := ParseURI(got.String()); err != nil || again != got {
			t.Errorf("%s: String is %q, which reads as %+v, %v", c.why, got, again, err)
		}
	}
}

func TestParseURIRefuses(t *testing.T) {
	p := func(path string) string { return "pkcs11:" + path + pkcs11Tail }
	q := func(query string) string { return "pkcs11:token=knhk;object=identity?" + query }
	for _, c := range []struct{ why, in, want string }{
		{"empty", "", `begins with "soft:", "pkcs11:", "gcpkms:"`},
		{"no scheme", "run/keys", `begins with "soft:", "pkcs11:", "gcpkms:"`},
		{"unknown scheme", "file:/keys", `begins with "soft:", "pkcs11:", "gcpkms:"`},
		{"schemes are lower case here", "PKCS11:token=x", `begins with "soft:", "pkcs11:", "gcpkms:"`},
		{"soft without a directory", "soft:", "directory is empty"},
		{"soft with a host", "soft://keys/dir", "no host part"},
		{"soft with an unknown attribute", "soft:dir?object=x", `attribute "object" is unknown, want label`},
		{"soft with an empty label", "soft:dir?label=", `attribute "label" is empty`},
		{"soft with an empty query", "soft:dir?", "attribute 1 is not NAME=VALUE"},
		{"soft with two labels", "soft:dir?label=a&label=b", `attribute "label" stands twice`},
		{"soft with a bad label", "soft:dir?label=a%0Ab", `attribute "label" holds control characters`},
		{"soft with a bad escape", "soft:dir%zz", "directory holds a bad percent-encoding"},
		{"soft with a NUL", "soft:dir%00", "directory holds control characters"},
		{"no token", p("object=identity"), `attribute "token" is missing`},
		{"no object", p("token=knhk"), `attribute "object" is missing`},
		{"empty token", p("token=;object=identity"), `attribute "token" is empty`},
		{"nothing in the path", "pkcs11:" + pkcs11Tail, "attribute 1 is not NAME=VALUE"},
		{"token twice", p("token=a;token=b;object=c"), `attribute "token" stands twice`},
		{"token too long", p("token=" + strings.Repeat("t", 33) + ";object=c"), `attribute "token" has 33 bytes`},
		{"object too long", p("token=t;object=" + strings.Repeat("o", 65)), `attribute "object": label has 65 bytes`},
		{"object not ASCII", p("token=t;object=%C3%BC"), `attribute "object": label`},
		{"invalid UTF-8", p("token=%ff;object=o"), `attribute "token" holds control characters or is not UTF-8`},
		{"bad escape", p("token=%4;object=o"), `attribute "token" holds a bad percent-encoding`},
		{"attribute of RFC 7512 that is not used here", p("token=t;object=o;type=private"), `attribute "type" is unknown`},
		{"vendor attribute", p("token=t;object=o;x-vendor=1"), `attribute "x-vendor" is unknown`},
		{"trailing separator", p("token=t;object=o;"), "attribute 3 is not NAME=VALUE"},
		{"query attribute in the path", p("token=t;object=o;module-path=/m"), `attribute "module-path" is unknown`},
		{"no query", "pkcs11:token=t;object=o", `attribute "module-path" is missing`},
		{"no module-path", q("pin-source=file:/p"), `attribute "module-path" is missing`},
		{"module-path relative", q("module-path=libsofthsm2.so&pin-source=file:/p"), `attribute "module-path" is not an absolute path`},
		{"module-name", q("module-name=softhsm2&pin-source=file:/p"), `attribute "module-name" is unknown`},
		{"no pin-source", q("module-path=/m.so"), `attribute "pin-source" is missing`},
		{"pin-source relative", q("module-path=/m.so&pin-source=file:p"), `attribute "pin-source": want file:/path`},
		{"pin-source with a host", q("module-path=/m.so&pin-source=file://host/p"), `attribute "pin-source": want file:/path`},
		{"pin-source a bare path", q("module-path=/m.so&pin-source=/p"), `attribute "pin-source": want file:/path or env:NAME`},
		{"pin-source a program", q("module-path=/m.so&pin-source=%7Cpin"), `attribute "pin-source": want file:/path or env:NAME`},
		{"pin-source an empty variable", q("module-path=/m.so&pin-source=env:"), `attribute "pin-source": want env:NAME`},
	} {
		_, err := ParseURI(c.in)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: ParseURI(%q): %v; want %q", c.why, c.in, err, c.want)
		}
	}
}

// TestParseURISecrets: wherever a secret stands by mistake, it is refused and not repeated.
func TestParseURISecrets(t *testing.T) {
	const secret = "S3cr3tPIN"
	for _, in := range []string{
		"pkcs11:token=t;object=o?module-path=/m.so&pin-value=" + secret,
		"pkcs11:token=t;object=o?pin-value=" + secret + "&module-path=/m.so&pin-source=file:/p",
		"pkcs11:token=t;object=o;pin-value=" + secret + pkcs11Tail,
		"pkcs11:token=%zz;object=o;x=y?pin-value=" + secret,
		"pkcs11:token=t;object=o?module-path=/m.so&pin-source=" + secret,
		"pkcs11:token=t;object=o?module-path=/m.so&pin-source=file:" + secret,
		"pkcs11:token=t;object=o?module-path=/m.so&pin-source=env:1" + secret,
		"pkcs11:token=t;object=o?module-path=/m.so&" + secret,
		"pkcs11:token=t;object=o;" + secret + pkcs11Tail,
		"pkcs11:token=t;object=o?module-path=/m.so&pin-source=file:/p%zz" + secret,
		"soft:dir?" + secret,
		secret,
	} {
		u, err := ParseURI(in)
		if err == nil {
			t.Errorf("ParseURI(%q) = %v; want a refusal", in, u)
			continue
		}
		if strings.Contains(err.Error(), secret) {
			t.Errorf("the error repeats the secret: %v", err)
		}
		if strings.Contains(in, "pin-value") && !strings.Contains(err.Error(), `"pin-value" is refused`) {
			t.Errorf("ParseURI(%q): %v; want pin-value named first", in, err)
		}
	}
}

func TestPIN(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pin")
	fromFile := URI{Scheme: "pkcs11", PINSource: "file:" + file}
	fromEnv := URI{Scheme: "pkcs11", PINSource: "env:KNHK_TEST_PIN"}
	for _, c := range []struct{ why, content, want, refused string }{
		{"plain", "1234", "1234", ""},
		{"one line break goes", "1234\n", "1234", ""},
		{"CR LF goes", "1234\r\n", "1234", ""},
		{"only one line break goes", "1234\n\n", "1234\n", ""},
		{"a CR of its own stays", "1234\r", "1234\r", ""},
		{"spaces stay", " 12 34 \n", " 12 34 ", ""},
		{"longest", strings.Repeat("9", maxSecret) + "\r\n", strings.Repeat("9", maxSecret), ""},
		{"too long", strings.Repeat("9", maxSecret+1), "", "more than 1024 bytes"},
		{"far too long", strings.Repeat("9", 1<<20), "", "more than 1024 bytes"},
		{"empty", "", "", "is empty"},
		{"only a line break", "\n", "", "is empty"},
	} {
		if err := os.WriteFile(file, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Setenv("KNHK_TEST_PIN", c.content)
		for _, u := range []URI{fromFile, fromEnv} {
			got, err := u.PIN()
			if got != c.want || (err != nil) != (c.refused != "") || err != nil && !strings.Contains(err.Error(), c.refused) {
				t.Errorf("%s, %s: PIN of %d bytes, %v; want %d bytes, %q", c.why, u.PINSource, len(got), err, len(c.want), c.refused)
			}
			if err != nil && strings.Contains(err.Error(), "999") {
				t.Errorf("%s: the error repeats the PIN", c.why)
			}
		}
	}
	if err := os.WriteFile(file, []byte("12\x0034"), 0o600); err != nil { // not possible in the environment
		t.Fatal(err)
	}
	if _, err := fromFile.PIN(); err == nil || !strings.Contains(err.Error(), "NUL") {
		t.Errorf("PIN with a NUL: %v; C would cut it there", err)
	}
	for _, c := range []struct {
		u    URI
		want string
	}{
		{URI{Scheme: "pkcs11", PINSource: "file:" + file + ".none"}, file + ".none"},
		{URI{Scheme: "pkcs11", PINSource: "env:KNHK_TEST_NO_PIN"}, "KNHK_TEST_NO_PIN is not set"},
		{URI{Scheme: "soft", Dir: "keys"}, `"soft" key has no pin-source`},
	} {
		if _, err := c.u.PIN(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("PIN of %+v: %v; want %q", c.u, err, c.want)
		}
	}
}

func FuzzParseURI(f *testing.F) {
	f.Add("soft:run/keys?label=identity")
	f.Add("soft:/a%20b")
	f.Add("pkcs11:token=knhk;object=identity" + pkcs11Tail)
	f.Add("pkcs11:token=a%3Bb;object=o?pin-source=env:PIN&module-path=/m.so")
	f.Add("pkcs11:token=t;object=o?module-path=/m.so&pin-value=1234")
	f.Add("gcpkms://projects/p/locations/l/keyRings/r?label=d&endpoint=127.0.0.1:1&credentials=file:/c")
	f.Add("awskms://r?label=d&imds=true&endpoint=http://[::1]:1")
	f.Add("azurekms://v.vault.azure.net?label=d&token-source=file:/t")
	f.Add("vault://h:1/m?label=d&token-source=env:T&namespace=n&ca=/c&archive=/a")
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err != nil {
			return
		}
		if strings.Contains(s, "pin-value=") && u.Scheme == "pkcs11" && strings.HasPrefix(s, "pkcs11:pin-value=") {
			t.Fatalf("%q was accepted", s)
		}
		again, err := ParseURI(u.String())
		if err != nil || again != u {
			t.Fatalf("%q is %+v; its String %q is %+v, %v", s, u, u, again, err)
		}
		for _, v := range []string{u.Label, u.Dir, u.Token, u.Module, u.PINSource} {
			if strings.ContainsAny(v, "\x00\n\r") {
				t.Fatalf("%q gave %+v with control characters", s, u)
			}
		}
	})
}

func TestParseServiceURI(t *testing.T) {
	const ring = "projects/p-1/locations/europe-west1/keyRings/knhk"
	for _, c := range []struct {
		in      string
		want    URI
		address string
		plain   bool
		place   string
	}{
		{
			"gcpkms://" + ring + "?label=daily", URI{Scheme: "gcpkms", Location: ring, Label: "daily"},
			"", false, "gcpkms://" + ring,
		},
		{
			"gcpkms://" + ring + "?label=daily&credentials=file:///run/key.json&archive=/var/lib/a",
			URI{Scheme: "gcpkms", Location: ring, Label: "daily", Credentials: "file:/run/key.json", Archive: "/var/lib/a"},
			"", false, "gcpkms://" + ring,
		},
		{
			"gcpkms://" + ring + "?label=daily&endpoint=127.0.0.1:9000", URI{Scheme: "gcpkms", Location: ring, Label: "daily", Endpoint: "127.0.0.1:9000"},
			"127.0.0.1:9000", true, "gcpkms://" + ring + "?endpoint=127.0.0.1:9000",
		},
		{
			"gcpkms://" + ring + "?label=daily&endpoint=kms.example:443", URI{Scheme: "gcpkms", Location: ring, Label: "daily", Endpoint: "kms.example:443"},
			"kms.example:443", false, "gcpkms://" + ring + "?endpoint=kms.example:443",
		},
		{
			"awskms://eu-central-1?label=a%20b&imds=true", URI{Scheme: "awskms", Location: "eu-central-1", Label: "a b", IMDS: true},
			"", false, "awskms://eu-central-1",
		},
		{
			"awskms://eu-central-1?label=d&endpoint=http://[::1]:80",
			URI{Scheme: "awskms", Location: "eu-central-1", Label: "d", Endpoint: "http://[::1]:80"},
			"http://[::1]:80", true, "awskms://eu-central-1?endpoint=http://[::1]:80",
		},
		{
			"awskms://eu-central-1?label=d&endpoint=https://vpce.example",
			URI{Scheme: "awskms", Location: "eu-central-1", Label: "d", Endpoint: "https://vpce.example"},
			"https://vpce.example", false, "awskms://eu-central-1?endpoint=https://vpce.example",
		},
		{
			"azurekms://v1.vault.azure.net?label=d&token-source=file:/run/token",
			URI{Scheme: "azurekms", Location: "v1.vault.azure.net", Label: "d", TokenSource: "file:/run/token"},
			"https://v1.vault.azure.net", false, "azurekms://v1.vault.azure.net",
		},
		{
			"vault://vault.example:8200/transit/eu?label=d&token-source=env:VAULT_TOKEN&namespace=ns/a&ca=/etc/ca.pem",
			URI{
				Scheme: "vault", Location: "vault.example:8200", Mount: "transit/eu", Label: "d", TokenSource: "env:VAULT_TOKEN", Namespace: "ns/a",
				CA: "/etc/ca.pem",
			},
			"https://vault.example:8200", false, "vault://vault.example:8200/transit/eu?namespace=ns/a",
		},
		{
			"vault://127.0.0.1:8200/transit?label=d", URI{Scheme: "vault", Location: "127.0.0.1:8200", Mount: "transit", Label: "d"},
			"http://127.0.0.1:8200", true, "vault://127.0.0.1:8200/transit",
		},
		{
			"vault://localhost:8200/transit?label=d&ca=/ca.pem", URI{Scheme: "vault", Location: "localhost:8200", Mount: "transit", Label: "d", CA: "/ca.pem"},
			"https://localhost:8200", false, "vault://localhost:8200/transit",
		},
	} {
		got, err := ParseURI(c.in)
		if err != nil || got != c.want {
			t.Errorf("ParseURI(%q) = %+v, %v; want %+v", c.in, got, err, c.want)
			continue
		}
		if again, err := ParseURI(got.String()); err != nil || again != got {
			t.Errorf("String is %q, which reads as %+v, %v", got, again, err)
		}
		if address, plain := got.Service(); address != c.address || plain != c.plain || got.Place() != c.place || !got.IsService() {
			t.Errorf("%q: Service %q, %v; Place %q", c.in, address, plain, got.Place())
		}
	}
}

func TestParseServiceURIRefuses(t *testing.T) {
	const secret = "S3cr3t"
	const ring = "gcpkms://projects/p/locations/l/keyRings/r"
	for _, c := range []struct{ in, want string }{
		{"gcpkms:projects/p", "want gcpkms://"},
		{"gcpkms://projects/p/locations/l", "want gcpkms://projects/PROJECT"},
		{"gcpkms://projects/p/locations/l/keyRings/", "keyRings is empty"},
		{"gcpkms://projects/../locations/l/keyRings/r", "projects is no name"},
		{"gcpkms://projects/p%2Fq/locations/l/keyRings/r", "projects holds something beside"},
		{ring, `attribute "label" is missing`},
		{ring + "?label=", `attribute "label" is empty`},
		{ring + "?label=d&label=e", `attribute "label" stands twice`},
		{ring + "?label=d&imds=true", `attribute "imds" is unknown`},
		{ring + "?label=d&endpoint=https://h:1", `attribute "endpoint"`},
		{ring + "?label=d&endpoint=h", `want HOST:PORT`},
		{ring + "?label=d&endpoint=h:0", `port from 1`},
		{ring + "?label=d&endpoint=127.0.0.01:1", `attribute "endpoint"`},
		{ring + "?label=d&credentials=" + secret, `attribute "credentials": want file:/path`},
		{ring + "?label=d&credentials=env:" + secret, `attribute "credentials": want file:/path`},
		{ring + "?label=d&credentials=file:" + secret, `attribute "credentials": want file:/path`},
		{ring + "?label=d&archive=run", `attribute "archive": want an absolute path`},
		{"awskms://?label=d", "region is empty"},
		{"awskms://eu central?label=d", "region holds something beside"},
		{"awskms://eu-central-1?label=d&imds=yes", "want imds=true"},
		{"awskms://eu-central-1?label=d&secret-key=" + secret, `attribute "secret-key" is unknown`},
		{"awskms://eu-central-1?label=d&endpoint=http://kms.example", "http is for loopback hosts alone"},
		{"awskms://eu-central-1?label=d&endpoint=http://127.0.0.1.example", "http is for loopback hosts alone"},
		{"awskms://eu-central-1?label=d&endpoint=https://u:" + secret + "@h", "want https://HOST"},
		{"awskms://eu-central-1?label=d&endpoint=https://h/path", "want https://HOST"},
		{"azurekms://V.vault.azure.net?label=d", "no DNS name in lower case"},
		{"azurekms://v.vault.azure.net/keys?label=d", "no DNS name"},
		{"azurekms://v.vault.azure.net?label=d&token-source=env:T", "want file:/path"},
		{"vault://h/transit?label=d", "want HOST:PORT"},
		{"vault://h:8200?label=d", "want vault://HOST:PORT/MOUNT"},
		{"vault://h:8200/?label=d", "want vault://HOST:PORT/MOUNT"},
		{"vault://h:8200/a//b?label=d", "mount is empty"},
		{"vault://h:8200/a/../b?label=d", "mount is no name"},
		{"vault://" + secret + "@h:8200/transit?label=d", "no DNS name"},
		{"vault://h:8200/transit?label=d&token=" + secret, `attribute "token" is unknown`},
		{"vault://h:8200/transit?label=d&token-source=" + secret, `attribute "token-source": want file:/path or env:NAME`},
		{"vault://h:8200/transit?label=d&ca=ca.pem", `attribute "ca": want an absolute path`},
		{"vault://h:8200/transit?label=d&" + secret, "attribute 2 is not NAME=VALUE"},
	} {
		_, err := ParseURI(c.in)
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), secret) {
			t.Errorf("ParseURI(%q): %v; want %q", c.in, err, c.want)
		}
	}
}

func TestAccessToken(t *testing.T) {
	t.Setenv("KNHK_TEST_TOKEN", "hvs.1\n")
	if got, err := (URI{Scheme: "vault", TokenSource: "env:KNHK_TEST_TOKEN"}).AccessToken(); got != "hvs.1" || err != nil {
		t.Errorf("AccessToken = %q, %v", got, err)
	}
	if _, err := (URI{Scheme: "vault"}).AccessToken(); err == nil || !strings.Contains(err.Error(), "no token-source") {
		t.Errorf("AccessToken without a source: %v", err)
	}
}
