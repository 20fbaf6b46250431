package receipt

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
)

// Verifier verifies bundles under one policy and remembers what many of them share. Its memory is bounded: at most 2,048
// checkpoints, headers, key statements and seals each, of at most 16 KiB.
type Verifier struct {
	policy      *Policy
	mu          sync.Mutex
	checkpoints memory[*checkpoint]
	headersSeen memory[*VerifiedHeader]
	keysSeen    memory[*statement]
	sealsSeen   memory[*sealed]
}

// NewVerifier returns a Verifier under p.
func NewVerifier(p *Policy) *Verifier { return &Verifier{policy: p} }

// statement is a verified key statement.
type statement struct {
	VerifiedKey
	daily  *key
	signed bool // its daily key signed the checkpoint of its proof
}

// sealed is a verified seal.
type sealed struct {
	Seal
	index uint64
	daily *noteLine // nil: only the identity key signed it
}

// checkpoint returns the one checkpoint of all of b's proofs, verified.
func (v *Verifier) checkpoint(b *Bundle) (*checkpoint, error) {
	var signed []byte
	proof := func(name string, text []byte) error {
		split := bytes.Index(text, []byte("\n\n"))
		if split < 0 {
			return fmt.Errorf("%s: proof: no checkpoint", name)
		}
		switch text = text[split+2:]; {
		case signed == nil:
			signed = text
		case !bytes.Equal(text, signed):
			return fmt.Errorf("%s: proof: another checkpoint than that of header 0", name)
		}
		return nil
	}
	for i := range b.Headers {
		if err := proof(fmt.Sprint("header ", i), b.Headers[i].Text); err != nil {
			return nil, err
		}
	}
	for i := range b.Keys {
		if err := proof(fmt.Sprint("key statement ", i), b.Keys[i].Text); err != nil {
			return nil, err
		}
	}
	if err := proof("tail", b.Tail.Text); err != nil {
		return nil, err
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
		p, err := checkProof(c, proof)
		if err != nil {
			return nil, err
		}
		return &VerifiedHeader{*h, p.index}, nil
	})
}

// statement verifies a key statement, its proof, and that it stands at the index it names, below the root it names. c must be
// the checkpoint the proof ends in.
func (v *Verifier) statement(c *checkpoint, proof Proof) (*statement, error) {
	return remember(v, &v.keysSeen, proof.Leaf, proof.Text, func() (*statement, error) {
		ks, k, err := verifyKeyStatement(proof.Leaf, c.log.identity.verifier)
		if err != nil {
			return nil, err
		}
		p, err := checkProof(c, proof)
		switch {
		case err != nil:
			return nil, err
		case ks.FirstSize != p.index:
			return nil, fmt.Errorf("it names size %d, but stands at index %d", ks.FirstSize, p.index)
		case ks.FirstRoot != before(p.path, p.index, c.size):
			return nil, fmt.Errorf("it names another root than that of the %d leaves before it", p.index)
		}
		return &statement{VerifiedKey{*ks, p.index}, k.daily, c.signedBy(k.daily)}, nil
	})
}

// seal does the same for a seal. The line of the daily key is not checked.
func (v *Verifier) seal(c *checkpoint, proof Proof) (*sealed, error) {
	return remember(v, &v.sealsSeen, proof.Leaf, proof.Text, func() (*sealed, error) {
		s, daily, err := verifySeal(proof.Leaf, c.log.identity.verifier)
		if err != nil {
			return nil, err
		}
		p, err := checkProof(c, proof)
		switch {
		case err != nil:
			return nil, err
		case s.Size != p.index:
			return nil, fmt.Errorf("the seal names size %d, but stands at index %d", s.Size, p.index)
		case s.Root != before(p.path, p.index, c.size):
			return nil, fmt.Errorf("the seal names another root than that of the %d leaves before it", p.index)
		}
		return &sealed{*s, p.index, daily}, nil
	})
}

func checkProof(c *checkpoint, proof Proof) (*logProof, error) {
	p, err := parseProof(proof.Text)
	if err != nil {
		return nil, fmt.Errorf("proof: %w", err)
	}
	if !bytes.Equal(p.checkpoint, c.signed) {
		return nil, errors.New("proof: another checkpoint")
	}
	if err := p.check(c, proof.Leaf); err != nil {
		return nil, fmt.Errorf("proof: %w", err)
	}
	return p, nil
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
