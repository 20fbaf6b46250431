package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/rogpeppe/go-internal/testscript"
	"k8s.io/klog/v2"

	adminv1 "github.com/knhk/sidecar/api/knhk/admin/v1"
	"github.com/knhk/sidecar/api/knhk/admin/v1/adminv1connect"
	"github.com/knhk/sidecar/crypto/hsm/softhsm"
	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/receipt/receipttest"
	"github.com/knhk/sidecar/crypto/soft"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/region/receiptlog"
	"github.com/knhk/sidecar/region/wal"
)

var update = flag.Bool("update", false, "rewrite what the scripts compare with")

// programs are what scripts can run.
var programs = map[string]func(){"knhk": main}

func TestMain(m *testing.M) {
	klog.SetSlogLogger(slog.New(slog.DiscardHandler)) // Tessera's
	testscript.Main(m, programs)
}

// The token that the command "token" makes.
const (
	tokenLabel = "knhk"
	tokenPIN   = "1234"
)

// TestScripts runs testdata/*.txtar against the program. Every script finds in its directory:
//
//	policy           the policy of a log in memory
//	bundle.json      a bundle under it, decision and outcome, with evidence
//	bundles.jsonl    the same bundle three times, one a line
//	tampered.json    the bundle with one word of its decision changed
//	other-origin     the policy of a log of another origin
//	other-key        a policy for the same origin with another identity key
//	state/           a state directory that was closed in order, with five receipts
//	example.yaml     examples/ext-proc/knhk.yaml
//
// Besides testscript's commands there are
//
//	exits CODE PROGRAM ARGS...   runs the program and wants this exit code
//	lock DIR                     holds the lock of a state directory until the script ends, as a running knhk does
//	spoil PATTERN                changes one byte in the middle of each file, as a bad disk would
//	token                        makes a SoftHSM token "knhk", its PIN in the file pin, and sets MODULE; only where the condition softhsm holds
//	p11key LABEL KIND            a program: makes a key in that token that may not sign (nosign), or that can leave it (exportable)
//	fill FILES...                replaces $NAME in the files
//	appears FILE                 waits for a file that another process writes
//	refused TEXT CONFIG          serve and keys check both end with exit code 1 and one and the same line, which holds the text
func TestScripts(t *testing.T) {
	shared := t.TempDir()
	makeBundles(t, shared)
	makeState(t, filepath.Join(shared, "state"))
	example, err := os.ReadFile(filepath.Join("..", "..", "examples", "ext-proc", "knhk.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, shared, "example.yaml", example)
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       *update,
		Setup: func(env *testscript.Env) error {
			env.Setenv("KNHK_ADMIN", "")
			return os.CopyFS(env.WorkDir, os.DirFS(shared))
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits": exits,
			"lock":  lock,
			"spoil": spoil,
			"token": token, "fill": fill, "refused": refused, "appears": appears,
		},
		Condition: func(cond string) (bool, error) {
			if cond != "softhsm" {
				return false, fmt.Errorf("unknown condition %q", cond)
			}
			_, ok := softhsm.Find()
			_, built := programs["p11key"] // with cgo
			return ok && built, nil
		},
	})
}

func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARGS...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	var exit *exec.ExitError
	if err := ts.Exec(args[1], args[2:]...); errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

func token(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: token")
	}
	module, _ := softhsm.Find()
	conf, err := softhsm.InitToken(ts.MkAbs("hsm"), tokenLabel, tokenPIN, "12345678")
	ts.Check(err)
	ts.Setenv(softhsm.ConfEnv, conf)
	ts.Setenv("MODULE", module)
	ts.Check(os.WriteFile(ts.MkAbs("pin"), []byte(tokenPIN+"\n"), 0o600))
}

func fill(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: fill FILES...")
	}
	for _, name := range args {
		ts.Check(os.WriteFile(ts.MkAbs(name), []byte(os.Expand(ts.ReadFile(name), ts.Getenv)), 0o600))
	}
}

func refused(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: refused TEXT CONFIG")
	}
	said := map[string]string{}
	for _, cmd := range []string{"serve", "keys check"} {
		var exit *exec.ExitError
		argv := append(strings.Fields(cmd), "--config", args[1])
		if cmd == "serve" {
			argv = append(argv, "--log-level", "error")
		}
		if err := ts.Exec("knhk", argv...); !errors.As(err, &exit) || exit.ExitCode() != exitFailed {
			ts.Fatalf("%s: %v, want exit code %d", cmd, err, exitFailed)
		}
		line := strings.TrimSuffix(ts.ReadFile("stderr"), "\n")
		if !strings.HasPrefix(line, "knhk: ") || strings.Contains(line, "\n") || !strings.Contains(line, args[0]) {
			ts.Fatalf("%s says %q; want one line that holds %q", cmd, line, args[0])
		}
		said[cmd] = line
	}
	if said["serve"] != said["keys check"] {
		ts.Fatalf("serve says %q, the check %q", said["serve"], said["keys check"])
	}
}

func lock(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: lock DIR")
	}
	f, err := os.OpenFile(filepath.Join(ts.MkAbs(args[0]), "lock"), os.O_RDWR, 0)
	ts.Check(err)
	ts.Defer(func() { f.Close() })
	ts.Check(syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB))
}

func appears(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: appears FILE")
	}
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(ts.MkAbs(args[0])); err == nil {
			return
		}
		if time.Now().After(end) {
			ts.Fatalf("%s does not appear", args[0])
		}
	}
}

// spoil changes one byte in the middle of every file that matches.
func spoil(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: spoil PATTERN")
	}
	matches, err := filepath.Glob(ts.MkAbs(args[0]))
	ts.Check(err)
	if len(matches) == 0 {
		ts.Fatalf("%s: no such file", args[0])
	}
	for _, name := range matches {
		b, err := os.ReadFile(name)
		ts.Check(err)
		b[len(b)/2] ^= 1
		ts.Check(os.WriteFile(name, b, 0o600))
	}
}

