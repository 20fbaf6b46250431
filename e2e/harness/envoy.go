package harness

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// EnvoyConfig says how to run Envoy. Only Bootstrap and Dir are required.
type EnvoyConfig struct {
	Binary      string // default FindEnvoy()
	Bootstrap   []byte // the configuration, YAML. Listeners and admin may use port 0; see Envoy.Admin and Envoy.Listener
	Dir         string // for the configuration and the log
	Work        string // working directory, to which paths in the configuration are relative; default this one's
	Name        string // file name stem in Dir; default "envoy"
	Concurrency int    // worker threads; default 1
	LogLevel    string // default "warning"; one of Envoy's levels, or "info" with components after a comma: "info,ext_proc:debug"
}

// Envoy is a running Envoy.
type Envoy struct {
	*Process
	admin string
}

// StartEnvoy starts Envoy and waits until /ready on its admin interface says LIVE.
func StartEnvoy(ctx context.Context, cfg EnvoyConfig) (*Envoy, error) {
	if cfg.Binary == "" {
		bin, err := FindEnvoy()
		if err != nil {
			return nil, fmt.Errorf("start envoy: %w", err)
		}
		cfg.Binary = bin
	}
	if cfg.Name == "" {
		cfg.Name = "envoy"
	}
	if cfg.Concurrency == 0 {
		cfg.Concurrency = 1
	}
	stem := filepath.Join(cfg.Dir, cfg.Name)
	if err := os.WriteFile(stem+".yaml", cfg.Bootstrap, 0o600); err != nil {
		return nil, fmt.Errorf("start envoy: %w", err)
	}
	if err := os.Remove(stem + ".admin"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("start envoy: %w", err)
	}
	level, components, _ := strings.Cut(orDefault(cfg.LogLevel, "warning"), ",")
	args := []string{
		"-c", stem + ".yaml", "--admin-address-path", stem + ".admin", "--disable-hot-restart",
		"--concurrency", strconv.Itoa(cfg.Concurrency), "-l", level,
	}
	if components != "" {
		args = append(args, "--component-log-level", components)
	}
	e := &Envoy{}
	p, err := StartProcess(ctx, ProcessConfig{
		Name: cfg.Name, Path: cfg.Binary, Args: args, Log: stem + ".log", Dir: cfg.Work,
		ReadyTimeout: Patience,
		Ready: func(ctx context.Context) error {
			addr, err := os.ReadFile(stem + ".admin")
			if err != nil {
				return err
			}
			if _, _, err := net.SplitHostPort(string(addr)); err != nil {
				return err // not written whole yet
			}
			e.admin = string(addr)
			_, err = Get(ctx, "http://"+e.admin+"/ready")
			return err
		},
	})
	if err != nil {
		return nil, err
	}
	e.Process = p
	return e, nil
}

// RunEnvoy is StartEnvoy for tests: RequireEnvoy, a temporary directory, Stop at the end, and the log shown when the
// test failed. Fields of cfg that are set stay.
func RunEnvoy(t TB, cfg EnvoyConfig) *Envoy {
	t.Helper()
	if cfg.Binary == "" {
		cfg.Binary = RequireEnvoy(t)
	}
	if cfg.Dir == "" {
		cfg.Dir = t.TempDir()
	}
	e, err := StartEnvoy(t.Context(), cfg)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() { StopTest(t, e.Process) })
	return e
}

// RunProcess is StartProcess for tests, with the same care as RunEnvoy. The log goes to the test's temporary directory
// unless cfg names one.
func RunProcess(t TB, cfg ProcessConfig) *Process {
	t.Helper()
	if cfg.Log == "" {
		cfg.Log = filepath.Join(t.TempDir(), filepath.Base(cfg.Path)+".log")
	}
	p, err := StartProcess(t.Context(), cfg)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() { StopTest(t, p) })
	return p
}

// StopTest ends a process at the end of a test and shows its log if the test failed. A process that the test has ended
// itself is left alone.
func StopTest(t TB, p *Process) {
	t.Helper()
	select {
	case <-p.Exited():
	default:
		if err := p.Stop(context.WithoutCancel(t.Context())); err != nil {
			t.Logf("%v", err)
		}
	}
	if t.Failed() {
		t.Logf("log of %s:\n%s", p.cfg.Name, p.LogTail(16<<10))
	}
}

// Validate runs Envoy in validation mode over a configuration; the error carries what Envoy said.
func Validate(ctx context.Context, binary, path string) error {
	log := path + ".validate.log"
	p, err := StartProcess(ctx, ProcessConfig{Name: "envoy validate", Path: binary, Log: log,
		Args: []string{"--mode", "validate", "-c", path, "-l", "warning"}})
	if err != nil {
		return err
	}
	if err := p.Wait(ctx); err != nil {
		p.Kill()
		return fmt.Errorf("validate %s: %w\n%s", path, err, p.LogTail(4096))
	}
	return os.Remove(log)
}

// Admin returns host:port of the admin interface.
func (e *Envoy) Admin() string { return e.admin }

// Listener returns host:port that the named listener is bound to.
func (e *Envoy) Listener(ctx context.Context, name string) (string, error) {
	body, err := Get(ctx, "http://"+e.admin+"/listeners?format=json")
	if err != nil {
		return "", fmt.Errorf("listener %s: %w", name, err)
	}
	var list struct {
		Statuses []struct {
			Name  string `json:"name"`
			Local struct {
				Socket struct {
					Address string `json:"address"`
					Port    int    `json:"port_value"`
				} `json:"socket_address"`
			} `json:"local_address"`
		} `json:"listener_statuses"`
	}
	if err := json.Unmarshal(body, &list); err != nil {
		return "", fmt.Errorf("listener %s: %w", name, err)
	}
	for _, l := range list.Statuses {
		if l.Name == name {
			return net.JoinHostPort(l.Local.Socket.Address, strconv.Itoa(l.Local.Socket.Port)), nil
		}
	}
	return "", fmt.Errorf("listener %s: not among %s", name, body)
}

// Stats returns the counters and gauges whose name matches the regular expression, histograms left out.
func (e *Envoy) Stats(ctx context.Context, re string) (map[string]uint64, error) {
	body, err := Get(ctx, "http://"+e.admin+"/stats?format=json&histogram_buckets=none&filter="+url.QueryEscape(re))
	if err != nil {
		return nil, fmt.Errorf("envoy stats: %w", err)
	}
	var list struct {
		Stats []struct {
			Name  string          `json:"name"`
			Value json.RawMessage `json:"value"`
		} `json:"stats"`
	}
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, fmt.Errorf("envoy stats: %w", err)
	}
	out := map[string]uint64{}
	for _, s := range list.Stats {
		if n, err := strconv.ParseUint(string(s.Value), 10, 64); err == nil && s.Name != "" {
			out[s.Name] = n
		}
	}
	return out, nil
}

// Stat returns one counter or gauge by its exact name; 0 for one that Envoy has not created yet.
func (e *Envoy) Stat(ctx context.Context, name string) (uint64, error) {
	stats, err := e.Stats(ctx, "^"+regexp.QuoteMeta(name)+"$")
	if err != nil {
		return 0, err
	}
	return stats[name], nil
}

func orDefault(s, def string) string {
	if s == "" {
		return def
	}
	return s
}
