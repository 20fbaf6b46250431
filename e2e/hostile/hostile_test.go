package hostile

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

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
	rssCap  = 1 << 30               // bytes that knhk may hold resident under any of the attacks
	pace    = 10 * time.Millisecond // between good requests
	phase   = 1 * time.Second       // a quiet phase; an attack lasts as long as its work, at least this
	extProc = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
	als     = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"
)

// attacker is a bare HTTP/2 connection to knhk that counts what it did and what it was told.
type attacker struct {
	c       net.Conn
	w       *bufio.Writer
	fr      *http2.Framer
	enc     *hpack.Encoder
	head    bytes.Buffer
	next    uint32
	told    atomic.Int64 // RST_STREAM, GOAWAY, or the end of the connection
	written int64        // bytes
}

func (a *attacker) Write(b []byte) (int, error) {
	n, err := a.w.Write(b)
	a.written += int64(n)
	return n, err
}

// attack connects to knhk. With read, what it says is read and counted; without, never.
func attack(ctx context.Context, addr string, read bool) (*attacker, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return nil, err
	}
	a := &attacker{c: c, w: bufio.NewWriterSize(c, 64<<10), next: 1}
	a.enc = hpack.NewEncoder(&a.head)
	a.fr = http2.NewFramer(a, c)
	if _, err := io.WriteString(a, http2.ClientPreface); err != nil {
		return nil, err
	}
	if err := a.fr.WriteSettings(); err != nil {
		return nil, err
	}
	if read {
		go func() {
			for {
				f, err := a.fr.ReadFrame()
				if err != nil {
					a.told.Add(1)
					return
				}
				switch f.(type) {
				case *http2.RSTStreamFrame, *http2.GoAwayFrame:
					a.told.Add(1)
				}
			}
		}()
	}
	return a, nil
}

// open begins a call; more are further header fields.
func (a *attacker) open(method string, ended bool, more ...string) (uint32, error) {
	a.head.Reset()
	fields := append([]string{":method", "POST", ":scheme", "http", ":path", method, ":authority", "knhk", "content-type", "application/grpc",
		"te", "trailers"}, more...)
	for i := 0; i < len(fields); i += 2 {
		if err := a.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}); err != nil {
			return 0, err
		}
	}
	id := a.next
	a.next += 2
	return id, a.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: a.head.Bytes(), EndHeaders: true, EndStream: ended})
}

// round is one attack under way: its connections end with it.
type round struct {
	s     *stack.Stack
	ctx   context.Context
	rng   *rand.Rand
	conns []*attacker
	sent  int64 // what the attack counts: streams, frames, bytes
}

func (r *round) dial(read bool) (*attacker, error) {
	a, err := attack(r.ctx, r.s.Sidecar, read)
	if err == nil {
		r.conns = append(r.conns, a)
	}
	return a, err
}

func (r *round) told() (n int64) {
	for _, a := range r.conns {
		n += a.told.Load()
	}
	return n
}

func prefix(compressed byte, n uint32) []byte {
	return binary.BigEndian.AppendUint32([]byte{compressed}, n)
}

// streams opens n calls on each of c connections, and leaves them open.
func (r *round) streams(c, n int) error {
	for range c {
		a, err := r.dial(true)
		if err != nil {
			return err
		}
		for i := range n {
			if _, err := a.open([]string{extProc, als}[i%2], false); err != nil {
				return err
			}
			r.sent++
		}
		if err := a.w.Flush(); err != nil {
			return err
		}
	}
	return nil
}

