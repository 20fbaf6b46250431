//go:build cgo

package hsm

import (
	"errors"
	"fmt"
	"os"

	"github.com/miekg/pkcs11"

	"github.com/knhk/sidecar/crypto/keys"
)

// What PKCS#11 3.0 (OASIS, pkcs11-curr 2.3) adds and miekg/pkcs11 does not name.
const (
	ckmECEdwardsKeyPairGen = 0x1055
	ckmEdDSA               = 0x1057
	ckkECEdwards           = 0x40
)

// CKA_EC_PARAMS values, DER.
var (
	paramsEd25519    = append([]byte{0x13, 0x0c}, "edwards25519"...)                      // PrintableString: what tokens generate with
	paramsEd25519OID = []byte{0x06, 0x03, 0x2b, 0x65, 0x70}                               // 1.3.101.112: what some tokens give back
	paramsP256       = []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07} // 1.2.840.10045.3.1.7
)

// cryptoki is what this package uses of *pkcs11.Ctx; tests put a token that misbehaves in its place.
type cryptoki interface {
	Initialize(...pkcs11.InitializeOption) error
	Finalize() error
	GetSlotList(tokenPresent bool) ([]uint, error)
	GetTokenInfo(slot uint) (pkcs11.TokenInfo, error)
	OpenSession(slot, flags uint) (pkcs11.SessionHandle, error)
	CloseSession(pkcs11.SessionHandle) error
	GetSessionInfo(pkcs11.SessionHandle) (pkcs11.SessionInfo, error)
	Login(h pkcs11.SessionHandle, user uint, pin string) error
	FindObjectsInit(pkcs11.SessionHandle, []*pkcs11.Attribute) error
	FindObjects(h pkcs11.SessionHandle, max int) ([]pkcs11.ObjectHandle, bool, error)
	FindObjectsFinal(pkcs11.SessionHandle) error
	GetAttributeValue(pkcs11.SessionHandle, pkcs11.ObjectHandle, []*pkcs11.Attribute) ([]*pkcs11.Attribute, error)
	SetAttributeValue(pkcs11.SessionHandle, pkcs11.ObjectHandle, []*pkcs11.Attribute) error
	GenerateKeyPair(h pkcs11.SessionHandle, m []*pkcs11.Mechanism, public, private []*pkcs11.Attribute) (
		pkcs11.ObjectHandle, pkcs11.ObjectHandle, error)
	DestroyObject(pkcs11.SessionHandle, pkcs11.ObjectHandle) error
	SignInit(pkcs11.SessionHandle, []*pkcs11.Mechanism, pkcs11.ObjectHandle) error
	Sign(pkcs11.SessionHandle, []byte) ([]byte, error)
}

// loadError is a module that cannot be loaded: no use trying again.
type loadError struct{ error }

// loadModule loads the library, which runs its constructors.
func loadModule(path string) (cryptoki, error) {
	if ctx := pkcs11.New(path); ctx != nil {
		return ctx, nil
	}
	if _, err := os.Stat(path); err != nil {
		return nil, loadError{fmt.Errorf("pkcs11 module: %w", err)}
	}
	return nil, loadError{fmt.Errorf("pkcs11 module %s cannot be loaded: not a shared library for this machine, "+
		"a library it needs is missing, or it has no C_GetFunctionList", path)}
}

// Errors of this package's own that stand for a state of the token, beside pkcs11.Error.
var (
	errDown   = errors.New("module is not initialized")
	errAbsent = errors.New("token is not present")
	errLost   = errors.New("session lost its login or its token")
	errStuck  = errors.New("a call has not come back from the module")
)

// isCode says whether err is one of the return values.
func isCode(err error, codes ...uint) bool {
	var e pkcs11.Error
	if !errors.As(err, &e) {
		return false
	}
	for _, c := range codes {
		if uint(e) == c {
			return true
		}
	}
	return false
}

// isLost says that the session, the login, the token or the module may have gone: opening it anew may help.
func isLost(err error) bool {
	if errors.Is(err, errDown) || errors.Is(err, errAbsent) || errors.Is(err, errLost) {
		return true
	}
	var e pkcs11.Error
	if !errors.As(err, &e) {
		return false
	}
	switch uint(e) {
	case pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_USER_NOT_LOGGED_IN,
		pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_KEY_HANDLE_INVALID,
		pkcs11.CKR_OPERATION_ACTIVE, pkcs11.CKR_OPERATION_NOT_INITIALIZED,
		pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_DEVICE_MEMORY, pkcs11.CKR_GENERAL_ERROR,
		pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_TOKEN_NOT_RECOGNIZED, pkcs11.CKR_SLOT_ID_INVALID,
		pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED:
		return true
	}
	return uint(e) >= pkcs11.CKR_VENDOR_DEFINED // vendors report lost connections in codes of their own
}

// needsRestart says that opening sessions anew cannot help, only C_Initialize can.
func needsRestart(err error) bool {
	return errors.Is(err, errDown) || errors.Is(err, errAbsent) || isCode(err, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED,
		pkcs11.CKR_SLOT_ID_INVALID, pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_TOKEN_NOT_RECOGNIZED, pkcs11.CKR_DEVICE_REMOVED)
}

// isBusy says that the token is there but short of something.
func isBusy(err error) bool {
	return errors.Is(err, errStuck) || isCode(err, pkcs11.CKR_SESSION_COUNT, pkcs11.CKR_HOST_MEMORY,
		pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_FUNCTION_CANCELED)
}

// sentinel adds keys.ErrUnavailable where another try may help.
func sentinel(err error) error {
	if err != nil && (isLost(err) || isBusy(err)) && !errors.Is(err, keys.ErrUnavailable) {
		return fmt.Errorf("%w: %w", keys.ErrUnavailable, err)
	}
	return err
}
