package receipttest

import (
	"bytes"
	"encoding/json/jsontext"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strconv"

	"github.com/knhk/sidecar/crypto/receipt"
)

// Forger changes a valid bundle, or the policy it is verified under, in one field at a time. Every member of every JSON in
// it is a field (of the bundle, its records, headers, key statements and evidence), every line of proofs, checkpoint and
// policy, and every part of a signature line.
type Forger struct {
	Fields []ForgeField

	good   *receipt.Bundle
	policy []byte
}

// ForgeField is one field.
type ForgeField struct {
	Name string // such as "record 0: class" or "checkpoint: size"

	doc    *document
	span   span
	donors [][]byte // the same field of other receipts and logs
}

// Forgery is a changed bundle and the policy to verify it under. At most one of them differs from the good one.
type Forgery struct {
	Bundle *receipt.Bundle // nil: what was changed no longer parses, which is a refusal
	Policy []byte
	// Same: nothing has changed but how it is spelled outside of what is signed, or who else has signed it; Less: honest parts were left out, which leaves
	// a valid bundle that proves less. Both may verify.
	Same, Less bool
}

// document is a text that a bundle is made of, and how a changed one is put back.
type document struct {
	name  string
	text  []byte
	spans []span
	build func(good *receipt.Bundle, text []byte) *receipt.Bundle // nil: the policy
}

// span is a field's place in its document: from its name, if it has one, to the end of its value.
type span struct {
	name              string
	member, from, end int
	parent            int // the first byte of what encloses it, to find neighbours
}

// NewForger returns a Forger of good, which verifies under policy. donors are others, best of the same shape, whose fields
// take the place of good's.
func NewForger(good *receipt.Bundle, policy []byte, donors ...*receipt.Bundle) (*Forger, error) {
	f := &Forger{good: good, policy: policy}
	docs, err := documents(good, policy)
	if err != nil {
		return nil, err
	}
	given := map[string][][]byte{}
	for _, d := range donors {
		others, err := documents(d, nil)
		if err != nil {
			return nil, err
		}
		for _, o := range others {
			for _, s := range o.spans {
				name := o.name + ": " + s.name
				given[name] = append(given[name], o.text[s.from:s.end])
			}
		}
	}
	for _, d := range docs {
		for _, s := range d.spans {
			name := d.name + ": " + s.name
			f.Fields = append(f.Fields, ForgeField{Name: name, doc: d, span: s, donors: given[name]})
		}
	}
	return f, nil
}

func documents(b *receipt.Bundle, policy []byte) ([]*document, error) {
	var docs []*document
	add := func(name string, text []byte, spans []span, build func(*receipt.Bundle, []byte) *receipt.Bundle) {
		docs = append(docs, &document{name, text, spans, build})
	}
	edit := func(change func(b *receipt.Bundle, text []byte)) func(*receipt.Bundle, []byte) *receipt.Bundle {
		return func(good *receipt.Bundle, text []byte) *receipt.Bundle {
			b := good.Clone()
			change(b, text)
			return b
		}
	}
	data, err := b.Marshal()
	if err != nil {
		return nil, err
	}
	add("bundle", data, jsonSpans(data), func(_ *receipt.Bundle, text []byte) *receipt.Bundle {
		b, err := receipt.ParseBundle(text)
		if err != nil {
			return nil
		}
		return b
	})
	for i := range b.Records {
		add(fmt.Sprint("record ", i), b.Records[i].Leaf, leafSpans(b.Records[i].Leaf),
			edit(func(b *receipt.Bundle, text []byte) { b.Records[i].Leaf = text }))
	}
	for i := range b.Headers {
		add(fmt.Sprint("header ", i), b.Headers[i].Leaf, leafSpans(b.Headers[i].Leaf),
			edit(func(b *receipt.Bundle, text []byte) { b.Headers[i].Leaf = text }))
		add(fmt.Sprint("header ", i, " proof"), b.Headers[i].Text, proofSpans(b.Headers[i].Text),
			edit(func(b *receipt.Bundle, text []byte) { b.Headers[i].Text = text }))
	}
	for i := range b.Keys {
		add(fmt.Sprint("key ", i), b.Keys[i].Leaf, leafSpans(b.Keys[i].Leaf),
			edit(func(b *receipt.Bundle, text []byte) { b.Keys[i].Leaf = text }))
		add(fmt.Sprint("key ", i, " proof"), b.Keys[i].Text, proofSpans(b.Keys[i].Text),
			edit(func(b *receipt.Bundle, text []byte) { b.Keys[i].Text = text }))
	}
	add("tail", b.Tail.Leaf, leafSpans(b.Tail.Leaf), edit(func(b *receipt.Bundle, text []byte) { b.Tail.Leaf = text }))
	add("tail proof", b.Tail.Text, proofSpans(b.Tail.Text), edit(func(b *receipt.Bundle, text []byte) { b.Tail.Text = text }))
	if b.Evidence != nil {
		text := receipt.AppendEvidence(nil, b.Evidence)
		add("evidence", text, jsonSpans(text), func(good *receipt.Bundle, text []byte) *receipt.Bundle {
			e, err := receipt.ParseEvidence(text)
			if err != nil {
				return nil
			}
			b := good.Clone()
			b.Evidence = e
			return b
		})
	}
	_, signed, _ := bytes.Cut(b.Headers[0].Text, []byte("\n\n"))
	add("checkpoint", signed, lineSpans(signed, "origin", "size", "root"), edit(func(b *receipt.Bundle, text []byte) {
		for _, proofs := range [][]receipt.Proof{b.Headers, b.Keys} { // alike in all proofs
			for i := range proofs {
				at := bytes.Index(proofs[i].Text, []byte("\n\n")) + 2
				proofs[i].Text = append(slices.Clip(proofs[i].Text[:at]), text...)
			}
		}
		at := bytes.Index(b.Tail.Text, []byte("\n\n")) + 2
		b.Tail.Text = append(slices.Clip(b.Tail.Text[:at]), text...)
	}))
	if policy != nil {
		spans := lineSpans(policy)
		for i, s := range spans {
			if word := bytes.IndexByte(policy[s.from:s.end], ' '); word >= 0 {
				spans = append(spans, span{s.name + " value", s.from, s.from + word + 1, s.end, i})
			}
		}
		add("policy", policy, spans, nil)
	}
	return docs, nil
}

