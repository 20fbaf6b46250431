//go:build cgo

package hsm

import (
	"errors"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/knhk/sidecar/crypto/keys"
)

// TestSights: what is believed, look by look.
func TestSights(t *testing.T) {
	type look struct {
		init uint64
		what sight
		want bool
	}
	none, public, disabled := sight{}, sight{public: true}, sight{public: true, private: true}
	for _, c := range []struct {
		why   string
		looks []look
	}{
		{"what is whole", []look{{1, whole, true}, {1, whole, true}}},
		{"what is missing in one initialization, however often looked for", []look{{1, none, false}, {1, none, false}, {2, none, true}, {2, none, true}}},
		{"destroyed by somebody else", []look{{1, whole, true}, {1, public, false}, {2, public, true}, {3, public, true}}},
		{"disabled by somebody else", []look{{1, whole, true}, {1, disabled, false}, {2, disabled, true}}},
		{"hidden once", []look{{1, whole, true}, {1, public, false}, {2, whole, true}, {2, public, false}}},
		{"looks different each time", []look{{1, whole, true}, {1, public, false}, {2, none, false}, {3, public, false}, {4, public, true}}},
		{"comes back after it was believed gone", []look{{1, none, false}, {2, none, true}, {2, whole, true}, {2, none, false}}},
	} {
		var s sights
		for i, l := range c.looks {
			if got := s.believe(l.init, name{"l", "1"}, l.what); got != l.want {
				t.Errorf("%s: look %d is believed: %v, want %v", c.why, i, got, l.want)
			}
		}
	}
	var s sights
	for i := range 3 * maxSights {
		n := name{"l", string(rune('a'+i%26)) + string(rune(i))}
		s.believe(1, n, none)
		s.note(n, whole)
		s.believe(1, n, none)
	}
	if len(s.settled) > maxSights || len(s.doubted) > maxSights {
		t.Errorf("%d and %d versions are remembered, want at most %d", len(s.settled), len(s.doubted), maxSights)
	}
}

// hide makes the module hide objects until the next C_Initialize, as SoftHSM does with what it looked at while the token was away.
func (f *fake) hide(class uint) {
	f.set(func(f *fake) {
		hidden := make(map[pkcs11.ObjectHandle]*fakeObject)
		for h, o := range f.objects {
			if string(o.attrs[pkcs11.CKA_CLASS]) == string(attr(0, class).Value) {
				hidden[h] = o
				delete(f.objects, h)
			}
		}
		f.hook = func(call string) (bool, error) {
			if call == "C_Initialize" {
				f.set(func(f *fake) {
					for h, o := range hidden {
						f.objects[h] = o
					}
					clear(hidden)
				})
			}
			return false, nil
		}
	})
}

// TestHiddenObjects: a module that hides what the token holds costs a restart of it, and no version.
func TestHiddenObjects(t *testing.T) {
	for _, c := range []struct {
		why     string
		classes []uint
	}{
		{"private keys", []uint{pkcs11.CKO_PRIVATE_KEY}},
		{"public keys", []uint{pkcs11.CKO_PUBLIC_KEY}},
	} {
		for what, use := range map[string]func(*Store, keys.Version, keys.Signer) error{
			"Sign": func(_ *Store, _ keys.Version, sg keys.Signer) error {
				_, err := sg.Sign(t.Context(), nil)
				return err
			},
			"Signer": func(s *Store, v keys.Version, _ keys.Signer) error {
				_, err := s.Signer(t.Context(), v.Label, v.ID)
				return err
			},
			"Versions": func(s *Store, v keys.Version, _ keys.Signer) error {
				vs, err := s.Versions(t.Context(), v.Label)
				if err == nil && (len(vs) != 1 || vs[0].State != keys.Enabled) {
					err = errors.New("not one enabled version")
				}
				return err
			},
			"Create": func(s *Store, v keys.Version, _ keys.Signer) error {
				_, err := s.Create(t.Context(), v.Label, keys.P256)
				return err
			},
			"Check": func(s *Store, v keys.Version, _ keys.Signer) error { return s.Check(t.Context(), v.Label) },
		} {
			f := newFake()
			s := f.open(t, f.registry(), func(c *Config) { c.Sessions = 1 })
			v, sg := mustCreate(t, s, keys.Ed25519)
			mustSign(t, sg)
			for _, class := range c.classes {
				f.hide(class)
			}
			if err := use(s, v, sg); err != nil {
				t.Errorf("%s with %s hidden: %v", what, c.why, err)
			}
			f.set(func(f *fake) { f.hook = nil })
			closeStore(t, s)
			f.audit(t)
		}
	}
}

