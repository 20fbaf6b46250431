//go:build cgo

package hsm

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/asn1"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"sync"
	"testing"

	"github.com/miekg/pkcs11"
)

// fake is a PKCS#11 module with one token, in memory, that can misbehave in the ways SoftHSM does not: it blocks, fails,
// fails after it has done its work, locks PINs, gives session handles out again. It notes every call that would crash a
// real module: two at once on one session, and C_Initialize or C_Finalize beside anything else.
type fake struct {
	// hook runs at the beginning of each call, outside the lock: it may block. An error is the call's answer; with after it
	// is the answer once the call has done its work. Changed with set.
	hook func(call string) (after bool, err error)

	mu          sync.Mutex
	initialized bool
	foreign     bool // C_Initialize answers CKR_CRYPTOKI_ALREADY_INITIALIZED
	absent      bool // the token is out of its slot; seen at C_Initialize and by every call, as SoftHSM does
	reuse       bool // session handles count from 1 again when all were lost
	flags       uint // more flags of the token
	pin         string
	tries       int // wrong PINs until it locks
	loggedIn    bool
	sessions    map[pkcs11.SessionHandle]*fakeSession
	nextSession pkcs11.SessionHandle
	objects     map[pkcs11.ObjectHandle]*fakeObject
	nextObject  pkcs11.ObjectHandle
	corrupt     bool // signatures are wrong
	// spoil, when set, changes the next pair that is made, once.
	spoil func(f *fake, public, private pkcs11.ObjectHandle)

	busy       map[pkcs11.SessionHandle]bool // a call is on the session
	active     int                           // calls in the module
	counts     map[string]int
	violations []string
}

type fakeSession struct {
	found   []pkcs11.ObjectHandle
	finding bool
	signing *fakeObject
}

type fakeObject struct {
	attrs map[uint][]byte
	ed    ed25519.PrivateKey
	ec    *ecdsa.PrivateKey
}

func newFake() *fake {
	return &fake{
		pin: testPIN, tries: 3, sessions: make(map[pkcs11.SessionHandle]*fakeSession), nextSession: 1,
		objects: make(map[pkcs11.ObjectHandle]*fakeObject), nextObject: 1,
		busy: make(map[pkcs11.SessionHandle]bool), counts: make(map[string]int),
	}
}

// registry returns a registry whose modules are all this fake.
func (f *fake) registry() *registry {
	return newRegistry(func(string) (cryptoki, error) { return f, nil })
}

func fakeConfig() Config {
	return Config{Module: "/fake.so", TokenLabel: "knhk", PIN: func() (string, error) { return testPIN, nil }}
}

// open opens a store on the fake; the test closes it.
func (f *fake) open(t *testing.T, reg *registry, change func(*Config)) *Store {
	t.Helper()
	cfg := fakeConfig()
	if change != nil {
		change(&cfg)
	}
	s, err := open(t.Context(), cfg, reg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// set changes the fake between calls.
func (f *fake) set(change func(*fake)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
}

// count says how often a function was called.
func (f *fake) count(call string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.counts[call]
}

// audit fails the test when a call came that would have crashed a real module.
func (f *fake) audit(t *testing.T) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, v := range f.violations {
		t.Error(v)
	}
}

// drop loses every session and the login, as a token reset does.
func (f *fake) drop() {
	clear(f.sessions)
	f.loggedIn = false
	if f.reuse {
		f.nextSession = 1
	}
}

// do runs one call. h is 0 for calls without a session.
func (f *fake) do(call string, h pkcs11.SessionHandle, fn func() error) error {
	global := call == "C_Initialize" || call == "C_Finalize"
	f.mu.Lock()
	f.counts[call]++
	if global && f.active > 0 || f.busy[0] {
		f.violations = append(f.violations, fmt.Sprintf("%s while %d calls are in the module", call, f.active))
	}
	if h != 0 && f.busy[h] {
		f.violations = append(f.violations, fmt.Sprintf("%s on session %d, which has a call in flight", call, h))
	}
	f.active++
	if h != 0 || global {
		f.busy[h] = true
	}
	hook := f.hook
	f.mu.Unlock()
	var after bool
	var injected error
	if hook != nil {
		after, injected = hook(call)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.active--
	if h != 0 || global {
		delete(f.busy, h)
	}
	if injected != nil && !after {
		return injected
	}
	if !f.initialized && call != "C_Initialize" {
		return pkcs11.Error(pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED)
	}
	if h != 0 {
		if f.absent {
			return pkcs11.Error(pkcs11.CKR_DEVICE_REMOVED)
		}
		if f.sessions[h] == nil {
			return pkcs11.Error(pkcs11.CKR_SESSION_HANDLE_INVALID)
		}
	}
	if err := fn(); err != nil {
		return err
	}
	return injected
}

func (f *fake) Initialize(...pkcs11.InitializeOption) error {
	return f.do("C_Initialize", 0, func() error {
		if f.initialized || f.foreign {
			f.initialized = true
			return pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)
		}
		f.initialized = true
		return nil
	})
}

func (f *fake) Finalize() error {
	return f.do("C_Finalize", 0, func() error {
		f.drop()
		f.initialized = false
		return nil
	})
}

func (f *fake) GetSlotList(bool) (slots []uint, err error) {
	err = f.do("C_GetSlotList", 0, func() error {
		if !f.absent {
			slots = []uint{7}
		}
		return nil
	})
	return slots, err
}

func (f *fake) GetTokenInfo(uint) (info pkcs11.TokenInfo, err error) {
	err = f.do("C_GetTokenInfo", 0, func() error {
		if f.absent {
			return pkcs11.Error(pkcs11.CKR_TOKEN_NOT_PRESENT)
		}
		info = pkcs11.TokenInfo{Label: "knhk", Model: "fake", Flags: pkcs11.CKF_TOKEN_INITIALIZED | f.flags}
		return nil
	})
	return info, err
}

func (f *fake) OpenSession(uint, uint) (h pkcs11.SessionHandle, err error) {
	err = f.do("C_OpenSession", 0, func() error {
		if f.absent {
			return pkcs11.Error(pkcs11.CKR_TOKEN_NOT_PRESENT)
		}
		h = f.nextSession
		f.nextSession++
		f.sessions[h] = &fakeSession{}
		return nil
	})
	return h, err
}

func (f *fake) CloseSession(h pkcs11.SessionHandle) error {
	return f.do("C_CloseSession", h, func() error {
		delete(f.sessions, h)
		if len(f.sessions) == 0 {
			f.loggedIn = false
		}
		return nil
	})
}

func (f *fake) GetSessionInfo(h pkcs11.SessionHandle) (info pkcs11.SessionInfo, err error) {
	err = f.do("C_GetSessionInfo", h, func() error {
		info = pkcs11.SessionInfo{SlotID: 7, State: pkcs11.CKS_RW_PUBLIC_SESSION}
		if f.loggedIn {
			info.State = pkcs11.CKS_RW_USER_FUNCTIONS
		}
		return nil
	})
	return info, err
}

func (f *fake) Login(h pkcs11.SessionHandle, _ uint, pin string) error {
	return f.do("C_Login", h, func() error {
		switch {
		case f.loggedIn:
			return pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)
		case f.tries == 0:
			return pkcs11.Error(pkcs11.CKR_PIN_LOCKED)
		case pin != f.pin:
			f.tries--
			return pkcs11.Error(pkcs11.CKR_PIN_INCORRECT)
		}
		f.tries, f.loggedIn = 3, true
		return nil
	})
}

