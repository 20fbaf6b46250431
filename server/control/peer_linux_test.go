package control

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

// dialEnv makes this test binary the client of a control socket.
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

// TestPeer: another user is turned away even where the modes would let it in; root and the own user are not.
func TestPeer(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be another user")
	}
	dir, err := os.MkdirTemp("/tmp", "knhk") // a short path that other users reach
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ln, err := Listen(t.Context(), dir, quiet())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	path := dir + "/" + Name
	exe, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = errors.Join(os.WriteFile(dir+"/client", exe, 0o755), os.Chmod(dir, 0o755), os.Chmod(path, 0o666))
	}
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Write([]byte("!"))
			c.Close()
		}
	}()
	for uid, want := range map[uint32]int{0: 0, 65534: 3} {
		cmd := exec.CommandContext(t.Context(), dir+"/client")
		cmd.Env = []string{dialEnv + "=" + path}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		var exit *exec.ExitError
		if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		if got := cmd.ProcessState.ExitCode(); got != want {
			t.Errorf("user %d: exit code %d, want %d", uid, got, want)
		}
	}
}
