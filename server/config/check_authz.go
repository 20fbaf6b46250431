package config

import (
	"errors"
	"fmt"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/policy/authz"
	"github.com/knhk/sidecar/policy/class"
	"github.com/knhk/sidecar/policy/rule"
)

func (d *document) checkRules(rules []*configv1.ClassRule) {
	names := make(map[string]string, len(rules))
	var compile []class.Rule
	var paths []string // of the rules in compile
	for i, r := range rules {
		path := fmt.Sprintf("class_rules[%d]", i)
		d.unique(names, r.GetName(), path+".name", path+".name")
		if d.isBad(path+".when") || r.GetWhen() == "" {
			continue
		}
		// The names and classes are judged here, so that package class judges expressions only.
		compile = append(compile, class.Rule{Name: path, Expr: r.GetWhen(), Class: policy.W1})
		paths = append(paths, path)
	}
	_, err := class.New(class.Config{Rules: compile})
	d.ruleFaults(err, paths)
}

func (d *document) checkAuthz(rules []*configv1.AuthzRule) {
	names := make(map[string]string, len(rules))
	compile := make([]authz.Rule, len(rules))
	paths := make([]string, len(rules))
	for i, r := range rules {
		paths[i] = fmt.Sprintf("authz_rules[%d]", i)
		d.unique(names, r.GetName(), paths[i]+".name", paths[i]+".name")
		// The names and effects are judged here, so that package authz judges the rest only.
		compile[i] = authzRule(r)
		compile[i].Name = paths[i]
		if d.isBad(paths[i] + ".when") {
			compile[i].When = ""
		}
	}
	_, err := authz.New(compile)
	d.ruleFaults(err, paths)
}

// ruleFaults reports what package class or authz says of rules; paths are those of the rules.
func (d *document) ruleFaults(err error, paths []string) {
	var faults rule.Faults
	if !errors.As(err, &faults) {
		if err != nil {
			d.report(0, 0, "", err.Error())
		}
		return
	}
	for _, f := range faults {
		if f.Field != "" {
			d.fault(f.Msg, paths[f.Index]+"."+f.Field)
			continue
		}
		path := paths[f.Index] + ".when"
		line, column, exact := d.position(path)
		if at := d.places[path]; exact && f.Line > 0 {
			line, column = d.locate(at.value, f.Line, f.Column)
		}
		d.report(line, column, path, "CEL: "+f.Msg)
	}
}

func authzRule(r *configv1.AuthzRule) authz.Rule {
	out := authz.Rule{Name: r.GetName(), Hosts: r.GetHosts(), Routes: r.GetRoutes(), Methods: r.GetMethods(), When: r.GetWhen()}
	if r.GetEffect() == configv1.Effect_PERMIT {
		out.Effect = authz.Permit
	}
	return out
}
