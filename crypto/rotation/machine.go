package rotation

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
)

// This file is the state machine. Every step leaves a state in the journal from which advance goes on, so a step may fail, or
// the process end, anywhere. The holder of busy runs it.

// loosePeriod is how long after a Create of unknown result a version of it may still turn up.
const loosePeriod = 10 * time.Minute

// save makes the state what change makes of it. A crash or a failure leaves the old or the new one in the journal: what the new
// one forbids is therefore forbidden before, and what it allows is allowed after.
func (m *Manager) save(ctx context.Context, change func(*State)) error {
	s := m.st.clone()
	change(s)
	s.Floor = m.cfg.Clock.Now()
	m.narrow(s)
	m.st, m.dirty = s, true
	return m.saveAgain(ctx)
}

// saveAgain saves m.st.
func (m *Manager) saveAgain(ctx context.Context) error {
	if err := m.cfg.Journal.Save(ctx, m.st); err != nil {
		return fmt.Errorf("save state of the daily key: %w", err)
	}
	m.dirty = false
	return m.adopt(m.st)
}

// narrow takes away what s does not allow.
func (m *Manager) narrow(s *State) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if s.Next != nil || s.Seal != nil {
		m.headers = false
	}
	if m.cur != nil {
		m.cur.limit = min(m.cur.limit, limitOf(s, m.cur.Index))
	}
}

// limitOf is the greatest size that the key stated at index signs: that over which its successor is stated, or that of the
// log with its seal. A first key whose statement is not known to be in the log signs the empty log only.
func limitOf(s *State, index uint64) uint64 {
	switch {
	case s.Next != nil:
		return s.Next.Index
	case s.Seal != nil:
		return s.SealAt + 1
	case s.Current == nil:
		return index
	case s.Current.Index > index:
		return s.Current.Index
	}
	return math.MaxUint64
}

// adopt makes s, which the journal holds, what signers and headers go by.
func (m *Manager) adopt(s *State) error {
	k := s.Current
	if k == nil {
		k = s.Next
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.view = s
	m.headers = m.seen && s.Current != nil && s.Next == nil && s.Seal == nil
	if k == nil {
		return nil
	}
	if m.cur == nil || m.cur.VKey != k.VKey {
		d, err := newDailyKey(k, m.cfg.Interval)
		if err != nil {
			return fmt.Errorf("daily key in the state: %w", err)
		}
		m.cur, m.dueAt = d, due(k.NotBefore, d.end, m.cfg.Rand())
	}
	m.cur.limit = limitOf(s, k.Index)
	return nil
}

// advance goes on with whatever the state asks for until there is nothing to do. asked is receipt.EndedRotated when the key in
// force is to be replaced without a need.
func (m *Manager) advance(ctx context.Context, asked string) error {
	m.mu.Lock()
	fatal := m.fatal
	m.mu.Unlock()
	if fatal != nil {
		return fatal
	}
	if m.dirty {
		if err := m.saveAgain(ctx); err != nil {
			return err
		}
	}
	if m.st.Sealed {
		return nil
	}
	if m.st.Next != nil {
		if err := m.held(ctx, m.bringIn); err != nil {
			return err
		}
	}
	if err := m.check(ctx); err != nil {
		return err
	}
	if m.st.Seal != nil {
		return m.finishSeal(ctx)
	}
	if ended := m.why(asked); ended != "" {
		if err := m.change(ctx, asked); err != nil {
			return err
		}
	}
	if m.st.Revoking != nil {
		if err := m.signRevocation(ctx); err != nil {
			return err
		}
	}
	if m.st.Sealing != nil {
		return m.seal(ctx)
	}
	return nil
}

// check compares the state with the log, once: the statement in force stands where it should, and the last leaf stands under it. Before
// that nothing is signed and no header is made.
func (m *Manager) check(ctx context.Context) error {
	m.mu.Lock()
	seen := m.seen
	m.mu.Unlock()
	if seen {
		return nil
	}
	k := m.st.Current
	if err := m.held(ctx, func(ctx context.Context, head Head) error {
		leaf, err := m.tree.Leaf(ctx, k.Index)
		if err != nil && !errors.Is(err, ErrNoLeaf) {
			return fmt.Errorf("read key statement: %w", err)
		}
		if !bytes.Equal(leaf, k.Statement) {
			return m.mixed("leaf %d of the log is not the statement of the key in force", k.Index)
		}
		last := head.Size - 1
		if leaf, err = m.tree.Leaf(ctx, last); err != nil {
			return fmt.Errorf("read the last leaf: %w", err)
		}
		h, err := receipt.ParseHeader(leaf)
		switch {
		case err == nil && h.Key != k.Index:
			return m.mixed("the last header names the key statement at %d, in force is the one at %d", h.Key, k.Index)
		case err != nil && last != k.Index && (m.st.Seal == nil || last != m.st.SealAt || !bytes.Equal(leaf, m.st.Seal)):
			return m.mixed("leaf %d of the log is not known here", last)
		}
		return nil
	}); err != nil {
		return err
	}
	m.mu.Lock()
	m.seen = true
	m.mu.Unlock()
	return m.adopt(m.st)
}

// mixed latches what can only come of state and log that do not belong together.
func (m *Manager) mixed(format string, args ...any) error {
	return m.latch(fmt.Errorf(format+": the directory is mixed from copies of different times; put back one that is whole", args...))
}

// why says why the key in force is to be replaced now, empty when it is not.
func (m *Manager) why(asked string) string {
	now := m.cfg.Clock.Now()
	k := m.inForce()
	m.confirm(k)
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.st.Revoking != nil && m.st.Revoking.VKey == k.VKey:
		return receipt.EndedRevoked
	case m.distrusted(m.st, k.Index) != "":
		return m.distrusted(m.st, k.Index)
	case k.lost:
		return receipt.EndedLost
	case !now.Before(k.end):
		return receipt.EndedExpired
	case asked != "" || !now.Before(m.dueAt):
		return receipt.EndedRotated
	}
	return ""
}

