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
		{"empty", "", `begins with "soft:" or "pkcs11:"`},
		{"no scheme", "run/keys", `begins with "soft:" or "pkcs11:"`},
		{"unknown scheme", "file:/keys", `begins with "soft:" or "pkcs11:"`},
		{"schemes are lower case here", "PKCS11:token=x", `begins with "soft:" or "pkcs11:"`},
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
		{"longest", strings.Repeat("9", maxPIN) + "\r\n", strings.Repeat("9", maxPIN), ""},
		{"too long", strings.Repeat("9", maxPIN+1), "", "more than 1024 bytes"},
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