// attacks are by the fault's name; each returns when it has done its work.
var attacks = map[string]func(*round) error{
	"peers/mute-streams": func(r *round) error { return r.streams(2, 900) },
	"peers/idle-streams": func(r *round) error { return r.streams(20, 500) },
	"peers/rapid-reset": func(r *round) error { // at most 20,000 streams a second, in bursts of 200
		a, err := r.dial(true)
		for i := 0; err == nil && i < 100; i++ {
			for range 200 {
				var id uint32
				if id, err = a.open(extProc, false); err != nil {
					return nil // the server has ended the connection
				}
				if err = a.fr.WriteRSTStream(id, http2.ErrCodeCancel); err != nil {
					return nil
				}
				r.sent++
			}
			if a.w.Flush() != nil {
				return nil
			}
			time.Sleep(10 * time.Millisecond)
		}
		return err
	},
	"peers/one-byte-frames": func(r *round) error {
		a, err := r.dial(true)
		if err != nil {
			return err
		}
		for range 50 {
			id, err := a.open(extProc, false)
			if err != nil {
				return err
			}
			for _, b := range append(prefix(0, 1000), make([]byte, 900)...) {
				if a.fr.WriteData(id, false, []byte{b}) != nil {
					return nil
				}
				r.sent++
			}
			if a.w.Flush() != nil {
				return nil
			}
			time.Sleep(10 * time.Millisecond)
		}
		return nil
	},
	"peers/oversized": func(r *round) error {
		for _, claim := range []uint32{1<<32 - 1, 16 << 20} {
			a, err := r.dial(true)
			if err != nil {
				return err
			}
			for range 100 {
				id, err := a.open(extProc, false)
				if err != nil {
					return err
				}
				if a.fr.WriteData(id, false, append(prefix(0, claim), make([]byte, 16000)...)) != nil {
					break
				}
				r.sent++
			}
			_ = a.w.Flush()
		}
		a, err := r.dial(true)
		if err != nil {
			return err
		}
		if _, err := a.open(extProc, false); err != nil {
			return err
		}
		a.head.Reset()
		if err := a.enc.WriteField(hpack.HeaderField{Name: "x-large", Value: strings.Repeat("l", 16000)}); err != nil {
			return err
		}
		block := a.head.Bytes()
		err = a.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: a.next, BlockFragment: block})
		for i := 0; err == nil && i < 1000; i++ { // CONTINUATION without an end
			if err = a.fr.WriteContinuation(a.next, false, block); err == nil {
				r.sent++
			}
		}
		_ = a.w.Flush()
		return nil
	},
	"peers/half-preface": func(r *round) error {
		for range 500 {
			var d net.Dialer
			c, err := d.DialContext(r.ctx, "tcp", r.s.Sidecar)
			if err != nil {
				return err
			}
			r.conns = append(r.conns, &attacker{c: c})
			if _, err := io.WriteString(c, http2.ClientPreface[:10]); err != nil {
				return err
			}
			r.sent++
		}
		return nil
	},
	"peers/control-floods": func(r *round) error { // without ever reading the acknowledgements
		for range 2 {
			a, err := r.dial(false)
			if err != nil {
				return err
			}
			if err := a.c.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
				return err
			}
			for i := range 100_000 {
				err := a.fr.WritePing(false, [8]byte{1})
				if err == nil && i%10 == 0 {
					err = a.fr.WriteSettings()
				}
				if err != nil {
					a.told.Add(1)
					break // ended by the server, or stalled because we do not read
				}
				r.sent++
			}
		}
		return nil
	},
	"peers/slow-readers": func(r *round) error { // a window of 0: no answer can be sent
		a, err := r.dial(false)
		if err != nil {
			return err
		}
		if err := a.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}); err != nil {
			return err
		}
		for range 200 {
			id, err := a.open(extProc, false)
			if err == nil { // 2,000 empty messages, each of which has an answer
				err = a.fr.WriteData(id, false, bytes.Repeat(prefix(0, 0), 2000))
			}
			if err != nil {
				return err
			}
			r.sent++
		}
		return a.w.Flush()
	},
	"peers/garbage": func(r *round) error {
		a, err := r.dial(true)
		if err != nil {
			return err
		}
		junk := make([]byte, 2000)
		for i := range 300 {
			for j := range junk {
				junk[j] = byte(r.rng.Uint32())
			}
			more := []string{}
			if i%3 == 2 {
				more = []string{"grpc-encoding", "gzip"}
			}
			id, err := a.open([]string{extProc, als}[i%2], false, more...)
			if err != nil {
				return err
			}
			if a.fr.WriteData(id, true, append(prefix(byte(len(more)/2), uint32(len(junk))), junk...)) != nil {
				return nil
			}
			r.sent++
			if a.w.Flush() != nil {
				return nil
			}
			if i%10 == 9 {
				time.Sleep(10 * time.Millisecond)
			}
		}
		return nil
	},
}

