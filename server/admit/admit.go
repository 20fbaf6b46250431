// Package admit is the one path from a request to a verdict, and from an access log entry to an outcome: classify,
// authorise, take a credit of the beat, wait if need be, record, answer.
//
// It promises that a request goes on only after its decision has reached its class's level in the receipt log (or its route
// says on_receipt_failure: allow, which is counted as a gap), that once there are authorisation rules none goes on that no rule
// permits, recorded or not, that whatever is unknown or fails is refused, and that every reason is one of policy.Reason. server/extproc asks it for every request, server/accesslog tells it what became of them;
// server runs it. It holds no records itself.
package admit

import (
	"cmp"
	"context"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/policy/authz"
	"github.com/knhk/sidecar/policy/beat"
	"github.com/knhk/sidecar/policy/class"
	"github.com/knhk/sidecar/policy/heat"
	"github.com/knhk/sidecar/region/receiptlog"
	"github.com/knhk/sidecar/region/wal"
	"github.com/knhk/sidecar/server/accesslog"
	"github.com/knhk/sidecar/server/config"
	"github.com/knhk/sidecar/server/extproc"
)

// Recorder keeps decisions and outcomes; *receiptlog.Log is one. Decide returns nil only when the decision has reached level;
// whatever it returns, d.ID is set if the decision may be in the log. Refusing says why it takes no decisions.
type Recorder interface {
	Decide(ctx context.Context, level receiptlog.Level, d *receipt.Decision, req *receipt.Request) error
	Outcome(ctx context.Context, id string, o *policy.Outcome) error
	Refusing() error
}

// Meter counts; *telemetry.Metrics is one.
type Meter interface {
	Decided(d policy.Decision, took time.Duration)
	Outcome(o *policy.Outcome)
	Unreceipted(kind string)
	Gap(source string)
	AccessLog(delta int64)
	Unheard()
}

// Config is what New needs; all fields but Before are required.
type Config struct {
	Recorder Recorder
	Policy   *config.Config
	Meter    Meter
	Log      *slog.Logger
	Now      func() time.Time
	Before   time.Time // until when an earlier process of this replica has certainly lived; zero if there was none
}

// Pipeline decides. Safe for concurrent use.
type Pipeline struct {
	rec   Recorder
	meter Meter
	log   *slog.Logger
	now   func() time.Time
	base  time.Time // ticks count from here by the monotonic clock: a wall clock that is set changes nothing
	rules atomic.Pointer[rules]
	beat  *beat.Beat
	tick  atomic.Int64 // length of a tick in nanoseconds

	held     held
	finished recent
	warm     warm
	unheard  unheard
	chained  atomic.Bool // a second filter asks about requests that were decided
	passed   passed
	logged   sync.Map // kinds of fault that were logged, to the second
}

// rules is what one configuration says; replaced whole by a reload.
type rules struct {
	cfg     *config.Config
	classes *class.Classifier
	authz   *authz.Authorizer
	heat    *heat.Heat // nil unless authz reads it
	capture string
	// replicas are the instances of the others in envoy.replicas.
	replicas map[string]struct{}
}

// New makes a Pipeline. It starts nothing; without Advance or Run there is no tick and everything is refused.
func New(cfg Config) (*Pipeline, error) {
	p := &Pipeline{rec: cfg.Recorder, meter: cfg.Meter, log: cfg.Log, now: cfg.Now, base: cfg.Now()}
	p.unheard.start = cfg.Before
	b, err := beat.New(cfg.Policy.Credits())
	if err != nil {
		return nil, err
	}
	p.beat = b
	return p, p.Set(cfg.Policy)
}

// Set puts a configuration in force, all or nothing. Requests under way finish under the one they began with.
func (p *Pipeline) Set(cfg *config.Config) error {
	classes, err := class.New(cfg.Classes())
	if err != nil {
		return err
	}
	r := &rules{cfg: cfg, classes: classes, capture: "lean", replicas: replicasOf(cfg)}
	if err := r.setAuthz(p.rules.Load()); err != nil {
		return err
	}
	if err := p.beat.Reconfigure(cfg.Credits()); err != nil {
		return err
	}
	if cfg.Envoy.Filter == configv1.Filter_BOTH {
		p.chained.Store(true)
	}
	if cfg.Envoy.Capture == configv1.Capture_FULL {
		r.capture = "full"
	}
	p.tick.Store(int64(cfg.Beat.Tick))
	p.rules.Store(r)
	return nil
}

