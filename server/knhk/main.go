// Command knhk gives every request that passes an Envoy a verifiable receipt.
//
// Exit codes: 0 done and, for verify and fsck, nothing wrong; 1 it failed, was refused, was not found or does not verify;
// 2 the command line or the configuration is wrong.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/knhk/sidecar/server/config"
)

const (
	exitFailed = 1
	exitUsage  = 2
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)                      // a second signal ends the process at once
	klog.SetSlogLogger(slog.New(slog.DiscardHandler)) // Tessera's; serve gives it ours
	cmd := root()
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(ctx)
	var problems config.Errors
	var usage usageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &problems):
		fmt.Fprintln(os.Stderr, err)
		return exitUsage
	case errors.Is(err, errShown):
		return exitUsage
	case errors.As(err, &usage):
		fmt.Fprintf(os.Stderr, "knhk: %v\nRun 'knhk --help' or 'knhk COMMAND --help'.\n", err)
		return exitUsage
	case errors.Is(err, errSaid):
		return exitFailed
	}
	fmt.Fprintln(os.Stderr, "knhk:", err)
	return exitFailed
}

// usageError is a command line that is wrong.
type usageError struct{ error }

// errSaid and errShown end a command that has printed itself what is wrong: with what it judged, or with the configuration.
var (
	errSaid  = errors.New("failed")
	errShown = errors.New("configuration is wrong")
)

// exitCodes ends every help text.
const exitCodes = `
Exit codes: 0 done, and nothing wrong was found; 1 failed, refused, not found or not valid;
2 the command line or the configuration is wrong.
`

func root() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "knhk",
		Short: "Verifiable receipts, admission and promotion for Envoy",
		Long: `knhk runs beside Envoy: it decides about every request, records the decision before the request goes on,
and keeps the records in a transparency log that anyone can check offline.`,
		Version: version(),
		Example: `  knhk check --config knhk.yaml          is the configuration right?
  knhk bootstrap --config knhk.yaml > envoy.yaml
  knhk serve --config knhk.yaml
  knhk receipts list
  knhk receipts get ID > bundle.json
  knhk verify --policy policy bundle.json`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("unknown command %q", args[0])}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.PersistentFlags().StringP("output", "o", "text", "output format: text or json")
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	cmd.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		if o, _ := cmd.Flags().GetString("output"); o != "text" && o != "json" {
			return usageError{fmt.Errorf("--output %q: want text or json", o)}
		}
		return nil
	}
	cmd.SetHelpTemplate(cmd.HelpTemplate() + exitCodes)
	cmd.AddCommand(serveCmd(), checkCmd(), bootstrapCmd(), receiptsCmd(), verifyCmd(), fsckCmd(), keysCmd(), authzCmd(), devIssuerCmd())
	cmd.CompletionOptions.HiddenDefaultCmd = true
	return cmd
}

// version is the module's version as the Go tool stamped it.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}

// wantJSON says whether the command line asks for JSON.
func wantJSON(cmd *cobra.Command) bool {
	o, _ := cmd.Flags().GetString("output")
	return o == "json"
}

// args wraps a cobra argument check so that its error counts as wrong usage.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, a []string) error {
		if err := check(cmd, a); err != nil {
			return usageError{err}
		}
		return nil
	}
}
