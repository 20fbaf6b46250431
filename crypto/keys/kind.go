package keys

import (
	"context"
	"errors"
)

// FailureKind sorts the failures of a store into the few kinds that metrics count and people act on.
type FailureKind string

// The kinds, and what a person does about each.
const (
	KindCredential  FailureKind = "credential"  // give it the right PIN or token, and restart
	KindDisabled    FailureKind = "disabled"    // the version will not sign again: another one has to
	KindNotFound    FailureKind = "not_found"   // the version is gone, or was never in this store
	KindThrottled   FailureKind = "throttled"   // ask less often, or raise the quota
	KindUnavailable FailureKind = "unavailable" // bring the store back; it is tried again by itself
	KindTimeout     FailureKind = "timeout"     // the store is slow, or the caller's time was too short
	KindOther       FailureKind = "other"       // read the error: trying again does not help as a rule
)

// FailureKinds returns every kind that Kind returns for an error, so that a metric has all its series from the start.
func FailureKinds() []FailureKind {
	return []FailureKind{KindCredential, KindDisabled, KindNotFound, KindThrottled, KindUnavailable, KindTimeout, KindOther}
}

// Kind returns the kind of an error of a Store or Signer, "" for nil. What a store said of itself goes before the time that
// ran out while it said so; a caller that gave up for reasons of its own (context.Canceled) is KindOther.
func Kind(err error) FailureKind {
	if err == nil {
		return ""
	}
	for _, k := range []struct {
		sentinel error
		kind     FailureKind
	}{
		{ErrCredential, KindCredential},
		{ErrDisabled, KindDisabled},
		{ErrNotFound, KindNotFound},
		{ErrThrottled, KindThrottled},
		{ErrUnavailable, KindUnavailable},
		{context.DeadlineExceeded, KindTimeout},
	} {
		if errors.Is(err, k.sentinel) {
			return k.kind
		}
	}
	return KindOther
}