// lineSpans has a field for each line that is not empty, and for signature lines one for each part.
func lineSpans(text []byte, names ...string) (out []span) {
	at, sigs := 0, 0
	for i, line := range bytes.Split(text, []byte("\n")) {
		end := at + len(line)
		name := fmt.Sprint("line ", i)
		if i < len(names) {
			name = names[i]
		}
		if rest, ok := bytes.CutPrefix(line, []byte("— ")); ok {
			name = fmt.Sprint("signature ", sigs)
			sigs++
			if key := bytes.IndexByte(rest, ' '); key >= 0 {
				from := end - len(rest)
				out = append(out, span{name + " name", from, from, from + key, at}, span{name + " bytes", from, from + key + 1, end, at})
			}
		}
		if len(line) > 0 {
			out = append(out, span{name, at, at, end, 0})
		}
		at = end + 1
	}
	return out
}

func proofSpans(text []byte) []span {
	end := bytes.Index(text, []byte("\n\n"))
	spans := lineSpans(text[:end], "format", "index")
	number := bytes.IndexByte(text, '\n') + len("\nindex ")
	return append(spans, span{"index number", number, number, number + bytes.IndexByte(text[number:], '\n'), 0})
}

// leafSpans is for a leaf: the line before its JSON, each member, and what stands behind, which is signatures.
func leafSpans(leaf []byte) []span {
	from := bytes.IndexByte(leaf, '{')
	d := jsontext.NewDecoder(bytes.NewReader(leaf[from:]))
	raw, err := d.ReadValue()
	if err != nil {
		return nil
	}
	out := []span{{"prefix", 0, 0, from, -1}}
	out = walk(out, leaf, from, from+len(raw), "")
	for _, s := range lineSpans(leaf[from+len(raw):]) {
		s.member, s.from, s.end = s.member+from+len(raw), s.from+from+len(raw), s.end+from+len(raw)
		out = append(out, s)
	}
	return out
}

func jsonSpans(text []byte) []span { return walk(nil, text, 0, len(text), "") }

// walk lists the members and elements in the JSON value text[from:end], inner ones too.
func walk(out []span, text []byte, from, end int, path string) []span {
	d := jsontext.NewDecoder(bytes.NewReader(text[from:end]))
	kind := d.PeekKind()
	if kind != '{' && kind != '[' {
		return out
	}
	_, _ = d.ReadToken() // valid JSON of our own making
	for n := 0; d.PeekKind() != '}' && d.PeekKind() != ']'; n++ {
		name, member := fmt.Sprintf("%s[%d]", path, n), -1
		if kind == '{' {
			raw, err := d.ReadValue()
			if err != nil {
				return out
			}
			unquoted, _ := strconv.Unquote(string(raw))
			member = from + int(d.InputOffset()) - len(raw)
			name = path + "." + unquoted
		}
		raw, err := d.ReadValue()
		if err != nil {
			return out
		}
		s := span{name, member, from + int(d.InputOffset()) - len(raw), from + int(d.InputOffset()), from}
		if member < 0 {
			s.member = s.from
		}
		out = walk(append(out, s), text, s.from, s.end, name)
	}
	return out
}

