// Package telemetry measures knhk: one OpenTelemetry MeterProvider, exported for Prometheus at /metrics.
//
// It promises that recording on the request path allocates nothing: every attribute set is built once. It holds no state
// that decisions depend on. Names come from api/telemetry.
package telemetry

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel/attribute"
	otelprom "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	sdk "go.opentelemetry.io/otel/sdk/metric"

	names "github.com/knhk/sidecar/api/telemetry"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/region/receiptlog"
)

// durationBuckets are in seconds; most decisions take well under a millisecond.
var durationBuckets = []float64{
	25e-6, 50e-6, 100e-6, 200e-6, 400e-6, 700e-6, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3, 200e-3, 500e-3, 1,
}

// Metrics records. Safe for concurrent use.
type Metrics struct {
	handler  http.Handler
	provider *sdk.MeterProvider
	meter    metric.Meter

	decisions, outcomes, unreceipted, gaps, streams, alsEnded, unheard, reloads metric.Int64Counter
	alsOpen                                                                     metric.Int64UpDownCounter
	duration                                                                    metric.Float64Histogram

	decided  sync.Map // decisionKey -> []metric.AddOption
	options  sync.Map // [2]string -> []metric.AddOption: one attribute
	resulted sync.Map // [2]string{source, result}
	byClass  [4][]metric.RecordOption
}

type decisionKey struct {
	class   policy.Class
	verdict policy.Verdict
	reason  policy.Reason
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
	counter := func(into *metric.Int64Counter, name, unit, what string) {
		c, e := m.meter.Int64Counter(name, metric.WithUnit(unit), metric.WithDescription(what))
		if *into = c; e != nil && err == nil {
			err = e
		}
	}
	counter(&m.decisions, names.Decisions, "{decision}", "Verdicts given.")
	counter(&m.outcomes, names.Outcomes, "{outcome}", "Outcomes reported.")
	counter(&m.unreceipted, names.Unreceipted, "{transaction}", "Transactions in the access log without a decision.")
	counter(&m.gaps, names.Gaps, "{transaction}", "Transactions that passed without a receipt.")
	counter(&m.streams, names.Streams, "{event}", "Events of ext_proc streams.")
	counter(&m.alsEnded, names.AccessLogEnded, "{stream}", "Access log streams that ended.")
	counter(&m.unheard, names.AccessLogUnheard, "{interval}", "Intervals in which an access log was not heard.")
	counter(&m.reloads, names.Reloads, "{reload}", "Configuration reloads.")
	if err == nil {
		m.alsOpen, err = m.meter.Int64UpDownCounter(names.AccessLogStreams, metric.WithUnit("{stream}"),
			metric.WithDescription("Access log streams open now."))
	}
	if err == nil {
		m.duration, err = m.meter.Float64Histogram(names.DecisionDuration, metric.WithUnit("s"),
			metric.WithDescription("From the request phase to the answer."), metric.WithExplicitBucketBoundaries(durationBuckets...))
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

func set(kv ...attribute.KeyValue) []metric.AddOption {
	return []metric.AddOption{metric.WithAttributeSet(attribute.NewSet(kv...))}
}

// Decided counts a verdict and the time it took.
func (m *Metrics) Decided(d policy.Decision, took time.Duration) {
	k := decisionKey{d.Class, d.Verdict, d.Reason}
	opt, ok := m.decided.Load(k)
	if !ok {
		opt, _ = m.decided.LoadOrStore(k, set(attribute.String(names.AttrClass, d.Class.String()),
			attribute.String(names.AttrVerdict, d.Verdict.String()), attribute.String(names.AttrReason, string(d.Reason))))
	}
	m.decisions.Add(context.Background(), 1, opt.([]metric.AddOption)...)
	m.duration.Record(context.Background(), took.Seconds(), m.byClass[int(d.Class)%len(m.byClass)]...)
}

// Outcome counts a reported outcome.
func (m *Metrics) Outcome(o *policy.Outcome) {
	k := [2]string{o.Source, string(o.Result)}
	opt, ok := m.resulted.Load(k)
	if !ok {
		opt, _ = m.resulted.LoadOrStore(k, set(attribute.String(names.AttrSource, o.Source), attribute.String(names.AttrResult, string(o.Result))))
	}
	m.outcomes.Add(context.Background(), 1, opt.([]metric.AddOption)...)
}

// Unreceipted counts a transaction that the access log knows and we do not. kind is from a closed set.
func (m *Metrics) Unreceipted(kind string) { m.one(m.unreceipted, names.AttrKind, kind) }

// Gap counts a transaction that passed without a receipt; source says who saw it.
func (m *Metrics) Gap(source string) { m.one(m.gaps, names.AttrSource, source) }

// Stream counts an event of an ext_proc stream.
func (m *Metrics) Stream(event string) { m.one(m.streams, names.AttrEvent, event) }

// Reload counts a reload of the configuration: "applied" or "refused".
func (m *Metrics) Reload(result string) { m.one(m.reloads, names.AttrResult, result) }

// AccessLog counts an access log stream: +1 when it opens, -1 when it ends.
func (m *Metrics) AccessLog(delta int64) {
	m.alsOpen.Add(context.Background(), delta)
	if delta < 0 {
		m.alsEnded.Add(context.Background(), 1)
	}
}

// Unheard counts an interval in which the access log of an Envoy worker was not heard here.
func (m *Metrics) Unheard() { m.unheard.Add(context.Background(), 1) }

func (m *Metrics) one(c metric.Int64Counter, attr, value string) {
	k := [2]string{attr, value}
	opt, ok := m.options.Load(k)
	if !ok {
		opt, _ = m.options.LoadOrStore(k, set(attribute.String(attr, value)))
	}
	c.Add(context.Background(), 1, opt.([]metric.AddOption)...)
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
		{names.DailyKeyLeft, "s", "Until the daily key refuses to sign.", func(s receiptlog.Stats) float64 { return s.DailyLeft.Seconds() }, false},
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
