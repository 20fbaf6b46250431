//go:build cgo

package hsm

import (
	"fmt"
	"os"

	"github.com/miekg/pkcs11"
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
