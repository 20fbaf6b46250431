package receiptlog

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"golang.org/x/mod/sumdb/note"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/region/wal"
)

// Refusing says why Decide refuses new decisions; nil when it takes them.
func (l *Log) Refusing() error {
	if p := l.refusing.Load(); p != nil {
		return *p
	}
	return nil
}

// refuse makes Decide refuse for a reason that may pass; a reason that is there already stays.
func (l *Log) refuse(err error) bool { return l.refusing.CompareAndSwap(nil, &err) }

// latch makes Decide refuse for good. A fault is never overwritten: only a restart, which audits the state, ends it. Neither is a
// seal, but by a fault.
func (l *Log) latch(err error) bool {
	for {
		cur := l.refusing.Load()
		if cur != nil && (errors.Is(*cur, ErrUnavailable) || errors.Is(*cur, ErrSealed) && !errors.Is(err, ErrUnavailable)) {
			return false
		}
		if l.refusing.CompareAndSwap(cur, &err) {
			return true
		}
	}
}

// Stop makes Decide refuse with ErrStopping; outcomes are still taken. The first step of a shutdown.
func (l *Log) Stop() { l.latch(ErrStopping) }

// Level of certainty that Decide waits for.
type Level = wal.Level

// Decide records a decision and returns when it has reached the level. d gets its ID, Nonce, Ordinal, Origin, Time and
// commitment here; req is the evidence behind the commitment. On an error nothing may go on: the decision may or may not
// be in the log: the caller then reports an Outcome for d.ID that says the request was refused after all.
func (l *Log) Decide(ctx context.Context, level Level, d *receipt.Decision, req *receipt.Request) error {
	if err := l.Refusing(); err != nil {
		return err
	}
	n := len(req.Method) + len(req.Scheme) + len(req.Authority) + len(req.Path) + len(req.RequestID) + len(req.Source)
	if n > maxRequestBytes {
		return fmt.Errorf("%w: %d bytes of method, host, path and request id, at most %d", ErrTooLarge, n, maxRequestBytes)
	}
	var r [58]byte
	if _, err := rand.Read(r[:]); err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	// The log's own clock never goes back, and blocks are dated by it: lookups rely on the id's time.
	now := l.clock.Now()
	id, uuid := receipt.NewID(now, (*[10]byte)(r[48:]), l.cfg.Instance)
	d.Origin, d.Time = l.id.Origin, now
	copy(d.Nonce[:], r[:16])
	salt := [32]byte(r[16:48])
	d.Request = req.Commit(&salt)
	ev := receipt.EvidenceFor(id, &salt, req)
	d.ID = id
	// A record that cannot be read back, or that the WAL has no room for, must not get as far as the block.
	if err := cmp.Or(d.Validate(), l.fits(d, ev, n)); err != nil {
		d.ID = ""
		return err
	}
	t, err := l.wal.Append(level, false, func(seq uint64) []byte {
		d.Ordinal = seq
		l.mu.Lock()
		defer l.mu.Unlock()
		entry, ref := l.open.addDecision(d, uuid, ev, req.RequestID)
		l.pending.put(uuid, ref)
		return entry
	})
	if err != nil {
		return l.walError(err)
	}
	l.decisions.Add(1)
	l.publish(func() Event { return Event{ID: id, Leaf: receipt.AppendDecision(nil, d)} })
	if err := t.Wait(ctx); err != nil {
		return l.walError(err)
	}
	// A log that was sealed meanwhile may have closed its last block before this record came: nobody would ever prove it.
	if l.ended.Load() {
		return cmp.Or(l.Refusing(), ErrSealed)
	}
	return nil
}

// surelyFits bounds what JSON can make of a record with n bytes of text: true means that it can be written and read back.
func (l *Log) surelyFits(n int) bool {
	const fixed, escaped = 2048, 6 // members of bounded length; bytes one byte can become
	return fixed+escaped*n <= min(receipt.MaxLeaf, l.maxRecord)
}

// fits says whether a decision and its evidence, which holds n bytes, can be written and read back. Nearly always the bound settles
// it; else they are encoded to see.
func (l *Log) fits(d *receipt.Decision, ev *receipt.Evidence, n int) error {
	n += len(d.Tenant) + len(d.Rule) + len(d.Authz) + len(d.Reason) + len(d.SPIFFEID) + len(d.Route) + len(d.Cluster) + len(d.Origin) + len(d.ID)
	if l.surelyFits(n) {
		return nil
	}
	leaf, evidence := len(receipt.AppendDecision(nil, d))+20, len(receipt.AppendEvidence(nil, ev)) // 20: the ordinal is not set yet
	if leaf > receipt.MaxLeaf || evidence > receipt.MaxEvidence || leaf+evidence+walOverhead > l.maxRecord {
		return fmt.Errorf("%w: a record of %d bytes with %d bytes of evidence", ErrTooLarge, leaf, evidence)
	}
	return nil
}

// fieldRequestID is the evidence field that holds x-request-id; receipts can be found by it.
const fieldRequestID = "request_id"

