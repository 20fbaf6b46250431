// Package softhsm finds SoftHSM 2 on a machine and makes tokens with it, for tests and demos: a real PKCS#11 module
// whose keys lie in files. It promises nothing about secrecy: PINs given here stand on a command line for a moment. The
// server never calls it. Pure Go; it runs softhsm2-util.
package softhsm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// ModuleEnv names the environment variable that overrides the search of Find.
const ModuleEnv = "KNHK_PKCS11_MODULE"

// ConfEnv names the environment variable in which SoftHSM looks for its configuration. The module reads it at C_Initialize,
// once for the whole process.
const ConfEnv = "SOFTHSM2_CONF"

// usual are the places of the module in distributions and Homebrew.
var usual = []string{
	"/usr/lib/softhsm/libsofthsm2.so",
	"/usr/lib/*/softhsm/libsofthsm2.so",
	"/usr/lib64/softhsm/libsofthsm2.so",
	"/usr/lib64/pkcs11/libsofthsm2.so",
	"/usr/lib64/libsofthsm2.so",
	"/usr/lib/libsofthsm2.so",
	"/usr/local/lib/softhsm/libsofthsm2.so",
	"/opt/homebrew/lib/softhsm/libsofthsm2.so",
}

// Find returns the path of the module: the one KNHK_PKCS11_MODULE names, else the first that exists in the usual places.
// ok is false when there is none or when softhsm2-util is not in PATH.
func Find() (modulePath string, ok bool) {
	if _, err := exec.LookPath("softhsm2-util"); err != nil {
		return "", false
	}
	places := usual
	if p := os.Getenv(ModuleEnv); p != "" {
		places = []string{p}
	}
	for _, pattern := range places {
		found, err := filepath.Glob(pattern)
		if err != nil {
			continue
		}
		for _, p := range found {
			if info, err := os.Stat(p); err == nil && info.Mode().IsRegular() {
				return p, true
			}
		}
	}
	return "", false
}

// TB is what Need uses of *testing.T; this package does not link package testing into demos.
type TB interface {
	Helper()
	Skip(args ...any)
	Fatal(args ...any)
}

// Need returns the module's path, or skips the test and says what to install. Where CI=true or REQUIRE_SOFTHSM=1 it
// fails the test instead, so that no pipeline passes by not testing.
func Need(tb TB) string {
	tb.Helper()
	path, ok := Find()
	if ok {
		return path
	}
	const advice = "SoftHSM 2 not found: install it (Debian: apt-get install softhsm2, Fedora: dnf install softhsm, " +
		"macOS: brew install softhsm) or set " + ModuleEnv + " to the module's path"
	if os.Getenv("CI") == "true" || os.Getenv("REQUIRE_SOFTHSM") == "1" {
		tb.Fatal(advice)
	}
	tb.Skip(advice)
	return ""
}

// InitToken makes a token with user PIN pin under dir, which is made with mode 0700 where it is missing, and returns the
// path of the SoftHSM configuration to set in SOFTHSM2_CONF. Called again with the same dir it adds a token. Lengths of
// PINs are 4 to 255 characters; the label has at most 32 bytes. The token's URI is
//
//	keys.URI{Scheme: "pkcs11", Token: label, Module: modulePath, Label: ..., PINSource: ...}.String()
func InitToken(dir, label, pin, soPIN string) (confPath string, err error) {
	module, ok := Find()
	if !ok {
		return "", errors.New("softhsm: init token: SoftHSM 2 not found")
	}
	if len(label) == 0 || len(label) > 32 {
		return "", fmt.Errorf("softhsm: init token: label has %d bytes, want 1 to 32", len(label))
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return "", fmt.Errorf("softhsm: init token: %w", err)
	}
	if strings.ContainsAny(dir, "\r\n") {
		return "", errors.New("softhsm: init token: the directory's name holds a line break")
	}
	tokens := TokenDir(dir)
	if err := os.MkdirAll(tokens, 0o700); err != nil {
		return "", fmt.Errorf("softhsm: init token: %w", err)
	}
	confPath = filepath.Join(dir, "softhsm2.conf")
	conf := "directories.tokendir = " + tokens + "\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n"
	if err := os.WriteFile(confPath, []byte(conf), 0o600); err != nil {
		return "", fmt.Errorf("softhsm: init token: %w", err)
	}
	cmd := exec.Command("softhsm2-util", "--module", module, "--init-token", "--free", "--label", label, "--pin", pin, "--so-pin", soPIN)
	cmd.Env = append(os.Environ(), ConfEnv+"="+confPath)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("softhsm: init token: softhsm2-util: %w: %s", err, bytes.TrimSpace(out.Bytes()))
	}
	return confPath, nil
}

// TokenDir returns the directory in which InitToken(dir, ...) keeps its tokens, one subdirectory each. Moving it away is
// what a vanished token looks like.
func TokenDir(dir string) string { return filepath.Join(dir, "tokens") }