// confirm looks again at a key of which a signature said that it is gone: only a store that says so of a version opened anew is
// believed. A key that is gone does not come back.
func (m *Manager) confirm(k *dailyKey) {
	m.mu.Lock()
	look := k.suspect && !k.lost
	m.mu.Unlock()
	if !look {
		return
	}
	err := m.proves(k.Version)
	m.mu.Lock()
	defer m.mu.Unlock()
	k.lost = isGone(err)
	k.suspect = err != nil
}

// held runs step while the tree is held, for a minute at most.
func (m *Manager) held(ctx context.Context, step func(context.Context, Head) error) error {
	wait, cancel := context.WithTimeout(ctx, holdTimeout)
	defer cancel()
	head, release, err := m.tree.Hold(wait)
	if err != nil {
		return fmt.Errorf("hold the log for a key change: %w", err)
	}
	defer release()
	ctx, stop := context.WithTimeout(ctx, stepTimeout)
	defer stop()
	return step(ctx, head)
}

// change replaces the key in force.
func (m *Manager) change(ctx context.Context, asked string) error {
	if err := m.prepare(ctx); err != nil {
		return err
	}
	return m.held(ctx, func(ctx context.Context, head Head) error {
		m.settleOld(ctx, head)
		if err := m.state(ctx, head, asked); err != nil {
			return err
		}
		return m.bringIn(ctx, head)
	})
}

// settleOld gives the key in force the time to sign all that is there. It is a courtesy: what it does not sign the new key does,
// over a greater tree, so a publisher or store that does not get on delays a change and never prevents it.
func (m *Manager) settleOld(ctx context.Context, head Head) {
	k := m.inForce()
	now := m.cfg.Clock.Now()
	m.mu.Lock()
	able := !k.lost && now.Before(k.end) && m.distrusted(m.st, k.Index) == "" && head.Size > k.Index
	m.mu.Unlock()
	if !able {
		return
	}
	wait, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	if err := m.tree.Published(wait, head.Size); err != nil {
		m.cfg.Log.WarnContext(ctx, "no checkpoint by the old daily key before its change; the new one signs what is left", "size", head.Size, "error", err)
	}
}

