package receipt_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/receipt/receipttest"
	"golang.org/x/mod/sumdb/note"
)

// walk audits all of l and returns what is wrong, and the keys that came out of force.
func walk(t *testing.T, l *receipttest.Log) (a *receipt.KeyAudit, wrong []error, used []receipt.KeyUse) {
	t.Helper()
	a = auditOf(t, l)
	a.Done = func(u receipt.KeyUse) { used = append(used, u) }
	for i, leaf := range l.Leaves {
		var root receipt.Hash
		if receipt.RootNeeded(leaf) {
			root = l.Root(t, i)
		}
		if err := a.Leaf(uint64(i), root, leaf); err != nil {
			wrong = append(wrong, err)
		}
	}
	return a, wrong, used
}

var everyEnd = []string{receipt.EndedRotated, receipt.EndedExpired, receipt.EndedUntrusted, receipt.EndedLost, receipt.EndedRevoked}

// TestKeyAuditHonest has logs with 50 key changes of every kind, sealed or not: nothing is wrong with them, and what the audit
// tells of their keys is so.
func TestKeyAuditHonest(t *testing.T) {
	for seed := range uint64(6) {
		r := rand.New(rand.NewPCG(300, seed))
		l := receipttest.New(t, testOrigin)
		for n := range 50 {
			work(t, l, r)
			l.RotateAs(t, everyEnd[n%len(everyEnd)])
			if r.IntN(4) == 0 {
				l.RotateAs(t, everyEnd[r.IntN(len(everyEnd))]) // two changes and nothing between them
			}
		}
		work(t, l, r)
		if seed%2 == 0 {
			l.SealLog(t, "over")
		}
		a, wrong, used := walk(t, l)
		if len(wrong) != 0 {
			t.Fatalf("seed %d: %d wrong, first %v", seed, len(wrong), wrong[0])
		}
		current, open := a.Current()
		if open != (seed%2 == 1) || open != (a.Seal() == nil) {
			t.Fatalf("seed %d: seal %+v, a key in force: %v", seed, a.Seal(), open)
		}
		if open {
			used = append(used, current)
		}
		headers := uint64(0)
		for i, u := range used {
			last := uint64(len(l.Leaves)) // of the last key
			if i+1 < len(used) {
				last = uint64(l.Statements[i+1])
			} else if open {
				last = 0
			}
			if u.Index != uint64(l.Statements[i]) || u.Key != l.Daily[i].VKey || u.LastSize != last ||
				u.Headers > 0 && (u.First.Before(u.NotBefore) || u.Last.Before(u.First) || u.Last.After(u.NotAfter)) {
				t.Fatalf("seed %d: key %d: %+v", seed, i, u)
			}
			headers += u.Headers
		}
		if len(used) != len(l.Daily) || a.Statements() != uint64(len(l.Daily)) || a.Headers() != headers || headers != uint64(len(l.Blocks)) ||
			a.Size() != uint64(len(l.Leaves)) {
			t.Fatalf("seed %d: %d keys, %d statements, %d headers", seed, len(used), a.Statements(), a.Headers())
		}
	}
}

// damage is a way to damage a log; at is where the first fault must be found.
type damage struct {
	name, want string
	make       func(t *testing.T, r *rand.Rand, l *receipttest.Log) (damaged *receipttest.Log, at int)
}

// rewrite takes the leaves of l with one changed; nil leaves it out.
func rewrite(t *testing.T, l *receipttest.Log, index int, leaf []byte) *receipttest.Log {
	t.Helper()
	d := l.Fork(t, index)
	if leaf != nil {
		d.Append(t, leaf)
	}
	for _, leaf := range l.Leaves[index+1:] {
		d.Append(t, leaf)
	}
	return d
}

// anyOf picks a header or statement by chance, never the first two leaves nor one after the last header.
func anyOf(r *rand.Rand, l *receipttest.Log, prefix string) int {
	for {
		if i := 2 + r.IntN(len(l.Leaves)-2); strings.HasPrefix(string(l.Leaves[i]), prefix) {
			return i
		}
	}
}

