package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/policy/authz"
	"github.com/knhk/sidecar/policy/class"
	"github.com/knhk/sidecar/policy/rule"
	"github.com/knhk/sidecar/server/config"
)

func authzCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "authz",
		Short: "Try the authorisation rules",
		Long:  `Try the authorisation rules of a configuration. Nothing is opened, and no service is asked.`,
		Args:  args(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(authzExplainCmd())
	return cmd
}

func authzExplainCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "explain --host HOST --path PATH [--method METHOD] [--route ROUTE] [--spiffe-id ID]",
		Short: "Say which rule decides about a request",
		Long: `Say whether a request may pass, which authorisation rule decides, and what came of every rule before it. The request is given as Envoy
would tell of it; what is left out is empty, as it is there. The class is the one that the class rules and routes give it, unless
--class says otherwise; heat is not known unless --heat gives it.

Exit code 0 if the request may pass, 1 if it is refused.`,
		Example: `  knhk authz explain --config knhk.yaml --host shop.example.com --path /orders --route orders --spiffe-id spiffe://example.com/web
  knhk authz explain --protocol tcp --host 192.0.2.1:5432 --spiffe-id spiffe://example.com/batch`,
		Args: args(cobra.NoArgs),
		RunE: explain,
	}
	configFlag(cmd)
	f := cmd.Flags()
	f.String("method", "GET", "method of the request")
	f.String("scheme", "https", "http or https, as Envoy's listener has it")
	f.String("host", "", ":authority, with or without port; for tcp the address that the connection goes to")
	f.String("path", "/", "path with its query")
	f.String("route", "", "name of the Envoy route")
	f.String("cluster", "", "name of the cluster")
	f.String("spiffe-id", "", "SPIFFE ID of the client's certificate")
	f.String("protocol", "http", "http or tcp")
	f.String("class", "", "R1 or W1 (default: what the class rules say)")
	f.String("time", "", "time of the request, RFC 3339 (default: now)")
	f.Float64("heat", 0, "share of cache hits of the route, 0 to 1 (default: not known)")
	return cmd
}

// explainRequest reads the flags. Defaults that a connection does not have are not used for one.
func explainRequest(cmd *cobra.Command) (in rule.Input, err error) {
	text := func(name string) string { s, _ := cmd.Flags().GetString(name); return s }
	if id := text("spiffe-id"); id != "" {
		if _, err := spiffeid.FromString(id); err != nil {
			return in, usageError{fmt.Errorf("--spiffe-id %q: want spiffe://domain/path: %w", id, err)}
		}
	}
	req := &policy.Request{Authority: text("host"), SPIFFEID: text("spiffe-id")}
	in = rule.Input{Request: req, Time: time.Now()}
	switch text("protocol") {
	case "http":
		req.Method, req.Scheme, req.Path, req.Route, req.Cluster = text("method"), text("scheme"), text("path"), text("route"), text("cluster")
	case "tcp":
		req.TCP = true
		for _, name := range []string{"method", "scheme", "path", "route", "cluster"} {
			if cmd.Flags().Changed(name) {
				return in, usageError{fmt.Errorf("--%s: a connection has none: leave it out with --protocol tcp", name)}
			}
		}
	default:
		return in, usageError{fmt.Errorf("--protocol %q: want http or tcp", text("protocol"))}
	}
	if c := text("class"); c != "" {
		if in.Class, err = policy.ParseClass(c); err != nil {
			return in, usageError{fmt.Errorf("--class: %w", err)}
		}
	}
	if t := text("time"); t != "" {
		if in.Time, err = time.Parse(time.RFC3339, t); err != nil {
			return in, usageError{fmt.Errorf("--time %q: want RFC 3339, such as 2026-02-03T04:05:06Z", t)}
		}
	}
	if in.HeatKnown = cmd.Flags().Changed("heat"); in.HeatKnown {
		if in.Heat, _ = cmd.Flags().GetFloat64("heat"); !(in.Heat >= 0 && in.Heat <= 1) {
			return in, usageError{fmt.Errorf("--heat %v: want 0 to 1", in.Heat)}
		}
	}
	return in, nil
}

// explanation is the answer, and the JSON of it.
type explanation struct {
	Permitted bool             `json:"permitted"`
	Reason    policy.Reason    `json:"reason"`           // "ok" if permitted, as far as authorisation is concerned
	Rule      string           `json:"rule,omitempty"`   // that decided or failed
	Detail    string           `json:"detail,omitempty"` // more about the reason
	Class     string           `json:"class,omitempty"`
	ClassRule string           `json:"class_rule,omitempty"` // that gave the class; empty with --class
	Judged    []explainedJudge `json:"judged"`
	Later     int              `json:"later"`   // rules that could concern the request and come after the one that decided
	Skipped   int              `json:"skipped"` // rules that their hosts, routes and methods ruled out
	DryRun    bool             `json:"dry_run,omitempty"`
}

