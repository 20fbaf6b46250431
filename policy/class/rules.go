package class

import (
	"errors"
	"fmt"
	"regexp/syntax"
	"strings"
	"sync"
	"unicode/utf8"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/overloads"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"

	"github.com/knhk/sidecar/policy"
)

// Bounds on rules. Cost is CEL's own measure: about one per operation, and one per ten bytes of string looked at; a unit
// takes 10 to 100 ns. CEL charges for a call when it is over, so what one call can cost is bounded by itself: by the length
// of the strings that rules see and by the size of patterns. The worst pattern on the longest path takes some 10 ms; a
// usual one less than a microsecond.
const (
	MaxExpr     = 4096    // bytes of one expression
	MaxRuleCost = 10_000  // of one rule for one request
	MaxCost     = 100_000 // of all rules for one request
	MaxValue    = 8 << 10 // bytes of a variable that CEL looks at; equality, prefixes and suffixes work beyond it
	MaxRegex    = 250     // instructions of a compiled regular expression
)

// RuleError is one fault in one rule.
type RuleError struct {
	Index  int    // of the rule in Config.Rules
	Name   string // of the rule
	Line   int    // in the expression, from 1; 0 if the fault is not in the expression
	Column int    // in code points, from 1; 0 if Line is 0
	Msg    string
}

func (e RuleError) Error() string {
	if e.Line == 0 {
		return fmt.Sprintf("class rule %q: %s", e.Name, e.Msg)
	}
	return fmt.Sprintf("class rule %q: %d:%d: %s", e.Name, e.Line, e.Column, e.Msg)
}

// RuleErrors is every fault in every rule, in order.
type RuleErrors []RuleError

func (e RuleErrors) Error() string {
	lines := make([]string, len(e))
	for i := range e {
		lines[i] = e[i].Error()
	}
	return strings.Join(lines, "\n")
}

// The variables of a rule, by number.
var variables = [...]string{"method", "scheme", "authority", "path", "route", "cluster", "spiffe_id"}

func variable(name string) (int, bool) {
	for i := range variables {
		if variables[i] == name {
			return i, true
		}
	}
	return 0, false
}

func value(req *policy.Request, v int) string {
	switch v {
	case 0:
		return req.Method
	case 1:
		return req.Scheme
	case 2:
		return req.Authority
	case 3:
		return req.Path
	case 4:
		return req.Route
	case 5:
		return req.Cluster
	default:
		return req.SPIFFEID
	}
}

type rule struct {
	name   string
	class  policy.Class
	guards []guard     // conditions that must all hold for the rule to be true
	prog   cel.Program // nil if the guards are all there is to the rule
}

// guard is a conjunct of a rule that needs no CEL to be judged: most requests fail most rules in one, which costs
// nanoseconds and no allocation where CEL costs a microsecond.
type guard struct {
	v       int
	op      guardOp
	literal string
}

type guardOp uint8

const (
	equals guardOp = iota
	hasPrefix
	hasSuffix
)

func (g guard) holds(req *policy.Request) bool {
	s := value(req, g.v)
	switch g.op {
	case hasPrefix:
		return strings.HasPrefix(s, g.literal)
	case hasSuffix:
		return strings.HasSuffix(s, g.literal)
	default:
		return s == g.literal
	}
}

var newEnv = sync.OnceValues(func() (*cel.Env, error) {
	opts := []cel.EnvOption{
		cel.ParserExpressionSizeLimit(MaxExpr),
		cel.ParserRecursionLimit(64),
		cel.ASTValidators(cel.ValidateDurationLiterals(), cel.ValidateTimestampLiterals()),
	}
	for _, name := range variables {
		opts = append(opts, cel.Variable(name, cel.StringType))
	}
	return cel.NewEnv(opts...)
})

