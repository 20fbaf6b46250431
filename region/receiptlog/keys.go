package receiptlog

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/rotation"
)

// MaxDailyAge is the longest a daily key may sign.
const MaxDailyAge = rotation.MaxAge

// keysMeta is where the state of the daily keys stands in the block store.
const keysMeta = "keys"

// keysPoll is how often the log looks whether its daily key is to be changed.
const keysPoll = time.Second

// KeyRecord is the public part of one daily key.
type KeyRecord = rotation.Record

// journal is the log as rotation.Journal: the state of the daily keys is kept in the block store, beside the blocks whose headers
// name them.
type journal struct{ l *Log }

// Load returns the state, nil when there is none yet.
func (j journal) Load(context.Context) (*rotation.State, error) {
	st, err := j.l.store.loadKeys()
	if err != nil || st == nil {
		return nil, err
	}
	return st, j.l.notePins(st)
}

// Save writes the state, and the statement of the key in force for those who look for it by its place, in one synced batch. After
// a fault it writes nothing: what the disk holds is then for the next start to find out.
//
// A crash before the commit leaves the old state, a crash after it the new one.
func (j journal) Save(_ context.Context, st *rotation.State) error {
	if err := j.l.faulted(); err != nil {
		return err
	}
	if err := j.l.store.saveKeys(st); err != nil {
		return err
	}
	return j.l.notePins(st)
}

// saveKeys writes the state of the daily keys. Durable on nil.
func (s *store) saveKeys(st *rotation.State) error {
	raw, err := st.Marshal()
	if err != nil {
		return fmt.Errorf("write daily keys: %w", err)
	}
	b := s.db.NewBatch()
	defer b.Close()
	err = b.Set(metaKey(keysMeta), raw, nil)
	if k := st.Current; k != nil {
		err = errors.Join(err, b.Set(key(kKey, k.Index), k.Statement, nil))
	}
	if err == nil {
		err = b.Commit(pebble.Sync)
	}
	if err != nil {
		return fmt.Errorf("write daily keys: %w", err)
	}
	return nil
}

// loadKeys reads the state of the daily keys, nil when there is none.
func (s *store) loadKeys() (*rotation.State, error) {
	raw, err := s.get(metaKey(keysMeta))
	if err != nil || raw == nil {
		return nil, err
	}
	st, err := rotation.ParseState(raw)
	if err != nil {
		return nil, fmt.Errorf("read block store: state %q is damaged: %w", keysMeta, err)
	}
	return st, nil
}

// statementAt finds the statement of the key that signs checkpoints of the given size: the last one below it.
func (s *store) statementAt(size uint64) (index uint64, leaf []byte, err error) {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{kKey}, UpperBound: key(kKey, size)})
	if err != nil {
		return 0, nil, fmt.Errorf("read key statements: %w", err)
	}
	if it.Last() {
		index, leaf = binary.BigEndian.Uint64(it.Key()[1:]), bytes.Clone(it.Value())
	}
	if err := errors.Join(it.Error(), it.Close()); err != nil {
		return 0, nil, fmt.Errorf("read key statements: %w", err)
	}
	if leaf == nil {
		return 0, nil, fmt.Errorf("the key statement below size %d is missing: run knhk fsck", size)
	}
	return index, leaf, nil
}

// notePins keeps what bundles are shown to be consistent with: one tree for each revocation, and the seal's.
func (l *Log) notePins(st *rotation.State) error {
	var pins []receipt.Pin
	for i, note := range st.Revoked {
		r, err := receipt.ParseRevocation(note)
		if err != nil {
			return fmt.Errorf("revocation %d: %w", i, err)
		}
		pins = append(pins, receipt.Pin{Size: r.Size, Root: r.Root})
	}
	if st.Seal != nil {
		s, err := receipt.ParseSeal(st.Seal)
		if err != nil {
			return fmt.Errorf("seal: %w", err)
		}
		pins = append(pins, receipt.Pin{Size: s.Size, Root: s.Root})
	}
	slices.SortFunc(pins, func(a, b receipt.Pin) int { return cmp.Compare(a.Size, b.Size) })
	pins = slices.Compact(pins)
	pins = pins[max(0, len(pins)-receipt.MaxPins):] // the latest bind the most
	l.pins.Store(&pins)
	return nil
}

// openKeys opens what keeps the daily keys. It runs before the transparency log is opened, which needs a signer.
func (l *Log) openKeys(ctx context.Context) error {
	cfg := rotation.Config{
		Origin: l.id.Origin, Store: l.cfg.Daily, Label: l.cfg.DailyLabel, Algorithm: l.cfg.DailyAlgorithm, Interval: l.cfg.DailyMaxAge,
		Journal: journal{l}, Clock: l.clock, SignTimeout: signTimeout, Log: l.log, Succeeds: l.cfg.Succeeds,
		ReplaceDailyKey: l.cfg.ReplaceDailyKey, OnlyPublic: l.readOnly,
	}
	if !l.readOnly {
		cfg.Identity = l.identity
	}
	var err error
	if l.keys, err = rotation.Open(ctx, cfg); err != nil {
		return fmt.Errorf("open daily keys: %w", err)
	}
	return nil
}

// runKeys keeps the daily key in order: about once a second it looks whether there is something to finish or to change.
func (l *Log) runKeys(ctx context.Context) error {
	tick := time.NewTicker(keysPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := l.keyMu.lock(ctx); err != nil {
			return nil
		}
		err := l.keys.Settle(ctx)
		l.keyMu.unlock()
		if err != nil && ctx.Err() == nil {
			l.log.WarnContext(ctx, "cannot keep the daily key in order, trying again", "error", err)
		}
	}
}

