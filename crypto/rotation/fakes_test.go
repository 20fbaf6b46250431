package rotation

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
)

const (
	testOrigin = "log.example/test"
	testLabel  = "daily"
)

var (
	errInjected = errors.New("injected failure")
	errDead     = errors.New("the process has ended")
)

// fault is what befalls one call.
type fault int

const (
	works      fault = iota
	fails            // nothing is done
	failsDone        // it is done, and an error is returned
	endsBefore       // the process ends before it is done
	endsAfter        // the process ends after it is done
)

// process is one life of the log: faults strike its calls.
type process struct {
	draw func(op string) (fault, error) // nil: nothing ever fails
	dead bool
}

// call runs do as the fault has it.
func (p *process) call(op string, do func() error) error {
	if p.dead {
		return errDead
	}
	f, err := works, error(nil)
	if p.draw != nil {
		f, err = p.draw(op)
	}
	switch f {
	case fails:
		return err
	case endsBefore:
		p.dead = true
		return errDead
	case failsDone:
		if e := do(); e != nil {
			return e
		}
		return err
	case endsAfter:
		if e := do(); e != nil {
			return e
		}
		p.dead = true
		return errDead
	}
	return do()
}

// testTime is a wall clock and a monotonic one.
type testTime struct {
	mu   sync.Mutex
	wall time.Time
	mono time.Duration
}

func (c *testTime) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wall, c.mono = c.wall.Add(d), c.mono+d
}

func (c *testTime) jump(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wall = c.wall.Add(d)
}

func (c *testTime) clock(floor time.Time) *Clock {
	return makeClock(func() (time.Time, time.Duration) { c.mu.Lock(); defer c.mu.Unlock(); return c.wall, c.mono }, floor)
}

// memStore is a key store in memory. It outlives processes.
type memStore struct {
	mu       sync.Mutex
	rand     *rand.Rand
	made     int
	versions []*memVersion
	dud      bool                                // the next version made is disabled
	signed   func(v *memVersion, message []byte) // told of every signature
}

type memVersion struct {
	keys.Version
	private ed25519.PrivateKey
}

func newMemStore(seed uint64) *memStore {
	return &memStore{rand: rand.New(rand.NewPCG(seed, 1))}
}

func (s *memStore) create() *memVersion {
	var b [32]byte
	for i := range b {
		b[i] = byte(s.rand.Uint32())
	}
	s.made++
	k := ed25519.NewKeyFromSeed(b[:])
	v := &memVersion{keys.Version{Label: testLabel, ID: fmt.Sprintf("v%d", s.made), Algorithm: keys.Ed25519, Public: k.Public(), State: keys.Enabled}, k}
	if s.dud {
		v.State, s.dud = keys.Disabled, false
	}
	s.versions = append(s.versions, v)
	return v
}

func (s *memStore) find(id string) *memVersion {
	for _, v := range s.versions {
		if v.ID == id {
			return v
		}
	}
	return nil
}

func (s *memStore) set(id string, state keys.State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v := s.find(id); v != nil {
		v.State = state
	}
}

func (s *memStore) state(id string) keys.State {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v := s.find(id); v != nil {
		return v.State
	}
	return ""
}

// storeView is memStore as a process sees it.
type storeView struct {
	s *memStore
	p *process
}

var _ keys.Store = storeView{}

func (v storeView) Custody() string { return "memory" }
func (v storeView) Close() error    { return nil }

func (v storeView) Create(_ context.Context, label string, _ keys.Algorithm) (out keys.Version, err error) {
	err = v.p.call("create", func() error {
		v.s.mu.Lock()
		defer v.s.mu.Unlock()
		out = v.s.create().Version
		return nil
	})
	return out, err
}

func (v storeView) Versions(context.Context, string) (out []keys.Version, err error) {
	err = v.p.call("versions", func() error {
		v.s.mu.Lock()
		defer v.s.mu.Unlock()
		for _, x := range v.s.versions {
			out = append(out, x.Version)
		}
		return nil
	})
	return out, err
}