// prepare makes a key version that is proved to sign. What crashes and failures leave:
//
//	before Create    Loose is one more than was made; it falls back to 0 when nothing turns up for a while
//	before the note  an enabled version that only Loose knows of: found and destroyed by the next prepare, or by Open
//	after it         Prepared, which the next attempt uses; after a crash Open retires it
//
// A version that the store then does not know or has disabled is dropped, and the next attempt makes another.
func (m *Manager) prepare(ctx context.Context) error {
	if m.st.Prepared == nil {
		if err := m.sweep(ctx); err != nil {
			return fmt.Errorf("make daily key: %w", err)
		}
		if err := m.save(ctx, func(s *State) { s.Loose, s.LooseAt = s.Loose+1, m.cfg.Clock.Now() }); err != nil {
			return err
		}
		wait, cancel := context.WithTimeout(ctx, storeTimeout)
		defer cancel()
		v, err := m.cfg.Store.Create(wait, m.cfg.Label, m.cfg.Algorithm)
		if err != nil {
			return fmt.Errorf("make daily key: %w", err)
		}
		vkey, err := keys.VKey(m.cfg.Origin, v.Public)
		if err != nil {
			return fmt.Errorf("make daily key: %w", err)
		}
		if err := m.save(ctx, func(s *State) {
			s.Loose--
			s.Prepared = &Version{Ref{v.Label, v.ID}, vkey}
		}); err != nil {
			return err
		}
	}
	err := m.proves(*m.st.Prepared)
	if err == nil {
		err = m.distinct(*m.st.Prepared)
	}
	if !isGone(err) {
		return err
	}
	if err := m.save(ctx, func(s *State) { s.Retired, s.Prepared = append(s.Retired, s.Prepared.Ref), nil }); err != nil {
		return err
	}
	return fmt.Errorf("new daily key cannot be used, the next attempt makes another: %w", err)
}

// distinct refuses a key whose signature lines could be taken for another key's. It happens once in four billion.
func (m *Manager) distinct(v Version) error {
	k, err := newDailyKey(&Key{Version: v}, m.cfg.Interval)
	if err != nil {
		return err
	}
	cur := m.inForce()
	if k.hash == m.cfg.Identity.KeyHash() || cur != nil && k.hash == cur.hash {
		return fmt.Errorf("key hash %08x is taken: %w", k.hash, keys.ErrDisabled)
	}
	return nil
}

// sweep retires versions that a Create of unknown result has made.
func (m *Manager) sweep(ctx context.Context) error {
	versions, err := m.versions(ctx, m.cfg.Label)
	if err != nil || m.st.Loose == 0 {
		return err
	}
	unknown := unknownOf(m.st, versions)
	switch {
	case uint64(len(unknown)) > m.st.Loose:
		// Not ours, not all of them at least: nothing is destroyed that may be another log's.
		m.cfg.Log.ErrorContext(ctx, "the label of the daily key holds versions that this log did not make; a label belongs to one log",
			"label", m.cfg.Label, "versions", len(unknown))
		return nil
	case len(unknown) == 0 && m.cfg.Clock.Now().Sub(m.st.LooseAt) < loosePeriod:
		return nil
	}
	return m.save(ctx, func(s *State) {
		for _, v := range unknown {
			s.Retired = append(s.Retired, Ref{v.Label, v.ID})
		}
		s.Loose -= uint64(len(unknown))
		if len(unknown) == 0 {
			s.Loose = 0
		}
	})
}

// state signs the statement that Prepared is the next key from head on. After it there is no way back.
func (m *Manager) state(ctx context.Context, head Head, asked string) error {
	var leaf []byte
	var ks *receipt.KeyStatement
	for leaf == nil {
		now := m.cfg.Clock.Now()
		ks = &receipt.KeyStatement{
			Origin: m.cfg.Origin, Key: m.st.Prepared.VKey, NotBefore: now, NotAfter: now.Add(m.cfg.Interval),
			FirstSize: head.Size, FirstRoot: head.Root,
		}
		var old *oldSigner
		if m.st.Current == nil {
			ks.Succeeds = m.cfg.Succeeds
		} else {
			ks.Predecessor, ks.Ended = m.st.Current.VKey, m.why(asked)
			if ks.Ended == "" {
				return errors.New("the reason for the key change has gone") // not reached: reasons do not go while busy is held
			}
		}
		var err error
		if ks.Ended == receipt.EndedRotated {
			old = &oldSigner{m: m, k: m.inForce()}
			leaf, err = receipt.SignKeyStatement(ks, m.cfg.Identity, old)
		} else {
			leaf, err = receipt.SignKeyStatement(ks, m.cfg.Identity, nil)
		}
		switch {
		case err == nil:
		case old != nil && (isGone(old.err) || errors.Is(old.err, ErrExpired)) && m.why(asked) != receipt.EndedRotated:
			leaf = nil // it cannot sign any more: the identity key alone vouches, and the statement says why
		default:
			return fmt.Errorf("state daily key: %w", err)
		}
	}
	next := &Key{
		Version: *m.st.Prepared, NotBefore: ks.NotBefore, NotAfter: ks.NotAfter, Index: head.Size, Root: head.Root,
		Ended: ks.Ended, Statement: leaf,
	}
	// A crash after this line adds the same statement; one before it leaves a prepared version.
	return m.save(ctx, func(s *State) { s.Next, s.Prepared = next, nil })
}

