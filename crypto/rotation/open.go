package rotation

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
)

var discard = slog.New(slog.DiscardHandler)

// wallSlack is how far the wall clock may be behind the log's time at a start and still count as not set back. Wall and monotonic
// time are two readings with a moment between them, and NTP slews the wall: the floor, which follows both, comes to stand a little
// ahead. It extends nothing, since key age is counted from the later of the two.
const wallSlack = 500 * time.Millisecond

func open(ctx context.Context, cfg Config) (*Manager, error) {
	m, err := newManager(cfg)
	if err != nil {
		return nil, err
	}
	s, err := cfg.Journal.Load(ctx)
	if err != nil {
		return nil, err
	}
	if cfg.OnlyPublic && (s == nil || s.Seal == nil) {
		return nil, errors.New("without keys only a sealed log can be opened, and this one is not sealed")
	}
	if s == nil {
		s = new(State)
	}
	if m.cfg.OnlyPublic || s.Sealed && cfg.Store == nil {
		m.cfg.OnlyPublic = true
		return m, m.adopt(s)
	}
	m.st = s
	cfg.Clock.raise(latest(s))
	if s.Sealed {
		return m, m.adopt(s) // what is left is to destroy the retired keys
	}
	if cfg.Identity == nil || cfg.Identity.Name() != cfg.Origin || cfg.Store == nil || cfg.Label == "" {
		return nil, errors.New("store, label and an identity key named after the origin are required")
	}
	// Durable floor and wall are compared before anything moves the floor.
	if cfg.Clock.Behind() > wallSlack && (s.Current != nil || s.Next != nil) {
		m.boot = distrust{receipt.EndedUntrusted, lastIndex(s)}
		m.cfg.Log.WarnContext(ctx, "the wall clock is behind the log's time: the daily key is replaced before anything is signed",
			"behind", cfg.Clock.Behind(), "log_time", cfg.Clock.Now())
	}
	if err := m.adopt(s); err != nil {
		return nil, err
	}
	if err := m.compare(ctx); err != nil {
		return nil, err
	}
	if m.st.Current == nil && m.st.Next == nil {
		if err := m.prepare(ctx); err != nil {
			return nil, err
		}
		if err := m.state(ctx, Head{Root: receipt.EmptyRoot}, ""); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// latest is the latest time that s shows.
func latest(s *State) time.Time {
	t := s.Floor
	for _, k := range []*Key{s.Current, s.Next} {
		if k != nil && k.NotBefore.After(t) {
			t = k.NotBefore
		}
	}
	return t
}

// lastIndex is the index of the last statement in s.
func lastIndex(s *State) uint64 {
	switch {
	case s.Next != nil:
		return s.Next.Index
	case s.Current != nil:
		return s.Current.Index
	}
	return 0
}

// compare finds out whether the store has gone past the state, and takes away what a crash left in the store.
//
// A version that the state does not know was made by a Create that a crash cut off from its note: then Loose counts it; or
// the store has gone on without this state, a copy from before. With Loose above 0, or a version prepared, both look the
// same: so the key in force is not used again, nor is that version. It costs a key change after a rare crash.
func (m *Manager) compare(ctx context.Context) error {
	versions, err := m.versions(ctx, m.cfg.Label)
	if err != nil {
		return err
	}
	s := m.st
	if s.Current == nil && s.Next == nil && s.Loose == 0 && s.Prepared == nil && s.Foreign == nil {
		// A new log. What the label holds already is another log's.
		if len(versions) == 0 {
			return nil
		}
		return m.save(ctx, func(s *State) {
			for _, v := range versions {
				s.Foreign = append(s.Foreign, v.ID)
			}
		})
	}
	unknown := unknownOf(s, versions)
	excess := uint64(len(unknown)) > s.Loose
	gone := s.Current != nil && m.gone(s.Current.Version, versions)
	barred := s.Current != nil && s.Distrust != "" && s.DistrustUpTo >= s.Current.Index // decided by an earlier Open
	if (excess || gone && !barred) && !m.cfg.ReplaceDailyKey {
		why := fmt.Sprintf("the store holds %d versions of key %q that this directory does not know (the first is %s)", len(unknown), m.cfg.Label, first(unknown))
		if gone && !barred {
			why = fmt.Sprintf("the store no longer holds version %s of key %q, the key in force", s.Current.ID, m.cfg.Label)
		}
		return fmt.Errorf("%w: %s; a directory restored from an earlier copy looks like this, and so does a label used by two logs; "+
			"begin a new state_dir; only if the log surely did not go on without this one, start once with --replace-daily-key", ErrOlderCopy, why)
	}
	why := ""
	switch {
	case s.Current == nil && s.Next == nil, barred && !excess && len(unknown) == 0:
	case gone && s.Next == nil:
		why = receipt.EndedLost
	case gone, len(unknown) > 0 || s.Prepared != nil:
		why = receipt.EndedUntrusted
	}
	if why == "" && len(unknown) == 0 && s.Prepared == nil {
		return nil
	}
	if why != "" {
		m.cfg.Log.WarnContext(ctx, "the state may be a copy from before: the daily key is replaced before anything is signed",
			"ended", why, "unknown_versions", len(unknown))
	}
	// A crash before this line finds the same again; after it the distrust is durable and the versions are on their way out.
	return m.save(ctx, func(s *State) {
		for _, v := range unknown {
			s.Retired = append(s.Retired, Ref{v.Label, v.ID})
		}
		s.Loose -= min(s.Loose, uint64(len(unknown)))
		if s.Prepared != nil {
			s.Retired, s.Prepared = append(s.Retired, s.Prepared.Ref), nil
		}
		if why != "" {
			s.Distrust, s.DistrustUpTo = why, lastIndex(s)
		}
	})
}

func (m *Manager) versions(ctx context.Context, label string) ([]keys.Version, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	versions, err := m.cfg.Store.Versions(ctx, label)
	if err != nil {
		return nil, fmt.Errorf("list versions of key %q: %w", label, err)
	}
	return versions, nil
}

// unknownOf returns the versions with a private key that s does not know. Destroyed ones say nothing: stores forget or keep
// them as they like, and those of past keys are not kept here.
func unknownOf(s *State, versions []keys.Version) (out []keys.Version) {
	for _, v := range versions {
		if v.State != keys.Destroyed && !s.knows(v.ID) {
			out = append(out, v)
		}
	}
	return out
}

// gone reports whether a version's private key is not in the store any more, or is another key.
func (m *Manager) gone(k Version, versions []keys.Version) bool {
	for _, v := range versions {
		if v.ID == k.ID && v.State != keys.Destroyed {
			vkey, err := keys.VKey(m.cfg.Origin, v.Public)
			return err != nil || vkey != k.VKey
		}
	}
	return true
}

func first(v []keys.Version) string {
	if len(v) == 0 {
		return "none"
	}
	return v[0].ID
}
