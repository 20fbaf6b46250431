//go:build cgo

package hsm

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/miekg/pkcs11"
)

// registry holds the modules of a process. C_Initialize and logins belong to the process, not to a caller, so the stores
// of one process meet here.
type registry struct {
	load   func(path string) (cryptoki, error)
	pinKey [32]byte // of pinMAC; random

	mu      sync.Mutex
	modules map[string]*module // by path without symbolic links; never removed
}

func newRegistry(load func(path string) (cryptoki, error)) *registry {
	r := &registry{load: load, modules: make(map[string]*module)}
	rand.Read(r.pinKey[:])
	return r
}

// process is the registry of this process.
var process = newRegistry(loadModule)

// pinMAC tells PINs apart without keeping them.
func (r *registry) pinMAC(pin string) [32]byte {
	h := hmac.New(sha256.New, r.pinKey[:])
	h.Write([]byte(pin))
	return [32]byte(h.Sum(nil))
}

// acquire returns the module at path and counts the caller in. It calls no C.
func (r *registry) acquire(path string) *module {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.modules[path]
	if m == nil {
		m = &module{path: path, reg: r, drain: 2 * time.Second, tokens: make(map[string]*token),
			sessions: make(map[pkcs11.SessionHandle]*token)}
		r.modules[path] = m
	}
	m.mu.Lock()
	m.refs++
	m.mu.Unlock()
	return m
}

// module is one PKCS#11 library. Every C call stands between enter and exit, or inside exclusive.
type module struct {
	path  string
	reg   *registry
	drain time.Duration // how long exclusive waits for calls in flight

	mu     sync.Mutex
	refs   int               // stores and their workers; the last one out finalizes
	active int               // callers between enter and exit
	idle   chan struct{}     // not nil: an exclusive section waits for active to become 0
	free   chan struct{}     // not nil: an exclusive section waits or runs; closed at its end
	tokens map[string]*token // by label
	// sessions holds the handles that workers have open, each of its token's present generation. Handles are numbers of the
	// process, not of the token.
	sessions map[pkcs11.SessionHandle]*token

	// Written inside exclusive only, so that callers between enter and exit may read.
	ck      cryptoki // nil until loaded
	up      bool     // C_Initialize has succeeded
	inits   uint64   // how often it was called
	foreign bool     // somebody else in this process had initialized the module: it is not ours to finalize
}

// enter waits out an exclusive section and announces C calls.
func (m *module) enter() {
	for {
		m.mu.Lock()
		free := m.free
		if free == nil {
			m.active++
			m.mu.Unlock()
			return
		}
		m.mu.Unlock()
		<-free
	}
}

func (m *module) exit() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.active--
	if m.active == 0 && m.idle != nil {
		close(m.idle)
		m.idle = nil
	}
}

// exclusive runs fn while no other C call of this process is in the module; callers must not be between enter and exit.
// When calls in flight do not come back within m.drain, fn does not run and errStuck is returned.
func (m *module) exclusive(fn func() error) error {
	m.mu.Lock()
	for m.free != nil {
		free := m.free
		m.mu.Unlock()
		<-free
		m.mu.Lock()
	}
	free := make(chan struct{})
	m.free = free
	var idle chan struct{}
	if m.active > 0 {
		idle = make(chan struct{})
		m.idle = idle
	}
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		m.free, m.idle = nil, nil
		m.mu.Unlock()
		close(free)
	}()
	if idle != nil {
		timer := time.NewTimer(m.drain)
		defer timer.Stop()
		select {
		case <-idle:
		case <-timer.C:
			return errStuck
		}
	}
	return fn()
}

// token returns the shared state of the token with the label.
func (m *module) token(label string) *token {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.tokens[label]
	if t == nil {
		t = &token{
			label: label, mod: m, gen: 1, turn: make(chan struct{}, 1), refused: make(map[[32]byte]struct{}),
			breakerTrips: breakerTrips, breakerWait: breakerWait,
		}
		m.tokens[label] = t
	}
	return t
}

// voidHandles forgets every session: called when C_Finalize ends them. Inside exclusive.
func (m *module) voidHandles() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.sessions)
	for _, t := range m.tokens {
		t.gen++
	}
}

// claim notes a session that was opened; false when a worker holds that handle already.
func (m *module) claim(h pkcs11.SessionHandle, t *token) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.sessions[h] != nil {
		return false
	}
	m.sessions[h] = t
	return true
}

// disclaim forgets a session.
func (m *module) disclaim(h pkcs11.SessionHandle) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.sessions, h)
}

// claimed returns the sessions of a token.
func (m *module) claimed(t *token) (hs []pkcs11.SessionHandle) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for h, owner := range m.sessions {
		if owner == t {
			hs = append(hs, h)
		}
	}
	return hs
}

// restart loads the module when it is not, and initializes it anew. Inside exclusive.
func (m *module) restart() error {
	if m.ck == nil {
		ck, err := m.reg.load(m.path)
		if err != nil {
			return err
		}
		m.ck = ck
	}
	if m.up {
		if m.foreign {
			return fmt.Errorf("module %s was initialized by something else in this process and needs a restart: %w", m.path, errDown)
		}
		_ = m.ck.Finalize() // whatever it says, C_Initialize comes next and has the last word
		m.up = false
	}
	m.voidHandles()
	m.inits++
	switch err := m.ck.Initialize(); {
	case err == nil:
		m.up, m.foreign = true, false
	case isCode(err, pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED):
		m.up, m.foreign = true, true
	default:
		return fmt.Errorf("C_Initialize: %w", err)
	}
	return nil
}

// release counts a user out; the last one finalizes the module.
func (m *module) release() error {
	m.mu.Lock()
	m.refs--
	last := m.refs == 0
	m.mu.Unlock()
	if !last {
		return nil
	}
	return m.exclusive(func() error {
		m.mu.Lock()
		wanted := m.refs > 0 // somebody came while we waited
		m.mu.Unlock()
		if wanted || !m.up {
			return nil
		}
		m.voidHandles()
		m.up = false
		if m.foreign {
			return nil
		}
		if err := m.ck.Finalize(); err != nil {
			return fmt.Errorf("C_Finalize: %w", err)
		}
		return nil
	})
}
