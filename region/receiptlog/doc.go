// Package receiptlog turns decisions and outcomes into receipts: it appends them to the write-ahead log, closes them into
// blocks, commits each block's header to an append-only transparency log (Tessera, C2SP tlog-tiles) and hands out bundles
// that anyone can verify offline with crypto/receipt.
//
// What it promises:
//
//   - Decide returns nil only when the decision has reached its level: written (survives the death of the process) or
//     durable (survives the death of the machine). If it returns an error the caller must refuse.
//
//   - Every record that was acknowledged stands in exactly one block, exactly once, in the order of its ordinal.
//
//   - A header's bytes are committed here before they go to the log and are never recomputed: after a crash the same bytes
//     are added again. Equal duplicates in the log are legal, differing bytes for one (incarnation, seq) are not.
//
//   - A decision without an outcome is visible as pending; after a crash or outcome_timeout it gets the outcome "unknown"
//     with the reason. It never disappears.
//
//   - Nothing is signed by a daily key that is past its age, and nothing at all after a failed write or sync.
//
//   - Open checks what it can without reading everything: the WAL byte by byte and that it meets the blocks, the last header, the
//     tree state and the signed checkpoint against the tiles of the log's right edge. What lies further back is checked when it is
//     read (checksums, proofs), and all of it by Fsck. Damage that is found is named, and nothing is served.
//
// What it does not promise: that a receipt id proves anything before its header is under a signed checkpoint (about
// seal_every plus the checkpoint interval), nor that one replica's directory survives the loss of its disk: that takes
// peers. It starts no goroutine of its own except inside Run and, because Tessera's appender works in the background, between
// Open and Close. One process owns a directory: Open takes a lock.
//
// The directory:
//
//	VERSION    layout version, refused when unknown
//	lock       flock of the owner
//	log.json   origin, log id and identity key, fixed when the directory is made
//	policy     what an auditor needs: the policy file for `knhk verify`
//	wal/       records that are in no block yet (region/wal)
//	blocks/    closed blocks, headers, evidence, indices (Pebble)
//	log/       the transparency log as tlog-tiles (Tessera POSIX): this folder is what tiles serves
//
// The log's origin is the configured origin plus a random log id made with the directory, so that two directories can never
// sign different histories of one log, whatever is deleted or restored under them.
package receiptlog
