package kms

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
)

// memory is a service in this process that signs with Ed25519 alone, and can be told to fail, to hang and to forget.
type memory struct {
	mu      sync.Mutex
	vers    []Info
	private map[string]ed25519.PrivateKey
	err     error         // of every call
	hang    chan struct{} // not nil: calls wait for it, whatever their context says
	forget  bool          // Get, List and Sign know nothing
	renewed atomic.Bool
	calls   atomic.Int64
	closed  atomic.Int64
}

func (m *memory) call() error {
	m.calls.Add(1)
	m.mu.Lock()
	hang, err := m.hang, m.err
	m.mu.Unlock()
	if hang != nil {
		<-hang
	}
	return err
}

func (m *memory) set(fn func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fn()
}

func (m *memory) Renewed() bool   { return m.renewed.Load() }
func (m *memory) Custody() string { return "memory" }

func (m *memory) Close() error {
	m.closed.Add(1)
	return nil
}

func (m *memory) Create(_ context.Context, _ string, alg keys.Algorithm) (Info, error) {
	if err := m.call(); err != nil {
		return Info{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	_, p, err := ed25519.GenerateKey(nil)
	if err != nil {
		return Info{}, err
	}
	i := Info{ID: strconv.Itoa(len(m.vers) + 1), Algorithm: alg, State: keys.Enabled, Created: time.Unix(int64(len(m.vers)+1), 0)}
	m.vers, m.private[i.ID] = append(m.vers, i), p
	return i, nil
}

func (m *memory) find(id string) (*Info, error) {
	for n := range m.vers {
		if m.vers[n].ID == id && !m.forget {
			return &m.vers[n], nil
		}
	}
	return nil, keys.ErrNotFound
}

func (m *memory) List(context.Context, string) ([]Info, error) {
	if err := m.call(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.forget {
		return nil, nil
	}
	return append([]Info(nil), m.vers...), nil
}

func (m *memory) Get(_ context.Context, _, id string) (Info, error) {
	if err := m.call(); err != nil {
		return Info{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	i, err := m.find(id)
	if err != nil {
		return Info{}, err
	}
	return *i, nil
}

func (m *memory) PublicKey(_ context.Context, _, id string) (crypto.PublicKey, error) {
	if err := m.call(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	i, err := m.find(id)
	if err != nil {
		return nil, err
	}
	if i.State != keys.Enabled {
		return nil, keys.ErrDisabled
	}
	return m.private[id].Public(), nil
}

func (m *memory) Sign(_ context.Context, _, id string, _ keys.Algorithm, input []byte) ([]byte, error) {
	if err := m.call(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	i, err := m.find(id)
	if err != nil {
		return nil, err
	}
	if i.State != keys.Enabled {
		return nil, keys.ErrDisabled
	}
	return ed25519.Sign(m.private[id], input), nil
}

func (m *memory) end(id string, st keys.State) error {
	if err := m.call(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	i, err := m.find(id)
	if err == nil && i.State != keys.Destroyed {
		i.State = st
	}
	return err
}

func (m *memory) Disable(_ context.Context, _, id string) error { return m.end(id, keys.Disabled) }
func (m *memory) Destroy(_ context.Context, _, id string) error { return m.end(id, keys.Destroyed) }

// clock is a time that tests set.
type clock struct{ atomic.Int64 }

func (c *clock) now() time.Time { return time.Unix(1_800_000_000, c.Load()) }

const place = "memory://here"

func made(t *testing.T, cfg Config) (*memory, *Store, *clock, keys.Version, keys.Signer) {
	t.Helper()
	m, c := &memory{private: map[string]ed25519.PrivateKey{}}, &clock{}
	a, err := OpenArchive(t.TempDir(), place)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Backend, cfg.Archive, cfg.Place, cfg.now = m, a, place, c.now
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	v, err := s.Create(t.Context(), "daily", keys.Ed25519)
	if err != nil {
		t.Fatal(err)
	}
	sg, err := s.Signer(t.Context(), "daily", v.ID)
	if err != nil {
		t.Fatal(err)
	}
	return m, s, c, v, sg
}

func sign(t *testing.T, sg keys.Signer) error {
	t.Helper()
	sig, err := sg.Sign(t.Context(), []byte("m"))
	if (sig == nil) != (err != nil) {
		t.Errorf("Sign = %d bytes, %v", len(sig), err)
	}
	return err
}

// TestHang: a service that hangs, and does not even look at contexts, costs callers their own time, this process a bounded
// number of calls, and everybody beyond the queue nothing.
func TestHang(t *testing.T) {
	m, _, _, _, sg := made(t, Config{Calls: 2, Queue: 3})
	hang := make(chan struct{})
	m.set(func() { m.hang = hang })
	before := m.calls.Load()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	errs := make(chan error, 5)
	for range 5 {
		go func() {
			_, err := sg.Sign(ctx, []byte("m"))
			errs <- err
		}()
	}
	full := sg.(*signer).store
	for deadline := time.Now().Add(30 * time.Second); full.waiting.Load() < 5 || m.calls.Load() < before+2; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the calls did not queue")
		}
	}
	if err := sign(t, sg); !errors.Is(err, keys.ErrUnavailable) || !strings.Contains(err.Error(), "wait already") {
		t.Errorf("Sign with a full queue: %v", err)
	}
	cancel()
	for range 5 {
		if err := <-errs; !errors.Is(err, context.Canceled) {
			t.Errorf("Sign: %v, want %v", err, context.Canceled)
		}
	}
	if n := m.calls.Load() - before; n != 2 {
		t.Errorf("%d calls reached the service, want 2", n)
	}
	m.set(func() { m.hang = nil })
	close(hang)
	if err := sign(t, sg); err != nil {
		t.Errorf("after it: %v", err)
	}
}

// TestTimeout: the store's own deadline is a timeout of the service, opens the breaker, and reads as one.
func TestTimeout(t *testing.T) {
	m, _, _, _, sg := made(t, Config{Timeout: 20 * time.Millisecond, BreakerTrips: 1, BreakerWait: time.Hour})
	release := make(chan struct{})
	t.Cleanup(func() { close(release) })
	m.set(func() { m.err = nil })
	slowed := sg.(*signer).store
	err := slowed.do(t.Context(), keys.OpSign, "daily", 20*time.Millisecond, func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	})
	if keys.Kind(err) != keys.KindTimeout {
		t.Errorf("a call that took too long: %v is %q", err, keys.Kind(err))
	}
	before := m.calls.Load()
	if err := sign(t, sg); !errors.Is(err, keys.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) || m.calls.Load() != before {
		t.Errorf("Sign behind the open breaker: %v, %d calls", err, m.calls.Load()-before)
	}
}

// TestBreaker: what opens it, and what does not.
func TestBreaker(t *testing.T) {
	for _, c := range []struct {
		err   error
		opens bool
	}{
		{keys.ErrUnavailable, true},
		{keys.ErrThrottled, true},
		{keys.ErrDisabled, false},
		{errors.New("no such mechanism"), false},
		{context.Canceled, false},
	} {
		m, _, _, _, sg := made(t, Config{BreakerTrips: 3, BreakerWait: time.Hour})
		m.set(func() { m.err = fmt.Errorf("injected: %w", c.err) })
		before := m.calls.Load()
		for range 10 {
			if err := sign(t, sg); err == nil || c.opens && !errors.Is(err, c.err) {
				t.Errorf("%v: Sign: %v", c.err, err)
			}
		}
		if n := m.calls.Load() - before; c.opens != (n == 3) || !c.opens && n != 10 {
			t.Errorf("%v: %d calls of 10 reached the service; opens: %v", c.err, n, c.opens)
		}
	}
}

// TestCredential: a refused credential is not sent again for a minute, by this operation on this label, unless there is another.
func TestCredential(t *testing.T) {
	m, s, c, v, sg := made(t, Config{})
	m.set(func() { m.err = fmt.Errorf("injected: %w", keys.ErrCredential) })
	before := m.calls.Load()
	for range 10 {
		if err := sign(t, sg); !errors.Is(err, keys.ErrCredential) {
			t.Fatalf("Sign: %v", err)
		}
	}
	if n := m.calls.Load() - before; n != 1 {
		t.Errorf("%d calls with a refused credential, want 1", n)
	}
	m.set(func() { m.err = nil })
	if _, err := s.Versions(t.Context(), v.Label); err != nil {
		t.Errorf("another operation is refused as well: %v", err)
	}
	c.Add(int64(time.Minute) - 1)
	if err := sign(t, sg); !errors.Is(err, keys.ErrCredential) {
		t.Errorf("just before the minute is over: %v", err)
	}
	c.Add(1)
	if err := sign(t, sg); err != nil {
		t.Errorf("after a minute: %v", err)
	}
	m.set(func() { m.err = keys.ErrCredential })
	_ = sign(t, sg)
	m.set(func() { m.err = nil })
	m.renewed.Store(true)
	if err := sign(t, sg); err != nil {
		t.Errorf("with another credential: %v", err)
	}
}

// TestForgotten: a version the service does not know is missing only when it had time to hear of it, and then stays listed.
func TestForgotten(t *testing.T) {
	m, s, c, v, sg := made(t, Config{})
	m.set(func() { m.forget = true })
	if err := sign(t, sg); !errors.Is(err, keys.ErrUnavailable) {
		t.Errorf("a moment after it was made: %v, want %v", err, keys.ErrUnavailable)
	}
	if _, err := s.Versions(t.Context(), v.Label); !errors.Is(err, keys.ErrUnavailable) {
		t.Errorf("Versions a moment after it was made: %v, want %v", err, keys.ErrUnavailable)
	}
	c.Add(int64(settle))
	if err := sign(t, sg); !errors.Is(err, keys.ErrDisabled) {
		t.Errorf("later: %v, want %v", err, keys.ErrDisabled)
	}
	vs, err := s.Versions(t.Context(), v.Label)
	if err != nil || len(vs) != 1 || vs[0].State != keys.Destroyed || !keys.SamePublic(vs[0].Public, v.Public) {
		t.Errorf("Versions: %+v, %v", vs, err)
	}
	m.set(func() { m.forget = false })
	if vs, err := s.Versions(t.Context(), v.Label); err != nil || len(vs) != 1 || vs[0].State != keys.Enabled {
		t.Errorf("the service knows it again: %+v, %v", vs, err)
	}
}

// TestOtherKey: a service that gives another public key under an id than it gave before is not believed.
func TestOtherKey(t *testing.T) {
	m, s, _, v, sg := made(t, Config{})
	_, p, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	m.set(func() { m.private[v.ID] = p })
	if err := sign(t, sg); err == nil || !strings.Contains(err.Error(), "does not verify") {
		t.Errorf("Sign: %v", err)
	}
	again, err := Open(Config{Backend: m, Archive: s.cfg.Archive, Place: place})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if _, err := again.Signer(t.Context(), v.Label, v.ID); !errors.Is(err, errWrong) {
		t.Errorf("Signer of a store opened later: %v, want %v", err, errWrong)
	}
}

// TestExportable: refused unless allowed, and told.
func TestExportable(t *testing.T) {
	m, s, _, v, _ := made(t, Config{})
	m.set(func() { m.vers[0].Exportable = true })
	if _, err := s.Signer(t.Context(), v.Label, v.ID); err == nil || !strings.Contains(err.Error(), "refused unless allowed") {
		t.Errorf("Signer: %v", err)
	}
	if i, err := s.Inspect(t.Context(), v.Label, v.ID); err != nil || i.CanSign || !i.Exportable || i.Why == "" {
		t.Errorf("Inspect: %+v, %v", i, err)
	}
	s.cfg.AllowExportable = true
	if _, err := s.Signer(t.Context(), v.Label, v.ID); err != nil {
		t.Errorf("Signer, allowed: %v", err)
	}
}

// TestUnproven: a version that does not sign is not handed out, and does not stay.
func TestUnproven(t *testing.T) {
	m, s, _, _, _ := made(t, Config{})
	s.cfg.Backend = forger{m}
	if _, err := s.Create(t.Context(), "daily", keys.Ed25519); err == nil || !strings.Contains(err.Error(), "does not prove itself") {
		t.Errorf("Create: %v", err)
	}
	m.set(func() {
		if st := m.vers[1].State; st != keys.Destroyed {
			t.Errorf("the version that did not sign is %s", st)
		}
	})
}

// forger signs wrongly.
type forger struct{ *memory }

func (f forger) Sign(context.Context, string, string, keys.Algorithm, []byte) ([]byte, error) {
	return make([]byte, ed25519.SignatureSize), nil
}

// TestClose: calls under way end, the backend is closed once, and a service that hangs does not hold Close up for ever.
func TestClose(t *testing.T) {
	m, s, _, _, sg := made(t, Config{CloseTimeout: 20 * time.Millisecond})
	hang := make(chan struct{})
	m.set(func() { m.hang = hang })
	before := m.calls.Load()
	errs := make(chan error, 1)
	go func() {
		_, err := sg.Sign(context.Background(), []byte("m"))
		errs <- err
	}()
	for deadline := time.Now().Add(30 * time.Second); m.calls.Load() == before; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the call did not begin")
		}
	}
	if err := s.Close(); err == nil || !strings.Contains(err.Error(), "did not end") {
		t.Errorf("Close: %v", err)
	}
	if err := <-errs; !errors.Is(err, errClosed) {
		t.Errorf("Sign: %v, want %v", err, errClosed)
	}
	close(hang)
	if err := sign(t, sg); !errors.Is(err, errClosed) {
		t.Errorf("Sign after Close: %v", err)
	}
	if n := m.closed.Load(); n != 1 {
		t.Errorf("the backend was closed %d times", n)
	}
}

func TestEscape(t *testing.T) {
	for _, c := range []struct{ label, name string }{
		{"daily", "daily"},
		{"a-b", "a-b"},
		{"a_b", "a_5Fb"},
		{"a.b c", "a_2Eb_20c"},
	} {
		if got := Escape(c.label, '_', "-_"); got != c.name {
			t.Errorf("Escape(%q) = %q, want %q", c.label, got, c.name)
		}
		if got, ok := Unescape(c.name, '_', "-"); !ok || got != c.label {
			t.Errorf("Unescape(%q) = %q, %v", c.name, got, ok)
		}
	}
	for _, bad := range []string{"a_", "a_5", "a_5f", "a_61", "a.b", "_-1"} {
		if got, ok := Unescape(bad, '_', "-"); ok {
			t.Errorf("Unescape(%q) = %q", bad, got)
		}
	}
}
