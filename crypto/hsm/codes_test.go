//go:build cgo

package hsm

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/knhk/sidecar/crypto/keys"
)

// TestCodes: the table agrees with itself. What each code does on C_Sign stands in TestReturnValues, what on C_Login in
// TestCredentialLatch.
func TestCodes(t *testing.T) {
	want := map[remedy]error{later: keys.ErrUnavailable, renew: keys.ErrUnavailable, restart: keys.ErrUnavailable, never: keys.ErrCredential}
	check := func(what string, c code) {
		t.Helper()
		if w, ok := want[c.remedy]; ok && c.sentinel != w {
			t.Errorf("%s: remedy %d and sentinel %v, want %v", what, c.remedy, c.sentinel, w)
		}
		if c.remedy == nothing && c.sentinel == keys.ErrUnavailable {
			t.Errorf("%s: callers are told to try again, and nothing may help", what)
		}
	}
	for value, c := range codes {
		err := fmt.Errorf("C_Sign: %w", pkcs11.Error(value))
		check(err.Error(), c)
		if strings.Contains(err.Error(), "unknown") || meaning(err) != c {
			t.Errorf("%v: means %+v, the table says %+v", err, meaning(err), c)
		}
	}
	for _, o := range own {
		check(o.err.Error(), o.code)
		// Wrapped with a return value of another meaning, the package's own word counts.
		if got := meaning(fmt.Errorf("%w: %w", pkcs11.Error(pkcs11.CKR_PIN_INCORRECT), o.err)); got != o.code {
			t.Errorf("%v: means %+v, want %+v", o.err, got, o.code)
		}
	}
	for _, err := range []error{nil, errors.New("x"), pkcs11.Error(pkcs11.CKR_MECHANISM_INVALID), pkcs11.Error(0x7fffffff)} {
		if got := meaning(err); got != (code{}) || sentinel(err) != err {
			t.Errorf("%v: means %+v, want nothing", err, got)
		}
	}
}