// header damages one header.
func headerDamage(name, want string, change func(r *rand.Rand, l *receipttest.Log, h *receipt.Header)) damage {
	return damage{name, want, func(t *testing.T, r *rand.Rand, l *receipttest.Log) (*receipttest.Log, int) {
		i := anyOf(r, l, receipt.HeaderPrefix)
		h, err := receipt.ParseHeader(l.Leaves[i])
		if err != nil {
			t.Fatal(err)
		}
		change(r, l, h)
		return rewrite(t, l, i, receipt.AppendHeader(nil, h)), i
	}}
}

// statementDamage damages one statement, which is signed anew as change says: by the log's own keys if it returns nil.
func statementDamage(name, want string, change func(r *rand.Rand, l *receipttest.Log, n int, ks *receipt.KeyStatement) []note.Signer) damage {
	return damage{name, want, func(t *testing.T, r *rand.Rand, l *receipttest.Log) (*receipttest.Log, int) {
		n := 1 + r.IntN(len(l.Statements)-1)
		i := l.Statements[n]
		ks, err := receipt.ParseKeyStatement(l.Leaves[i])
		if err != nil {
			t.Fatal(err)
		}
		signers := change(r, l, n, ks)
		if signers == nil {
			signers = []note.Signer{l.Identity}
			if ks.Ended == receipt.EndedRotated {
				signers = append(signers, l.Daily[n-1])
			}
		}
		leaf, err := note.Sign(&note.Note{Text: receipt.KeyText(ks)}, signers...)
		if err != nil {
			t.Fatal(err)
		}
		return rewrite(t, l, i, leaf), i
	}}
}

// sealDamage adds a wrong seal.
func sealDamage(name, want string, change func(r *rand.Rand, l *receipttest.Log, s *receipt.Seal) []note.Signer) damage {
	return damage{name, want, func(t *testing.T, r *rand.Rand, l *receipttest.Log) (*receipttest.Log, int) {
		n := len(l.Leaves)
		s := &receipt.Seal{Origin: l.Origin, Key: uint64(l.Statements[len(l.Statements)-1]), Size: uint64(n), Root: l.Root(t, n), Time: l.Now}
		leaf, err := note.Sign(&note.Note{Text: receipt.SealText(s)}, change(r, l, s)...)
		if err == nil {
			leaf, err = note.Sign(&note.Note{Text: receipt.SealText(s)}, change(r, l, s)...)
		}
		if err != nil {
			t.Fatal(err)
		}
		d := l.Fork(t, n)
		d.Append(t, leaf)
		return d, n
	}}
}