type explainedJudge struct {
	Rule   string `json:"rule"`
	Effect string `json:"effect"`
	When   string `json:"when,omitempty"`
	Result string `json:"result"` // "true", "false" or "error"
	Error  string `json:"error,omitempty"`
}

func explain(cmd *cobra.Command, _ []string) error {
	in, err := explainRequest(cmd)
	if err != nil {
		return err
	}
	path, _ := cmd.Flags().GetString("config")
	cfg, err := config.Load(path)
	if err != nil {
		return err
	}
	e, err := explainFor(cfg, in)
	if err != nil {
		return err
	}
	if wantJSON(cmd) {
		err = printJSON(cmd, e)
	} else {
		err = e.print(cmd.OutOrStdout())
	}
	if err == nil && !e.Permitted {
		return errSaid
	}
	return err
}

// explainFor does what server/admit does, in its order.
func explainFor(cfg *config.Config, in rule.Input) (*explanation, error) {
	e := &explanation{Permitted: true, Reason: policy.ReasonOK, Judged: []explainedJudge{}, DryRun: cfg.DryRun}
	if cfg.Route(in.Request.Route).Exclude {
		e.Detail = "the route is excluded: nobody is asked about its requests"
		return e, nil
	}
	if in.Class == policy.ClassUnknown {
		classes, err := class.New(cfg.Classes())
		if err != nil {
			return nil, err
		}
		req := *in.Request
		req.BodyMissing = true // there is none on a command line
		c := classes.Classify(&req)
		switch c.Err {
		case "":
		case policy.ReasonBodyMode:
			return nil, usageError{errors.New("the class of this request depends on its body: give it with --class")}
		default:
			e.Permitted, e.Reason, e.ClassRule, e.Detail = false, c.Err, c.Rule, c.Detail
			return e, nil
		}
		in.Class, e.ClassRule = c.Class, c.Rule
	}
	e.Class = in.Class.String()
	a, err := authz.New(cfg.Authz())
	if err != nil {
		return nil, err
	}
	if a.Empty() {
		e.Detail = "there are no authorisation rules"
		return e, nil
	}
	x := a.Explain(in)
	e.Rule, e.Detail, e.Later, e.Skipped = x.Rule, x.Detail, x.Later, x.Skipped
	if x.Err != "" {
		e.Permitted, e.Reason = false, x.Err
	}
	for _, j := range x.Judged {
		out := explainedJudge{Rule: j.Rule, Effect: j.Effect.String(), When: j.When, Result: fmt.Sprint(j.Matched)}
		if j.Err != nil {
			out.Result, out.Error = "error", j.Err.Error()
		}
		e.Judged = append(e.Judged, out)
	}
	return e, nil
}

func (e *explanation) print(w io.Writer) error {
	line := func(s string) string { return strings.Join(strings.Fields(s), " ") }
	switch {
	case e.Permitted && e.Rule != "":
		fmt.Fprintf(w, "permitted by rule %s\n", e.Rule)
	case e.Permitted:
		fmt.Fprintf(w, "permitted: %s\n", e.Detail)
	case e.Rule != "":
		fmt.Fprintf(w, "refused by rule %s: %s\n", e.Rule, e.Reason)
	default:
		fmt.Fprintf(w, "refused: %s\n", e.Reason)
	}
	if !e.Permitted && e.Detail != "" {
		fmt.Fprintf(w, "detail: %s\n", line(e.Detail))
	}
	switch {
	case e.Class != "" && e.ClassRule != "":
		fmt.Fprintf(w, "class: %s, by %s\n", e.Class, e.ClassRule)
	case e.Class != "":
		fmt.Fprintf(w, "class: %s\n", e.Class)
	case e.ClassRule != "":
		fmt.Fprintf(w, "class: none, by %s\n", e.ClassRule)
	}
	if e.DryRun && !e.Permitted {
		fmt.Fprintln(w, "dry_run: it passes all the same")
	}
	if len(e.Judged)+e.Later+e.Skipped == 0 {
		return nil
	}
	fmt.Fprintf(w, "rules: %d judged, %d behind the one that decided, %d ruled out by host, route or method\n", len(e.Judged), e.Later, e.Skipped)
	tab := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, j := range e.Judged {
		when := line(j.When)
		if when == "" {
			when = "(always)"
		}
		fmt.Fprintf(tab, "  %s\t%s\t%s\t%s\n", j.Rule, j.Effect, j.Result, when)
	}
	return tab.Flush()
}
