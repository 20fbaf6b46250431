package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/knhk/sidecar/e2e/harness"
)

// volume measures what many receipts cost: processor time to make one in a small log and in a large one, what they take on disk,
// the restart, the export and the verification of all of them. Receipts are made in process, through the log that `knhk serve` uses;
// everything after is the program.
type volume struct {
	Receipts int `json:"receipts"`
	// Microseconds of processor time per receipt, sealing and signing included: in logs of a hundredth of the size, and over the
	// last tenth of the large one.
	CPUSmall float64 `json:"cpu_us_small"`
	CPULarge float64 `json:"cpu_us_large"`
	Ratio    float64 `json:"large_to_small"`
	// Bytes on disk per receipt once everything is sealed.
	BlockBytes float64 `json:"block_bytes_per_receipt"`
	LogBytes   float64 `json:"log_bytes_per_receipt"`

	Restart       float64 `json:"restart_to_ready_s"` // after kill -9
	IdleRSS       float64 `json:"idle_rss_mb"`
	ExportSeconds float64 `json:"export_s"`
	ExportRSS     float64 `json:"export_client_rss_mb"` // highest
	ServeRSS      float64 `json:"export_server_rss_mb"` // highest of the server over its life, export included
	VerifyCPU     float64 `json:"verify_cpu_us_per_bundle"`
	VerifyRSS     float64 `json:"verify_rss_mb"`
	FsckSeconds   float64 `json:"fsck_s"`

	Machine machineInfo `json:"machine"`
}

// filled is what e2e/bench/fill tells.
type filled struct {
	CPU  float64 `json:"cpu_us"`      // per receipt, all but the first tenth
	Last float64 `json:"cpu_us_last"` // over the last tenth
}

// measureVolume runs everything; n is how many receipts the large log holds.
func measureVolume(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	flags := flag.NewFlagSet("bench volume", flag.ContinueOnError)
	flags.SetOutput(stderr)
	n := flags.Int("receipts", 1_000_000, "receipts in the large log, at least 1000")
	out := flags.String("out", "volume.json", "file for the figures")
	dir := flags.String("dir", "", "directory for state (default a temporary one, removed)")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *n < 1000 || flags.NArg() > 0 {
		return errors.New("volume: want at least 1000 receipts and no further arguments")
	}
	if *dir == "" {
		tmp, err := os.MkdirTemp("", "knhk-volume-")
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
		*dir = tmp
	}
	if err := os.MkdirAll(*dir, 0o700); err != nil {
		return err
	}
	v, err := newVolume(ctx, *dir, *n, stderr)
	if err != nil {
		return err
	}
	if err := v.print(stdout); err != nil {
		return err
	}
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(*out, append(b, '\n'), 0o644)
}

func newVolume(ctx context.Context, dir string, n int, progress io.Writer) (*volume, error) {
	v := &volume{Receipts: n}
	var err error
	if v.Machine, err = machine(dir); err != nil {
		return nil, err
	}
	knhk, err := build(ctx, dir, "./server/knhk")
	if err != nil {
		return nil, err
	}
	filler, err := build(ctx, dir, "./e2e/bench/fill")
	if err != nil {
		return nil, err
	}
	admin, err := harness.FreeAddr()
	if err != nil {
		return nil, err
	}
	// Small logs before and after the large one, so that a machine that gets slower meanwhile shows.
	var small []float64
	for i := range 10 {
		if i == 5 {
			fmt.Fprintf(progress, "recording %d receipts\n", n)
			f, err := fill(ctx, filler, filepath.Join(dir, "large"), admin, n)
			if err != nil {
				return nil, err
			}
			v.CPULarge = round(f.Last)
		}
		f, err := fill(ctx, filler, filepath.Join(dir, fmt.Sprintf("small-%d", i)), admin, max(n/100, 100))
		if err != nil {
			return nil, err
		}
		small = append(small, f.CPU)
	}
	v.CPUSmall, _ = summary(small)
	v.Ratio = round(v.CPULarge / v.CPUSmall)
	state := filepath.Join(dir, "large", "state")
	blocks, err := harness.FilesIn(filepath.Join(state, "blocks"))
	if err != nil {
		return nil, err
	}
	tiles, err := harness.FilesIn(filepath.Join(state, "log"))
	if err != nil {
		return nil, err
	}
	v.BlockBytes, v.LogBytes = round(blocks.Bytes/float64(n)), round(tiles.Bytes/float64(n))
	fmt.Fprintln(progress, "restart, export")
	if err := v.serve(ctx, knhk, filepath.Join(dir, "large"), admin); err != nil {
		return nil, err
	}
	fmt.Fprintln(progress, "verify, fsck")
	verify, err := timed(ctx, nil, knhk, "verify", "--quiet", "--policy", filepath.Join(state, "policy"), filepath.Join(dir, "large", "all.jsonl"))
	if err != nil {
		return nil, err
	}
	v.VerifyCPU, v.VerifyRSS = round(micros(verify.cpu)/float64(n)), round(verify.rss)
	fsck, err := timed(ctx, nil, knhk, "fsck", state)
	if err != nil {
		return nil, err
	}
	v.FsckSeconds = round(fsck.wall.Seconds())
	return v, nil
}

