// Package wal is the write-ahead log: it gives each record a dense sequence number and keeps it through the death of the
// process (level Written) or of the machine (level Durable) until Release. region/receiptlog is its only caller in
// service; stores that want to test their own recovery use the file system in wal/waltest.
//
// # What it promises
//
//   - Numbers are dense and never given to two acknowledged records. Replay brings every acknowledged record that is not
//     released, in order, byte for byte.
//   - Queued: nothing, but that the record goes out with the next group, in order, and within SyncEvery while Run runs.
//     Written: when Append has returned, the record and everything appended before it is in the page cache. Durable: when
//     Ticket.Wait has returned nil, fdatasync has covered the record and everything appended before it.
//   - After a machine crash, Recovery.Lost names every number that may have been handed out and whose record is gone. The
//     range reaches to the ceiling (see Config.Ahead), so it is an upper bound. It is named again by every Open until it
//     is released. On the same boot, and after a clean end, nothing is lost.
//   - A failed write or sync of a segment in use is latched: ErrFailed for every waiter and every later call, and nothing
//     is tried again. A full disk is not a failure: appends get ErrFull until there is space.
//   - Damage to a record known to be durable makes Open fail with ErrCorrupt, the file and the offset; nothing is repaired.
//
// # What it does not promise
//
// An append whose Append or Wait returned an error, or never returned, may be there after a restart or not; its number may
// be given to another record if it is not. Records may be replayed although they were released shortly before a crash. A
// CRC is no signature: whoever can write to the directory can forge what has not been sealed into a block.
//
// # How it works
//
// Preallocated, zero-filled segments hold groups: a header and the records of one write. Append copies a record into the
// group being formed. Whoever needs it written (a Written append, the committer) writes everything pending; the committer,
// Run, then syncs with no lock held while the next group forms, and closes one channel for everyone who waited. It never
// lingers. The next segment is made ready ahead of need, recycled by rename when one has been released. A group is valid
// in one log, one segment and one offset only, and no segment number is used twice, so what a recycled file still
// holds is never mistaken for a record. Every Open begins a new segment, whose first group says where the chain of groups
// before it ended.
//
// Each header says below which number all was synced when it was made. Open takes a group that does not check out for the
// torn end of an unacknowledged write only if no valid group, in any segment, says that it had been synced. So that this
// holds for the last group too, an idle log writes an empty group that says so, and a segment that was left gets a mark in
// its last bytes which says that its successor was in use.
//
// # What cannot be told apart
//
// These come out as "not acknowledged, declared lost" although they were acknowledged, since nothing on the disk says so:
//
//   - Damage to the last synced groups when no later header has reached the disk. The note of an idle log is written at
//     most SyncEvery after the sync and is not synced itself: on the same boot the window is that period, over a machine
//     crash it lasts until the kernel has written the page (30 s by default on Linux) or the next sync.
//   - The same for a whole segment that goes bad or missing before the mark in its predecessor has reached the disk.
//   - A directory restored from a copy or a snapshot: it is an intact older log. Only a store beside it can know better,
//     so callers should compare Recovery.Next with the last number they sealed.
//
// A disk that acknowledges a sync and forgets it looks like the first case, or, if later headers survived, like damage.
// The log relies on a write of part of a page leaving the rest of that page intact (which holds for disks that write
// sectors whole): the last, partly filled page of acknowledged records is rewritten with the next group.
//
// The boot id stands for "the page cache has not been lost". That is wrong for a volume that was detached by force and
// attached again on the same boot: written records may be missing then without being declared; durable ones are still
// checked. It is too careful for a volume that moved to another machine in order but without a clean end. CRC-32C misses
// one random damage in 2^32.
package wal
