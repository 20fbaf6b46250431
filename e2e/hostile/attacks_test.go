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
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

const (
	extProc = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
	als     = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"

	maxMessage = 256 << 10 // of server/server.go
	breath     = 5 * time.Millisecond
	cpuShare   = 0.5 // of a core, which this process may take while it attacks: above, an attack waits
)

// attacker is a bare HTTP/2 connection to knhk that counts what it did and what it was told.
type attacker struct {
	c       net.Conn
	w       *bufio.Writer
	fr      *http2.Framer
	enc     *hpack.Encoder
	head    bytes.Buffer
	next    uint32
	told    atomic.Int64 // RST_STREAM and GOAWAY
	ended   atomic.Bool  // by the server
	frames  atomic.Int64 // received
	granted atomic.Int64 // window updates for streams
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
	if err := c.SetDeadline(time.Now().Add(harness.Patience)); err != nil {
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
					a.ended.Store(true)
					return
				}
				a.frames.Add(1)
				switch f := f.(type) {
				case *http2.RSTStreamFrame, *http2.GoAwayFrame:
					a.told.Add(1)
				case *http2.WindowUpdateFrame:
					if f.StreamID != 0 {
						a.granted.Add(1)
					}
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
	begun time.Time
	cpu   time.Duration // of this process, when the attack began
}

// breathe waits a moment, and on until this process has taken no more than cpuShare since the attack began: two cores are shared
// with the attacked, and what the attacker computes is not what is tested.
func (r *round) breathe() {
	time.Sleep(breath)
	for float64(processCPU()-r.cpu) > cpuShare*float64(time.Since(r.begun)) && time.Since(r.begun) < 10*time.Second {
		time.Sleep(breath)
	}
}

// processCPU is what this process has spent on processors: the attacker, the good client and the upstream.
func processCPU() time.Duration {
	var ru syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &ru) != nil {
		return 0
	}
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}

func (r *round) dial(read bool) (*attacker, error) {
	a, err := attack(r.ctx, r.s.Sidecar, read)
	if err == nil {
		r.conns = append(r.conns, a)
	}
	return a, err
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
			if i%50 == 49 {
				if err := a.w.Flush(); err != nil {
					return err
				}
				r.breathe()
			}
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
	"peers/rapid-reset": func(r *round) error { // at most 10,000 streams a second, in bursts of 50
		a, err := r.dial(true)
		for i := 0; err == nil && i < 100; i++ {
			for range 50 {
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
			r.breathe()
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
			r.breathe()
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
		return r.headerList()
	},
	"peers/unfinished": func(r *round) error { // each message lacks its last byte
		for range 8 {
			a, err := r.dial(true)
			if err != nil {
				return err
			}
			var ids []uint32
			for range 200 {
				id, err := a.open(extProc, false)
				if err != nil {
					return err
				}
				if err := a.fr.WriteData(id, false, prefix(0, maxMessage-1)); err != nil {
					return err
				}
				if ids = append(ids, id); len(ids)%50 == 0 {
					if err := a.w.Flush(); err != nil {
						return err
					}
					r.breathe()
				}
			}
			// knhk opens the window of a stream when it has read the length.
			for deadline := time.Now().Add(harness.Patience); a.granted.Load() < int64(len(ids)); {
				if time.Now().After(deadline) {
					return fmt.Errorf("%d of %d windows were opened", a.granted.Load(), len(ids))
				}
				r.breathe()
			}
			chunk := make([]byte, 16<<10)
		conn:
			for i, id := range ids {
				for left := maxMessage - 2; left > 0; left -= len(chunk) {
					n := min(left, len(chunk))
					if a.fr.WriteData(id, false, chunk[:n]) != nil {
						break conn // closed by knhk
					}
					r.sent += int64(n)
				}
				if a.w.Flush() != nil {
					break
				}
				if i%2 == 1 {
					r.breathe()
				}
			}
		}
		return nil
	},
	"peers/unfinished-bytes": func(r *round) error { // the same in frames of one byte, the dearest for who keeps them
		a, err := r.dial(true)
		if err != nil {
			return err
		}
		var ids []uint32
		for range 150 {
			id, err := a.open(extProc, false)
			if err == nil {
				err = a.fr.WriteData(id, false, prefix(0, 60_000))
			}
			if err != nil {
				return err
			}
			ids = append(ids, id)
		}
		for range 67 {
			for _, id := range ids {
				for range 40 {
					if a.fr.WriteData(id, false, []byte{0}) != nil {
						return nil
					}
					r.sent++
				}
			}
			if a.w.Flush() != nil {
				return nil
			}
			r.breathe()
		}
		return nil
	},
	"peers/half-preface": func(r *round) error {
		for i := range 500 {
			if i%25 == 24 {
				r.breathe()
			}
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
		// Whoever comes now is let in all the same.
		a, err := r.dial(true)
		if err != nil {
			return err
		}
		if err := a.w.Flush(); err != nil {
			return err
		}
		for deadline := time.Now().Add(harness.Patience); a.frames.Load() == 0; r.breathe() {
			if time.Now().After(deadline) {
				return errors.New("a newcomer is not served")
			}
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
			for i := range 50_000 {
				err := a.fr.WritePing(false, [8]byte{1})
				if err == nil && i%10 == 0 {
					err = a.fr.WriteSettings()
				}
				if err != nil {
					a.told.Add(1)
					break // ended by the server, or stalled because we do not read
				}
				r.sent++
				if i%2000 == 1999 {
					r.breathe()
				}
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
		for i := range 400 { // empty messages, each of which has an answer; knhk takes 64
			id, err := a.open(extProc, false)
			if err == nil {
				err = a.fr.WriteData(id, false, bytes.Repeat(prefix(0, 0), []int{60, 2000}[i%2]))
			}
			if err != nil {
				return err
			}
			r.sent++
			if i%4 == 3 {
				if err := a.w.Flush(); err != nil {
					return nil // knhk has had enough
				}
				r.breathe()
			}
		}
		return nil
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
				r.breathe()
			}
		}
		return nil
	},
}

// headerList sends header lists of 1 MiB that do end, and finds them refused.
func (r *round) headerList() error {
	a, err := r.dial(true)
	if err != nil {
		return err
	}
	a.head.Reset()
	if err := a.enc.WriteField(hpack.HeaderField{Name: "x-large", Value: strings.Repeat("l", 16000), Sensitive: true}); err != nil {
		return err
	}
	block := bytes.Clone(a.head.Bytes())
	for range 10 {
		id := a.next
		a.next += 2
		err := a.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block})
		for i := 0; err == nil && i < 64; i++ {
			err = a.fr.WriteContinuation(id, i == 63, block)
		}
		if err != nil || a.w.Flush() != nil {
			break // ended by knhk
		}
		r.sent++
		r.breathe()
	}
	for deadline := time.Now().Add(harness.Patience); a.told.Load() == 0 && !a.ended.Load(); r.breathe() {
		if time.Now().After(deadline) {
			return errors.New("header lists of 1 MiB were taken")
		}
	}
	return nil
}
