package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"buf.build/go/protovalidate"
	"buf.build/go/protoyaml"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/proto"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
)

const (
	maxFile = 4 << 20  // bytes of a file; 10,000 routes take about 2 MiB
	maxLine = 64 << 10 // bytes of a line; bounds the work for a problem
)

// Load reads and checks the file at path, which must be a regular file or a link to one. Its error is of type Errors.
func Load(path string) (*Config, error) {
	whole := func(format string, args ...any) error {
		return Errors{{File: path, Message: fmt.Sprintf(format, args...)}}
	}
	var cause *fs.PathError
	info, err := os.Stat(path)
	switch {
	case errors.As(err, &cause):
		return nil, whole("cannot be read: %v", cause.Err)
	case err != nil:
		return nil, whole("cannot be read: %v", err)
	case info.IsDir():
		return nil, whole("is a directory: name the file in it")
	case !info.Mode().IsRegular():
		return nil, whole("is not a regular file, but %v", info.Mode().Type()) // a pipe might never end
	case info.Size() > maxFile:
		return nil, whole("is %d bytes long: a configuration has at most %d", info.Size(), maxFile)
	}
	f, err := os.Open(path)
	if errors.As(err, &cause) {
		return nil, whole("cannot be read: %v", cause.Err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, whole("cannot be read: %v", err)
	}
	return Parse(path, data)
}

// Parse checks data, the content of the file called name. Its error is of type Errors.
func Parse(name string, data []byte) (cfg *Config, err error) {
	defer func() {
		if r := recover(); r != nil {
			// A reload must not take the service down, whatever a parser does with a file.
			cfg, err = nil, Errors{{File: name, Message: fmt.Sprintf("cannot be parsed: internal error: %v", r)}}
		}
	}()
	d := &document{file: name, places: make(map[string]place), bad: make(map[string]bool)}
	pb := new(configv1.Config)
	if d.read(data, pb) {
		d.validate(pb)
		effective := proto.CloneOf(pb)
		applyDefaults(effective)
		d.check(effective)
		if len(d.problems) == 0 {
			return build(name, effective)
		}
	}
	slices.SortStableFunc(d.problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	return nil, d.problems
}

// read decodes data into pb and notes where everything stands. It reports false if there is nothing to judge further.
func (d *document) read(data []byte, pb *configv1.Config) bool {
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	if len(data) > maxFile {
		d.report(0, 0, "", fmt.Sprintf("is more than %d bytes long", maxFile))
		return false
	}
	d.lines = strings.Split(string(data), "\n")
	if line, column, why := d.junk(); why != "" {
		d.lines = nil // not worth showing
		d.report(line, column, "", why)
		return false
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, second yaml.Node
	if err := dec.Decode(&doc); err == io.EOF {
		d.report(0, 0, "", "is empty: origin, instance, state_dir, listeners and keys are required")
		return false
	} else if err != nil {
		d.syntax(data, err)
		return false
	}
	root := doc.Content[0]
	d.places[""] = place{nil, root}
	if root.Kind != yaml.MappingNode {
		d.reportNode(root, "", "is not a configuration: want a mapping with keys such as %s, not %s",
			fieldNames(pb.ProtoReflect().Descriptor(), 4), kindName(root))
		return false
	}
	d.message(root, pb.ProtoReflect().Descriptor(), "")
	switch err := dec.Decode(&second); {
	case err == nil:
		line := 0
		for n := &second; n.Kind != 0; n = n.Content[0] {
			line = n.Line
			if len(n.Content) == 0 {
				break
			}
		}
		d.report(line, 1, "", "a second YAML document begins before this line: a file holds one")
	case err != io.EOF:
		d.syntax(data, err)
	}
	if len(d.problems) < maxProblems {
		d.decode(data, pb)
	}
	return true
}

// junk finds what no text file of ours holds. Line breaks other than LF and CRLF are among it: the YAML parser counts
// them as lines, and nothing else does.
func (d *document) junk() (line, column int, why string) {
	for i, text := range d.lines {
		if len(text) > maxLine {
			return i + 1, 1, fmt.Sprintf("the line is %d bytes long: at most %d are read", len(text), maxLine)
		}
		column := 0
		for j := 0; j < len(text); {
			column++
			r, size := utf8.DecodeRuneInString(text[j:])
			switch {
			case r == utf8.RuneError && size == 1:
				return i + 1, column, "is not UTF-8 text"
			case r == '\r' && j == len(text)-1 && i < len(d.lines)-1, r == '\t':
			case r < ' ' || r >= 0x7f && r < 0xa0 || r == '\u2028' || r == '\u2029' || r == '\ufeff':
				return i + 1, column, fmt.Sprintf("the character %U is not allowed: a configuration is plain text with LF line ends", r)
			}
			j += size
		}
	}
	return 0, 0, ""
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line ([0-9]+): )?`)

// syntax reports an error of the YAML parser. It often names no line, or the line where the thing around the error begins.
// In files of ordinary size we look for the shortest beginning that fails in the same way: its last line is the culprit.
func (d *document) syntax(data []byte, err error) {
	match := yamlLine.FindStringSubmatch(err.Error())
	line := 1
	message := err.Error()
	if match != nil {
		message = strings.TrimPrefix(message, match[0])
		if n, err := strconv.Atoi(match[1]); err == nil {
			line = n
		}
	}
	if len(data) <= 256<<10 {
		fails := func(lines int) bool {
			dec := yaml.NewDecoder(strings.NewReader(strings.Join(d.lines[:lines], "\n") + "\n"))
			for {
				var n yaml.Node
				if err := dec.Decode(&n); err != nil {
					return strings.TrimPrefix(err.Error(), yamlLine.FindString(err.Error())) == message
				}
			}
		}
		low, high := 0, len(d.lines) // lines[:low] does not fail, lines[:high] does
		for high-low > 1 {
			if mid := (low + high) / 2; fails(mid) {
				high = mid
			} else {
				low = mid
			}
		}
		line = high
	}
	line = min(max(line, 1), len(d.lines))
	text := d.lines[line-1]
	column := utf8.RuneCountInString(text) - utf8.RuneCountInString(strings.TrimLeft(text, " \t")) + 1
	d.report(line, column, "", "is not YAML: "+message)
}

var yamlPosition = regexp.MustCompile(`^:([0-9]+):([0-9]+) `)

// decode lets protoyaml fill pb. Most of what it could find has been found; where it reports what stands at the same
// place as an earlier problem, the earlier one says it better.
func (d *document) decode(data []byte, pb *configv1.Config) {
	err := protoyaml.UnmarshalOptions{}.Unmarshal(data, pb)
	if err == nil {
		return
	}
	type position struct{ line, column int }
	told := make(map[position]bool)
	for _, p := range d.problems {
		told[position{p.Line, p.Column}] = true
	}
	paths := make(map[position]string, len(d.places))
	for path, at := range d.places {
		paths[position{at.value.Line, at.value.Column}] = path
	}
	errs := []error{err}
	if many, ok := err.(interface{ Unwrap() []error }); ok {
		errs = many.Unwrap()
	}
	for _, err := range errs[:min(len(errs), maxProblems)] {
		text := err.Error()
		var at position
		if m := yamlPosition.FindStringSubmatch(text); m != nil {
			at.line, _ = strconv.Atoi(m[1])
			at.column, _ = strconv.Atoi(m[2])
			text, _, _ = strings.Cut(strings.TrimPrefix(text, m[0]), "\n")
		}
		if !told[at] {
			d.report(at.line, at.column, paths[at], text)
		}
	}
}

// validate runs the constraints of config.proto.
func (d *document) validate(pb *configv1.Config) {
	err := protovalidate.Validate(pb)
	var invalid *protovalidate.ValidationError
	if err != nil && !errors.As(err, &invalid) {
		d.report(0, 0, "", fmt.Sprintf("cannot be checked: %v", err))
		return
	}
	if invalid == nil {
		return
	}
	for _, v := range invalid.Violations {
		path := protovalidate.FieldPathString(v.Proto.GetField())
		if d.isBad(path) {
			continue
		}
		line, column, exact := d.position(path)
		message := v.Proto.GetMessage()
		if !exact {
			message = "is required"
		}
		d.report(line, column, path, message)
	}
}
