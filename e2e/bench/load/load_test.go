package load

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"
)

// server answers every request like Envoy does, names in lower case; pause is asked before each answer.
func server(t *testing.T, status string, pause func(n int64)) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	var served atomic.Int64
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				r := bufio.NewReader(c)
				for {
					if _, err := http.ReadRequest(r); err != nil {
						return
					}
					pause(served.Add(1))
					if _, err := io.WriteString(c, "HTTP/1.1 "+status+"\r\ncontent-length: 2\r\n\r\nok"); err != nil {
						return
					}
				}
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

var request = []byte("GET / HTTP/1.1\r\nHost: bench\r\n\r\n")

func TestClosedLoop(t *testing.T) {
	addr := server(t, "200 OK", func(int64) {})
	r, err := Run(t.Context(), Config{Addr: addr, Request: request, Conns: 4, Length: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Latencies) < 4 || r.Failed != 0 || r.PerSecond() <= 0 {
		t.Errorf("%d answers, %d failed, %f/s", len(r.Latencies), r.Failed, r.PerSecond())
	}
	if r.Quantile(0.5) > r.Quantile(0.99) || r.Quantile(1) != r.Latencies[len(r.Latencies)-1] {
		t.Errorf("quantiles %v %v %v", r.Quantile(0.5), r.Quantile(0.99), r.Quantile(1))
	}
}

func TestOpenLoopSendsWhatIsDue(t *testing.T) {
	addr := server(t, "200 OK", func(int64) {})
	r, err := Run(t.Context(), Config{Addr: addr, Request: request, Conns: 8, Rate: 1000, Length: 200 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if got := len(r.Latencies) + r.Failed + r.Unsent; got != 200 {
		t.Errorf("%d requests accounted for, want 200", got)
	}
}

// One stall of 100 ms on the only connection delays every request that was due meanwhile; each must count it.
func TestStallCountsForAllItDelays(t *testing.T) {
	addr := server(t, "200 OK", func(n int64) {
		if n == 10 {
			time.Sleep(100 * time.Millisecond)
		}
	})
	r, err := Run(t.Context(), Config{Addr: addr, Request: request, Conns: 1, Rate: 1000, Length: 300 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	slow := 0
	for _, l := range r.Latencies {
		if l >= 50*time.Millisecond {
			slow++
		}
	}
	if slow < 45 { // 50 were due while at least 50 ms of the stall were still to come
		t.Errorf("%d requests of 50 ms or more; a closed loop would see 1", slow)
	}
}

func TestRefusalsAreNotAnswers(t *testing.T) {
	addr := server(t, "503 Service Unavailable", func(int64) {})
	r, err := Run(t.Context(), Config{Addr: addr, Request: request, Conns: 1, Length: time.Second})
	if err != nil || len(r.Latencies) != 0 || r.Failed == 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestErrors(t *testing.T) {
	if _, err := Run(t.Context(), Config{}); err == nil {
		t.Error("an empty configuration ran")
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("gone")
	cancel(gone)
	addr := server(t, "200 OK", func(int64) {})
	if _, err := Run(ctx, Config{Addr: addr, Request: request, Conns: 1, Length: time.Second}); !errors.Is(err, gone) {
		t.Errorf("a cancelled run gave %v", err)
	}
}

func TestParse(t *testing.T) {
	for _, c := range []struct {
		in           string
		size, status int
		bad          bool
	}{
		{in: ""},
		{in: "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\no", status: 200}, // body not whole yet
		{in: "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", size: 40, status: 200},
		{in: "HTTP/1.1 429 No\r\ncontent-length: 0\r\n\r\n", size: 38, status: 429},
		{in: "HTTP/1.1 200 OK\r\n\r\n", bad: true},
		{in: "HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\n", bad: true},
		{in: "hello\r\n\r\n", bad: true},
	} {
		size, status, err := parse([]byte(c.in))
		if c.bad != (err != nil) || size != c.size && !c.bad || status != c.status && !c.bad {
			t.Errorf("%q: %d, %d, %v", c.in, size, status, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"))
	f.Add([]byte("\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 200\r\ncontent-length:\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if size, _, err := parse(b); err == nil && size > len(b) {
			t.Errorf("size %d of %d bytes", size, len(b))
		}
	})
}
