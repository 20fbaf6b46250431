package keys

import (
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
	"unicode"
	"unicode/utf8"
)

// URI names a key in a store, as configuration writes it:
//
//	soft:DIR?label=LABEL
//	pkcs11:token=TOKEN;object=LABEL?module-path=/PATH&pin-source=file:/PATH      (RFC 7512)
//	pkcs11:token=TOKEN;object=LABEL?module-path=/PATH&pin-source=env:NAME
//	gcpkms:, awskms:, azurekms:, vault:                                          (key services: uri_service.go)
//
// Values are percent-encoded where they hold anything but letters, digits and "-._~". A URI holds no secret: a PIN is
// only pointed at. Whoever can write the file or variable that pin-source names can lock the token by wrong PINs;
// whoever can read it can use the keys, if the token lets them in. Whoever can change module-path runs code in the
// process that signs.
type URI struct {
	Scheme    string // "soft", "pkcs11", "gcpkms", "awskms", "azurekms" or "vault"
	Label     string // name of the key (pkcs11: object, CKA_LABEL); empty for soft when the URI names none: the caller chooses
	Dir       string // soft: the store's directory, relative to the working directory unless it begins with "/"
	Token     string // pkcs11: label of the token
	Module    string // pkcs11: absolute path of the PKCS#11 library
	PINSource string // pkcs11: "file:/path" or "env:NAME"

	Location    string // gcpkms: "projects/P/locations/L/keyRings/R"; awskms: region; azurekms: host; vault: HOST:PORT
	Mount       string // vault: mount of the transit engine
	Endpoint    string // address instead of the service's own: HOST:PORT for gcpkms, else a URL without a path
	Credentials string // gcpkms: "file:/path" of a credentials file; empty: application default credentials
	TokenSource string // azurekms: "file:/path"; vault: that or "env:NAME"; empty: the environment
	Namespace   string // vault: namespace
	CA          string // vault: absolute path of the certificates to trust; empty: those of the system
	Archive     string // absolute directory for public keys; empty: the caller chooses
	IMDS        bool   // awskms, azurekms: the metadata address of the virtual machine may be asked for credentials
}

// ParseURI reads a key URI. Attributes that are missing, repeated, unknown or hold control characters are errors that
// name the attribute; no error repeats a value that may be a secret.
func ParseURI(s string) (URI, error) {
	scheme, rest, ok := strings.Cut(s, ":")
	path, query, hasQuery := strings.Cut(rest, "?")
	var u URI
	var err error
	switch {
	case ok && scheme == "soft":
		u, err = parseSoft(path, query, hasQuery)
	case ok && scheme == "pkcs11":
		u, err = parsePKCS11(path, query, hasQuery)
	case ok && services[scheme] != nil:
		u, err = parseService(scheme, path, query, hasQuery)
	default:
		err = errors.New(`want a key URI that begins with "soft:", "pkcs11:", "gcpkms:", "awskms:", "azurekms:" or "vault:"`)
	}
	if err != nil {
		return URI{}, fmt.Errorf("keys: parse uri: %w", err)
	}
	return u, nil
}

func parseSoft(path, query string, hasQuery bool) (URI, error) {
	dir, err := decode("directory", path)
	if err != nil {
		return URI{}, err
	}
	if strings.HasPrefix(dir, "//") {
		return URI{}, errors.New("soft: the directory begins with \"//\": write soft:DIR, there is no host part")
	}
	attrs, err := attributes(query, hasQuery, "&", "label")
	if err != nil {
		return URI{}, fmt.Errorf("soft: %w", err)
	}
	u := URI{Scheme: "soft", Dir: dir, Label: attrs["label"]}
	if hasQuery {
		if err := CheckLabel(u.Label); err != nil {
			return URI{}, fmt.Errorf("soft: attribute \"label\": %w", err)
		}
	}
	return u, nil
}

