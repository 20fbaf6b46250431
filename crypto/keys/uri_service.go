package keys

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// The URIs of key services, all of the form scheme://PLACE?label=LABEL&...:
//
//	gcpkms://projects/P/locations/L/keyRings/R?label=LABEL[&endpoint=HOST:PORT][&credentials=file:/PATH]
//	awskms://REGION?label=LABEL[&endpoint=https://HOST[:PORT]][&imds=true]
//	azurekms://VAULT.vault.azure.net?label=LABEL[&endpoint=https://HOST[:PORT]][&token-source=file:/PATH][&imds=true]
//	vault://HOST:PORT/MOUNT?label=LABEL[&token-source=file:/PATH|env:NAME][&namespace=NS][&ca=/PATH]
//
// each with [&archive=/DIR], where public keys of the versions are kept. Credentials are only pointed at; without an
// attribute that does, they come from where the service's own tools look for them, but the metadata address of a virtual
// machine is asked only when imds=true says so (gcpkms: application default credentials, which end there). Plain text is
// spoken with a loopback host alone: endpoint=http://127.0.0.1:PORT, endpoint=127.0.0.1:PORT for gcpkms, and a vault on a
// loopback host without ca. Who can change an endpoint sees what is signed and can refuse to sign; signatures are verified
// wherever they come from.

// services are the schemes of key services and the attributes that each knows beside label and archive.
var services = map[string][]string{
	"gcpkms":   {"endpoint", "credentials"},
	"awskms":   {"endpoint", "imds"},
	"azurekms": {"endpoint", "token-source", "imds"},
	"vault":    {"token-source", "namespace", "ca"},
}

// IsService says whether the URI names a key service on the network, one of gcpkms, awskms, azurekms and vault.
func (u URI) IsService() bool { return services[u.Scheme] != nil }

func parseService(scheme, path, query string, hasQuery bool) (URI, error) {
	u, err := parsePlace(scheme, path)
	if err != nil {
		return URI{}, fmt.Errorf("%s: %w", scheme, err)
	}
	attrs, err := attributes(query, hasQuery, "&", append([]string{"label", "archive"}, services[scheme]...)...)
	if err != nil {
		return URI{}, fmt.Errorf("%s: %w", scheme, err)
	}
	if attrs["label"] == "" {
		return URI{}, fmt.Errorf("%s: attribute \"label\" is missing", scheme)
	}
	u.Label, u.Archive, u.Namespace, u.CA = attrs["label"], attrs["archive"], attrs["namespace"], attrs["ca"]
	for _, c := range []struct {
		name  string
		check func(value string) error
	}{
		{"label", CheckLabel},
		{"archive", absolute},
		{"ca", absolute},
		{"endpoint", func(v string) (err error) { u.Endpoint, err = endpoint(scheme, v); return err }},
		{"credentials", func(v string) (err error) {
			if u.Credentials, err = secretSource(v); err == nil && !strings.HasPrefix(u.Credentials, "file:") {
				err = errors.New("want file:/path with an absolute path")
			}
			return err
		}},
		{"token-source", func(v string) (err error) {
			if u.TokenSource, err = secretSource(v); err == nil && scheme == "azurekms" && !strings.HasPrefix(u.TokenSource, "file:") {
				err = errors.New("want file:/path with an absolute path")
			}
			return err
		}},
		{"imds", func(v string) error {
			if v != "true" {
				return errors.New("want imds=true, or leave it out")
			}
			u.IMDS = true
			return nil
		}},
	} {
		if v, ok := attrs[c.name]; ok {
			if err := c.check(v); err != nil {
				return URI{}, fmt.Errorf("%s: attribute %q: %w", scheme, c.name, err)
			}
		}
	}
	return u, nil
}

// parsePlace reads what stands between the scheme and the query.
func parsePlace(scheme, path string) (URI, error) {
	path, ok := strings.CutPrefix(path, "//")
	if !ok {
		return URI{}, fmt.Errorf("want %s://", scheme)
	}
	u := URI{Scheme: scheme}
	var err error
	switch scheme {
	case "gcpkms":
		p := strings.Split(path, "/")
		if len(p) != 6 || p[0] != "projects" || p[2] != "locations" || p[4] != "keyRings" {
			return URI{}, errors.New("want gcpkms://projects/PROJECT/locations/LOCATION/keyRings/RING")
		}
		for i := 1; i < len(p); i += 2 {
			if err = word(p[i-1], p[i], "-_.:"); err != nil { // old projects are named example.org:project
				return URI{}, err
			}
		}
		u.Location = path
	case "awskms":
		u.Location, err = path, word("region", path, "-")
	case "azurekms":
		u.Location, err = path, hostName(path)
	case "vault":
		host, mount, _ := strings.Cut(path, "/")
		if u.Location, err = hostPort(host); err != nil {
			return URI{}, err
		}
		if mount == "" {
			return URI{}, errors.New("want vault://HOST:PORT/MOUNT with the mount of the transit engine")
		}
		for _, part := range strings.Split(mount, "/") {
			if err := word("mount", part, "-_."); err != nil {
				return URI{}, err
			}
		}
		u.Mount = mount
	}
	return u, err
}

