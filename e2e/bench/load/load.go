// Package load sends HTTP/1.1 requests over keep-alive connections from one thread and notes how long each took.
//
// It promises to be cheap (one epoll loop, no goroutine and no buffer per request, so that on a small machine the
// measured programs get the processors) and honest: in the open loop a request's time runs from the moment it was due,
// not from the moment a connection was free for it, so a stall counts for everything it delayed (no coordinated
// omission). It does not do TLS, chunked responses or anything but one fixed request. Only e2e/bench and e2e/soak use it.
package load

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Config says what to send and how.
type Config struct {
	Addr    netip.AddrPort
	Request []byte        // one whole request; the response must be 200 with a content-length
	Conns   int           // connections, at least 1
	Rate    float64       // requests per second, evenly spaced; 0 is the closed loop: each connection as fast as it can
	Length  time.Duration // how long new requests are sent
}

// Result is what happened. Latencies are sorted.
type Result struct {
	Latencies []time.Duration // of responses with status 200
	Failed    int             // other status, or the connection ended
	Unsent    int             // open loop: due before the end, but no connection was free until then
	Elapsed   time.Duration   // from the first request to the last response
}

// PerSecond returns answered requests per second.
func (r *Result) PerSecond() float64 {
	if r.Elapsed <= 0 {
		return 0
	}
	return float64(len(r.Latencies)) / r.Elapsed.Seconds()
}

// Quantile returns the latency that a fraction q (0 to 1) of the requests did not exceed, by nearest rank; 0 without
// requests.
func (r *Result) Quantile(q float64) time.Duration {
	n := len(r.Latencies)
	if n == 0 {
		return 0
	}
	i := int(q*float64(n)+0.999999) - 1
	return r.Latencies[min(max(i, 0), n-1)]
}

// drainTime is how long answers are waited for after the last request was sent.
const drainTime = 5 * time.Second

const bufSize = 16 << 10

// conn is one connection: idle, or waiting for the answer to a request that was due at since.
type conn struct {
	fd    int
	busy  bool
	since time.Duration
	buf   []byte
	n     int // bytes of buf that are filled
}

type loop struct {
	cfg    Config
	epoll  int
	timer  int // timerfd, armed for the next request that is due
	conns  []*conn
	idle   []*conn
	busy   int
	base   time.Time
	result *Result
}

// Run sends requests for cfg.Length and waits for their answers. Failures of single requests are counted; an error means
// that nothing can be said. ctx ends it early, with an error.
func Run(ctx context.Context, cfg Config) (*Result, error) {
	if cfg.Conns < 1 || len(cfg.Request) == 0 || cfg.Length <= 0 || cfg.Rate < 0 {
		return nil, errors.New("load: want connections, a request and a length")
	}
	// A thread of its own: it sits in epoll_wait most of the time.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	l := &loop{cfg: cfg, epoll: -1, timer: -1, result: &Result{}}
	defer l.close()
	if err := l.open(); err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	if err := l.run(ctx); err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	slices.Sort(l.result.Latencies)
	return l.result, nil
}

func (l *loop) open() (err error) {
	if l.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	if l.timer, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC); err != nil {
		return fmt.Errorf("timer: %w", err)
	}
	if err = l.watch(l.timer, -1); err != nil {
		return err
	}
	for i := range l.cfg.Conns {
		c := &conn{fd: -1, buf: make([]byte, bufSize)}
		l.conns = append(l.conns, c)
		l.idle = append(l.idle, c)
		if err = l.dial(c, i); err != nil {
			return err
		}
	}
	expect := l.cfg.Rate
	if expect == 0 {
		expect = 100000
	}
	l.result.Latencies = make([]time.Duration, 0, int(min(expect*l.cfg.Length.Seconds()*1.1+1000, 1<<24)))
	return nil
}

// watch asks for readability of fd; events carry index, -1 for the timer.
func (l *loop) watch(fd, index int) error {
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLRDHUP, Fd: int32(index)}
	if err := unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

func (l *loop) dial(c *conn, index int) error {
	if c.fd >= 0 {
		unix.Close(c.fd)
	}
	var err error
	family, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(l.cfg.Addr.Port()), Addr: l.cfg.Addr.Addr().Unmap().As4()})
	if c.fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	if err := unix.Connect(c.fd, sa); err != nil { // loopback: at once
		return fmt.Errorf("connect to %s: %w", l.cfg.Addr, err)
	}
	if err := unix.SetsockoptInt(c.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	if err := unix.SetNonblock(c.fd, true); err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	c.n = 0
	return l.watch(c.fd, index)
}

