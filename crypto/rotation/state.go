package rotation

import (
	"slices"
	"time"

	"github.com/knhk/sidecar/crypto/receipt"
)

// Ref names a key version in the store.
type Ref struct {
	Label string `json:"label"`
	ID    string `json:"id"`
}

// Version is a key version and its public key.
type Version struct {
	Ref
	VKey string `json:"vkey"`
}

// Key is a daily key with its statement. The statement's bytes are kept before they go to the log, so that a crash adds the
// same bytes again.
type Key struct {
	Version
	NotBefore time.Time    `json:"not_before"`
	NotAfter  time.Time    `json:"not_after"`
	Index     uint64       `json:"index"`           // of the statement; the key signs sizes above it
	Root      receipt.Hash `json:"root"`            // of the tree of size Index
	Ended     string       `json:"ended,omitempty"` // why its predecessor ended
	Statement []byte       `json:"statement"`       // the leaf
}

// Past is a key that is no longer in force. It is kept for ever: a few hundred bytes a day.
type Past struct {
	VKey      string       `json:"vkey"`
	NotBefore time.Time    `json:"not_before"`
	NotAfter  time.Time    `json:"not_after"`
	Index     uint64       `json:"index"`
	LastSize  uint64       `json:"last_size"` // index of its successor's statement
	LastRoot  receipt.Hash `json:"last_root"`
	Ended     string       `json:"ended"`
}

// Asked is a revocation or a seal that was asked for and is not finished.
type Asked struct {
	VKey   string    `json:"vkey,omitempty"` // of the key to be revoked
	Reason string    `json:"reason"`
	Time   time.Time `json:"time"`
}

// State is all that the package keeps. Zero is the state of a new log. Package rotation alone changes it, and never in
// place: a change is a new State.
type State struct {
	Floor         time.Time `json:"floor"`                   // the clock when this was saved
	Current       *Key      `json:"current,omitempty"`       // in force; nil before the first statement is in the log
	Next          *Key      `json:"next,omitempty"`          // stated, perhaps in the log already; no header is made until it is in force
	Prepared      *Version  `json:"prepared,omitempty"`      // made, not stated
	Loose         uint64    `json:"loose,omitzero"`          // calls of Store.Create that were begun and may have made a version not noted here
	LooseAt       time.Time `json:"loose_at,omitzero"`       // of the last one
	Distrust      string    `json:"distrust,omitempty"`      // why keys may not sign any more: receipt.EndedLost or EndedUntrusted
	DistrustUpTo  uint64    `json:"distrust_up_to,omitzero"` // keys with statements up to this index; a later key ends it
	Foreign       []string  `json:"foreign,omitempty"`       // ids of the label that were there before the log
	Retired       []Ref     `json:"retired,omitempty"`       // versions still to be destroyed
	Past          []Past    `json:"past,omitempty"`          // in order of the log
	Revoking      *Asked    `json:"revoking,omitempty"`
	Revoked       [][]byte  `json:"revoked,omitempty"` // revocations: signed notes
	Sealing       *Asked    `json:"sealing,omitempty"`
	Seal          []byte    `json:"seal,omitempty"`          // the seal's leaf, perhaps in the log already
	SealAt        uint64    `json:"seal_at,omitzero"`        // its index
	Sealed        bool      `json:"sealed,omitzero"`         // the seal stands in the log; nothing is signed any more
	SealPublished bool      `json:"seal_published,omitzero"` // the final checkpoint covers it
}

// Records lists the statements of the log in order: those of keys that ended, then the one in force.
func (s *State) Records() []Record {
	revoked := map[string]bool{}
	for _, n := range s.Revoked {
		if r, err := receipt.ParseRevocation(n); err == nil {
			revoked[r.Key] = true
		}
	}
	var out []Record
	for _, p := range s.Past {
		out = append(out, Record{
			VKey: p.VKey, NotBefore: p.NotBefore, NotAfter: p.NotAfter, Index: p.Index, FirstSize: p.Index,
			LastSize: p.LastSize, LastRoot: p.LastRoot, Ended: p.Ended, Revoked: revoked[p.VKey],
		})
	}
	if k := s.Current; k != nil {
		r := Record{VKey: k.VKey, NotBefore: k.NotBefore, NotAfter: k.NotAfter, Index: k.Index, FirstSize: k.Index}
		if s.Sealed {
			r.LastSize = s.SealAt + 1
		}
		out = append(out, r)
	}
	return out
}

// Leftover lists the versions that the store may still hold of a log that has ended in its seal.
func (s *State) Leftover() []Ref {
	out := slices.Clone(s.Retired)
	if s.Sealed {
		return out
	}
	if s.Current != nil {
		out = append(out, s.Current.Ref)
	}
	if s.Prepared != nil {
		out = append(out, s.Prepared.Ref)
	}
	return out
}

// clone copies s as deep as it is changed.
func (s *State) clone() *State {
	c := *s
	// Slices are appended to or filtered into new ones; a full capacity keeps append from writing into the old one.
	c.Foreign = s.Foreign[:len(s.Foreign):len(s.Foreign)]
	c.Retired = s.Retired[:len(s.Retired):len(s.Retired)]
	c.Past = s.Past[:len(s.Past):len(s.Past)]
	c.Revoked = s.Revoked[:len(s.Revoked):len(s.Revoked)]
	return &c
}

// knows reports whether a version of the store is one that the state accounts for.
func (s *State) knows(id string) bool {
	for _, f := range s.Foreign {
		if f == id {
			return true
		}
	}
	for _, r := range s.Retired {
		if r.ID == id {
			return true
		}
	}
	return s.Current != nil && s.Current.ID == id || s.Next != nil && s.Next.ID == id || s.Prepared != nil && s.Prepared.ID == id
}