func (v storeView) usable(id string) (*memVersion, error) {
	v.s.mu.Lock()
	defer v.s.mu.Unlock()
	x := v.s.find(id)
	if x == nil {
		return nil, keys.ErrNotFound
	}
	if x.State != keys.Enabled {
		return nil, keys.ErrDisabled
	}
	return x, nil
}

func (v storeView) Signer(_ context.Context, _, id string) (out keys.Signer, err error) {
	err = v.p.call("signer", func() error {
		x, err := v.usable(id)
		if err == nil {
			out = memSigner{v, x}
		}
		return err
	})
	return out, err
}

func (v storeView) Disable(_ context.Context, _, id string) error {
	return v.p.call("disable", func() error { v.s.set(id, keys.Disabled); return nil })
}

func (v storeView) Destroy(_ context.Context, _, id string) error {
	return v.p.call("destroy", func() error { v.s.set(id, keys.Destroyed); return nil })
}

type memSigner struct {
	v storeView
	x *memVersion
}

func (m memSigner) Algorithm() keys.Algorithm { return keys.Ed25519 }
func (m memSigner) Public() crypto.PublicKey  { return m.x.Public }
func (m memSigner) Sign(_ context.Context, msg []byte) (sig []byte, err error) {
	err = m.v.p.call("sign", func() error {
		if _, err := m.v.usable(m.x.ID); err != nil {
			return err
		}
		if m.v.s.signed != nil {
			m.v.s.signed(m.x, msg)
		}
		sig = ed25519.Sign(m.x.private, msg)
		return nil
	})
	return sig, err
}

// disk is the directory: what outlives processes and can be copied.
type disk struct {
	state  []byte
	leaves [][]byte
	cps    []checkpoint // published
	hashes []receipt.Hash
	stated []*receipt.KeyStatement // among leaves[:read]
	read   int
	last   *State // parsed lastOf
	lastOf []byte

	audited *receipt.KeyAudit // of leaves[:audited.Size()]
	signed  int               // checkpoints that were audited
}

type checkpoint struct {
	head   Head
	signed []byte
}

func (d *disk) copy() *disk {
	return &disk{state: d.state, leaves: slices.Clone(d.leaves), cps: slices.Clone(d.cps)}
}

func (d *disk) root(size uint64) receipt.Hash {
	for i := len(d.hashes); i < len(d.leaves); i++ {
		d.hashes = append(d.hashes, receipt.LeafHash(d.leaves[i]))
	}
	return receipt.BlockRoot(slices.Clone(d.hashes[:size]))
}

func (d *disk) size() uint64 { return uint64(len(d.leaves)) }

func (d *disk) parsed(t testing.TB) *State {
	t.Helper()
	if d.state == nil {
		return new(State)
	}
	if d.last == nil || !bytes.Equal(d.lastOf, d.state) {
		s, err := ParseState(d.state)
		if err != nil {
			t.Fatalf("state on disk: %v", err)
		}
		d.last, d.lastOf = s, d.state
	}
	return d.last
}

// lastTime is the durable floor: the last header's time.
func (d *disk) lastTime() time.Time {
	for i := len(d.leaves) - 1; i >= 0; i-- {
		if h, err := receipt.ParseHeader(d.leaves[i]); err == nil {
			return h.Time
		}
	}
	return time.Time{}
}

// memLog is the journal and the tree of one process over a disk.
type memLog struct {
	p     *process
	d     *disk
	m     *Manager
	clock *Clock
	held  bool
	sign  []note.Signer // identity, daily
}

func (l *memLog) Load(context.Context) (s *State, err error) {
	err = l.p.call("load", func() error {
		if l.d.state != nil {
			s, err = ParseState(l.d.state)
		}
		return err
	})
	return s, err
}

