package receiptlog

import (
	"context"
	"encoding/json/v2"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/transparency-dev/tessera/client"
	"golang.org/x/mod/sumdb/note"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/rotation"
)

// fileReader reads a log that nobody appends to.
type fileReader struct{ client.FileFetcher }

func (r fileReader) IntegratedSize(context.Context) (uint64, error) {
	s, err := readTreeState(r.Root)
	return s.Size, err
}

// treeState is what Tessera keeps of the integrated tree, as it writes it.
type treeState struct {
	Size uint64 `json:"size"`
	Root []byte `json:"root"`
}

func readTreeState(dir string) (s treeState, err error) {
	b, err := os.ReadFile(filepath.Join(dir, ".state", "treeState"))
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	return s, err
}

// IsSealed says whether the log of a state directory has ended: its last leaf is a seal, under a checkpoint that the identity key
// signed. Such a directory is opened without any key. It reads a few files and takes no lock; false where there is no log yet.
func IsSealed(dir string) (bool, error) {
	id, err := readIdentity(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	verifier, err := keys.Verifier(id.Identity)
	if err != nil {
		return false, fmt.Errorf("read log.json: identity key: %w", err)
	}
	ctx := context.Background() // files
	tree := client.FileFetcher{Root: filepath.Join(dir, "log")}
	raw, err := tree.ReadCheckpoint(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read checkpoint: %w", err)
	}
	if n, _ := note.Open(raw, note.VerifierList(verifier)); n == nil {
		return false, nil // Open names it
	}
	cp, err := parseCheckpoint(raw)
	if err != nil || cp.size == 0 {
		return false, err
	}
	leaf, _ := readLeaf(ctx, tree, cp.size-1, cp.size) // likewise
	seal, _ := receipt.VerifySeal(leaf, verifier)
	return seal != nil && seal.Size == cp.size-1, nil
}

// openSealed opens a log that has ended, for reading alone. It is not done when the seal is in the log and the daily keys are not
// known to be destroyed: whoever has the keys at hand had better finish that.
func (l *Log) openSealed(ctx context.Context) (done bool, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("open sealed receipt log: %w", err)
		}
		if l.store != nil && !done {
			err = errors.Join(err, l.store.close())
			l.store = nil
		}
	}()
	if l.id, err = readIdentity(l.cfg.Dir); err != nil {
		return false, err
	}
	if err := l.id.belongs(l.cfg.Dir, l.cfg.Origin, l.cfg.Instance); err != nil {
		return false, err
	}
	l.logID = l.id.logID()
	if l.store, err = openStore(l.cfg.Dir, l.log, l.cfg.BlockFS, true); err != nil {
		return false, err
	}
	st, err := l.store.loadKeys()
	if err != nil {
		return false, err
	}
	if st == nil || st.Seal == nil {
		return false, errors.New("the log ends in a seal that the block store knows nothing of: it is an older copy, restored alone")
	}
	if !st.Sealed && l.cfg.Identity != nil && l.cfg.Daily != nil {
		return false, nil
	}
	verifier, err := keys.Verifier(l.id.Identity)
	if err != nil {
		return false, fmt.Errorf("identity key: %w", err)
	}
	dir := filepath.Join(l.cfg.Dir, "log")
	if err := checkTree(ctx, dir, verifier); err != nil {
		return false, err
	}
	if l.trees, err = lru.New[uint64, *receipt.Tree](cachedBlocks); err != nil {
		return false, err
	}
	if err := l.store.loadChain(&l.chain); err != nil {
		return false, err
	}
	if err := l.sameLog(); err != nil {
		return false, err
	}
	if err := l.loadPending(); err != nil {
		return false, err
	}
	l.readOnly, l.before = true, l.chain.Time
	l.clock = rotation.NewClock(l.cfg.Now, l.chain.Time)
	if err := l.openKeys(ctx); err != nil {
		return false, err
	}
	l.reader = fileReader{client.FileFetcher{Root: dir}}
	l.open = newBlock(l.chain.Next)
	l.blocks.Store(l.chain.Next)
	l.latch(ErrSealed)
	l.ended.Store(true)
	if _, err := l.checkpoint(ctx); err != nil {
		return false, err
	}
	return true, nil
}

// DirKeys is what a directory says about its keys, without any of them.
type DirKeys struct {
	Origin      string      `json:"origin"`
	Identity    string      `json:"identity"` // verifier key
	Keys        []KeyRecord `json:"keys"`     // oldest first
	Revocations [][]byte    `json:"revocations"`
	Seal        []byte      `json:"seal"` // leaf; nil while the log is not sealed
	Seen        time.Time   `json:"seen"` // the latest time that the directory knows
	// Retired are key versions that are not known to be destroyed.
	Retired []rotation.Ref `json:"retired"`
}

// ReadKeys reads the public part of the keys of a state directory that no process serves from. It changes nothing. ErrInUse.
func ReadKeys(dir string) (_ *DirKeys, err error) {
	lock, err := lockDir(dir, false)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	id, err := readIdentity(dir)
	if err != nil {
		return nil, err
	}
	s, err := openStore(dir, slog.New(slog.DiscardHandler), nil, true)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	st, err := s.loadKeys()
	if err != nil {
		return nil, err
	}
	out := &DirKeys{Origin: id.Origin, Identity: id.Identity}
	if st != nil {
		out.Keys, out.Revocations, out.Seen, out.Retired = st.Records(), st.Revoked, st.Floor, st.Retired
	}
	// One that is signed and not in the log yet may never be: another may take its place.
	if st != nil && st.Seal != nil {
		sealed := st.Sealed
		if !sealed {
			if sealed, err = IsSealed(dir); err != nil {
				return nil, err
			}
		}
		if sealed {
			out.Seal, out.Retired = st.Seal, st.Leftover()
		}
	}
	return out, nil
}

// ReadIdentity reads the origin and the identity key's verifier key of a state directory, whoever serves from it.
func ReadIdentity(dir string) (origin, vkey string, err error) {
	id, err := readIdentity(dir)
	return id.Origin, id.Identity, err
}
