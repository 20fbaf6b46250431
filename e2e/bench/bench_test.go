package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/knhk/sidecar/e2e/harness"
)

func TestSummary(t *testing.T) {
	for _, c := range []struct {
		in     []float64
		median float64
		s      spread
	}{
		{nil, 0, spread{}},
		{[]float64{3, 1, 2}, 2, spread{1, 3}},
		{[]float64{4, 1}, 2.5, spread{1, 4}},
		{[]float64{12345.678}, 12350, spread{12350, 12350}}, // four digits are more than the machine can tell
	} {
		if m, s := summary(c.in); m != c.median || s != c.s {
			t.Errorf("%v: %v, %v", c.in, m, s)
		}
	}
}

// Ratios are taken within a round: a machine that is twice as slow in one round must not change them.
func TestReport(t *testing.T) {
	samples := map[string][]sample{
		"none":       {{perSecond: 400, p50: 0.1, p99: 0.2}, {perSecond: 200, p50: 0.2, p99: 0.4}},
		"stock-noop": {{perSecond: 100, serviceCPU: 40, p50: 1, p99: 2}, {perSecond: 50, serviceCPU: 80, p50: 2, p99: 4}},
		"w1-lean": {{perSecond: 80, serviceCPU: 60, p50: 1.5, p99: 3, syncP50: 0.1, syncP99: 0.3, failed: 1},
			{perSecond: 40, serviceCPU: 120, p50: 2.5, p99: 5, syncP50: 0.1, syncP99: 0.3, unsent: 2}},
	}
	cases := []*benchCase{{name: "none"}, {name: "stock-noop"}, {name: "w1-lean"}}
	r := newReport(cases, samples, options{rounds: 2, seconds: 1, conns: 16}, machineInfo{CPU: "test"})
	if got := r.Ratios["w1-lean"]; got.PerSecond != 0.8 || got.ServiceCPU != 1.5 {
		t.Errorf("ratios %+v", got)
	}
	if got := r.Ratios["stock-noop"]; got.PerSecond != 1 || got.ServiceCPU != 1 {
		t.Errorf("ratios of the yardstick %+v", got)
	}
	if got := r.Added["w1-lean"]; *got.P50OverStock != 0.5 || *got.P99OverStock != 1 || *got.P50OverNone != 1.85 || got.SyncP99 != 0.3 {
		t.Errorf("added %+v", got)
	}
	if got := r.Cases[2]; got.PerSecond != 60 || got.Failed != 1 || got.Unsent != 2 || got.Spread["req_per_s"] != (spread{40, 80}) {
		t.Errorf("case %+v", got)
	}
	var out bytes.Buffer
	if err := r.print(&out); err != nil || !strings.Contains(out.String(), "w1-lean adds p50") {
		t.Errorf("%v in\n%s", err, &out)
	}
	file := filepath.Join(t.TempDir(), "bench.json")
	if err := r.save(file); err != nil {
		t.Fatal(err)
	}
	var got struct {
		Cases []struct {
			Name string
			Rate float64 `json:"req_per_s"`
			P50  float64 `json:"p50_ms"`
			CPU  float64 `json:"service_cpu_us"`
		}
		Ratios map[string]struct {
			Rate float64 `json:"req_per_s"`
			CPU  float64 `json:"service_cpu"`
		}
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &got); err != nil || len(got.Cases) != 3 || got.Cases[2].Rate != 60 || got.Ratios["w1-lean"].CPU != 1.5 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestFlags(t *testing.T) {
	for _, c := range []struct {
		args []string
		ok   bool
	}{
		{nil, true},
		{[]string{"--quick", "--cases", "none,r1-lean"}, true},
		{[]string{"--cases", "c1"}, false},
		{[]string{"--rounds", "0"}, false},
		{[]string{"rest"}, false},
	} {
		opt, err := parseFlags(c.args, io.Discard)
		if c.ok != (err == nil) {
			t.Errorf("%q: %+v, %v", c.args, opt, err)
		}
	}
}

// Envoy must take the configuration of every case.
func TestEnvoyConfig(t *testing.T) {
	cases := allCases()
	for _, c := range cases {
		if c.noop != "" || c.isKnhk() {
			c.service = "127.0.0.1:1"
		}
	}
	b, err := envoyFor(cases)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "envoy.yaml")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := harness.Validate(t.Context(), harness.RequireEnvoy(t), file); err != nil {
		t.Error(err)
	}
}

func TestSyncTimes(t *testing.T) {
	p50, p99, err := syncTimes(t.Context(), t.TempDir())
	if err != nil || p50 <= 0 || p99 < p50 {
		t.Errorf("%v, %v, %v", p50, p99, err)
	}
}
