package receiptlog

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"golang.org/x/mod/sumdb/note"
)

// MaxDailyAge is the longest a daily key may sign.
const MaxDailyAge = 24 * time.Hour

// rotateRetry is the time between two tries to replace the daily key.
const rotateRetry = 15 * time.Second

// ErrKeyExpired is returned by the daily signer once its key is past its age: nothing extends it but a new key.
var ErrKeyExpired = errors.New("daily key is past its age and refuses to sign")

// dailyKey is one daily key as it is kept in the directory. The statement's bytes are kept before they go to the log, so
// that a crash re-adds the same bytes.
type dailyKey struct {
	Label     string    `json:"label"`
	ID        string    `json:"id"`
	VKey      string    `json:"vkey"`
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
	Statement []byte    `json:"statement"` // the leaf
	Index     uint64    `json:"index"`     // of the leaf in the log
	Logged    bool      `json:"logged"`    // Index is known: the leaf is integrated
}

// dailySigner signs with the daily key in force and refuses once it is past its age. It is the second signer of every
// checkpoint. The inner key is swapped while Tessera holds this signer: KeyHash pins the key that the Sign after it uses,
// which is the order in which note.Sign calls them.
type dailySigner struct {
	origin string
	clock  *clock

	mu     sync.Mutex
	cur    note.Signer
	until  time.Time
	pinned note.Signer
	pinEnd time.Time
}

func (s *dailySigner) Name() string { return s.origin }

func (s *dailySigner) KeyHash() uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pinned, s.pinEnd = s.cur, s.until
	return s.pinned.KeyHash()
}

func (s *dailySigner) Sign(msg []byte) ([]byte, error) {
	s.mu.Lock()
	signer, until := s.pinned, s.pinEnd
	if signer == nil {
		signer, until = s.cur, s.until
	}
	s.mu.Unlock()
	if now := s.clock.now(); !now.Before(until) {
		return nil, fmt.Errorf("sign checkpoint: %w: it ended %s, now is %s", ErrKeyExpired, until.UTC().Format(time.RFC3339),
			now.UTC().Format(time.RFC3339))
	}
	return signer.Sign(msg)
}

func (s *dailySigner) use(signer note.Signer, until time.Time) {
	s.mu.Lock()
	s.cur, s.until = signer, until
	s.mu.Unlock()
}

func (s *dailySigner) expires() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.until
}

// clock is the time used for key age and record order: never behind the time the directory has already seen, so that a wall
// clock set back extends nothing. floor is durable (the last header's time); between wall readings the monotonic clock counts.
type clock struct {
	wall func() time.Time

	mu    sync.Mutex
	floor time.Time // latest time known
	mono  time.Time // wall reading, with monotonic part, taken when floor was set
}

func newClock(wall func() time.Time, floor time.Time) *clock {
	return &clock{wall: wall, floor: floor.Round(0), mono: wall()}
}

func (c *clock) now() time.Time {
	w := c.wall()
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.floor.Add(w.Sub(c.mono)); f.After(c.floor) {
		c.floor, c.mono = f, w
	}
	if w.Round(0).After(c.floor) {
		c.floor, c.mono = w.Round(0), w
	}
	return c.floor
}

// openDaily finds the daily key in force, or makes the first one. It runs before Tessera is opened, so a first key's statement
// is added later, by settleDaily.
func (l *Log) openDaily(ctx context.Context) error {
	var cur dailyKey
	ok, err := l.store.getMeta("daily", &cur)
	if err != nil {
		return err
	}
	if !ok {
		if cur, err = l.newDaily(ctx, nil, 0, emptyRoot); err != nil {
			return err
		}
		if err := l.store.setMeta("daily", cur); err != nil {
			return err
		}
	}
	signer, err := l.daySigner(ctx, cur)
	if err != nil {
		return fmt.Errorf("open daily key: %w", err)
	}
	l.dailyCur = cur
	l.daily.use(signer, cur.NotAfter)
	return nil
}

func (l *Log) daySigner(ctx context.Context, k dailyKey) (note.Signer, error) {
	s, err := l.cfg.Daily.Signer(ctx, k.Label, k.ID)
	if err != nil {
		return nil, err
	}
	vkey, err := keys.VKey(l.id.Origin, s.Public())
	if err != nil {
		return nil, err
	}
	if vkey != k.VKey {
		return nil, fmt.Errorf("key %s version %s is %s, the log knows it as %s", k.Label, k.ID, vkey, k.VKey)
	}
	return keys.NoteSigner(l.id.Origin, s, signTimeout)
}

