package rotation

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
)

// dailyKey is a daily key while the process lives. Manager.mu guards the fields below the line.
type dailyKey struct {
	Key
	hash uint32    // of the signature line
	end  time.Time // it refuses to sign from here on; NotAfter, or earlier when the interval was shortened since

	limit   uint64      // greatest size it signs
	signed  Head        // last one it was asked to sign
	signer  note.Signer // opened; nil until it is needed, and after an error
	suspect bool        // the store said that there is no such key: Settle looks again
	lost    bool        // and it said so again
}

func newDailyKey(k *Key, interval time.Duration) (*dailyKey, error) {
	v, err := keys.Verifier(k.VKey)
	if err != nil {
		return nil, err
	}
	end := k.NotBefore.Add(interval)
	if k.NotAfter.Before(end) {
		end = k.NotAfter
	}
	return &dailyKey{Key: *k, hash: v.KeyHash(), end: end, limit: math.MaxUint64}, nil
}

// isGone reports whether the store says that a key cannot sign ever again. Nothing else means that: a store that is away, busy or
// refuses a credential knows nothing about the key.
func isGone(err error) bool {
	return errors.Is(err, keys.ErrNotFound) || errors.Is(err, keys.ErrDisabled)
}

// admit says whether k may sign head now, and if so remembers it. The caller holds m.mu.
func (m *Manager) admit(k *dailyKey, head Head, now time.Time) error {
	switch {
	case m.view.Sealed || m.cfg.OnlyPublic:
		return ErrSealed
	case m.fatal != nil:
		return m.fatal
	case k == nil:
		return fmt.Errorf("%w: no key is in force yet", ErrUntrusted)
	case m.distrusted(m.view, k.Index) != "":
		return ErrUntrusted
	case m.view.Current != nil && !m.seen:
		return fmt.Errorf("%w: the log was not compared with its key yet", ErrUntrusted)
	case !now.Before(k.end):
		return fmt.Errorf("%w: it ended %s, now is %s", ErrExpired, k.end.Format(time.RFC3339), now.Format(time.RFC3339))
	case now.Before(k.NotBefore):
		return fmt.Errorf("%w: it begins %s", ErrExpired, k.NotBefore.Format(time.RFC3339)) // not reached: the clock never goes back
	case head.Size <= k.Index && (head.Size > 0 || k.Index > 0), head.Size > k.limit:
		return fmt.Errorf("%w: size %d, the key signs above %d up to %d", ErrRange, head.Size, k.Index, k.limit)
	case head.Size == k.signed.Size && k.signed.Root != (receipt.Hash{}) && head.Root != k.signed.Root:
		return fmt.Errorf("%w: another root of size %d was signed", ErrRange, head.Size)
	case head.Size < k.signed.Size:
		return fmt.Errorf("%w: size %d after size %d", ErrRange, head.Size, k.signed.Size)
	}
	k.signed = head
	return nil
}

// signer is a publisher's note.Signer.
type signer struct {
	m *Manager

	mu     sync.Mutex
	pinned *dailyKey // by the last KeyHash
}

func (s *signer) Name() string { return s.m.cfg.Origin }

func (s *signer) KeyHash() uint32 {
	k := s.m.inForce()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pinned = k
	if k == nil {
		return 0
	}
	return k.hash
}

func (s *signer) Sign(msg []byte) ([]byte, error) {
	s.mu.Lock()
	k := s.pinned
	s.mu.Unlock()
	if k == nil {
		k = s.m.inForce()
	}
	sig, err := s.m.sign(k, msg)
	if err != nil {
		s.m.count(err)
		return nil, fmt.Errorf("sign checkpoint: %w", err)
	}
	return sig, nil
}

func (m *Manager) inForce() *dailyKey {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cur
}

func (m *Manager) sign(k *dailyKey, msg []byte) ([]byte, error) {
	head, err := parseCheckpoint(m.cfg.Origin, msg)
	if err != nil {
		return nil, err
	}
	now := m.cfg.Clock.Now()
	m.mu.Lock()
	err = m.admit(k, head, now)
	m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return m.signRaw(k, msg)
}

// signRaw signs with k, inside its age and only there: a signature that came too late is thrown away.
func (m *Manager) signRaw(k *dailyKey, msg []byte) ([]byte, error) {
	s, err := m.open(k)
	if err != nil {
		return nil, err
	}
	if now := m.cfg.Clock.Now(); !now.Before(k.end) {
		return nil, ErrExpired
	}
	sig, err := s.Sign(msg)
	if err != nil {
		m.mu.Lock()
		k.signer, k.suspect = nil, k.suspect || isGone(err)
		m.mu.Unlock()
		return nil, err
	}
	if now := m.cfg.Clock.Now(); !now.Before(k.end) {
		return nil, fmt.Errorf("%w: while it signed", ErrExpired)
	}
	return sig, nil
}

// open returns the signer of k in the store.
func (m *Manager) open(k *dailyKey) (note.Signer, error) {
	m.mu.Lock()
	s := k.signer
	m.mu.Unlock()
	if s != nil {
		return s, nil
	}
	s, err := m.openVersion(k.Version)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		k.suspect = k.suspect || isGone(err)
		return nil, err
	}
	k.signer = s
	return s, nil
}

// openVersion opens a version and checks that it is the key it is known as. A version that has become another key is not found.
func (m *Manager) openVersion(v Version) (note.Signer, error) {
	ctx, cancel := context.WithTimeout(context.Background(), m.cfg.SignTimeout)
	defer cancel()
	s, err := m.cfg.Store.Signer(ctx, v.Label, v.ID)
	if err != nil {
		return nil, fmt.Errorf("open key %s version %s: %w", v.Label, v.ID, err)
	}
	vkey, err := keys.VKey(m.cfg.Origin, s.Public())
	if err != nil {
		return nil, fmt.Errorf("open key %s version %s: %w", v.Label, v.ID, err)
	}
	if vkey != v.VKey {
		return nil, fmt.Errorf("open key %s version %s: it is %s, the log knows it as %s: %w", v.Label, v.ID, vkey, v.VKey, keys.ErrNotFound)
	}
	return keys.NoteSigner(m.cfg.Origin, s, m.cfg.SignTimeout)
}

// proves makes a version sign something that is nothing else: it opens it anew.
func (m *Manager) proves(v Version) error {
	s, err := m.openVersion(v)
	if err != nil {
		return err
	}
	if _, err := s.Sign(keys.ProofMessage(v.Label, v.ID)); err != nil {
		return fmt.Errorf("key %s version %s: %w", v.Label, v.ID, err)
	}
	return nil
}

// parseCheckpoint reads the text of a checkpoint (C2SP tlog-checkpoint): origin, size, root, perhaps more lines.
func parseCheckpoint(origin string, msg []byte) (Head, error) {
	lines := strings.SplitN(string(msg), "\n", 4)
	if len(lines) != 4 || lines[0] != origin {
		return Head{}, fmt.Errorf("not a checkpoint of %s", origin)
	}
	size, err := strconv.ParseUint(lines[1], 10, 63)
	if err != nil || strconv.FormatUint(size, 10) != lines[1] {
		return Head{}, fmt.Errorf("not a checkpoint of %s: size %.24q", origin, lines[1])
	}
	root, err := base64.StdEncoding.Strict().DecodeString(lines[2])
	if err != nil || len(root) != len(receipt.Hash{}) {
		return Head{}, fmt.Errorf("not a checkpoint of %s: root %.64q", origin, lines[2])
	}
	return Head{size, receipt.Hash(root)}, nil
}
