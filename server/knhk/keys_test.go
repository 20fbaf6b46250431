package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/hsm/softhsm"
	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/region/receiptlog"
	"github.com/knhk/sidecar/region/wal"
	"github.com/knhk/sidecar/server"
	"github.com/knhk/sidecar/server/control"
)

// settled bounds every wait: reached only when something is wrong.
const settled = 2 * time.Minute

// program runs a command line in this process.
func program(in string, args ...string) (stdout string, err error) {
	var out, errs bytes.Buffer
	cmd := root()
	cmd.SetIn(strings.NewReader(in))
	cmd.SetOut(&out)
	cmd.SetErr(&errs)
	cmd.SetArgs(args)
	err = cmd.Execute()
	return out.String(), err
}

// must runs a command line that has to do.
func must(t *testing.T, args ...string) string {
	t.Helper()
	out, err := program("", args...)
	if err != nil {
		t.Fatalf("knhk %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// mustNot runs a command line that has to be refused with one line that holds want.
func mustNot(t *testing.T, want string, args ...string) {
	t.Helper()
	out, err := program("no\n", args...)
	if err == nil || !strings.Contains(err.Error()+out, want) || strings.Contains(err.Error(), "\n") {
		t.Errorf("knhk %s: %v; want %q\n%s", strings.Join(args, " "), err, want, out)
	}
}

// service is a knhk that runs in this process.
type service struct {
	t    *testing.T
	log  *receiptlog.Log
	stop func()
}

func serve(t *testing.T, path string, opts ...server.Option) *service {
	t.Helper()
	s, err := server.New(t.Context(), path, slog.New(slog.NewTextHandler(io.Discard, nil)), opts...)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stopped := false
	stop := func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("serve: %v", err)
			}
		case <-time.After(settled):
			t.Error("serve does not stop")
		}
	}
	t.Cleanup(stop)
	return &service{t, s.Receipts(), stop}
}

// receipts records n transactions and returns their ids.
func (s *service) receipts(n int) (ids []string) {
	s.t.Helper()
	for i := range n {
		d := receipt.Decision{Class: "W1", Verdict: "admit", Reason: "ok", Rule: "route:*", Capture: "lean", Route: "pages"}
		if err := s.log.Decide(s.t.Context(), wal.Durable, &d, &receipt.Request{Method: "GET", Path: fmt.Sprintf("/%d", i)}); err != nil {
			s.t.Fatal(err)
		}
		if err := s.log.Outcome(s.t.Context(), d.ID, &policy.Outcome{Source: "als", Result: policy.ResultComplete, Status: 200}); err != nil {
			s.t.Fatal(err)
		}
		ids = append(ids, d.ID)
	}
	return ids
}

