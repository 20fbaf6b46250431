// Package telemetry measures knhk: one OpenTelemetry MeterProvider, exported for Prometheus at /metrics.
//
// It promises that recording on the request path allocates nothing: every attribute set is built once, counters are atomics that the
// exporter reads. It holds no state
// that decisions depend on. Names come from api/telemetry.
package telemetry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel/attribute"
	otelprom "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	sdk "go.opentelemetry.io/otel/sdk/metric"

	names "github.com/knhk/sidecar/api/telemetry"
	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/region/receiptlog"
)

// durationBuckets are in seconds; most decisions take well under a millisecond.
var durationBuckets = []float64{
	25e-6, 50e-6, 100e-6, 200e-6, 400e-6, 700e-6, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3, 200e-3, 500e-3, 1,
}

// signBuckets are in seconds: from a token on the bus to a service that is given up on.
var signBuckets = []float64{
	100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3, 200e-3, 500e-3, 1, 2, 5,
}

// Metrics records. Safe for concurrent use.
type Metrics struct {
	handler  http.Handler
	provider *sdk.MeterProvider
	meter    metric.Meter

	decisions                           *counter[decisionKey]
	outcomes                            *counter[outcomeKey]
	unreceipted, gaps, streams, reloads *counter[string]
	alsEnded, unheard                   *counter[struct{}]
	alsOpen                             metric.Int64UpDownCounter
	duration, signing                   metric.Float64Histogram
	keyFailures                         *counter[keyFailure]
	refused                             *counter[refusal]
	identityUpdates, identityErrors     *counter[struct{}]
	identityNotAfter                    atomic.Int64 // Unix seconds; 0 without an identity

	byClass [4][]metric.RecordOption
	byRole  sync.Map // role -> []metric.RecordOption
}

// keyFailure is what a key store failed at: from closed sets.
type keyFailure struct {
	role string
	op   keys.Op
	kind keys.FailureKind
}

// refusal is of whom a listener refused: from closed sets.
type refusal struct{ listener, cause string }

type decisionKey struct {
	class   policy.Class
	verdict policy.Verdict
	reason  policy.Reason
}

type outcomeKey struct {
	source string
	result policy.Result
}

// New makes the provider and its instruments.
func New() (*Metrics, error) {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	exp, err := otelprom.New(otelprom.WithRegisterer(reg), otelprom.WithoutScopeInfo(), otelprom.WithoutTargetInfo())
	if err != nil {
		return nil, fmt.Errorf("make metrics exporter: %w", err)
	}
	m := &Metrics{provider: sdk.NewMeterProvider(sdk.WithReader(exp))}
	m.handler = promhttp.HandlerFor(reg, promhttp.HandlerOpts{})
	m.meter = m.provider.Meter("github.com/knhk/sidecar")
	var errs [13]error
	m.decisions, errs[0] = newCounter(m.meter, names.Decisions, "{decision}", "Verdicts given.", func(k decisionKey) []attribute.KeyValue {
		return []attribute.KeyValue{attribute.String(names.AttrClass, k.class.String()), attribute.String(names.AttrVerdict, k.verdict.String()),
			attribute.String(names.AttrReason, string(k.reason))}
	})
	m.outcomes, errs[1] = newCounter(m.meter, names.Outcomes, "{outcome}", "Outcomes reported.", func(k outcomeKey) []attribute.KeyValue {
		return []attribute.KeyValue{attribute.String(names.AttrSource, k.source), attribute.String(names.AttrResult, string(k.result))}
	})
	one := func(name string) func(string) []attribute.KeyValue {
		return func(v string) []attribute.KeyValue { return []attribute.KeyValue{attribute.String(name, v)} }
	}
	none := func(struct{}) []attribute.KeyValue { return nil }
	m.unreceipted, errs[2] = newCounter(m.meter, names.Unreceipted, "{transaction}", "Transactions in the access log without a decision.", one(names.AttrKind))
	m.gaps, errs[3] = newCounter(m.meter, names.Gaps, "{transaction}", "Transactions that passed without a receipt.", one(names.AttrSource))
	m.streams, errs[4] = newCounter(m.meter, names.Streams, "{event}", "Events of ext_proc streams and ext_authz calls.", one(names.AttrEvent))
	m.alsEnded, errs[5] = newCounter(m.meter, names.AccessLogEnded, "{stream}", "Access log streams that ended.", none)
	m.unheard, errs[7] = newCounter(m.meter, names.AccessLogUnheard, "{interval}", "Intervals in which an access log was not heard.", none)
	m.reloads, errs[6] = newCounter(m.meter, names.Reloads, "{reload}", "Configuration reloads.", one(names.AttrResult))
	m.keyFailures, errs[8] = newCounter(m.meter, names.KeyFailures, "{failure}", "Calls of the key stores that failed.", func(k keyFailure) []attribute.KeyValue {
		return []attribute.KeyValue{attribute.String(names.AttrRole, k.role), attribute.String(names.AttrOp, string(k.op)),
			attribute.String(names.AttrKind, string(k.kind))}
	})
	m.refused, errs[9] = newCounter(m.meter, names.RefusedCalls, "{call}", "Connections and calls of those who may not.", func(k refusal) []attribute.KeyValue {
		return []attribute.KeyValue{attribute.String(names.AttrListener, k.listener), attribute.String(names.AttrCause, k.cause)}
	})
	m.identityUpdates, errs[10] = newCounter(m.meter, names.IdentityUpdates, "{update}", "Certificates taken into use.", none)
	m.identityErrors, errs[11] = newCounter(m.meter, names.IdentityErrors, "{error}", "Renewals of the certificate that failed.", none)
	_, errs[12] = m.meter.Int64ObservableGauge(names.IdentityNotAfter, metric.WithUnit("s"), metric.WithDescription("When the certificate in use expires."),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			if at := m.identityNotAfter.Load(); at != 0 {
				o.Observe(at)
			}
			return nil
		}))
	err = errors.Join(errs[:]...)
	if err == nil {
		m.alsOpen, err = m.meter.Int64UpDownCounter(names.AccessLogStreams, metric.WithUnit("{stream}"),
			metric.WithDescription("Access log streams open now."))
	}
	if err == nil {
		m.duration, err = m.meter.Float64Histogram(names.DecisionDuration, metric.WithUnit("s"),
			metric.WithDescription("From the request phase to the answer."), metric.WithExplicitBucketBoundaries(durationBuckets...))
	}
	if err == nil {
		m.signing, err = m.meter.Float64Histogram(names.SignDuration, metric.WithUnit("s"),
			metric.WithDescription("Signatures, waiting for the key store included."), metric.WithExplicitBucketBoundaries(signBuckets...))
	}
	if err != nil {
		return nil, fmt.Errorf("make metrics: %w", err)
	}
	for c := range m.byClass {
		m.byClass[c] = []metric.RecordOption{metric.WithAttributeSet(attribute.NewSet(attribute.String(names.AttrClass, policy.Class(c).String())))}
	}
	return m, nil
}