func (f *fake) visible(o *fakeObject) bool { return f.loggedIn || !isTrue(o.attrs[pkcs11.CKA_PRIVATE]) }

func (f *fake) FindObjectsInit(h pkcs11.SessionHandle, template []*pkcs11.Attribute) error {
	return f.do("C_FindObjectsInit", h, func() error {
		s := f.sessions[h]
		if s.finding {
			return pkcs11.Error(pkcs11.CKR_OPERATION_ACTIVE)
		}
		s.finding, s.found = true, nil
		for _, k := range slices.Sorted(maps.Keys(f.objects)) {
			match := f.visible(f.objects[k])
			for _, a := range template {
				match = match && bytes.Equal(f.objects[k].attrs[a.Type], a.Value)
			}
			if match {
				s.found = append(s.found, k)
			}
		}
		return nil
	})
}

func (f *fake) FindObjects(h pkcs11.SessionHandle, n int) (found []pkcs11.ObjectHandle, more bool, err error) {
	err = f.do("C_FindObjects", h, func() error {
		s := f.sessions[h]
		n = min(n, len(s.found), 2) // fewer than asked for, as the standard allows
		found, s.found = s.found[:n], s.found[n:]
		return nil
	})
	return found, more, err
}

func (f *fake) FindObjectsFinal(h pkcs11.SessionHandle) error {
	return f.do("C_FindObjectsFinal", h, func() error {
		f.sessions[h].finding = false
		return nil
	})
}

func (f *fake) object(o pkcs11.ObjectHandle) (*fakeObject, error) {
	if obj := f.objects[o]; obj != nil && f.visible(obj) {
		return obj, nil
	}
	return nil, pkcs11.Error(pkcs11.CKR_OBJECT_HANDLE_INVALID)
}

func (f *fake) GetAttributeValue(h pkcs11.SessionHandle, o pkcs11.ObjectHandle, template []*pkcs11.Attribute) (
	out []*pkcs11.Attribute, err error) {
	err = f.do("C_GetAttributeValue", h, func() error {
		obj, err := f.object(o)
		if err != nil {
			return err
		}
		for _, a := range template {
			v, ok := obj.attrs[a.Type]
			if !ok {
				return pkcs11.Error(pkcs11.CKR_ATTRIBUTE_TYPE_INVALID)
			}
			out = append(out, attr(a.Type, bytes.Clone(v)))
		}
		return nil
	})
	return out, err
}

func (f *fake) SetAttributeValue(h pkcs11.SessionHandle, o pkcs11.ObjectHandle, template []*pkcs11.Attribute) error {
	return f.do("C_SetAttributeValue", h, func() error {
		obj, err := f.object(o)
		if err != nil {
			return err
		}
		for _, a := range template {
			obj.attrs[a.Type] = a.Value
		}
		return nil
	})
}

