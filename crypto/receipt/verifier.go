package receipt

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
)

// Verifier verifies bundles under one policy and remembers what many of them share. Its memory is bounded: at most 2,048
// checkpoints, headers and key statements each, of at most 16 KiB.
type Verifier struct {
	policy      *Policy
	mu          sync.Mutex
	checkpoints memory[*checkpoint]
	headersSeen memory[*VerifiedHeader]
	keysSeen    memory[*statement]
}

// NewVerifier returns a Verifier under p.
func NewVerifier(p *Policy) *Verifier { return &Verifier{policy: p} }

// statement is a verified key statement.
type statement struct {
	VerifiedKey
	signed bool // its daily key signed the checkpoint of its proof
}

// checkpoint returns the one checkpoint of all of b's proofs, verified.
func (v *Verifier) checkpoint(b *Bundle) (*checkpoint, error) {
	var signed []byte
	for i := range len(b.Headers) + len(b.Keys) {
		name, k, proofs := "header", i, b.Headers
		if i >= len(b.Headers) {
			name, k, proofs = "key statement", i-len(b.Headers), b.Keys
		}
		text := proofs[k].Text
		split := bytes.Index(text, []byte("\n\n"))
		if split < 0 {
			return nil, fmt.Errorf("%s %d: proof: no checkpoint", name, k)
		}
		switch text = text[split+2:]; {
		case i == 0:
			signed = text
		case !bytes.Equal(text, signed):
			return nil, fmt.Errorf("%s %d: proof: another checkpoint than that of header 0", name, k)
		}
	}
	c, err := remember(v, &v.checkpoints, nil, signed, func() (*checkpoint, error) {
		return v.policy.openCheckpoint(bytes.Clone(signed))
	})
	if err != nil {
		return nil, fmt.Errorf("checkpoint: %w", err)
	}
	return c, nil
}

// header verifies a header's proof. c must be the checkpoint the proof ends in.
func (v *Verifier) header(c *checkpoint, proof Proof) (*VerifiedHeader, error) {
	return remember(v, &v.headersSeen, proof.Leaf, proof.Text, func() (*VerifiedHeader, error) {
		h, err := ParseHeader(proof.Leaf)
		if err != nil {
			return nil, err
		}
		index, err := checkProof(c, proof)
		if err != nil {
			return nil, err
		}
		return &VerifiedHeader{*h, index}, nil
	})
}

// statement verifies a key statement and its proof. c must be the checkpoint the proof ends in.
func (v *Verifier) statement(c *checkpoint, proof Proof) (*statement, error) {
	return remember(v, &v.keysSeen, proof.Leaf, proof.Text, func() (*statement, error) {
		ks, daily, err := verifyKeyStatement(proof.Leaf, c.log.identity.verifier)
		if err != nil {
			return nil, err
		}
		index, err := checkProof(c, proof)
		if err != nil {
			return nil, err
		}
		return &statement{VerifiedKey{*ks, index}, c.signedBy(daily)}, nil
	})
}

func checkProof(c *checkpoint, proof Proof) (index uint64, err error) {
	p, err := parseProof(proof.Text)
	if err != nil {
		return 0, fmt.Errorf("proof: %w", err)
	}
	if !bytes.Equal(p.checkpoint, c.signed) {
		return 0, errors.New("proof: another checkpoint")
	}
	if err := p.check(c, proof.Leaf); err != nil {
		return 0, fmt.Errorf("proof: %w", err)
	}
	return p.index, nil
}

const (
	maxRemembered      = 1024 // in each of two generations
	maxRememberedBytes = 16 << 10
)

// pair is the exact input a remembered result was computed from.
type pair struct{ leaf, text string }

// memory holds results in two generations: when the young one is full it becomes the old one, whose entries are forgotten.
type memory[T any] struct{ young, old map[pair]T }

// remember returns the result for (leaf, text) or computes it with fresh. Failures are not remembered.
func remember[T any](v *Verifier, m *memory[T], leaf, text []byte, fresh func() (T, error)) (T, error) {
	v.mu.Lock()
	x, ok := m.young[pair{string(leaf), string(text)}]
	if !ok {
		if x, ok = m.old[pair{string(leaf), string(text)}]; ok {
			m.put(pair{string(leaf), string(text)}, x)
		}
	}
	v.mu.Unlock()
	if ok {
		return x, nil
	}
	x, err := fresh()
	if err == nil && len(leaf)+len(text) <= maxRememberedBytes {
		v.mu.Lock()
		m.put(pair{string(leaf), string(text)}, x)
		v.mu.Unlock()
	}
	return x, err
}

func (m *memory[T]) put(key pair, x T) {
	if m.young == nil || len(m.young) >= maxRemembered {
		m.young, m.old = make(map[pair]T), m.young
	}
	m.young[key] = x
}
