package wal

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"strings"
	"time"
)

// Sentinels a caller branches on with errors.Is.
var (
	// ErrFull: there is no room for this record now. Nothing was appended and fn was not called. It ends when Release or
	// new disk space lets the next segment be prepared, or (rarely) when a sync that lags behind has finished.
	ErrFull = errors.New("write-ahead log is full")
	// ErrFailed: a write or a sync failed. It is latched: this WAL never appends again, and every ticket not done yet
	// fails with it. What the disk holds is only known again after a new Open.
	ErrFailed = errors.New("write-ahead log has failed")
	// ErrClosed: Run has ended or Close was called.
	ErrClosed = errors.New("write-ahead log is closed")
	// ErrCorrupt: Open found damage to something that had been acknowledged, or cannot exclude it.
	ErrCorrupt = errors.New("write-ahead log is corrupt")
	// ErrLocked: the directory is open elsewhere, in this process or another.
	ErrLocked = errors.New("write-ahead log is in use")
)

// Level is how far a record must have got before its Ticket is done. The zero value is no level and is refused.
type Level uint8

// The levels.
const (
	Queued  Level = iota + 1 // in memory: goes out with the next group, at the latest SyncEvery later while Run runs
	Written                  // in the kernel's page cache: survives the death of the process, not of the machine
	Durable                  // fdatasync has returned: survives both
)

// Limits and defaults of Config.
const (
	DefaultSegmentBytes   = 64 << 20
	DefaultMaxBytes       = 1 << 30
	DefaultMaxRecordBytes = 64 << 10
	DefaultSyncEvery      = 10 * time.Millisecond
	DefaultAhead          = 1 << 16

	minSegmentBytes = 16 << 10
	maxSegmentBytes = 1 << 30
	pageBytes       = 4 << 10
)

// Config is what Open needs. Only Dir is mandatory.
type Config struct {
	// Dir holds the segments, VERSION and LOCK, and nothing else. It is created with mode 0700. Whoever can write here can
	// forge records that have not been sealed yet: CRCs are no signatures.
	Dir string
	// SegmentBytes is the size of one preallocated segment: 16 KiB to 1 GiB, a multiple of 4096. Default 64 MiB. It may
	// change between two opens.
	SegmentBytes int64
	// MaxBytes bounds the disk the segments take, spare ones included. Default 1 GiB; at least three segments.
	MaxBytes int64
	// ReserveBytes are kept for urgent appends: others get ErrFull while less than this is left. Default a quarter of a
	// segment; at most MaxBytes less two segments.
	ReserveBytes int64
	// MaxRecordBytes bounds one record. Default 64 KiB, or an eighth of SegmentBytes if that is less; at most that eighth
	// and 512 KiB. An append wants this much room, since it cannot know the record's size before fn has made it.
	MaxRecordBytes int
	// SyncEvery bounds how long a Written record stays unsynced, and a Queued one unwritten, while Run runs; it is also the
	// delay after which an idle log notes what is durable. Default 10 ms: what gathers for longer makes each sync long, and
	// appends wait behind it.
	SyncEvery time.Duration
	// Ahead is how many sequence numbers may be handed out beyond the last sync. It bounds Recovery's lost range. Default
	// 65536. Appends get ErrFull at the end of it, others a little before urgent ones.
	Ahead uint64
	// FS is the file system. Default OS().
	FS FS
	// Log hears of torn tails, lost ranges and a full disk. Default: nobody.
	Log *slog.Logger
	// BootID names the running kernel's boot. Default: /proc/sys/kernel/random/boot_id. An error or an empty string means
	// unknown, and Open then assumes that the machine died.
	BootID func() (string, error)
}

func (c Config) withDefaults() (Config, error) {
	if c.Dir == "" {
		return c, errors.New("wal config: Dir is empty")
	}
	if c.SegmentBytes == 0 {
		c.SegmentBytes = DefaultSegmentBytes
	}
	if c.SegmentBytes < minSegmentBytes || c.SegmentBytes > maxSegmentBytes || c.SegmentBytes%pageBytes != 0 {
		return c, fmt.Errorf("wal config: SegmentBytes %d: want a multiple of %d from %d to %d",
			c.SegmentBytes, pageBytes, minSegmentBytes, maxSegmentBytes)
	}
	if c.MaxBytes == 0 {
		c.MaxBytes = max(DefaultMaxBytes, 3*c.SegmentBytes)
	}
	if c.MaxBytes < 3*c.SegmentBytes {
		return c, fmt.Errorf("wal config: MaxBytes %d: want at least three segments of %d", c.MaxBytes, c.SegmentBytes)
	}
	if c.ReserveBytes == 0 {
		c.ReserveBytes = c.SegmentBytes / 4
	}
	if c.ReserveBytes < 0 || c.ReserveBytes > c.MaxBytes-2*c.SegmentBytes {
		return c, fmt.Errorf("wal config: ReserveBytes %d: want 0 to MaxBytes less two segments, %d",
			c.ReserveBytes, c.MaxBytes-2*c.SegmentBytes)
	}
	most := min(c.SegmentBytes/8, maxGroup/2)
	if c.MaxRecordBytes == 0 {
		c.MaxRecordBytes = int(min(DefaultMaxRecordBytes, most))
	}
	if c.MaxRecordBytes < 1 || int64(c.MaxRecordBytes) > most {
		return c, fmt.Errorf("wal config: MaxRecordBytes %d: want 1 to %d", c.MaxRecordBytes, most)
	}
	if c.SyncEvery == 0 {
		c.SyncEvery = DefaultSyncEvery
	}
	if c.SyncEvery < 0 {
		return c, fmt.Errorf("wal config: SyncEvery %v is negative", c.SyncEvery)
	}
	if c.Ahead == 0 {
		c.Ahead = DefaultAhead
	}
	if c.Ahead < 16 || c.Ahead > math.MaxUint32 {
		return c, fmt.Errorf("wal config: Ahead %d: want 16 to 2^32-1", c.Ahead)
	}
	if c.FS == nil {
		c.FS = OS()
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.BootID == nil {
		c.BootID = bootID
	}
	return c, nil
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// Range is the sequence numbers From <= n < To.
type Range struct{ From, To uint64 }

// Recovery says what Open found.
type Recovery struct {
	First uint64 // the oldest record not known to be released; equal to Next when there is none. The first ever is 1
	Next  uint64 // the number the next Append gets
	// LostFrom and LostTo are the newest of Lost; equal when there is none.
	LostFrom, LostTo uint64
	// Lost are the ranges, ascending, of numbers that may have been handed out and whose records did not survive the
	// machine. A range is named by every Open until Release(n) with n >= To, so that a crash before it was declared does
	// not forget it. Numbers in it are never handed out again.
	Lost []Range
	// Torn: there were bytes of an unfinished group, or whole groups behind one, that were never acknowledged as Durable.
	// They are dropped.
	Torn bool
	// Clean: the last writer ended with Close or the end of Run.
	Clean bool
	// SameBoot: the last writer ran under the same boot id, so everything it had written is here.
	SameBoot bool
}

// Stats is a snapshot. Counters start at Open.
type Stats struct {
	Segments int   // segment files, the ready and the spare ones included
	Bytes    int64 // disk those files take
	Free     int64 // bytes urgent appends can still use without a Release; less if the disk turns out to be full
	DiskFull bool  // the last attempt to prepare a segment found no space

	Next, Written, Durable, Released uint64 // the number after the last record handed out, written, synced, released

	Records uint64 // appended
	Groups  uint64 // written, bookkeeping groups included
	Syncs   uint64 // fdatasync calls on segments in use
}