var damages = []damage{
	headerDamage("a header under another statement", "a header that names the key statement at", func(r *rand.Rand, l *receipttest.Log, h *receipt.Header) {
		h.Key += 1 + r.Uint64N(50)
	}),
	headerDamage("a header under the statement before", "a header that names the key statement at", func(r *rand.Rand, l *receipttest.Log, h *receipt.Header) {
		for _, s := range l.Statements {
			if uint64(s) != h.Key && (r.IntN(2) == 0 || s == l.Statements[len(l.Statements)-1]) {
				h.Key = uint64(s)
				return
			}
		}
		h.Key = uint64(l.Statements[0])
	}),
	headerDamage("a header after its key's end", "after the daily key's end", func(r *rand.Rand, l *receipttest.Log, h *receipt.Header) {
		h.Time = l.Now.Add(receipt.MaxKeyAge + time.Duration(r.Int64N(1e12)))
	}),
	headerDamage("a header whose time goes back", "before that of a header before it", func(r *rand.Rand, l *receipttest.Log, h *receipt.Header) {
		h.Time = beginning.Add(time.Duration(r.Int64N(1e6)))
	}),
	headerDamage("a header of another log", "a header for origin", func(r *rand.Rand, l *receipttest.Log, h *receipt.Header) { h.Origin = oldLog }),
	{"a header before its key's begin", "before the daily key's begin", func(t *testing.T, r *rand.Rand, l *receipttest.Log) (*receipttest.Log, int) {
		d := l.Fork(t, len(l.Leaves))
		d.Rotate(t)
		h := d.NextHeader(receipt.HeaderHeartbeat)
		h.Time = d.Now.Add(-2*time.Millisecond + 1 + time.Duration(r.Int64N(1e6-2)))
		return d, d.SealHeader(t, h).Index
	}},
	statementDamage("a statement that names another size", "a key statement that names size", func(r *rand.Rand, l *receipttest.Log, n int, ks *receipt.KeyStatement) []note.Signer {
		ks.FirstSize += 1 + r.Uint64N(9)
		return nil
	}),
	statementDamage("a statement that names another root", "names another root", func(r *rand.Rand, l *receipttest.Log, n int, ks *receipt.KeyStatement) []note.Signer {
		ks.FirstRoot[r.IntN(32)] ^= 1 << r.IntN(8)
		return nil
	}),
	statementDamage("a statement for more than a day", "not_after", func(r *rand.Rand, l *receipttest.Log, n int, ks *receipt.KeyStatement) []note.Signer {
		ks.NotAfter = ks.NotBefore.Add(receipt.MaxKeyAge + 1 + time.Duration(r.Int64N(1e9)))
		return nil
	}),
	statementDamage("a statement of another predecessor", "whose predecessor is not the key in force", func(r *rand.Rand, l *receipttest.Log, n int, ks *receipt.KeyStatement) []note.Signer {
		ks.Predecessor, ks.Ended = testKeys.other.VKey, receipt.EndedRotated
		return []note.Signer{l.Identity, testKeys.other}
	}),
	statementDamage("a rotated predecessor that did not sign", "signatures, want", func(r *rand.Rand, l *receipttest.Log, n int, ks *receipt.KeyStatement) []note.Signer {
		ks.Ended = receipt.EndedRotated
		return []note.Signer{l.Identity}
	}),
	statementDamage("a predecessor's line by another key", "not signed by the identity key", func(r *rand.Rand, l *receipttest.Log, n int, ks *receipt.KeyStatement) []note.Signer {
		ks.Ended = receipt.EndedRotated
		return []note.Signer{l.Identity, testKeys.other}
	}),
	statementDamage("a statement by another identity", "note has no verifiable signatures", func(r *rand.Rand, l *receipttest.Log, n int, ks *receipt.KeyStatement) []note.Signer {
		ks.Ended = receipt.EndedLost
		return []note.Signer{testKeys.other}
	}),
	statementDamage("a statement that begins before its predecessor", "begins before its predecessor", func(r *rand.Rand, l *receipttest.Log, n int, ks *receipt.KeyStatement) []note.Signer {
		ks.NotBefore = beginning.Add(-time.Duration(r.Int64N(1e12)))
		ks.NotAfter = ks.NotBefore.Add(time.Hour)
		return nil
	}),
	{"a key that was in force before", "was in force before", func(t *testing.T, r *rand.Rand, l *receipttest.Log) (*receipttest.Log, int) {
		d := l.Fork(t, len(l.Leaves))
		d.RotateTo(t, l.Daily[r.IntN(len(l.Daily)-1)], d.NextStatement(t))
		return d, len(d.Leaves) - 1
	}},
	{"no first statement", "a header before the first key statement", func(t *testing.T, r *rand.Rand, l *receipttest.Log) (*receipttest.Log, int) {
		d := receipttest.New(t, testOrigin).Fork(t, 0)
		for _, leaf := range l.Leaves[1:] {
			d.Append(t, leaf)
		}
		return d, 0
	}},
	{"a statement left out", "a header that names the key statement at", func(t *testing.T, r *rand.Rand, l *receipttest.Log) (*receipttest.Log, int) {
		i := l.Statements[1+r.IntN(len(l.Statements)-1)]
		return rewrite(t, l, i, nil), i
	}},
	{"a statement twice", "a key statement that names size", func(t *testing.T, r *rand.Rand, l *receipttest.Log) (*receipttest.Log, int) {
		i := l.Statements[r.IntN(len(l.Statements))]
		d := l.Fork(t, i+1)
		d.Append(t, l.Leaves[i])
		for _, leaf := range l.Leaves[i+1:] {
			d.Append(t, leaf)
		}
		return d, i + 1
	}},
	{"a record in the log", "neither a header nor a key statement nor a seal", func(t *testing.T, r *rand.Rand, l *receipttest.Log) (*receipttest.Log, int) {
		i := anyOf(r, l, receipt.HeaderPrefix)
		d, _ := l.NewDecision()
		return rewrite(t, l, i, receipt.AppendDecision(nil, d)), i
	}},
	{"a header after the seal", "after the seal", func(t *testing.T, r *rand.Rand, l *receipttest.Log) (*receipttest.Log, int) {
		d := l.Fork(t, len(l.Leaves))
		d.SealLog(t, "over")
		if r.IntN(2) == 0 {
			d.Rotate(t)
		} else {
			d.SealHeader(t, d.NextHeader(receipt.HeaderHeartbeat))
		}
		return d, len(d.Leaves) - 1
	}},
	sealDamage("a seal that names another size", "a seal that names size", func(r *rand.Rand, l *receipttest.Log, s *receipt.Seal) []note.Signer {
		s.Size += 1 + r.Uint64N(9)
		return []note.Signer{l.Identity}
	}),
	sealDamage("a seal that names another root", "a seal that names another root", func(r *rand.Rand, l *receipttest.Log, s *receipt.Seal) []note.Signer {
		s.Root = receipt.Hash{byte(r.Uint32())}
		return []note.Signer{l.Identity}
	}),
	sealDamage("a seal under another statement", "a seal that names the key statement", func(r *rand.Rand, l *receipttest.Log, s *receipt.Seal) []note.Signer {
		s.Key = uint64(l.Statements[r.IntN(len(l.Statements)-1)])
		return []note.Signer{l.Identity}
	}),
	sealDamage("a seal by another daily key", "signed by another daily key", func(r *rand.Rand, l *receipttest.Log, s *receipt.Seal) []note.Signer {
		return []note.Signer{l.Identity, l.Daily[r.IntN(len(l.Daily)-1)]}
	}),
	sealDamage("a seal by a daily key alone", "note has no verifiable signatures", func(r *rand.Rand, l *receipttest.Log, s *receipt.Seal) []note.Signer {
		return []note.Signer{l.Daily[len(l.Daily)-1]}
	}),
	sealDamage("a seal whose time goes back", "before that of the last header", func(r *rand.Rand, l *receipttest.Log, s *receipt.Seal) []note.Signer {
		s.Time = beginning.Add(time.Duration(r.Int64N(1e6)))
		return []note.Signer{l.Identity}
	}),
}