// Run advances the beat and gives up on outcomes that the access log was awaited for, until ctx ends.
func (p *Pipeline) Run(ctx context.Context) error {
	for {
		now := p.now()
		left := p.advance(now)
		p.held.expire(now, p.report)
		p.finished.turn(now)
		p.passed.turn(now)
		select {
		case <-ctx.Done():
			p.held.expire(now.Add(holdFor+time.Hour), p.report)
			return nil
		case <-time.After(left):
		}
	}
}

// Advance makes the tick that it is time for the current one. Run does so from then on; a caller who lets requests in beside
// Run calls this before, or the first of them could find no tick yet.
func (p *Pipeline) Advance() { p.advance(p.now()) }

// advance returns how long the tick has still to go.
func (p *Pipeline) advance(now time.Time) time.Duration {
	length, at := time.Duration(p.tick.Load()), p.since(now)
	tick := uint64(at / length)
	p.beat.Advance(tick)
	return time.Duration(tick+1)*length - at
}

// since is the time on the clock that ticks are numbered by: it begins at the wall clock's time and goes on monotonically.
func (p *Pipeline) since(now time.Time) time.Duration {
	return time.Duration(p.base.UnixNano()) + now.Sub(p.base)
}

// Plan says how the transactions of an Envoy route are captured.
func (p *Pipeline) Plan(route string) extproc.Plan {
	r := p.rules.Load()
	rp := r.cfg.Route(route)
	// What panicked before the rules permitted it must not pass, whatever the route says.
	allow := rp.AllowOnFailure && r.authz.Empty()
	return extproc.Plan{Exclude: rp.Exclude, ClassifyBody: rp.ClassifyBody, BodyLimit: class.MaxBody, Allow: allow}
}

// Admit decides and records; it blocks while the request is parked and until the decision has reached its class's level. A request that an
// earlier filter has asked about gets the same decision again, and no second record.
func (p *Pipeline) Admit(ctx context.Context, req *policy.Request) policy.Decision {
	start := p.now()
	d, again := p.decide(ctx, req)
	if !d.Excluded && !again {
		p.meter.Decided(d, p.now().Sub(start))
	}
	return d
}

// decide gives the decision; again says that it was given before.
func (p *Pipeline) decide(ctx context.Context, req *policy.Request) (d policy.Decision, again bool) {
	r := p.rules.Load()
	route := r.cfg.Route(req.Route)
	if route.Exclude {
		return policy.Decision{Excluded: true}, false
	}
	if d, ok := p.earlier(r, req); ok {
		return d, true
	}
	d = p.judge(ctx, r, route, req)
	if d.ID != "" && d.Passes() && p.chained.Load() {
		p.passed.put(d)
	}
	return d, false
}

func (p *Pipeline) judge(ctx context.Context, r *rules, route *config.RoutePolicy, req *policy.Request) policy.Decision {
	if err := p.rec.Refusing(); err != nil {
		return p.unrecorded(r, route, req, p.unasked(r, route, req), err)
	}
	c := r.classes.Classify(req)
	d := policy.Decision{Class: c.Class, Rule: c.Rule}
	rec := receipt.Decision{
		Tenant: route.Tenant, Class: c.Class.String(), Rule: c.Rule, DryRun: r.cfg.DryRun, PolicyDigest: r.cfg.PolicyDigest, Capture: r.capture,
		SPIFFEID: req.SPIFFEID, Route: req.Route, Cluster: req.Cluster, TraceID: req.TraceID, SpanID: req.SpanID,
		Parent: r.parent(req),
	}
	if c.Err != "" {
		if c.Detail != "" {
			p.logOnce(string(c.Err), "class rule failed: refused", "rule", c.Rule, "detail", c.Detail)
		}
		return p.refuse(ctx, r, route, req, &rec, d, c.Err, http.StatusServiceUnavailable)
	}
	a := p.authorise(r, req, c.Class)
	d.Authz, rec.Authz = a.Rule, a.Rule
	if a.Err != "" {
		return p.refuse(ctx, r, route, req, &rec, d, a.Err, http.StatusForbidden)
	}
	limits, _ := r.cfg.Beat.Of(c.Class)
	grant, ok := p.beat.Take(c.Class)
	if !ok {
		d.RetryAfter = beat.RetryAfter(grant.Retry, r.cfg.Beat.Tick, rand.Uint64())
		return p.refuse(ctx, r, route, req, &rec, d, policy.ReasonNoCredit, http.StatusTooManyRequests)
	}
	rec.Tick = grant.Tick
	d.Verdict, d.Reason = policy.Admit, policy.ReasonOK
	if grant.Wait > 0 {
		d.Verdict, d.Reason = policy.Park, policy.ReasonWaited
		if !r.cfg.DryRun {
			waited, err := p.park(ctx, grant.Tick, r.cfg.Beat.Tick)
			rec.WaitedNS = uint64(waited)
			if err != nil {
				return p.refuse(ctx, r, route, req, &rec, d, policy.ReasonClientGone, statusClientGone)
			}
		}
	}
	return p.record(ctx, r, route, req, &rec, d, limits.CommitTimeout)
}

