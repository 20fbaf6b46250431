// Package receipt is the record format of knhk and its proofs: how a decision, an outcome, a block header and a key
// statement become bytes, how those bytes are proved to stand in a transparency log, and how somebody who trusts nothing
// but a policy file checks such a proof. The recorder writes with it (Append*, Tree, SignKeyStatement), an auditor reads
// with it (ParsePolicy, ParseBundle, Verify) and imports nothing else: no server, no store, no cgo, no network.
//
// # What a verified bundle proves
//
// The log's identity key signed a checkpoint; the daily key did as well, and was brought in by a statement that stands in
// that same log, signed by the identity key and by its predecessor; the policy's witnesses, if it names any, signed it too;
// below that checkpoint stand the headers; below the headers stand exactly these records, byte for byte, at these places;
// decision and outcomes belong to one receipt id; and evidence, if given, is what the decision committed to.
//
// # What it does not prove
//
// It does not prove that what the records say is true, only that the log's keys stand by it and cannot take it back. It
// does not prove that the bundle is complete: whoever makes a bundle can leave the outcome out, and then it reads as
// pending. It does not compare a key statement's FirstRoot with the tree, which takes a consistency proof. It does not prove
// that everybody sees the same log; that is what witnesses in the policy are for. A receipt id without a bundle proves
// nothing.
//
// # Time
//
// Every time in a record is the recorder's own clock. Signatures carry no time, so "the daily key was in force" cannot be
// proved from signatures alone. Verify refuses what contradicts itself: a record later than its header, a header later than
// the end of the daily key that signed above it, a header later than a witness's cosignature, a witness's cosignature
// earlier than the daily key's start, each by more than MaxSkew. With witnesses the cosignature bounds the time from
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
