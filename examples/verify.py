#!/usr/bin/env python3
"""Verifies knhk receipt bundles with the Python standard library alone; it shares no code with knhk.

usage: verify.py POLICY BUNDLE...

Prints one line for each bundle; exits with 0 when all verify, 1 when one does not, 2 for wrong usage or a policy it cannot read.
The formats are C2SP signed-note, tlog-checkpoint and tlog-proof and those of the Go package crypto/receipt. It leaves to "knhk
verify", and so may accept what that refuses: other spellings of a value and values that no recorder writes, the number and use of
parts, the order of times, what a key statement says of its predecessor and of the log before it, which outcomes may follow one
another, and whether headers agree on recorder, sequence and ordinals; it knows no witnesses and no keys but Ed25519.
"""
import base64, hashlib, json, pathlib, sys

def need(ok, why):
    if not ok:
        raise ValueError(why)

def sha256(data):
    return hashlib.sha256(data).digest()

def unbase64(text):  # standard, or base64url without padding
    return base64.b64decode(text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4), validate=True)

# Ed25519 with the names of RFC 8032 section 5.1. Points are (x, y).
p, L = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493
d, sqrt_of_minus_1 = -121665 * pow(121666, -1, p) % p, pow(2, (p - 1) // 4, p)

def decode_point(encoded):
    sign, y = divmod(int.from_bytes(encoded, "little"), 2**255)
    root = pow((y * y - 1) * pow(d * y * y + 1, -1, p), (p + 3) // 8, p)
    for x in (root, -root % p, root * sqrt_of_minus_1 % p, -root * sqrt_of_minus_1 % p):
        if y < p and x % 2 == sign and (y * y - x * x - 1 - d * x * x * y * y) % p == 0:
            return x, y
    raise ValueError("a public key is no point of the curve")

def add(P, Q):  # RFC 8032 section 3, with a = -1
    (x1, y1), (x2, y2), product = P, Q, d * P[0] * Q[0] * P[1] * Q[1]
    return (x1 * y2 + x2 * y1) * pow(1 + product, -1, p) % p, (y1 * y2 + x1 * x2) * pow(1 - product, -1, p) % p

def multiply(s, P):
    Q = (0, 1)
    for bit in bin(s)[2:]:
        Q = add(Q, Q) if bit == "0" else add(add(Q, Q), P)
    return Q

def ed25519(public, message, signature):
    R, S = signature[:32], int.from_bytes(signature[32:], "little")
    k = int.from_bytes(hashlib.sha512(R + public + message).digest(), "little") % L
    B, (x, y) = decode_point(b"\x58" + b"\x66" * 31), decode_point(public)
    x, y = add(multiply(S % L, B), multiply(k, (-x, y)))  # [S]B - [k]A, which must be R
    return len(signature) == 64 and S < L and R == (y + x % 2 * 2**255).to_bytes(32, "little")

def read_key(vkey):  # name, key hash and public key of "name+hash+base64"
    name, key_hash, key = vkey.split("+", 2)
    key = unbase64(key)
    need(len(key) == 33 and key[0] == 1, "a key that is not Ed25519")
    need(sha256(name.encode() + b"\n" + key)[:4].hex() == key_hash, "a verifier key with a wrong hash")
    return name, bytes.fromhex(key_hash), key[1:]

def signed(note, vkey):  # the text of a signed note without its last newline, if vkey has signed it
    name, key_hash, public = read_key(vkey)
    text, _, lines = note.rpartition("\n\n")
    for dash, signer, signature in (line.split(" ") for line in lines.strip("\n").split("\n")):
        if (dash, signer, unbase64(signature)[:4]) == ("\u2014", name, key_hash):
            need(ed25519(public, text.encode() + b"\n", unbase64(signature)[4:]), "a wrong signature by " + vkey)
            return text
    raise ValueError("not signed by " + vkey)

def root_above(leaf_hash, index, size, path):  # the tree's root, by the definition in RFC 6962 section 2.1.1
    need(0 <= index < size and (size > 1) == bool(path), "an index or a path that does not fit its tree")
    if size == 1:
        return leaf_hash
    half = 1 << (size - 1).bit_length() - 1
    if index < half:
        return sha256(b"\1" + root_above(leaf_hash, index, half, path[:-1]) + path[-1])
    return sha256(b"\1" + path[-1] + root_above(leaf_hash, index - half, size - half, path[:-1]))

def check_place(leaf, index, size, path, root):
    above = root_above(sha256(b"\0" + leaf.encode()), int(index), int(size), [unbase64(sibling) for sibling in path])
    need(above == unbase64(root), "a leaf that is not in its tree")

def parse(leaf, kind):
    need(leaf.startswith("knhk/%s/v1\n" % kind), "a leaf that is no " + kind)
    return json.loads(leaf.partition("\n")[2])

def check_evidence(evidence, decision):
    hashed = b"knhk/commitment/v1\n" + unbase64(evidence["salt"]) + len(evidence["fields"]).to_bytes(8, "big")
    for field in evidence["fields"]:
        for tag, value in (b"\1", field["name"]), (b"\2", field["value"]):
            value = unbase64(value["b64"]) if isinstance(value, dict) else value.encode()
            hashed += tag + len(value).to_bytes(8, "big") + value
    need(evidence["evidence"] == "knhk/evidence/v1" and evidence["id"] == decision["id"], "evidence of another receipt")
    need(sha256(hashed) == unbase64(decision["request"]), "evidence does not open the decision's commitment")

def verify(logs, bundle):
    need(bundle["bundle"] == "knhk/bundle/v1" and bundle["records"] and bundle["keys"], "no bundle with records and keys")
    checkpoint = bundle["keys"][0]["proof"].partition("\n\n")[2]
    origin, size, root = checkpoint.split("\n")[:3]
    need(origin in logs, "the policy has no log %r" % origin)
    signed(checkpoint, logs[origin])
    for proof in bundle["headers"] + bundle["keys"]:
        lines, _, below = proof["proof"].partition("\n\n")
        title, index, *path = lines.split("\n")
        need(title == "c2sp.org/tlog-proof@v1" and index.startswith("index "), "not a tlog-proof")
        need(below == checkpoint, "proofs under different checkpoints")
        check_place(proof["leaf"], index[6:], size, path, root)

    keys = [parse(signed(proof["leaf"], logs[origin]), "key") for proof in bundle["keys"]]
    for key in keys:
        name, _, public = read_key(key["key"])
        need(key["origin"] == name == origin and public != read_key(logs[origin])[2], "not a daily key of this log")
        need(0 < int(key["not_after"]) - int(key["not_before"]) <= 24 * 3600 * 10**9, "a daily key for more than 24 hours")
    signed(checkpoint, keys[0]["key"])

    headers = [parse(proof["leaf"], "header") for proof in bundle["headers"]]
    records = []
    for record in bundle["records"]:
        entry, header = parse(record["leaf"], "outcome" if records else "decision"), headers[record["header"]]
        index, ordinal, count = int(record["index"]), int(entry["ordinal"]), int(header["count"])
        need(entry["origin"] == header["origin"] == origin, "a record or header of another log")
        need(entry["id"].endswith("." + header["instance"]), "a record of another instance")
        need(int(record["size"]) == count, "a block of another size")
        check_place(record["leaf"], index, count, record["path"], header["root"])
        need(int(header["first"]) + index <= ordinal <= int(header["last"]) - (count - 1 - index), "an ordinal out of place")
        need(not records or entry["id"] == records[0]["id"] and ordinal > int(records[-1]["ordinal"]), "not this receipt's next record")
        records.append(entry)
    if "evidence" in bundle:
        check_evidence(bundle["evidence"], records[0])
    told = [records[0]["verdict"]] + ([outcome["result"] for outcome in records[1:]] or ["pending"])
    return "verified %s: %s; log %s, %d entries" % (records[0]["id"], ", ".join(told), origin, int(size))

def read_policy(text):  # {origin: verifier key}
    logs = {}
    for words in filter(None, (line.partition("#")[0].split() for line in text.split("\n"))):
        if words != ["quorum", "none"]:
            need(words[0] == "log" and read_key(words[1])[0] not in logs, "more than one Ed25519 key for each log: use knhk verify")
            logs[read_key(words[1])[0]] = words[1]
    need(logs, "no log line")
    return logs

def main(args):
    try:
        need(len(args) > 1, __doc__)
        logs = read_policy(pathlib.Path(args[0]).read_text("utf-8"))
    except Exception as error:
        print(error, file=sys.stderr)
        return 2
    status = 0
    for name in args[1:]:
        try:
            line = verify(logs, json.loads(pathlib.Path(name).read_text("utf-8")))
        except Exception as error:  # what cannot be read is refused
            line, status = "refused: %r" % error, 1
        print("%s: %s" % (name, line.encode("unicode_escape").decode()))
    return status

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
