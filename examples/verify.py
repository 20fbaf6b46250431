#!/usr/bin/env python3
"""Verifies knhk receipt bundles with the Python standard library alone: verify.py POLICY BUNDLE...

It shares no code with knhk. It prints one line for each bundle and exits with 0 when all verify, 1 when one does not, 2 for wrong usage
or a policy it cannot read. The formats are C2SP signed-note, tlog-checkpoint and tlog-proof, and those of the Go package crypto/receipt.
It leaves to "knhk verify", and so may accept what that refuses: other spellings of a value, values that no recorder writes, parts that
are too many or of no use, the order of times, what a key statement says of its predecessor, which outcomes may follow one another, and
whether headers agree on recorder, sequence and ordinals; it knows nothing of revocations, and so looks at no proof of consistency with
one; it reads no policy with witnesses or P-256 keys."""
import base64, hashlib, json, pathlib, sys

def need(ok, why):
    if not ok:
        raise ValueError(why)

def unbase64(text):  # standard, or base64url without padding
    return base64.b64decode(text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4), validate=True)

p, L = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493  # Ed25519, RFC 8032 section 5.1, with its names
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
    even = multiply(s // 2, add(P, P)) if s else (0, 1)
    return add(even, P) if s % 2 else even

def ed25519(public, message, signature):
    R, S = signature[:32], int.from_bytes(signature[32:], "little")
    k = int.from_bytes(hashlib.sha512(R + public + message).digest(), "little") % L
    B, (x, y) = decode_point(b"\x58" + b"\x66" * 31), decode_point(public)
    x, y = add(multiply(S % L, B), multiply(k, (-x, y)))  # [S]B - [k]A, which must be R
    return len(signature) == 64 and S < L and R == (y + x % 2 * 2**255).to_bytes(32, "little")

def read_key(vkey):  # name, key hash and public key of "name+hash+base64"
    name, key_hash, encoded = vkey.split("+", 2)
    key = unbase64(encoded)
    need(len(key) == 33 and key[0] == 1 and hashlib.sha256(name.encode() + b"\n" + key).hexdigest()[:8] == key_hash, "no Ed25519 key")
    return name, bytes.fromhex(key_hash), key[1:]

def signed(note, vkey):  # the text of a signed note without its last newline, if vkey has signed it
    name, key_hash, public = read_key(vkey)
    text, _, lines = note.rpartition("\n\n")
    signatures = [unbase64(line.split(" ")[2]) for line in lines.split("\n") if line.startswith("\u2014 %s " % name)]
    need(any(s[:4] == key_hash and ed25519(public, text.encode() + b"\n", s[4:]) for s in signatures), "not signed by " + vkey)
    return text

def root_above(leaf, index, size, path):  # the tree's root, as RFC 6962 section 2.1.1 defines it
    need(0 <= index < size and (size > 1) == bool(path), "an index or a path that does not fit its tree")
    if size == 1:
        return hashlib.sha256(b"\0" + leaf.encode()).digest()
    half, sibling = 1 << ((size - 1).bit_length() - 1), unbase64(path[-1])
    if index < half:
        return hashlib.sha256(b"\1" + root_above(leaf, index, half, path[:-1]) + sibling).digest()
    return hashlib.sha256(b"\1" + sibling + root_above(leaf, index - half, size - half, path[:-1])).digest()

def root_before(index, size, path):  # of the leaves before one: the hashes of its path that stand to the left cover them
    if not path or index == 0:
        return hashlib.sha256().digest()
    half, sibling = 1 << ((size - 1).bit_length() - 1), unbase64(path[-1])
    if index <= half:
        return sibling if index == half else root_before(index, half, path[:-1])
    return hashlib.sha256(b"\1" + sibling + root_before(index - half, size - half, path[:-1])).digest()

def parse(leaf, kind):
    need(leaf.startswith("knhk/%s/v1\n" % kind), "a leaf that is no " + kind)
    return json.loads(leaf.partition("\n")[2])

def check_evidence(evidence, decision):
    need(evidence["evidence"] == "knhk/evidence/v1" and len(evidence["salt"]) == 43, "not evidence with a salt of 32 bytes")
    hashed = hashlib.sha256(b"knhk/commitment/v1\n" + unbase64(evidence["salt"]) + len(evidence["fields"]).to_bytes(8, "big"))
    for field in evidence["fields"]:
        for tag, value in (b"\1", field["name"]), (b"\2", field["value"]):
            value = unbase64(value["b64"]) if isinstance(value, dict) else value.encode()
            hashed.update(tag + len(value).to_bytes(8, "big") + value)
    need(evidence["id"] == decision["id"] and hashed.digest() == unbase64(decision["request"]), "evidence opens another commitment")

def verify(logs, bundle):
    checkpoint = bundle["keys"][0]["proof"].partition("\n\n")[2]
    origin = checkpoint.partition("\n")[0]
    need(bundle["bundle"] == "knhk/bundle/v1" and origin in logs, "no bundle of a log in the policy")
    size, root = signed(checkpoint, logs[origin]).split("\n")[1:3]
    places = []  # of each leaf: its index, and the root of the leaves before it
    for proof in bundle["headers"] + bundle["keys"] + [bundle["tail"]]:
        lines, _, below = proof["proof"].partition("\n\n")
        title, index, *path = lines.split("\n")
        need((title, index[:6], below) == ("c2sp.org/tlog-proof@v1", "index ", checkpoint), "no tlog-proof for the one checkpoint")
        need(root_above(proof["leaf"], int(index[6:]), int(size), path) == unbase64(root), "a leaf that is not in the log")
        places.append((int(index[6:]), root_before(int(index[6:]), int(size), path)))
    key = parse(signed(bundle["keys"][0]["leaf"], logs[origin]), "key")
    need(key["origin"] == read_key(key["key"])[0] == origin and read_key(key["key"]) != read_key(logs[origin]), "no daily key of this log")
    need(0 < int(key["not_after"]) - int(key["not_before"]) <= 24 * 3600 * 10**9, "a daily key for more than 24 hours")
    in_force = int(key["first_size"])
    need((in_force, unbase64(key["first_root"])) == places[len(bundle["headers"])], "a key statement that stands elsewhere than it says")
    signed(checkpoint, key["key"])
    tail = bundle["tail"]["leaf"]  # the last leaf names the key statement in force, or is it
    if tail != bundle["keys"][0]["leaf"]:
        tail = parse(signed(tail, logs[origin]), "seal") if tail.startswith("knhk/seal/") else parse(tail, "header")
        need(int(tail["key"]) == in_force and tail["origin"] == origin, "not signed by the daily key that is in force")
    need(places[-1][0] == int(size) - 1, "a tail that is not the last leaf")
    for (index, _), header in zip(places, bundle["headers"]):
        need(index < in_force or int(parse(header["leaf"], "header")["key"]) == in_force, "a header under another key statement")
    records = []
    for record in bundle["records"]:
        entry = parse(record["leaf"], "outcome" if records else "decision")
        header = parse(bundle["headers"][record["header"]]["leaf"], "header")
        index, count, ordinal = int(record["index"]), int(header["count"]), int(entry["ordinal"])
        need(int(record["size"]) == count, "a block of another size")
        need(root_above(record["leaf"], index, count, record["path"]) == unbase64(header["root"]), "a record that is not in its block")
        need(int(header["first"]) + index <= ordinal <= int(header["last"]) - (count - 1 - index), "an ordinal out of place")
        need(entry["origin"] == header["origin"] == origin and entry["id"].endswith("." + header["instance"]), "a record of another log")
        need(not records or entry["id"] == records[0]["id"] and ordinal > int(records[-1]["ordinal"]), "not this receipt's next record")
        records.append(entry)
    if "evidence" in bundle:
        check_evidence(bundle["evidence"], records[0])
    became = ", ".join(outcome["result"] for outcome in records[1:]) or "pending"
    return "verified %s: %s, %s; log %s, %d entries" % (records[0]["id"], records[0]["verdict"], became, origin, int(size))

def main(args):
    logs, status = {}, 0  # {origin: verifier key}
    try:
        need(len(args) > 1, __doc__)
        for line in pathlib.Path(args[0]).read_text("utf-8").split("\n"):
            words = line.partition("#")[0].split()
            if words not in ([], ["quorum", "none"]):
                need(words[0] == "log" and read_key(words[1])[0] not in logs, "not one Ed25519 key for each log: use knhk verify")
                logs[read_key(words[1])[0]] = words[1]
        need(logs, "no log line")
    except Exception as error:
        print(error, file=sys.stderr)
        return 2
    for name in args[1:]:
        try:
            line = verify(logs, json.loads(pathlib.Path(name).read_text("utf-8")))
        except Exception as error:  # what cannot be read is refused
            line, status = "refused: %r" % error, 1
        print("%s: %s" % (name, line.encode("unicode_escape").decode()))
    return status

sys.exit(main(sys.argv[1:]))