// TestKeyAudit damages logs in every way, 40 times each: the first fault is found, where it is and as what it is.
func TestKeyAudit(t *testing.T) {
	total := 0
	for i, d := range damages {
		t.Run(d.name, func(t *testing.T) {
			for k := range uint64(40) {
				r := rand.New(rand.NewPCG(400+uint64(i), k))
				l := victim(t, r, everyEnd...)
				l.Rotate(t)
				work(t, l, r)
				if _, wrong, _ := walk(t, l); len(wrong) > 0 {
					t.Fatalf("seeds %d, %d: before the damage: %v", 400+i, k, wrong[0])
				}
				damaged, at := d.make(t, r, l)
				_, wrong, _ := walk(t, damaged)
				if len(wrong) == 0 {
					t.Fatalf("seeds %d, %d: not found", 400+i, k)
				}
				if got := wrong[0].Error(); !strings.HasPrefix(got, fmt.Sprintf("leaf %d: ", at)) || !strings.Contains(got, d.want) || strings.Contains(got, "\n") {
					t.Fatalf("seeds %d, %d: want %q at leaf %d, got %v", 400+i, k, d.want, at, got)
				}
				total++
			}
		})
	}
	t.Logf("seeds 400 to %d, 0 to 39 each: %d ways, %d damaged logs, each found", 399+len(damages), len(damages), total)
	if total < 1000 && !t.Failed() {
		t.Errorf("only %d", total)
	}
	l := receipttest.New(t, testOrigin)
	a := auditOf(t, l)
	if err := a.Leaf(1, receipt.Hash{}, l.Leaves[1]); err == nil || !strings.Contains(err.Error(), "every leaf is needed") {
		t.Errorf("a leaf left out: %v", err)
	}
}
