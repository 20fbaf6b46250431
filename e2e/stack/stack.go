// Package stack runs the whole of knhk for end-to-end tests and the demo: the real Envoy with the bootstrap that `knhk bootstrap`
// writes, the knhk program, and an upstream that behaves as the path asks.
//
// It promises that a stack is what a user gets from the README's commands, in one directory, with keys in a SoftHSM token where
// SoftHSM is there; with Config.Replicas, several knhk behind one Envoy, each with an origin, state and keys of its own. It
// judges nothing. Nothing here is for production.
package stack

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/knhk/sidecar/crypto/hsm/softhsm"
	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/e2e/harness"
)

// Config says what to run.
type Config struct {
	Dir  string // everything goes here; required
	Soft bool   // software keys even where SoftHSM is there
	// YAML is what follows origin, instance, state_dir, listeners and keys in knhk.yaml. UPSTREAM, GRPC and DEAD stand for the
	// addresses of the upstream, its gRPC server and a port where nobody listens.
	YAML string
	// Capture is lean (default) or full.
	Capture string
	// Args are added to `knhk serve`.
	Args []string
	// EnvoyLog is Envoy's log level; default "warning".
	EnvoyLog string
	// EditBootstrap may change what `knhk bootstrap` wrote before Envoy gets it.
	EditBootstrap func([]byte) []byte
	// UnixSocket has Envoy talk to knhk over a unix socket.
	UnixSocket bool
	// Race has the service built with the race detector; the commands are not.
	Race bool
	// Replicas is how many knhk stand behind the Envoy; default 1. See Stack.Others.
	Replicas int
	// Identity has everybody use mutual TLS. nil: plain text, on loopback.
	Identity *Identity
}

// Stack is a running whole.
type Stack struct {
	Config
	Bin        string // the knhk program
	ConfigFile string
	StateDir   string
	EnvoyFile  string
	Admin      string // knhk's admin listener
	Tiles      string
	Probes     string // /livez and /readyz, in the plain
	Sidecar    string // knhk's listener for Envoy
	Listener   string // Envoy's listener
	EnvoyAdmin string
	Custody    string // where the keys live, in words

	Instance string // "a", then "b" and so on

	Upstream *harness.Upstream
	Knhk     *harness.Process
	Envoy    *harness.Envoy

	// Others are the replicas beside this one: stacks without an upstream or an Envoy of their own, in directories below Dir.
	// Start and Stop of the first stack include them.
	Others []*Stack

	env    []string
	origin string
	keyURI func(label string) string
	starts int
	race   string // the program that serves; empty: Bin

	replicas []*Stack // all of them, for every one's configuration

	issuing *issuing // nil without Identity; that of the first stack for all
	server  string   // the program that serves, with Identity
	cli     string   // the program of the commands, with an ID of its own; empty: Bin
}

var (
	build     = sync.OnceValues(func() (string, error) { return goBuild("knhk") })
	buildRace = sync.OnceValues(func() (string, error) { return goBuild("knhk-race", "-race") })
)

func goBuild(name string, flags ...string) (string, error) {
	root, err := harness.ModuleRoot()
	if err != nil {
		return "", err
	}
	// Built into the ignored bin/ of the module, so that one build serves every test binary of a run. Without -trimpath, so that what go
	// test has compiled before is not compiled once more.
	bin := filepath.Join(root, "bin", name)
	cmd := exec.Command("go", append(append([]string{"build"}, flags...), "-o", bin, "./server/knhk")...)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build knhk: %w\n%s", err, out)
	}
	return bin, nil
}

// Build builds the knhk program, once for all tests of a run, and returns its path.
func Build() (string, error) { return build() }

