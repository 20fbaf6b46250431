package receiptlog

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json/v2"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	stateVersion = "knhk-state 2\n"
	oldVersion   = "knhk-state 1\n" // headers that name no key statement; never released
)

// startHeaders is how many of the newest headers a start looks for: about a day's, some 50 ms.
const startHeaders = 1 << 16

// identity is what log.json fixes for the life of a directory.
type identity struct {
	Origin   string `json:"origin"`   // full origin, log id included
	LogID    string `json:"log_id"`   // 16 bytes, hex
	Identity string `json:"identity"` // verifier key of the identity key
	Instance string `json:"instance"` // replica name in its receipt ids
}

func (id identity) logID() (out [16]byte) {
	b, err := hex.DecodeString(id.LogID)
	if err != nil || len(b) != len(out) {
		return out
	}
	copy(out[:], b)
	return out
}

// lockDir makes the directory if need be, takes its lock and checks its version. The lock lives as long as the file is open.
func lockDir(dir string, create bool) (*os.File, error) {
	if create {
		if err := mkdirAll(dir); err != nil {
			return nil, fmt.Errorf("open state_dir: %w", err)
		}
	} else if _, err := os.Stat(filepath.Join(dir, "VERSION")); err != nil {
		return nil, fmt.Errorf("open state_dir %s: no VERSION file: not a knhk state directory: %w", dir, err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock state_dir: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock state_dir %s: %w (%w): stop that one, or give this one its own state_dir", dir, ErrInUse, err)
	}
	if err := checkVersion(dir, create); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func checkVersion(dir string, create bool) error {
	path := filepath.Join(dir, "VERSION")
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && create:
		entries, err := os.ReadDir(dir)
		if err != nil {
			return fmt.Errorf("read state_dir: %w", err)
		}
		for _, e := range entries {
			switch e.Name() {
			case "lock", "VERSION.tmp": // what a crash in its first moment leaves
			case "archive": // public keys of a key service, whose identity key is made before the log
			default:
				return fmt.Errorf("open state_dir %s: holds %q but no VERSION file: not a knhk state directory, give an empty one", dir, e.Name())
			}
		}
		// Its own name first: a log must not be gone, and begun anew, because nobody synced the directory it stands in.
		if err := syncDir(filepath.Dir(dir)); err != nil {
			return fmt.Errorf("sync the directory of state_dir: %w", err)
		}
		return writeFile(path, []byte(stateVersion))
	case err != nil:
		return fmt.Errorf("read state_dir version: %w", err)
	case string(b) == oldVersion:
		return fmt.Errorf("open state_dir %s: it was made by an older knhk, whose receipts do not bind their daily key, and cannot be gone on with: "+
			"keep it for that knhk to read, and start a new state_dir", dir)
	case string(b) != stateVersion:
		return fmt.Errorf("open state_dir %s: VERSION says %q, this program reads %q", dir, strings.TrimSpace(string(b)),
			strings.TrimSpace(stateVersion))
	}
	return nil
}

// loadIdentity reads log.json, or makes it: a new directory is a new log. prefix is the configured origin, vkey makes the
// identity key's verifier key for a full origin.
func loadIdentity(dir, prefix, instance string, vkey func(origin string) (string, error)) (identity, error) {
	path := filepath.Join(dir, "log.json")
	id, err := readIdentity(dir)
	if errors.Is(err, fs.ErrNotExist) {
		var raw [16]byte
		if _, err := rand.Read(raw[:]); err != nil {
			return identity{}, fmt.Errorf("make log id: %w", err)
		}
		id = identity{LogID: hex.EncodeToString(raw[:]), Instance: instance}
		id.Origin = prefix + "/" + id.LogID[:16]
		if id.Identity, err = vkey(id.Origin); err != nil {
			return identity{}, err
		}
		b, err := json.Marshal(id)
		if err != nil {
			return identity{}, fmt.Errorf("encode log.json: %w", err)
		}
		// log.json last: it says that the rest is there.
		if err := writeFile(filepath.Join(dir, "policy"), policyText(id)); err != nil {
			return identity{}, err
		}
		return id, writeFile(path, append(b, '\n'))
	}
	if err != nil {
		return identity{}, err
	}
	if err := id.belongs(dir, prefix, instance); err != nil {
		return identity{}, err
	}
	got, err := vkey(id.Origin)
	if err != nil {
		return identity{}, err
	}
	if got != id.Identity {
		return identity{}, fmt.Errorf("open log: keys.identity is %s, but this log was begun with %s: the identity key of a log "+
			"never changes; restore that key or start a new state_dir", got, id.Identity)
	}
	return id, nil
}

// belongs says whether the directory is the one of this origin and instance.
func (id identity) belongs(dir, prefix, instance string) error {
	if want := prefix + "/" + id.LogID[:16]; id.Origin != want {
		return fmt.Errorf("open log: state_dir %s holds the log %s, the configuration says origin %s: "+
			"an origin is for ever; give the new one its own state_dir", dir, id.Origin, prefix)
	}
	if id.Instance != instance {
		return fmt.Errorf("open log: state_dir %s belongs to instance %q, the configuration says %q: "+
			"receipt ids carry the name; give the new one its own state_dir", dir, id.Instance, instance)
	}
	return nil
}

// restorePolicy writes the policy file again if it is not what log.json says: nobody here reads it, but auditors take it.
func (l *Log) restorePolicy() error {
	path, want := filepath.Join(l.cfg.Dir, "policy"), policyText(l.id)
	b, err := os.ReadFile(path)
	if err == nil && bytes.Equal(b, want) {
		return nil
	}
	l.log.Warn("the policy file is missing or damaged: writing it again", "file", path, "error", err)
	return writeFile(path, want)
}

// sameLog says whether the blocks are of the log that log.json names.
func (l *Log) sameLog() error {
	if l.chain.Next == 0 {
		return nil
	}
	h, ok, err := l.store.parseHeaderAt(l.chain.Next - 1)
	switch {
	case err != nil:
		return fmt.Errorf("open receipt log: %w", err)
	case !ok:
		return fmt.Errorf("open receipt log: %w", missing(l.chain.Next-1))
	case h.LogID != l.logID || h.Origin != l.id.Origin || h.Instance != l.id.Instance:
		return fmt.Errorf("open receipt log: the blocks are of log %x (%s, instance %s), log.json says %x (%s, %s): one of them is damaged or another's",
			h.LogID, h.Origin, h.Instance, l.logID, l.id.Origin, l.id.Instance)
	}
	// What Pebble forgets with the end of a damaged manifest is what it flushed last: the first block, or a run of recent ones.
	from := l.chain.Next - min(l.chain.Next, startHeaders)
	for _, r := range [][2]uint64{{0, 1}, {from, l.chain.Next}} {
		if err := l.store.dense(r[0], r[1]); err != nil {
			return fmt.Errorf("open receipt log: the block store has lost blocks: %w", err)
		}
	}
	return nil
}

func readIdentity(dir string) (identity, error) {
	b, err := os.ReadFile(filepath.Join(dir, "log.json"))
	if err != nil {
		return identity{}, fmt.Errorf("read log.json: %w", err)
	}
	var id identity
	if err := json.Unmarshal(b, &id, json.RejectUnknownMembers(true)); err != nil {
		return identity{}, fmt.Errorf("read log.json: %w", err)
	}
	if raw, err := hex.DecodeString(id.LogID); err != nil || len(raw) != 16 || id.Origin == "" || id.Identity == "" || id.Instance == "" {
		return identity{}, fmt.Errorf("read log.json: damaged: log id %q, origin %q", id.LogID, id.Origin)
	}
	return id, nil
}

// policyText is the policy file of a log: its identity key, nothing else.
func policyText(id identity) []byte {
	return fmt.Appendf(nil, "# Policy for `knhk verify`, torchwood and other C2SP tools: the identity key of this log.\nlog %s\nquorum none\n",
		id.Identity)
}

// writeFile replaces path durably: a crash leaves the old content or the new, never a part.
func writeFile(path string, b []byte) error {
	tmp := path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// mkdirAll makes dir and what is missing above it, each durable under its name before the next.
func mkdirAll(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent := filepath.Dir(dir)
	if err := mkdirAll(parent); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(parent)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