// changeKeys runs one change of the keys, alone.
func (l *Log) changeKeys(ctx context.Context, fn func(context.Context) error) error {
	if l.readOnly {
		return ErrSealed
	}
	if err := l.keyMu.lock(ctx); err != nil {
		return err
	}
	defer l.keyMu.unlock()
	if l.life.Err() != nil {
		return ErrStopping
	}
	if err := l.faulted(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(l.life, cancel)() // Close does not wait for a change: the next start goes on with it
	return fn(ctx)
}

// Keys says how the keys stand.
func (l *Log) Keys() rotation.Info { return l.keys.Info() }

// RotateKey replaces the daily key now: a new version is made and stated in the log, signed by the identity key and its
// predecessor, and signs from then on; the predecessor's private key is destroyed. Requests do not wait for it. When it returns nil
// a checkpoint under the new key is published. On an error the change may still come about by itself.
func (l *Log) RotateKey(ctx context.Context) (info rotation.Info, err error) {
	err = l.changeKeys(ctx, func(ctx context.Context) error {
		info, err = l.keys.Rotate(ctx)
		return err
	})
	return info, err
}

// RevokeKey revokes a daily key, the one in force when vkey is empty, which is then replaced first. It returns a note signed by the
// identity key: the last tree that the key signed and that this log stands by. Auditors give it to knhk verify.
func (l *Log) RevokeKey(ctx context.Context, vkey, reason string) (note []byte, err error) {
	err = l.changeKeys(ctx, func(ctx context.Context) error {
		note, err = l.keys.Revoke(ctx, vkey, reason)
		return err
	})
	return note, err
}

// Seal ends the log for ever, for the day its identity key is compromised: requests are refused, decisions without outcome get the
// outcome unknown, what is open is closed into a last block, and the seal becomes the last leaf, under a last checkpoint. It returns
// that leaf, which is a revocation too: auditors who are given it refuse all that stands beyond. Requests stay refused also when it
// fails: call it again. A seal that was begun is finished by the log itself, also over a restart.
func (l *Log) Seal(ctx context.Context, reason string) (leaf []byte, err error) {
	if l.readOnly {
		return l.Sealed(), nil
	}
	// Nothing ends for a seal that can never be made.
	if err := (&receipt.Seal{Origin: l.id.Origin, Size: 1, Time: l.clock.Now(), Reason: reason}).Validate(); err != nil {
		return nil, fmt.Errorf("seal log: %w", err)
	}
	err = l.changeKeys(ctx, func(ctx context.Context) error {
		if err := l.endRecords(ctx); err != nil {
			return err
		}
		leaf, err = l.keys.Seal(ctx, reason)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("seal log: %w", err)
	}
	return leaf, nil
}

// endRecords refuses what is new and closes everything that is there into last blocks. The caller holds keyMu.
//
// A crash here leaves a log that is not sealed: it goes on when it is started again, and must be sealed again.
func (l *Log) endRecords(ctx context.Context) error {
	if !l.latch(ErrSealed) && !errors.Is(l.Refusing(), ErrSealed) {
		return l.Refusing()
	}
	if l.ended.Load() {
		return nil
	}
	// A key that cannot vouch for the last block is replaced first.
	if err := l.keys.Settle(ctx); err != nil {
		return err
	}
	if err := l.expire(ctx, l.pending.before(l.clock.Now().Add(time.Hour)), "the log was sealed before the outcome was known"); err != nil {
		return err
	}
	if err := l.headerMu.lock(ctx); err != nil {
		return err
	}
	defer l.headerMu.unlock()
	// From here on Decide says of a record that it came too late. One that was appended before is in the block that is cut now.
	l.ended.Store(true)
	err := l.seal(ctx, receipt.HeaderFinal, headerExtra{clean: true})
	if err != nil {
		l.ended.Store(false)
	}
	return err
}

// Revocations returns the notes by which daily keys were revoked, oldest first.
func (l *Log) Revocations() [][]byte { return l.keys.Info().Revocations }

// Sealed returns the seal, the log's last leaf; nil while the log is open.
func (l *Log) Sealed() []byte { return l.keys.Info().Seal }

// VKeys lists the daily keys, oldest first.
func (l *Log) VKeys() []KeyRecord { return l.keys.Info().Keys }

// DailyKey returns the verifier key of the daily key in force and when it stops signing.
func (l *Log) DailyKey() (vkey string, expires time.Time) {
	info := l.keys.Info()
	return info.VKey, info.NotAfter
}

// keyText is the part of a verifier key that is the key itself.
func keyText(vkey string) string {
	_, rest, _ := strings.Cut(vkey, "+")
	_, text, _ := strings.Cut(rest, "+")
	return text
}

// checkSuccession says whether the log may be, and was begun as, the successor that the configuration names.
func (l *Log) checkSuccession() error {
	want := l.cfg.Succeeds
	if want == nil {
		return nil
	}
	if keyText(want.Identity) == keyText(l.id.Identity) {
		return fmt.Errorf("open log: keys.identity is the identity key of %s, which was sealed because nobody can rely on it any more: "+
			"a successor needs an identity key of its own", want.Origin)
	}
	leaf, err := l.store.get(key(kKey, 0))
	if err != nil || leaf == nil {
		return err // a new log: its first statement will say so
	}
	first, err := receipt.ParseKeyStatement(leaf)
	if err != nil {
		return fmt.Errorf("open log: key statement 0: %w", err)
	}
	if first.Succeeds == nil || *first.Succeeds != *want {
		return fmt.Errorf("open log: succeeds names %s at size %d, but this log was not begun as its successor: "+
			"give the successor a state_dir of its own, or take succeeds out", want.Origin, want.Size)
	}
	return nil
}
