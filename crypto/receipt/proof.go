package receipt

import (
	"bytes"
	"errors"
	"fmt"

	"golang.org/x/mod/sumdb/tlog"
)

// logProof is a parsed c2sp.org/tlog-proof@v1: an index, an audit path and a signed checkpoint.
type logProof struct {
	index      uint64
	path       tlog.RecordProof
	checkpoint []byte // borrowed from the text
}

const proofHeader = "c2sp.org/tlog-proof@v1\n"

// parseProof parses a proof in the one spelling torchwood.FormatProof gives it, without an extra line. It verifies nothing.
func parseProof(text []byte) (*logProof, error) {
	rest, ok := bytes.CutPrefix(text, []byte(proofHeader))
	if !ok {
		return nil, errors.New("not a c2sp.org/tlog-proof@v1")
	}
	line, rest, ok := bytes.Cut(rest, []byte("\n"))
	number, ok2 := bytes.CutPrefix(line, []byte("index "))
	if !ok || !ok2 {
		return nil, errors.New("want an index line")
	}
	n, err := parseUint(string(number), 63)
	if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	p := &logProof{index: n}
	for {
		line, rest, ok = bytes.Cut(rest, []byte("\n"))
		if !ok {
			return nil, errors.New("ends before the checkpoint")
		}
		if len(line) == 0 {
			p.checkpoint = rest
			return p, nil
		}
		if len(p.path) == maxPath {
			return nil, fmt.Errorf("more than %d hashes", maxPath)
		}
		var raw [33]byte // 44 characters may stand for 33 bytes
		if len(line) != 44 {
			return nil, fmt.Errorf("hash %d is malformed", len(p.path))
		}
		if n, err := stdEncoding.Decode(raw[:], line); err != nil || n != 32 {
			return nil, fmt.Errorf("hash %d is malformed", len(p.path))
		}
		p.path = append(p.path, tlog.Hash(raw[:32]))
	}
}

// check verifies that leaf stands at p's index below c.
func (p *logProof) check(c *checkpoint, leaf []byte) error {
	if p.index >= c.size {
		return fmt.Errorf("index %d in a log of %d", p.index, c.size)
	}
	if tlog.CheckRecord(p.path, int64(c.size), tlog.Hash(c.root), int64(p.index), tlog.RecordHash(leaf)) != nil {
		return fmt.Errorf("not included at index %d of %d", p.index, c.size)
	}
	return nil
}
