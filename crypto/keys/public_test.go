package keys

import "testing"

// TestPublicKey: the key in a verifier key is the key it was made of, whatever the name.
func TestPublicKey(t *testing.T) {
	for _, alg := range []Algorithm{Ed25519, P256} {
		pub, other := newSigner(t, alg).Public(), newSigner(t, alg).Public()
		for _, name := range []string{"example.com/a", "example.com/b"} {
			vkey, err := VKey(name, pub)
			if err != nil {
				t.Fatal(err)
			}
			got, err := PublicKey(vkey)
			if err != nil || !SamePublic(got, pub) || SamePublic(got, other) || SamePublic(nil, pub) {
				t.Errorf("%s, %s: %v, %v", alg, name, got, err)
			}
		}
	}
	if _, err := PublicKey("log+00000000+AAAA"); err == nil {
		t.Error("no verifier key, and no error")
	}
}