// statusClientGone is nginx's status for a client that left; nobody receives it.
const statusClientGone = 499

// park waits for the tick whose credit was taken.
func (p *Pipeline) park(ctx context.Context, tick uint64, length time.Duration) (time.Duration, error) {
	start := p.now()
	t := time.NewTimer(time.Duration(tick)*length - p.since(start))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return p.now().Sub(start), ctx.Err()
	case <-t.C:
		return p.now().Sub(start), nil
	}
}

// refuse records a refusal and gives it. In a dry run it is recorded all the same, and the request passes.
func (p *Pipeline) refuse(ctx context.Context, r *rules, route *config.RoutePolicy, req *policy.Request, rec *receipt.Decision,
	d policy.Decision, reason policy.Reason, status int,
) policy.Decision {
	d.Verdict, d.Reason, d.Status = policy.Refuse, reason, status
	limits, ok := r.cfg.Beat.Of(d.Class)
	if !ok {
		limits = r.cfg.Beat.W1 // without a class the safer level
	}
	return p.record(ctx, r, route, req, rec, d, limits.CommitTimeout)
}

// record writes the decision and waits for its level.
func (p *Pipeline) record(ctx context.Context, r *rules, route *config.RoutePolicy, req *policy.Request, rec *receipt.Decision,
	d policy.Decision, timeout time.Duration,
) policy.Decision {
	rec.Verdict, rec.Reason, rec.Status = d.Verdict.String(), string(d.Reason), uint32(d.Status)
	level := wal.Durable
	if d.Class == policy.R1 {
		level = wal.Written
	}
	// The record is owed even when the client has gone; only the disk may make us give up, and only who waits for it needs a limit.
	wait := context.Background()
	if level == wal.Durable {
		var cancel context.CancelFunc
		wait, cancel = context.WithTimeout(context.WithoutCancel(ctx), timeout)
		defer cancel()
	}
	err := p.rec.Decide(wait, level, rec, &receipt.Request{
		Method: req.Method, Scheme: req.Scheme, Authority: req.Authority, Path: req.Path, RequestID: req.RequestID, Source: req.Source,
	})
	if err != nil {
		d = p.unrecorded(r, route, req, d, err)
		if rec.ID != "" {
			// The decision may be in the log although it came too late: say what was done instead.
			o := policy.Outcome{Source: cmp.Or(req.Filter, "ext_proc"), Result: policy.ResultLocalReply, Status: d.Status, Details: "knhk_" + string(d.Reason)}
			if d.Gap {
				o = policy.Outcome{Source: cmp.Or(req.Filter, "ext_proc"), Result: policy.ResultUnknown, Details: "passed as a gap: " + string(d.Reason)}
			}
			p.report(rec.ID, &o)
		}
		return d
	}
	d.ID = rec.ID
	if r.cfg.DryRun && d.Verdict == policy.Refuse {
		d.Verdict, d.Status, d.RetryAfter = policy.Admit, 0, 0
	}
	p.begin(r, req, d)
	return d
}

// unrecorded is the one place that decides what becomes of a request whose decision cannot be recorded.
func (p *Pipeline) unrecorded(r *rules, route *config.RoutePolicy, req *policy.Request, d policy.Decision, err error) policy.Decision {
	reason := reasonOf(err)
	p.logOnce(string(reason), "decision cannot be recorded", "reason", reason, "error", err)
	permitted := r.permits(d)
	d = policy.Decision{Class: d.Class, Rule: d.Rule, Authz: d.Authz, Verdict: policy.Refuse, Reason: reason, Status: http.StatusServiceUnavailable, RetryAfter: time.Second}
	if reason == policy.ReasonTooLarge && !r.cfg.DryRun {
		// The client's doing, not a failure of ours: on_receipt_failure does not apply, or a client could choose to go unrecorded.
		d.Status, d.RetryAfter = http.StatusRequestHeaderFieldsTooLarge, 0
		return d
	}
	if route.AllowOnFailure && permitted || r.cfg.DryRun {
		d.Gap = true
		if !req.GapCounted {
			p.meter.Gap("service")
		}
	}
	return d
}