func compile(rules []Rule) ([]rule, error) {
	env, err := newEnv()
	if err != nil {
		return nil, fmt.Errorf("class: set up CEL: %w", err)
	}
	var faults RuleErrors
	seen := make(map[string]int, len(rules))
	out := make([]rule, 0, len(rules))
	for i, r := range rules {
		fault := func(line, column int, format string, args ...any) {
			faults = append(faults, RuleError{Index: i, Name: r.Name, Line: line, Column: column, Msg: fmt.Sprintf(format, args...)})
		}
		if r.Name == "" || strings.Contains(r.Name, ":") {
			fault(0, 0, "the name is empty or has a colon")
		} else if first, dup := seen[r.Name]; dup {
			fault(0, 0, "the name is taken by rule number %d", first+1)
		} else {
			seen[r.Name] = i
		}
		if r.Class != policy.R1 && r.Class != policy.W1 {
			fault(0, 0, "the class is %v: want R1 or W1", r.Class)
		}
		compiled, bad := compileRule(env, r)
		for _, b := range bad {
			fault(b.Line, b.Column, "%s", b.Msg)
		}
		out = append(out, compiled)
	}
	if faults != nil {
		return nil, faults
	}
	return out, nil
}

func compileRule(env *cel.Env, r Rule) (rule, []RuleError) {
	if len(r.Expr) > MaxExpr || !utf8.ValidString(r.Expr) {
		return rule{}, []RuleError{{Msg: fmt.Sprintf("the expression is longer than %d bytes or not UTF-8", MaxExpr)}}
	}
	checked, issues := env.Compile(r.Expr)
	if issues.Err() != nil {
		var bad []RuleError
		for _, e := range issues.Errors() {
			bad = append(bad, RuleError{Line: max(e.Location.Line(), 1), Column: max(e.Location.Column()+1, 1), Msg: e.Message})
		}
		return rule{}, bad
	}
	a := checked.NativeRep()
	if !checked.OutputType().IsExactType(cel.BoolType) {
		return rule{}, []RuleError{{Line: 1, Column: 1, Msg: fmt.Sprintf("the expression is of type %v: want bool", checked.OutputType())}}
	}
	sizes, bad := checkRegexes(a)
	if bad != nil {
		return rule{}, bad
	}
	out := rule{name: r.Name, class: r.Class}
	var whole bool
	if out.guards, whole = conjuncts(a.Expr(), nil); whole {
		return out, nil
	}
	prog, err := env.Program(checked, cel.EvalOptions(cel.OptOptimize), cel.CostLimit(MaxRuleCost), cel.CostTracking(sizes))
	if err != nil {
		return rule{}, []RuleError{{Line: 1, Column: 1, Msg: err.Error()}}
	}
	out.prog = prog
	return out, nil
}

// regexSizes is the number of instructions of each pattern of a rule. It tells CEL what matches() costs: CEL would go by
// the length of the pattern, and (a{9}){40} is short.
type regexSizes map[string]int

// CallCost implements cost.ActualCostEstimator.
func (r regexSizes) CallCost(function, _ string, args []ref.Val, _ ref.Val) *uint64 {
	if function != overloads.Matches || len(args) != 2 {
		return nil
	}
	subject, _ := args[0].(types.String)
	pattern, _ := args[1].(types.String)
	size, ok := r[string(pattern)]
	if !ok {
		size = MaxRegex
	}
	cost := (uint64(len(subject))/10 + 1) * (uint64(size)/4 + 1)
	return &cost
}

// checkRegexes refuses patterns that are not literals: a pattern from a request is compiled for each request, and the
// client would choose its cost. Literals are compiled here, because CEL's own complaint does not say what is wrong.
func checkRegexes(a *ast.AST) (sizes regexSizes, bad []RuleError) {
	sizes = make(regexSizes)
	ast.PostOrderVisit(a.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		if e.Kind() != ast.CallKind || e.AsCall().FunctionName() != overloads.Matches {
			return
		}
		args := e.AsCall().Args()
		pattern := args[len(args)-1]
		msg := "the pattern of matches() must be a string literal"
		if pattern.Kind() == ast.LiteralKind {
			s, _ := pattern.AsLiteral().(types.String)
			sizes[string(s)], msg = checkRegex(string(s))
		}
		if msg != "" {
			at := a.SourceInfo().GetStartLocation(pattern.ID())
			bad = append(bad, RuleError{Line: max(at.Line(), 1), Column: max(at.Column()+1, 1), Msg: msg})
		}
	}))
	return sizes, bad
}

func checkRegex(pattern string) (size int, fault string) {
	tree, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		return 0, "the pattern of matches() is not valid: " + strings.TrimPrefix(err.Error(), "error parsing regexp: ")
	}
	prog, err := syntax.Compile(tree.Simplify())
	if err != nil {
		return 0, "the pattern of matches() is not valid: " + err.Error()
	}
	if size = len(prog.Inst); size > MaxRegex {
		return size, fmt.Sprintf("the pattern of matches() takes %d instructions: at most %d are run", size, MaxRegex)
	}
	return size, ""
}

