// Package rotation keeps the daily key of a log: it makes the next key, states it in the log, switches to it, destroys the
// old one, and refuses every signature that a key may not make. It is driven by the log that it signs, starts no goroutine
// and has no ticker; its state lies beside the log.
//
// What it promises:
//
//   - No key signs past its age (Config.Interval, at most MaxAge), whatever the wall clock does, whoever is dead, however
//     often the process restarts: age is judged in Sign itself, by a Clock that never goes back.
//
//   - No two keys sign checkpoints of one size. A key statement stands at the index it names: its predecessor signs sizes up
//     to that index, the new key those above it.
//
//   - Whatever call fails, fails though it was done, or is the last one before the process ends: the next Settle goes on
//     from there, forward, and never twice.
//
//   - A copy of the state from before, with the key store gone on, is refused by Open or changes its key before anything is
//     signed, as far as the store shows it (see Open).
//
//   - A private key is named as destroyed only when the store says that it is gone.
//
// What it does not promise: that an old copy of a directory whose key has not changed since is found out; that takes peers.
// Nor that a log signs while its store is away: records wait, durable and unsigned, and age goes on.
//
// A label of the store belongs to one log. Two logs that share one would find each other's versions and refuse to start.
//
// # A change of keys
//
//	prepare   the store makes a version                        State.Loose, then State.Prepared
//	hold      no new leaves; all that is there is published under the old key
//	state     a statement over the tree as it stands is signed  State.Next
//	put       the statement becomes the next leaf
//	activate  the new key signs                                State.Current; the old one to State.Retired
//	destroy   the store destroys the old version
//
// Each line's state is durable before the next line begins. Once a statement may be in the journal there is no way back, only
// forward: no header is made before it stands in the log (HeaderKey says no), so its place stays free.
package rotation
