package rotation

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
)

// MaxAge is the longest a daily key may sign.
const MaxAge = 24 * time.Hour

// Errors that callers branch on.
var (
	// ErrExpired: the key in force is past its age. Nothing extends it but a new key.
	ErrExpired = errors.New("daily key is past its age and refuses to sign")
	// ErrRange: the checkpoint's size is not one that the key in force signs.
	ErrRange = errors.New("checkpoint is not in the range of the daily key")
	// ErrSealed: the log is sealed; nothing is signed any more.
	ErrSealed = errors.New("log is sealed")
	// ErrUntrusted: the key in force may not sign before it is replaced: the wall clock is behind the log's time, or the state
	// may be a copy from before.
	ErrUntrusted = errors.New("daily key must be replaced before anything is signed")
	// ErrOlderCopy is wrapped by Open's refusal of a state that the key store has gone past; Config.ReplaceDailyKey is the way out.
	ErrOlderCopy = errors.New("state is older than the key store")
	// ErrNoLeaf is returned by Tree.Leaf beyond the end of the tree.
	ErrNoLeaf = errors.New("no such leaf")
	// ErrUnknownKey: Revoke was asked for a key that was never in force in this log.
	ErrUnknownKey = errors.New("no such daily key in this log")
)

// Head is a tree: its size and root.
type Head struct {
	Size uint64
	Root receipt.Hash
}

// Journal keeps the state, beside the log. Calls come one at a time.
type Journal interface {
	// Load returns the state that was saved last, nil when there is none.
	Load(ctx context.Context) (*State, error)
	// Save replaces the state. It is durable on nil; on an error it may or may not have been saved, and the same or a newer
	// state is saved again before anything else is done. s must not be kept: encode it (State.Marshal, ParseState).
	Save(ctx context.Context, s *State) error
}

// Tree is the transparency log. Hold and Put come one at a time.
type Tree interface {
	// Hold stops new leaves. When it returns, every committed header is in the tree, nothing is on its way into it (an
	// earlier Put that failed included), and no header is made until release, which must be called once; head is the
	// integrated tree. It gives up with ctx.
	Hold(ctx context.Context) (head Head, release func(), err error)
	// Put adds a leaf, only while held, and returns its index once it is integrated (durable, not yet signed). On an error it
	// may have been added, or be on its way still: see Hold.
	Put(ctx context.Context, leaf []byte) (index uint64, err error)
	// Leaf returns an integrated leaf; ErrNoLeaf beyond the end.
	Leaf(ctx context.Context, index uint64) ([]byte, error)
	// Published waits until a signed checkpoint of at least size is readable. It gives up with ctx. It is called while held
	// and while not; checkpoints must go on being made in both.
	Published(ctx context.Context, size uint64) error
}

// Config is what a Manager needs. All fields are required unless they say otherwise.
type Config struct {
	Origin    string         // of the log, with its log id
	Identity  note.Signer    // signs statements, revocations and seals; named after Origin. Whoever holds it can fork the log
	Store     keys.Store     // holds the daily keys
	Label     string         // of the daily keys in Store; belongs to this log alone
	Algorithm keys.Algorithm // of new keys
	Interval  time.Duration  // age at which a key refuses to sign; (0, MaxAge]
	Journal   Journal
	Clock     *Clock

	SignTimeout time.Duration  // bounds each signature; default 5 s
	Rand        func() float64 // jitter, in [0, 1); default math/rand/v2
	Log         *slog.Logger   // default none

	// Succeeds names the sealed log that this one follows. Only looked at when the first key is stated.
	Succeeds *receipt.Quote
	// ReplaceDailyKey starts in spite of ErrOlderCopy: the key in force signs nothing more and is replaced at once, and
	// versions of the label that the state does not know are destroyed. Without a reason to refuse it does nothing.
	ReplaceDailyKey bool
	// OnlyPublic opens the state of a log for reading that is known to end in its seal, under the final checkpoint: Identity and
	// Store may be nil and nothing is ever signed.
	OnlyPublic bool
}

// Phase says in one word how the key in force stands.
type Phase string

// The phases, from good to bad.
const (
	PhaseFresh     Phase = "fresh"     // nothing to do
	PhaseDue       Phase = "due"       // past two thirds of the interval: it is being replaced
	PhaseChanging  Phase = "changing"  // its successor is stated; no header is made until that stands in the log
	PhaseWarn      Phase = "warn"      // past 18/24 of the interval
	PhaseAlarm     Phase = "alarm"     // past 20/24
	PhaseUntrusted Phase = "untrusted" // may not sign before it is replaced
	PhaseLost      Phase = "lost"      // the store has no such key any more: it is being replaced
	PhaseExpired   Phase = "expired"   // refuses to sign
	PhaseSealed    Phase = "sealed"    // the log has ended
	PhaseFailed    Phase = "failed"    // something that must not happen was found; nothing is signed until restart
)

// Record is the public part of one key statement of the log.
type Record struct {
	VKey                string
	NotBefore, NotAfter time.Time
	Index               uint64       // of the statement in the log
	FirstSize           uint64       // the key signs sizes above it; equal to Index
	LastSize            uint64       // and up to it; 0 while the key is in force; with a seal, the tree that ends in it
	LastRoot            receipt.Hash // root of the tree of LastSize, of a key that has a successor
	Ended               string       // why it ended (receipt.Ended*); empty while it is in force
	Revoked             bool
}

// Info is what people and metrics are told. Nothing in it is secret.
type Info struct {
	VKey                string // key in force; empty before the first one is
	Index               uint64
	NotBefore, NotAfter time.Time
	Age, Left           time.Duration // Left is negative when past NotAfter
	Phase               Phase
	Due                 time.Time         // when it will be replaced
	NextAttempt         time.Time         // of a change that failed; zero when none is waiting
	LastError           string            // of the last attempt; empty after one that succeeded
	Failures            map[string]uint64 // since Open, by keys.Kind, or "expired": attempts and signatures refused for age
	Changes             map[string]uint64 // key changes since Open by why the predecessor ended; "" for the first key
	Retired             []Ref             // versions that are not known to be destroyed yet
	Keys                []Record          // all statements in the log, in order
	Revocations         [][]byte          // signed notes, in order of time
	Revoking            string            // key whose revocation was asked for and is still to be made; Settle goes on with it
	Sealing             bool              // a seal was asked for and is still to be made; Settle goes on with it
	Seal                []byte            // leaf; nil while the log is not sealed
	SealPublished       bool              // the final checkpoint covers the seal
}