// newDaily makes a key version and its statement over the given checkpoint. pred is nil for the first key of the log.
func (l *Log) newDaily(ctx context.Context, pred *dailyKey, size uint64, root receipt.Hash) (dailyKey, error) {
	// A version that could not be stated is tried again: a token has room for few keys, and failures come in numbers.
	if l.spare == nil {
		v, err := l.cfg.Daily.Create(ctx, l.cfg.DailyLabel, l.cfg.DailyAlgorithm)
		if err != nil {
			return dailyKey{}, fmt.Errorf("make daily key: %w", err)
		}
		l.spare = &v
	}
	v := *l.spare
	vkey, err := keys.VKey(l.id.Origin, v.Public)
	if err != nil {
		return dailyKey{}, fmt.Errorf("make daily key: %w", err)
	}
	now := l.clock.now()
	k := dailyKey{Label: v.Label, ID: v.ID, VKey: vkey, NotBefore: now, NotAfter: now.Add(l.cfg.DailyMaxAge)}
	st := receipt.KeyStatement{
		Origin: l.id.Origin, Key: vkey, NotBefore: k.NotBefore, NotAfter: k.NotAfter, FirstSize: size, FirstRoot: root,
	}
	var predSigner note.Signer
	if pred != nil {
		// A predecessor past its age signs nothing, its successor's statement included: the identity key alone vouches then, and
		// the statement names no predecessor.
		if now.Before(pred.NotAfter) {
			if predSigner, err = l.daySigner(ctx, *pred); err != nil {
				l.log.WarnContext(ctx, "predecessor of the daily key cannot sign its successor", "error", err)
				predSigner = nil
			} else {
				st.Predecessor = pred.VKey
			}
		}
	}
	if k.Statement, err = receipt.SignKeyStatement(&st, l.identity, predSigner); err != nil {
		return dailyKey{}, fmt.Errorf("state daily key: %w", err)
	}
	l.spare = nil
	return k, nil
}

// settleDaily brings the statement of the key in force into the log if a crash or the very first start left it out, and
// rotates when the key has used up two thirds of its age.
func (l *Log) settleDaily(ctx context.Context) error {
	l.rotateMu.Lock()
	defer l.rotateMu.Unlock()
	var next dailyKey
	if ok, err := l.store.getMeta("daily-next", &next); err != nil {
		return err
	} else if ok {
		return l.activate(ctx, next)
	}
	cur := l.currentDaily()
	if !cur.Logged {
		return l.activate(ctx, cur)
	}
	now := l.clock.now()
	if life := cur.NotAfter.Sub(cur.NotBefore); now.Sub(cur.NotBefore) < life*2/3 || now.Before(l.rotateAgain) {
		return nil
	}
	err := l.rotate(ctx, cur)
	if err != nil {
		l.rotateAgain = now.Add(rotateRetry)
	}
	return err
}

// RotateDaily replaces the daily key: a new version is made and stated in the log, signed by the identity key and its
// predecessor; only when the statement is integrated does the new key sign. Checkpoints go on being signed throughout.
func (l *Log) RotateDaily(ctx context.Context) error {
	l.rotateMu.Lock()
	defer l.rotateMu.Unlock()
	return l.rotate(ctx, l.currentDaily())
}

// rotate replaces cur. The caller holds rotateMu.
func (l *Log) rotate(ctx context.Context, cur dailyKey) error {
	cp, err := l.checkpoint(ctx)
	if err != nil {
		return fmt.Errorf("rotate daily key: %w", err)
	}
	next, err := l.newDaily(ctx, &cur, cp.size, cp.root)
	if err != nil {
		return fmt.Errorf("rotate daily key: %w", err)
	}
	// A crash after this line re-adds the same statement at the next start; a crash before it leaves an unused key version.
	if err := l.store.setMeta("daily-next", next); err != nil {
		return fmt.Errorf("rotate daily key: %w", err)
	}
	return l.activate(ctx, next)
}

// activate logs the statement of k, waits until it is integrated and makes k the key in force. The caller holds rotateMu.
func (l *Log) activate(ctx context.Context, k dailyKey) error {
	idx, err := l.addLeaf(ctx, k.Statement)
	if err != nil {
		return fmt.Errorf("log key statement: %w", err)
	}
	k.Index, k.Logged = idx, true
	signer, err := l.daySigner(ctx, k)
	if err != nil {
		return fmt.Errorf("activate daily key: %w", err)
	}
	if err := l.store.activateDaily(k); err != nil {
		return err
	}
	l.mu.Lock()
	l.dailyCur = k
	l.mu.Unlock()
	l.daily.use(signer, k.NotAfter)
	l.log.InfoContext(ctx, "daily key in force", "vkey", k.VKey, "until", k.NotAfter.UTC(), "statement_index", idx)
	return nil
}

func (l *Log) currentDaily() dailyKey {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dailyCur
}