// New prepares a stack: program, keys, upstream and files. It starts the upstream only, and with Config.Identity the issuer.
func New(ctx context.Context, cfg Config) (*Stack, error) {
	bin, err := build()
	if err != nil {
		return nil, err
	}
	race := ""
	if cfg.Race {
		if race, err = buildRace(); err != nil {
			return nil, err
		}
	}
	s, err := prepare(cfg, bin, "a")
	if err != nil {
		return nil, err
	}
	for i := 1; i < cfg.Replicas; i++ {
		instance, sub := string(rune('a'+i)), cfg
		sub.Dir = filepath.Join(cfg.Dir, instance)
		other, err := prepare(sub, bin, instance)
		if err != nil {
			return nil, err
		}
		other.Listener, other.EnvoyAdmin, other.origin = s.Listener, s.EnvoyAdmin, s.origin+"-"+instance
		s.Others = append(s.Others, other)
	}
	s.race = race
	if cfg.Identity != nil {
		if err := s.startIssuer(ctx); err != nil {
			return nil, errors.Join(err, s.stopIssuer(context.WithoutCancel(ctx)))
		}
	}
	if s.Upstream, err = harness.StartUpstreamTLS(s.upstreamTLS()); err != nil {
		return nil, errors.Join(err, s.stopIssuer(context.WithoutCancel(ctx)))
	}
	for _, r := range s.All() {
		r.Upstream, r.replicas, r.race, r.issuing, r.server, r.cli, r.Identity = s.Upstream, s.All(), race, s.issuing, s.server, s.cli, s.Identity
		if err := r.WriteConfig(cfg.YAML); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// prepare makes the directory, keys and addresses of one knhk.
func prepare(cfg Config, bin, instance string) (*Stack, error) {
	s := &Stack{Config: cfg, Bin: bin, StateDir: filepath.Join(cfg.Dir, "state"), ConfigFile: filepath.Join(cfg.Dir, "knhk.yaml"),
		EnvoyFile: filepath.Join(cfg.Dir, "envoy.yaml"), origin: "example.com/knhk/e2e", Instance: instance}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	if err := s.makeKeys(); err != nil {
		return nil, err
	}
	for _, a := range []*string{&s.Admin, &s.Tiles, &s.Probes, &s.Sidecar, &s.Listener, &s.EnvoyAdmin} {
		var err error
		if *a, err = harness.FreeAddr(); err != nil {
			return nil, err
		}
	}
	if cfg.UnixSocket {
		s.Sidecar = "unix:" + filepath.Join(cfg.Dir, "knhk.sock")
	}
	return s, nil
}

// All are this stack and its Others.
func (s *Stack) All() []*Stack { return append([]*Stack{s}, s.Others...) }

// makeKeys makes a token, or names a directory for software keys.
func (s *Stack) makeKeys() error {
	module, ok := softhsm.Find()
	if s.Soft || !ok {
		s.keyURI = func(label string) string { return "soft:" + filepath.Join(s.Dir, "keys") + "?label=" + label }
		s.Custody = "software keys, development only"
		return nil
	}
	const pin = "648219"
	conf, err := softhsm.InitToken(filepath.Join(s.Dir, "token"), "knhk", pin, "so-"+pin)
	if err != nil {
		return err
	}
	pinFile := filepath.Join(s.Dir, "pin")
	if err := os.WriteFile(pinFile, []byte(pin+"\n"), 0o600); err != nil {
		return err
	}
	s.env = append(s.env, softhsm.ConfEnv+"="+conf)
	s.keyURI = func(label string) string {
		return keys.URI{Scheme: "pkcs11", Token: "knhk", Module: module, Label: label, PINSource: "file:" + pinFile}.String()
	}
	s.Custody = "keys in a SoftHSM token, behind PKCS#11"
	return nil
}

// WriteConfig writes knhk.yaml; yaml is what Config.YAML says.
func (s *Stack) WriteConfig(yaml string) error {
	dead, err := harness.FreeAddr()
	if err != nil {
		return err
	}
	yaml = strings.NewReplacer("UPSTREAM", s.Upstream.HTTP(), "GRPC", s.Upstream.GRPC(), "DEAD", dead).Replace(yaml)
	capture := strings.ToUpper(s.Capture)
	if capture == "" {
		capture = "LEAN"
	}
	identity, tls := s.identityYAML()
	envoy := fmt.Sprintf("envoy:\n  listener: %s\n  admin: %s\n  capture: %s\n%s", s.Listener, s.EnvoyAdmin, capture, tls)
	if len(s.replicas) > 1 {
		envoy += "  replicas:\n"
		for _, r := range s.replicas {
			envoy += fmt.Sprintf("    - {instance: %s, address: %q}\n", r.Instance, r.Sidecar)
		}
	}
	yaml = strings.Replace(yaml, "envoy:\n", envoy, 1)
	head := fmt.Sprintf(`origin: %s
instance: %s
state_dir: %s
listeners:
  envoy: %s
  admin: %s
  tiles: %s
  probes: %s
%skeys:
  identity: {uri: %q}
  daily: {uri: %q}
shutdown: {announce: 0.2s, drain: 3s}
`, s.origin, s.Instance, s.StateDir, s.Sidecar, s.Admin, s.Tiles, s.Probes, identity, s.keyURI("identity"), s.keyURI("daily"))
	// Whole or not at all: a knhk that runs may read it at any moment.
	next := s.ConfigFile + ".next"
	if err := os.WriteFile(next, []byte(head+yaml), 0o600); err != nil {
		return err
	}
	return os.Rename(next, s.ConfigFile)
}

// Start starts knhk, every replica of it, and then Envoy.
func (s *Stack) Start(ctx context.Context) error {
	for _, r := range s.All() {
		if err := r.StartKnhk(ctx); err != nil {
			return err
		}
	}
	return s.StartEnvoy(ctx)
}

// StartKnhk starts knhk and waits until it is ready.
func (s *Stack) StartKnhk(ctx context.Context) (err error) {
	s.Knhk, err = harness.StartProcess(ctx, harness.ProcessConfig{
		Name: "knhk", Path: cmp.Or(s.server, s.race, s.Bin), Args: append([]string{"serve", "--config", s.ConfigFile}, s.Args...), Env: s.env, Dir: s.Dir,
		Log: filepath.Join(s.Dir, "knhk.log"), Ready: harness.HTTPReady("http://" + s.Probes + "/readyz"),
	})
	return err
}

// StartEnvoy starts Envoy with what `knhk bootstrap` writes.
func (s *Stack) StartEnvoy(ctx context.Context) error {
	out, err := s.Run(ctx, nil, "bootstrap", "--config", s.ConfigFile)
	if err != nil {
		return err
	}
	if s.EditBootstrap != nil {
		out = s.EditBootstrap(out)
	}
	if err := os.WriteFile(s.EnvoyFile, out, 0o600); err != nil {
		return err
	}
	s.starts++
	s.Envoy, err = harness.StartEnvoy(ctx, harness.EnvoyConfig{Bootstrap: out, Dir: s.Dir, Name: fmt.Sprintf("envoy-%d", s.starts), LogLevel: s.EnvoyLog})
	return err
}

// Stop ends Envoy and every knhk in that order, so that Envoy's access log arrives, and the upstream.
func (s *Stack) Stop(ctx context.Context) error {
	var errs []error
	if s.Envoy != nil {
		errs = append(errs, s.Envoy.Stop(ctx))
	}
	for _, r := range s.All() {
		if r.Knhk != nil {
			errs = append(errs, r.Knhk.Stop(ctx))
		}
	}
	s.Upstream.Close()
	errs = append(errs, s.stopIssuer(ctx))
	return errors.Join(errs...)
}

// CLI is the knhk program for commands: with Config.Identity a copy with an ID of its own.
func (s *Stack) CLI() string { return cmp.Or(s.cli, s.Bin) }

// Run runs the knhk program and returns its standard output. The error carries standard error.
func (s *Stack) Run(ctx context.Context, stdin []byte, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, s.CLI(), args...)
	cmd.Env = append(os.Environ(), append(s.env, "KNHK_ADMIN="+s.Admin)...)
	if s.issuing != nil {
		cmd.Env = append(cmd.Env, "KNHK_SERVER_ID="+KnhkID, "SPIFFE_ENDPOINT_SOCKET="+s.WorkloadAPI(TrustDomain))
	}
	cmd.Dir = s.Dir
	cmd.Stdin = bytes.NewReader(stdin)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.Bytes(), fmt.Errorf("knhk %s: %w: %s%s", strings.Join(args, " "), err, out.String(), errOut.String())
	}
	return out.Bytes(), nil
}