func (f *fake) GenerateKeyPair(h pkcs11.SessionHandle, m []*pkcs11.Mechanism, public, private []*pkcs11.Attribute) (
	po, so pkcs11.ObjectHandle, err error) {
	err = f.do("C_GenerateKeyPair", h, func() error {
		if !f.loggedIn {
			return pkcs11.Error(pkcs11.CKR_USER_NOT_LOGGED_IN)
		}
		pub := &fakeObject{attrs: map[uint][]byte{pkcs11.CKA_CLASS: attr(0, pkcs11.CKO_PUBLIC_KEY).Value}}
		priv := &fakeObject{attrs: map[uint][]byte{
			pkcs11.CKA_CLASS: attr(0, pkcs11.CKO_PRIVATE_KEY).Value, pkcs11.CKA_NEVER_EXTRACTABLE: {1},
		}}
		for _, a := range public {
			pub.attrs[a.Type] = a.Value
		}
		for _, a := range private {
			priv.attrs[a.Type] = a.Value
		}
		var point []byte
		kind := uint(pkcs11.CKK_EC)
		switch m[0].Mechanism {
		case ckmECEdwardsKeyPairGen:
			kind = ckkECEdwards
			k, secret, err := ed25519.GenerateKey(rand.Reader)
			if err != nil {
				return err
			}
			point, priv.ed = k, secret
		case pkcs11.CKM_EC_KEY_PAIR_GEN:
			secret, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				return err
			}
			if point, err = secret.PublicKey.Bytes(); err != nil {
				return err
			}
			priv.ec = secret
		default:
			return pkcs11.Error(pkcs11.CKR_MECHANISM_INVALID)
		}
		der, err := asn1.Marshal(point)
		if err != nil {
			return err
		}
		pub.attrs[pkcs11.CKA_EC_POINT] = der
		pub.attrs[pkcs11.CKA_KEY_TYPE] = attr(0, kind).Value
		priv.attrs[pkcs11.CKA_KEY_TYPE] = attr(0, kind).Value
		po, so = f.nextObject, f.nextObject+1
		f.nextObject += 2
		f.objects[po], f.objects[so] = pub, priv
		if f.spoil != nil {
			f.spoil(f, po, so)
			f.spoil = nil
		}
		return nil
	})
	return po, so, err
}

// plant puts a copy of the objects of some version under another id, as another process would have made them; under f.mu.
func (f *fake) plant(label, id string) (public, private pkcs11.ObjectHandle) {
	for _, k := range slices.Sorted(maps.Keys(f.objects)) {
		o := &fakeObject{attrs: maps.Clone(f.objects[k].attrs), ed: f.objects[k].ed, ec: f.objects[k].ec}
		o.attrs[pkcs11.CKA_LABEL], o.attrs[pkcs11.CKA_ID] = []byte(label), []byte(id)
		to := &public
		if o.ed != nil || o.ec != nil {
			to = &private
		}
		if *to != 0 {
			continue
		}
		*to = f.nextObject
		f.objects[*to] = o
		f.nextObject++
	}
	return public, private
}

func (f *fake) DestroyObject(h pkcs11.SessionHandle, o pkcs11.ObjectHandle) error {
	return f.do("C_DestroyObject", h, func() error {
		if _, err := f.object(o); err != nil {
			return err
		}
		delete(f.objects, o)
		return nil
	})
}

func (f *fake) SignInit(h pkcs11.SessionHandle, _ []*pkcs11.Mechanism, o pkcs11.ObjectHandle) error {
	return f.do("C_SignInit", h, func() error {
		obj, err := f.object(o)
		if err != nil {
			return pkcs11.Error(pkcs11.CKR_KEY_HANDLE_INVALID)
		}
		if !isTrue(obj.attrs[pkcs11.CKA_SIGN]) {
			return pkcs11.Error(pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED)
		}
		if f.sessions[h].signing != nil {
			return pkcs11.Error(pkcs11.CKR_OPERATION_ACTIVE)
		}
		f.sessions[h].signing = obj
		return nil
	})
}

func (f *fake) Sign(h pkcs11.SessionHandle, msg []byte) (sig []byte, err error) {
	err = f.do("C_Sign", h, func() error {
		obj := f.sessions[h].signing
		f.sessions[h].signing = nil
		switch {
		case obj == nil:
			return pkcs11.Error(pkcs11.CKR_OPERATION_NOT_INITIALIZED)
		case obj.ed != nil:
			sig = ed25519.Sign(obj.ed, msg)
		default:
			der, err := ecdsa.SignASN1(rand.Reader, obj.ec, msg)
			if err != nil {
				return err
			}
			var rs struct{ R, S *big.Int }
			if _, err := asn1.Unmarshal(der, &rs); err != nil {
				return err
			}
			sig = append(rs.R.FillBytes(make([]byte, 32)), rs.S.FillBytes(make([]byte, 32))...)
		}
		if f.corrupt {
			sig[len(sig)-1] ^= 1
		}
		return nil
	})
	return sig, err
}
