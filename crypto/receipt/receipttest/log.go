// Package receipttest is a transparency log in memory that makes valid bundles, for tests of whatever reads or carries
// them. It stores nothing, is deterministic (keys come from fixed seeds: they protect nothing) and is not safe for
// concurrent use. What it builds is what package receipt's Verify and KeyAudit accept; its fields and low-level methods let a
// test build what they must refuse, signed properly all the same.
package receipttest

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"filippo.io/torchwood"
	"github.com/knhk/sidecar/crypto/receipt"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Key is a note signer and its verifier key.
type Key struct {
	note.Signer
	VKey string
}

// NewKey returns the Ed25519 key that follows from name and seed.
func NewKey(tb testing.TB, name, seed string) Key {
	tb.Helper()
	raw := sha256.Sum256([]byte(seed))
	public := ed25519.NewKeyFromSeed(raw[:]).Public().(ed25519.PublicKey)
	vkey, err := note.NewEd25519VerifierKey(name, public)
	if err != nil {
		tb.Fatal(err)
	}
	v, err := note.NewVerifier(vkey)
	if err != nil {
		tb.Fatal(err)
	}
	signer, err := note.NewSigner(fmt.Sprintf("PRIVATE+KEY+%s+%08x+%s", name, v.KeyHash(),
		base64.StdEncoding.EncodeToString(append([]byte{1}, raw[:]...))))
	if err != nil {
		tb.Fatal(err)
	}
	return Key{signer, vkey}
}

// Witness returns a cosigner (C2SP tlog-cosignature, Ed25519) whose clock stands at t.
func Witness(tb testing.TB, name, seed string, t time.Time) Key {
	tb.Helper()
	raw := sha256.Sum256([]byte(seed))
	private := ed25519.NewKeyFromSeed(raw[:])
	v, err := torchwood.NewCosignatureVerifierFromKey(name, private.Public())
	if err != nil {
		tb.Fatal(err)
	}
	return Key{witness{v, private, t}, v.String()}
}

type witness struct {
	*torchwood.CosignatureVerifier
	private ed25519.PrivateKey
	time    time.Time
}

func (w witness) Sign(msg []byte) ([]byte, error) {
	t := w.time.Unix()
	sig := binary.BigEndian.AppendUint64(nil, uint64(t))
	return append(sig, ed25519.Sign(w.private, fmt.Appendf(nil, "cosignature/v1\ntime %d\n%s", t, msg))...), nil
}

// Block is a sealed block.
type Block struct {
	Header receipt.Header
	Leaf   []byte   // the header's
	Index  int      // of the header in the log
	Leaves [][]byte // the records'
	Tree   *receipt.Tree
}

// Log is the log. Its fields may be changed between calls.
type Log struct {
	Origin      string
	Instance    string
	LogID       [16]byte
	Incarnation [16]byte
	Identity    Key
	Daily       []Key // the last one is in force
	Statements  []int // index of each daily key's statement in the log
	Witnesses   []Key
	Now         time.Time // the clock; each record and header advances it by a millisecond
	Ordinal     uint64    // of the next record
	Seq         uint64    // of the next header
	Prev        receipt.Hash
	Blocks      []*Block
	Leaves      [][]byte // the log's
	// Pins go into every bundle; Revoke and SealLog add theirs, and their notes to Revocations.
	Pins        []receipt.Pin
	Revocations [][]byte

	hashes []tlog.Hash
}

// New returns a log of the given origin whose clock stands at 2026-03-01 12:00:00 UTC. It has a first daily key and the
// open header of instance "a".
func New(tb testing.TB, origin string) *Log {
	tb.Helper()
	return open(tb, origin, NewKey(tb, origin, origin+" identity"), nil)
}

// NewSuccessor is New with another identity key, of a log whose first statement quotes old, which is sealed.
func NewSuccessor(tb testing.TB, origin string, identity Key, old *Log) *Log {
	tb.Helper()
	return open(tb, origin, identity, old.Quote(tb))
}

func open(tb testing.TB, origin string, identity Key, succeeds *receipt.Quote) *Log {
	tb.Helper()
	l := &Log{
		Origin:      origin,
		Instance:    "a",
		LogID:       half(origin, "log"),
		Incarnation: half(origin, "incarnation 0"),
		Identity:    identity,
		Now:         time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC),
	}
	ks := l.NextStatement(tb)
	ks.Succeeds = succeeds
	l.RotateTo(tb, NewKey(tb, origin, fmt.Sprint(origin, " daily ", 0)), ks)
	l.SealHeader(tb, l.NextHeader(receipt.HeaderOpen))
	return l
}