func (l *memLog) Save(_ context.Context, s *State) error {
	b, err := s.Marshal()
	if err != nil {
		return err
	}
	if _, err := ParseState(b); err != nil {
		panic(fmt.Sprintf("a state that cannot be read is saved: %v\n%s", err, b))
	}
	return l.p.call("save", func() error { l.d.state = b; return nil })
}

func (l *memLog) Hold(context.Context) (head Head, release func(), err error) {
	if l.held {
		panic("Hold while held")
	}
	err = l.p.call("hold", func() error { return nil })
	if err != nil {
		return Head{}, nil, err
	}
	l.held = true
	return Head{l.d.size(), l.d.root(l.d.size())}, func() { l.held = false }, nil
}

func (l *memLog) Put(_ context.Context, leaf []byte) (index uint64, err error) {
	if !l.held {
		panic("Put while not held")
	}
	err = l.p.call("put", func() error {
		index = l.d.size()
		l.d.leaves = append(l.d.leaves, leaf)
		return nil
	})
	return index, err
}

func (l *memLog) Leaf(_ context.Context, index uint64) (leaf []byte, err error) {
	err = l.p.call("leaf", func() error {
		if index >= l.d.size() {
			return ErrNoLeaf
		}
		leaf = l.d.leaves[index]
		return nil
	})
	return leaf, err
}

func (l *memLog) Published(_ context.Context, size uint64) error {
	return l.p.call("published", func() error { return l.publish(size) })
}

// publish signs a checkpoint of the tree unless one of at least size is published.
func (l *memLog) publish(size uint64) error {
	if n := len(l.d.cps); n > 0 && l.d.cps[n-1].head.Size >= size {
		return nil
	}
	h := Head{l.d.size(), l.d.root(l.d.size())}
	signed, err := note.Sign(&note.Note{Text: checkpointText(h)}, l.sign...)
	if err != nil {
		return err
	}
	l.d.cps = append(l.d.cps, checkpoint{h, signed})
	return nil
}

// header makes a header if it may.
func (l *memLog) header() bool {
	if l.held {
		panic("header while held")
	}
	index, notAfter, ok := l.m.HeaderKey()
	now := l.clock.Now()
	if !ok || !now.Before(notAfter) {
		return false
	}
	l.d.leaves = append(l.d.leaves, receipt.AppendHeader(nil, &receipt.Header{
		Origin: testOrigin, Instance: "a", Seq: l.d.size(), Kind: receipt.HeaderHeartbeat, Prev: receipt.Hash{1}, Time: now,
		Root: receipt.EmptyRoot, Key: index,
	}))
	return true
}

func checkpointText(h Head) string {
	return fmt.Sprintf("%s\n%d\n%s\n", testOrigin, h.Size, h.Root)
}

// identityKey is the same in every test.
func identityKey(t testing.TB) (note.Signer, note.Verifier) {
	t.Helper()
	seed := sha256.Sum256([]byte("identity"))
	k := ed25519.NewKeyFromSeed(seed[:])
	s := rawSigner{k}
	vkey, err := keys.VKey(testOrigin, k.Public())
	if err != nil {
		t.Fatal(err)
	}
	v, err := keys.Verifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	n, err := keys.NoteSigner(testOrigin, s, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	return n, v
}

type rawSigner struct{ k ed25519.PrivateKey }

func (r rawSigner) Algorithm() keys.Algorithm { return keys.Ed25519 }
func (r rawSigner) Public() crypto.PublicKey  { return r.k.Public() }
func (r rawSigner) Sign(_ context.Context, msg []byte) ([]byte, error) {
	return ed25519.Sign(r.k, msg), nil
}

// faultySigner is the identity key in a store that fails.
type faultySigner struct {
	note.Signer
	p *process
}

func (f faultySigner) Sign(msg []byte) (sig []byte, err error) {
	err = f.p.call("identity", func() error { sig, err = f.Signer.Sign(msg); return err })
	return sig, err
}

// world is a store, a directory and the process that runs over them.
type world struct {
	t     testing.TB
	time  *testTime
	store *memStore
	d     *disk
	p     *process
	log   *memLog
	m     *Manager
	id    note.Signer
	idv   note.Verifier
	rnd   func() float64

	interval time.Duration
	replace  bool
}

func newWorld(t testing.TB, seed uint64) *world {
	w := &world{
		t: t, time: &testTime{wall: time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)}, store: newMemStore(seed), d: new(disk),
		interval: MaxAge, rnd: func() float64 { return 0.5 },
	}
	w.id, w.idv = identityKey(t)
	return w
}