// good sends requests through Envoy at a fixed pace until ctx ends and returns their times.
func good(ctx context.Context, s *stack.Stack) (times []time.Duration, err error) {
	c, err := harness.Dial(context.WithoutCancel(ctx), s.Listener)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for ctx.Err() == nil {
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

func goroutines(t *testing.T, s *stack.Stack) (n int) {
	t.Helper()
	resp, err := http.Get("http://" + s.Admin + "/debug/pprof/goroutine?debug=1")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := fmt.Fscanf(resp.Body, "goroutine profile: total %d", &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// events is how many streams knhk has seen that ended without a message, or had one that does not parse.
func events(t *testing.T, s *stack.Stack) (n float64) {
	t.Helper()
	resp, err := http.Get("http://" + s.Admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	for sc := bufio.NewScanner(resp.Body); sc.Scan(); {
		line := sc.Text()
		if strings.HasPrefix(line, "knhk_extproc_events_total") && (strings.Contains(line, `"empty"`) || strings.Contains(line, `"malformed"`)) {
			var v float64
			if _, err := fmt.Sscan(line[strings.LastIndexByte(line, ' ')+1:], &v); err != nil {
				t.Fatal(err)
			}
			n += v
		}
	}
	return n
}

func TestHostilePeers(t *testing.T) {
	harness.RequireEnvoy(t)
	dir, err := os.MkdirTemp("", "knhk-hostile-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
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
	quiet := func() time.Duration {
		ctx, cancel := context.WithTimeout(t.Context(), phase)
		defer cancel()
		times, err := good(ctx, s)
		if err != nil {
			t.Fatal(err)
		}
		return p99(times)
	}
	quiet() // warm
	usual := goroutines(t, s)
	for _, f := range fault.Table {
		do, ok := attacks[f.Name]
		if !ok {
			continue
		}
		t.Run(f.Name, func(t *testing.T) {
			run := fault.Begin(t, f.Name)
			for range run.Rounds() {
				before, eventsBefore := quiet(), events(t, s)
				r := &round{s: s, ctx: t.Context(), rng: run.Rand()}
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error, 1)
				var times []time.Duration
				go func() {
					var err error
					times, err = good(ctx, s)
					done <- err
				}()
				begun := time.Now()
				cpuBefore, cpuErr := s.Knhk.CPU()
				attackErr := do(r)
				time.Sleep(max(0, phase-time.Since(begun))) // the length of the phase, not a wait for anything
				cpu, err := s.Knhk.CPU()
				rss, rssErr := s.Knhk.RSS()
				if err := errors.Join(cpuErr, err); err != nil {
					t.Fatal(err)
				}
				cores := float64(cpu-cpuBefore) / float64(time.Since(begun))
				crowd := goroutines(t, s)
				cancel()
				if err := <-done; err != nil {
					t.Errorf("under attack: %v", err)
				}
				during := p99(times)
				told := r.told()
				for _, a := range r.conns {
					a.c.Close()
				}
				after := quiet()
				if attackErr != nil || rssErr != nil {
					t.Fatalf("%v, %v", attackErr, rssErr)
				}
				// Seen by the attacker (written and taken, or what it was told) and by the server's own counts.
				seen, how := r.sent > 0 && told > 0, "attacker: sent, and RST_STREAM or GOAWAY received"
				switch f.Name {
				case "peers/mute-streams", "peers/idle-streams", "peers/half-preface", "peers/slow-readers":
					seen, how = crowd > usual+int(r.sent)/2, "goroutines of knhk during the attack"
				case "peers/rapid-reset", "peers/garbage", "peers/one-byte-frames":
					seen, how = events(t, s)-eventsBefore >= float64(r.sent)/1000, "knhk_extproc_events_total empty and malformed"
				case "peers/control-floods":
					seen, how = r.sent > 0, "attacker: frames written"
				}
				if seen {
					run.Observed(how)
				}
				if rss > rssCap {
					t.Errorf("%d MiB resident", rss>>20)
				}
				harness.Eventually(t, "goroutines are back to usual", func() bool { return goroutines(t, s) <= usual+20 })
				run.Add("sent", float64(r.sent))
				run.Add("told", float64(told))
				run.Max("rss_mib", float64(rss>>20))
				run.Max("p99_ratio", float64(during)/float64(max(before, after)))
				run.Max("cores", cores)
				t.Logf("%.2f cores; %d sent, told %d times, %d MiB, p99 %v / %v / %v", cores, r.sent, told, rss>>20, before, during, after)
				if !t.Failed() {
					run.Done()
				}
			}
		})
	}
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
