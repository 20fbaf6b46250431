package soft

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/keys/keystest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConformance(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	keystest.Run(t, func(t *testing.T) keys.Store { return open(t, dir) })
}

func open(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// made returns a store with one Ed25519 version of label "log".
func made(t testing.TB) (*Store, keys.Version) {
	t.Helper()
	s := open(t, filepath.Join(t.TempDir(), "keys"))
	v, err := s.Create(t.Context(), "log", keys.Ed25519)
	if err != nil {
		t.Fatal(err)
	}
	return s, v
}

func (s *Store) path(v keys.Version) string { return filepath.Join(s.dir, fileName(v.Label, v.ID)) }

func TestModes(t *testing.T) {
	s, v := made(t)
	for path, want := range map[string]os.FileMode{s.dir: 0o700, s.path(v): 0o600} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%s has mode %04o, want %04o", path, got, want)
		}
	}
}

// TestOpenToOthers: a directory or file that others may use is refused at Open, in each listing and by open signers.
func TestOpenToOthers(t *testing.T) {
	for _, mode := range []os.FileMode{0o640, 0o604, 0o620, 0o601} {
		t.Run(fmt.Sprintf("file %04o", mode), func(t *testing.T) {
			s, v := made(t)
			sg, err := s.Signer(t.Context(), v.Label, v.ID)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(s.path(v), mode); err != nil {
				t.Fatal(err)
			}
			_, errOpen := Open(s.dir)
			_, errList := s.Versions(t.Context(), v.Label)
			_, errSign := sg.Sign(t.Context(), nil)
			for what, err := range map[string]error{"Open": errOpen, "Versions": errList, "Sign": errSign} {
				if err == nil || !strings.Contains(err.Error(), s.path(v)) || !strings.Contains(err.Error(), "chmod") {
					t.Errorf("%s: %v; want an error with the path and the remedy", what, err)
				}
			}
		})
	}
	for _, mode := range []os.FileMode{0o750, 0o701, 0o777} {
		t.Run(fmt.Sprintf("directory %04o", mode), func(t *testing.T) {
			s, _ := made(t)
			if err := os.Chmod(s.dir, mode); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(s.dir); err == nil || !strings.Contains(err.Error(), s.dir+" has mode") {
				t.Errorf("Open: %v; want an error with the directory and its mode", err)
			}
		})
	}
	t.Run("all named in one error", func(t *testing.T) {
		s, a := made(t)
		b, err := s.Create(t.Context(), "log", keys.P256)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range []keys.Version{a, b} {
			if err := os.Chmod(s.path(v), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		_, err = Open(s.dir)
		if err == nil || !strings.Contains(err.Error(), a.ID) || !strings.Contains(err.Error(), b.ID) {
			t.Errorf("Open: %v; want both files named", err)
		}
	})
	t.Run("symbolic link", func(t *testing.T) {
		s, v := made(t)
		elsewhere := filepath.Join(t.TempDir(), "elsewhere.json")
		if err := errors.Join(os.Rename(s.path(v), elsewhere), os.Symlink(elsewhere, s.path(v))); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(s.dir); err == nil || !strings.Contains(err.Error(), "not a regular file") {
			t.Errorf("Open: %v; want a refusal of the link", err)
		}
	})
}

// TestDamage: a file that is not exactly what this package wrote is an error that names it and repeats nothing of it.
func TestDamage(t *testing.T) {
	other := func(t *testing.T) string { // the public key of another version, as it stands in a file
		s, v := made(t)
		b, err := os.ReadFile(s.path(v))
		if err != nil {
			t.Fatal(err)
		}
		_, after, _ := strings.Cut(string(b), `"public_key": "`)
		pub, _, _ := strings.Cut(after, `"`)
		return pub
	}(t)
	for _, c := range []struct {
		why    string
		change func(string) string
		want   string
	}{
		{"cut short", func(s string) string { return s[:len(s)/2] }, "not a key version"},
		{"empty", func(string) string { return "" }, "not a key version"},
		{"unknown field", func(s string) string { return strings.Replace(s, "{", `{"x":1,`, 1) }, "not a key version"},
		{"second object", func(s string) string { return s + "{}" }, "data after"},
		{"newer format", func(s string) string { return strings.Replace(s, `"format": 1`, `"format": 2`, 1) }, "format 2"},
		{"unknown state", func(s string) string { return strings.Replace(s, `"enabled"`, `"active"`, 1) }, `state "active"`},
		{"destroyed with a private key", func(s string) string { return strings.Replace(s, `"enabled"`, `"destroyed"`, 1) }, "destroyed"},
		{"other algorithm", func(s string) string { return strings.Replace(s, `"ed25519"`, `"ecdsa-p256"`, 1) }, "algorithm says"},
		{"other label than the name", func(s string) string { return strings.Replace(s, `"log"`, `"lag"`, 1) }, "belongs into"},
		{"bad label", func(s string) string { return strings.Replace(s, `"log"`, `""`, 1) }, "label has 0 bytes"},
		{"bad id", func(s string) string { return strings.Replace(s, `"0001-`, `"1-`, 1) }, "version id"},
		{"public key is another's", func(s string) string {
			_, after, _ := strings.Cut(s, `"public_key": "`)
			pub, _, _ := strings.Cut(after, `"`)
			return strings.Replace(s, pub, other, 1)
		}, "does not belong"},
		{"private key gone", func(s string) string {
			before, _, _ := strings.Cut(s, `,`+"\n"+`  "private_key"`)
			return before + "\n}\n"
		}, "private_key is not one PEM"},
	} {
		t.Run(c.why, func(t *testing.T) {
			s, v := made(t)
			b, err := os.ReadFile(s.path(v))
			if err != nil {
				t.Fatal(err)
			}
			changed := c.change(string(b))
			if changed == string(b) {
				t.Fatal("the case changes nothing")
			}
			if err := os.WriteFile(s.path(v), []byte(changed), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err = Open(s.dir)
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), s.path(v)) {
				t.Fatalf("Open: %v; want %q and the path", err, c.want)
			}
			if strings.Contains(err.Error(), "PRIVATE KEY-----") {
				t.Errorf("the error repeats the file: %v", err)
			}
		})
	}
}

// TestSwappedKey: a signer whose file now holds another key does not sign with it.
func TestSwappedKey(t *testing.T) {
	s, v := made(t)
	sg, err := s.Signer(t.Context(), v.Label, v.ID)
	if err != nil {
		t.Fatal(err)
	}
	private, err := generate(keys.Ed25519)
	if err != nil {
		t.Fatal(err)
	}
	swapped := version{Version: v, private: private}
	swapped.Public = private.Public()
	if err := writeVersion(s.dir, swapped); err != nil {
		t.Fatal(err)
	}
	if _, err := sg.Sign(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "replaced") {
		t.Errorf("Sign with a swapped key: %v; want a refusal", err)
	}
}

// TestDestroyLeavesNoPrivateKey looks into the directory: no file holds a private key after Destroy.
func TestDestroyLeavesNoPrivateKey(t *testing.T) {
	s, v := made(t)
	if err := s.Destroy(t.Context(), v.Label, v.ID); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 1 {
		t.Errorf("%d files, want 1", len(entries))
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(s.dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), "PRIVATE") {
			t.Errorf("%s holds a private key", e.Name())
		}
	}
}

