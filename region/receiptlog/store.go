package receiptlog

import (
	"bytes"
	"encoding/binary"
	"encoding/json/v2"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/knhk/sidecar/crypto/receipt"
)

// chunkRecords is the number of records that are compressed and read together.
const chunkRecords = 256

// The key spaces. n is the local number of a block: dense over all incarnations, big endian, so that keys sort by it.
//
//	H n          header leaf
//	X n          index of the header leaf in the log, once known
//	C n chunk    records chunk*256.. of the block, zstd
//	E n chunk    evidence of the same records, zstd; kept apart so that it can be erased
//	I n          id index of the block: sorted (hash32 of the receipt id, position) pairs
//	O uuid n     block of an outcome that stands more than farBlocks after its decision
//	P uuid       decision still without outcome farBlocks after its block: n, position
//	Q hash n pos decision found by x-request-id or trace id: hash64 of the value
//	T time n     block by the time it was closed
//	K index      key statement leaf, by its index in the log
//	M name       state: of the sequence of headers, and of the daily keys; JSON
const (
	kHeader   = 'H'
	kIndex    = 'X'
	kRecords  = 'C'
	kEvidence = 'E'
	kIDs      = 'I'
	kOutcome  = 'O'
	kPending  = 'P'
	kQuery    = 'Q'
	kTime     = 'T'
	kKey      = 'K'
	kMeta     = 'M'
)

// farBlocks is how many blocks after its decision's an outcome is searched for without an O key, and a decision waits for its outcome
// without a P key.
const farBlocks = 3

// readBack is how many of the last blocks a start reads for decisions without outcome: those that have no P keys yet, and as many again
// for outcomes that were on their way when a block was committed.
const readBack = 2 * farBlocks

// What is kept of what was read: neighbours are asked for together. A chunk or an index of unusual size is read again instead.
const (
	cachedChunks = 64
	cachedIDs    = 8
	maxCached    = 1 << 20 // bytes of one
)

// store is the Pebble database of closed blocks. Every method is safe for concurrent use. What it returns must not be changed.
type store struct {
	db     *pebble.DB
	enc    *zstd.Encoder
	dec    *zstd.Decoder
	chunks *lru.Cache[chunkKey, [][]byte]
	ids    *lru.Cache[uint64, []byte] // id indices, by block
}

type chunkKey struct {
	kind byte
	n, c uint64
}

type pebbleLog struct{ log *slog.Logger }

func (p pebbleLog) Infof(format string, args ...any)  { p.log.Debug(fmt.Sprintf(format, args...)) }
func (p pebbleLog) Errorf(format string, args ...any) { p.log.Error(fmt.Sprintf(format, args...)) }

// Fatalf is Pebble's last word: it cannot go on and must not return. Dying is right: Envoy's calls then fail closed and the
// next start audits what is there.
func (p pebbleLog) Fatalf(format string, args ...any) {
	p.log.Error("block store cannot go on", "error", fmt.Sprintf(format, args...))
	panic("block store: " + fmt.Sprintf(format, args...))
}

func openStore(dir string, log *slog.Logger, fs vfs.FS, readOnly bool) (*store, error) {
	if fs == nil {
		fs = vfs.Default
	}
	opts := &pebble.Options{
		FS: fs, Logger: pebbleLog{log.With("part", "pebble")}, ReadOnly: readOnly,
		FormatMajorVersion: pebble.FormatNewest,
		// Blocks arrive already compressed and once a second: a small memtable and few files in memory are enough.
		MemTableSize: 16 << 20,
	}
	// Pebble tries a failed flush again and again, without a pause, even while it opens. A full disk will have room again; after any
	// other failed write or sync the process ends, as with Fatalf.
	opts.EventListener = &pebble.EventListener{BackgroundError: func(err error) {
		if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
			pebbleLog{log}.Fatalf("background work: %v", err)
		}
		log.Debug("block store is out of space, trying again", "error", err) // judge says so once
	}}
	db, err := pebble.Open(filepath.Join(dir, "blocks"), opts)
	if err != nil {
		return nil, fmt.Errorf("open block store: %w", err)
	}
	return newStore(db)
}

// newStore wraps an open database, which it closes when it fails.
func newStore(db *pebble.DB) (*store, error) {
	s := &store{db: db}
	var errs [4]error
	s.enc, errs[0] = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
	s.dec, errs[1] = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(64<<20))
	s.chunks, errs[2] = lru.New[chunkKey, [][]byte](cachedChunks)
	s.ids, errs[3] = lru.New[uint64, []byte](cachedIDs)
	if err := errors.Join(errs[:]...); err != nil { // none of them fails with these arguments
		return nil, errors.Join(err, db.Close())
	}
	return s, nil
}

func (s *store) close() error {
	s.dec.Close()
	return errors.Join(s.enc.Close(), s.db.Close())
}

func key(kind byte, parts ...uint64) []byte {
	k := make([]byte, 1, 1+8*len(parts))
	k[0] = kind
	for _, p := range parts {
		k = binary.BigEndian.AppendUint64(k, p)
	}
	return k
}

func uuidKey(kind byte, uuid [16]byte) []byte { return append([]byte{kind}, uuid[:]...) }

func metaKey(name string) []byte { return append([]byte{kMeta}, name...) }

// get returns a copy of the value, nil when there is none.
func (s *store) get(k []byte) ([]byte, error) {
	v, c, err := s.db.Get(k)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read block store: %w", err)
	}
	out := append(make([]byte, 0, len(v)), v...)
	return out, c.Close()
}

// chainMeta is where chain stands.
const chainMeta = "chain"