// start begins a process.
func (w *world) start(draw func(string) (fault, error)) error {
	w.p = &process{draw: draw}
	w.log = &memLog{p: w.p, d: w.d, clock: w.time.clock(w.d.lastTime())}
	m, err := Open(w.t.Context(), Config{
		Origin: testOrigin, Identity: faultySigner{w.id, w.p}, Store: storeView{w.store, w.p}, Label: testLabel, Algorithm: keys.Ed25519,
		Interval: w.interval, Journal: w.log, Clock: w.log.clock, Rand: w.rnd, ReplaceDailyKey: w.replace,
	})
	if err != nil {
		w.m = nil
		return err
	}
	w.m, w.log.m = m, m
	w.log.sign = []note.Signer{faultySigner{w.id, w.p}, m.Signer()}
	m.SetTree(w.log)
	return nil
}

func (w *world) mustStart() {
	w.t.Helper()
	if err := w.start(nil); err != nil {
		w.t.Fatal(err)
	}
	if err := w.m.Settle(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

// publishes reports whether a header can be made and signed.
func (w *world) publishes() error {
	if !w.log.header() {
		return errors.New("no header may be made")
	}
	return w.log.publish(w.d.size())
}

// statements lists the key statements in the log.
func (d *disk) statements() []*receipt.KeyStatement {
	for ; d.read < len(d.leaves); d.read++ {
		if leaf := d.leaves[d.read]; bytes.HasPrefix(leaf, []byte(receipt.KeyPrefix)) {
			if ks, err := receipt.ParseKeyStatement(leaf); err == nil {
				d.stated = append(d.stated, ks)
			}
		}
	}
	return d.stated
}

// audit checks the whole directory, leaves and checkpoints. Leaves are only ever appended to a disk: what was audited is not
// read again.
func (w *world) audit() error {
	d := w.d
	if d.audited == nil {
		d.audited = receipt.NewKeyAudit(testOrigin, w.idv)
	}
	for i := d.audited.Size(); i < d.size(); i++ {
		var root receipt.Hash
		if receipt.RootNeeded(d.leaves[i]) {
			root = d.root(i)
		}
		if err := d.audited.Leaf(i, root, d.leaves[i]); err != nil {
			return err
		}
	}
	for ; d.signed < len(d.cps); d.signed++ {
		cp := d.cps[d.signed]
		if cp.head.Size > d.size() || d.root(cp.head.Size) != cp.head.Root {
			return fmt.Errorf("checkpoint of size %d is not of this log", cp.head.Size)
		}
		if cp.head.Size == 0 {
			continue // the statement may not be there yet
		}
		var ks *receipt.KeyStatement
		for _, s := range d.statements() {
			if s.FirstSize < cp.head.Size {
				ks = s
			}
		}
		if ks == nil {
			return fmt.Errorf("checkpoint of size %d without a key", cp.head.Size)
		}
		v, err := keys.Verifier(ks.Key)
		if err != nil {
			return err
		}
		n, err := note.Open(cp.signed, note.VerifierList(w.idv, v))
		if err != nil || len(n.Sigs) != 2 || len(n.UnverifiedSigs) != 0 {
			return fmt.Errorf("checkpoint of size %d is not signed by the key stated at %d alone: %v", cp.head.Size, ks.FirstSize, err)
		}
	}
	return nil
}

func mustNil(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
