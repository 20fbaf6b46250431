// Package spire runs a real SPIRE, server and agent, on this machine, so that end-to-end tests get identities from the issuer that users
// have. `make test-spire` calls it.
//
// Both are programs of SPIRE's authors, built from a pinned version (e2e/tools/spire), on loopback and unix sockets in one directory:
// SQLite, a join token, workloads known by the path of their executable. It promises that what Register names can fetch its SVID soon
// after: within two seconds on a machine at rest, and a workload has to wait for its SVID anyway. SVIDs live for a minute unless told
// otherwise; nothing is kept.
package spire

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/knhk/sidecar/e2e/harness"
)

// buildLimit is for a cold cache on a busy machine: ten minutes of one processor. A warm one takes some seconds.
const buildLimit = 40 * time.Minute

// Build builds spire-server and spire-agent; see harness.BuildTools.
func Build(ctx context.Context) (dir string, err error) {
	return harness.BuildTools(ctx, "spire", buildLimit, "-trimpath", "-ldflags", "-s -w")
}

// Config says what to run.
type Config struct {
	Programs    string // the directory that Build returned
	Dir         string // made if it is not there; everything goes here, sockets too, so its path must be short; required
	TrustDomain string // such as "knhk.test"; required
	TTL         time.Duration
}

// Workload is a program, and the SVID it gets.
type Workload struct {
	Exe string // path of its executable, without symbolic links
	ID  string
	TTL time.Duration // default Config.TTL
	DNS []string      // names for clients that check one
}

// SPIRE is a server and its agent, running.
type SPIRE struct {
	cfg           Config
	server, agent *harness.Process
	entries       int
}

const serverConf = `server {
  bind_address = "127.0.0.1"
  bind_port = "PORT"
  socket_path = "DIR/server.sock"
  trust_domain = "DOMAIN"
  data_dir = "DIR/server"
  log_level = "INFO"
  ca_ttl = "24h"
  default_x509_svid_ttl = "TTL"
  experimental { cache_reload_interval = "1s" }
}
plugins {
  DataStore "sql" {
    plugin_data {
      database_type = "sqlite3"
      connection_string = "DIR/server/datastore.sqlite3"
    }
  }
  KeyManager "disk" { plugin_data { keys_path = "DIR/server/keys.json" } }
  NodeAttestor "join_token" { plugin_data {} }
}
`

const agentConf = `agent {
  server_address = "127.0.0.1"
  server_port = "PORT"
  socket_path = "DIR/agent.sock"
  trust_domain = "DOMAIN"
  data_dir = "DIR/agent"
  trust_bundle_path = "DIR/bundle.pem"
  log_level = "INFO"
  experimental { sync_interval = "1s" }
  sds {
    default_svid_name = "default"
    default_bundle_name = "ROOTCA"
    default_all_bundles_name = "ALL"
  }
}
plugins {
  KeyManager "disk" { plugin_data { directory = "DIR/agent" } }
  NodeAttestor "join_token" { plugin_data {} }
  WorkloadAttestor "unix" { plugin_data { discover_workload_path = true } }
}
`

// token is in what `spire-server token generate` prints.
var token = regexp.MustCompile(`(?m)^Token: (\S+)$`)