// Do sends one request to Envoy, as "client" if there is Config.Identity.
func (s *Stack) Do(ctx context.Context, r harness.Request) (*harness.Response, error) {
	c, err := s.Dial(ctx)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.Do(r)
}

// Record is one receipt of `knhk receipts list -o json`.
type Record struct {
	ID       string         `json:"id"`
	State    string         `json:"state"`
	Decision map[string]any `json:"decision"`
	Outcome  map[string]any `json:"outcome"`
}

// List returns the newest receipts, at most limit, newest first.
func (s *Stack) List(ctx context.Context, limit int, more ...string) ([]Record, error) {
	out, err := s.Run(ctx, nil, append([]string{"receipts", "list", "-o", "json", "--limit", fmt.Sprint(limit)}, more...)...)
	if err != nil {
		return nil, err
	}
	var list []Record
	return list, json.Unmarshal(out, &list)
}

// Await asks for the newest receipts until ok says that they are as expected; the last list is returned in any case.
func (s *Stack) Await(ctx context.Context, limit int, ok func([]Record) bool) ([]Record, error) {
	ctx, cancel := context.WithTimeout(ctx, harness.Patience)
	defer cancel()
	var list []Record
	for {
		next, err := s.List(ctx, limit)
		if err == nil {
			if list = next; ok(list) {
				return list, nil
			}
		}
		select {
		case <-ctx.Done():
			return list, errors.Join(fmt.Errorf("the receipts are not as expected in time: %+v", list), err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
