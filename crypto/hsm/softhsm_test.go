//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"go.uber.org/goleak"

	"github.com/knhk/sidecar/crypto/hsm/softhsm"
	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/keys/keystest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testPIN = "1234"

// softToken is a SoftHSM token of one test. SoftHSM reads its configuration at C_Initialize, so a test closes every store
// before the next one makes its token; none of them runs in parallel.
type softToken struct{ module, dir string }

func newSoftToken(t testing.TB) softToken {
	t.Helper()
	tok := softToken{module: softhsm.Need(t), dir: t.TempDir()}
	tok.add(t, "knhk")
	return tok
}

// add makes one more token in the directory.
func (tok softToken) add(t testing.TB, label string) {
	t.Helper()
	conf, err := softhsm.InitToken(tok.dir, label, testPIN, "12345678")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(softhsm.ConfEnv, conf)
}

func (tok softToken) config() Config {
	return Config{Module: tok.module, TokenLabel: "knhk", PIN: func() (string, error) { return testPIN, nil }}
}

// open opens a store that the test closes.
func (tok softToken) open(t testing.TB) *Store {
	t.Helper()
	s, err := Open(t.Context(), tok.config())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return s
}

// impatient makes the circuit breaker of the store's token wait for next to nothing, until the test ends.
func impatient(t testing.TB, s *Store) {
	wait := func(d time.Duration) {
		s.tok.guard.Lock()
		defer s.tok.guard.Unlock()
		s.tok.breakerWait, s.tok.breaker = d, nil
	}
	wait(time.Nanosecond)
	t.Cleanup(func() { wait(breakerWait) })
}

// raw runs fn on a session of the store, to make objects that the store itself would not.
func raw(t testing.TB, s *Store, fn func(*session) error) {
	t.Helper()
	if err := s.do(t.Context(), &op{fn: fn}); err != nil {
		t.Fatal(err)
	}
}

func mustCreate(t testing.TB, s *Store, alg keys.Algorithm) (keys.Version, keys.Signer) {
	t.Helper()
	v, err := s.Create(t.Context(), "log", alg)
	if err != nil {
		t.Fatal(err)
	}
	sg, err := s.Signer(t.Context(), v.Label, v.ID)
	if err != nil {
		t.Fatal(err)
	}
	return v, sg
}

func mustSign(t testing.TB, sg keys.Signer) {
	t.Helper()
	msg := []byte("a checkpoint")
	sig, err := sg.Sign(t.Context(), msg)
	if err != nil {
		t.Fatal(err)
	}
	if err := keys.Verify(sg.Algorithm(), sg.Public(), msg, sig); err != nil {
		t.Fatal(err)
	}
}

func TestSoftHSMConformance(t *testing.T) {
	tok := newSoftToken(t)
	keystest.Run(t, func(t *testing.T) keys.Store {
		s, err := Open(t.Context(), tok.config())
		if err != nil {
			t.Fatal(err)
		}
		return s
	})
}

func TestSoftHSMCustody(t *testing.T) {
	if got := newSoftToken(t).open(t).Custody(); got != "token knhk (SoftHSM v2)" {
		t.Errorf("Custody is %q", got)
	}
}

// TestSoftHSMAttributes reads back what protects a key made here.
func TestSoftHSMAttributes(t *testing.T) {
	s := newSoftToken(t).open(t)
	for _, alg := range []keys.Algorithm{keys.Ed25519, keys.P256} {
		v, _ := mustCreate(t, s, alg)
		raw(t, s, func(se *session) error {
			p, err := se.pair(name{v.Label, v.ID})
			if err != nil {
				return err
			}
			for _, c := range []struct {
				name string
				kind uint
				want bool
			}{
				{"CKA_TOKEN", pkcs11.CKA_TOKEN, true}, {"CKA_PRIVATE", pkcs11.CKA_PRIVATE, true},
				{"CKA_SENSITIVE", pkcs11.CKA_SENSITIVE, true}, {"CKA_ALWAYS_SENSITIVE", pkcs11.CKA_ALWAYS_SENSITIVE, true},
				{"CKA_EXTRACTABLE", pkcs11.CKA_EXTRACTABLE, false}, {"CKA_NEVER_EXTRACTABLE", pkcs11.CKA_NEVER_EXTRACTABLE, true},
				{"CKA_LOCAL", pkcs11.CKA_LOCAL, true}, {"CKA_SIGN", pkcs11.CKA_SIGN, true},
			} {
				got, err := se.get(p.privateObj, c.kind)
				if err != nil {
					return err
				}
				if isTrue(got[0]) != c.want {
					t.Errorf("%s: %s is %v, want %v", alg, c.name, !c.want, c.want)
				}
			}
			if _, err := se.get(p.privateObj, pkcs11.CKA_VALUE); err == nil {
				t.Errorf("%s: the token gave the private key away", alg)
			}
			return nil
		})
	}
}