// TestCrash: what a process that dies while writing leaves behind is not a version, and goes after an hour.
func TestCrash(t *testing.T) {
	s, v := made(t)
	b, err := os.ReadFile(s.path(v))
	if err != nil {
		t.Fatal(err)
	}
	young, old := filepath.Join(s.dir, tmpPrefix+"1@x.json"), filepath.Join(s.dir, tmpPrefix+"2")
	for _, p := range []string{young, old} {
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	past := time.Now().Add(-staleTemp - time.Minute)
	if err := os.Chtimes(old, past, past); err != nil {
		t.Fatal(err)
	}
	again := open(t, s.dir)
	if vs, err := again.Versions(t.Context(), v.Label); err != nil || len(vs) != 1 {
		t.Errorf("Versions: %+v, %v; want the one that is complete", vs, err)
	}
	if _, err := os.Stat(young); err != nil {
		t.Errorf("a write that may still go on was removed: %v", err)
	}
	if _, err := os.Stat(old); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an abandoned write is still there: %v", err)
	}
}

// TestClockBack: versions keep the order of creation though the clock went back between them.
func TestClockBack(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "keys"))
	var want []string
	for i := range 3 {
		s.now = func() time.Time { return time.Date(2026, 11, 23-i, 0, 0, 0, 0, time.UTC) }
		v, err := s.Create(t.Context(), "a label/with@odd ..characters", keys.P256)
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, v.ID)
	}
	vs, err := s.Versions(t.Context(), "a label/with@odd ..characters")
	if err != nil || len(vs) != 3 {
		t.Fatalf("Versions: %+v, %v", vs, err)
	}
	for i, v := range vs {
		if v.ID != want[i] {
			t.Errorf("version %d is %s, want %s", i, v.ID, want[i])
		}
	}
}

func TestOpenErrors(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(file); err == nil {
		t.Error("Open of a file: no error")
	}
	if _, err := Open(""); err == nil {
		t.Error("Open of no path: no error")
	}
}

func FuzzDecodeVersion(f *testing.F) {
	for _, alg := range []keys.Algorithm{keys.Ed25519, keys.P256} {
		private, err := generate(alg)
		if err != nil {
			f.Fatal(err)
		}
		id := keys.NextVersionID(nil, time.Unix(0, 0))
		v := version{private: private, Version: keys.Version{
			Label: "log", ID: id.String(), Algorithm: alg, Public: private.Public(), State: keys.Enabled, Created: id.Created,
		}}
		b, err := encodeVersion(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(b[:len(b)-10])
	}
	f.Add([]byte(`{"format":1,"private_key":"-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := decodeVersion(b)
		if err != nil {
			return
		}
		// What is accepted can be written and read again, and its keys belong together.
		again, err := encodeVersion(v)
		if err != nil {
			t.Fatalf("encode: %v", err)
		}
		w, err := decodeVersion(again)
		if err != nil || w.ID != v.ID || w.State != v.State || !keys.SamePublic(w.Public, v.Public) {
			t.Fatalf("decode of what was encoded: %+v, %v", w, err)
		}
		if v.private != nil && !keys.SamePublic(v.private.Public(), v.Public) {
			t.Fatal("accepted keys that do not belong together")
		}
	})
}

// BenchmarkSign: signatures per second are the inverse of ns/op.
func BenchmarkSign(b *testing.B) {
	for _, alg := range []keys.Algorithm{keys.Ed25519, keys.P256} {
		s := open(b, filepath.Join(b.TempDir(), "keys"))
		v, err := s.Create(b.Context(), "log", alg)
		if err != nil {
			b.Fatal(err)
		}
		sg, err := s.Signer(b.Context(), v.Label, v.ID)
		if err != nil {
			b.Fatal(err)
		}
		msg := make([]byte, 200) // about a checkpoint
		b.Run(string(alg), func(b *testing.B) {
			for b.Loop() {
				if _, err := sg.Sign(b.Context(), msg); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "sigs/s")
		})
	}
}
