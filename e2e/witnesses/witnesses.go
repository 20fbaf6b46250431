// Package witnesses runs the witnesses of others, as their authors wrote them, against a log of ours: litewitness, of torchwood, and
// omniwitness, of transparency-dev. End-to-end tests call it.
//
// Each is a program of its own, built from a pinned version (e2e/tools/witnesses), on loopback, with its ordinary configuration: a
// database in a file and one log, of which it is told the identity key and nothing else. That is written before the first request
// and never touched after; Untouched says so at the end. Checkpoints come to them as C2SP's tlog-witness has it: with a proof that
// the tree grew out of the one they cosigned last.
//
// It promises that a checkpoint which Cosign accepts carries a cosignature of each, under a torchwood policy that demands both. It
// promises nothing about their speed, and polls nothing: they see what they are given.
package witnesses

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/crypto/ssh"
	"golang.org/x/mod/sumdb/note"

	"github.com/knhk/sidecar/e2e/harness"
)

// buildLimit is for a cold cache on a busy machine; a warm one takes a second or two.
const buildLimit = 15 * time.Minute

// Build builds the programs; see harness.BuildTools.
func Build(ctx context.Context) (dir string, err error) {
	return harness.BuildTools(ctx, "witnesses", buildLimit)
}

// Require is Build for tests: without the programs it skips the test, with CI=true it fails it.
func Require(t harness.TB) string {
	t.Helper()
	dir, err := Build(t.Context())
	if err != nil && os.Getenv("CI") == "true" {
		t.Fatalf("%v", err)
	}
	if err != nil {
		t.Skipf("no witnesses to test against: %v", err)
	}
	return dir
}

// Set is litewitness and omniwitness, running. Its methods are for one goroutine.
type Set struct {
	programs  string
	log       note.Verifier
	logKey    string
	dir       string // configurations, databases, logs
	yaml      []byte // omniwitness's list of logs, as it was written
	witnesses []*witness
	policy    torchwood.Policy // the log and both witnesses
	last      torchwood.Checkpoint
}

// witness is one of them.
type witness struct {
	name string // in the policy
	vkey string
	url  string // of add-checkpoint
	size int64  // that it cosigned last
}

// Start starts both for the log with that verifier key, from the directory that Build returned. The test stops them when it ends.
func Start(t harness.TB, programs, logKey string) *Set {
	t.Helper()
	v, err := torchwood.NewLogVerifier(logKey)
	if err != nil {
		t.Fatalf("start witnesses: %v", err)
	}
	s := &Set{programs: programs, log: v, logKey: logKey, dir: harness.Directory(t, "")}
	s.startLite(t)
	s.startOmni(t)
	policy := "log " + logKey + "\n"
	var names []string
	for _, w := range s.witnesses {
		policy += "witness " + w.name + " " + w.vkey + "\n"
		names = append(names, w.name)
	}
	policy += "group both all " + strings.Join(names, " ") + "\nquorum both\n"
	if s.policy, err = torchwood.ParsePolicy([]byte(policy)); err != nil {
		t.Fatalf("policy of the witnesses: %v\n%s", err, policy)
	}
	return s
}

func (s *Set) database() string { return filepath.Join(s.dir, "litewitness.db") }

// startLite makes a key, which litewitness uses through an SSH agent, and its database, with witnessctl.
func (s *Set) startLite(t harness.TB) {
	t.Helper()
	const name = "litewitness.test/w"
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatalf("litewitness: %v", err)
	}
	sshKey, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatalf("litewitness: %v", err)
	}
	for _, args := range [][]string{
		{"add-log", "-db", s.database(), "-origin", s.log.Name()},
		{"add-key", "-db", s.database(), "-origin", s.log.Name(), "-key", s.logKey},
	} {
		if _, err := s.witnessctl(t.Context(), args...); err != nil {
			t.Fatalf("%v", err)
		}
	}
	addr, err := harness.FreeAddr()
	if err != nil {
		t.Fatalf("litewitness: %v", err)
	}
	harness.RunProcess(t, harness.ProcessConfig{
		Path: filepath.Join(s.programs, "litewitness"), Dir: s.dir, Log: filepath.Join(s.dir, "litewitness.log"),
		Args: []string{"-name", name, "-db", s.database(), "-listen", addr, "-ssh-agent", serveAgent(t, key),
			"-key", ssh.FingerprintSHA256(sshKey)},
		Ready: harness.TCPReady(addr),
	})
	s.add(t, "litewitness", name, addr, key)
}