// Service returns the address that the service is reached at, as URL or, for gcpkms, as HOST:PORT; empty where the service's
// client knows it. plain says that the address is a loopback one that is spoken with in plain text.
func (u URI) Service() (address string, plain bool) {
	switch {
	case u.Scheme == "vault" && u.CA == "" && loopback(u.Location):
		return "http://" + u.Location, true
	case u.Scheme == "vault":
		return "https://" + u.Location, false
	case u.Endpoint != "" && u.Scheme == "gcpkms":
		return u.Endpoint, loopback(u.Endpoint)
	case u.Endpoint != "":
		return u.Endpoint, strings.HasPrefix(u.Endpoint, "http:")
	case u.Scheme == "azurekms":
		return "https://" + u.Location, false
	}
	return "", false
}

// Place says where the key lives, whatever its label and whoever asks: two URIs of one place are one store to open. Of key
// services it begins with "scheme://".
func (u URI) Place() string {
	switch u.Scheme {
	case "soft":
		return "soft:" + encode(u.Dir, "/:")
	case "pkcs11":
		return "pkcs11:token=" + encode(u.Token, "") + "?module-path=" + encode(u.Module, "/:")
	}
	s := u.Scheme + "://" + u.Location
	if u.Mount != "" {
		s += "/" + u.Mount
	}
	sep := "?"
	for _, a := range [][2]string{{"endpoint", u.Endpoint}, {"namespace", u.Namespace}} {
		if a[1] != "" {
			s += sep + a[0] + "=" + encode(a[1], "/:[]")
			sep = "&"
		}
	}
	return s
}

// serviceString is String for key services.
func (u URI) serviceString() string {
	s := u.Scheme + "://" + u.Location
	if u.Mount != "" {
		s += "/" + u.Mount
	}
	s += "?label=" + encode(u.Label, "")
	for _, a := range [][2]string{
		{"endpoint", u.Endpoint}, {"credentials", u.Credentials}, {"token-source", u.TokenSource}, {"namespace", u.Namespace},
		{"ca", u.CA}, {"archive", u.Archive},
	} {
		if a[1] != "" {
			s += "&" + a[0] + "=" + encode(a[1], "/:[]")
		}
	}
	if u.IMDS {
		s += "&imds=true"
	}
	return s
}

// AccessToken reads the token that token-source points to, as ReadSecret does. The caller never logs it.
func (u URI) AccessToken() (string, error) {
	if u.TokenSource == "" {
		return "", fmt.Errorf("keys: read token: the %q key has no token-source", u.Scheme)
	}
	token, err := readSecret(u.TokenSource)
	if err != nil {
		return "", fmt.Errorf("keys: read token: %w", err)
	}
	return token, nil
}

func absolute(path string) error {
	if !filepath.IsAbs(path) {
		return errors.New("want an absolute path")
	}
	return nil
}

// word refuses a name of a service that would need an escape; it is not repeated.
func word(what, s, more string) error {
	if s == "" {
		return fmt.Errorf("%s is empty", what)
	}
	if s == "." || s == ".." || len(s) > 128 {
		return fmt.Errorf("%s is no name", what)
	}
	for _, c := range []byte(s) {
		alphanumeric := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		if !alphanumeric && strings.IndexByte(more, c) < 0 {
			return fmt.Errorf("%s holds something beside letters, digits and %q", what, more)
		}
	}
	return nil
}

// hostName refuses what is no DNS name in lower case.
func hostName(s string) error {
	if len(s) == 0 || len(s) > 253 {
		return errors.New("the host is empty or too long")
	}
	for _, part := range strings.Split(s, ".") {
		if err := word("host", part, "-"); err != nil || part != strings.ToLower(part) {
			return errors.New("the host is no DNS name in lower case")
		}
	}
	last := s[strings.LastIndexByte(s, '.')+1:]
	if strings.Trim(last, "0123456789") == "" {
		return errors.New("the host is an address, but not in its usual form")
	}
	return nil
}

// hostPort checks HOST:PORT and returns it: a DNS name in lower case, an IPv4 address, or an IPv6 address in brackets.
func hostPort(s string) (string, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return "", errors.New("want HOST:PORT")
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || strconv.FormatUint(n, 10) != port {
		return "", errors.New("want HOST:PORT with a port from 1 to 65535")
	}
	if a, err := netip.ParseAddr(host); err == nil {
		if a.Zone() != "" || a.String() != host {
			return "", errors.New("the host is an address, but not in its usual form")
		}
	} else if err := hostName(host); err != nil {
		return "", err
	}
	if net.JoinHostPort(host, port) != s {
		return "", errors.New("want HOST:PORT")
	}
	return s, nil
}

// endpoint checks the address that stands for a service's own: HOST:PORT for gcpkms, else https://HOST[:PORT], and http only on
// a loopback host.
func endpoint(scheme, v string) (string, error) {
	if scheme == "gcpkms" {
		return hostPort(v)
	}
	kind, host, _ := strings.Cut(v, "://")
	if !slices.Contains([]string{"http", "https"}, kind) {
		return "", errors.New("want https://HOST or https://HOST:PORT")
	}
	if _, err := hostPort(host); err != nil {
		if _, err := hostPort(host + ":443"); err != nil {
			return "", errors.New("want https://HOST or https://HOST:PORT")
		}
	}
	if kind == "http" && !loopback(host) {
		return "", errors.New("http is for loopback hosts alone: want https://HOST")
	}
	return v, nil
}

// loopback says whether HOST or HOST:PORT never leaves this machine.
func loopback(s string) bool {
	host := s
	if h, _, err := net.SplitHostPort(s); err == nil {
		host = h
	}
	if host == "localhost" {
		return true
	}
	a, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil && a.IsLoopback()
}