// Handler serves /metrics.
func (m *Metrics) Handler() http.Handler { return m.handler }

// Shutdown flushes and ends the provider.
func (m *Metrics) Shutdown(ctx context.Context) error { return m.provider.Shutdown(ctx) }

// Decided counts a verdict and the time it took.
func (m *Metrics) Decided(d policy.Decision, took time.Duration) {
	m.decisions.add(decisionKey{d.Class, d.Verdict, d.Reason})
	m.duration.Record(context.Background(), took.Seconds(), m.byClass[int(d.Class)%len(m.byClass)]...)
}

// Outcome counts a reported outcome.
func (m *Metrics) Outcome(o *policy.Outcome) { m.outcomes.add(outcomeKey{o.Source, o.Result}) }

// Unreceipted counts a transaction that the access log knows and we do not. kind is from a closed set.
func (m *Metrics) Unreceipted(kind string) { m.unreceipted.add(kind) }

// Gap counts a transaction that passed without a receipt; source says who saw it.
func (m *Metrics) Gap(source string) { m.gaps.add(source) }

// Stream counts an event of an ext_proc stream or an ext_authz call.
func (m *Metrics) Stream(event string) { m.streams.add(event) }

// IdentityUpdated counts a certificate of knhk's own taken into use, and notes when it expires.
func (m *Metrics) IdentityUpdated(notAfter time.Time) {
	m.identityUpdates.add(struct{}{})
	m.identityNotAfter.Store(notAfter.Unix())
}

// IdentityFailed counts a renewal of the certificate that failed.
func (m *Metrics) IdentityFailed() { m.identityErrors.add(struct{}{}) }

// Refused counts somebody whom a listener refused; both are from closed sets.
func (m *Metrics) Refused(listener, cause string) { m.refused.add(refusal{listener, cause}) }

// Reload counts a reload of the configuration: "applied" or "refused".
func (m *Metrics) Reload(result string) { m.reloads.add(result) }

// AccessLog counts an access log stream: +1 when it opens, -1 when it ends.
func (m *Metrics) AccessLog(delta int64) {
	m.alsOpen.Add(context.Background(), delta)
	if delta < 0 {
		m.alsEnded.add(struct{}{})
	}
}

// Unheard counts an interval in which the access log of an Envoy worker was not heard here.
func (m *Metrics) Unheard() { m.unheard.add(struct{}{}) }