func (l *Log) walError(err error) error {
	switch {
	case errors.Is(err, wal.ErrFull):
		return fmt.Errorf("%w: %w", ErrFull, err)
	case errors.Is(err, wal.ErrClosed):
		return fmt.Errorf("%w: %w", ErrStopping, err)
	case errors.Is(err, wal.ErrFailed):
		l.fail(err)
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

// fail latches: after a failed write or sync nothing is recorded, sealed or signed until a restart has re-audited the state.
func (l *Log) fail(err error) {
	if !l.latch(fmt.Errorf("%w until restarted: %w", ErrUnavailable, err)) {
		return
	}
	l.log.Error("receipt log stopped: nothing is recorded or signed until a restart has checked the state", "error", err)
}

// faulted returns the fault that has stopped the log, nil while there is none.
func (l *Log) faulted() error {
	if p := l.refusing.Load(); p != nil && errors.Is(*p, ErrUnavailable) {
		return *p
	}
	return nil
}

// guardedSigner signs nothing once the log has failed: what the disk holds is then not known until a restart has audited it.
type guardedSigner struct {
	note.Signer
	faulted func() error
}

func (s guardedSigner) Sign(msg []byte) ([]byte, error) {
	if err := s.faulted(); err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	return s.Signer.Sign(msg)
}

// Outcome records what became of the transaction id. It does not wait for the disk: the record goes out with the next decision
// that does, or within 10 ms. A process that dies before takes it along, and its decision gets the outcome
// "unknown" at the restart. ErrNotFound when this replica knows no
// such decision; a second outcome for one decision is dropped and counted, unless the first was "unknown".
func (l *Log) Outcome(ctx context.Context, id string, o *policy.Outcome) error {
	uuid, instance, err := receipt.ParseID(id)
	if err != nil {
		return err
	}
	if instance != l.cfg.Instance {
		l.counts.foreignOutcomes.Add(1)
		return fmt.Errorf("%w here: %s was recorded by instance %q", ErrNotFound, id, instance)
	}
	if err := l.inTime(id); err != nil {
		return err
	}
	ref, ok := l.pending.claim(uuid)
	if ok {
		if err = l.writeOutcome(ctx, id, uuid, o, ref, false); err != nil {
			l.pending.putBack(uuid, ref)
			return err
		}
		return l.inTime(id)
	}
	// Rare from here on: a repetition, a late outcome, or one that expire has just claimed. One at a time.
	l.lateMu.Lock()
	defer l.lateMu.Unlock()
	d, outcomes, err := l.find(uuid)
	switch {
	case err != nil:
		return err
	case d == nil:
		l.counts.foreignOutcomes.Add(1)
		return fmt.Errorf("record outcome of %s: %w", id, ErrNotFound)
	case len(outcomes) != 1 || !outcomes[0].unknown():
		l.counts.duplicateOutcomes.Add(1)
		return nil
	}
	l.counts.lateOutcomes.Add(1)
	if err := l.writeOutcome(ctx, id, uuid, o, pendingRef{late: true}, true); err != nil {
		return err
	}
	return l.inTime(id)
}

// inTime fails once the last block of a log that is being sealed is cut: an outcome that was appended before may or may not be in it.
func (l *Log) inTime(id string) error {
	if l.ended.Load() {
		return fmt.Errorf("record outcome of %s: %w", id, ErrSealed)
	}
	return nil
}

func (l *Log) writeOutcome(_ context.Context, id string, uuid [16]byte, o *policy.Outcome, ref pendingRef, late bool) error {
	rec := receipt.Outcome{
		ID: id, Origin: l.id.Origin, Time: l.clock.Now(), Source: o.Source, Result: string(o.Result), Status: uint32(o.Status),
		UpstreamStatus: uint32(o.UpstreamStatus), Flags: o.Flags, Details: o.Details, Cluster: o.Cluster, UpstreamHost: o.UpstreamHost,
		Attempts: o.Attempts, BytesIn: o.BytesIn, BytesOut: o.BytesOut, DurationNS: uint64(max(o.Duration, 0)), CacheStatus: o.CacheStatus,
		Late: late,
	}
	if _, err := rand.Read(rec.Nonce[:]); err != nil {
		return fmt.Errorf("record outcome: %w", err)
	}
	if err := rec.Validate(); err != nil {
		return fmt.Errorf("record outcome of %s: %w", id, err)
	}
	if n := len(o.Flags) + len(o.Details) + len(o.Cluster) + len(o.UpstreamHost) + len(o.CacheStatus) + len(rec.Origin); !l.surelyFits(n) {
		return fmt.Errorf("record outcome of %s: %w: %d bytes of text", id, ErrTooLarge, n)
	}
	_, err := l.wal.Append(wal.Queued, true, func(seq uint64) []byte {
		rec.Ordinal = seq
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.open.addOutcome(&rec, uuid, ref)
	})
	if err != nil {
		return l.walError(err)
	}
	l.publish(func() Event { return Event{ID: id, Leaf: receipt.AppendOutcome(nil, &rec)} })
	return nil
}
