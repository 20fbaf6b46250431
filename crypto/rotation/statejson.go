package rotation

import (
	"bytes"
	"encoding/json/v2"
	"errors"
	"fmt"
	"time"

	"github.com/knhk/sidecar/crypto/receipt"
)

// maxState bounds what ParseState reads: a hundred years of daily keys.
const maxState = 64 << 20

// Marshal returns the JSON form, which ParseState reads.
func (s *State) Marshal() ([]byte, error) {
	b, err := json.Marshal(s, json.Deterministic(true))
	if err != nil {
		return nil, fmt.Errorf("rotation state: %w", err)
	}
	return b, nil
}

// ParseState reads what Marshal writes, strictly: unknown or repeated members, another spelling, anything after it and
// states that cannot come about are errors.
func ParseState(b []byte) (*State, error) {
	if len(b) > maxState {
		return nil, fmt.Errorf("parse rotation state: %d bytes: at most %d are read", len(b), maxState)
	}
	s := new(State)
	if err := json.Unmarshal(b, s, json.RejectUnknownMembers(true)); err != nil {
		return nil, fmt.Errorf("parse rotation state: %w", err)
	}
	if err := s.validate(); err != nil {
		return nil, fmt.Errorf("parse rotation state: %w", err)
	}
	again, err := s.Marshal()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, b) {
		return nil, errors.New("parse rotation state: not in the form in which it is written")
	}
	return s, nil
}

// validate names what cannot come about.
func (s *State) validate() error {
	at := uint64(0) // where the next statement of the chain must stand
	for i, p := range s.Past {
		if p.Index != at || p.LastSize <= p.Index {
			return fmt.Errorf("past key %d: signs sizes above %d up to %d, want from %d on", i, p.Index, p.LastSize, at)
		}
		if err := validTimes(p.NotBefore, p.NotAfter); err != nil {
			return fmt.Errorf("past key %d: %w", i, err)
		}
		at = p.LastSize
	}
	switch {
	case s.Current == nil && len(s.Past) > 0:
		return errors.New("keys have ended and none is in force")
	case s.Next != nil && s.Current != nil && s.Next.Index <= s.Current.Index:
		return errors.New("the next key is stated below the one in force")
	case s.Next != nil && s.Current == nil && s.Next.Index != 0:
		return errors.New("the first key is not stated at index 0")
	case s.Current != nil && s.Current.Index != at:
		return fmt.Errorf("the key in force is stated at %d, want %d", s.Current.Index, at)
	case s.Seal != nil && (s.Current == nil || s.SealAt <= s.Current.Index || s.Next != nil):
		return errors.New("the seal does not follow the key in force")
	case s.Seal == nil && (s.SealAt != 0 || s.Sealed), !s.Sealed && s.SealPublished:
		return errors.New("sealed without a seal")
	case s.Distrust != "" && s.Distrust != receipt.EndedLost && s.Distrust != receipt.EndedUntrusted:
		return fmt.Errorf("distrust is %.32q", s.Distrust)
	}
	for _, k := range []*Key{s.Current, s.Next} {
		if k == nil {
			continue
		}
		ks, err := receipt.ParseKeyStatement(k.Statement)
		if err != nil {
			return err
		}
		if ks.Key != k.VKey || ks.FirstSize != k.Index || ks.FirstRoot != k.Root || ks.Ended != k.Ended ||
			!ks.NotBefore.Equal(k.NotBefore) || !ks.NotAfter.Equal(k.NotAfter) {
			return fmt.Errorf("key %.120s is not as its statement says", k.VKey)
		}
	}
	for i, n := range s.Revoked {
		if _, err := receipt.ParseRevocation(n); err != nil {
			return fmt.Errorf("revocation %d: %w", i, err)
		}
	}
	if s.Seal != nil {
		if _, err := receipt.ParseSeal(s.Seal); err != nil {
			return err
		}
	}
	return nil
}

func validTimes(notBefore, notAfter time.Time) error {
	if age := notAfter.Sub(notBefore); age <= 0 || age > MaxAge {
		return fmt.Errorf("ends %v after it begins", age)
	}
	return nil
}