// serve measures the restart after a kill, memory at rest, and the export.
func (v *volume) serve(ctx context.Context, knhk, dir, admin string) error {
	file := filepath.Join(dir, "knhk.yaml")
	start := func() (*harness.Process, time.Duration, error) {
		begun := time.Now()
		p, err := harness.StartProcess(ctx, harness.ProcessConfig{
			Name: "knhk", Path: knhk, Args: []string{"serve", "--config", file}, Log: filepath.Join(dir, "knhk.log"),
			Ready: harness.HTTPReady("http://" + admin + "/readyz"), ReadyTimeout: time.Minute,
		})
		return p, time.Since(begun), err
	}
	p, _, err := start()
	if err != nil {
		return err
	}
	p.Kill()
	p, took, err := start()
	if err != nil {
		return err
	}
	defer p.Kill()
	v.Restart = round(took.Seconds())
	rss, err := p.RSS()
	if err != nil {
		return err
	}
	v.IdleRSS = round(float64(rss) / (1 << 20))
	env := []string{"KNHK_ADMIN=" + admin}
	export, err := timed(ctx, env, knhk, "receipts", "export", "--file", filepath.Join(dir, "all.jsonl"))
	if err != nil {
		return err
	}
	v.ExportSeconds, v.ExportRSS = round(export.wall.Seconds()), round(export.rss)
	peak, err := p.PeakRSS()
	if err != nil {
		return err
	}
	v.ServeRSS = round(float64(peak) / (1 << 20))
	return p.Stop(ctx)
}

// took is what a program took.
type took struct {
	cpu, wall time.Duration
	rss       float64 // MB, highest
}

func timed(ctx context.Context, env []string, name string, args ...string) (took, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	begun := time.Now()
	if err := cmd.Run(); err != nil {
		return took{}, fmt.Errorf("%s %s: %w\n%s", filepath.Base(name), strings.Join(args, " "), err, tail(out.Bytes()))
	}
	u := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	return took{cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), time.Since(begun), float64(u.Maxrss) / 1024}, nil
}

func tail(b []byte) []byte { return b[max(0, len(b)-2000):] }

// fill makes a log with n receipts in a process of its own, so that its processor time is its own, and that of the no-op servers,
// which are this program, is not that of a program with all of knhk in it.
func fill(ctx context.Context, program, dir, admin string, n int) (filled, error) {
	var f filled
	cmd := exec.CommandContext(ctx, program, dir, admin, strconv.Itoa(n))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return f, fmt.Errorf("fill: %w\n%s", err, tail(stderr.Bytes()))
	}
	return f, json.Unmarshal(out, &f)
}

func (v *volume) print(w io.Writer) error {
	fmt.Fprintf(w, "%s, %d CPUs, %s, %s, state on %s; %d receipts, one decision and one outcome each\n\n",
		v.Machine.CPU, v.Machine.CPUs, v.Machine.Kernel, v.Machine.Go, v.Machine.FileSystem, v.Receipts)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, row := range []struct {
		what string
		is   string
	}{
		{"processor time to record, seal and sign one receipt", fmt.Sprintf("%.1f us; in a log of a hundredth of the size %.1f us (x %.2f)", v.CPULarge, v.CPUSmall, v.Ratio)},
		{"disk for one receipt", fmt.Sprintf("%.0f bytes of blocks, %.1f bytes of log", v.BlockBytes, v.LogBytes)},
		{"restart after kill -9, to ready", fmt.Sprintf("%.2f s", v.Restart)},
		{"memory of the idle service", fmt.Sprintf("%.0f MB", v.IdleRSS)},
		{"export of all bundles", fmt.Sprintf("%.0f s, %.0f bundles/s; memory at most: client %.0f MB, service %.0f MB", v.ExportSeconds,
			float64(v.Receipts)/v.ExportSeconds, v.ExportRSS, v.ServeRSS)},
		{"verification", fmt.Sprintf("%.0f bundles/s per core, %.0f MB", 1e6/v.VerifyCPU, v.VerifyRSS)},
		{"knhk fsck", fmt.Sprintf("%.1f s", v.FsckSeconds)},
	} {
		fmt.Fprintf(t, "%s\t%s\n", row.what, row.is)
	}
	return t.Flush()
}