// oldSigner signs the successor's statement, inside the key's age, and keeps its own error apart from the identity key's.
type oldSigner struct {
	m   *Manager
	k   *dailyKey
	err error
}

var _ note.Signer = (*oldSigner)(nil)

func (o *oldSigner) Name() string    { return o.m.cfg.Origin }
func (o *oldSigner) KeyHash() uint32 { return o.k.hash }
func (o *oldSigner) Sign(msg []byte) (sig []byte, err error) {
	sig, o.err = o.m.signRaw(o.k, msg)
	return sig, o.err
}

// bringIn puts the statement of Next into the log, unless it is there, and makes it the key in force.
func (m *Manager) bringIn(ctx context.Context, head Head) error {
	if m.dirty {
		return errors.New("the statement is not in the journal") // not reached: save failed, and its caller returned
	}
	n := m.st.Next
	if err := m.put(ctx, head, n.Index, n.Root, n.Statement); err != nil {
		return fmt.Errorf("log key statement: %w", err)
	}
	// A crash before this line finds the statement in the log and goes on here.
	if err := m.save(ctx, func(s *State) {
		if old := s.Current; old != nil {
			s.Past = append(s.Past, Past{old.VKey, old.NotBefore, old.NotAfter, old.Index, n.Index, n.Root, n.Ended})
			s.Retired = append(s.Retired, old.Ref)
		}
		s.Current, s.Next = n, nil
		if n.Index > s.DistrustUpTo {
			s.Distrust, s.DistrustUpTo = "", 0
		}
	}); err != nil {
		return err
	}
	m.mu.Lock()
	m.changes[n.Ended]++
	m.mu.Unlock()
	m.cfg.Log.InfoContext(ctx, "daily key in force", "vkey", n.VKey, "until", n.NotAfter, "statement_index", n.Index, "predecessor_ended", n.Ended)
	return nil
}

// put makes leaf the leaf at index, over root.
func (m *Manager) put(ctx context.Context, head Head, index uint64, root receipt.Hash, leaf []byte) error {
	there, err := m.tree.Leaf(ctx, index)
	switch {
	case err == nil && bytes.Equal(there, leaf):
		return nil
	case err == nil:
		return m.mixed("leaf %d of the log is another one than was to stand there", index)
	case !errors.Is(err, ErrNoLeaf):
		return err
	case head.Size != index || head.Root != root:
		return m.mixed("the log has size %d and root %s, the leaf belongs over size %d and root %s", head.Size, head.Root, index, root)
	}
	at, err := m.tree.Put(ctx, leaf)
	if err != nil {
		return err
	}
	if at != index {
		return m.latch(fmt.Errorf("the leaf for index %d was added at %d", index, at))
	}
	return nil
}

// signRevocation makes the revocation that was asked for, of a key that is in force no more.
func (m *Manager) signRevocation(ctx context.Context) error {
	a := m.st.Revoking
	for _, p := range m.st.Past {
		if p.VKey != a.VKey {
			continue
		}
		n, err := receipt.SignRevocation(&receipt.Revocation{
			Origin: m.cfg.Origin, Key: p.VKey, Size: p.LastSize, Root: p.LastRoot, Time: a.Time, Reason: a.Reason,
		}, m.cfg.Identity)
		if err != nil {
			return fmt.Errorf("sign revocation: %w", err)
		}
		return m.save(ctx, func(s *State) { s.Revoked, s.Revoking = append(s.Revoked, n), nil })
	}
	return m.latch(fmt.Errorf("%w: %.120s was to be revoked", ErrUnknownKey, a.VKey)) // not reached: Revoke looked
}