// Forge makes one change to field, by chance from r.
func (f *Forger) Forge(field *ForgeField, r *rand.Rand) Forgery {
	d := field.doc
	text := field.change(r)
	out := Forgery{Bundle: f.good, Policy: f.policy}
	if d.build == nil {
		out.Policy = text
		out.Same = samePolicy(f.policy, text)
		return out
	}
	out.Bundle = d.build(f.good, text)
	if out.Bundle != nil {
		out.Same = reflect.DeepEqual(out.Bundle, f.good) || d.name == "checkpoint" && sameNote(d.text, text)
		out.Less = !out.Same && less(out.Bundle, f.good)
	}
	return out
}

// sameNote reports whether b is the note a with the same signatures, in whatever order, and perhaps lines of other keys: readers
// of signed notes ignore those (C2SP signed-note), which is how witnesses can add theirs.
func sameNote(a, b []byte) bool {
	text, lines, _ := bytes.Cut(a, []byte("\n\n"))
	again, others, ok := bytes.Cut(b, []byte("\n\n"))
	if !ok || !bytes.Equal(text, again) {
		return false
	}
	have := bytes.Split(others, []byte("\n"))
	for line := range bytes.SplitSeq(lines, []byte("\n")) {
		if !slices.ContainsFunc(have, func(h []byte) bool { return bytes.Equal(h, line) }) {
			return false
		}
	}
	return true
}

// samePolicy reports whether b trusts the same key for the same log as a, and asks for no more.
func samePolicy(a, b []byte) bool {
	p, err1 := receipt.ParsePolicy(a)
	q, err2 := receipt.ParsePolicy(b)
	if err1 != nil || err2 != nil {
		return false
	}
	for _, origin := range p.Origins() {
		k, _ := p.Identity(origin)
		l, ok := q.Identity(origin)
		if !ok || k != l {
			return false
		}
	}
	return true
}

// less reports whether b is good with honest parts left out at the end, or any of the pins, which no policy of a Forger asks for.
func less(b, good *receipt.Bundle) bool {
	return len(b.Records) <= len(good.Records) && reflect.DeepEqual(b.Records, good.Records[:len(b.Records)]) &&
		len(b.Headers) <= len(good.Headers) && reflect.DeepEqual(b.Headers, good.Headers[:len(b.Headers)]) &&
		len(b.Keys) <= len(good.Keys) && reflect.DeepEqual(b.Keys, good.Keys[:len(b.Keys)]) &&
		reflect.DeepEqual(b.Tail, good.Tail) && subset(b.Pins, good.Pins) &&
		(b.Evidence == nil || reflect.DeepEqual(b.Evidence, good.Evidence))
}

// subset reports whether pins are some of all, in their order.
func subset(pins, all []receipt.PinProof) bool {
	for _, p := range pins {
		at := slices.IndexFunc(all, func(q receipt.PinProof) bool { return reflect.DeepEqual(p, q) })
		if at < 0 {
			return false
		}
		all = all[at+1:]
	}
	return true
}

