#!/usr/bin/env python3
"""Verifies knhk receipt bundles with the Python standard library alone; it shares no code with knhk.

usage: verify.py POLICY BUNDLE...

Prints one line for each bundle; exits with 0 when all verify, 1 when one does not, 2 for wrong usage or a policy it cannot
read. It knows Ed25519 log keys and no witnesses: a policy with a quorum needs "knhk verify". The formats are C2SP signed-note,
tlog-checkpoint and tlog-proof, RFC 6962 trees, RFC 8032 signatures, and what the Go package crypto/receipt documents.
"""
import base64
import hashlib
import json
import re
import sys

MAX_SKEW = 300 * 10**9  # nanoseconds that times may be out of order


class Refused(Exception):
    pass


def need(ok, why):
    if not ok:
        raise Refused(why)


def sha(*parts):
    return hashlib.sha256(b"".join(parts)).digest()


# Ed25519 verification, RFC 8032 section 5.1.7: points in extended coordinates (x, y, z, t).
P, L = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493
D, I = -121665 * pow(121666, -1, P) % P, pow(2, (P - 1) // 4, P)


def point(b):
    y = int.from_bytes(b, "little") & (1 << 255) - 1
    x2 = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(x2, (P + 3) // 8, P)
    x = x if x * x % P == x2 else x * I % P
    need(x * x % P == x2, "a public key is not on the curve")
    x = P - x if x & 1 != b[31] >> 7 else x
    return x, y, 1, x * y % P


def add(p, q):
    a, b = (p[1] - p[0]) * (q[1] - q[0]), (p[1] + p[0]) * (q[1] + q[0])
    c, d = 2 * p[3] * q[3] * D, 2 * p[2] * q[2]
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % P, g * h % P, f * g % P, e * h % P


def multiply(n, p):
    q = (0, 1, 1, 0)
    while n:
        q, p, n = add(q, p) if n & 1 else q, add(p, p), n >> 1
    return q


def ed25519(key, message, sig):
    s = int.from_bytes(sig[32:], "little")
    if len(sig) != 64 or s >= L:
        return False
    x, y, z, t = point(key)
    k = int.from_bytes(hashlib.sha512(sig[:32] + key + message).digest(), "little") % L
    x, y, z, _ = add(multiply(s, point(b"\x58" + b"\x66" * 31)), multiply(k, (-x, y, z, -t)))  # sB - kA must be R
    x, y = x * pow(z, -1, P) % P, y * pow(z, -1, P) % P
    return (y | (x & 1) << 255).to_bytes(32, "little") == sig[:32]


# Encodings: one spelling for each value.
def b64(s):
    raw = base64.b64decode(s, validate=True)
    need(base64.b64encode(raw).decode() == s, "base64 is not in canonical form")
    return raw


def url64(s):
    need(re.fullmatch("[A-Za-z0-9_-]*", s), "malformed base64url")
    return b64(s.replace("-", "+").replace("_", "/") + "=" * (-len(s) % 4))


def hash64(s):
    need(len(url64(s)) == 32, "malformed hash")
    return url64(s)


def number(s):
    need(re.fullmatch("0|[1-9][0-9]{0,19}", s) and int(s) < 2**64, "malformed integer")
    return int(s)


def unique(pairs):
    need(len(dict(pairs)) == len(pairs), "a JSON member stands twice")
    return dict(pairs)


def members(o, names):  # in this order; "?" marks the optional ones
    want = [n.strip("?") for n in names.split() if n.strip("?") in o or "?" not in n]
    need(isinstance(o, dict) and list(o) == want, "members are missing, unknown or out of order")
    return o


LEAVES = {
    "decision": "id nonce ordinal origin time tenant? class verdict reason rule? status? tick? waited_ns? dry_run? policy capture "
                "spiffe_id? route? cluster? trace_id? span_id? parent? request",
    "outcome": "id nonce ordinal origin time source result status? upstream_status? flags? details? cluster? upstream_host? "
               "attempts? bytes_in? bytes_out? duration_ns? cache_status? late?",
    "header": "origin log_id instance incarnation seq kind prev time count root first last recovered? lost_from? lost_to?",
    "key": "origin key predecessor? not_before not_after first_size first_root"}
NUMBERS = "ordinal time seq count first last lost_from lost_to not_before not_after first_size".split()
ID = r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"


def leaf(text, kind):  # what is not looked at below is bound by the hash of the leaf
    prefix = "knhk/%s/v1\n" % kind
    need(text.startswith(prefix), "a leaf that is no " + kind)
    o = members(json.loads(text[len(prefix):], object_pairs_hook=unique), LEAVES[kind])
    need(json.dumps(o, ensure_ascii=False, separators=(",", ":")) == text[len(prefix):], "a leaf is not in canonical form")
    need("id" not in o or re.fullmatch(ID, o["id"]), "malformed receipt id")
    hashes = [n for n in ("request", "prev", "root", "first_root") if n in o]
    o.update({n: number(o[n]) for n in NUMBERS if n in o}, **{n: hash64(o[n]) for n in hashes})
    return o


# Trees, keys, notes, proofs.
def check_path(root, size, index, h, path):  # RFC 9162 section 2.1.3.2
    need(index < size, "an index outside its tree")
    fn, sn = index, size - 1
    for p in path:
        need(sn, "a path is too long")
        if fn & 1 or fn == sn:
            h = sha(b"\1", p, h)
            while fn and not fn & 1:
                fn, sn = fn >> 1, sn >> 1
        else:
            h = sha(b"\1", h, p)
        fn, sn = fn >> 1, sn >> 1
    need(sn == 0 and h == root, "a path does not lead to its root")


def verifier(vkey):
    name, key_hash, key = vkey.split("+", 2)
    need(b64(key)[0] == 1 and len(b64(key)) == 33, "a key that is not Ed25519")
    need(sha(name.encode(), b"\n", b64(key))[:4].hex() == key_hash, "a verifier key with a wrong hash")
    return name, key_hash, b64(key)[1:]


def note(text):  # the text and {(name, key hash): signature}
    body, _, lines = text.rpartition("\n\n")
    need(body and lines.endswith("\n"), "malformed note")
    sigs = {}
    for line in lines[:-1].split("\n"):
        dash, name, sig = line.split(" ")
        key = name, b64(sig)[:4].hex()
        need(dash == "\u2014" and key not in sigs, "malformed or repeated signature line")
        sigs[key] = b64(sig)[4:]
    return body + "\n", sigs


def signed(text, sigs, vkey):
    name, key_hash, key = verifier(vkey)
    return (name, key_hash) in sigs and ed25519(key, text.encode(), sigs[name, key_hash])


def proof(p):  # leaf, index, path, signed checkpoint
    members(p, "leaf proof")
    head, _, checkpoint = p["proof"].partition("\n\n")
    title, index, *path = head.split("\n")
    need(title == "c2sp.org/tlog-proof@v1" and index.startswith("index "), "malformed tlog-proof")
    return p["leaf"], number(index[6:]), [b64(h) for h in path], checkpoint


def read_policy(text):
    logs = {}
    for word, *rest in filter(None, (line.partition("#")[0].split() for line in text.split("\n"))):
        need(word == "log" or [word] + rest == ["quorum", "none"], "witnesses are not supported: use knhk verify")
        if word == "log":
            name = verifier(rest[0])[0]
            need(name not in logs, "two identity keys for one log")
            logs[name] = rest[0]
    need(logs, "no log line")
    return logs


def check_keys(keys, origin, identity, text, sigs):
    later = None
    for stated, index, _, _ in keys:
        body, lines = note(stated)
        k = leaf(body[:-1], "key")
        signers = [identity] + ([k["predecessor"]] if "predecessor" in k else [])
        need(k["origin"] == origin and all(verifier(v)[0] == origin for v in signers + [k["key"]]), "a key of another log")
        need(len({verifier(v)[2] for v in signers + [k["key"]]}) == len(signers) + 1, "one key in two roles")
        need(len(lines) == len(signers) and all(signed(body, lines, v) for v in signers), "a key statement is not signed")
        need(0 < k["not_after"] - k["not_before"] <= 86400 * 10**9, "a key statement for more than a day")
        need(k["first_size"] <= index and (k["first_size"] or k["first_root"] == sha()), "a key statement in a wrong place")
        if later is None:
            need(signed(text, sigs, k["key"]), "the daily key did not sign the checkpoint")
            first = k
        else:
            need(later[0].get("predecessor") == k["key"], "a key statement that is not the predecessor's")
            need(index < later[1] and k["not_before"] <= later[0]["not_before"], "key statements out of order")
            need(k["first_size"] < later[0]["first_size"] or [k[n] for n in ("first_size", "first_root")] ==
                 [later[0][n] for n in ("first_size", "first_root")], "key statements disagree")
        later = k, index
    return first


def check_headers(headers, origin, daily):
    blocks = []
    for h in (leaf(p[0], "header") for p in headers):
        need(h["origin"] == origin and h["kind"] in ("block", "final") and h["seq"] and any(h["prev"]), "not a block of this log")
        need(h["count"] and h["last"] - h["first"] >= h["count"] - 1, "a header whose records do not fit its ordinals")
        h["lost"] = h.get("lost_from", 0), h.get("lost_to", 0)
        need(h["lost"][0] < h["lost"][1] or "lost_from" not in h and "lost_to" not in h, "malformed lost range")
        need(h["time"] <= daily["not_after"] + MAX_SKEW, "a block closed after the daily key's end")
        for o in blocks:
            need((o["log_id"], o["instance"]) == (h["log_id"], h["instance"]), "headers of different recorders")
            need((o["incarnation"], o["seq"]) != (h["incarnation"], h["seq"]), "two headers with one sequence number")
            need(o["last"] < h["first"] or h["last"] < o["first"], "headers with ordinals in common")
        blocks.append(h)
    return blocks


def check_evidence(e, decision):
    text = lambda v: v.encode() if isinstance(v, str) else url64(v["b64"])
    hashed = [b"knhk/commitment/v1\n", hash64(e["salt"]), len(e["fields"]).to_bytes(8, "big")]
    for f in e["fields"]:
        members(f, "name value")
        for tag, v in ((b"\1", text(f["name"])), (b"\2", text(f["value"]))):
            hashed += [tag, len(v).to_bytes(8, "big"), v]
    need(members(e, "evidence id salt fields")["evidence"] == "knhk/evidence/v1", "unknown kind of evidence")
    need(e["id"] == decision["id"] and sha(*hashed) == decision["request"], "evidence does not open the commitment")


def verify(logs, data):
    need(len(data) <= 1 << 20, "more than 1 MiB")
    b = members(json.loads(data.decode(), object_pairs_hook=unique), "bundle records headers keys evidence?")
    need(b["bundle"] == "knhk/bundle/v1", "is no knhk/bundle/v1")
    need(0 < len(b["records"]) <= 3 and 0 < len(b["headers"]) <= 8 and 0 < len(b["keys"]) <= 64, "too few or too many parts")
    headers, keys = [proof(p) for p in b["headers"]], [proof(p) for p in b["keys"]]
    need(len({p[3] for p in headers + keys}) == 1, "proofs under different checkpoints")
    text, sigs = note(headers[0][3])
    origin, size, root = text.split("\n")[:3]
    need(origin in logs, "the policy has no log " + repr(origin))
    need(signed(text, sigs, logs[origin]), "the identity key did not sign the checkpoint")
    for stated, index, path, _ in headers + keys:
        check_path(b64(root), number(size), index, sha(b"\0", stated.encode()), path)
    blocks = check_headers(headers, origin, check_keys(keys, origin, logs[origin], text, sigs))

    records = []
    for r in b["records"]:
        o = leaf(members(r, "leaf header index size path")["leaf"], "outcome" if records else "decision")
        need(type(r["header"]) is int and 0 <= r["header"] < len(blocks), "a record without a header")
        h, index = blocks[r["header"]], number(r["index"])
        need(number(r["size"]) == h["count"], "a block of another size")
        check_path(h["root"], h["count"], index, sha(b"\0", r["leaf"].encode()), [hash64(p) for p in r["path"]])
        need(o["origin"] == origin and o["id"][37:] == h["instance"], "a record of another log or instance")
        need(o["ordinal"] - h["first"] >= index and h["last"] - o["ordinal"] >= h["count"] - 1 - index, "an ordinal out of place")
        need(not any(g["lost"][0] <= o["ordinal"] < g["lost"][1] for g in blocks), "an ordinal that is declared lost")
        need(o["time"] <= h["time"] + MAX_SKEW, "a record later than its block")
        need(re.fullmatch("[a-z0-9_]+", o["result"] if records else o["verdict"]), "a malformed word")
        need(not records or o["id"] == records[0]["id"], "records of different receipts")
        need(not records or o["ordinal"] > records[-1]["ordinal"], "records out of order")
        records.append(o)
    need({r["header"] for r in b["records"]} == set(range(len(blocks))), "a header without records")
    need(len(records) < 3 or "late" in records[2] and "late" not in records[1] and records[1]["result"] == "unknown", "two outcomes")
    if "evidence" in b:
        check_evidence(b["evidence"], records[0])
    became = ", ".join(o["result"] for o in records[1:]) or "pending"
    return "verified %s: %s, %s; log %s, %s entries" % (records[0]["id"], records[0]["verdict"], became, origin, size)


def main(args):
    if len(args) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    malformed = OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError
    try:
        with open(args[0], encoding="utf-8") as f:
            logs = read_policy(f.read())
    except (Refused,) + malformed as e:
        print("policy %s: %s" % (args[0], e), file=sys.stderr)
        return 2
    status = 0
    for name in args[1:]:
        try:
            with open(name, "rb") as f:
                print("%s: %s" % (name, verify(logs, f.read((1 << 20) + 1))))
        except (Refused,) + malformed as e:
            status = 1
            print("%s: refused: %s" % (name, e if isinstance(e, Refused) else "malformed: %r" % e))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