func half(parts ...string) (out [16]byte) {
	sum := sha256.Sum256(fmt.Appendf(nil, "%q", parts))
	copy(out[:], sum[:])
	return out
}

// Rotate brings in the next daily key, signed by the identity key and the one before.
func (l *Log) Rotate(tb testing.TB) {
	tb.Helper()
	ended := ""
	if len(l.Daily) > 0 {
		ended = receipt.EndedRotated
	}
	l.RotateAs(tb, ended)
}

// RotateAs is Rotate with a reason why the key before has ended. The new key begins a millisecond later.
func (l *Log) RotateAs(tb testing.TB, ended string) {
	tb.Helper()
	ks := l.NextStatement(tb)
	ks.Ended = ended
	l.RotateTo(tb, NewKey(tb, l.Origin, fmt.Sprint(l.Origin, " daily ", len(l.Daily))), ks)
}

// NextStatement is the statement that would come next, without its keys.
func (l *Log) NextStatement(tb testing.TB) *receipt.KeyStatement {
	tb.Helper()
	at := l.tick()
	return &receipt.KeyStatement{
		Origin: l.Origin, NotBefore: at, NotAfter: at.Add(receipt.MaxKeyAge),
		FirstSize: uint64(len(l.Leaves)), FirstRoot: l.Root(tb, len(l.Leaves)),
	}
}

// RotateTo is Rotate to a given key by a given statement, whose Key and Predecessor are filled in, and Ended when it is empty.
func (l *Log) RotateTo(tb testing.TB, daily Key, ks *receipt.KeyStatement) {
	tb.Helper()
	ks.Key = daily.VKey
	var before note.Signer
	if n := len(l.Daily); n > 0 {
		ks.Predecessor = l.Daily[n-1].VKey
		if ks.Ended == "" {
			ks.Ended = receipt.EndedRotated
		}
		if ks.Ended == receipt.EndedRotated {
			before = l.Daily[n-1]
		}
	}
	leaf, err := receipt.SignKeyStatement(ks, l.Identity, before)
	if err != nil {
		tb.Fatal(err)
	}
	l.AppendStatement(tb, daily, leaf)
}

// AppendStatement puts a statement of the caller's into the log, from where on daily is in force.
func (l *Log) AppendStatement(tb testing.TB, daily Key, leaf []byte) {
	tb.Helper()
	l.Daily = append(l.Daily, daily)
	l.Statements = append(l.Statements, l.Append(tb, leaf))
}

// Revoke ends the key in force as revoked and returns the revocation.
func (l *Log) Revoke(tb testing.TB, reason string) []byte {
	tb.Helper()
	pin := receipt.Pin{Size: uint64(len(l.Leaves)), Root: l.Root(tb, len(l.Leaves))}
	key := l.Daily[len(l.Daily)-1].VKey
	l.RotateAs(tb, receipt.EndedRevoked)
	signed, err := receipt.SignRevocation(&receipt.Revocation{
		Origin: l.Origin, Key: key, Size: pin.Size, Root: pin.Root, Time: l.Now, Reason: reason,
	}, l.Identity)
	if err != nil {
		tb.Fatal(err)
	}
	l.Pins = append(l.Pins, pin)
	l.Revocations = append(l.Revocations, signed)
	return signed
}

// SealLog puts a seal at the end of the log, signed by identity key and daily key, and returns the leaf.
func (l *Log) SealLog(tb testing.TB, reason string) []byte {
	tb.Helper()
	pin := receipt.Pin{Size: uint64(len(l.Leaves)), Root: l.Root(tb, len(l.Leaves))}
	leaf, err := receipt.SignSeal(&receipt.Seal{
		Origin: l.Origin, Key: uint64(l.Statements[len(l.Statements)-1]), Size: pin.Size, Root: pin.Root, Time: l.tick(), Reason: reason,
	}, l.Identity, l.Daily[len(l.Daily)-1])
	if err != nil {
		tb.Fatal(err)
	}
	l.Append(tb, leaf)
	l.Pins = append(l.Pins, pin)
	l.Revocations = append(l.Revocations, leaf)
	return leaf
}

