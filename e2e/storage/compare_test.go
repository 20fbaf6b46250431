//go:build linux

package storage

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/client"

	"filippo.io/torchwood"

	"github.com/knhk/sidecar/crypto/receipt"
)

// transcript is an export, read.
type transcript struct {
	list     []*entry
	byPath   map[string]*entry
	ordinals map[uint64]string // receipt id by the ordinal of each record
	declared []lost            // ranges of ordinals that headers declare as lost
	missing  int               // R1 receipts that a client received since the last comparison and that are not there
}

type lost struct{ from, to uint64 }

type entry struct {
	d        *receipt.Decision
	outcomes []*receipt.Outcome
}

func readTranscript(raw []byte) (transcript, error) {
	tr := transcript{byPath: map[string]*entry{}, ordinals: map[uint64]string{}}
	for line := range strings.Lines(string(raw)) {
		b, err := receipt.ParseBundle([]byte(line))
		if err != nil {
			return tr, err
		}
		e := &entry{}
		number := func(ordinal uint64) error {
			if other, twice := tr.ordinals[ordinal]; twice {
				return fmt.Errorf("ordinal %d is of receipt %s and of %s", ordinal, other, e.d.ID)
			}
			tr.ordinals[ordinal] = e.d.ID
			return nil
		}
		for i, r := range b.Records {
			var ordinal uint64
			if i == 0 {
				if e.d, err = receipt.ParseDecision(r.Leaf); err != nil {
					return tr, err
				}
				ordinal = e.d.Ordinal
			} else {
				o, err := receipt.ParseOutcome(r.Leaf)
				if err != nil {
					return tr, err
				}
				e.outcomes, ordinal = append(e.outcomes, o), o.Ordinal
			}
			if err := number(ordinal); err != nil {
				return tr, err
			}
		}
		if len(e.outcomes) == 0 {
			return tr, fmt.Errorf("%s has no outcome yet", e.d.ID)
		}
		for _, f := range b.Evidence.Fields {
			if f.Name != "path" {
				continue
			}
			if tr.byPath[f.Value] != nil && e.d.Verdict != "refuse" {
				return tr, fmt.Errorf("two decisions for %s", f.Value)
			}
			tr.byPath[f.Value] = e
		}
		tr.list = append(tr.list, e)
	}
	return tr, nil
}

// compare holds the log of a stopped knhk against what clients, the upstream and auditors saw.
func (w *world) compare(tr *transcript) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if err := w.readLog(tr); err != nil {
		errs = append(errs, err)
	}

	// Every id that a client received is there exactly once. What is missing is R1, and within what was declared.
	times := map[string]int{}
	for _, e := range tr.list {
		times[e.d.ID]++
	}
	var gone uint64
	for _, r := range tr.declared {
		gone += r.to - r.from
	}
	for id, class := range w.acked {
		switch n := times[id]; {
		case n == 0 && class == "R1":
			tr.missing++
			delete(w.acked, id) // counted once
		case n != 1:
			bad("%s receipt %s, which a client received, is there %d times", class, id, n)
		}
	}
	if uint64(tr.missing) > gone {
		bad("%d R1 receipts are gone, %d ordinals are declared lost", tr.missing, gone)
	}
	// Every request that the upstream saw was admitted before, or is R1 and declared.
	unseen := 0
	for _, s := range w.Upstream.Seen() {
		e := tr.byPath[s.Path]
		switch {
		case e == nil && strings.HasPrefix(s.Path, "/hot"):
			unseen++
		case e == nil || e.d.Verdict == "refuse":
			bad("the upstream saw %s, which was not admitted", s.Path)
		}
	}
	if uint64(unseen) > gone {
		bad("the upstream saw %d R1 requests without a decision, %d ordinals are declared lost", unseen, gone)
	}
	errs = append(errs, tr.dense())
	return errors.Join(errs...)
}

