package config

import (
	"fmt"
	"regexp"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// document is a parsed file: its text by lines, where each setting stands, and what is wrong with it so far.
type document struct {
	file     string
	lines    []string
	places   map[string]place // by path, such as routes[3].policy.class; the whole file is ""
	bad      map[string]bool  // paths whose value is already told to be wrong: nothing that rests on them is judged
	problems Errors
}

// place is where a setting stands. Items of lists have no key.
type place struct {
	key, value *yaml.Node
}

// maxProblems bounds what is gathered; a file of junk has one problem per line.
const maxProblems = 1000

// report adds a problem at a position; line 0 stands for the whole file.
func (d *document) report(line, column int, path, message string) {
	if path != "" {
		d.bad[path] = true
	}
	if len(d.problems) >= maxProblems {
		return
	}
	if n := len(d.lines); n > 0 && line > n {
		line, column = n, 1 // what is missing at the end of a file stands behind its last line to the YAML parser
	}
	p := Problem{File: d.file, Line: line, Column: column, Path: path, Message: message}
	if line > 0 && line <= len(d.lines) {
		text := d.lines[line-1]
		text, column = hide(text, column, isKeyURI(path) && d.has(path))
		p.Snippet = snippet(text, column)
	}
	d.problems = append(d.problems, p)
}

func isKeyURI(path string) bool {
	return strings.HasPrefix(path, "keys.") && strings.HasSuffix(path, ".uri")
}

// hide cuts a line before the key URI in it: what is wrong may be that it holds a PIN, and problems are logged. With atURI
// one begins at column, whatever it looks like. It returns the column of the marker, which is never behind the cut.
func hide(text string, column int, atURI bool) (shown string, at int) {
	cut := -1
	for _, mark := range []string{"pkcs11:", "pin-value", "pin-source"} {
		if i := strings.Index(text, mark); i >= 0 && (cut < 0 || i < cut) {
			cut = i
		}
	}
	if cut >= 0 {
		cut = utf8.RuneCountInString(text[:cut])
	}
	if atURI && (cut < 0 || column-1 < cut) {
		cut = column - 1
	}
	runes := []rune(text)
	if cut < 0 || cut > len(runes) {
		return text, column
	}
	return string(runes[:cut]) + "(not shown)", min(column, cut+1)
}

// position returns where to point for path: at its value if it is a scalar, else at its key; if it is not in the file, at
// the nearest thing around it that is. exact is false in that last case.
func (d *document) position(path string) (line, column int, exact bool) {
	for p, first := path, true; ; p, first = parent(p), false {
		if at, ok := d.places[p]; ok {
			n := at.value
			if at.key != nil && (n.Kind != yaml.ScalarNode || !first || n.Line == 0) {
				n = at.key
			}
			return n.Line, n.Column, first
		}
		if p == "" {
			return 1, 1, false
		}
	}
}

// parent returns the path around path: routes[3] for routes[3].name, routes for routes[3].
func parent(path string) string {
	return path[:max(strings.LastIndexAny(path, ".["), 0)]
}

// isBad reports whether path or anything around it has been told to be wrong.
func (d *document) isBad(path string) bool {
	for ; path != ""; path = parent(path) {
		if d.bad[path] {
			return true
		}
	}
	return false
}

// has reports whether the file sets path itself.
func (d *document) has(path string) bool {
	_, ok := d.places[path]
	return ok
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

var decimal = regexp.MustCompile(`^[0-9]{1,10}$`)

// message notes where the fields of a message stand, and reports whatever the decoder would misread or let pass: keys
// that are unknown, stand twice or are spelt otherwise than in config.proto, nulls, aliases, tags, numbers for enums.
func (d *document) message(n *yaml.Node, md protoreflect.MessageDescriptor, path string) {
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" && path != "" {
		return // a key with nothing below it: every field has its default
	}
	if n.Kind != yaml.MappingNode {
		d.reportNode(n, path, "want a mapping with keys such as %s, not %s", fieldNames(md, 4), kindName(n))
		return
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		if k.Kind != yaml.ScalarNode {
			d.reportNode(k, path, "a key must be a name, not %s", kindName(k))
			continue
		}
		field := md.Fields().ByTextName(k.Value)
		if field == nil {
			d.report(k.Line, k.Column, join(path, printable(k.Value)), unknownKey(k.Value, md))
			continue
		}
		p := join(path, k.Value)
		if first, dup := d.places[p]; dup {
			d.report(k.Line, k.Column, p, fmt.Sprintf("stands here a second time, after line %d", first.key.Line))
			continue
		}
		d.places[p] = place{k, v}
		if !field.IsList() {
			d.value(v, field, p)
			continue
		}
		if v.Kind != yaml.SequenceNode {
			d.reportNode(v, p, "want a list, not %s", kindName(v))
			continue
		}
		for j, item := range v.Content {
			ip := fmt.Sprintf("%s[%d]", p, j)
			d.places[ip] = place{nil, item}
			d.value(item, field, ip)
		}
	}
}

// value checks one value or list item of field.
func (d *document) value(n *yaml.Node, field protoreflect.FieldDescriptor, path string) {
	md := field.Message()
	isDuration := md != nil && md.FullName() == "google.protobuf.Duration"
	switch {
	case n.Kind == yaml.AliasNode:
		d.reportNode(n, path, "anchors and aliases are not supported: write the value out")
	case n.Style&yaml.TaggedStyle != 0:
		d.reportNode(n, path, "tags such as %s are not supported", printable(n.Tag))
	case md != nil && !isDuration:
		d.message(n, md, path)
	case n.Kind != yaml.ScalarNode:
		d.reportNode(n, path, "want %s, not %s", valueName(field), kindName(n))
	case n.Tag == "!!null":
		d.reportNode(n, path, "has no value: give one, or leave the key out for the default")
	case field.Kind() == protoreflect.EnumKind && !isChoice(field.Enum(), n.Value):
		d.reportNode(n, path, "%q is not known here: want %s", printable(n.Value), valueName(field))
	case field.Kind() == protoreflect.Uint32Kind && (n.Tag != "!!int" || !decimal.MatchString(n.Value)):
		d.reportNode(n, path, "%q is not %s", printable(n.Value), valueName(field))
	case field.Kind() == protoreflect.BoolKind && (n.Tag != "!!bool" || n.Value != "true" && n.Value != "false"):
		d.reportNode(n, path, "%q is not %s", printable(n.Value), valueName(field))
	}
}

// isChoice reports whether name is one of the values that valueName offers. The zero value is not: it means "not said",
// and leaving the key out says that.
func isChoice(e protoreflect.EnumDescriptor, name string) bool {
	v := e.Values().ByName(protoreflect.Name(name))
	return v != nil && v.Number() != 0
}

func (d *document) reportNode(n *yaml.Node, path, format string, args ...any) {
	d.report(n.Line, n.Column, path, fmt.Sprintf(format, args...))
}

func kindName(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	case yaml.AliasNode:
		return "an alias"
	}
	if n.Tag == "!!null" {
		return "nothing"
	}
	return fmt.Sprintf("%q", printable(n.Value))
}

