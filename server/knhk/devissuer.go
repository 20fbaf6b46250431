package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/knhk/sidecar/crypto/spiffe/devissuer"
)

func devIssuerCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "dev-issuer",
		Short: "DEVELOPMENT ONLY: issue SPIFFE identities on this machine",
		Long: `DEVELOPMENT ONLY. Issue SPIFFE identities (X.509 SVIDs) to programs of this machine where no SPIRE is at hand: the
Workload API and Envoy's SDS on one unix socket, and PEM files.

A program is known by the path of its executable. That proves nothing: whoever runs anything as this user can have every
identity. The authorities live in memory and are new at every start. Trust domains must end in .dev, .test or .local.
Nothing else starts it: 'knhk serve' takes its identity from where identity.workload_api or identity.files says.

SDS names are those of a SPIRE agent: the SPIFFE ID or "default", "ROOTCA" or "spiffe://DOMAIN", "ALL".`,
		Example: `  knhk dev-issuer --socket run/spiffe.sock --id bin/knhk=spiffe://knhk.test/knhk \
    --id .venv/bin/envoy-1.40=spiffe://knhk.test/envoy --write run/client=spiffe://knhk.test/client`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := devIssuerConfig(cmd)
			if err != nil {
				return usageError{err}
			}
			i, err := devissuer.New(cfg)
			if err != nil {
				return usageError{err}
			}
			fmt.Fprintln(cmd.ErrOrStderr(), "knhk dev-issuer: DEVELOPMENT ONLY. These identities prove nothing: whoever runs anything as this user can have them.")
			return i.Run(cmd.Context())
		},
	}
	cmd.Flags().String("socket", "", "unix socket to serve, for this user only; required")
	cmd.Flags().StringArray("id", nil, "EXE=spiffe://DOMAIN/PATH: who the program with this executable is; repeated")
	cmd.Flags().StringArray("write", nil, "DIR=spiffe://DOMAIN/PATH: keep certificate.pem, key.pem and bundle.pem in DIR; repeated")
	cmd.Flags().StringArray("ttl", nil, "how long SVIDs live, renewed at half of it; spiffe://DOMAIN/PATH=DURATION for one ID; repeated (default 1h)")
	cmd.Flags().String("log-level", "info", "debug, info, warn or error")
	return cmd
}

// devIssuerConfig reads the flags. Every problem is named.
func devIssuerConfig(cmd *cobra.Command) (cfg devissuer.Config, err error) {
	var errs []error
	level, err := logLevel(cmd)
	if err != nil {
		errs = append(errs, err)
	}
	opts := &slog.HandlerOptions{Level: level}
	var h slog.Handler = slog.NewTextHandler(os.Stderr, opts)
	if wantJSON(cmd) {
		h = slog.NewJSONHandler(os.Stderr, opts)
	}
	cfg.Log = slog.New(h)
	if cfg.Socket, _ = cmd.Flags().GetString("socket"); cfg.Socket == "" {
		errs = append(errs, errors.New("--socket is missing"))
	}
	cfg.Socket = strings.TrimPrefix(cfg.Socket, "unix:")
	pairs := func(flag string, use func(name string, id spiffeid.ID)) {
		values, _ := cmd.Flags().GetStringArray(flag)
		for _, v := range values {
			// The last "=spiffe://": the path before it may hold anything.
			i := strings.LastIndex(v, "=spiffe://")
			if i < 1 {
				errs = append(errs, fmt.Errorf("--%s %q: want %s=spiffe://DOMAIN/PATH", flag, v, map[string]string{"id": "EXE", "write": "DIR"}[flag]))
				continue
			}
			id, err := spiffeid.FromString(v[i+1:])
			if err != nil {
				errs = append(errs, fmt.Errorf("--%s %q: %w", flag, v, err))
				continue
			}
			use(v[:i], id)
		}
	}
	pairs("id", func(exe string, id spiffeid.ID) {
		cfg.Programs = append(cfg.Programs, devissuer.Program{Exe: exe, ID: id})
	})
	pairs("write", func(dir string, id spiffeid.ID) {
		cfg.Directories = append(cfg.Directories, devissuer.Directory{Dir: dir, ID: id})
	})
	ttls, _ := cmd.Flags().GetStringArray("ttl")
	for _, v := range ttls {
		if err := addTTL(&cfg, v); err != nil {
			errs = append(errs, fmt.Errorf("--ttl %q: %w", v, err))
		}
	}
	return cfg, errors.Join(errs...)
}

// addTTL reads "DURATION" or "spiffe://DOMAIN/PATH=DURATION".
func addTTL(cfg *devissuer.Config, v string) error {
	name, text, one := strings.Cut(v, "=")
	if !one {
		text = v
	}
	ttl, err := time.ParseDuration(text)
	if err != nil {
		return errors.New("want a duration such as 1h or 30s")
	}
	if ttl < devissuer.MinTTL || ttl > devissuer.MaxTTL {
		return fmt.Errorf("want %v to %v", devissuer.MinTTL, devissuer.MaxTTL)
	}
	if !one {
		cfg.TTL = ttl
		return nil
	}
	id, err := spiffeid.FromString(name)
	if err != nil {
		return err
	}
	if cfg.TTLs == nil {
		cfg.TTLs = map[spiffeid.ID]time.Duration{}
	}
	cfg.TTLs[id] = ttl
	return nil
}