func TestSoftHSMWrongPIN(t *testing.T) {
	tok := newSoftToken(t)
	// Wrong PINs of this run only: the process remembers refused ones for the label, and -count runs the test again.
	wrong, other := rand.Text(), rand.Text()
	bad := tok.config()
	bad.PIN = func() (string, error) { return wrong, nil }
	for try := range 3 {
		s, err := Open(t.Context(), bad)
		if s != nil || !errors.Is(err, keys.ErrCredential) {
			t.Fatalf("Open with a wrong PIN = %v, %v; want %v", s, err, keys.ErrCredential)
		}
		// The token has seen the PIN once; afterwards the answer comes from memory.
		if first := try == 0; isCode(err, pkcs11.CKR_PIN_INCORRECT) != first {
			t.Errorf("try %d: %v; the token is to be asked only once", try, err)
		}
		if strings.Contains(err.Error(), wrong) {
			t.Errorf("the error repeats the PIN: %v", err)
		}
	}
	// The right PIN still works, and beside it the wrong one is refused though the process is logged in.
	_, sg := mustCreate(t, tok.open(t), keys.P256)
	if _, err := Open(t.Context(), bad); !errors.Is(err, keys.ErrCredential) {
		t.Errorf("Open with a wrong PIN while logged in: %v, want %v", err, keys.ErrCredential)
	}
	bad.PIN = func() (string, error) { return other, nil }
	if _, err := Open(t.Context(), bad); !errors.Is(err, keys.ErrCredential) || isCode(err, pkcs11.CKR_PIN_INCORRECT) {
		t.Errorf("Open with another wrong PIN while logged in: %v; want %v without asking the token", err, keys.ErrCredential)
	}
	mustSign(t, sg)
}