// Quote is how a successor quotes the log, which ends in a seal.
func (l *Log) Quote(tb testing.TB) *receipt.Quote {
	tb.Helper()
	n := len(l.Leaves) - 1
	return &receipt.Quote{Origin: l.Origin, Identity: l.Identity.VKey, Size: uint64(n), Root: l.Root(tb, n)}
}

// Fork returns a log that begins with the first size leaves of l and goes on by itself: with the daily key in force there, the
// clock where it is, and the same next ordinal and sequence number. Nothing of l changes with it.
func (l *Log) Fork(tb testing.TB, size int) *Log {
	tb.Helper()
	f := *l
	f.Leaves, f.hashes = nil, nil
	for _, leaf := range l.Leaves[:size] {
		f.Append(tb, leaf)
	}
	n := min(l.key(size)+1, size)
	f.Daily, f.Statements = slices.Clone(l.Daily[:n]), slices.Clone(l.Statements[:n])
	f.Blocks = nil
	for _, b := range l.Blocks {
		if b.Index < size {
			f.Blocks = append(f.Blocks, b)
		}
	}
	f.Witnesses, f.Pins, f.Revocations = slices.Clone(l.Witnesses), slices.Clone(l.Pins), slices.Clone(l.Revocations)
	return &f
}

// key is the position in Daily of the key in force for a tree of size leaves.
func (l *Log) key(size int) int {
	for n := len(l.Statements) - 1; n > 0; n-- {
		if l.Statements[n] < size {
			return n
		}
	}
	return 0
}

// KeyFor returns the daily key in force for a tree of size leaves.
func (l *Log) KeyFor(size int) Key { return l.Daily[l.key(size)] }

// Append adds a leaf to the log and returns its index.
func (l *Log) Append(tb testing.TB, leaf []byte) int {
	tb.Helper()
	n := len(l.Leaves)
	hashes, err := tlog.StoredHashes(int64(n), leaf, l)
	if err != nil {
		tb.Fatal(err)
	}
	l.hashes = append(l.hashes, hashes...)
	l.Leaves = append(l.Leaves, leaf)
	return n
}

// ReadHashes implements tlog.HashReader.
func (l *Log) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		out[i] = l.hashes[x]
	}
	return out, nil
}

// Root returns the log's root at a size.
func (l *Log) Root(tb testing.TB, size int) receipt.Hash {
	tb.Helper()
	h, err := tlog.TreeHash(int64(size), l)
	if err != nil {
		tb.Fatal(err)
	}
	return receipt.Hash(h)
}

// tick advances the clock.
func (l *Log) tick() time.Time {
	l.Now = l.Now.Add(time.Millisecond)
	return l.Now
}

// NewDecision returns an admitted decision with the next ordinal and the evidence that opens it.
func (l *Log) NewDecision() (*receipt.Decision, *receipt.Evidence) {
	n := l.Ordinal
	l.Ordinal++
	var random [10]byte
	binary.BigEndian.PutUint64(random[2:], n)
	salt := sha256.Sum256(fmt.Appendf(nil, "salt %d", n))
	d := &receipt.Decision{
		Nonce: half("nonce", fmt.Sprint(n)), Ordinal: n, Origin: l.Origin, Time: l.tick(), Tenant: "shop",
		Class: "W1", Verdict: "admit", Reason: "ok", Rule: "default", Tick: 41,
		PolicyDigest: half("policy"), Capture: "lean", SPIFFEID: "spiffe://example.org/ns/shop/sa/cart",
		Route: "checkout", Cluster: "payments", TraceID: half("trace"), SpanID: [8]byte{1, 2, 3},
	}
	d.ID, _ = receipt.NewID(d.Time, &random, l.Instance)
	request := receipt.Request{
		Method: "GET", Scheme: "https", Authority: "shop.example.org", Path: "/cart?item=7",
		RequestID: "5f0c9d5e-0000-4000-8000-000000000001", Source: "10.0.0.7:41234",
	}
	d.Request = request.Commit(&salt)
	return d, receipt.EvidenceFor(d.ID, &salt, &request)
}

// NewOutcome returns the outcome of d with the next ordinal.
func (l *Log) NewOutcome(d *receipt.Decision) *receipt.Outcome {
	n := l.Ordinal
	l.Ordinal++
	return &receipt.Outcome{
		ID: d.ID, Nonce: half("nonce", fmt.Sprint(n)), Ordinal: n, Origin: l.Origin, Time: l.tick(), Source: "als",
		Result: "complete", Status: 200, Details: "via_upstream", Cluster: "payments", UpstreamHost: "10.0.3.4:8443",
		Attempts: 1, BytesIn: 12, BytesOut: 3456, DurationNS: 7_654_321,
	}
}