func parsePKCS11(path, query string, hasQuery bool) (URI, error) {
	// Both parts are looked through for pin-value first, so that it is named whatever else is wrong.
	for _, attr := range strings.FieldsFunc(path+"&"+query, func(r rune) bool { return r == ';' || r == '&' || r == '?' }) {
		if name, _, _ := strings.Cut(attr, "="); name == "pin-value" {
			return URI{}, errors.New(`pkcs11: attribute "pin-value" is refused: secrets never stand in configuration; ` +
				`use pin-source=file:/path or pin-source=env:NAME`)
		}
	}
	attrs, err := attributes(path, true, ";", "token", "object")
	if err != nil {
		return URI{}, fmt.Errorf("pkcs11: path: %w", err)
	}
	more, err := attributes(query, hasQuery, "&", "module-path", "pin-source")
	if err != nil {
		return URI{}, fmt.Errorf("pkcs11: query: %w", err)
	}
	u := URI{Scheme: "pkcs11", Token: attrs["token"], Label: attrs["object"], Module: more["module-path"]}
	for _, a := range []struct{ name, value string }{
		{"token", u.Token}, {"object", u.Label}, {"module-path", u.Module}, {"pin-source", more["pin-source"]},
	} {
		if a.value == "" {
			return URI{}, fmt.Errorf("pkcs11: attribute %q is missing", a.name)
		}
	}
	if len(u.Token) > 32 {
		return URI{}, fmt.Errorf("pkcs11: attribute \"token\" has %d bytes, tokens have at most 32", len(u.Token))
	}
	if err := CheckLabel(u.Label); err != nil {
		return URI{}, fmt.Errorf("pkcs11: attribute \"object\": %w", err)
	}
	if !filepath.IsAbs(u.Module) {
		return URI{}, errors.New(`pkcs11: attribute "module-path" is not an absolute path`)
	}
	if u.PINSource, err = secretSource(more["pin-source"]); err != nil {
		return URI{}, fmt.Errorf("pkcs11: attribute \"pin-source\": %w", err)
	}
	return u, nil
}

// attributes splits name=value pairs, decodes the values and refuses what is not in known.
func attributes(s string, present bool, sep string, known ...string) (map[string]string, error) {
	attrs := make(map[string]string)
	if !present {
		return attrs, nil
	}
	for i, pair := range strings.Split(s, sep) {
		name, value, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, fmt.Errorf("attribute %d is not NAME=VALUE", i+1) // not repeated: it may be a stray secret
		}
		found := false
		for _, k := range known {
			found = found || k == name
		}
		if !found {
			return nil, fmt.Errorf("attribute %.40q is unknown, want %s", name, strings.Join(known, ", "))
		}
		if _, dup := attrs[name]; dup {
			return nil, fmt.Errorf("attribute %q stands twice", name)
		}
		v, err := decode(fmt.Sprintf("attribute %q", name), value)
		if err != nil {
			return nil, err
		}
		attrs[name] = v
	}
	return attrs, nil
}

// decode percent-decodes one value and refuses what no name or path should hold; "+" stays "+" (RFC 3986).
func decode(what, s string) (string, error) {
	v, err := url.PathUnescape(s)
	if err != nil {
		return "", fmt.Errorf("%s holds a bad percent-encoding", what)
	}
	if v == "" {
		return "", fmt.Errorf("%s is empty", what)
	}
	if !utf8.ValidString(v) || strings.ContainsFunc(v, unicode.IsControl) {
		return "", fmt.Errorf("%s holds control characters or is not UTF-8", what)
	}
	return v, nil
}

// String writes the URI so that ParseURI reads it back. There is no secret in it.
func (u URI) String() string {
	switch u.Scheme {
	case "soft":
		s := "soft:" + encode(u.Dir, "/:")
		if u.Label != "" {
			s += "?label=" + encode(u.Label, "")
		}
		return s
	case "pkcs11":
		return "pkcs11:token=" + encode(u.Token, "") + ";object=" + encode(u.Label, "") +
			"?module-path=" + encode(u.Module, "/:") + "&pin-source=" + encode(u.PINSource, "/:")
	}
	if u.IsService() {
		return u.serviceString()
	}
	return ""
}

// encode percent-encodes all but the unreserved characters of RFC 3986 and those in keep.
func encode(s, keep string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', strings.IndexByte("-._~"+keep, c) >= 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// PIN reads the PIN from where pin-source points, as ReadSecret does. The caller keeps it no longer than one login takes and
// never logs it.
func (u URI) PIN() (string, error) {
	if u.PINSource == "" {
		return "", fmt.Errorf("keys: read pin: a %q key has no pin-source", u.Scheme)
	}
	pin, err := readSecret(u.PINSource)
	if err != nil {
		return "", fmt.Errorf("keys: read pin: %w", err)
	}
	return pin, nil
}
