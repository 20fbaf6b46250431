package keys

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// maxSecret bounds a secret, in bytes. PINs and access tokens are far shorter.
const maxSecret = 1024

// ReadSecret reads a secret, a PIN or an access token, from where source points: "file:/path" (also "file:///path") or
// "env:NAME". It is read anew at each call, so that it can be changed under a running program. One line break at its end is
// taken off; what is left is 1 to 1024 bytes without NUL. The caller keeps it no longer than it must and never logs it.
//
// A file must be regular (symbolic links to one are followed, as mounted secrets need it) and closed to everybody but its
// owner: any permission for group or others is refused, also the writing one, for whoever writes the file can lock a token
// by wrong PINs. Access control lists show in the group's permissions and are refused with them. An environment variable can
// be read by the process's own user and by root.
//
// Errors name the source and the way out, never the value: not even a source that is written wrongly is repeated, because
// it may be the secret itself.
func ReadSecret(source string) (string, error) {
	s, err := readSecret(source)
	if err != nil {
		return "", fmt.Errorf("keys: read secret: %w", err)
	}
	return s, nil
}

func readSecret(source string) (string, error) {
	source, err := secretSource(source)
	if err != nil {
		return "", err
	}
	kind, value, _ := strings.Cut(source, ":")
	var secret string
	if kind == "file" {
		if secret, err = readSecretFile(value); err != nil {
			return "", err
		}
	} else {
		v, ok := os.LookupEnv(value)
		if !ok {
			return "", fmt.Errorf("environment variable %s is not set", value)
		}
		secret = v
	}
	if rest, ok := strings.CutSuffix(secret, "\n"); ok {
		secret = strings.TrimSuffix(rest, "\r")
	}
	switch {
	case secret == "":
		return "", fmt.Errorf("%s is empty", source)
	case len(secret) > maxSecret:
		return "", fmt.Errorf("%s holds more than %d bytes", source, maxSecret)
	case strings.ContainsRune(secret, 0):
		return "", fmt.Errorf("%s holds a NUL byte", source)
	}
	return secret, nil
}

// readSecretFile reads at most what shows that a file is too long.
func readSecretFile(path string) (string, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO must not hold us up
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat() // of what was opened, not of what the name stands for a moment later
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s is not a regular file", path)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return "", fmt.Errorf("%s has mode %04o: a secret must be for its owner only (chmod go= %s)", path, mode, path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxSecret+3)) // secret, CR, LF and one more to see that it is too long
	if err != nil {
		return "", err
	}
	return string(b), nil
}

// secretSource checks a source and brings it into its one form. It may hold the secret by mistake, so errors do not repeat it.
func secretSource(s string) (string, error) {
	kind, value, _ := strings.Cut(s, ":")
	switch kind {
	case "file":
		if rest, ok := strings.CutPrefix(value, "//"); ok { // RFC 8089: file:///path is file:/path
			value = rest
		}
		if !filepath.IsAbs(value) || strings.HasPrefix(value, "//") {
			return "", errors.New("want file:/path with an absolute path")
		}
		return "file:" + value, nil
	case "env":
		for i, c := range []byte(value) {
			letter := c == '_' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
			if !letter && (i == 0 || c < '0' || c > '9') {
				return "", errors.New("want env:NAME with the name of an environment variable")
			}
		}
		if value == "" {
			return "", errors.New("want env:NAME, the name is empty")
		}
		return "env:" + value, nil
	}
	return "", errors.New("want file:/path or env:NAME")
}
