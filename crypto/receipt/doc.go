// Package receipt is the record format of knhk and its proofs: how a decision, an outcome, a block header and a key
// statement become bytes, how those bytes are proved to stand in a transparency log, and how somebody who trusts nothing
// but a policy file checks such a proof. The recorder writes with it (Append*, Tree, SignKeyStatement, SignSeal), an auditor reads
// with it (ParsePolicy, ParseBundle, Verify) and imports nothing else: no server, no store, no cgo, no network.
//
// # What a verified bundle proves
//
// The log's identity key signed a checkpoint; the daily key in force for its size did as well, and was brought in by a statement
// that stands in that same log, signed by the identity key and, where it was rotated, by its predecessor; the policy's
// witnesses, if it names any, signed it too; below that checkpoint stand the headers; below the headers stand exactly these
// records, byte for byte, at these places; decision and outcomes belong to one receipt id; and evidence, if given, is what the
// decision committed to.
//
// # Keys that have ended
//
// A key statement stands in the log at the index it names, so each size of the log has one daily key: the one stated last below
// it. The bundle shows the last leaf below its checkpoint, and that names the statement in force. A daily key that has ended
// can therefore not sign a tree of the log's own making beyond its last, whoever holds it, even when the identity key signs every
// checkpoint it is shown. The audit path of a statement or seal proves the root it names as well: no proof of consistency is needed
// for that.
//
// What a bundle alone cannot show is leaves of the thief's own. Who holds a daily key that has ended, and gets the identity key to
// sign a checkpoint, can take the log as it was at any size that key signed, or as it is now, and add headers of his own that name
// the old statement, with times from its day. Below such a checkpoint the bundle has nothing that contradicts it: until the key
// ended, the fork could have been the log, and of a log as it is now the bundle does not show the later statement. These show it:
//
//   - Witnesses in the policy: a checkpoint that was cosigned more than MaxSkew after the end of its daily key is refused, and a
//     witness does not sign a fork of what it has seen.
//   - A revocation of the key, once Policy.Revoke has it: what the key signed beyond the pinned tree is refused, and the rest
//     must be consistent with that tree. What the key signed by right still verifies, by a bundle that brings the proof.
//   - KeyAudit of the leaves, and whoever compares the checkpoints of two bundles.
//
// Nothing of this helps when the identity key signs more than checkpoints for somebody else: he states daily keys of his own.
// Then the log must be sealed; once Policy.Revoke has the seal, nothing beyond it verifies. A successor is another log, with another
// origin and another identity key, whose first key statement quotes the sealed one.
//
// KeyAudit finds in the log's leaves alone, from the times of the headers, whether every key was in force for its day only.
//
// # What it does not prove
//
// It does not prove that what the records say is true, only that the log's keys stand by it and cannot take it back. It
// does not prove that the bundle is complete: whoever makes a bundle can leave the outcome out, and then it reads as
// pending. It does not prove that everybody sees the same log; that is what witnesses in the policy are for. A receipt id
// without a bundle proves nothing.
//
// # Time
//
// Every time in a record is the recorder's own clock. Signatures carry no time, so "the daily key was in force" cannot be
// proved from signatures alone. Verify refuses what contradicts itself. Headers and key statements of a
// log are timed by one clock that never goes back: a header outside the time of the daily key it names, or earlier than one before it in the
// log, is refused to the nanosecond. Other clocks may differ by MaxSkew: a record later than its header, a header later than a
// witness's cosignature, a witness's cosignature earlier than the daily key's start or later than its end. With witnesses the cosignature bounds the time from
// above: all below the checkpoint existed by then. Without them a thief of both keys could backdate.
//
// # Canonical form
//
// A leaf is a prefix naming its type and version, then one JSON object without white space. Members stand in a fixed order.
// 64-bit integers are decimal strings without leading zeros, 32-bit ones JSON numbers; times are decimal strings of Unix
// nanoseconds, never negative; bytes are unpadded base64url strings; text is a JSON string escaped as RFC 8785 section
// 3.2.2.2 says, or, where it is not valid UTF-8, {"b64":"..."}. Optional members that are zero, empty or false are left
// out. Parsers accept nothing but what the appenders write for the same values, so that no record has two spellings. Hashes
// are taken over the stored bytes.
package receipt
