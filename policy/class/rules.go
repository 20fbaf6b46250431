package class

import (
	"fmt"
	"strings"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/policy/rule"
)

type compiled struct {
	name  string
	class policy.Class
	when  *rule.Condition
}

func compile(rules []Rule) ([]compiled, error) {
	var faults rule.Faults
	seen := make(map[string]int, len(rules))
	out := make([]compiled, 0, len(rules))
	for i, r := range rules {
		fault := func(format string, args ...any) {
			faults = append(faults, rule.Fault{Index: i, Name: r.Name, Msg: fmt.Sprintf(format, args...)})
		}
		if r.Name == "" || strings.Contains(r.Name, ":") {
			fault("the name is empty or has a colon")
		} else if first, dup := seen[r.Name]; dup {
			fault("the name is taken by rule number %d", first+1)
		} else {
			seen[r.Name] = i
		}
		if r.Class != policy.R1 && r.Class != policy.W1 {
			fault("the class is %v: want R1 or W1", r.Class)
		}
		when, bad, err := rule.Compile(rule.Request, r.Expr)
		if err != nil {
			return nil, fmt.Errorf("class: %w", err)
		}
		for _, b := range bad {
			b.Index, b.Name = i, r.Name
			faults = append(faults, b)
		}
		out = append(out, compiled{r.Name, r.Class, when})
	}
	if faults != nil {
		return nil, faults
	}
	return out, nil
}

// match runs the rules; done is false if none matched.
func (c *Classifier) match(req *policy.Request) (result Result, done bool) {
	run := rule.Start(rule.Input{Request: req})
	defer run.End()
	for i := range c.rules {
		r := &c.rules[i]
		yes, err := run.Judge(r.when)
		if err != nil {
			return Result{Rule: r.name, Err: policy.ReasonClassRule, Detail: err.Error()}, true
		}
		if yes {
			return Result{Class: r.class, Rule: r.name}, true
		}
	}
	return Result{}, false
}
