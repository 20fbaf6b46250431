package harness

import (
	"context"
	"fmt"
	"strconv"
	"strings"
)

// Series is what knhk's /metrics holds (Prometheus text format), by name and labels as they stand there.
type Series map[string]float64

// Metrics reads /metrics of knhk's admin listener, "host:port".
func Metrics(ctx context.Context, admin string) (Series, error) {
	body, err := Get(ctx, "http://"+admin+"/metrics")
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	return parseSeries(string(body))
}

func parseSeries(text string) (Series, error) {
	m := Series{}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		i := strings.LastIndexByte(line, ' ')
		if i < 0 || strings.HasPrefix(line, "#") {
			continue
		}
		v, err := strconv.ParseFloat(line[i+1:], 64)
		if err != nil {
			return nil, fmt.Errorf("metrics: %q: %w", line, err)
		}
		m[line[:i]] = v
	}
	return m, nil
}

// Has says whether there is any series of a metric.
func (m Series) Has(name string) bool {
	for k := range m {
		if n, _, _ := strings.Cut(k, "{"); n == name {
			return true
		}
	}
	return false
}

// Sum adds every series of a metric that has all labels; a label is name="value", or a part of it.
func (m Series) Sum(name string, labels ...string) (total float64) {
next:
	for k, v := range m {
		n, rest, _ := strings.Cut(k, "{")
		if n != name {
			continue
		}
		for _, l := range labels {
			if !strings.Contains(rest, l) {
				continue next
			}
		}
		total += v
	}
	return total
}