func valueName(field protoreflect.FieldDescriptor) string {
	switch field.Kind() {
	case protoreflect.BoolKind:
		return "true or false"
	case protoreflect.Uint32Kind:
		return "a whole number in decimal digits"
	case protoreflect.MessageKind:
		return "a duration such as 250ms"
	case protoreflect.EnumKind:
		var names []string
		for i := range field.Enum().Values().Len() {
			if v := field.Enum().Values().Get(i); v.Number() != 0 {
				names = append(names, string(v.Name()))
			}
		}
		return strings.Join(names, " or ")
	}
	return "a string"
}

func fieldNames(md protoreflect.MessageDescriptor, limit int) string {
	var names []string
	for i := range min(md.Fields().Len(), limit) {
		names = append(names, md.Fields().Get(i).TextName())
	}
	return strings.Join(names, ", ")
}

func unknownKey(key string, md protoreflect.MessageDescriptor) string {
	best, distance := "", 3
	for i := range md.Fields().Len() {
		f := md.Fields().Get(i)
		if f.JSONName() == key {
			best = f.TextName()
			break
		}
		if n := editDistance(key, f.TextName()); n < distance && n < len(f.TextName())-1 {
			best, distance = f.TextName(), n
		}
	}
	if best != "" {
		return fmt.Sprintf("unknown key; did you mean %s?", best)
	}
	return "unknown key; known are " + fieldNames(md, md.Fields().Len())
}

// editDistance is Levenshtein's, over bytes; long keys are far from everything.
func editDistance(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}

// printable cuts s to what fits into a message, and keeps key URIs out of it.
func printable(s string) string {
	if strings.Contains(s, "pkcs11:") || strings.Contains(s, "pin-value") {
		return "(not shown)"
	}
	if r := []rune(s); len(r) > 40 {
		return string(r[:40]) + "..."
	}
	return s
}
