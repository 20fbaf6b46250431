package main

import (
	"bytes"
	"encoding/json"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/e2e/harness"
)

// line makes one measurement a minute: 200 MB that grow by perHour (1 is doubling) and shake by noise, with a fixed seed.
func line(minutes int, perHour, noise float64) (t []time.Duration, y []float64) {
	random := rand.New(rand.NewPCG(1, uint64(minutes)))
	for i := range minutes {
		at := time.Duration(i) * time.Minute
		t = append(t, at)
		y = append(y, 200e6*(1+perHour*at.Hours()+noise*random.NormFloat64()))
	}
	return t, y
}

func TestGrowth(t *testing.T) {
	for _, c := range []struct {
		what           string
		minutes        int
		perHour, noise float64
		want           string
	}{
		{"flat and quiet", 30, 0, 0.0001, ok},
		{"a slow leak, quiet", 30, 0.03, 0.001, failed},
		{"a fast leak, loud", 30, 0.5, 0.02, failed},
		{"as loud as a garbage collector, 30 minutes do not tell", 30, 0, 0.05, undecided},
		{"the same for two days", 48 * 60, 0, 0.05, ok},
		{"a slow leak under the noise of two days", 48 * 60, 0.02, 0.05, failed},
		{"it shrinks", 30, -0.2, 0.001, ok},
		{"half of the limit", 60, 0.005, 0.0005, ok},
		{"a fast leak, but the caches may still fill", 8, 5, 0, undecided},
		{"nothing", 0, 0, 0, undecided},
	} {
		at, y := line(c.minutes, c.perHour, c.noise)
		if v := growth("memory", trend(at, y), time.Duration(c.minutes)*time.Minute); v.Result != c.want {
			t.Errorf("%s: %+v, want %s", c.what, v, c.want)
		}
	}
}

// The interval must hold the true slope about as often as it says, for independent measurements and for those that drift.
func TestTrendCovers(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for _, c := range []struct {
		what        string
		keeps, want float64
	}{{"independent", 0, 0.92}, {"each half of the one before", 0.5, 0.85}} {
		const runs = 1000
		covered := 0
		for range runs {
			at, y := make([]time.Duration, 40), make([]float64, 40)
			shake := 0.0
			for i := range y {
				at[i] = time.Duration(i) * time.Minute
				shake = c.keeps*shake + random.NormFloat64()
				y[i] = 100 + 10*at[i].Hours() + shake
			}
			tr := trend(at, y)
			if slope := 10 / tr.Mean; tr.Low <= slope && slope <= tr.High {
				covered++
			}
		}
		if part := float64(covered) / runs; part < c.want {
			t.Errorf("%s: %.3f of the intervals hold the slope, want %.2f", c.what, part, c.want)
		}
	}
}

func TestTrendKnowsWhatItDoesNot(t *testing.T) {
	at, y := line(4, 0, 0)
	if tr := trend(at, y); !math.IsInf(tr.High, 1) || !math.IsInf(tr.Low, -1) {
		t.Errorf("four points: %+v", tr)
	}
	if tr := trend(make([]time.Duration, 9), make([]float64, 9)); !math.IsInf(tr.High, 1) {
		t.Errorf("one moment: %+v", tr)
	}
	at, y = line(10, 0.1, 0)
	if tr := trend(at, y); math.Abs(tr.PerHour*tr.Mean/200e6-0.1) > 1e-9 {
		t.Errorf("a straight line of 10 %%/h: %+v", tr)
	}
}

func TestLevelAndBounds(t *testing.T) {
	for _, c := range []struct {
		what string
		v    Verdict
		want string
	}{
		{"flat", level("x", []float64{100, 106, 98, 101, 99, 100, 103, 100}, 4), ok},
		{"one goroutine more each minute", level("x", []float64{100, 101, 102, 103, 104, 105, 106, 107}, 4), failed},
		{"one spike", level("x", []float64{100, 100, 900, 100, 100, 100, 100, 100}, 4), ok},
		{"too few", level("x", []float64{1, 2, 3}, 4), undecided},
		{"within", bounded("x", []float64{1, 5}, []float64{5, 5}), ok},
		{"over once, in the middle", bounded("x", []float64{1, 6, 2}, []float64{5, 5, 5}), failed},
		{"never measured", bounded("x", nil, nil), undecided},
	} {
		if c.v.Result != c.want {
			t.Errorf("%s: %+v, want %s", c.what, c.v, c.want)
		}
	}
}

