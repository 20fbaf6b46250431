package rotation

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
)

// Bounds of single calls. Signatures have Config.SignTimeout.
const (
	storeTimeout   = 30 * time.Second // of the store, but for signatures
	holdTimeout    = 30 * time.Second // of Hold
	stepTimeout    = time.Minute      // of what is done while the log is held
	publishTimeout = 10 * time.Second // of waiting for a checkpoint
)

// Manager keeps the daily key of one log. Methods are safe for concurrent use. Settle, Rotate, Revoke and Seal take turns
// and may take as long as the store, the journal and the tree do (each call is bounded; a minute in all is possible): never
// call them with a lock held that Tree needs. HeaderKey, Info and the signer never wait for them.
type Manager struct {
	cfg Config

	// busy holds one token: whoever has it does a step of the state machine and owns what follows.
	busy        chan struct{}
	tree        Tree
	st          *State // what the journal shall hold
	dirty       bool   // the last Save failed: the journal holds st or what was before it
	changePace  pace
	destroyPace pace
	told        Phase // last phase that was logged

	// mu guards what follows; nobody waits for anything while holding it.
	mu       sync.Mutex
	view     *State    // what the journal is known to hold; never changed in place
	cur      *dailyKey // signs checkpoints; nil while there is none
	boot     distrust
	seen     bool // the log was compared with the state
	headers  bool // headers may be made
	dueAt    time.Time
	next     time.Time // of changePace
	fatal    error     // nothing goes on after this
	lastErr  string
	failures map[string]uint64
	changes  map[string]uint64
}

// distrust bars keys stated up to an index; the zero value bars none.
type distrust struct {
	ended string
	upTo  uint64
}

// Open reads the state and compares it with the store. For a new log it makes the first key and its statement, so that the
// tree can be opened with a signer that works; the statement goes to the log with the first Settle. Before Settle the caller
// sets the tree (SetTree).
//
// The store must answer: without it nobody can tell whether the state is current. Open refuses with ErrOlderCopy when the
// key in force is gone from the store, or when the store holds versions of the label that the state does not know. Where a
// crash can have left the same (a call of Create was under way, or a version was made and not stated), the key in force
// signs nothing more and is replaced by a fresh one. The same goes for a wall clock that is behind the time the log has seen.
//
// A sealed log is opened without the store, whatever Config says.
func Open(ctx context.Context, cfg Config) (*Manager, error) {
	m, err := open(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("open daily key: %w", err)
	}
	return m, nil
}

// SetTree gives the log. Called once, after Open and before Settle, Rotate, Revoke and Seal.
func (m *Manager) SetTree(t Tree) { m.tree = t }