// NextHeader returns the header of the given kind that would come next, over no records.
func (l *Log) NextHeader(kind string) receipt.Header {
	return receipt.Header{
		Origin: l.Origin, LogID: l.LogID, Instance: l.Instance, Incarnation: l.Incarnation, Seq: l.Seq, Kind: kind,
		Key: uint64(l.Statements[len(l.Statements)-1]), Prev: l.Prev, Time: l.tick(), Root: receipt.EmptyRoot,
	}
}

// Seal closes a block over leaves, whose ordinals end with the last one given out.
func (l *Log) Seal(tb testing.TB, leaves ...[]byte) *Block {
	tb.Helper()
	h := l.NextHeader(receipt.HeaderBlock)
	h.Last = l.Ordinal - 1
	h.First = l.Ordinal - uint64(len(leaves))
	return l.SealHeader(tb, h, leaves...)
}

// SealHeader is Seal with a header of the caller's: only Count and Root are filled in.
func (l *Log) SealHeader(tb testing.TB, h receipt.Header, leaves ...[]byte) *Block {
	tb.Helper()
	hashes := make([]receipt.Hash, len(leaves))
	for i, leaf := range leaves {
		hashes[i] = receipt.LeafHash(leaf)
	}
	b := &Block{Leaves: leaves, Tree: receipt.NewTree(hashes)}
	h.Count, h.Root = uint64(len(leaves)), b.Tree.Root()
	b.Header, b.Leaf = h, receipt.AppendHeader(nil, &h)
	b.Index = l.Append(tb, b.Leaf)
	l.Blocks = append(l.Blocks, b)
	l.Prev = receipt.LeafHash(b.Leaf)
	l.Seq = h.Seq + 1
	return b
}

// Checkpoint returns the checkpoint of the whole log, signed by the identity key, the daily key in force and the witnesses.
func (l *Log) Checkpoint(tb testing.TB) []byte {
	tb.Helper()
	return l.CheckpointAt(tb, len(l.Leaves))
}

// CheckpointAt is Checkpoint of the first size leaves.
func (l *Log) CheckpointAt(tb testing.TB, size int) []byte {
	tb.Helper()
	signers := []note.Signer{l.Identity, l.KeyFor(size)}
	for _, w := range l.Witnesses {
		signers = append(signers, w)
	}
	return l.SignCheckpointAt(tb, size, signers...)
}

// SignCheckpoint returns the checkpoint of the whole log under the given signers.
func (l *Log) SignCheckpoint(tb testing.TB, signers ...note.Signer) []byte {
	tb.Helper()
	return l.SignCheckpointAt(tb, len(l.Leaves), signers...)
}

// SignCheckpointAt is SignCheckpoint of the first size leaves.
func (l *Log) SignCheckpointAt(tb testing.TB, size int, signers ...note.Signer) []byte {
	tb.Helper()
	c := torchwood.Checkpoint{Origin: l.Origin, Tree: tlog.Tree{N: int64(size), Hash: tlog.Hash(l.Root(tb, size))}}
	signed, err := note.Sign(&note.Note{Text: c.String()}, signers...)
	if err != nil {
		tb.Fatal(err)
	}
	return signed
}

// Proof returns the leaf at index with its proof below checkpoint, which is one of the log at any size.
func (l *Log) Proof(tb testing.TB, index int, checkpoint []byte) receipt.Proof {
	tb.Helper()
	path, err := tlog.ProveRecord(int64(sizeOf(tb, checkpoint)), int64(index), l)
	if err != nil {
		tb.Fatal(err)
	}
	return receipt.Proof{Leaf: l.Leaves[index], Text: torchwood.FormatProof(int64(index), path, checkpoint)}
}

// sizeOf is the size that a checkpoint states.
func sizeOf(tb testing.TB, checkpoint []byte) int {
	tb.Helper()
	lines := strings.SplitN(string(checkpoint), "\n", 3)
	if len(lines) < 3 {
		tb.Fatalf("no checkpoint: %q", checkpoint)
	}
	size, err := strconv.Atoi(lines[1])
	if err != nil {
		tb.Fatal(err)
	}
	return size
}