// bundles writes the bundles of receipts into a file, one a line, when all of them are there.
func (s *service) bundles(path string, ids []string) string {
	s.t.Helper()
	var all bytes.Buffer
	for _, id := range ids {
		for deadline := time.Now().Add(settled); ; {
			b, err := s.log.Bundle(s.t.Context(), id, false)
			if err == nil {
				if p, perr := receipt.ParseBundle(b); perr == nil && len(p.Records) == 2 {
					all.Write(append(bytes.TrimSpace(b), '\n'))
					break
				}
			}
			if time.Now().After(deadline) {
				s.t.Fatalf("bundle of %s: %v", id, err)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	if err := os.WriteFile(path, all.Bytes(), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

type listed struct {
	Running     bool
	Keys        []keyJSON
	Revocations []string
	Seal        string
	Undestroyed []string
}

func list(t *testing.T, cfg string) (l listed) {
	t.Helper()
	if err := json.Unmarshal([]byte(must(t, "keys", "list", "-o", "json", "--config", cfg)), &l); err != nil {
		t.Fatal(err)
	}
	return l
}

// configFor writes a knhk.yaml.
func configFor(t *testing.T, dir, name, identity, daily, more string) string {
	t.Helper()
	path := filepath.Join(dir, name+".yaml")
	text := fmt.Sprintf(`origin: example.com/keys
instance: a
state_dir: %q
listeners: {envoy: "127.0.0.1:0", admin: "127.0.0.1:0"}
insecure_loopback: true
keys:
  identity: {uri: %q}
  daily: {uri: %q}
log: {seal_every: 100ms}
shutdown: {announce: 0s, drain: 1s}
%s`, filepath.Join(dir, name), identity, daily, more)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestKeysLife is the life of the keys of a log, from its first leaf to its successor, by the commands alone: rotated twice, revoked,
// sealed, served without its token, succeeded. Bundles from before verify at every step, under the one policy file.
func TestKeysLife(t *testing.T) {
	t.Run("soft", func(t *testing.T) {
		dir := t.TempDir()
		keysLife(t, dir, func(label string) string { return "soft:" + filepath.Join(dir, "keys") + "?label=" + label },
			func() error { return os.Rename(filepath.Join(dir, "keys"), filepath.Join(dir, "away")) },
			func() error { return os.Rename(filepath.Join(dir, "away"), filepath.Join(dir, "keys")) })
	})
	t.Run("softhsm", func(t *testing.T) {
		module := softhsm.Need(t)
		dir := t.TempDir()
		hsm := filepath.Join(dir, "hsm")
		conf, err := softhsm.InitToken(hsm, "knhk", "1234", "12345678")
		if err != nil {
			t.Fatal(err)
		}
		t.Setenv(softhsm.ConfEnv, conf)
		pin := filepath.Join(dir, "pin")
		if err := os.WriteFile(pin, []byte("1234\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		keysLife(t, dir, func(label string) string {
			return keys.URI{Scheme: "pkcs11", Token: "knhk", Label: label, Module: module, PINSource: "file:" + pin}.String()
		}, func() error { return os.Rename(softhsm.TokenDir(hsm), filepath.Join(dir, "away")) },
			func() error { return os.Rename(filepath.Join(dir, "away"), softhsm.TokenDir(hsm)) })
	})
}

func keysLife(t *testing.T, dir string, uri func(label string) string, away, back func() error) {
	cfg := configFor(t, dir, "first", uri("identity"), uri("daily"), "")
	file := func(name string) string { return filepath.Join(dir, name) }

	// Nothing there yet.
	if out := must(t, "keys", "check", "--config", cfg); !strings.Contains(out, "not begun") {
		t.Errorf("check before the start:\n%s", out)
	}
	mustNot(t, "is not there", "keys", "list", "--config", cfg)
	mustNot(t, "is not there", "keys", "rotate", "--config", cfg)

	s := serve(t, cfg)
	early := s.receipts(2)
	before := s.bundles(file("before"), early)
	policyFile := filepath.Join(dir, "first", "policy")
	verify := func(what, bundles string, args ...string) {
		t.Helper()
		out, err := program("", append([]string{"verify", "--policy", policyFile, bundles}, args...)...)
		if err != nil {
			t.Errorf("%s: %v\n%s", what, err, out)
		}
	}
	verify("before any change", before)

	// Rotated twice.
	first := list(t, cfg)
	if len(first.Keys) != 2 || !first.Running || !first.Keys[1].InForce {
		t.Fatalf("keys of a new log: %+v", first)
	}
	for range 2 {
		if out := must(t, "keys", "rotate", "--config", cfg); !strings.Contains(out, "replaces  example.com/keys") {
			t.Errorf("rotate:\n%s", out)
		}
	}
	l := list(t, cfg)
	if len(l.Keys) != 4 || l.Keys[1].VKey != first.Keys[1].VKey || l.Keys[1].Ended != "rotated" || l.Keys[2].FirstSize != l.Keys[1].LastSize || !l.Keys[3].InForce {
		t.Fatalf("after two rotations: %+v", l.Keys)
	}
	middle := s.bundles(file("middle"), s.receipts(2))
	verify("from before the rotations", before)
	verify("after them", middle)
	if out := must(t, "keys", "check", "--config", cfg); !strings.Contains(out, "in force") || strings.Contains(out, "allow_exportable") {
		t.Errorf("check beside the service:\n%s", out)
	}
	if out := must(t, "keys", "show", "--config", cfg, strings.Split(l.Keys[1].VKey, "+")[1]); !strings.Contains(out, "rotated") {
		t.Errorf("show:\n%s", out)
	}

	// Revoked: the one in force, which is said.
	mustNot(t, "--reason is required", "keys", "revoke", "--config", cfg)
	mustNot(t, "that is the identity key", "keys", "revoke", "--config", cfg, "--reason", "x", l.Keys[0].VKey)
	mustNot(t, "has no key", "keys", "revoke", "--config", cfg, "--reason", "x", "ffffffff")
	if out := must(t, "keys", "revoke", "--config", cfg, "--reason", "a laptop was lost", "--out", file("revocation")); !strings.Contains(out, l.Keys[3].VKey) {
		t.Errorf("revoke does not say which key it revoked:\n%s", out)
	}
	r := list(t, cfg)
	if len(r.Keys) != 5 || !r.Keys[3].Revoked || r.Keys[3].Ended != "revoked" || !r.Keys[4].InForce || len(r.Revocations) != 1 {
		t.Fatalf("after a revocation: %+v", r)
	}
	after := s.receipts(2)
	verify("with the revocation, fetched anew", s.bundles(file("after"), after), "--revocation", file("revocation"))
	mustNot(t, "REFUSED", "verify", "--policy", policyFile, "--revocation", file("revocation"), before)
	verify("from before the revocation, fetched anew", s.bundles(file("anew"), early), "--revocation", file("revocation"))
	var report struct {
		OK          int
		Revocations []verifyRevocation
		Bundles     []verifyResult
	}
	out := must(t, "verify", "--policy", policyFile, "--revocation", file("revocation"), "-o", "json", file("after"))
	if err := json.Unmarshal([]byte(out), &report); err != nil || report.OK != 2 || len(report.Revocations) != 1 ||
		report.Revocations[0].Key != l.Keys[3].VKey || report.Bundles[0].Daily != r.Keys[4].VKey || report.Bundles[0].Pins != 1 {
		t.Errorf("verify -o json: %v\n%s", err, out)
	}

	// Asked again, after a restart: the state is that of the directory.
	s.stop()
	if offline := list(t, cfg); offline.Running || len(offline.Keys) != 5 || offline.Keys[4].VKey != r.Keys[4].VKey || len(offline.Revocations) != 1 {
		t.Errorf("from the directory: %+v", offline)
	}
	mustNot(t, "only a running one can", "keys", "rotate", "--config", cfg)
	s = serve(t, cfg)

	// Sealed, after a no.
	mustNot(t, "not sealed: the answer was not yes", "keys", "revoke", "--config", cfg, "--identity", "--reason", "x")
	mustNot(t, "takes no KEY", "keys", "revoke", "--config", cfg, "--identity", "--reason", "x", "daily")
	must(t, "keys", "revoke", "--config", cfg, "--identity", "--reason", "the safe was open", "--yes", "--out", file("seal"))
	d := receipt.Decision{Class: "W1", Verdict: "admit", Reason: "ok", Rule: "route:*", Capture: "lean", Route: "pages"}
	if err := s.log.Decide(t.Context(), wal.Durable, &d, &receipt.Request{Method: "GET", Path: "/"}); !errors.Is(err, receiptlog.ErrSealed) {
		t.Errorf("a decision of a sealed log: %v", err)
	}
	mustNot(t, "sealed", "keys", "rotate", "--config", cfg)
	s.stop()

	// Served without its keys: receipts are there, and heed both.
	if err := away(); err != nil {
		t.Fatal(err)
	}
	s = serve(t, cfg)
	verify("of the sealed log", s.bundles(file("sealed"), after), "--revocation", file("revocation"), "--revocation", file("seal"))
	if out := must(t, "keys", "check", "--config", cfg); !strings.Contains(out, "is sealed") {
		t.Errorf("check of a sealed log:\n%s", out)
	}
	l = list(t, cfg)
	leaf, err := receipt.ParseSeal([]byte(l.Seal))
	if err != nil {
		t.Fatal(err)
	}
	if k := l.Keys[4]; k.InForce || k.Ended != "sealed" || k.LastSize != leaf.Size+1 || l.Keys[0].Ended != "sealed" || len(l.Undestroyed) > 0 {
		t.Errorf("keys of a sealed log: %+v", l)
	}
	mustNot(t, "has no daily key in force", "keys", "show", "--config", cfg)
	if out := must(t, "keys", "show", "--config", cfg, "identity"); !strings.Contains(out, "state         sealed\n") {
		t.Errorf("the identity key of a sealed log:\n%s", out)
	}
	mustNot(t, "sealed", "keys", "rotate", "--config", cfg)
	s.stop()
	if err := back(); err != nil {
		t.Fatal(err)
	}

	// Succeeded, by a new identity key only.
	succeeds := fmt.Sprintf("succeeds: {seal: %q, policy: %q}\n", file("seal"), policyFile)
	thief := configFor(t, dir, "thief", uri("identity"), uri("daily-2"), succeeds)
	mustNot(t, "a successor needs a new one", "keys", "check", "--config", thief)
	if _, err := server.New(t.Context(), thief, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "a successor needs a new one") {
		t.Errorf("a successor with the stolen identity key: %v", err)
	}
	next := serve(t, configFor(t, dir, "second", uri("identity-2"), uri("daily-2"), succeeds))
	first0, err := next.log.Leaf(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	ks, err := receipt.ParseKeyStatement(first0)
	if err != nil || ks.Succeeds == nil || ks.Succeeds.Origin != s.log.Origin() || ks.Succeeds.Identity != s.log.IdentityVKey() {
		t.Errorf("first leaf of the successor: %v\n%s", err, first0)
	}
	policyFile = filepath.Join(dir, "second", "policy")
	verify("of the successor", next.bundles(file("next"), next.receipts(1)))
	next.stop()
	must(t, "fsck", filepath.Join(dir, "first"))
	must(t, "fsck", filepath.Join(dir, "second"))
}

// TestRevocationFiles: what is no revocation is told as such, and a name that is empty does not pass for no revocation.
func TestRevocationFiles(t *testing.T) {
	dir := t.TempDir()
	vkey, err := keys.VKey("example.com/log", make(ed25519.PublicKey, ed25519.PublicKeySize))
	if err != nil {
		t.Fatal(err)
	}
	policyFile := filepath.Join(dir, "policy")
	if err := os.WriteFile(policyFile, []byte("log "+vkey+"\nquorum none\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{policyFile, empty} {
		mustNot(t, "neither a revocation nor a seal", "verify", "--policy", policyFile, "--revocation", f, empty)
	}
	for _, revocations := range [][]string{{""}, {"", empty}, {policyFile, ""}} {
		args := []string{"verify", "--policy", policyFile}
		for _, r := range revocations {
			args = append(args, "--revocation", r)
		}
		if out, err := program("", append(args, empty)...); err == nil {
			t.Errorf("--revocation %q passed:\n%s", revocations, out)
		}
	}
	mustNot(t, "--revocation names no file", "verify", "--policy", policyFile, "--revocation", "", empty)
}

// TestBrokenOff: a knhk that ends while it is asked leaves one line that says how to go on.
func TestBrokenOff(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "knhk")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ln, err := control.Listen(t.Context(), dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = c.Read(make([]byte, 1))
			c.Close()
		}
	}()
	for _, args := range [][]string{{"list"}, {"rotate"}, {"revoke", "--reason", "x"}} {
		_, err := program("", append(append([]string{"keys"}, args...), "--state-dir", dir)...)
		if err == nil || !strings.Contains(err.Error(), "no answer from the knhk that serves "+dir) || strings.Contains(err.Error(), "http://") {
			t.Errorf("knhk keys %s: %v", args[0], err)
		}
	}
	if err := ln.Close(); err != nil {
		t.Error(err)
	}
	<-gone
}

// TestSplitNotes: revocations that stand one after the other, as the admin listener gives them, are taken apart.
func TestSplitNotes(t *testing.T) {
	a, b := []byte(receipt.RevocationPrefix+"{}\n\n— x AAAA\n"), []byte(receipt.SealPrefix+"{}\n\n— x AAAA\n")
	for _, c := range []struct {
		in   []byte
		want [][]byte
	}{
		{nil, nil}, {a, [][]byte{a}}, {bytes.Join([][]byte{a, a, b}, nil), [][]byte{a, a, b}}, {[]byte("junk"), [][]byte{[]byte("junk")}},
		{append([]byte("junk\n"), b...), [][]byte{[]byte("junk\n"), b}},
	} {
		got := splitNotes(c.in)
		if len(got) != len(c.want) {
			t.Errorf("%q: %q", c.in, got)
			continue
		}
		for i := range got {
			if !bytes.Equal(got[i], c.want[i]) {
				t.Errorf("%q: %q, want %q", c.in, got[i], c.want[i])
			}
		}
	}
}