// change returns the field's document with the field changed; by chance it may be as it was.
func (field *ForgeField) change(r *rand.Rand) []byte {
	text, s := field.doc.text, field.span
	value := text[s.from:s.end]
	put := func(from, end int, b []byte) []byte { return slices.Concat(text[:from], b, text[end:]) }
	set := func(b []byte) []byte { return put(s.from, s.end, b) }
	switch r.IntN(12) {
	case 0, 1: // a bit
		b := bytes.Clone(value)
		b[r.IntN(len(b))] ^= 1 << r.IntN(8)
		return set(b)
	case 2: // another's
		if len(field.donors) > 0 {
			return set(field.donors[r.IntN(len(field.donors))])
		}
	case 3: // shorter, at either end or inside
		from := r.IntN(len(value))
		return put(s.from+from, s.from+from+1+r.IntN(len(value)-from), nil)
	case 4: // longer
		at := r.IntN(len(value) + 1)
		piece := value[r.IntN(len(value)):]
		if r.IntN(2) == 0 {
			piece = []byte{byte(r.Uint32())}
		}
		return put(s.from+at, s.from+at, piece)
	case 5: // spelled otherwise
		return set(respell(r, value))
	case 6: // another number
		return set(renumber(r, value))
	case 7: // changes places with a neighbour
		var near []span
		for _, o := range field.doc.spans {
			if o.parent == s.parent && o.from != s.from && (o.end <= s.member || o.member >= s.end) {
				near = append(near, o)
			}
		}
		if len(near) > 0 {
			a, b := s, near[r.IntN(len(near))]
			if a.member > b.member {
				a, b = b, a
			}
			return slices.Concat(text[:a.member], text[b.member:b.end], text[a.end:b.member], text[a.member:a.end], text[b.end:])
		}
	case 8: // twice, the second time perhaps another's
		again := bytes.Clone(text[s.member:s.end])
		if len(field.donors) > 0 && r.IntN(2) == 0 {
			again = slices.Concat(text[s.member:s.from], field.donors[r.IntN(len(field.donors))])
		}
		sep := [][]byte{{','}, {'\n'}, {' '}, nil}[r.IntN(4)]
		if r.IntN(2) == 0 {
			return put(s.end, s.end, slices.Concat(sep, again))
		}
		return put(s.member, s.member, slices.Concat(again, sep))
	case 9: // gone, with what separates it
		from, end := s.member, s.end
		if end < len(text) && (text[end] == ',' || text[end] == '\n') {
			end++
		} else if from > 0 && r.IntN(2) == 0 {
			from--
		}
		return put(from, end, nil)
	case 10: // two bytes change places
		b := bytes.Clone(value)
		i, k := r.IntN(len(b)), r.IntN(len(b))
		b[i], b[k] = b[k], b[i]
		return set(b)
	case 11: // a byte
		b := bytes.Clone(value)
		b[r.IntN(len(b))] = byte(r.Uint32())
		return set(b)
	}
	return set(nil)
}

// respell writes a value as a careless reader would take for the same.
func respell(r *rand.Rand, value []byte) []byte {
	at := r.IntN(len(value))
	switch r.IntN(10) {
	case 0: // an escape where none is needed
		return slices.Concat(value[:at], fmt.Appendf(nil, "\\u%04x", value[at]), value[at+1:])
	case 1: // the other alphabet of base64
		return bytes.Map(func(c rune) rune {
			switch c {
			case '-':
				return '+'
			case '_':
				return '/'
			case '+':
				return '-'
			case '/':
				return '_'
			}
			return c
		}, value)
	case 2: // padding
		return slices.Concat(bytes.TrimRight(value, `="`), []byte("=\""))
	case 3: // bits that base64 does not use
		b := bytes.Clone(value)
		for i := len(b) - 1; i >= 0; i-- {
			if b[i] != '=' && b[i] != '"' {
				b[i]++
				break
			}
		}
		return b
	case 4:
		return bytes.ToUpper(value)
	case 5:
		return slices.Concat([]byte("0"), value)
	case 6: // white space
		return slices.Concat(value[:at], [][]byte{{' '}, {'\n'}, {'\t'}, {'\r', '\n'}}[r.IntN(4)], value[at:])
	case 7: // a string for a number or the reverse
		if value[0] == '"' {
			return bytes.Trim(value, `"`)
		}
		return slices.Concat([]byte{'"'}, value, []byte{'"'})
	case 8:
		return [][]byte{[]byte("null"), []byte("true"), []byte("false"), []byte(`""`), []byte("{}"), []byte("[]"), []byte("0")}[r.IntN(7)]
	}
	return slices.Concat(value, []byte(".0"))
}

// renumber changes a number in value; without one it changes nothing.
func renumber(r *rand.Rand, value []byte) []byte {
	var at []int
	for i, c := range value {
		if c >= '0' && c <= '9' && (i == 0 || value[i-1] < '0' || value[i-1] > '9') {
			at = append(at, i)
		}
	}
	if len(at) == 0 {
		return value
	}
	from := at[r.IntN(len(at))]
	end := from
	for end < len(value) && value[end] >= '0' && value[end] <= '9' {
		end++
	}
	n, _ := strconv.ParseUint(string(value[from:end]), 10, 64)
	n = []uint64{n + 1, n - 1, 0, n * 10, n ^ 1<<r.IntN(64), r.Uint64N(300), r.Uint64()}[r.IntN(7)]
	return slices.Concat(value[:from], strconv.AppendUint(nil, n, 10), value[end:])
}