// TestSoftHSMSessionsLost closes every session of the token under 8 signing goroutines, again and again: no signature fails.
func TestSoftHSMSessionsLost(t *testing.T) {
	tok := newSoftToken(t)
	s := tok.open(t)
	signers := make([]keys.Signer, 2)
	_, signers[0] = mustCreate(t, s, keys.Ed25519)
	_, signers[1] = mustCreate(t, s, keys.P256)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var made, failed atomic.Int64
	for g := range 8 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				msg := fmt.Appendf(nil, "%d/%d", g, i)
				sg := signers[(g+i)%2]
				sig, err := sg.Sign(t.Context(), msg)
				if err == nil {
					err = keys.Verify(sg.Algorithm(), sg.Public(), msg, sig)
				}
				if err != nil {
					failed.Add(1)
					t.Errorf("Sign: %v", err)
					return
				}
				made.Add(1)
			}
		})
	}
	const losses = 20
	for i := range losses {
		for before := made.Load(); made.Load() < before+20 && failed.Load() == 0; { // signatures go on between the losses
			time.Sleep(time.Millisecond)
		}
		// Not while calls are in flight: SoftHSM frees the sessions and the process would crash.
		err := s.tok.mod.exclusive(func() error {
			if i%4 == 3 { // the worst case: the library itself starts anew
				return errors.Join(s.tok.mod.ck.Finalize(), s.tok.mod.ck.Initialize())
			}
			return s.tok.mod.ck.(*pkcs11.Ctx).CloseAllSessions(s.tok.slot)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	wg.Wait()
	s.tok.mod.mu.Lock()
	if n := len(s.tok.mod.sessions); n > 2 {
		t.Errorf("%d sessions are open, want at most 2: recovery must not leave any behind", n)
	}
	s.tok.mod.mu.Unlock()
	t.Logf("%d losses of all sessions, %d signatures, %d failed", losses, made.Load(), failed.Load())
	if made.Load() < losses*20 {
		t.Errorf("only %d signatures", made.Load())
	}
}

// TestSoftHSMSilentLogout logs out under the store. Private keys are then not found without an error: the store must not
// take them for destroyed.
func TestSoftHSMSilentLogout(t *testing.T) {
	tok := newSoftToken(t)
	s := tok.open(t)
	v, sg := mustCreate(t, s, keys.Ed25519)
	logout := func() {
		t.Helper()
		raw(t, s, func(se *session) error { return se.tok.mod.ck.(*pkcs11.Ctx).Logout(se.h) })
	}
	logout()
	vs, err := s.Versions(t.Context(), v.Label)
	if err != nil || len(vs) != 1 || vs[0].State != keys.Enabled {
		t.Errorf("Versions after a logout: %+v, %v; want one enabled version", vs, err)
	}
	logout()
	mustSign(t, sg)
	logout()
	if _, err := s.Signer(t.Context(), v.Label, v.ID); err != nil {
		t.Errorf("Signer after a logout: %v", err)
	}
}

// TestSoftHSMTokenGone moves the token's directory away and back. While it is away searches find nothing without an error,
// and sessions open: nothing of that may look like a missing or destroyed version.
func TestSoftHSMTokenGone(t *testing.T) {
	for _, c := range []struct {
		why   string
		first func(*Store, keys.Version, keys.Signer) error // the first call that meets the loss
	}{
		{"met by Sign", func(_ *Store, _ keys.Version, sg keys.Signer) error {
			_, err := sg.Sign(context.Background(), nil)
			return err
		}},
		{"met by Versions", func(s *Store, v keys.Version, _ keys.Signer) error {
			_, err := s.Versions(context.Background(), v.Label)
			return err
		}},
		{"met by Signer", func(s *Store, v keys.Version, _ keys.Signer) error {
			_, err := s.Signer(context.Background(), v.Label, v.ID)
			return err
		}},
		{"met by Create", func(s *Store, v keys.Version, _ keys.Signer) error {
			_, err := s.Create(context.Background(), v.Label, keys.P256)
			return err
		}},
		{"met by Check", func(s *Store, v keys.Version, _ keys.Signer) error { return s.Check(context.Background(), v.Label) }},
		{"met by Destroy", func(s *Store, v keys.Version, _ keys.Signer) error {
			return s.Destroy(context.Background(), v.Label, v.ID)
		}},
	} {
		t.Run(c.why, func(t *testing.T) {
			tok := newSoftToken(t)
			s := tok.open(t)
			impatient(t, s)
			v, sg := mustCreate(t, s, keys.Ed25519)
			away := filepath.Join(tok.dir, "away")
			if err := os.Rename(softhsm.TokenDir(tok.dir), away); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				if err := c.first(s, v, sg); !errors.Is(err, keys.ErrUnavailable) {
					t.Fatalf("while the token is away: %v, want %v", err, keys.ErrUnavailable)
				}
			}
			if err := s.Check(t.Context(), v.Label); !errors.Is(err, keys.ErrUnavailable) {
				t.Errorf("Check while the token is away: %v, want %v", err, keys.ErrUnavailable)
			}
			if _, err := Open(t.Context(), tok.config()); !errors.Is(err, keys.ErrUnavailable) {
				t.Errorf("Open while the token is away: %v, want %v", err, keys.ErrUnavailable)
			}
			if err := os.Rename(away, softhsm.TokenDir(tok.dir)); err != nil {
				t.Fatal(err)
			}
			mustSign(t, sg)
			if vs, err := s.Versions(t.Context(), v.Label); err != nil || len(vs) != 1 || vs[0].State != keys.Enabled {
				t.Errorf("Versions after the token came back: %+v, %v", vs, err)
			}
			if err := s.Check(t.Context(), v.Label); err != nil {
				t.Errorf("Check after the token came back: %v", err)
			}
		})
	}
}

// TestSoftHSMStores: several stores share one C_Initialize; each may close in any order, and the last one finalizes.
func TestSoftHSMStores(t *testing.T) {
	tok := newSoftToken(t)
	tok.add(t, "second")
	a, b := tok.open(t), tok.open(t)
	other := tok.config()
	other.TokenLabel = "second"
	c, err := Open(t.Context(), other)
	if err != nil {
		t.Fatal(err)
	}
	v, sg := mustCreate(t, a, keys.Ed25519)
	_, sgOther := mustCreate(t, c, keys.P256)
	sgB, err := b.Signer(t.Context(), v.Label, v.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Signer(t.Context(), v.Label, v.ID); !errors.Is(err, keys.ErrNotFound) {
		t.Errorf("a version of one token found on another: %v", err)
	}
	for _, s := range []keys.Signer{sg, sgB, sgOther} {
		mustSign(t, s)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	mustSign(t, sgB) // the other sessions and the login live on
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	mustSign(t, sgOther)
	m := c.tok.mod
	if !m.up || m.refs != 1 {
		t.Errorf("initialized: %v, references: %d; want true, 1", m.up, m.refs)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if m.up || m.refs != 0 {
		t.Errorf("after the last Close: initialized: %v, references: %d; want false, 0", m.up, m.refs)
	}
	mustSign(t, func() keys.Signer { // and it opens again
		sg, err := tok.open(t).Signer(t.Context(), v.Label, v.ID)
		if err != nil {
			t.Fatal(err)
		}
		return sg
	}())
}

// TestSoftHSMSymlink: two paths of one library are one module; a second C_Initialize would fail.
func TestSoftHSMSymlink(t *testing.T) {
	tok := newSoftToken(t)
	a := tok.open(t)
	link := filepath.Join(t.TempDir(), "link.so")
	if err := os.Symlink(tok.module, link); err != nil {
		t.Fatal(err)
	}
	tok.module = link
	if b := tok.open(t); a.tok != b.tok {
		t.Error("a symbolic link to the module was taken for another module")
	}
}

func TestSoftHSMSameTokenLabelTwice(t *testing.T) {
	tok := newSoftToken(t)
	tok.add(t, "knhk")
	if _, err := Open(t.Context(), tok.config()); err == nil || !strings.Contains(err.Error(), `2 tokens are labelled "knhk"`) {
		t.Errorf("Open: %v; want a refusal of the label", err)
	}
}

func TestSoftHSMNoSuchToken(t *testing.T) {
	cfg := newSoftToken(t).config()
	cfg.TokenLabel = "elsewhere"
	_, err := Open(t.Context(), cfg)
	if !errors.Is(err, keys.ErrUnavailable) || !strings.Contains(err.Error(), `no token labelled "elsewhere" among "knhk"`) {
		t.Errorf("Open: %v; want %v with the labels that are there", err, keys.ErrUnavailable)
	}
}

func TestModuleErrors(t *testing.T) {
	dir := t.TempDir()
	notALibrary := filepath.Join(dir, "text.so")
	if err := os.WriteFile(notALibrary, bytes.Repeat([]byte("no ELF "), 100), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ why, module, want string }{
		{"missing", filepath.Join(dir, "missing.so"), "does not exist"},
		{"a directory", dir, "is not a file"},
		{"not a library", notALibrary, "cannot be loaded"},
		{"relative", "libsofthsm2.so", "is not absolute"},
	} {
		_, err := Open(t.Context(), Config{Module: c.module, TokenLabel: "knhk", PIN: func() (string, error) { return testPIN, nil }})
		if err == nil || !strings.Contains(err.Error(), c.want) || errors.Is(err, keys.ErrUnavailable) {
			t.Errorf("%s: %v; want %q", c.why, err, c.want)
		}
	}
}

// BenchmarkSoftHSM signs and verifies, as Sign does; signatures per second over all goroutines.
func BenchmarkSoftHSM(b *testing.B) {
	tok := newSoftToken(b)
	for _, sessions := range []int{1, 2} {
		cfg := tok.config()
		cfg.Sessions = sessions
		s, err := Open(b.Context(), cfg)
		if err != nil {
			b.Fatal(err)
		}
		for _, alg := range []keys.Algorithm{keys.Ed25519, keys.P256} {
			_, sg := mustCreate(b, s, alg)
			msg := make([]byte, 200) // about a checkpoint
			b.Run(fmt.Sprintf("%s/sessions=%d", alg, sessions), func(b *testing.B) {
				b.SetParallelism(2)
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						if _, err := sg.Sign(b.Context(), msg); err != nil {
							b.Error(err)
							return
						}
					}
				})
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "sigs/s")
			})
		}
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
