package telemetry

import (
	"context"
	"sync"
	"sync/atomic"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// counter is a counter with attributes that is kept here and read by the exporter: an atomic addition on the request path, where
// a synchronous instrument looks its attributes up again each time. K is what the attributes are made from, of a closed set.
type counter[K comparable] struct {
	cells sync.Map // K -> *cell
	attrs func(K) []attribute.KeyValue
}

type cell struct {
	n   atomic.Int64
	set metric.ObserveOption
}

// newCounter registers a counter with m.
func newCounter[K comparable](m metric.Meter, name, unit, what string, attrs func(K) []attribute.KeyValue) (*counter[K], error) {
	c := &counter[K]{attrs: attrs}
	_, err := m.Int64ObservableCounter(name, metric.WithUnit(unit), metric.WithDescription(what), metric.WithInt64Callback(c.observe))
	return c, err
}

// add counts one for k.
func (c *counter[K]) add(k K) {
	v, ok := c.cells.Load(k)
	if !ok {
		v, _ = c.cells.LoadOrStore(k, &cell{set: metric.WithAttributeSet(attribute.NewSet(c.attrs(k)...))})
	}
	v.(*cell).n.Add(1)
}

func (c *counter[K]) observe(_ context.Context, o metric.Int64Observer) error {
	c.cells.Range(func(_, v any) bool {
		cell := v.(*cell)
		o.Observe(cell.n.Load(), cell.set)
		return true
	})
	return nil
}