// TestNotPermitted: a token that refuses a key says CKA_SIGN is false, or something else that only it knows: both end the version,
// for what is lost by a mistake of the module is asked again.
func TestNotPermitted(t *testing.T) {
	f := newFake()
	s := f.open(t, f.registry(), nil)
	defer closeStore(t, s)
	_, sg := mustCreate(t, s, keys.Ed25519)
	mustSign(t, sg)
	refusals := 1
	f.set(func(f *fake) {
		f.hook = func(call string) (bool, error) {
			if call != "C_SignInit" {
				return false, nil
			}
			refuse := false
			f.set(func(*fake) {
				if refuse = refusals > 0; refuse {
					refusals--
				}
			})
			if refuse {
				return false, pkcs11.Error(pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED)
			}
			return false, nil
		}
	})
	for range 4 { // both workers; the first meets the refusal
		mustSign(t, sg)
	}
	f.set(func(*fake) { refusals = 1 << 20 })
	if _, err := sg.Sign(t.Context(), nil); !errors.Is(err, keys.ErrDisabled) {
		t.Errorf("Sign: %v, want %v", err, keys.ErrDisabled)
	}
	f.set(func(f *fake) { f.hook = nil })
	f.audit(t)
}

// TestHalfMade: the token goes while it makes a pair, and what it has made of it stays: a public object without a key, a public
// object alone, a private one that says nothing of itself. Create makes another, and the label is not spoilt for ever.
func TestHalfMade(t *testing.T) {
	for _, c := range []struct {
		why   string
		spoil func(f *fake, public, private pkcs11.ObjectHandle)
	}{
		{"public object without a key", func(f *fake, public, private pkcs11.ObjectHandle) {
			f.objects[public].attrs[pkcs11.CKA_EC_POINT] = nil
			delete(f.objects, private)
		}},
		{"public object without a type", func(f *fake, public, private pkcs11.ObjectHandle) {
			f.objects[public].attrs[pkcs11.CKA_KEY_TYPE] = nil
			delete(f.objects, private)
		}},
		{"public object alone", func(f *fake, _, private pkcs11.ObjectHandle) { delete(f.objects, private) }},
		{"private object without CKA_SIGN", func(f *fake, _, private pkcs11.ObjectHandle) {
			f.objects[private].attrs[pkcs11.CKA_SIGN] = nil
		}},
	} {
		f := newFake()
		s := f.open(t, f.registry(), func(c *Config) { c.Sessions = 1 })
		first, sg := mustCreate(t, s, keys.Ed25519)
		spoilt := false
		f.set(func(f *fake) {
			f.hook = func(call string) (bool, error) {
				if call != "C_GenerateKeyPair" || spoilt {
					if spoilt && call == "C_CloseSession" {
						f.set(func(f *fake) { f.drop() })
					}
					return false, nil
				}
				spoilt = true
				f.set(func(f *fake) { f.spoil = c.spoil })
				return true, pkcs11.Error(pkcs11.CKR_GENERAL_ERROR)
			}
		})
		v, err := s.Create(t.Context(), "log", keys.Ed25519)
		if err != nil {
			t.Errorf("%s: Create: %v", c.why, err)
		}
		f.set(func(f *fake) { f.hook = nil })
		vs, err := s.Versions(t.Context(), "log")
		if err != nil || len(vs) != 2 || vs[0].ID != first.ID || vs[1].ID != v.ID || vs[1].State != keys.Enabled {
			t.Errorf("%s: Versions: %+v, %v; want what was made before and the one that Create returned", c.why, vs, err)
		}
		mustSign(t, sg)
		// The same left by a process that died: nobody erases it, and it is no version.
		f.set(func(f *fake) {
			public, private := f.plant("log", "0099-20261201T120000Z-00000000")
			c.spoil(f, public, private)
		})
		if vs, err = s.Versions(t.Context(), "log"); err != nil || len(vs) < 2 || len(vs) > 3 || len(vs) == 3 && vs[2].State != keys.Destroyed {
			t.Errorf("%s: Versions with the leftover of another process: %+v, %v", c.why, vs, err)
		}
		if _, err := s.Create(t.Context(), "log", keys.P256); err != nil {
			t.Errorf("%s: Create beside the leftover of another process: %v", c.why, err)
		}
		closeStore(t, s)
		f.audit(t)
	}
}