// dense holds that every ordinal is a record, once, or within a range that a header declares lost, and never both.
func (tr *transcript) dense() error {
	var errs []error
	var ranges []lost // those declared, merged: a range is declared again until the records before it are sealed
	slices.SortFunc(tr.declared, func(a, b lost) int { return cmp.Compare(a.from, b.from) })
	for _, r := range tr.declared {
		if n := len(ranges); n > 0 && r.from <= ranges[n-1].to {
			ranges[n-1].to = max(ranges[n-1].to, r.to)
			continue
		}
		ranges = append(ranges, r)
	}
	next := uint64(1)
	skip := func() {
		for len(ranges) > 0 && ranges[0].from <= next {
			next = max(next, ranges[0].to)
			ranges = ranges[1:]
		}
	}
	for _, n := range slices.Sorted(maps.Keys(tr.ordinals)) {
		skip()
		if n != next {
			errs = append(errs, fmt.Errorf("ordinal %d of receipt %s, want %d: records are gone, or lie in a range declared lost", n, tr.ordinals[n], next))
		}
		next = n + 1
	}
	return errors.Join(errs...)
}

// readLog reads every leaf of the log: headers are dense by seq, no key has two headers, and every checkpoint that was ever
// served is a prefix of it.
func (w *world) readLog(tr *transcript) error {
	tree := client.FileFetcher{Root: filepath.Join(w.StateDir, "log")}
	raw, err := tree.ReadCheckpoint(w.t.Context())
	if err != nil {
		return err
	}
	now, err := readCheckpoint(string(raw))
	if err != nil {
		return err
	}
	prefixes := map[uint64][]byte{} // root by size
	hashes := (&compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}).NewEmptyRange(0)
	type key struct {
		incarnation [16]byte
		seq         uint64
	}
	headers := map[key]receipt.Hash{}
	next := map[[16]byte]uint64{}
	size := uint64(now.N)
	for i := range size {
		b, err := client.GetEntryBundle(w.t.Context(), tree.ReadEntryBundle, i/256, size)
		if err != nil {
			return err
		}
		leaf := b.Entries[i%256]
		if err := hashes.Append(rfc6962.DefaultHasher.HashLeaf(leaf), nil); err != nil {
			return err
		}
		root, err := hashes.GetRootHash(nil)
		if err != nil {
			return err
		}
		prefixes[i+1] = root
		h, err := receipt.ParseHeader(leaf)
		if err != nil {
			continue // a key statement
		}
		k, hash := key{h.Incarnation, h.Seq}, receipt.LeafHash(leaf)
		if other, ok := headers[k]; ok {
			if other != hash {
				return fmt.Errorf("two headers for incarnation %x, seq %d", h.Incarnation, h.Seq)
			}
			continue
		}
		if h.Seq != next[h.Incarnation] {
			return fmt.Errorf("incarnation %x: seq %d, want %d", h.Incarnation, h.Seq, next[h.Incarnation])
		}
		headers[k], next[h.Incarnation] = hash, h.Seq+1
		if r := (lost{h.LostFrom, h.LostTo}); r.from < r.to && !slices.Contains(tr.declared, r) {
			tr.declared = append(tr.declared, r)
		}
	}
	for seen := range w.checkpoints {
		c, err := readCheckpoint(seen)
		if err != nil {
			return err
		}
		if c.N > now.N {
			return fmt.Errorf("a checkpoint of %d leaves was served, the log has %d", c.N, now.N)
		}
		if c.N > 0 && string(prefixes[uint64(c.N)]) != string(c.Hash[:]) {
			return fmt.Errorf("fork: a checkpoint of %d leaves with another root was served", c.N)
		}
	}
	return nil
}

func readCheckpoint(raw string) (torchwood.Checkpoint, error) {
	text, _, _ := strings.Cut(raw, "\n\n")
	return torchwood.ParseCheckpoint(text + "\n")
}