// What grows is found in the samples of a whole run, each by its own verdict.
func TestJudge(t *testing.T) {
	for _, c := range []struct {
		what string
		grow func(s *Sample, minute float64)
		want string // begin of the failed verdict; empty: none
	}{
		{"nothing", func(*Sample, float64) {}, ""},
		{"goroutines", func(s *Sample, m float64) { s.Goroutines += 2 * m }, "goroutines"},
		{"memory", func(s *Sample, m float64) { s.RSS *= 1 + m/1000 }, "resident memory of knhk"},
		{"Envoy's memory", func(s *Sample, m float64) { s.EnvoyRSS *= 1 + m/1000 }, "resident memory of Envoy"},
		{"heap", func(s *Sample, m float64) { s.Live *= 1 + m/1000 }, "live heap"},
		{"descriptors", func(s *Sample, m float64) { s.Open += 20 * m }, "open files of knhk"},
		{"Envoy's descriptors", func(s *Sample, m float64) { s.EnvoyOpen += 2 * m }, "Envoy's open files"},
		{"segments that are never recycled", func(s *Sample, m float64) { s.WAL.Bytes += m * (64 << 20) }, "bytes of the write-ahead log"},
		{"tables that are never compacted", func(s *Sample, m float64) { s.Store.Count += 100 * m }, "files of the block store"},
		{"partial tiles that are never removed", func(s *Sample, m float64) { s.Tiles.Count += 120 * m }, "files of the log"},
		{"refusals", func(s *Sample, m float64) { s.Failed += int(m) }, "less than 0.1 %"},
		{"lost outcomes", func(s *Sample, m float64) { s.Unknown += m }, "every outcome is told"},
	} {
		r := &report{}
		for i := range 30 {
			s := Sample{At: time.Duration(i+1) * time.Minute, Requests: 6000, Goroutines: 100, RSS: 200e6, EnvoyRSS: 70e6, Live: 30e6, Open: 30,
				EnvoyOpen: 90, WAL: harness.Files{Count: 4, Bytes: 256 << 20}, Store: harness.Files{Count: 30, Bytes: 100e6}, Tiles: harness.Files{Count: float64(60 * i / 128), Bytes: 1e6}, Leaves: float64(60 * i)}
			c.grow(&s, float64(i))
			r.Samples = append(r.Samples, s)
		}
		r.judge()
		var got []string
		for _, v := range r.Verdicts {
			if v.Result != ok {
				got = append(got, v.Result+" "+v.What)
			}
		}
		var out bytes.Buffer
		if err := r.tell(&out); (err == nil) != (c.want == "") {
			t.Errorf("%s: %v", c.what, err)
		}
		if all := strings.Join(got, ", "); c.want == "" && all != "" || c.want != "" && (len(got) != 1 || !strings.HasPrefix(all, failed+" "+c.want)) {
			t.Errorf("%s: not ok: %q, want %q", c.what, all, c.want)
		}
	}
}

func TestFlags(t *testing.T) {
	for _, args := range [][]string{{"--minutes", "4"}, {"--seconds", "3"}, {"--conns", "0"}, {"--rate", "-1"}, {"--capture", "both"}, {"now"}} {
		if _, err := parse(args, new(bytes.Buffer)); err == nil {
			t.Errorf("%v was accepted", args)
		}
	}
}

// The command as it is, for a few seconds: it runs, measures everything, and judges what a few seconds can tell.
func TestSoak(t *testing.T) {
	harness.RequireEnvoy(t)
	file := filepath.Join(t.TempDir(), "soak.json")
	var out bytes.Buffer
	err := run(t.Context(), []string{"--seconds", "15", "--soft", "--conns", "8", "--out", file}, &out, &out)
	t.Logf("%v\n%s", err, &out)
	b, rerr := os.ReadFile(file)
	if rerr != nil {
		t.Fatal(rerr)
	}
	var r report
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatal(err)
	}
	if r.Capacity <= 0 || r.Rate <= 0 || r.Rate > r.Capacity/2 || len(r.Samples) < 5 || len(r.Verdicts) != 12 {
		t.Fatalf("capacity %v, rate %v, %d samples, %d verdicts", r.Capacity, r.Rate, len(r.Samples), len(r.Verdicts))
	}
	for i, s := range r.Samples {
		if s.Goroutines == 0 || s.RSS == 0 || s.EnvoyRSS == 0 || s.Live == 0 || s.Open == 0 || s.EnvoyOpen == 0 || s.CPU == 0 || s.EnvoyCPU == 0 ||
			s.WAL.Count == 0 || s.Store.Count == 0 || s.Tiles.Count == 0 || s.Decisions == 0 || s.P99 < s.P50 {
			t.Errorf("sample %d lacks something: %+v", i, s)
		}
	}
	for _, v := range r.Verdicts {
		// A machine that is busy with something else may refuse a request in time; nothing else may fail on it.
		if v.Result == failed && !strings.Contains(v.What, "of the requests fail") {
			t.Errorf("%+v", v)
		}
	}
}
