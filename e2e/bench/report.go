package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"

	"golang.org/x/sys/unix"
)

// report is bench.json.
type report struct {
	Cases   []caseReport          `json:"cases"`
	Ratios  map[string]caseRatios `json:"ratios"` // to stock-noop in the same round, medians; empty without that case
	Added   map[string]caseAdded  `json:"added"`  // of the W1 cases
	Machine machineInfo           `json:"machine"`
	Command string                `json:"command"`
	Rounds  int                   `json:"rounds"`
	Seconds float64               `json:"seconds"`
	Conns   int                   `json:"conns"`
}

// caseReport holds medians over the rounds. Latencies are of the open loop, the rest of the closed one.
type caseReport struct {
	Name         string            `json:"name"`
	PerSecond    float64           `json:"req_per_s"`
	P50          float64           `json:"p50_ms"`
	P99          float64           `json:"p99_ms"`
	P999         float64           `json:"p999_ms"`
	ServiceCPU   float64           `json:"service_cpu_us"`
	EnvoyCPU     float64           `json:"envoy_cpu_us"`
	RSS          float64           `json:"rss_mb"`
	OpenRate     float64           `json:"open_req_per_s"`
	ClosedP50    float64           `json:"closed_p50_ms"`
	ClosedP99    float64           `json:"closed_p99_ms"`
	Failed       int               `json:"failed"` // over all rounds
	Unsent       int               `json:"unsent"` // open loop: due, but never sent
	Spread       map[string]spread `json:"spread"`
	roundSamples []sample
}

// spread is the lowest and the highest of the rounds.
type spread [2]float64

type caseRatios struct {
	PerSecond  float64           `json:"req_per_s"`
	ServiceCPU float64           `json:"service_cpu"`
	EnvoyCPU   float64           `json:"envoy_cpu"`
	Spread     map[string]spread `json:"spread"`
}

// caseAdded says what a W1 case adds to the latency of others in the same round, each at half its own closed-loop rate,
// and what the disk alone took. Milliseconds, medians.
type caseAdded struct {
	P50OverNone  *float64 `json:"p50_over_none_ms,omitempty"`
	P99OverNone  *float64 `json:"p99_over_none_ms,omitempty"`
	P50OverStock *float64 `json:"p50_over_stock_ms,omitempty"`
	P99OverStock *float64 `json:"p99_over_stock_ms,omitempty"`
	SyncP50      float64  `json:"fdatasync_p50_ms"`
	SyncP99      float64  `json:"fdatasync_p99_ms"`
}

// machineInfo is what the figures depend on.
type machineInfo struct {
	CPU        string `json:"cpu"`
	CPUs       int    `json:"cpus"`
	Kernel     string `json:"kernel"`
	Go         string `json:"go"`
	FileSystem string `json:"file_system"` // of the directory with the state
}

func newReport(cases []*benchCase, samples map[string][]sample, opt options, m machineInfo) *report {
	r := &report{Ratios: map[string]caseRatios{}, Added: map[string]caseAdded{}, Machine: m,
		Rounds: opt.rounds, Seconds: opt.seconds, Conns: opt.conns}
	for _, c := range cases {
		all := samples[c.name]
		cr := caseReport{Name: c.name, Spread: map[string]spread{}, roundSamples: all}
		for name, f := range map[string]struct {
			to   *float64
			from func(sample) float64
		}{
			"req_per_s":      {&cr.PerSecond, func(s sample) float64 { return s.perSecond }},
			"p50_ms":         {&cr.P50, func(s sample) float64 { return s.p50 }},
			"p99_ms":         {&cr.P99, func(s sample) float64 { return s.p99 }},
			"p999_ms":        {&cr.P999, func(s sample) float64 { return s.p999 }},
			"service_cpu_us": {&cr.ServiceCPU, func(s sample) float64 { return s.serviceCPU }},
			"envoy_cpu_us":   {&cr.EnvoyCPU, func(s sample) float64 { return s.envoyCPU }},
			"rss_mb":         {&cr.RSS, func(s sample) float64 { return s.rssMB }},
			"open_req_per_s": {&cr.OpenRate, func(s sample) float64 { return s.openRate }},
			"closed_p50_ms":  {&cr.ClosedP50, func(s sample) float64 { return s.closedP50 }},
			"closed_p99_ms":  {&cr.ClosedP99, func(s sample) float64 { return s.closedP99 }},
		} {
			*f.to, cr.Spread[name] = summary(collect(all, f.from))
		}
		for _, s := range all {
			cr.Failed += s.failed
			cr.Unsent += s.unsent
		}
		r.Cases = append(r.Cases, cr)
		if stock := samples["stock-noop"]; stock != nil {
			r.Ratios[c.name] = ratios(all, stock)
		}
		if strings.HasPrefix(c.name, "w1") {
			r.Added[c.name] = added(all, samples["none"], samples["stock-noop"])
		}
	}
	return r
}

func collect(all []sample, f func(sample) float64) []float64 {
	out := make([]float64, len(all))
	for i, s := range all {
		out[i] = f(s)
	}
	return out
}

