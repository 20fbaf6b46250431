// Package class gives a request its class: by CEL rules, by the KNHK delta in its body, or by its route.
//
// It promises that the first rule whose condition is true decides; that a rule which fails or costs too much never gives
// a class but an error; that what it cannot read in a body makes the request W1, the safer class, and never an error; and
// that the work for one request is bounded, whatever the client sends. It does not authorise anybody, and it does not
// look at headers other than those in policy.Request.
//
// It is pure. server/config checks rules with it when a file is loaded, server/admit classifies with it.
package class

import (
	"fmt"

	"github.com/knhk/sidecar/policy"
)

// Rule gives Class to the requests that match a CEL condition.
type Rule struct {
	Name  string       // in records and metrics; not empty, unique among the rules
	Expr  string       // CEL of type bool over method, scheme, authority, path, route, cluster and spiffe_id (strings)
	Class policy.Class // R1 or W1
}

// Route is what holds for the requests of a route when no rule matches.
type Route struct {
	Class        policy.Class // ClassUnknown: such requests are refused with policy.ReasonUnknownClass
	ClassifyBody bool         // by the delta in the body; Class is not used
}

// Config holds the rules in order, the routes by their Envoy name, and what holds for every other route.
type Config struct {
	Rules   []Rule
	Routes  map[string]Route
	Default Route
}

// The names under which something other than a rule gives a class. They cannot be names of rules, which have no colon.
const (
	DeltaHot       = "delta:hot"       // at most 8 items, none with a blank node or variable: R1
	DeltaItems     = "delta:items"     // more than 8 items: W1
	DeltaBlank     = "delta:blank"     // a blank node or variable: W1
	DeltaMalformed = "delta:malformed" // not a delta: W1
	DeltaLarge     = "delta:large"     // larger than MaxBody: W1
	RouteDefault   = "route:*"         // the default for routes not listed
	routePrefix    = "route:"          // followed by the name of the route
)

// Result is a class and who gave it, or why there is none.
type Result struct {
	Class policy.Class // ClassUnknown if Err is set
	Rule  string       // name of the rule that matched or failed, "route:" and the route's name, or one of the constants above
	// Err is empty, or why the request has to be refused: policy.ReasonClassRule (a rule failed or cost too much),
	// policy.ReasonBodyMode (the route is classified by body, and Envoy does not send it) or policy.ReasonUnknownClass.
	Err policy.Reason
	// Detail says more about ReasonClassRule, for logs: CEL's own message. It may quote the request. Otherwise empty.
	Detail string
}

// Classifier classifies requests. Make one with New. Safe for concurrent use; it never changes.
type Classifier struct {
	rules    []compiled
	routes   map[string]route
	fallback route
}

type route struct {
	Route
	name string // with routePrefix, so that no request has to build it
}

// New compiles the rules. The error is of type rule.Faults if rules do not compile, and names every one of them.
func New(cfg Config) (*Classifier, error) {
	c := &Classifier{
		routes:   make(map[string]route, len(cfg.Routes)),
		fallback: route{cfg.Default, RouteDefault},
	}
	for name, r := range cfg.Routes {
		if r.Class > policy.W1 {
			return nil, fmt.Errorf("class: route %q: %v is not a class", name, r.Class)
		}
		c.routes[name] = route{r, routePrefix + name}
	}
	if cfg.Default.Class > policy.W1 {
		return nil, fmt.Errorf("class: default route: %v is not a class", cfg.Default.Class)
	}
	var err error
	if c.rules, err = compile(cfg.Rules); err != nil {
		return nil, err
	}
	return c, nil
}

// Classify gives req its class. It does not keep req. Without rules it does not allocate.
func (c *Classifier) Classify(req *policy.Request) Result {
	if len(c.rules) > 0 {
		if r, done := c.match(req); done {
			return r
		}
	}
	rt, ok := c.routes[req.Route]
	if !ok {
		rt = c.fallback
	}
	switch {
	case !rt.ClassifyBody:
		if rt.Class == policy.ClassUnknown {
			return Result{Rule: rt.name, Err: policy.ReasonUnknownClass}
		}
		return Result{Class: rt.Class, Rule: rt.name}
	case req.BodyLarge:
		return Result{Class: policy.W1, Rule: DeltaLarge}
	case req.BodyMissing:
		return Result{Rule: rt.name, Err: policy.ReasonBodyMode}
	}
	class, name := Delta(req.Body) // a request without a body is an empty one
	return Result{Class: class, Rule: name}
}

// NeedsBody reports whether requests of this Envoy route are classified by body, unless a rule decides first.
func (c *Classifier) NeedsBody(routeName string) bool {
	if rt, ok := c.routes[routeName]; ok {
		return rt.ClassifyBody
	}
	return c.fallback.ClassifyBody
}