func (l *loop) close() {
	for _, c := range l.conns {
		if c.fd >= 0 {
			unix.Close(c.fd)
		}
	}
	for _, fd := range []int{l.timer, l.epoll} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

func (l *loop) run(ctx context.Context) error {
	l.base = time.Now()
	var gap time.Duration // between two requests of the open loop
	if l.cfg.Rate > 0 {
		gap = max(time.Duration(float64(time.Second)/l.cfg.Rate), 1)
	}
	var next time.Duration // when the next request of the open loop is due
	events := make([]unix.EpollEvent, len(l.conns)+1)
	for {
		now := time.Since(l.base)
		sending := now < l.cfg.Length
		switch {
		case !sending: // only answers are missing
		case gap == 0:
			for len(l.idle) > 0 {
				if err := l.send(now); err != nil {
					return err
				}
			}
		default:
			for next <= now && len(l.idle) > 0 {
				if err := l.send(next); err != nil {
					return err
				}
				next += gap
			}
		}
		if !sending && l.busy == 0 {
			break
		}
		if now > l.cfg.Length+drainTime {
			l.result.Failed += l.busy
			break
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if sending && gap > 0 && len(l.idle) > 0 {
			if err := l.arm(min(next, l.cfg.Length) - now); err != nil {
				return err
			}
		}
		n, err := unix.EpollWait(l.epoll, events, 100)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("epoll: %w", err)
		}
		for _, ev := range events[:max(n, 0)] {
			if ev.Fd < 0 {
				var fired [8]byte
				_, _ = unix.Read(l.timer, fired[:]) // only to make it unreadable again
				continue
			}
			if err := l.readable(int(ev.Fd)); err != nil {
				return err
			}
		}
	}
	for gap > 0 && next < l.cfg.Length {
		l.result.Unsent++
		next += gap
	}
	return nil
}

func (l *loop) arm(d time.Duration) error {
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(max(d, 1)))}
	if err := unix.TimerfdSettime(l.timer, 0, &spec, nil); err != nil {
		return fmt.Errorf("timer: %w", err)
	}
	return nil
}

// send sends one request on an idle connection; its time runs from due.
func (l *loop) send(due time.Duration) error {
	c := l.idle[len(l.idle)-1]
	n, err := unix.Write(c.fd, l.cfg.Request)
	if err != nil {
		// The server closed it while it was idle: once more on a fresh one.
		if err := l.dial(c, slices.Index(l.conns, c)); err != nil {
			return err
		}
		if n, err = unix.Write(c.fd, l.cfg.Request); err != nil {
			return fmt.Errorf("write: %w", err)
		}
	}
	if n != len(l.cfg.Request) {
		return fmt.Errorf("write: %d of %d bytes", n, len(l.cfg.Request))
	}
	l.idle = l.idle[:len(l.idle)-1]
	c.busy, c.since = true, due
	l.busy++
	return nil
}

// readable reads what came on a connection and notes a whole response.
func (l *loop) readable(index int) error {
	c := l.conns[index]
	n, err := unix.Read(c.fd, c.buf[c.n:])
	if errors.Is(err, unix.EAGAIN) {
		return nil
	}
	if err != nil || n == 0 {
		return l.lost(c, index)
	}
	c.n += n
	size, status, err := parse(c.buf[:c.n])
	if err != nil {
		return err
	}
	if size == 0 {
		if c.n == len(c.buf) {
			return fmt.Errorf("response larger than %d bytes", bufSize)
		}
		return nil
	}
	if size != c.n || !c.busy {
		return fmt.Errorf("unexpected bytes after a response: %q", c.buf[:c.n])
	}
	now := time.Since(l.base)
	if status == 200 {
		l.result.Latencies = append(l.result.Latencies, now-c.since)
	} else {
		l.result.Failed++
	}
	l.result.Elapsed = now
	l.free(c)
	return nil
}

// lost opens a connection again that the server has closed.
func (l *loop) lost(c *conn, index int) error {
	if c.busy {
		l.result.Failed++
		l.free(c)
	}
	return l.dial(c, index)
}

func (l *loop) free(c *conn) {
	c.busy, c.n = false, 0
	l.busy--
	l.idle = append(l.idle, c)
}

// parse returns the size of the first response in b, headers and body, and its status; size 0 means that more is needed.
func parse(b []byte) (size, status int, err error) {
	head := bytes.Index(b, []byte("\r\n\r\n"))
	if head < 0 {
		return 0, 0, nil
	}
	if len(b) < 12 || !bytes.HasPrefix(b, []byte("HTTP/1.1 ")) {
		return 0, 0, fmt.Errorf("not a response: %q", b[:head])
	}
	if status, err = strconv.Atoi(string(b[9:12])); err != nil {
		return 0, 0, fmt.Errorf("not a response: %q", b[:head])
	}
	const name = "\r\ncontent-length:"
	at := bytes.Index(b[:head+2], []byte(name)) // Envoy writes header names in lower case
	if at < 0 {
		return 0, 0, fmt.Errorf("response without content-length: %q", b[:head])
	}
	line := b[at+len(name) : head+2]
	line = bytes.TrimSpace(line[:bytes.Index(line, []byte("\r\n"))])
	length, err := strconv.Atoi(string(line))
	if err != nil || length < 0 || length > bufSize {
		return 0, 0, fmt.Errorf("content-length %q", line)
	}
	size = head + 4 + length
	if size > len(b) {
		return 0, status, nil
	}
	return size, status, nil
}