func write(t *testing.T, dir, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func makeBundles(t *testing.T, dir string) {
	t.Helper()
	log, b := receipttest.Sample(t, "example.com/scripts")
	raw, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	raw = bytes.TrimSpace(raw)
	other, _ := receipttest.Sample(t, "example.com/other")
	forger := receipttest.NewKey(t, log.Origin, "a thief who has no key")
	tampered := bytes.Replace(raw, []byte(`\"verdict\":\"admit\"`), []byte(`\"verdict\":\"park\"`), 1)
	if bytes.Equal(tampered, raw) {
		t.Fatal("the bundle holds no verdict to tamper with")
	}
	write(t, dir, "policy", log.PolicyText())
	write(t, dir, "bundle.json", append(bytes.Clone(raw), '\n'))
	write(t, dir, "bundles.jsonl", bytes.Repeat(append(bytes.Clone(raw), '\n'), 3))
	write(t, dir, "tampered.json", tampered)
	write(t, dir, "other-origin", other.PolicyText())
	write(t, dir, "other-key", fmt.Appendf(nil, "log %s\nquorum none\n", forger.VKey))
}

// makeState runs a receipt log for five requests and closes it.
func makeState(t *testing.T, dir string) {
	t.Helper()
	ctx := t.Context()
	store, err := soft.Open(filepath.Join(t.TempDir(), "keys"))
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	version, err := store.Create(ctx, "identity", keys.Ed25519)
	if err != nil {
		t.Fatal(err)
	}
	identity, err := store.Signer(ctx, "identity", version.ID)
	if err != nil {
		t.Fatal(err)
	}
	log, err := receiptlog.Open(ctx, receiptlog.Config{
		Dir: dir, Origin: "example.com/scripts", Instance: "a", Identity: identity, Daily: store, DailyLabel: "daily",
		DailyAlgorithm: keys.Ed25519, DailyMaxAge: 24 * time.Hour, SealEvery: 100 * time.Millisecond, Heartbeat: time.Minute,
		MaxUnsigned: time.Minute, OutcomeTimeout: time.Hour, SegmentBytes: 1 << 20, MaxBytes: 3 << 20,
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	runCtx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- log.Run(runCtx) }()
	for i := range 5 {
		d := receipt.Decision{Class: "W1", Verdict: "admit", Reason: "ok", Rule: "route:*", Capture: "lean", Route: "pages"}
		if err := log.Decide(ctx, wal.Durable, &d, &receipt.Request{Method: "GET", Path: fmt.Sprintf("/%d", i)}); err != nil {
			t.Fatal(err)
		}
		if err := log.Outcome(ctx, d.ID, &policy.Outcome{Source: "als", Result: policy.ResultComplete, Status: 200}); err != nil {
			t.Fatal(err)
		}
	}
	log.Stop()
	stop()
	if err := errors.Join(<-done, log.Close(context.Background())); err != nil {
		t.Fatal(err)
	}
}

// brokenExport sends one bundle and then fails, as a knhk does that dies.
type brokenExport struct {
	adminv1connect.UnimplementedReceiptServiceHandler
}

func (brokenExport) Export(_ context.Context, _ *adminv1.ExportRequest, out *connect.ServerStream[adminv1.ExportResponse]) error {
	if err := out.Send(&adminv1.ExportResponse{Bundle: []byte("{}"), Done: 1, Total: 2}); err != nil {
		return err
	}
	return connect.NewError(connect.CodeInternal, errors.New("block 7: chunk 0 is damaged"))
}

// An export that breaks off must not leave a file that looks whole.
func TestBrokenExportLeavesNoFile(t *testing.T) {
	_, handler := adminv1connect.NewReceiptServiceHandler(brokenExport{})
	srv := httptest.NewServer(handler)
	defer srv.Close()
	file := filepath.Join(t.TempDir(), "receipts.jsonl")
	if code := run([]string{"receipts", "export", "--admin", srv.Listener.Addr().String(), "--file", file}); code != exitFailed {
		t.Errorf("exit code %d, want %d", code, exitFailed)
	}
	for _, f := range []string{file, file + ".part"} {
		if _, err := os.Stat(f); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v, want it gone", f, err)
		}
	}
}

// wholeExport sends one bundle and ends in order.
type wholeExport struct {
	adminv1connect.UnimplementedReceiptServiceHandler
}

func (wholeExport) Export(_ context.Context, _ *adminv1.ExportRequest, out *connect.ServerStream[adminv1.ExportResponse]) error {
	return out.Send(&adminv1.ExportResponse{Bundle: []byte("{}"), Done: 1, Total: 1})
}

// An export gets its name only when it is on the disk: a pipe takes what is written, and cannot be synced.
func TestExportIsSynced(t *testing.T) {
	_, handler := adminv1connect.NewReceiptServiceHandler(wholeExport{})
	srv := httptest.NewServer(handler)
	defer srv.Close()
	export := func(file string) int {
		return run([]string{"receipts", "export", "--admin", srv.Listener.Addr().String(), "--file", file})
	}
	if code := export(filepath.Join(t.TempDir(), "receipts.jsonl")); code != 0 {
		t.Fatalf("exit code %d, want %d", code, 0)
	}
	file := filepath.Join(t.TempDir(), "receipts.jsonl")
	if err := syscall.Mkfifo(file+".part", 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := os.OpenFile(file+".part", os.O_RDWR, 0) // so that the writer does not wait for a reader
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if code := export(file); code != exitFailed {
		t.Errorf("exit code %d, want %d: the export was not synced", code, exitFailed)
	}
}
