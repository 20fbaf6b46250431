package rule

import (
	"fmt"
	"math"
	"regexp"
	"regexp/syntax"
	"strings"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/cost"
	"cel.dev/cel-go/common/overloads"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
)

// lengths are those of the longest variable of a request for which a condition's cost is bounded beforehand. To count the cost
// of one that cannot exceed its bound would double its time.
var lengths = [...]int{64, 256, 1024, MaxValue}

// bounds are the most that a condition costs, by index into lengths.
type bounds [len(lengths)]uint64

// sizeOf gives the index into lengths for a request. Values beyond MaxValue are not looked into.
func sizeOf(in *Input) int {
	longest := 0
	for v := range strs {
		longest = max(longest, len(in.str(v)))
	}
	for i, n := range lengths {
		if longest <= n {
			return i
		}
	}
	return len(lengths) - 1
}

// estimate bounds the cost of a condition before it runs.
func estimate(env *cel.Env, checked *cel.Ast, sizes regexSizes) (b bounds, err error) {
	for i, n := range lengths {
		e, err := env.EstimateCost(checked, estimator{uint64(n), sizes})
		if err != nil {
			return b, err
		}
		b[i] = e.Max
	}
	return b, nil
}

// estimator tells CEL how long variables are, and what matches() costs: the same as regexSizes says afterwards.
type estimator struct {
	length uint64
	sizes  regexSizes
}

// EstimateSize implements cost.Estimator.
func (e estimator) EstimateSize(n cost.AstNode) *cost.SizeEstimate {
	if len(n.Path()) == 1 && n.Type() == types.StringType {
		return &cost.SizeEstimate{Min: 0, Max: e.length}
	}
	return nil
}

// EstimateCallCost implements cost.Estimator.
func (e estimator) EstimateCallCost(function, _ string, target *cost.AstNode, args []cost.AstNode) *cost.CallEstimate {
	if function != overloads.Matches {
		return nil
	}
	all := args
	if target != nil {
		all = append([]cost.AstNode{*target}, args...)
	}
	if len(all) != 2 {
		return nil
	}
	size := MaxRegex
	if p := all[1].Expr(); p.Kind() == ast.LiteralKind {
		if s, ok := p.AsLiteral().(types.String); ok {
			size = e.sizes.of(string(s))
		}
	}
	subject := uint64(math.MaxUint64)
	if s := all[0].ComputedSize(); s != nil {
		subject = s.Max
	} else if s := e.EstimateSize(all[0]); s != nil {
		subject = s.Max
	}
	return cost.NewCallEstimate(cost.Estimate{Min: 1, Max: regexCost(subject, size)}, nil)
}

// regexSizes is the number of instructions of each pattern of a rule. It tells CEL what matches() costs: CEL would go by
// the length of the pattern, and (a{9}){40} is short.
type regexSizes map[string]int

func (r regexSizes) of(pattern string) int {
	if size, ok := r[pattern]; ok {
		return size
	}
	return MaxRegex
}

// regexCost is what a pattern of size instructions costs on a subject of n bytes.
func regexCost(n uint64, size int) uint64 {
	return cost.SafeMultiply(n/10+1, uint64(size)/4+1)
}

// CallCost implements cost.ActualCostEstimator.
func (r regexSizes) CallCost(function, _ string, args []ref.Val, _ ref.Val) *uint64 {
	if function != overloads.Matches || len(args) != 2 {
		return nil
	}
	subject, _ := args[0].(types.String)
	pattern, _ := args[1].(types.String)
	n := regexCost(uint64(len(subject)), r.of(string(pattern)))
	return &n
}

// checkCalls refuses arguments that are not literals where the client would choose the cost: a pattern from a request is compiled
// for each request, a time zone by name is read from disk. Literals are compiled here, because CEL's own complaint does not say
// what is wrong.
func checkCalls(a *ast.AST) (sizes regexSizes, bad Faults) {
	sizes = make(regexSizes)
	ast.PostOrderVisit(a.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		if e.Kind() != ast.CallKind {
			return
		}
		call := e.AsCall()
		args := call.Args()
		if len(args) == 0 {
			return
		}
		last := args[len(args)-1]
		text, literal := "", last.Kind() == ast.LiteralKind
		if literal {
			s, _ := last.AsLiteral().(types.String)
			text = string(s)
		}
		msg := ""
		switch name := call.FunctionName(); {
		case name == overloads.Matches && !literal:
			msg = "the pattern of matches() must be a string literal"
		case name == overloads.Matches:
			sizes[text], msg = checkRegex(text)
		case zoned[name] && call.IsMemberFunction() && (!literal || !offset.MatchString(text)):
			msg = fmt.Sprintf(`the time zone of %s() must be a literal offset such as "+01:00", or "UTC"`, name)
		}
		if msg != "" {
			at := a.SourceInfo().GetStartLocation(last.ID())
			bad = append(bad, Fault{Line: max(at.Line(), 1), Column: max(at.Column()+1, 1), Msg: msg})
		}
	}))
	return sizes, bad
}

// zoned are the functions of timestamps that take a time zone.
var zoned = map[string]bool{
	overloads.TimeGetFullYear: true, overloads.TimeGetMonth: true, overloads.TimeGetDayOfYear: true, overloads.TimeGetDate: true,
	overloads.TimeGetDayOfMonth: true, overloads.TimeGetDayOfWeek: true, overloads.TimeGetHours: true, overloads.TimeGetMinutes: true,
	overloads.TimeGetSeconds: true, overloads.TimeGetMilliseconds: true,
}

var offset = regexp.MustCompile(`^(UTC|[+-](0[0-9]|1[0-4]):[0-5][0-9])$`)

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