// startOmni writes omniwitness's key and its list of logs. It adds that list to the one it comes with; it is not told to follow a
// public list, to distribute anything or to reach a bastion, so it calls nobody.
func (s *Set) startOmni(t harness.TB) {
	t.Helper()
	const name = "omniwitness.test/w"
	secret, _, err := note.GenerateKey(rand.Reader, name)
	if err != nil {
		t.Fatalf("omniwitness: %v", err)
	}
	// PRIVATE+KEY+name+hash+base64 of algorithm and seed; base64 may hold a "+" of its own.
	seed, err := base64.StdEncoding.DecodeString(strings.SplitN(secret, "+", 5)[4])
	if err != nil || len(seed) != 1+ed25519.SeedSize {
		t.Fatalf("omniwitness: key of %d bytes: %v", len(seed), err)
	}
	s.yaml = fmt.Appendf(nil, "Logs:\n  - Origin: %s\n    PublicKey: %s\n", s.log.Name(), s.logKey)
	if err := os.WriteFile(s.list(), s.yaml, 0o400); err != nil {
		t.Fatalf("omniwitness: %v", err)
	}
	keyFile := filepath.Join(s.dir, "omniwitness.key")
	if err := os.WriteFile(keyFile, []byte(secret), 0o400); err != nil {
		t.Fatalf("omniwitness: %v", err)
	}
	addr, err := harness.FreeAddr()
	if err != nil {
		t.Fatalf("omniwitness: %v", err)
	}
	harness.RunProcess(t, harness.ProcessConfig{
		Path: filepath.Join(s.programs, "omniwitness"), Dir: s.dir, Log: filepath.Join(s.dir, "omniwitness.log"),
		Args: []string{"-listen", addr, "-metrics_listen", "", "-db_file", filepath.Join(s.dir, "omniwitness.db"),
			"-private_key_path", keyFile, "-additional_logs", s.list()},
		Ready: harness.TCPReady(addr),
	})
	s.add(t, "omniwitness", name, addr, ed25519.NewKeyFromSeed(seed[1:]))
}

func (s *Set) list() string { return filepath.Join(s.dir, "omniwitness.yaml") }

func (s *Set) add(t harness.TB, name, keyName, addr string, key ed25519.PrivateKey) {
	t.Helper()
	signer, err := torchwood.NewCosignatureSigner(keyName, key)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	s.witnesses = append(s.witnesses, &witness{name: name, vkey: signer.Verifier().String(), url: "http://" + addr + "/add-checkpoint"})
}

// witnessctl runs litewitness's tool.
func (s *Set) witnessctl(ctx context.Context, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, harness.Patience)
	defer cancel()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(s.programs, "witnessctl"), args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("witnessctl %s: %w: %s", args[0], err, stderr.Bytes())
	}
	return out, nil
}

// Untouched reports whether both witnesses are configured as they were at the start: one log, one key of it.
func (s *Set) Untouched(ctx context.Context) error {
	now, err := os.ReadFile(s.list())
	if err != nil {
		return fmt.Errorf("omniwitness's list of logs: %w", err)
	}
	if !bytes.Equal(now, s.yaml) {
		return fmt.Errorf("omniwitness's list of logs is not what it was:\n%s\nwas\n%s", now, s.yaml)
	}
	out, err := s.witnessctl(ctx, "list-logs", "-db", s.database())
	if err != nil {
		return err
	}
	var entry struct {
		Origin string
		Size   int64
		Root   []byte `json:"root_hash"`
		Keys   []string
	}
	if err := json.Unmarshal(out, &entry); err != nil {
		return fmt.Errorf("litewitness's one log: %w: %s", err, out)
	}
	if entry.Origin != s.log.Name() || len(entry.Keys) != 1 || entry.Keys[0] != s.logKey {
		return fmt.Errorf("litewitness follows %s, was to follow %s", out, s.logKey)
	}
	if s.last.N > 0 && (entry.Size != s.last.N || !bytes.Equal(entry.Root, s.last.Hash[:])) {
		return errors.New("litewitness holds another tree than it cosigned last")
	}
	return nil
}
