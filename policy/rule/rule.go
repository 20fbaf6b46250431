// Package rule holds the conditions of rules: CEL expressions over a request, compiled once, judged often.
//
// It promises that a condition which fails, costs too much, looks into a value that is too long or reads a heat that is not
// known gives an error and never a verdict; that what a client sends cannot make it cost more than the bounds below; and that
// it is pure: no clock, no disk (time zones have to be offsets), no network. It does not say what a true condition means.
//
// policy/class and policy/authz call it.
package rule

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/interpreter"

	"github.com/knhk/sidecar/policy"
)

// Bounds on rules. Cost is CEL's own measure: about one per operation, and one per ten bytes of string looked at; a unit
// takes 10 to 100 ns. CEL charges for a call when it is over, so what one call can cost is bounded by itself: by the length
// of the strings that rules see and by the size of patterns. The worst pattern on the longest path takes some 10 ms; a
// usual one less than a microsecond.
const (
	MaxExpr     = 4096    // bytes of one expression
	MaxRuleCost = 10_000  // of one rule for one request
	MaxCost     = 100_000 // of all rules of a kind for one request
	MaxValue    = 8 << 10 // bytes of a variable that CEL looks at; equality, prefixes and suffixes work beyond it
	MaxRegex    = 250     // instructions of a compiled regular expression
)

// Fault is one thing that is wrong with one rule.
type Fault struct {
	Index  int    // of the rule in its list
	Name   string // of the rule
	Field  string // what of the rule is wrong, such as hosts[2]; empty for the expression and for the rule as a whole
	Line   int    // in the expression, from 1; 0 if the fault is not in the expression
	Column int    // in code points, from 1; 0 if Line is 0
	Msg    string
}

func (f Fault) Error() string {
	switch {
	case f.Line > 0:
		return fmt.Sprintf("rule %q: %d:%d: %s", f.Name, f.Line, f.Column, f.Msg)
	case f.Field != "":
		return fmt.Sprintf("rule %q: %s: %s", f.Name, f.Field, f.Msg)
	}
	return fmt.Sprintf("rule %q: %s", f.Name, f.Msg)
}

// Faults is everything that is wrong with every rule, in order.
type Faults []Fault

func (f Faults) Error() string {
	lines := make([]string, len(f))
	for i := range f {
		lines[i] = f[i].Error()
	}
	return strings.Join(lines, "\n")
}

// Vars says which variables a condition has.
type Vars uint8

// The sets of variables.
const (
	Request Vars = iota // method, scheme, authority, path, route, cluster and spiffe_id (strings)
	// All: those of Request, protocol ("http" or "tcp") and class ("R1" or "W1"), strings; time (timestamp); heat (double) and
	// heat_known (bool).
	All
)

// Input is what conditions see of one request. Those over Request see nothing but the request.
type Input struct {
	Request   *policy.Request
	Class     policy.Class
	Time      time.Time
	Heat      float64 // not used unless HeatKnown
	HeatKnown bool
}

// The variables by number. Those below strs are strings, those below requestVars belong to Request.
const (
	varMethod = iota
	varScheme
	varAuthority
	varPath
	varRoute
	varCluster
	varSPIFFEID
	varProtocol
	varClass
	varTime
	varHeat
	varHeatKnown
	varCount

	requestVars = varProtocol
	strs        = varTime
)

var names = [varCount]string{
	"method", "scheme", "authority", "path", "route", "cluster", "spiffe_id", "protocol", "class", "time", "heat", "heat_known",
}

// numbers is the inverse of names.
var numbers = func() map[string]int {
	m := make(map[string]int, varCount)
	for v, name := range names {
		m[name] = v
	}
	return m
}()

func variable(name string) (int, bool) {
	v, ok := numbers[name]
	return v, ok
}

// Protocol is the value of the variable protocol.
func Protocol(req *policy.Request) string {
	if req.TCP {
		return "tcp"
	}
	return "http"
}

func (in *Input) str(v int) string {
	switch v {
	case varMethod:
		return in.Request.Method
	case varScheme:
		return in.Request.Scheme
	case varAuthority:
		return in.Request.Authority
	case varPath:
		return in.Request.Path
	case varRoute:
		return in.Request.Route
	case varCluster:
		return in.Request.Cluster
	case varSPIFFEID:
		return in.Request.SPIFFEID
	case varProtocol:
		return Protocol(in.Request)
	default:
		return in.Class.String()
	}
}