// Prove returns the proofs for all Pins below a tree of size leaves, as far as the log has the leaves.
func (l *Log) Prove(tb testing.TB, size int) (pins []receipt.PinProof) {
	tb.Helper()
	for _, pin := range l.Pins {
		if pin.Size > uint64(len(l.Leaves)) {
			continue
		}
		proof, err := receipt.ProvePin(pin, uint64(size), l)
		if err != nil {
			tb.Fatal(err)
		}
		pins = append(pins, proof)
	}
	return pins
}

// Place is where a record was sealed.
type Place struct {
	Block *Block
	Index int
}

// Bundle makes a bundle of the records at places under checkpoint (nil: a new one of the whole log), which is one of the log at
// any size that covers them, with the statement of the daily key in force for it and those of its predecessors up to chain
// statements.
func (l *Log) Bundle(tb testing.TB, checkpoint []byte, chain int, places ...Place) *receipt.Bundle {
	tb.Helper()
	if checkpoint == nil {
		checkpoint = l.Checkpoint(tb)
	}
	size := sizeOf(tb, checkpoint)
	b := new(receipt.Bundle)
	at := map[*Block]int{}
	for _, p := range places {
		header, ok := at[p.Block]
		if !ok {
			header = len(b.Headers)
			at[p.Block] = header
			b.Headers = append(b.Headers, l.Proof(tb, p.Block.Index, checkpoint))
		}
		b.Records = append(b.Records, receipt.Record{
			Leaf: p.Block.Leaves[p.Index], Header: header, Index: uint64(p.Index), Size: p.Block.Header.Count,
			Path: p.Block.Tree.Path(p.Index),
		})
	}
	for i := l.key(size); i >= 0 && len(b.Keys) < chain; i-- {
		b.Keys = append(b.Keys, l.Proof(tb, l.Statements[i], checkpoint))
	}
	b.Tail = l.Proof(tb, size-1, checkpoint)
	b.Pins = l.Prove(tb, size)
	return b
}

// Sample makes a log with records of several requests in blocks of several sizes, two daily keys and heartbeats, and
// returns a bundle of one request whose decision and outcome stand in different blocks, with evidence and a pin, of the tree
// before the second daily key.
func Sample(tb testing.TB, origin string) (*Log, *receipt.Bundle) {
	tb.Helper()
	l := New(tb, origin)
	other := func() []byte {
		d, _ := l.NewDecision()
		return receipt.AppendDecision(nil, d)
	}
	l.Seal(tb, other())
	l.Pins = append(l.Pins, receipt.Pin{Size: uint64(len(l.Leaves)), Root: l.Root(tb, len(l.Leaves))})
	l.Rotate(tb)
	l.SealHeader(tb, l.NextHeader(receipt.HeaderHeartbeat))
	leaves := [][]byte{other(), other()}
	d, evidence := l.NewDecision()
	leaves = append(leaves, receipt.AppendDecision(nil, d), other(), other())
	first := l.Seal(tb, leaves...)
	l.Seal(tb, other(), other())
	leaves = [][]byte{other()}
	leaves = append(leaves, receipt.AppendOutcome(nil, l.NewOutcome(d)), other())
	second := l.Seal(tb, leaves...)
	l.SealHeader(tb, l.NextHeader(receipt.HeaderHeartbeat))
	b := l.Bundle(tb, nil, 2, Place{first, 2}, Place{second, 1})
	b.Evidence = evidence
	return l, b
}

// PolicyText is the policy file that pins the log's identity key, and asks for all its witnesses if it has any.
func (l *Log) PolicyText() []byte {
	text := fmt.Appendf(nil, "log %s\n", l.Identity.VKey)
	members := ""
	for i, w := range l.Witnesses {
		text = fmt.Appendf(text, "witness w%d %s\n", i, w.VKey)
		members += fmt.Sprintf(" w%d", i)
	}
	if members == "" {
		return append(text, "quorum none\n"...)
	}
	return fmt.Appendf(text, "group all-of-them all%s\nquorum all-of-them\n", members)
}

// Policy is PolicyText parsed.
func (l *Log) Policy(tb testing.TB) *receipt.Policy {
	tb.Helper()
	p, err := receipt.ParsePolicy(l.PolicyText())
	if err != nil {
		tb.Fatal(err)
	}
	return p
}