// loadChain reads where the sequence of headers stands, and leaves into alone when there are none yet.
func (s *store) loadChain(into *chain) error {
	b, err := s.get(metaKey(chainMeta))
	if err != nil || b == nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("read block store: state %q is damaged: %w", chainMeta, err)
	}
	return nil
}

func putChain(b *pebble.Batch, c chain) error {
	j, err := json.Marshal(c)
	if err != nil {
		return fmt.Errorf("encode state %q: %w", chainMeta, err)
	}
	return b.Set(metaKey(chainMeta), j, nil)
}

func (s *store) header(n uint64) ([]byte, error) { return s.get(key(kHeader, n)) }

func (s *store) setIndex(n, index uint64) error {
	return s.db.Set(key(kIndex, n), binary.BigEndian.AppendUint64(nil, index), pebble.NoSync)
}

func (s *store) index(n uint64) (uint64, bool, error) {
	b, err := s.get(key(kIndex, n))
	if err != nil || len(b) != 8 {
		return 0, false, err
	}
	return binary.BigEndian.Uint64(b), true, nil
}

// appendChunk adds one length-prefixed item to a chunk's plain bytes.
func appendChunk(dst, item []byte) []byte {
	return append(binary.AppendUvarint(dst, uint64(len(item))), item...)
}

// chunk reads the items of one chunk.
func (s *store) chunk(kind byte, n, c uint64) ([][]byte, error) {
	k := chunkKey{kind, n, c}
	if items, ok := s.chunks.Get(k); ok {
		return items, nil
	}
	z, err := s.get(key(kind, n, c))
	if err != nil {
		return nil, err
	}
	if z == nil {
		return nil, fmt.Errorf("block %d: chunk %d is missing", n, c)
	}
	plain, err := s.dec.DecodeAll(z, nil)
	if err != nil {
		return nil, fmt.Errorf("block %d: chunk %d is damaged: %w", n, c, err)
	}
	small := len(plain) <= maxCached
	items := make([][]byte, 0, chunkRecords)
	for len(plain) > 0 {
		size, w := binary.Uvarint(plain)
		if w <= 0 || size > uint64(len(plain)-w) {
			return nil, fmt.Errorf("block %d: chunk %d is damaged", n, c)
		}
		items = append(items, plain[w:w+int(size):w+int(size)])
		plain = plain[w+int(size):]
	}
	if small {
		s.chunks.Add(k, items)
	}
	return items, nil
}

// idIndex reads the id index of block n, nil when there is no such block.
func (s *store) idIndex(n uint64) ([]byte, error) {
	if list, ok := s.ids.Get(n); ok {
		return list, nil
	}
	list, err := s.get(key(kIDs, n))
	if err == nil && list != nil && len(list) <= maxCached {
		s.ids.Add(n, list)
	}
	return list, err
}

// record reads the record at pos of block n.
func (s *store) record(kind byte, n, pos uint64) ([]byte, error) {
	items, err := s.chunk(kind, n, pos/chunkRecords)
	if err != nil {
		return nil, err
	}
	if i := pos % chunkRecords; i < uint64(len(items)) {
		return items[i], nil
	}
	return nil, fmt.Errorf("block %d: record %d is missing", n, pos)
}

// scan calls fn for every key from lower on and below upper, until it returns an error. k and v are borrowed.
func (s *store) scan(lower, upper []byte, fn func(k, v []byte) error) error {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	if err != nil {
		return err
	}
	for it.First(); it.Valid(); it.Next() {
		v, err := it.ValueAndErr()
		if err == nil {
			err = fn(it.Key(), v)
		}
		if err != nil {
			return errors.Join(err, it.Close())
		}
	}
	return errors.Join(it.Error(), it.Close())
}

// each calls fn for every record of block n, which holds count, in order, a chunk at a time, until it returns an error.
func (s *store) each(n, count uint64, fn func(pos uint32, leaf []byte) error) error {
	pos := uint64(0)
	for c := uint64(0); c*chunkRecords < count; c++ {
		items, err := s.chunk(kRecords, n, c)
		if err != nil {
			return err
		}
		for _, leaf := range items {
			if err := fn(uint32(pos), leaf); err != nil {
				return err
			}
			pos++
		}
	}
	if pos != count {
		return fmt.Errorf("block %d: holds %d records, its header says %d", n, pos, count)
	}
	return nil
}

// records reads all records of block n, which holds count.
func (s *store) records(n, count uint64) ([][]byte, error) {
	all := make([][]byte, 0, min(count, 1<<16)) // what a header says is not trusted yet
	err := s.each(n, count, func(_ uint32, leaf []byte) error {
		all = append(all, leaf)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}

// parseHeaderAt reads and parses the header of block n; ok is false when there is no such block.
func (s *store) parseHeaderAt(n uint64) (h *receipt.Header, ok bool, err error) {
	leaf, err := s.header(n)
	if err != nil || leaf == nil {
		return nil, false, err
	}
	if h, err = receipt.ParseHeader(leaf); err != nil {
		return nil, true, fmt.Errorf("block %d: %w", n, err)
	}
	return h, true, nil
}

// dense says whether every block from n on and below end has a header.
func (s *store) dense(n, end uint64) error {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: key(kHeader, n), UpperBound: key(kHeader, end)})
	if err != nil {
		return fmt.Errorf("read block store: %w", err)
	}
	for it.First(); it.Valid() && bytes.Equal(it.Key(), key(kHeader, n)); it.Next() {
		n++
	}
	if err := errors.Join(it.Error(), it.Close()); err != nil {
		return fmt.Errorf("read block store: %w", err)
	}
	if n < end {
		return missing(n)
	}
	return nil
}
