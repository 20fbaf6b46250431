package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stopGrace is how long a process may take after SIGTERM before it is killed.
const stopGrace = Patience

// clockTicks is USER_HZ, the unit of the times in /proc/PID/stat: 100 on every Linux that Go runs on.
const clockTicks = 100

// ProcessConfig says what to start and how to know that it is up.
type ProcessConfig struct {
	Name  string   // for messages; default the base name of Path
	Path  string   // program
	Args  []string // without the program
	Env   []string // added to this process's environment, "K=V"
	Dir   string   // working directory; default this one's
	Log   string   // file that gets stdout and stderr, appended to; required
	Ready func(context.Context) error
	// ReadyTimeout bounds the wait for Ready. Default Patience.
	ReadyTimeout time.Duration
}

// Process is a running child. Its methods may be called from several goroutines.
type Process struct {
	cfg  ProcessConfig
	cmd  *exec.Cmd
	done chan struct{} // closed once the child has been waited for
	err  error         // of Wait; read after done
}

// StartProcess starts a child and waits until cfg.Ready passes; without Ready it returns at once. A child that ends or
// does not get ready in time is killed, and the error carries the tail of its log. ctx bounds the start, not the life.
func StartProcess(ctx context.Context, cfg ProcessConfig) (*Process, error) {
	if cfg.Name == "" {
		cfg.Name = filepath.Base(cfg.Path)
	}
	if cfg.ReadyTimeout == 0 {
		cfg.ReadyTimeout = Patience
	}
	log, err := os.OpenFile(cfg.Log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", cfg.Name, err)
	}
	defer log.Close() // the child has its own descriptor
	cmd := exec.Command(cfg.Path, cfg.Args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = cfg.Dir, log, log
	cmd.Env = append(os.Environ(), cfg.Env...)
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", cfg.Name, err)
	}
	p := &Process{cfg: cfg, cmd: cmd, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	if cfg.Ready == nil {
		return p, nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, cfg.ReadyTimeout, fmt.Errorf("not ready after %s", cfg.ReadyTimeout))
	defer cancel()
	if err := poll(ctx, p.done, cfg.Ready); err != nil {
		p.Kill()
		return nil, fmt.Errorf("start %s: %w\n%s", cfg.Name, err, p.LogTail(4096))
	}
	return p, nil
}

// PID returns the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Exited is closed when the process has ended.
func (p *Process) Exited() <-chan struct{} { return p.done }

// Signal sends a signal; it is an error when the process has ended.
func (p *Process) Signal(sig os.Signal) error { return p.cmd.Process.Signal(sig) }

// Kill ends the process at once (SIGKILL) and waits for it.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill() // already ended is as good
	<-p.done
}

// Stop asks the process to end (SIGTERM), waits for it at most Patience or until ctx ends, then kills it; having to
// kill is an error. A process that ended otherwise than by that signal or with status 0 is an error too.
func (p *Process) Stop(ctx context.Context) error {
	if err := p.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop %s: %w", p.cfg.Name, err)
	}
	grace := time.NewTimer(stopGrace)
	defer grace.Stop()
	select {
	case <-p.done:
	case <-grace.C:
		p.Kill()
		return fmt.Errorf("stop %s: killed, still there after %s\n%s", p.cfg.Name, stopGrace, p.LogTail(4096))
	case <-ctx.Done():
		p.Kill()
		return fmt.Errorf("stop %s: killed: %w", p.cfg.Name, context.Cause(ctx))
	}
	if exit, ok := errors.AsType[*exec.ExitError](p.err); ok {
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() && ws.Signal() == syscall.SIGTERM {
			return nil
		}
	}
	if p.err != nil {
		return fmt.Errorf("stop %s: %w\n%s", p.cfg.Name, p.err, p.LogTail(4096))
	}
	return nil
}

// Wait waits until the process has ended or ctx has, and returns how it ended (nil, an *exec.ExitError or ctx's error).
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// LogTail returns the last n bytes of the log, or why it cannot be read.
func (p *Process) LogTail(n int) string {
	b, err := os.ReadFile(p.cfg.Log)
	if err != nil {
		return err.Error()
	}
	if len(b) > n {
		b = b[len(b)-n:]
	}
	return string(b)
}

// CPU returns the time the process has spent on processors so far, user and system, in steps of 10 ms.
func (p *Process) CPU() (time.Duration, error) { return CPUOf(p.PID()) }

// CPUOf is Process.CPU for any process id (proc(5), /proc/PID/stat fields 14 and 15).
func CPUOf(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("cpu time: %w", err)
	}
	d, err := parseStat(b)
	if err != nil {
		return 0, fmt.Errorf("cpu time of %d: %w", pid, err)
	}
	return d, nil
}

// parseStat reads utime and stime. The second field is the name in parentheses and may itself hold spaces and
// parentheses, so fields are counted from the last one.
func parseStat(b []byte) (time.Duration, error) {
	i := bytes.LastIndexByte(b, ')')
	fields := strings.Fields(string(b[i+1:]))
	if i < 0 || len(fields) < 13 {
		return 0, fmt.Errorf("malformed stat %q", b)
	}
	var ticks uint64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseUint(f, 10, 63)
		if err != nil {
			return 0, fmt.Errorf("malformed stat %q: %w", b, err)
		}
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / clockTicks), nil
}

// RSS returns the resident memory in bytes (proc(5), VmRSS of /proc/PID/status).
func (p *Process) RSS() (uint64, error) { return p.memory("VmRSS") }

// PeakRSS returns the most there was of it (VmHWM), since the process began or since ResetPeak.
func (p *Process) PeakRSS() (uint64, error) { return p.memory("VmHWM") }

// ResetPeak has the kernel count PeakRSS anew (proc(5), clear_refs). Where it does not, PeakRSS is that of the process's life.
func (p *Process) ResetPeak() {
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", p.PID()), []byte("5"), 0)
}

func (p *Process) memory(field string) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
	if err != nil {
		return 0, fmt.Errorf("resident memory: %w", err)
	}
	n, err := parseMemory(b, field)
	if err != nil {
		return 0, fmt.Errorf("resident memory of %d: %w", p.PID(), err)
	}
	return n, nil
}

func parseMemory(b []byte, field string) (uint64, error) {
	for line := range strings.Lines(string(b)) {
		rest, ok := strings.CutPrefix(line, field+":")
		if !ok {
			continue
		}
		kib, ok := strings.CutSuffix(strings.TrimSpace(rest), " kB")
		if !ok {
			return 0, fmt.Errorf("malformed %s %q", field, line)
		}
		n, err := strconv.ParseUint(strings.TrimSpace(kib), 10, 53)
		if err != nil {
			return 0, fmt.Errorf("malformed %s %q: %w", field, line, err)
		}
		return n << 10, nil
	}
	return 0, fmt.Errorf("no %s", field)
}

// Freeze stops the process from running (SIGSTOP) without ending it: its sockets stay, nothing is answered.
func (p *Process) Freeze() error { return p.Signal(unix.SIGSTOP) }

// Thaw undoes Freeze.
func (p *Process) Thaw() error { return p.Signal(unix.SIGCONT) }
