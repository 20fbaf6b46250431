package access

import (
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// dialEnv makes this test binary the client of a socket.
const dialEnv = "KNHK_TEST_DIAL"

func TestMain(m *testing.M) {
	if path := os.Getenv(dialEnv); path != "" {
		os.Exit(dial(path))
	}
	os.Exit(m.Run())
}

// dial exits with 0 when the other end speaks, with 3 when it hangs up without a word.
func dial(path string) int {
	c, err := net.DialTimeout("unix", path, time.Minute)
	if err != nil {
		return 1
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
		return 3
	}
	return 0
}

// TestUsers: on a unix socket the kernel says who it is. Who has no role is turned away even where the modes would let him in.
func TestUsers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be another user")
	}
	dir, err := os.MkdirTemp("/tmp", "knhk") // a short path that other users reach
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := dir + "/s"
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	strangers := make(chan Cause, 10)
	a := authority(t, map[Role][]string{Envoy: {"uid:1337"}, Operator: {"uid:1338"}, Peer: {"spiffe://a.test/uid/1339"}},
		func(_ Listener, c Cause) { strangers <- c })
	who := make(chan Who, 10)
	plain := PlainListener{Listener: ln, Authority: a, On: OnEnvoy, Insecure: true} // which is about TCP
	defer plain.Close()
	exe, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = errors.Join(os.WriteFile(dir+"/client", exe, 0o755), os.Chmod(dir, 0o755), os.Chmod(path, 0o666))
	}
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := plain.Accept()
			if err != nil {
				return
			}
			who <- c.(interface{ Who() Who }).Who()
			c.Write([]byte("!"))
			c.Close()
		}
	}()
	for _, c := range []struct {
		uid  uint32
		exit int
	}{{0, 0}, {1337, 0}, {1338, 3}, {1339, 3}, {65534, 3}} {
		cmd := exec.CommandContext(t.Context(), dir+"/client")
		cmd.Env = []string{dialEnv + "=" + path}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: c.uid, Gid: c.uid}}
		var exit *exec.ExitError
		if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		if got := cmd.ProcessState.ExitCode(); got != c.exit {
			t.Errorf("user %d: exit code %d, want %d", c.uid, got, c.exit)
			continue
		}
		if c.exit == 0 {
			if w := <-who; w != (Who{User: true, UID: int(c.uid)}) {
				t.Errorf("user %d is taken for %s", c.uid, w)
			}
		} else if cause := <-strangers; cause != Stranger {
			t.Errorf("user %d: refused for %s", c.uid, cause)
		}
	}
}

// TestPlainTCP: a TCP connection without TLS is believed only where that is said.
func TestPlainTCP(t *testing.T) {
	a := authority(t, nil, nil)
	for _, insecure := range []bool{true, false} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		plain := PlainListener{Listener: ln, Authority: a, On: OnAdmin, Insecure: insecure}
		done := make(chan Who, 1)
		go func() {
			c, err := plain.Accept()
			if err != nil {
				done <- Who{}
				return
			}
			defer c.Close()
			done <- c.(interface{ Who() Who }).Who()
		}()
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("a word from nowhere")
		}
		c.Close()
		ln.Close()
		if w := <-done; w.Insecure != insecure {
			t.Errorf("insecure %v: taken for %s", insecure, w)
		}
	}
}
