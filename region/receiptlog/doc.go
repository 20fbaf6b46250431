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
//   - Nothing is signed by a daily key that is past its age (crypto/rotation), and nothing at all after a failed write or sync.
//
//   - Every leaf says under which daily key it stands. The first leaf is the statement of the first key, each statement stands at the
//     index it names, and every header names the statement in force and was made within its key's time, by a clock that never
//     goes back. So receipt.KeyAudit judges the keys from the tiles alone, and a bundle, which shows the last leaf of its tree,
//     cannot be made with a key that is no longer in force.
//
//   - Decide and Outcome never wait for a key: not for a signature, not for a change of keys, not for the transparency log.
//
//   - Open checks what it can without reading everything: the WAL byte by byte and that it meets the blocks, the last header, the
//     tree state and the signed checkpoint against the tiles of the log's right edge. What lies further back is checked when it is
//     read (checksums, proofs), and all of it by Fsck. Damage that is found is named, and nothing is served.
//
// What it does not promise: that a receipt id proves anything before its header is under a signed checkpoint (about
// seal_every plus the checkpoint interval), nor that one replica's directory survives the loss of its disk: that takes
// peers. Nor that a copy of a directory whose key has not changed since is found out: only the key store and peers know better than
// a directory. It starts no goroutine of its own except inside Run and, because Tessera's appender works in the background, between
// Open and Close. One process owns a directory: Open takes a lock.
//
// # Keys
//
// The log is what crypto/rotation calls its Tree and its Journal. A change of the daily key holds the log: what is committed is
// brought into the tree, then no header is made, committed or added until the statement stands there and the new key signs. Requests
// go on meanwhile: their records wait in the WAL, as they do while no key can sign; after max_unsigned they are refused. A header
// whose time would be past its key's end is not made but waits for the next key.
//
// The state of the keys lies in the block store, in synced batches, so it is never older or newer than the headers beside it. A start
// settles it before it makes or adds a header: a statement that was signed is brought in, byte for byte; headers that were committed
// under the key in force are added before its successor is stated; and what the log holds must be what the state knows.
//
// A revocation pins the last tree of a key that the log stands by. Bundles carry the proof that their tree is consistent with each
// pin, in either direction: an auditor who is given the revocation asks for it.
//
// A log whose identity key is compromised is sealed: what is open is closed into a last block, the seal is the last leaf, and from
// then on Decide refuses and the directory is read without any key. Its successor has a directory and an identity key of its own and
// quotes it in its first leaf.
//
// # Locks
//
// They are taken in this order, and nobody who has one waits for one before it:
//
//	keyMu     a change of the keys: Settle, Rotate, Revoke, Seal. Calls key store and tree
//	addMu     leaves are added to the transparency log
//	headerMu  a header's kind and key are chosen, its block is cut and committed
//	mu        records are appended to the open block; a few instructions, inside the WAL's append lock
//
// The sealer takes headerMu, the publisher addMu, rotation.Tree's Hold addMu and headerMu; whoever waits for the first two, or for headerMu,
// gives up with its context and gets it in turn. Requests take mu alone.
//
// # The directory
//
//	VERSION    layout version, refused when unknown
//	lock       flock of the owner
//	log.json   origin, log id and identity key, fixed when the directory is made
//	policy     what an auditor needs: the policy file for `knhk verify`
//	wal/       records that are in no block yet (region/wal)
//	blocks/    closed blocks, headers, evidence, indices, the state of the keys (Pebble)
//	log/       the transparency log as tlog-tiles (Tessera POSIX): this folder is what tiles serves
//
// The log's origin is the configured origin plus a random log id made with the directory, so that two directories can never
// sign different histories of one log, whatever is deleted or restored under them.
package receiptlog
