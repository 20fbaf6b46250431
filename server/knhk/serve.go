package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"k8s.io/klog/v2"

	"github.com/knhk/sidecar/envoy/bootstrap"
	"github.com/knhk/sidecar/server"
	"github.com/knhk/sidecar/server/config"
)

// gcPercent trades memory for CPU: the live heap is small and requests leave garbage; measured, it saves a fifth of the CPU.
const gcPercent = 400

// memoryLimit is where that trade ends: above so many bytes garbage is collected as it arises. It refuses nothing.
const memoryLimit = 640 << 20

func configFlag(cmd *cobra.Command) {
	cmd.Flags().StringP("config", "c", "knhk.yaml", "configuration file")
}

func serveCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the service",
		Long: `Run the service until SIGTERM or SIGINT, then drain: health goes to NOT_SERVING, streams finish, the last block is sealed
and signed. SIGHUP, or a change of the file, reloads the configuration, all or nothing.

A log that is sealed (knhk keys revoke --identity) is served for reading, without its keys; every request is refused.

Logs go to standard error as text, or as JSON with -o json.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Getenv("GOGC") == "" {
				debug.SetGCPercent(gcPercent)
			}
			if os.Getenv("GOMEMLIMIT") == "" {
				debug.SetMemoryLimit(memoryLimit)
			}
			path, _ := cmd.Flags().GetString("config")
			level, err := logLevel(cmd)
			if err != nil {
				return err
			}
			var h slog.Handler = slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})
			if wantJSON(cmd) {
				h = slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: level})
			}
			log := slog.New(h)
			klog.SetSlogLogger(log.With("part", "tessera"))
			var opts []server.Option
			if replace, _ := cmd.Flags().GetBool("replace-daily-key"); replace {
				opts = append(opts, server.ReplaceDailyKey())
			}
			s, err := server.New(cmd.Context(), path, log, opts...)
			if err != nil {
				return err
			}
			return s.Run(cmd.Context())
		},
	}
	configFlag(cmd)
	cmd.Flags().Bool("replace-daily-key", false, "start with a restored state_dir whose daily key the store no longer has: make a new one.\n"+
		"Never when the log has gone on elsewhere since: it would sign a second history")
	cmd.Flags().String("log-level", "info", "debug, info, warn or error")
	return cmd
}

func logLevel(cmd *cobra.Command) (level slog.Level, err error) {
	text, _ := cmd.Flags().GetString("log-level")
	if err := level.UnmarshalText([]byte(text)); err != nil {
		return level, usageError{fmt.Errorf("--log-level %q: want debug, info, warn or error", text)}
	}
	return level, nil
}

func checkCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check a configuration",
		Long: `Check a configuration file the way serve does: every problem at once, each with file, line and column.
Nothing is opened or bound. Exit code 2 if anything is wrong.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			path, _ := cmd.Flags().GetString("config")
			cfg, err := config.Load(path)
			if wantJSON(cmd) {
				out := struct {
					OK       bool          `json:"ok"`
					File     string        `json:"file"`
					Problems config.Errors `json:"problems"`
					Notes    []string      `json:"notes"`
				}{OK: err == nil, File: path, Problems: config.Errors{}, Notes: []string{}}
				errors.As(err, &out.Problems)
				if err == nil {
					out.Notes = append(out.Notes, cfg.Notes()...)
				}
				if err := printJSON(cmd, out); err != nil {
					return err
				}
				if !out.OK {
					return errShown
				}
				return nil
			}
			if err != nil {
				return err
			}
			for _, n := range cfg.Notes() {
				fmt.Fprintln(cmd.OutOrStdout(), "note:", n)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is right: origin %s, instance %s, policy %x\n", path, cfg.Origin, cfg.Instance, cfg.PolicyDigest)
			return nil
		},
	}
	configFlag(cmd)
	return cmd
}

func bootstrapCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bootstrap",
		Short: "Write the Envoy configuration that goes with knhk.yaml",
		Long: `Write an Envoy bootstrap (YAML, or JSON with -o json) to standard output: listener, routes and clusters of knhk.yaml, and
everything that makes Envoy fail closed around knhk. It needs Envoy 1.39.1 or later.

With envoy.tls.files Envoy also reads small files beside the certificates, which name them: only so does it read certificates again when
they are replaced. --write-secrets writes these too.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			path, _ := cmd.Flags().GetString("config")
			cfg, err := config.Load(path)
			if err != nil {
				return err
			}
			b, err := bootstrap.Bootstrap(cfg.Proto())
			if err != nil {
				return err
			}
			secrets, err := bootstrap.Secrets(cfg.Proto())
			if err != nil {
				return err
			}
			write, _ := cmd.Flags().GetBool("write-secrets")
			for _, s := range secrets {
				if !write {
					fmt.Fprintf(cmd.ErrOrStderr(), "note: Envoy also reads %s; --write-secrets writes it\n", s.Path)
				} else if err := replaceFile(s.Path, s.YAML); err != nil {
					return fmt.Errorf("write secrets: %w", err)
				}
			}
			out, err := bootstrap.YAML(b)
			if err == nil && wantJSON(cmd) {
				out, err = protojson.MarshalOptions{Multiline: true, Indent: "  "}.Marshal(b)
				out = append(out, '\n')
			}
			if err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(out)
			return err
		},
	}
	configFlag(cmd)
	cmd.Flags().Bool("write-secrets", false, "with envoy.tls.files: also write the files that name the certificates, beside them")
	return cmd
}

// replaceFile puts content in the place of a file by a rename, which is what Envoy watches for. Nothing in it is secret.
func replaceFile(name string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // no longer there if all went well
	_, err = f.Write(content)
	if err := errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}

func printJSON(cmd *cobra.Command, v any) error {
	enc := json.NewEncoder(cmd.OutOrStdout())
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}