// summary returns the median (of an even number: the mean of the middle two), lowest and highest, rounded to what can be
// meant by them.
func summary(v []float64) (median float64, s spread) {
	if len(v) == 0 {
		return 0, s
	}
	v = slices.Sorted(slices.Values(v))
	n := len(v)
	return round((v[(n-1)/2] + v[n/2]) / 2), spread{round(v[0]), round(v[n-1])}
}

// round keeps four significant digits.
func round(x float64) float64 {
	if x == 0 || math.IsInf(x, 0) || math.IsNaN(x) {
		return 0
	}
	scale := math.Pow(10, 3-math.Floor(math.Log10(math.Abs(x))))
	return math.Round(x*scale) / scale
}

func ratios(all, stock []sample) caseRatios {
	out := caseRatios{Spread: map[string]spread{}}
	for name, f := range map[string]struct {
		to   *float64
		from func(sample) float64
	}{
		"req_per_s":   {&out.PerSecond, func(s sample) float64 { return s.perSecond }},
		"service_cpu": {&out.ServiceCPU, func(s sample) float64 { return s.serviceCPU }},
		"envoy_cpu":   {&out.EnvoyCPU, func(s sample) float64 { return s.envoyCPU }},
	} {
		var v []float64
		for i := range all {
			if by := f.from(stock[i]); by != 0 {
				v = append(v, f.from(all[i])/by)
			}
		}
		*f.to, out.Spread[name] = summary(v)
	}
	return out
}

func added(all, none, stock []sample) caseAdded {
	over := func(than []sample, f func(sample) float64) *float64 {
		if than == nil {
			return nil
		}
		var v []float64
		for i := range all {
			v = append(v, f(all[i])-f(than[i]))
		}
		m, _ := summary(v)
		return &m
	}
	p50, p99 := func(s sample) float64 { return s.p50 }, func(s sample) float64 { return s.p99 }
	out := caseAdded{P50OverNone: over(none, p50), P99OverNone: over(none, p99),
		P50OverStock: over(stock, p50), P99OverStock: over(stock, p99)}
	out.SyncP50, _ = summary(collect(all, func(s sample) float64 { return s.syncP50 }))
	out.SyncP99, _ = summary(collect(all, func(s sample) float64 { return s.syncP99 }))
	return out
}

// print writes the report for people.
func (r *report) print(w io.Writer) error {
	fmt.Fprintf(w, "%s, %d CPUs, %s, %s, state on %s\n", r.Machine.CPU, r.Machine.CPUs, r.Machine.Kernel, r.Machine.Go,
		r.Machine.FileSystem)
	fmt.Fprintf(w, "medians of %d rounds [lowest-highest]; closed loop of %d connections, %g s; latency: open loop at half that rate\n\n",
		r.Rounds, r.Conns, r.Seconds)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "case\treq/s\tx stock\tservice us/req\tx stock\tenvoy us/req\tp50 ms\tp99 ms\tp99.9 ms\tRSS MB\tfailed\tunsent\t")
	for _, c := range r.Cases {
		ratio := r.Ratios[c.Name]
		fmt.Fprintf(t, "%s\t%.0f [%.0f-%.0f]\t%.2f\t%.1f [%.1f-%.1f]\t%.2f\t%.1f\t%.3f\t%.3f\t%.3f\t%.0f\t%d\t%d\t\n",
			c.Name, c.PerSecond, c.Spread["req_per_s"][0], c.Spread["req_per_s"][1], ratio.PerSecond,
			c.ServiceCPU, c.Spread["service_cpu_us"][0], c.Spread["service_cpu_us"][1], ratio.ServiceCPU,
			c.EnvoyCPU, c.P50, c.P99, c.P999, c.RSS, c.Failed, c.Unsent)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, c := range r.Cases {
		a, ok := r.Added[c.Name]
		if !ok {
			continue
		}
		fmt.Fprintf(w, "\n%s adds", c.Name)
		for _, o := range []struct {
			than     string
			p50, p99 *float64
		}{{"none", a.P50OverNone, a.P99OverNone}, {"stock-noop", a.P50OverStock, a.P99OverStock}} {
			if o.p50 != nil {
				fmt.Fprintf(w, " p50 %.3f ms, p99 %.3f ms over %s;", *o.p50, *o.p99, o.than)
			}
		}
		fmt.Fprintf(w, " append+fdatasync alone: p50 %.3f ms, p99 %.3f ms", a.SyncP50, a.SyncP99)
	}
	_, err := fmt.Fprintln(w)
	return err
}

// save writes bench.json.
func (r *report) save(path string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

func machine(dir string) (machineInfo, error) {
	m := machineInfo{CPU: "unknown CPU", CPUs: runtime.NumCPU(), Go: runtime.Version()}
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				m.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return m, fmt.Errorf("uname: %w", err)
	}
	m.Kernel = "Linux " + unix.ByteSliceToString(u.Release[:])
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return m, fmt.Errorf("statfs: %w", err)
	}
	m.FileSystem = cmp.Or(fileSystems[fs.Type], fmt.Sprintf("file system %#x", fs.Type))
	return m, nil
}

// fileSystems names what state is likely to lie on; tmpfs makes W1 look free.
var fileSystems = map[int64]string{
	unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs",
	unix.OVERLAYFS_SUPER_MAGIC: "overlayfs", unix.TMPFS_MAGIC: "tmpfs (fdatasync does nothing here)",
}