// KeyStore measures one call of a key store; role is "identity" or "daily", failure empty for a call that did not fail.
func (m *Metrics) KeyStore(role string, op keys.Op, failure keys.FailureKind, took time.Duration) {
	if failure != "" {
		m.keyFailures.add(keyFailure{role, op, failure})
		return
	}
	if op != keys.OpSign {
		return
	}
	opt, ok := m.byRole.Load(role)
	if !ok {
		opt, _ = m.byRole.LoadOrStore(role, []metric.RecordOption{metric.WithAttributeSet(attribute.NewSet(attribute.String(names.AttrRole, role)))})
	}
	m.signing.Record(context.Background(), took.Seconds(), opt.([]metric.RecordOption)...)
}

// observeKeys exports the changes of the daily key: by why the one before ended, "first" for the first key of a log, and "failed" for
// attempts that came to nothing and are made again.
func (m *Metrics) observeKeys(l *receiptlog.Log) error {
	_, err := m.meter.Int64ObservableCounter(names.KeyChanges, metric.WithUnit("{change}"), metric.WithDescription("Changes of the daily key."),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			info := l.Keys()
			var failed uint64
			for _, n := range info.Failures {
				failed += n
			}
			o.Observe(int64(failed), metric.WithAttributes(attribute.String(names.AttrResult, "failed")))
			for ended, n := range info.Changes {
				o.Observe(int64(n), metric.WithAttributes(attribute.String(names.AttrResult, cmp.Or(ended, "first"))))
			}
			return nil
		}))
	if err != nil {
		return fmt.Errorf("make metric %s: %w", names.KeyChanges, err)
	}
	return nil
}

// ObserveLog exports the state of the receipt log whenever metrics are read.
func (m *Metrics) ObserveLog(l *receiptlog.Log) error {
	type gauge struct {
		name, unit, what string
		read             func(receiptlog.Stats) float64
		counter          bool
	}
	gauges := []gauge{
		{names.Pending, "{receipt}", "Decisions that wait for their outcome.", func(s receiptlog.Stats) float64 { return float64(s.Pending) }, false},
		{names.Unsigned, "s", "Age of the oldest record under no signed checkpoint.", func(s receiptlog.Stats) float64 { return s.Unsigned.Seconds() }, false},
		{names.Blocks, "{block}", "Blocks committed.", func(s receiptlog.Stats) float64 { return float64(s.Blocks) }, true},
		{names.CheckpointSize, "{leaf}", "Size of the latest signed checkpoint.", func(s receiptlog.Stats) float64 { return float64(s.CheckpointSize) }, false},
		{names.Refusing, "", "1 while the log refuses new decisions.", func(s receiptlog.Stats) float64 {
			if s.Refusing != nil {
				return 1
			}
			return 0
		}, false},
		{names.OutcomesLate, "{outcome}", "Outcomes after unknown.", func(s receiptlog.Stats) float64 { return float64(s.LateOutcomes) }, true},
		{names.OutcomesRepeated, "{outcome}", "Repeated outcomes, dropped.", func(s receiptlog.Stats) float64 { return float64(s.DuplicateOutcomes) }, true},
		{names.OutcomesForeign, "{outcome}", "Outcomes of unknown decisions.", func(s receiptlog.Stats) float64 { return float64(s.ForeignOutcomes) }, true},
		{names.OutcomesUnknown, "{outcome}", "Outcomes recorded as unknown.", func(s receiptlog.Stats) float64 { return float64(s.UnknownOutcomes) }, true},
		{names.WALBytes, "By", "Write-ahead log in use.", func(s receiptlog.Stats) float64 { return float64(s.WALBytes) }, false},
		{names.WALSyncs, "{sync}", "Syncs of the write-ahead log.", func(s receiptlog.Stats) float64 { return float64(s.WALSyncs) }, true},
		{names.DailyKeyLeft, "s", "Until the daily key refuses to sign.", func(receiptlog.Stats) float64 { return l.Keys().Left.Seconds() }, false},
		{names.DailyKeyAge, "s", "Since the daily key in force came in.", func(receiptlog.Stats) float64 { return l.Keys().Age.Seconds() }, false},
	}
	if err := m.observeKeys(l); err != nil {
		return err
	}
	var all []metric.Observable
	obs := make([]metric.Float64Observable, len(gauges))
	for i, g := range gauges {
		var err error
		if g.counter {
			obs[i], err = m.meter.Float64ObservableCounter(g.name, metric.WithUnit(g.unit), metric.WithDescription(g.what))
		} else {
			obs[i], err = m.meter.Float64ObservableGauge(g.name, metric.WithUnit(g.unit), metric.WithDescription(g.what))
		}
		if err != nil {
			return fmt.Errorf("make metric %s: %w", g.name, err)
		}
		all = append(all, obs[i])
	}
	_, err := m.meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		s := l.Stats()
		for i, g := range gauges {
			o.ObserveFloat64(obs[i], g.read(s))
		}
		return nil
	}, all...)
	return err
}
