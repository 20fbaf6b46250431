package receipt

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"filippo.io/torchwood"
)

// maxPolicy bounds policy files.
const maxPolicy = 64 << 10

// Policy is what an auditor trusts: one identity key for each log, and witnesses with a quorum. Whoever can change it
// decides what verifies.
type Policy struct {
	logs map[string]*logPolicy
}

// logPolicy is the policy for one origin.
type logPolicy struct {
	identity *key
	check    torchwood.Policy // origin, identity key and quorum
	revoked  revocations
}

// ParsePolicy reads a policy file: lines "log VKEY", at least one, and, in the form torchwood and Tessera read, "witness
// NAME VKEY [URL]", "group NAME K MEMBER..." and "quorum NAME"; "#" begins a comment. A log line pins the identity key of
// the log that is its name, never a daily key, and there is one for each origin. The quorum holds for every log. Without
// witnesses the quorum line can be left out.
//
// Other tools read several log lines as "all of them must sign": for them a file may hold only one. They do not know P-256
// log keys either, which are accepted here; ECDSA signatures have a second valid form that anybody can compute.
func ParsePolicy(b []byte) (*Policy, error) {
	if len(b) > maxPolicy {
		return nil, fmt.Errorf("parse policy: %d bytes: at most %d are read", len(b), maxPolicy)
	}
	identities := map[string]*key{}
	lines := strings.Split(string(b), "\n")
	others := 0
	for i, line := range lines {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.Fields(line)
		if len(fields) == 0 {
			lines[i] = "" // torchwood panics on a line of other white space than blanks and tabs, the end of an empty CRLF line say
			continue
		}
		if fields[0] != "log" {
			others++
			continue
		}
		if len(fields) < 2 || len(fields) > 3 {
			return nil, fmt.Errorf("parse policy: line %d: want log VKEY", i+1)
		}
		k, err := parseKey(fields[1])
		if err != nil {
			return nil, fmt.Errorf("parse policy: line %d: %w", i+1, err)
		}
		origin := k.verifier.Name()
		if err := validOrigin(origin); err != nil {
			return nil, fmt.Errorf("parse policy: line %d: %w", i+1, err)
		}
		if identities[origin] != nil {
			return nil, fmt.Errorf("parse policy: line %d: a second identity key for %s", i+1, origin)
		}
		identities[origin] = k
		lines[i] = "" // torchwood would want every log's signature, and knows no P-256
	}
	if len(identities) == 0 {
		return nil, errors.New("parse policy: no log line")
	}
	if others == 0 {
		lines = append(lines, "quorum none")
	}
	witnesses, err := torchwood.ParsePolicy([]byte(strings.Join(lines, "\n")))
	if err != nil {
		return nil, fmt.Errorf("parse policy: %w", err)
	}
	p := &Policy{logs: make(map[string]*logPolicy, len(identities))}
	for origin, k := range identities {
		p.logs[origin] = &logPolicy{identity: k, check: torchwood.ThresholdPolicy(3,
			torchwood.OriginPolicy(origin), torchwood.SingleVerifierPolicy(k.verifier), witnesses)}
	}
	return p, nil
}

// Origins lists the logs the policy knows, sorted.
func (p *Policy) Origins() []string {
	var all []string
	for origin := range p.logs {
		all = append(all, origin)
	}
	slices.Sort(all)
	return all
}

// Identity returns the verifier key of a log's identity key; false for a log the policy does not know.
func (p *Policy) Identity(origin string) (vkey string, ok bool) {
	l, ok := p.logs[origin]
	if !ok {
		return "", false
	}
	return l.identity.vkey, true
}

// Cosignature is a witness's timestamped signature on the checkpoint, one that the policy asks for or accepts.
type Cosignature struct {
	Name string
	Time time.Time // to the second, the witness's clock
}

// checkpoint is a verified one.
type checkpoint struct {
	log      *logPolicy
	signed   []byte // text and lines as they came
	text     []byte
	lines    []noteLine
	origin   string
	size     uint64
	root     Hash
	cosigned []Cosignature
}

// openCheckpoint verifies a signed checkpoint under the policy for its origin. The daily key is not looked at.
func (p *Policy) openCheckpoint(signed []byte) (*checkpoint, error) {
	text, lines, err := splitNote(signed)
	if err != nil {
		return nil, err
	}
	origin, _, _ := bytes.Cut(text, []byte("\n"))
	l := p.logs[string(origin)]
	if l == nil {
		return nil, fmt.Errorf("the policy has no log %.64q", origin)
	}
	c, n, err := torchwood.VerifyCheckpoint(signed, l.check)
	if err != nil {
		return nil, err
	}
	if c.N > maxTree {
		return nil, fmt.Errorf("a log of %d leaves, at most %d are read", c.N, int64(maxTree))
	}
	out := &checkpoint{log: l, signed: signed, text: text, lines: lines, origin: c.Origin, size: uint64(c.N), root: Hash(c.Hash)}
	for _, sig := range n.Sigs {
		if v := l.identity.verifier; sig.Name == v.Name() && sig.Hash == v.KeyHash() {
			continue
		}
		t, err := torchwood.CosignatureTimestamp(sig)
		if err != nil {
			return nil, fmt.Errorf("cosignature by %.64s: %w", sig.Name, err)
		}
		out.cosigned = append(out.cosigned, Cosignature{sig.Name, time.Unix(t, 0).UTC()})
	}
	return out, nil
}

// signedBy reports whether k has signed c.
func (c *checkpoint) signedBy(k *key) bool {
	for _, l := range c.lines {
		if l.name == k.verifier.Name() && l.hash == k.verifier.KeyHash() {
			return k.verifier.Verify(c.text, l.sig)
		}
	}
	return false
}
