//go:build cgo

package hsm

import (
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/knhk/sidecar/crypto/keys"
)

// Errors of this package's own that stand for a state of the token, beside pkcs11.Error.
var (
	errDown    = errors.New("module is not initialized")
	errAbsent  = errors.New("token is not present")
	errLost    = errors.New("session lost its login or its token")
	errStuck   = errors.New("a call has not come back from the module")
	errDoubt   = errors.New("objects of the token are missing since it was away, or half")
	errLastTry = errors.New("the token says that one more wrong PIN locks it")
)

// remedy is what may help after a failure.
type remedy int

const (
	nothing remedy = iota // the same call fails again: the caller hears of it
	later                 // the token is there but short of something: the next call may succeed as it is
	renew                 // session, login or handles are gone: new sessions first, and a new C_Initialize when that does not help
	restart               // only a new C_Initialize can help
	never                 // the PIN: trying again locks the token
)

// code is what a return value means here: which sentinel of package keys callers see (nil: none) and what is tried.
type code struct {
	sentinel error
	remedy   remedy
}

// codes is all that this package knows about return values, in the order of their numbers (PKCS#11 2.40, section 11.1). A code
// that is not here has no sentinel and no remedy: it comes back to the caller as it is. Vendors' own codes are at vendorCode.
var codes = map[uint]code{
	pkcs11.CKR_HOST_MEMORY:     {keys.ErrUnavailable, later},
	pkcs11.CKR_SLOT_ID_INVALID: {keys.ErrUnavailable, restart}, // slots are numbered at C_Initialize (SoftHSM: anew for each token)
	pkcs11.CKR_GENERAL_ERROR:   {keys.ErrUnavailable, renew},   // SoftHSM, when files of the token have gone
	pkcs11.CKR_FUNCTION_FAILED: {keys.ErrUnavailable, later},

	pkcs11.CKR_DEVICE_ERROR:      {keys.ErrUnavailable, renew},
	pkcs11.CKR_DEVICE_MEMORY:     {keys.ErrUnavailable, renew}, // sessions that a client lost take memory: closing ours frees some
	pkcs11.CKR_DEVICE_REMOVED:    {keys.ErrUnavailable, restart},
	pkcs11.CKR_FUNCTION_CANCELED: {keys.ErrUnavailable, later},

	// Handles, which die with their session. An object that was destroyed meanwhile says the same: the search after the
	// recovery tells the two apart.
	pkcs11.CKR_KEY_HANDLE_INVALID:    {keys.ErrUnavailable, renew},
	pkcs11.CKR_OBJECT_HANDLE_INVALID: {keys.ErrUnavailable, renew},

	pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED: {keys.ErrDisabled, nothing}, // CKA_SIGN is false

	// A call that was cut short left the session in the middle of something: only a new session begins clean.
	pkcs11.CKR_OPERATION_ACTIVE:          {keys.ErrUnavailable, renew},
	pkcs11.CKR_OPERATION_NOT_INITIALIZED: {keys.ErrUnavailable, renew},

	// Of C_Login alone: see token.login, which never sends a refused PIN again. TOO_WEAK is PKCS#11 3.0's.
	pkcs11.CKR_PIN_INCORRECT: {keys.ErrCredential, never},
	pkcs11.CKR_PIN_INVALID:   {keys.ErrCredential, never},
	pkcs11.CKR_PIN_LEN_RANGE: {keys.ErrCredential, never},
	pkcs11.CKR_PIN_EXPIRED:   {keys.ErrCredential, never},
	pkcs11.CKR_PIN_LOCKED:    {keys.ErrCredential, never},
	pkcs11.CKR_PIN_TOO_WEAK:  {keys.ErrCredential, never},

	pkcs11.CKR_SESSION_CLOSED:         {keys.ErrUnavailable, renew},
	pkcs11.CKR_SESSION_COUNT:          {keys.ErrUnavailable, later}, // all are taken, by others too: ours are few and stay
	pkcs11.CKR_SESSION_HANDLE_INVALID: {keys.ErrUnavailable, renew},

	pkcs11.CKR_TOKEN_NOT_PRESENT:    {keys.ErrUnavailable, restart},
	pkcs11.CKR_TOKEN_NOT_RECOGNIZED: {keys.ErrUnavailable, restart},

	pkcs11.CKR_USER_NOT_LOGGED_IN:       {keys.ErrUnavailable, renew},
	pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED: {keys.ErrUnavailable, restart},
}

// vendorCode stands for CKR_VENDOR_DEFINED and above: vendors report lost connections in codes of their own.
var vendorCode = code{keys.ErrUnavailable, renew}

// own is what codes is for the errors of this package.
var own = []struct {
	err error
	code
}{
	{errDown, code{keys.ErrUnavailable, restart}},
	{errAbsent, code{keys.ErrUnavailable, restart}},
	{errDoubt, code{keys.ErrUnavailable, restart}},
	{errLost, code{keys.ErrUnavailable, renew}},
	{errStuck, code{keys.ErrUnavailable, later}},
	{errLastTry, code{keys.ErrUnavailable, later}}, // over when somebody logs in with the vendor's tool
}

// meaning looks an error up. This package's own errors go before the return value that they may wrap.
func meaning(err error) code {
	for _, o := range own {
		if errors.Is(err, o.err) {
			return o.code
		}
	}
	var e pkcs11.Error
	if !errors.As(err, &e) {
		return code{}
	}
	if c, ok := codes[uint(e)]; ok {
		return c
	}
	if uint(e) >= pkcs11.CKR_VENDOR_DEFINED {
		return vendorCode
	}
	return code{}
}

// isCode says whether err is one of the return values.
func isCode(err error, values ...uint) bool {
	var e pkcs11.Error
	if !errors.As(err, &e) {
		return false
	}
	for _, v := range values {
		if uint(e) == v {
			return true
		}
	}
	return false
}

// isLost says that the session, the login, the token or the module may have gone: opening it anew may help.
func isLost(err error) bool {
	r := meaning(err).remedy
	return r == renew || r == restart
}

// needsRestart says that opening sessions anew cannot help, only C_Initialize can.
func needsRestart(err error) bool { return meaning(err).remedy == restart }

// sentinel adds keys.ErrUnavailable where another try may help. The other sentinels are put on where they arise: a code of
// C_Login means nothing on C_Sign.
func sentinel(err error) error {
	if meaning(err).sentinel == keys.ErrUnavailable && !errors.Is(err, keys.ErrUnavailable) {
		return fmt.Errorf("%w: %w", keys.ErrUnavailable, err)
	}
	return err
}