// Condition is one compiled expression. Safe for concurrent use; it never changes. The zero Condition is true.
type Condition struct {
	guards  []native    // conditions that must all hold for the whole to be true
	bounds  bounds      // the most that prog can cost, by the length of the longest variable
	native  *native     // stands for prog where CEL is not needed
	prog    cel.Program // counts nothing; nil if the guards are all there is, native stands for it, or it could always exceed MaxRuleCost
	tracked cel.Program // counts its cost and ends at MaxRuleCost; nil if prog can never exceed it
	heat    bool        // it names heat or heat_known
}

// ReadsHeat reports whether the expression names heat or heat_known.
func (c *Condition) ReadsHeat() bool { return c.heat }

var envs = [...]func() (*cel.Env, error){
	Request: sync.OnceValues(func() (*cel.Env, error) { return newEnv(Request) }),
	All:     sync.OnceValues(func() (*cel.Env, error) { return newEnv(All) }),
}

func newEnv(vars Vars) (*cel.Env, error) {
	opts := []cel.EnvOption{
		cel.ParserExpressionSizeLimit(MaxExpr),
		cel.ParserRecursionLimit(64),
		cel.ASTValidators(cel.ValidateDurationLiterals(), cel.ValidateTimestampLiterals()),
	}
	for v, name := range names {
		kind := cel.StringType
		switch v {
		case varTime:
			kind = cel.TimestampType
		case varHeat:
			kind = cel.DoubleType
		case varHeatKnown:
			kind = cel.BoolType
		}
		if v < requestVars || vars == All {
			opts = append(opts, cel.Variable(name, kind))
		}
	}
	env, err := cel.NewEnv(opts...)
	if err != nil {
		return nil, fmt.Errorf("rule: set up CEL: %w", err)
	}
	return env, nil
}

// Compile compiles an expression of type bool. Faults have a line unless the expression as a whole is meant; Index, Name and
// Field are the caller's to set. err is about CEL itself.
func Compile(vars Vars, expr string) (c *Condition, faults Faults, err error) {
	env, err := envs[vars]()
	if err != nil {
		return nil, nil, err
	}
	if len(expr) > MaxExpr || !utf8.ValidString(expr) {
		return nil, Faults{{Msg: fmt.Sprintf("the expression is longer than %d bytes or not UTF-8", MaxExpr)}}, nil
	}
	checked, issues := env.Compile(expr)
	if issues.Err() != nil {
		for _, e := range issues.Errors() {
			faults = append(faults, Fault{Line: max(e.Location.Line(), 1), Column: max(e.Location.Column()+1, 1), Msg: e.Message})
		}
		return nil, faults, nil
	}
	if !checked.OutputType().IsExactType(cel.BoolType) {
		return nil, Faults{{Line: 1, Column: 1, Msg: fmt.Sprintf("the expression is of type %v: want bool", checked.OutputType())}}, nil
	}
	a := checked.NativeRep()
	sizes, faults := checkCalls(a)
	if faults != nil {
		return nil, faults, nil
	}
	c = &Condition{heat: readsHeat(a)}
	var whole bool
	if c.guards, whole = conjuncts(a.Expr(), nil); whole {
		return c, nil, nil
	}
	if c.bounds, err = estimate(env, checked, sizes); err != nil {
		return nil, nil, fmt.Errorf("rule: estimate the cost: %w", err)
	}
	if n, ok := asNative(a.Expr()); ok {
		c.native = &n
	} else if c.bounds[0] <= MaxRuleCost {
		c.prog, err = env.Program(checked, cel.EvalOptions(cel.OptOptimize))
	}
	if err == nil && c.bounds[len(c.bounds)-1] > MaxRuleCost {
		c.tracked, err = env.Program(checked, cel.EvalOptions(cel.OptOptimize), cel.CostLimit(MaxRuleCost), cel.CostTracking(sizes))
	}
	if err != nil {
		return nil, Faults{{Line: 1, Column: 1, Msg: err.Error()}}, nil
	}
	return c, nil, nil
}