// seal adds the seal as the last leaf and goes on with finishSeal. The key in force can sign: advance saw to that.
func (m *Manager) seal(ctx context.Context) error {
	if err := m.held(ctx, func(ctx context.Context, head Head) error {
		m.settleOld(ctx, head)
		k := m.inForce()
		old := &oldSigner{m: m, k: k}
		a := m.st.Sealing
		leaf, err := receipt.SignSeal(&receipt.Seal{
			Origin: m.cfg.Origin, Key: k.Index, Size: head.Size, Root: head.Root, Time: m.cfg.Clock.Now(), Reason: a.Reason,
		}, m.cfg.Identity, old)
		if err != nil {
			return fmt.Errorf("sign seal: %w", err)
		}
		// A crash after this line adds the same seal, or another one when the key has ended in between.
		if err := m.save(ctx, func(s *State) { s.Seal, s.SealAt = leaf, head.Size }); err != nil {
			return err
		}
		return m.putSeal(ctx, head)
	}); err != nil {
		return err
	}
	return m.finishSeal(ctx)
}

func (m *Manager) putSeal(ctx context.Context, head Head) error {
	s, err := receipt.ParseSeal(m.st.Seal)
	if err != nil {
		return m.latch(err)
	}
	if err := m.put(ctx, head, m.st.SealAt, s.Root, m.st.Seal); err != nil {
		return fmt.Errorf("log seal: %w", err)
	}
	return nil
}

// finishSeal brings a signed seal into the log and under the final checkpoint. If the key in force can sign no more, a seal that is
// not in the log is thrown away, the key replaced and another seal made; one that is in the log stays without its checkpoint:
// nothing may follow it.
func (m *Manager) finishSeal(ctx context.Context) error {
	ended := m.why("")
	able := ended == "" || ended == receipt.EndedRotated
	again := false
	if err := m.held(ctx, func(ctx context.Context, head Head) error {
		_, err := m.tree.Leaf(ctx, m.st.SealAt)
		if errors.Is(err, ErrNoLeaf) && !able {
			again = true
			return m.save(ctx, func(s *State) { s.Seal, s.SealAt = nil, 0 })
		}
		return m.putSeal(ctx, head)
	}); err != nil {
		return err
	}
	if again {
		return m.advance(ctx, "")
	}
	wait, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	err := m.tree.Published(wait, m.st.SealAt+1) // perhaps it was before a crash
	if err != nil && able {
		return fmt.Errorf("wait for the final checkpoint: %w", err)
	}
	if err != nil {
		m.cfg.Log.ErrorContext(ctx, "the log is sealed, but its daily key ended before the final checkpoint: what the last one does not cover stays without proof")
	}
	if err := m.save(ctx, func(s *State) {
		s.Retired, s.Prepared = s.Leftover(), nil
		s.Sealed, s.SealPublished = true, err == nil
		s.Sealing, s.Revoking = nil, nil
	}); err != nil {
		return err
	}
	m.cfg.Log.WarnContext(ctx, "log is sealed", "size", m.st.SealAt+1)
	return nil
}

// destroyRetired destroys the versions of keys that sign no more. One leaves the list only when the store has been seen to
// have no such private key.
func (m *Manager) destroyRetired(ctx context.Context) error {
	if m.dirty || len(m.st.Retired) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	var failed error
	for _, r := range m.st.Retired {
		if err := m.cfg.Store.Destroy(ctx, r.Label, r.ID); err != nil && !errors.Is(err, keys.ErrNotFound) {
			failed = fmt.Errorf("destroy key %s version %s: %w", r.Label, r.ID, err)
		}
	}
	listed := map[string]bool{} // labels: it may be another one now than when a version was made
	alive := map[Ref]bool{}
	var left []Ref
	for _, r := range m.st.Retired {
		if !listed[r.Label] {
			versions, err := m.versions(ctx, r.Label)
			if err != nil {
				return err
			}
			listed[r.Label] = true
			for _, v := range versions {
				alive[Ref{r.Label, v.ID}] = v.State != keys.Destroyed
			}
		}
		if alive[r] {
			left = append(left, r)
		}
	}
	if len(left) < len(m.st.Retired) {
		if err := m.save(ctx, func(s *State) { s.Retired = left }); err != nil {
			return err
		}
	}
	if failed == nil && len(left) > 0 {
		failed = fmt.Errorf("destroy key %s version %s: the store still lists it", left[0].Label, left[0].ID)
	}
	return failed
}