// lock takes busy; it gives up with ctx.
func (m *Manager) lock(ctx context.Context) error {
	select {
	case m.busy <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	if m.tree == nil || m.cfg.OnlyPublic {
		m.unlock()
		if m.cfg.OnlyPublic {
			return ErrSealed
		}
		return errors.New("the log is not open yet")
	}
	return nil
}

func (m *Manager) unlock() { <-m.busy }

// Settle does what is to be done, if anything: it finishes what a crash left, replaces the key in force when it is due, lost,
// past its age or not trusted, finishes a revocation or a seal, and destroys what is retired. The log calls it when it opens, before
// any header is added or made, and then about once a second, from a goroutine that no request waits for. After a failure it
// keeps its own pace, exponential between 1 s and 1 min, jittered; until then it returns nil at once. A refused credential
// goes straight to 1 min.
func (m *Manager) Settle(ctx context.Context) error {
	if m.cfg.OnlyPublic {
		return nil
	}
	if err := m.lock(ctx); err != nil {
		return fmt.Errorf("settle daily key: %w", err)
	}
	defer m.unlock()
	m.tell(ctx)
	if m.changePace.ready(m.cfg.Clock.Now()) {
		if err := m.attempt(ctx, ""); err != nil {
			return fmt.Errorf("settle daily key: %w", err)
		}
	}
	if m.destroyPace.ready(m.cfg.Clock.Now()) {
		if err := m.cleanUp(ctx); err != nil {
			return fmt.Errorf("settle daily key: %w", err)
		}
	}
	return nil
}

// attempt is advance with its pace and its report.
func (m *Manager) attempt(ctx context.Context, asked string) error {
	err := m.advance(ctx, asked)
	if err == nil {
		m.changePace.succeeded()
	} else {
		m.count(err)
		m.changePace.failed(m.cfg.Clock.Now(), err, m.cfg.Rand())
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.next, m.lastErr = m.changePace.next, ""
	if err != nil {
		m.lastErr = err.Error()
	}
	return err
}

// cleanUp is destroyRetired with its pace.
func (m *Manager) cleanUp(ctx context.Context) error {
	err := m.destroyRetired(ctx)
	if err == nil {
		m.destroyPace.succeeded()
		return nil
	}
	m.count(err)
	m.destroyPace.failed(m.cfg.Clock.Now(), err, m.cfg.Rand())
	return err
}

// Rotate replaces the key in force now, whatever its age and however the last attempt went. When it returns nil a checkpoint
// that the new key signed is readable. After an error the change may still come about: Settle goes on with it.
func (m *Manager) Rotate(ctx context.Context) (Info, error) {
	if err := m.lock(ctx); err != nil {
		return m.Info(), fmt.Errorf("rotate daily key: %w", err)
	}
	defer m.unlock()
	err := m.unsealed()
	if err == nil {
		err = m.attempt(ctx, receipt.EndedRotated)
	}
	if err == nil {
		err = m.published(ctx)
	}
	if err != nil {
		return m.Info(), fmt.Errorf("rotate daily key: %w", err)
	}
	m.tidy(ctx)
	return m.Info(), nil
}

// unsealed fails on a log that has ended or is about to.
func (m *Manager) unsealed() error {
	if m.st.Seal != nil || m.st.Sealing != nil {
		return ErrSealed
	}
	return nil
}

// published waits for a checkpoint of the key in force.
func (m *Manager) published(ctx context.Context) error {
	wait, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	if err := m.tree.Published(wait, m.st.Current.Index+1); err != nil {
		return fmt.Errorf("the new key is in force, but no checkpoint of it is readable yet: %w", err)
	}
	return nil
}

// tidy destroys what a change retired; that it fails is no failure of the change.
func (m *Manager) tidy(ctx context.Context) {
	if err := m.cleanUp(ctx); err != nil {
		m.cfg.Log.WarnContext(ctx, "retired daily key not destroyed yet", "error", err)
	}
}

// Revoke revokes a daily key of this log, the one in force when vkey is empty, and returns the revocation (a signed note,
// receipt.ParseRevocation). The key in force is replaced first. A key that is revoked already gives the note made then.
// ErrUnknownKey. After an error the revocation may still come about: once it is in the journal, Settle goes on with it.
func (m *Manager) Revoke(ctx context.Context, vkey, reason string) (revocation []byte, err error) {
	if err := m.lock(ctx); err != nil {
		return nil, fmt.Errorf("revoke daily key: %w", err)
	}
	defer m.unlock()
	if revocation, err = m.revoke(ctx, vkey, reason); err != nil {
		return nil, fmt.Errorf("revoke daily key: %w", err)
	}
	m.tidy(ctx)
	return revocation, nil
}

func (m *Manager) revoke(ctx context.Context, vkey, reason string) ([]byte, error) {
	if n := revocationOf(m.st, vkey); n != nil {
		return n, nil
	}
	if err := m.unsealed(); err != nil {
		return nil, fmt.Errorf("%w: the seal bounds every key of it", err)
	}
	// What was asked for before is finished first: the key in force may be another one then.
	if m.st.Current == nil || m.st.Next != nil || m.st.Revoking != nil {
		if err := m.attempt(ctx, ""); err != nil {
			return nil, err
		}
	}
	if vkey == "" {
		vkey = m.st.Current.VKey
	} else if n := revocationOf(m.st, vkey); n != nil {
		return n, nil
	}
	if vkey != m.st.Current.VKey && !slices.ContainsFunc(m.st.Past, func(p Past) bool { return p.VKey == vkey }) {
		return nil, fmt.Errorf("%w: %.120s", ErrUnknownKey, vkey)
	}
	asked := &Asked{VKey: vkey, Reason: reason, Time: m.cfg.Clock.Now()}
	// A reason that no note can hold is refused before it is in the journal, where nothing could ever finish it.
	if err := (&receipt.Revocation{Origin: m.cfg.Origin, Key: vkey, Size: 1, Time: asked.Time, Reason: reason}).Validate(); err != nil {
		return nil, err
	}
	if err := m.save(ctx, func(s *State) { s.Revoking = asked }); err != nil {
		return nil, err
	}
	if err := m.attempt(ctx, ""); err != nil {
		return nil, err
	}
	return revocationOf(m.st, vkey), nil
}

// revocationOf returns the note that revokes vkey, nil when there is none.
func revocationOf(s *State, vkey string) []byte {
	for _, n := range s.Revoked {
		if r, err := receipt.ParseRevocation(n); err == nil && r.Key == vkey {
			return n
		}
	}
	return nil
}

// Seal ends the log: it adds the seal as the last leaf, waits for the final checkpoint, which covers it, and destroys the daily keys.
// It returns the leaf (receipt.ParseSeal). A key in force that cannot sign is replaced first. After an error the seal may still
// come about: Settle goes on with it. On a log that is sealed already it returns its seal.
func (m *Manager) Seal(ctx context.Context, reason string) (leaf []byte, err error) {
	if m.cfg.OnlyPublic {
		return m.Info().Seal, nil
	}
	if err := m.lock(ctx); err != nil {
		return nil, fmt.Errorf("seal log: %w", err)
	}
	defer m.unlock()
	if m.st.Sealed {
		return m.st.Seal, nil
	}
	if m.st.Sealing == nil {
		asked := &Asked{Reason: reason, Time: m.cfg.Clock.Now()}
		if err := (&receipt.Seal{Origin: m.cfg.Origin, Size: 1, Time: asked.Time, Reason: reason}).Validate(); err != nil {
			return nil, fmt.Errorf("seal log: %w", err)
		}
		if err := m.save(ctx, func(s *State) { s.Sealing = asked }); err != nil {
			return nil, fmt.Errorf("seal log: %w", err)
		}
	}
	if err := m.attempt(ctx, ""); err != nil {
		return nil, fmt.Errorf("seal log: %w", err)
	}
	m.tidy(ctx)
	return m.st.Seal, nil
}

// Signer returns a signer for the daily line of checkpoints, named after the origin. KeyHash pins the key that the Sign
// after it uses, which is the order in which note.Sign calls them: so a signer belongs to one publisher that makes one
// note at a time, and another publisher takes another. (Shared, it stays safe: a line around a change may then carry the
// hash of one key and the signature of another, which verifies nowhere.)
//
// Sign refuses a text that is no checkpoint of the origin, and with ErrExpired, ErrRange, ErrSealed and ErrUntrusted what their
// comments say. A key signs no two roots for one size, and after one size no smaller one. The first key also signs size 0.
// Errors of the store are returned as they are (keys.ErrUnavailable, ...).
func (m *Manager) Signer() note.Signer { return &signer{m: m} }

// HeaderKey returns the index of the statement in force and the end of its key, for the header that is being made. Not ok:
// no header may be made now: before the first key is in force, while a successor is stated and not in force, once the
// log is being sealed, past the key's age. The caller also checks that its header's time is before notAfter. What it
// says stays true while the caller holds what Tree.Hold waits for, but for the age.
func (m *Manager) HeaderKey() (index uint64, notAfter time.Time, ok bool) {
	now := m.cfg.Clock.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cur == nil {
		return 0, time.Time{}, false
	}
	return m.cur.Index, m.cur.end, m.headers && m.fatal == nil && now.Before(m.cur.end)
}

// Info tells how the key stands.
func (m *Manager) Info() Info {
	now := m.cfg.Clock.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.view
	i := Info{
		Phase: m.phase(now), Due: m.dueAt, NextAttempt: m.next, LastError: m.lastErr,
		Failures: maps.Clone(m.failures), Changes: maps.Clone(m.changes),
		Retired: slices.Clone(s.Retired), Keys: s.Records(), Revocations: slices.Clone(s.Revoked),
		Seal: s.Seal, SealPublished: s.SealPublished,
	}
	switch {
	case s.Sealed:
	case m.cfg.OnlyPublic: // a process ended before it noted what is known of the log
		i.SealPublished, i.Retired = true, s.Leftover()
	default:
		i.Seal, i.Sealing = nil, s.Sealing != nil || s.Seal != nil
	}
	if s.Revoking != nil {
		i.Revoking = s.Revoking.VKey
	}
	if k := m.cur; k != nil && s.Current != nil {
		i.VKey, i.Index, i.NotBefore, i.NotAfter = k.VKey, k.Index, k.NotBefore, k.end
		i.Age, i.Left = now.Sub(k.NotBefore), k.end.Sub(now)
	}
	return i
}

// phase judges the key in force. The caller holds mu.
func (m *Manager) phase(now time.Time) Phase {
	k := m.cur
	switch {
	case m.view.Sealed || m.cfg.OnlyPublic:
		return PhaseSealed
	case m.fatal != nil:
		return PhaseFailed
	case m.view.Current == nil:
		return PhaseChanging
	case m.distrusted(m.view, k.Index) != "":
		return PhaseUntrusted
	case k.lost:
		return PhaseLost
	}
	p := phaseAt(now, k.NotBefore, m.dueAt, k.end)
	if !m.headers && (p == PhaseFresh || p == PhaseDue) {
		return PhaseChanging
	}
	return p
}

// distrusted says why a key stated at index may not sign, empty when it may. The caller holds mu.
func (m *Manager) distrusted(s *State, index uint64) string {
	switch {
	case s.Distrust != "" && index <= s.DistrustUpTo:
		return s.Distrust
	case m.boot.ended != "" && index <= m.boot.upTo:
		return m.boot.ended
	}
	return ""
}

// tell logs a key's way from good to bad, each step once.
func (m *Manager) tell(ctx context.Context) {
	now := m.cfg.Clock.Now()
	m.mu.Lock()
	p, lastErr, left := m.phase(now), m.lastErr, time.Duration(0)
	if m.cur != nil {
		left = m.cur.end.Sub(now)
	}
	m.mu.Unlock()
	if p == m.told {
		return
	}
	m.told = p
	args := []any{"phase", string(p), "left", left.Round(time.Second), "last_error", lastErr}
	switch p {
	case PhaseWarn:
		m.cfg.Log.WarnContext(ctx, "daily key was not replaced in time and will refuse to sign", args...)
	case PhaseAlarm:
		m.cfg.Log.ErrorContext(ctx, "daily key is about to refuse to sign", args...)
	case PhaseExpired, PhaseUntrusted, PhaseLost, PhaseFailed:
		m.cfg.Log.ErrorContext(ctx, "daily key does not sign", args...)
	}
}

// count counts a failure by its kind. That a signature was not this key's to make is none.
func (m *Manager) count(err error) {
	kind := string(keys.Kind(err))
	switch {
	case errors.Is(err, ErrRange), errors.Is(err, ErrSealed), errors.Is(err, ErrUntrusted):
		return
	case errors.Is(err, ErrExpired):
		kind = "expired"
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failures[kind]++
}

// latch stops everything: what was found must not happen, and going on could make it worse.
func (m *Manager) latch(err error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fatal == nil {
		m.fatal = err
	}
	return m.fatal
}

func newManager(cfg Config) (*Manager, error) {
	if cfg.SignTimeout == 0 {
		cfg.SignTimeout = 5 * time.Second
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.Float64
	}
	if cfg.Log == nil {
		cfg.Log = discard
	}
	switch {
	case cfg.Interval <= 0 || cfg.Interval > MaxAge:
		return nil, fmt.Errorf("rotation interval is %v, want more than 0 and at most %v", cfg.Interval, MaxAge)
	case cfg.Origin == "" || cfg.Journal == nil || cfg.Clock == nil:
		return nil, errors.New("origin, journal and clock are required")
	case cfg.SignTimeout < 0:
		return nil, fmt.Errorf("sign timeout is %v", cfg.SignTimeout)
	}
	return &Manager{cfg: cfg, busy: make(chan struct{}, 1), failures: map[string]uint64{}, changes: map[string]uint64{}}, nil
}
