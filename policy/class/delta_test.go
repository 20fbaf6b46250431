package class

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/knhk/sidecar/policy"
)

func items(n int, form string) string {
	return strings.TrimSuffix(strings.Repeat(form+",", n), ",")
}

const (
	item  = `{"subject":"s","predicate":"p","object":"o"}`
	tuple = `["s","p","o"]`
)

func TestDelta(t *testing.T) {
	for _, c := range []struct{ name, body, want string }{
		{"one addition", `{"additions":[` + item + `]}`, DeltaHot},
		{"one removal, as an array", `{"removals":[` + tuple + `]}`, DeltaHot},
		{"with graphs", `{"additions":[{"graph":"g","object":"o","subject":"s","predicate":"p"},["s","p","o","g"]]}`, DeltaHot},
		{"nothing at all", `{}`, DeltaHot},
		{"empty lists and white space", " \n{ \"additions\" : [ ] ,\t\"removals\":[]}\r\n", DeltaHot},
		{"empty strings", `{"additions":[["","",""]]}`, DeltaHot},
		{"8 items in both lists together", `{"additions":[` + items(5, item) + `],"removals":[` + items(3, tuple) + `]}`, DeltaHot},
		{"9 items in both lists together", `{"additions":[` + items(5, item) + `],"removals":[` + items(4, tuple) + `]}`, DeltaItems},
		{"9 items in one", `{"removals":[` + items(9, tuple) + `]}`, DeltaItems},

		{"a blank subject", `{"additions":[["_:b","p","o"]]}`, DeltaBlank},
		{"a blank predicate", `{"additions":[["s","_:b","o"]]}`, DeltaBlank},
		{"a blank object", `{"additions":[["s","p","_:b"]]}`, DeltaBlank},
		{"a blank graph", `{"removals":[{"subject":"s","predicate":"p","object":"o","graph":"_:"}]}`, DeltaBlank},
		{"variables", `{"removals":[["?s","p","o"]]}`, DeltaBlank},
		{"the other kind of variable", `{"removals":[["s","p","$o"]]}`, DeltaBlank},
		{"an escaped blank", `{"additions":[["\u005f\u003ab","p","o"]]}`, DeltaBlank},
		{"a blank behind white space", `{"additions":[["\t _:b","p","o"]]}`, DeltaBlank},
		{"not blank: in the middle, or no colon", `{"additions":[["a_:b","_b","o?$"]]}`, DeltaHot},
		{"more items and blanks: items are told", `{"additions":[` + items(9, `["_:b","p","o"]`) + `]}`, DeltaItems},

		{"empty", ``, DeltaMalformed},
		{"white space", ` `, DeltaMalformed},
		{"not an object", `[]`, DeltaMalformed},
		{"null", `null`, DeltaMalformed},
		{"cut short", `{"additions":[` + item, DeltaMalformed},
		{"cut short behind a blank: malformed is told", `{"additions":[["_:b","p","o"]`, DeltaMalformed},
		{"malformed behind nine items: malformed is told", `{"additions":[` + items(9, tuple) + `],}`, DeltaMalformed},
		{"more behind the object", `{} {}`, DeltaMalformed},
		{"a brace too many", `{}}`, DeltaMalformed},
		{"trailing comma", `{"additions":[` + tuple + `,]}`, DeltaMalformed},
		{"an unknown member", `{"additions":[],"id":"1"}`, DeltaMalformed},
		{"another case", `{"Additions":[]}`, DeltaMalformed},
		{"a list twice", `{"additions":[],"additions":[]}`, DeltaMalformed},
		{"a list twice, once escaped", `{"additions":[],"\u0061dditions":[]}`, DeltaMalformed},
		{"null for a list", `{"additions":null}`, DeltaMalformed},
		{"an object for a list", `{"additions":{}}`, DeltaMalformed},
		{"a string for an item", `{"additions":["s"]}`, DeltaMalformed},
		{"two terms", `{"additions":[["s","p"]]}`, DeltaMalformed},
		{"five terms", `{"additions":[["s","p","o","g","x"]]}`, DeltaMalformed},
		{"no object", `{"additions":[{"subject":"s","predicate":"p"}]}`, DeltaMalformed},
		{"an unknown member of an item", `{"additions":[{"subject":"s","predicate":"p","object":"o","lang":"de"}]}`, DeltaMalformed},
		{"a subject twice", `{"additions":[{"subject":"s","subject":"s","predicate":"p","object":"o"}]}`, DeltaMalformed},
		{"a number as a term", `{"additions":[["s","p",1]]}`, DeltaMalformed},
		{"null as a term", `{"additions":[{"subject":"s","predicate":"p","object":"o","graph":null}]}`, DeltaMalformed},
		{"invalid UTF-8", "{\"additions\":[[\"\xff\",\"p\",\"o\"]]}", DeltaMalformed},
		{"half a surrogate pair", `{"additions":[["\ud800","p","o"]]}`, DeltaMalformed},
		{"a control character", "{\"additions\":[[\"\n\",\"p\",\"o\"]]}", DeltaMalformed},
		{"deep", strings.Repeat(`{"additions":[`, 500), DeltaMalformed},

		{"8 KiB", `{"additions":[["` + strings.Repeat("x", MaxBody-len(`{"additions":[["","p","o"]]}`)) + `","p","o"]]}`, DeltaHot},
		{"8 KiB and a byte", strings.Repeat(" ", MaxBody-1) + "{}", DeltaLarge},
		{"large and malformed: large is told", strings.Repeat("[", MaxBody+1), DeltaLarge},
	} {
		class, name := Delta([]byte(c.body))
		if name != c.want || (class == policy.R1) != (name == DeltaHot) || class == policy.ClassUnknown {
			t.Errorf("%s: %v by %s, want %s", c.name, class, name, c.want)
		}
		if got := oracle([]byte(c.body)); got != c.want {
			t.Errorf("%s: the oracle says %s, want %s", c.name, got, c.want)
		}
	}
}