// Abandon records that the client left before there was enough of its request to decide.
func (p *Pipeline) Abandon(req *policy.Request) {
	start := p.now()
	r := p.rules.Load()
	route := r.cfg.Route(req.Route)
	if route.Exclude || p.rec.Refusing() != nil {
		return // nothing went on, and nothing can be written
	}
	if _, ok := p.earlier(r, req); ok {
		return // decided for the filter before, whose access log entry says the rest
	}
	rec := receipt.Decision{
		Tenant: route.Tenant, Class: policy.ClassUnknown.String(), DryRun: r.cfg.DryRun, PolicyDigest: r.cfg.PolicyDigest, Capture: r.capture,
		SPIFFEID: req.SPIFFEID, Route: req.Route, Cluster: req.Cluster, TraceID: req.TraceID, SpanID: req.SpanID,
		Parent: r.parent(req),
	}
	d := p.refuse(context.Background(), r, route, req, &rec, policy.Decision{}, policy.ReasonClientGone, statusClientGone)
	if d.ID != "" {
		p.report(d.ID, &policy.Outcome{Source: "ext_proc", Result: policy.ResultClientAbort, Details: "knhk_client_gone"})
	}
	p.meter.Decided(d, p.now().Sub(start))
}

// Finish takes the outcome of a transaction, from its ext_proc stream or the access log. With final false it waits a while for
// the access log to say it better.
func (p *Pipeline) Finish(id string, o policy.Outcome, final bool) {
	if o.Source == sourceAccessLog {
		if p.finished.has(id) {
			return // the stream has told already
		}
		if h, ok := p.held.take(id); ok && o.UpstreamStatus == 0 {
			o.UpstreamStatus = h.UpstreamStatus
		}
		p.report(id, &o)
		return
	}
	if p.rules.Load().elsewhere(id) {
		return // decided there for an earlier filter; it hears of the outcome from the access log
	}
	if !final {
		p.held.put(id, o, p.now())
		return
	}
	p.finished.add(id)
	p.report(id, &o)
}

// sourceAccessLog is policy.Outcome.Source of what comes from server/accesslog.
const sourceAccessLog = "als"

func (p *Pipeline) report(id string, o *policy.Outcome) {
	p.meter.Outcome(o)
	p.observe(id, o)
	if err := p.rec.Outcome(context.Background(), id, o); err != nil {
		p.logOnce("outcome", "outcome cannot be recorded", "receipt", id, "error", err)
	}
}

// Unreceipted counts what the access log saw and we did not decide.
func (p *Pipeline) Unreceipted(e accesslog.Entry) {
	r := p.rules.Load()
	switch {
	case r.cfg.Route(e.Route).Exclude:
		p.meter.Unreceipted("excluded")
	case e.Gap != "":
		p.meter.Gap("accesslog")
	case e.Reached:
		p.meter.Gap("accesslog")
		p.logOnce("gap", "a request reached the upstream without a decision", "route", e.Route, "details", e.Outcome.Details, "request_id", e.RequestID)
	default:
		p.meter.Unreceipted(localReply(e.Outcome.Details))
	}
}

// LogStream counts access log streams: when one ends its Envoy may have taken unsent entries along, and what passes until the
// next one begins may never be told. That time is named, once it is over: it may have been without incident, but nobody here knows.
func (p *Pipeline) LogStream(node string, ev accesslog.StreamEvent) {
	if ev == accesslog.StreamOpened {
		p.meter.AccessLog(1)
		if p.unheard.resume(node, p.now()) {
			return
		}
		p.meter.Unheard()
		since := "ever"
		if at := p.unheard.begin(node); !at.IsZero() {
			since = at.UTC().Format(time.RFC3339Nano)
		}
		p.log.Info("unknown interval: this Envoy's access log was not heard here; what it let pass without a receipt meanwhile, only its own "+
			"failure_mode_allowed counts", "node", node, "since", since, "until", p.now().UTC().Format(time.RFC3339Nano))
		return
	}
	p.meter.AccessLog(-1)
	if ev == accesslog.StreamAged {
		p.unheard.rest(node, p.now())
		return
	}
	p.unheard.end(node, p.now())
	p.log.Info("access log stream ended: an Envoy epoch may have ended with unsent entries", "node", node)
}

// logOnce logs a kind of fault at most once a second.
func (p *Pipeline) logOnce(kind, msg string, args ...any) {
	now := p.now().Unix()
	if last, ok := p.logged.Swap(kind, now); ok && last == now {
		return
	}
	p.log.Warn(msg, args...)
}