// Run judges conditions for one request, and adds up what they cost. Make one with Start, give it back with End.
type Run struct {
	in     Input
	size   int // index into bounds; -1 until a condition asks for it
	spent  uint64
	frame  *interpreter.ExecutionFrame // shared by programs that count nothing; nil until the first one
	boxed  [varCount]ref.Val           // each variable is boxed at most once per request
	long   bool                        // a variable longer than MaxValue was asked for: whatever CEL says does not count
	unheat bool                        // heat was asked for and is not known: the same
}

var runs = sync.Pool{New: func() any { return new(Run) }}

// Start begins a Run. It keeps in.Request until End.
func Start(in Input) *Run {
	r := runs.Get().(*Run)
	r.in, r.size = in, -1
	return r
}

// End gives r back; nobody may use it after that.
func (r *Run) End() {
	if r.frame != nil {
		r.frame.Close()
	}
	*r = Run{} // the pool must not keep the request alive
	runs.Put(r)
}

// The errors that Judge gives besides CEL's own.
var (
	ErrTotalCost = errors.New("the rules up to this one cost more than a request may")
	ErrLong      = fmt.Errorf("the rule looks into a value of more than %d bytes", MaxValue)
	ErrHeat      = errors.New("the rule reads heat while it is not known")
)

// Holds reports whether c's guards hold, which is as good as false if they do not. It costs nanoseconds and no allocation.
func (c *Condition) Holds(in *Input) bool {
	for i := range c.guards {
		if g := &c.guards[i]; !g.compare(in.str(g.v)) {
			return false
		}
	}
	return true
}

// Judge reports whether c is true. Guards come first: what stands beside one that fails is not looked at.
func (r *Run) Judge(c *Condition) (yes bool, err error) {
	if !c.Holds(&r.in) {
		return false, nil
	}
	if c.native == nil && c.prog == nil && c.tracked == nil {
		return true, nil
	}
	if r.size < 0 {
		r.size = sizeOf(&r.in)
	}
	bound := c.bounds[r.size]
	var val ref.Val
	var details *cel.EvalDetails
	switch {
	case bound > MaxRuleCost:
		val, details, err = c.tracked.Eval(r)
	case c.native != nil:
		val = types.Bool(c.native.holds(r))
	default:
		var frame *interpreter.ExecutionFrame
		if frame, err = r.shared(); err == nil {
			val, details, err = c.prog.Eval(frame)
		}
	}
	switch {
	case r.long:
		return false, ErrLong
	case r.unheat:
		return false, ErrHeat
	case err != nil:
		return false, err
	}
	cost := bound
	if actual := details.ActualCost(); actual != nil {
		cost = *actual
	}
	b, ok := val.(types.Bool)
	if !ok {
		return false, fmt.Errorf("the result is of type %v, not bool", val.Type())
	}
	return bool(b), r.spend(cost)
}

// spend adds to what the request has cost. A verdict beside its error does not count.
func (r *Run) spend(cost uint64) error {
	if r.spent += cost; r.spent > MaxCost {
		return ErrTotalCost
	}
	return nil
}

// shared is r as CEL wants it. CEL would make a frame for each program, which is a tenth of the time of most.
func (r *Run) shared() (frame *interpreter.ExecutionFrame, err error) {
	if r.frame == nil {
		r.frame, err = interpreter.NewExecutionFrame(r)
	}
	return r.frame, err
}

// ResolveName implements cel.Activation.
func (r *Run) ResolveName(name string) (any, bool) {
	v, ok := variable(name)
	if !ok {
		return nil, false
	}
	if v == varHeat && !r.in.HeatKnown {
		r.unheat = true
		return nil, false
	}
	if r.boxed[v] == nil {
		r.boxed[v] = r.box(v)
	}
	return r.boxed[v], true
}

func (r *Run) box(v int) ref.Val {
	switch v {
	case varTime:
		return types.Timestamp{Time: r.in.Time}
	case varHeat:
		return types.Double(r.in.Heat)
	case varHeatKnown:
		return types.Bool(r.in.HeatKnown)
	}
	s := r.in.str(v)
	if len(s) > MaxValue {
		r.long, s = true, ""
	}
	return types.String(s)
}

// Parent implements cel.Activation.
func (r *Run) Parent() cel.Activation { return nil }
