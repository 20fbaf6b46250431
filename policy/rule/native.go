package rule

import (
	"regexp"
	"slices"
	"strings"

	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/overloads"
	"cel.dev/cel-go/common/types"
)

// native is a condition, or a part of one, that only compares strings with literals: ==, !=, in, startsWith, endsWith, contains and matches
// under &&, || and !. None of these can fail, so that to judge them here is to judge them as CEL does, in a tenth of its time. What they cost is
// charged as CEL would charge it.
type native struct {
	op       nativeOp
	v        int      // the variable, of comparisons
	literals []string // one; of oneOf any number
	pattern  *regexp.Regexp
	parts    []native // of not one; of and, or two at least
}

type nativeOp uint8

const (
	is nativeOp = iota
	isNot
	oneOf
	begins
	ends
	contains
	matches
	and
	or
	not
)

// holds judges n, from left to right and no further than need be, as CEL does.
func (n *native) holds(r *Run) bool {
	switch n.op {
	case and:
		for i := range n.parts {
			if !n.parts[i].holds(r) {
				return false
			}
		}
		return true
	case or:
		for i := range n.parts {
			if n.parts[i].holds(r) {
				return true
			}
		}
		return false
	case not:
		return !n.parts[0].holds(r)
	}
	s := r.in.str(n.v)
	if len(s) > MaxValue {
		r.long = true
		return false
	}
	return n.compare(s)
}

// compare judges a comparison of s, the value of its variable.
func (n *native) compare(s string) bool {
	switch n.op {
	case is:
		return s == n.literals[0]
	case isNot:
		return s != n.literals[0]
	case oneOf:
		return slices.Contains(n.literals, s)
	case begins:
		return strings.HasPrefix(s, n.literals[0])
	case ends:
		return strings.HasSuffix(s, n.literals[0])
	case matches:
		return n.pattern.MatchString(s)
	default:
		return strings.Contains(s, n.literals[0])
	}
}

// comparisons are the functions of a variable and a literal.
var comparisons = map[string]nativeOp{
	operators.Equals: is, operators.NotEquals: isNot, operators.In: oneOf,
	overloads.StartsWith: begins, overloads.EndsWith: ends, overloads.Contains: contains, overloads.Matches: matches,
}

var connectives = map[string]nativeOp{operators.LogicalAnd: and, operators.LogicalOr: or, operators.LogicalNot: not}

// asNative gives e as a native; ok is false if any part of it needs CEL.
func asNative(e ast.Expr) (n native, ok bool) {
	if e.Kind() != ast.CallKind {
		return native{}, false
	}
	call := e.AsCall()
	operands := call.Args()
	if op, ok := connectives[call.FunctionName()]; ok {
		n.op = op
		for _, o := range operands {
			part, ok := asNative(o)
			if !ok {
				return native{}, false
			}
			n.parts = append(n.parts, part)
		}
		return n, len(n.parts) > 0
	}
	op, ok := comparisons[call.FunctionName()]
	if call.IsMemberFunction() {
		operands = append([]ast.Expr{call.Target()}, operands...)
	}
	if !ok || len(operands) != 2 {
		return native{}, false
	}
	subject, other := operands[0], operands[1]
	if (op == is || op == isNot) && subject.Kind() == ast.LiteralKind {
		subject, other = other, subject
	}
	if subject.Kind() != ast.IdentKind {
		return native{}, false
	}
	v, known := variable(subject.AsIdent())
	if !known || v >= strs {
		return native{}, false
	}
	literals := []ast.Expr{other}
	if op == oneOf {
		if other.Kind() != ast.ListKind {
			return native{}, false
		}
		literals = other.AsList().Elements()
	}
	n = native{op: op, v: v}
	for _, l := range literals {
		if l.Kind() != ast.LiteralKind {
			return native{}, false
		}
		s, isString := l.AsLiteral().(types.String)
		if !isString {
			return native{}, false
		}
		n.literals = append(n.literals, string(s))
	}
	if op == matches {
		var err error
		n.pattern, err = regexp.Compile(n.literals[0]) // as CEL does
		return n, err == nil
	}
	return n, true
}
