package main

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/knhk/sidecar/server"
	"github.com/knhk/sidecar/server/config"
)

func keysCheckCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Check the keys of a configuration",
		Long: `Open the key stores of a configuration as serve does, find the keys, sign with each of them and say what can be done with it. Nothing is
made, and nothing is changed. It works beside a running service, and for a log that is sealed.

A PIN is tried once; a token counts a wrong one. Exit code 1 if serve would not start with these keys: the same line says why.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dir, _ := cmd.Flags().GetString("state-dir"); dir != "" {
				return usageError{errors.New("--state-dir: a check needs the key URIs of a configuration: name it by --config")}
			}
			path, _ := cmd.Flags().GetString("config")
			cfg, err := config.Load(path)
			if err != nil {
				return err
			}
			r, err := server.CheckKeys(cmd.Context(), cfg, slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelError})))
			if err != nil {
				return err
			}
			if wantJSON(cmd) {
				return printJSON(cmd, r)
			}
			out := cmd.OutOrStdout()
			switch {
			case r.Sealed:
				fmt.Fprintf(out, "log %s is sealed: serve hands out its receipts, without any key\n", r.Origin)
			case r.Origin == "":
				fmt.Fprintln(out, "the log is not begun")
			default:
				fmt.Fprintln(out, "log", r.Origin)
			}
			for _, k := range r.Keys {
				fmt.Fprintf(out, "%s key %q: %s\n  lives in     %s\n", k.Role, k.Label, k.State, k.Custody)
				if k.ID != "" {
					fmt.Fprintf(out, "  version      %s, %s\n  exportable   %s\n  signs        yes, in %.1f ms\n  in notes     %s\n", k.ID, k.Algorithm,
						k.Exportable, k.SignMS, k.Note)
				}
			}
			for _, w := range r.Warnings {
				fmt.Fprintln(out, "warning:", w)
			}
			return nil
		},
	}
}
