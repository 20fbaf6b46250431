package hostile

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/knhk/sidecar/e2e/fault"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

const site = `
log: {seal_every: 200ms}
routes:
- {name: all, prefix: /, cluster: up}
envoy:
  access_log_flush: 50ms
  clusters:
  - {name: up, endpoints: ["UPSTREAM"]}
`

const (
	// rssCap is what knhk may hold resident under any attack: the 586 MiB that server/guard.go lets peers take at worst, beside what
	// it needs itself under load (README, Benchmark).
	rssCap = 1 << 30
	pace   = 4 * time.Millisecond   // between good requests
	calm   = 400 * time.Millisecond // a quiet phase
	storm  = 600 * time.Millisecond // an attack lasts as long as its work, at least this
	phases = 3                      // of each kind in a round; in the full run:
	// If the medians of so many phases are too far apart, there are more, and the medians are those of all: what the neighbours on
	// the machine do in one phase or two goes under, what an attack does stays.
	morePhases = 9
	floor      = 5 * time.Millisecond // of noise, which p99 may always differ by
)

// good sends requests through Envoy at a fixed pace until ctx ends and returns their times.
func good(ctx context.Context, s *stack.Stack) (times []time.Duration, err error) {
	c, err := harness.Dial(context.WithoutCancel(ctx), s.Listener)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for len(times) == 0 || ctx.Err() == nil {
		begun := time.Now()
		resp, err := c.Do(harness.Request{Target: "/do/bytes/1"})
		if err != nil || resp.Status != 200 || resp.Header.Get("X-Knhk-Receipt") == "" {
			return times, fmt.Errorf("a good request: %+v, %w", resp, err)
		}
		times = append(times, time.Since(begun))
		<-tick.C
	}
	return times, nil
}

func p99(times []time.Duration) time.Duration {
	slices.Sort(times)
	return times[len(times)*99/100]
}

// goroutines is how many knhk has. Not from its goroutine profile: of 15,000 that holds up requests for 20 ms.
func goroutines(t *testing.T, s *stack.Stack) int {
	t.Helper()
	const name = "go_goroutines"
	m := metrics(t, s)
	if !m.Has(name) {
		t.Fatalf("no metric %s", name)
	}
	return int(m.Sum(name))
}

// events is how many streams knhk has seen that ended without a message, or had one that does not parse.
func events(t *testing.T, s *stack.Stack) float64 {
	t.Helper()
	m := metrics(t, s)
	const name = "knhk_extproc_events_total"
	return m.Sum(name, `"empty"`) + m.Sum(name, `"malformed"`)
}