func TestDeltaDoesNotAllocate(t *testing.T) {
	body := []byte(`{"additions":[` + items(4, item) + `],"removals":[` + items(4, tuple) + `]}`)
	s := scanners.New().(*scanner) // not from the pool, which the race detector empties at random
	if n := testing.AllocsPerRun(1000, func() {
		if n, blank, err := s.scan(body); n != 8 || blank || err != nil {
			t.Error(n, blank, err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// oracle is Delta without care for speed: it builds a tree of the whole body with encoding/json and looks at that.
func oracle(body []byte) string {
	if len(body) > MaxBody {
		return DeltaLarge
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	tree, err := node(dec)
	if err != nil || !utf8.Valid(body) || loneSurrogate(string(body)) {
		return DeltaMalformed
	}
	if _, err := dec.Token(); err != io.EOF {
		return DeltaMalformed
	}
	var terms [][]string
	top, ok := tree.(object)
	if !ok {
		return DeltaMalformed
	}
	for name, list := range top {
		list, ok := list.([]any)
		if !ok || name != "additions" && name != "removals" {
			return DeltaMalformed
		}
		for _, it := range list {
			values, ok := it.([]any)
			if o, isObject := it.(object); isObject {
				known := 0
				for _, k := range []string{"subject", "predicate", "object", "graph"} {
					if v, has := o[k]; has {
						values = append(values, v)
						known++
					} else if k != "graph" {
						return DeltaMalformed
					}
				}
				ok = known == len(o)
			}
			if !ok || len(values) < 3 || len(values) > 4 {
				return DeltaMalformed
			}
			var texts []string
			for _, v := range values {
				s, ok := v.(string)
				if !ok {
					return DeltaMalformed
				}
				texts = append(texts, s)
			}
			terms = append(terms, texts)
		}
	}
	if len(terms) > 8 {
		return DeltaItems
	}
	blank := regexp.MustCompile(`^[ \t\r\n]*(_:|\?|\$)`)
	for _, t := range terms {
		if slices.ContainsFunc(t, blank.MatchString) {
			return DeltaBlank
		}
	}
	return DeltaHot
}

type object map[string]any

// node reads one value; encoding/json alone would let a name come twice.
func node(dec *json.Decoder) (any, error) {
	tok, err := dec.Token()
	if err != nil {
		return nil, err
	}
	switch tok {
	case json.Delim('{'):
		o := make(object)
		for dec.More() {
			name, err := dec.Token()
			if err != nil {
				return nil, err
			}
			if _, dup := o[name.(string)]; dup {
				return nil, errors.New("a name twice")
			}
			if o[name.(string)], err = node(dec); err != nil {
				return nil, err
			}
		}
		_, err := dec.Token()
		return o, err
	case json.Delim('['):
		list := []any{}
		for dec.More() {
			v, err := node(dec)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err := dec.Token()
		return list, err
	}
	return tok, nil
}

var (
	escapes = regexp.MustCompile(`\\(u[0-9a-fA-F]{4}|.)`)
	high    = regexp.MustCompile(`^\\u[dD][89abAB]`)
	low     = regexp.MustCompile(`^\\u[dD][c-fC-F]`)
)

// loneSurrogate reports whether valid JSON has an escape that is half of a pair. encoding/json replaces it.
func loneSurrogate(s string) bool {
	for s != "" {
		at := escapes.FindStringIndex(s)
		if at == nil {
			return false
		}
		e := s[at[0]:at[1]]
		s = s[at[1]:]
		switch {
		case low.MatchString(e):
			return true
		case high.MatchString(e):
			if !low.MatchString(s) {
				return true
			}
			s = s[6:]
		}
	}
	return false
}

func FuzzDelta(f *testing.F) {
	for _, s := range []string{
		``, `{}`, `{"additions":[` + item + `],"removals":[` + tuple + `]}`, `{"additions":[["\u005f:b","?x","$y"]]}`,
		`{"additions":[` + items(9, tuple) + `]}`, `{"removals":[{"subject":"\ud83d\ude00","predicate":"\ud800","object":""}]}`,
		`{"additions":[],"additions":[]}`, "{\"a\xff\":1}", `[[[[`, `{"additions":[["a","b","c"]]}x`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		class, name := Delta(body)
		if want := oracle(body); name != want || (class == policy.R1) != (want == DeltaHot) {
			t.Errorf("%q: %v by %s, the oracle says %s", body, class, name, want)
		}
	})
}

func BenchmarkDelta(b *testing.B) {
	for _, n := range []int{1, 8} {
		one := `{"subject":"http://example.com/s","predicate":"http://example.com/p","object":"o"}`
		body := []byte(`{"additions":[` + items(n, one) + `]}`)
		b.Run(fmt.Sprintf("items=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				Delta(body)
			}
		})
	}
}