// Start starts the server, and an agent that the server knows. Stop ends both.
func Start(ctx context.Context, cfg Config) (_ *SPIRE, err error) {
	if cfg.TTL == 0 {
		cfg.TTL = time.Minute
	}
	if n := len(filepath.Join(cfg.Dir, "server.sock")); n > 107 {
		return nil, fmt.Errorf("start spire: a socket below %s would have a path of %d bytes, the kernel takes 107", cfg.Dir, n)
	}
	s := &SPIRE{cfg: cfg}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start spire: %w", err), s.Stop(context.WithoutCancel(ctx)))
		}
	}()
	port, err := harness.FreePort()
	if err != nil {
		return nil, err
	}
	for _, d := range []string{"server", "agent"} {
		if err := os.MkdirAll(filepath.Join(cfg.Dir, d), 0o700); err != nil {
			return nil, err
		}
	}
	fill := strings.NewReplacer(`"PORT"`, fmt.Sprintf("%q", fmt.Sprint(port)), `"DIR/`, `"`+cfg.Dir+`/`, `"DOMAIN"`, fmt.Sprintf("%q", cfg.TrustDomain), `"TTL"`, fmt.Sprintf("%q", cfg.TTL))
	for name, text := range map[string]string{"server.conf": serverConf, "agent.conf": agentConf} {
		if err := os.WriteFile(filepath.Join(cfg.Dir, name), []byte(fill.Replace(text)), 0o600); err != nil {
			return nil, err
		}
	}
	s.server, err = harness.StartProcess(ctx, harness.ProcessConfig{
		Path: filepath.Join(cfg.Programs, "spire-server"), Args: []string{"run", "-config", filepath.Join(cfg.Dir, "server.conf")},
		Dir: cfg.Dir, Log: filepath.Join(cfg.Dir, "spire-server.log"),
		Ready: func(ctx context.Context) error { _, err := s.ask(ctx, "healthcheck"); return err },
	})
	if err != nil {
		return nil, err
	}
	bundle, err := s.ask(ctx, "bundle", "show")
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(cfg.Dir, "bundle.pem"), bundle, 0o600); err != nil {
		return nil, err
	}
	out, err := s.ask(ctx, "token", "generate", "-spiffeID", s.agentID())
	if err != nil {
		return nil, err
	}
	found := token.FindSubmatch(out)
	if found == nil {
		return nil, fmt.Errorf("no join token in %q", out)
	}
	s.agent, err = harness.StartProcess(ctx, harness.ProcessConfig{
		Path: filepath.Join(cfg.Programs, "spire-agent"),
		Args: []string{"run", "-config", filepath.Join(cfg.Dir, "agent.conf"), "-joinToken", string(found[1])},
		Dir:  cfg.Dir, Log: filepath.Join(cfg.Dir, "spire-agent.log"),
		Ready: func(context.Context) error { _, err := os.Stat(s.Socket()); return err },
	})
	return s, err
}

func (s *SPIRE) agentID() string { return "spiffe://" + s.cfg.TrustDomain + "/agent" }

// Socket is the path of the agent's socket: the Workload API, and SDS.
func (s *SPIRE) Socket() string { return filepath.Join(s.cfg.Dir, "agent.sock") }

// ask runs a command of spire-server against the server.
func (s *SPIRE) ask(ctx context.Context, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, harness.Patience)
	defer cancel()
	n := 1
	if args[0] != "healthcheck" {
		n = 2 // "bundle show"
	}
	all := append(append(append([]string{}, args[:n]...), "-socketPath", filepath.Join(s.cfg.Dir, "server.sock")), args[n:]...)
	cmd := exec.CommandContext(ctx, filepath.Join(s.cfg.Programs, "spire-server"), all...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("spire-server %s: %w: %s%s", strings.Join(args[:n], " "), err, out, stderr.Bytes())
	}
	return out, nil
}

// entry is one of `spire-server entry create -data`.
type entry struct {
	Selectors []selector `json:"selectors"`
	ParentID  string     `json:"parent_id"`
	ID        string     `json:"spiffe_id"`
	TTL       int        `json:"x509_svid_ttl"` // seconds
	DNS       []string   `json:"dns_names,omitempty"`
}

type selector struct {
	Type  string `json:"type"`
	Value string `json:"value"`
}

// Register has SVIDs issued to programs of this user, as soon as the agent has heard of it.
func (s *SPIRE) Register(ctx context.Context, workloads ...Workload) error {
	var data struct {
		Entries []entry `json:"entries"`
	}
	for _, w := range workloads {
		ttl := w.TTL
		if ttl == 0 {
			ttl = s.cfg.TTL
		}
		data.Entries = append(data.Entries, entry{
			Selectors: []selector{{"unix", "path:" + w.Exe}, {"unix", fmt.Sprintf("uid:%d", os.Geteuid())}},
			ParentID:  s.agentID(), ID: w.ID, TTL: int(ttl / time.Second), DNS: w.DNS,
		})
	}
	b, err := json.Marshal(data)
	if err != nil {
		return fmt.Errorf("register with spire: %w", err)
	}
	s.entries += len(workloads)
	file := filepath.Join(s.cfg.Dir, fmt.Sprintf("entries-%d.json", s.entries))
	if err := os.WriteFile(file, b, 0o600); err != nil {
		return fmt.Errorf("register with spire: %w", err)
	}
	if _, err := s.ask(ctx, "entry", "create", "-data", file); err != nil {
		return fmt.Errorf("register with spire: %w", err)
	}
	return nil
}

// Stop ends the agent, then the server.
func (s *SPIRE) Stop(ctx context.Context) error {
	var errs []error
	for _, p := range []*harness.Process{s.agent, s.server} {
		if p != nil {
			errs = append(errs, p.Stop(ctx))
		}
	}
	return errors.Join(errs...)
}