func metrics(t *testing.T, s *stack.Stack) harness.Series {
	t.Helper()
	m, err := harness.Metrics(t.Context(), s.Admin)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// seen is what was seen of a round's attacks, added up.
type seen struct {
	sent, told int64
	least      int     // goroutines of knhk at the end of an attack
	cores, own float64 // most that knhk and this process took in an attack
}

// attack attacks once while a good client goes on, and gives that one's p99. told: knhk is to tell the attacker.
func (sum *seen) attack(t *testing.T, s *stack.Stack, do func(*round) error, rng *rand.Rand, told bool) time.Duration {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	type result struct {
		times []time.Duration
		err   error
	}
	done := make(chan result, 1)
	cpuBefore, err := s.Knhk.CPU()
	if err != nil {
		t.Fatal(err)
	}
	r := &round{s: s, ctx: t.Context(), rng: rng, begun: time.Now(), cpu: processCPU()}
	go func() {
		times, err := good(ctx, s)
		done <- result{times, err}
	}()
	attackErr := do(r)
	time.Sleep(max(0, storm-time.Since(r.begun))) // the length of the phase, not a wait for anything
	took := float64(time.Since(r.begun))
	cpu, err := s.Knhk.CPU()
	if err != nil {
		t.Fatal(err)
	}
	sum.own = max(sum.own, float64(processCPU()-r.cpu)/took)
	sum.cores = max(sum.cores, float64(cpu-cpuBefore)/took)
	sum.least = min(sum.least, goroutines(t, s))
	if attackErr == nil && told {
		harness.Eventually(t, "the attacker is told", func() bool {
			return slices.ContainsFunc(r.conns, func(a *attacker) bool { return a.told.Load() > 0 || a.ended.Load() })
		})
	}
	for i, a := range r.conns {
		sum.told += a.told.Load()
		if a.ended.Load() {
			sum.told++
		}
		if a.c.Close(); a.fr != nil || i%25 == 24 { // what follows is part of the attack
			r.breathe()
		}
	}
	cancel()
	res := <-done
	if res.err != nil {
		t.Errorf("under attack: %v", res.err)
	}
	sum.sent += r.sent
	if attackErr != nil {
		t.Fatal(attackErr)
	}
	harness.Eventually(t, "the attack is over", func() bool { return goroutines(t, s) <= sum.least })
	return p99(res.times)
}

// full says whether this is the full fault run, the only one that judges the good client's p99: it has the machine to itself.
var full = os.Getenv(fault.EnvFull) == "1"

// tells are the attacks whose author is told what knhk thinks of them: RST_STREAM, GOAWAY, or the connection is ended.
var tells = map[string]bool{"peers/oversized": true, "peers/unfinished": true}

// over says whether a good client's p99 is too high under attack.
func over(calms, storms []time.Duration) bool {
	before := median(calms)
	return median(storms) > max(2*before, before+floor)
}

func median(d []time.Duration) time.Duration {
	d = slices.Clone(d)
	slices.Sort(d)
	return d[len(d)/2]
}

// peak is the most that knhk has held resident, in bytes.
func peak(t *testing.T, s *stack.Stack) uint64 {
	t.Helper()
	n, err := s.Knhk.PeakRSS()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// logged says whether knhk has logged what.
func logged(s *stack.Stack, what string) bool {
	b, err := os.ReadFile(filepath.Join(s.Dir, "knhk.log"))
	return err == nil && bytes.Contains(b, []byte(what))
}

func TestHostilePeers(t *testing.T) {
	harness.RequireEnvoy(t)
	dir := harness.Directory(t, "")
	s, err := stack.New(t.Context(), stack.Config{Dir: dir, YAML: site})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Upstream.Close()
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer func() {
		s.Envoy.Kill()
		s.Knhk.Kill()
	}()
	quiet := func(t *testing.T) time.Duration {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), calm)
		defer cancel()
		times, err := good(ctx, s)
		if err != nil {
			t.Fatal(err)
		}
		return p99(times)
	}
	quiet(t) // warm
	usual := goroutines(t, s)
	mute := &round{s: s, ctx: t.Context(), begun: time.Now(), cpu: processCPU()} // what becomes of it is seen at the end
	if err := mute.streams(1, 100); err != nil {
		t.Fatal(err)
	}
	muteSince := time.Now()
	for _, f := range fault.Table {
		do, ok := attacks[f.Name]
		if !ok {
			continue
		}
		t.Run(f.Name, func(t *testing.T) {
			run := fault.Begin(t, f.Name)
			for range run.Rounds() {
				eventsBefore := events(t, s)
				s.Knhk.ResetPeak()
				sum := seen{least: 1 << 62}
				calms, storms := []time.Duration{quiet(t)}, []time.Duration(nil)
				for n := 0; n < phases || full && n < morePhases && over(calms, storms); n++ {
					storms = append(storms, sum.attack(t, s, do, run.Rand(), tells[f.Name]))
					calms = append(calms, quiet(t))
				}
				n := int64(len(storms))
				// Seen by the attacker (written and taken, or what it was told) and by the server's own counts.
				ok, how := sum.sent > 0 && sum.told > 0, "attacker: sent, and RST_STREAM, GOAWAY or the end of the connection received"
				switch f.Name {
				case "peers/slow-readers":
					ok, how = sum.least > usual+100, "goroutines of knhk during the attack"
				case "peers/mute-streams", "peers/idle-streams":
					ok, how = sum.least > usual+int(sum.sent/n)/2, "goroutines of knhk during the attack"
				case "peers/unfinished":
					ok, how = ok && sum.sent > n*8<<20, "attacker: more than 8 MiB of unfinished messages written, connections ended"
				case "peers/unfinished-bytes":
					ok, how = sum.sent > n*400_000 && sum.least >= usual+50, "attacker: frames written; goroutines of knhk during the attack"
				case "peers/half-preface":
					harness.Eventually(t, "told in the log", func() bool { return logged(s, "refused_connections") })
					ok, how = sum.sent == n*500, "attacker: connections opened; knhk's log"
				case "peers/rapid-reset", "peers/garbage", "peers/one-byte-frames":
					harness.Eventually(t, "they are counted", func() bool { return events(t, s)-eventsBefore >= float64(sum.sent)/1000 })
					ok, how = true, "knhk_extproc_events_total empty and malformed"
				case "peers/control-floods":
					ok, how = sum.sent > 0, "attacker: frames written"
				}
				if ok {
					run.Observed(how)
				}
				rss := peak(t, s)
				if rss > rssCap {
					t.Errorf("%d MiB resident, of %d", rss>>20, rssCap>>20)
				}
				before, during := median(calms), median(storms)
				if full && over(calms, storms) {
					t.Errorf("p99 of a good client: %v under attack, %v without (medians of %v and %v)", during, before, storms, calms)
				}
				harness.Eventually(t, "goroutines are back to usual", func() bool { return goroutines(t, s) <= usual+150 })
				run.Add("sent", float64(sum.sent))
				run.Add("told", float64(sum.told))
				run.Max("rss_mib", float64(rss>>20))
				run.Max("p99_ratio", float64(during)/float64(before))
				run.Max("cores", sum.cores)
				t.Logf("knhk %.2f cores, attacker %.2f; %d sent, told %d times, at most %d MiB, p99 quiet %v, under attack %v", sum.cores, sum.own,
					sum.sent, sum.told, rss>>20, calms, storms)
				if !t.Failed() {
					run.Done()
				}
			}
		})
	}
	t.Run("peers/silence", func(t *testing.T) {
		run := fault.Begin(t, "peers/silence")
		for deadline := time.Now().Add(harness.Patience / 2); !mute.conns[0].ended.Load(); {
			if time.Now().After(deadline) {
				t.Fatalf("100 streams may stay silent for %v", time.Since(muteSince))
			}
			time.Sleep(100 * time.Millisecond)
		}
		harness.Eventually(t, "told in the log", func() bool { return logged(s, "closed_for_silent_streams=1") })
		run.Observed("attacker: the end of the connection received; knhk's log")
		harness.Eventually(t, "goroutines are back to usual", func() bool { return goroutines(t, s) <= usual+20 })
		quiet(t)
		run.Done()
	})
	// The whole log.
	file := filepath.Join(dir, "all.jsonl")
	if _, err := s.Run(t.Context(), nil, "receipts", "export", "--file", file); err != nil {
		t.Error(err)
	}
	out, err := s.Run(t.Context(), nil, "verify", "--quiet", "--policy", filepath.Join(s.StateDir, "policy"), file)
	if err != nil || !bytes.Contains(out, []byte(", 0 refused")) {
		t.Errorf("verify: %v\n%s", err, out)
	}
	if err := s.Envoy.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if err := s.Knhk.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if out, err := s.Run(t.Context(), nil, "fsck", s.StateDir); err != nil || !bytes.Contains(out, []byte("0 problems")) {
		t.Errorf("fsck: %v\n%s", err, out)
	}
}
