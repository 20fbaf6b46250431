// Package authz says whether a request may pass: by rules, in order, the first that matches decides.
//
// It promises that once there is a rule a request passes only because a rule permits it; that a rule which fails, costs too much
// or reads a heat that is not known refuses; that no spelling of a host or method leads around a rule that forbids it; and that
// the work for one request is bounded, and does not grow with the rules that hosts, routes and methods rule out. It does not
// look at headers other than those in policy.Request, and knows nothing of who the client is but its SPIFFE ID.
//
// It is pure. server/config checks rules with it when a file is loaded, server/admit authorises with it.
package authz

import (
	"fmt"
	"strings"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/policy/rule"
)

// Effect is what a rule says of the requests it matches. The zero value forbids.
type Effect uint8

// The effects.
const (
	Forbid Effect = iota
	Permit
)

// String returns the effect's name as it stands in configuration.
func (e Effect) String() string {
	if e == Permit {
		return "PERMIT"
	}
	return "FORBID"
}

// Rule says whether the requests that it matches may pass. It matches those of one of Hosts, Routes and Methods (an empty list: of
// any) for which When is true.
type Rule struct {
	Name  string   // in records; not empty, unique among the rules
	Hosts []string // without port, any case; exact, or "*.example.com" for every host below
	// Routes are names of Envoy routes.
	Routes []string
	// Methods are upper case and compared as they are. A rule that forbids compares without regard to case: there are servers that do.
	Methods []string
	When    string // CEL of type bool over rule.All; empty: true
	Effect  Effect
}

// Result is what was decided and by which rule.
type Result struct {
	Rule string // that decided or failed; empty if none matched or there are none
	// Err is empty if the request may pass, or why it is refused: policy.ReasonAuthzForbid, policy.ReasonAuthzNone (no rule
	// matched, or the authority is no host while rules name hosts) or policy.ReasonAuthzError (a rule failed).
	Err policy.Reason
	// Detail says more about ReasonAuthzError and an authority that is no host, for logs. It may quote the request. Otherwise empty.
	Detail string
}

// Authorizer decides. Make one with New. Safe for concurrent use; it never changes.
type Authorizer struct {
	rules []compiled
	index index
	heat  bool
}

type compiled struct {
	name   string
	when   *rule.Condition // nil: true
	text   string
	effect Effect
}

// New compiles the rules. The error is of type rule.Faults if rules are wrong, and names everything in every one of them; Field
// is name, hosts[i], routes[i], methods[i] or effect, empty for When.
func New(rules []Rule) (*Authorizer, error) {
	a := &Authorizer{rules: make([]compiled, 0, len(rules))}
	a.index.init(len(rules))
	var faults rule.Faults
	seen := make(map[string]int, len(rules))
	for i, r := range rules {
		fault := func(field, format string, args ...any) {
			faults = append(faults, rule.Fault{Index: i, Name: r.Name, Field: field, Msg: fmt.Sprintf(format, args...)})
		}
		if first, dup := seen[r.Name]; r.Name == "" {
			fault("name", "is empty")
		} else if dup {
			fault("name", "is taken by rule number %d", first+1)
		} else {
			seen[r.Name] = i
		}
		if r.Effect > Permit {
			fault("effect", "%d is none", r.Effect)
		}
		a.index.add(i, &r, fault)
		c := compiled{r.Name, nil, r.When, r.Effect}
		if r.When != "" {
			when, bad, err := rule.Compile(rule.All, r.When)
			if err != nil {
				return nil, fmt.Errorf("authz: %w", err)
			}
			for _, b := range bad {
				b.Index, b.Name = i, r.Name
				faults = append(faults, b)
			}
			c.when = when
			a.heat = a.heat || when != nil && when.ReadsHeat()
		}
		a.rules = append(a.rules, c)
	}
	if faults != nil {
		return nil, faults
	}
	return a, nil
}

// Empty reports whether there are no rules, so that everything may pass.
func (a *Authorizer) Empty() bool { return len(a.rules) == 0 }

// ReadsHeat reports whether a rule reads heat or heat_known; without one Input needs no heat.
func (a *Authorizer) ReadsHeat() bool { return a.heat }

// Decide says whether the request may pass. It does not keep in.Request.
func (a *Authorizer) Decide(in rule.Input) Result { return a.decide(in, nil) }

// Judged is a rule that could concern a request, and what came of it.
type Judged struct {
	Rule    string
	Effect  Effect
	When    string
	Matched bool
	Err     error // why it failed; Matched is false then
}

// Explanation is a Result with what led to it.
type Explanation struct {
	Result
	Judged  []Judged // in order; the last one decided, unless the reason is policy.ReasonAuthzNone
	Later   int      // rules behind the one that decided that could concern the request too
	Skipped int      // rules that hosts, routes and methods ruled out
}

// Explain decides as Decide does and says how.
func (a *Authorizer) Explain(in rule.Input) Explanation {
	var e Explanation
	e.Result = a.decide(in, &e)
	var room hostSets
	if w, ok := a.index.walk(in.Request, &room); ok {
		candidates := 0
		for _, ok := w.next(); ok; _, ok = w.next() {
			candidates++
		}
		e.Later, e.Skipped = candidates-len(e.Judged), len(a.rules)-candidates
	}
	return e
}

// decide is the one place that judges; e is nil unless it is to be explained.
func (a *Authorizer) decide(in rule.Input, e *Explanation) Result {
	if len(a.rules) == 0 {
		return Result{}
	}
	var room hostSets
	w, ok := a.index.walk(in.Request, &room)
	if !ok {
		return Result{Err: policy.ReasonAuthzNone, Detail: fmt.Sprintf("the authority is no host, and rules name hosts: %.64q", in.Request.Authority)}
	}
	var run *rule.Run
	defer func() {
		if run != nil {
			run.End()
		}
	}()
	for i, ok := w.next(); ok; i, ok = w.next() {
		r := &a.rules[i]
		matched := r.when == nil
		var err error
		if !matched {
			if run == nil {
				run = rule.Start(in)
			}
			matched, err = run.Judge(r.when)
		}
		if e != nil {
			e.Judged = append(e.Judged, Judged{r.name, r.effect, r.text, matched, err})
		}
		switch {
		case err != nil:
			return Result{Rule: r.name, Err: policy.ReasonAuthzError, Detail: err.Error()}
		case matched && r.effect == Permit:
			return Result{Rule: r.name}
		case matched:
			return Result{Rule: r.name, Err: policy.ReasonAuthzForbid}
		}
	}
	return Result{Err: policy.ReasonAuthzNone}
}

// maxMethod bounds a method of a rule, in bytes.
const maxMethod = 64

// checkMethod says what is wrong with a method of a rule; RFC 9110 section 9.1 has them case-sensitive, and the registered ones are
// upper case.
func checkMethod(m string) string {
	switch {
	case m == "" || len(m) > maxMethod:
		return fmt.Sprintf("want 1 to %d characters", maxMethod)
	case strings.Trim(m, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+-.^_`|~") != "":
		return fmt.Sprintf("%q is no method", m)
	case m != strings.ToUpper(m):
		return fmt.Sprintf("methods are case-sensitive and upper case: want %s", strings.ToUpper(m))
	}
	return ""
}