// conjuncts gathers the guards among the operands of e's outermost &&s, and reports whether they are all of e. In CEL
// "false && error" and "error && false" are false, so a guard that fails makes the whole false whatever the rest does.
func conjuncts(e ast.Expr, to []guard) (guards []guard, whole bool) {
	if e.Kind() != ast.CallKind {
		return to, false
	}
	call := e.AsCall()
	if call.FunctionName() == operators.LogicalAnd {
		whole = true
		for _, arg := range call.Args() {
			var all bool
			to, all = conjuncts(arg, to)
			whole = whole && all
		}
		return to, whole
	}
	if g, ok := asGuard(call); ok {
		return append(to, g), true
	}
	return to, false
}

func asGuard(call ast.CallExpr) (guard, bool) {
	var op guardOp
	operands := call.Args()
	switch call.FunctionName() {
	case operators.Equals:
		op = equals
	case overloads.StartsWith:
		op = hasPrefix
	case overloads.EndsWith:
		op = hasSuffix
	default:
		return guard{}, false
	}
	if call.IsMemberFunction() {
		operands = []ast.Expr{call.Target(), operands[0]}
	}
	if len(operands) != 2 {
		return guard{}, false
	}
	subject, literal := operands[0], operands[1]
	if op == equals && subject.Kind() == ast.LiteralKind {
		subject, literal = literal, subject
	}
	if subject.Kind() != ast.IdentKind || literal.Kind() != ast.LiteralKind {
		return guard{}, false
	}
	v, known := variable(subject.AsIdent())
	s, isString := literal.AsLiteral().(types.String)
	return guard{v, op, string(s)}, known && isString
}

// activation gives CEL the fields of a request when it asks for them, each boxed at most once per request.
type activation struct {
	req   *policy.Request
	boxed [len(variables)]ref.Val
	long  bool // a variable longer than MaxValue was asked for: whatever CEL says does not count
}

// ResolveName implements cel.Activation.
func (a *activation) ResolveName(name string) (any, bool) {
	v, ok := variable(name)
	if !ok {
		return nil, false
	}
	if a.boxed[v] == nil {
		s := value(a.req, v)
		if len(s) > MaxValue {
			a.long, s = true, ""
		}
		a.boxed[v] = types.String(s)
	}
	return a.boxed[v], true
}

// Parent implements cel.Activation.
func (a *activation) Parent() cel.Activation { return nil }

var activations = sync.Pool{New: func() any { return new(activation) }}

// match runs the rules; done is false if none matched.
func (c *Classifier) match(req *policy.Request) (result Result, done bool) {
	var vars *activation
	defer func() {
		if vars != nil {
			*vars = activation{} // the pool must not keep the request alive
			activations.Put(vars)
		}
	}()
	var spent uint64
next:
	for i := range c.rules {
		r := &c.rules[i]
		for _, g := range r.guards {
			if !g.holds(req) {
				continue next
			}
		}
		if r.prog == nil {
			return Result{Class: r.class, Rule: r.name}, true
		}
		if vars == nil {
			vars = activations.Get().(*activation)
			vars.req = req
		}
		yes, cost, err := evaluate(r.prog, vars)
		spent += cost
		if err == nil && spent > MaxCost {
			err = errTotalCost
		}
		if err != nil {
			return Result{Rule: r.name, Err: policy.ReasonClassRule, Detail: err.Error()}, true
		}
		if yes {
			return Result{Class: r.class, Rule: r.name}, true
		}
	}
	return Result{}, false
}

var (
	errTotalCost = errors.New("the rules up to this one cost more than a request may")
	errLong      = fmt.Errorf("the rule looks into a value of more than %d bytes", MaxValue)
)

func evaluate(prog cel.Program, vars *activation) (yes bool, cost uint64, err error) {
	val, details, err := prog.Eval(vars)
	if vars.long {
		return false, 0, errLong
	}
	if err != nil {
		return false, 0, err
	}
	if actual := details.ActualCost(); actual != nil {
		cost = *actual
	}
	b, ok := val.(types.Bool)
	if !ok {
		return false, cost, fmt.Errorf("the result is of type %v, not bool", val.Type())
	}
	return bool(b), cost, nil
}
