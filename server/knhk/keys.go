package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	adminv1 "github.com/knhk/sidecar/api/knhk/admin/v1"
	"github.com/knhk/sidecar/api/knhk/admin/v1/adminv1connect"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/region/receiptlog"
	"github.com/knhk/sidecar/server"
	"github.com/knhk/sidecar/server/config"
	"github.com/knhk/sidecar/server/control"
)

func keysCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "keys",
		Short: "Show, check and change the keys that sign the log",
		Long: `Show, check and change the keys that sign the log.

Every checkpoint is signed by the identity key, which never changes, and by the daily key, which knhk replaces by itself. The
log is found by --config, or by --state-dir. Changes are made by the running service, which is asked over the socket "control" in
its state directory: run these commands as the user that knhk runs as, or as root, on the same machine.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.PersistentFlags().StringP("config", "c", "knhk.yaml", "configuration file")
	cmd.PersistentFlags().String("state-dir", "", "state directory, instead of the one that the configuration names")
	cmd.AddCommand(keysListCmd(), keysShowCmd(), keysRotateCmd(), keysRevokeCmd(), keysCheckCmd())
	return cmd
}

// stateDir is the directory that the command line means.
func stateDir(cmd *cobra.Command) (string, error) {
	if dir, _ := cmd.Flags().GetString("state-dir"); dir != "" {
		return dir, nil
	}
	path, _ := cmd.Flags().GetString("config")
	cfg, err := config.Load(path)
	if err != nil {
		return "", err
	}
	return cfg.StateDir, nil
}

func keyClient(dir string) adminv1connect.KeyServiceClient {
	return adminv1connect.NewKeyServiceClient(&http.Client{Transport: control.Transport(dir)}, "http://knhk")
}

// keySaid turns an error of the key API into one line that says what to do. what is what was asked for.
func keySaid(dir, what string, err error) error {
	var ce *connect.Error
	switch {
	case err == nil:
		return nil
	case errors.Is(err, control.ErrNotRunning):
		return fmt.Errorf("%s: no knhk serves %s, and only a running one can: start it with 'knhk serve'", what, dir)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s: %s is not there: --config or --state-dir says where the log is", what, dir)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s: %s: only root and the user that knhk runs as may", what, filepath.Join(dir, control.Name))
	case errors.Is(err, syscall.ENOTDIR):
		return fmt.Errorf("%s: %s is no directory: --config or --state-dir says where the log is", what, dir)
	case errors.As(err, &ce) && connect.IsWireError(err):
		if ce.Code() == connect.CodeInvalidArgument {
			return usageError{errors.New(ce.Message())}
		}
		return errors.New(ce.Message())
	}
	// The connection broke: knhk ended, or let nobody in.
	cause := err.Error()
	var errno syscall.Errno
	if errors.As(err, &errno) {
		cause = errno.Error()
	} else if ce != nil {
		cause = ce.Message()
	}
	return fmt.Errorf("%s: no answer from the knhk that serves %s (%s): 'knhk keys list' shows how the keys stand once it is there, or none is",
		what, dir, cause)
}

// listKeys asks the running service, or reads the directory when there is none. running says which.
func listKeys(ctx context.Context, dir string) (_ *adminv1.KeyServiceListResponse, running bool, err error) {
	resp, err := keyClient(dir).List(ctx, &adminv1.KeyServiceListRequest{})
	if !errors.Is(err, control.ErrNotRunning) {
		return resp, true, keySaid(dir, "list keys", err)
	}
	k, err := receiptlog.ReadKeys(dir)
	switch {
	case errors.Is(err, receiptlog.ErrInUse):
		return nil, false, fmt.Errorf("list keys: a process owns %s and does not serve %s: it is starting, stopping, or an audit: ask again",
			dir, control.Name)
	case err != nil:
		return nil, false, fmt.Errorf("list keys: %w", err)
	}
	return server.DirKeyList(k), false, nil
}

// keyJSON shows a key as JSON.
type keyJSON struct {
	VKey      string `json:"vkey"`
	Role      string `json:"role"`
	NotBefore string `json:"not_before,omitempty"`
	NotAfter  string `json:"not_after,omitempty"`
	FirstSize uint64 `json:"first_size"`
	LastSize  uint64 `json:"last_size,omitempty"`
	Ended     string `json:"ended,omitempty"`
	Revoked   bool   `json:"revoked"`
	InForce   bool   `json:"in_force"`
	Custody   string `json:"custody,omitempty"`
}

func rfc3339(ns int64) string {
	if ns == 0 {
		return ""
	}
	return time.Unix(0, ns).UTC().Format(time.RFC3339)
}

func toKeyJSON(l *adminv1.KeyServiceListResponse, k *adminv1.Key) keyJSON {
	custody := l.GetDailyCustody()
	if k.GetRole() == "identity" {
		custody = l.GetIdentityCustody()
	} else if !k.GetInForce() {
		custody = "" // retired: it is gone, or waits to be destroyed
	}
	return keyJSON{
		VKey: k.GetVkey(), Role: k.GetRole(), NotBefore: rfc3339(k.GetNotBeforeUnixNs()), NotAfter: rfc3339(k.GetNotAfterUnixNs()),
		FirstSize: k.GetFirstSize(), LastSize: k.GetLastSize(), Ended: k.GetEnded(), Revoked: k.GetRevoked(), InForce: k.GetInForce(), Custody: custody,
	}
}

func state(k *adminv1.Key) string {
	switch {
	case k.GetRevoked() && k.GetEnded() != "revoked":
		return "revoked (ended: " + k.GetEnded() + ")"
	case k.GetEnded() != "":
		return k.GetEnded()
	}
	return "in force"
}

func texts(notes [][]byte) []string {
	out := make([]string, 0, len(notes))
	for _, n := range notes {
		out = append(out, string(n))
	}
	return out
}

func keysListCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List every key the log has had",
		Long: `List the identity key and every daily key the log has had, with the tree sizes each one signs: those above its first size
and up to its last. It asks the running service, or reads the state directory when none runs.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, err := stateDir(cmd)
			if err != nil {
				return err
			}
			l, running, err := listKeys(cmd.Context(), dir)
			if err != nil {
				return err
			}
			if wantJSON(cmd) {
				ks := make([]keyJSON, 0, len(l.GetKeys()))
				for _, k := range l.GetKeys() {
					ks = append(ks, toKeyJSON(l, k))
				}
				undestroyed := append([]string{}, l.GetUndestroyed()...)
				return printJSON(cmd, map[string]any{
					"origin": l.GetOrigin(), "running": running, "keys": ks, "phase": l.GetPhase(), "next": rfc3339(l.GetNextUnixNs()),
					"last_error": l.GetLastError(), "undestroyed": undestroyed, "revocations": texts(l.GetRevocations()), "seal": string(l.GetSeal()),
				})
			}
			return printKeys(cmd.OutOrStdout(), l, running)
		},
	}
}

func printKeys(out io.Writer, l *adminv1.KeyServiceListResponse, running bool) error {
	fmt.Fprintf(out, "log %s\n", l.GetOrigin())
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "KEY\tSIZES\tFROM\tUNTIL\tSTATE\tVERIFIER KEY")
	for _, k := range l.GetKeys() {
		sizes := "all"
		if k.GetRole() == "daily" {
			sizes = fmt.Sprintf("%d..", k.GetFirstSize())
			if k.GetLastSize() > 0 {
				sizes += fmt.Sprint(k.GetLastSize())
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", k.GetRole(), sizes, cmp.Or(rfc3339(k.GetNotBeforeUnixNs()), "-"),
			cmp.Or(rfc3339(k.GetNotAfterUnixNs()), "-"), state(k), k.GetVkey())
	}
	if err := w.Flush(); err != nil {
		return err
	}
	switch {
	case len(l.GetSeal()) > 0:
		fmt.Fprintln(out, "The log is sealed: nothing is signed any more.")
	case !running:
		fmt.Fprintln(out, "No knhk serves it: read from the state directory.")
	case l.GetPhase() == server.PhaseRevoking:
		fmt.Fprintf(out, "A daily key is to be revoked, and knhk goes on trying: next at %s.\n", rfc3339(l.GetNextUnixNs()))
	case l.GetPhase() == server.PhaseSealing:
		fmt.Fprintf(out, "The log is to be sealed, and knhk goes on trying: next at %s.\n", rfc3339(l.GetNextUnixNs()))
	case l.GetNextUnixNs() != 0:
		fmt.Fprintf(out, "The daily key is %s; next change %s.\n", l.GetPhase(), rfc3339(l.GetNextUnixNs()))
	}
	if e := l.GetLastError(); e != "" {
		fmt.Fprintf(out, "The last attempt to change it failed: %s\n", e)
	}
	for _, u := range l.GetUndestroyed() {
		fmt.Fprintf(out, "Retired, and its private key is still in the store: %s\n", u)
	}
	return nil
}

// findKey finds the key that a person names: a verifier key, its hash, or one of the words identity and daily.
func findKey(l *adminv1.KeyServiceListResponse, name string) (*adminv1.Key, error) {
	var found []*adminv1.Key
	for _, k := range l.GetKeys() {
		hash := ""
		if parts := strings.SplitN(k.GetVkey(), "+", 3); len(parts) == 3 {
			hash = parts[1]
		}
		if name == k.GetVkey() || name == hash || name == "identity" && k.GetRole() == name || name == "daily" && k.GetRole() == name && k.GetInForce() {
			found = append(found, k)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return nil, fmt.Errorf("%d keys have the hash %s: name one by its whole verifier key", len(found), name)
	}
	if name == "daily" {
		return nil, fmt.Errorf("log %s has no daily key in force: 'knhk keys list' shows those it has had", l.GetOrigin())
	}
	return nil, fmt.Errorf("log %s has no key %q: 'knhk keys list' shows those it has had", l.GetOrigin(), name)
}

func keysShowCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "show [KEY]",
		Short: "Show one key",
		Long: `Show one key: by its verifier key, by the 8 hexadecimal digits of its hash, or by the words identity and daily. Without KEY it
is the daily key in force.`,
		Args: args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			dir, err := stateDir(cmd)
			if err != nil {
				return err
			}
			l, _, err := listKeys(cmd.Context(), dir)
			if err != nil {
				return err
			}
			k, err := findKey(l, append(a, "daily")[0])
			if err != nil {
				return err
			}
			j := toKeyJSON(l, k)
			if wantJSON(cmd) {
				return printJSON(cmd, j)
			}
			out := cmd.OutOrStdout()
			fmt.Fprintf(out, "%s key of log %s\nverifier key  %s\n", j.Role, l.GetOrigin(), j.VKey)
			if j.Custody != "" {
				fmt.Fprintf(out, "lives in      %s\n", j.Custody)
			}
			if j.Role == "daily" {
				last := "on, as long as it is in force"
				if j.LastSize > 0 {
					last = fmt.Sprintf("up to %d", j.LastSize)
				}
				fmt.Fprintf(out, "signs         trees above %d leaves, %s\nfrom          %s\nuntil         %s\n", j.FirstSize, last, j.NotBefore, j.NotAfter)
			}
			fmt.Fprintf(out, "state         %s\n", state(k))
			return nil
		},
	}
}

func keysRotateCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "rotate",
		Short: "Replace the daily key now",
		Long: `Have the running service replace the daily key now, whatever its age. It returns when the new key has signed. Requests are decided
all the while, and nobody who verifies has to do anything: the change stands in the log.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, err := stateDir(cmd)
			if err != nil {
				return err
			}
			r, err := keyClient(dir).Rotate(cmd.Context(), &adminv1.KeyServiceRotateRequest{})
			if err != nil {
				return keySaid(dir, "rotate the daily key", err)
			}
			if wantJSON(cmd) {
				return printJSON(cmd, map[string]any{
					"old": r.GetOldVkey(), "new": r.GetNewVkey(), "not_after": rfc3339(r.GetNotAfterUnixNs()), "first_size": r.GetFirstSize(),
				})
			}
			fmt.Fprintf(cmd.OutOrStdout(), "daily key %s\nreplaces  %s\nit signs trees above %d leaves, until %s\n", r.GetNewVkey(), r.GetOldVkey(),
				r.GetFirstSize(), rfc3339(r.GetNotAfterUnixNs()))
			return nil
		},
	}
}

func keysRevokeCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "revoke [KEY] --reason TEXT",
		Short: "Revoke a daily key, or seal the log",
		Long: `Revoke a daily key: it, or the machine it lived in, was compromised. KEY is a verifier key or the 8 hexadecimal digits of its hash;
without KEY it is the daily key in force, which is replaced first. The result is a revocation, a note signed by the identity key:
give it to auditors ('knhk verify --revocation FILE'). Whatever the revoked key signed beyond it then counts for nothing.

With --identity the identity key itself is compromised. Nothing can make good for that, so this SEALS the log: its last leaf says that it
has ended, nothing is decided or signed any more, and requests are refused. Begin a successor with a new state directory and a NEW
identity key, and name the seal under "succeeds" in its configuration.`,
		Args: args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			identity, _ := cmd.Flags().GetBool("identity")
			reason, _ := cmd.Flags().GetString("reason")
			switch {
			case strings.TrimSpace(reason) == "":
				return usageError{errors.New("--reason is required: it is signed, and auditors read it")}
			case identity && len(a) > 0:
				return usageError{errors.New("--identity seals the whole log and takes no KEY: leave out one of the two")}
			}
			dir, err := stateDir(cmd)
			if err != nil {
				return err
			}
			out, err := noteFile(cmd)
			if err != nil {
				return err
			}
			if identity {
				err = seal(cmd, dir, reason, out)
			} else {
				err = revoke(cmd, dir, append(a, "")[0], reason, out)
			}
			return errors.Join(err, out.discard())
		},
	}
	cmd.Flags().String("reason", "", "why, in one line; signed and public (required)")
	cmd.Flags().String("out", "", "write the revocation, or the seal, to this file instead of standard output")
	cmd.Flags().Bool("identity", false, "the identity key is compromised: seal the log for good")
	cmd.Flags().Bool("yes", false, "do not ask before the log is sealed")
	return cmd
}

func revoke(cmd *cobra.Command, dir, key, reason string, out *note) error {
	c := keyClient(dir)
	if key != "" {
		l, err := c.List(cmd.Context(), &adminv1.KeyServiceListRequest{})
		if err != nil {
			return keySaid(dir, "revoke a daily key", err)
		}
		k, err := findKey(l, key)
		if err != nil {
			return err
		}
		key = k.GetVkey()
	}
	r, err := c.Revoke(cmd.Context(), &adminv1.KeyServiceRevokeRequest{Vkey: key, Reason: reason})
	if err != nil {
		return keySaid(dir, "revoke a daily key", err)
	}
	if err := out.write(r.GetRevocation()); err != nil {
		return fmt.Errorf("the key is revoked, but %w: 'knhk keys list -o json' has the revocation", err)
	}
	if wantJSON(cmd) {
		return printJSON(cmd, map[string]any{"revoked": r.GetVkey(), "in_force": r.GetInForceVkey(), "revocation": string(r.GetRevocation())})
	}
	fmt.Fprintf(out.said(), "revoked daily key %s\nin force now is   %s\n", r.GetVkey(), cmp.Or(r.GetInForceVkey(), "none: the log is sealed"))
	if old, err := receipt.ParseRevocation(r.GetRevocation()); err == nil && old.Reason != reason {
		fmt.Fprintf(out.said(), "It was revoked before, at %s: %s\n", old.Time.UTC().Format(time.RFC3339), old.Reason)
	}
	fmt.Fprintln(out.said(), "Give the revocation to auditors: knhk verify --revocation FILE")
	return nil
}

func seal(cmd *cobra.Command, dir, reason string, out *note) error {
	c := keyClient(dir)
	l, err := c.List(cmd.Context(), &adminv1.KeyServiceListRequest{})
	if err != nil {
		return keySaid(dir, "seal the log", err)
	}
	if yes, _ := cmd.Flags().GetBool("yes"); !yes {
		fmt.Fprintf(cmd.ErrOrStderr(), "This ends log %s for good: knhk refuses every request from then on.\nType yes to seal it: ", l.GetOrigin())
		answer, _ := bufio.NewReader(cmd.InOrStdin()).ReadString('\n')
		if strings.TrimSpace(answer) != "yes" {
			return errors.New("not sealed: the answer was not yes (--yes asks nothing)")
		}
	}
	r, err := c.Seal(cmd.Context(), &adminv1.KeyServiceSealRequest{Reason: reason})
	if err != nil {
		return keySaid(dir, "seal the log", err)
	}
	if err := out.write(r.GetSeal()); err != nil {
		return fmt.Errorf("the log is sealed, but %w: 'knhk keys list -o json' has the seal", err)
	}
	if wantJSON(cmd) {
		return printJSON(cmd, map[string]any{"sealed": l.GetOrigin(), "size": r.GetSize(), "seal": string(r.GetSeal())})
	}
	fmt.Fprintf(out.said(), "log %s is sealed above %d leaves\n", l.GetOrigin(), r.GetSize())
	if old, err := receipt.ParseSeal(r.GetSeal()); err == nil && old.Reason != reason {
		fmt.Fprintf(out.said(), "It was sealed before, at %s: %s\n", old.Time.UTC().Format(time.RFC3339), old.Reason)
	}
	fmt.Fprintln(out.said(), "Give the seal to auditors (knhk verify --revocation FILE) and to the successor's configuration (succeeds)")
	return nil
}

// note is where a revocation or a seal goes: standard output, or a file that gets its name when it is on the disk. It is made before
// anything is asked for, since what is asked for cannot be taken back.
type note struct {
	cmd  *cobra.Command
	f    *os.File // nil: standard output
	path string
}

func noteFile(cmd *cobra.Command) (*note, error) {
	n := &note{cmd: cmd}
	n.path, _ = cmd.Flags().GetString("out")
	if n.path == "" {
		return n, nil
	}
	var err error
	if n.f, err = os.OpenFile(n.path+".part", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644); err != nil {
		return nil, fmt.Errorf("--out: %w: nothing was asked for", err)
	}
	return n, nil
}

// said is where people are told: not standard output when the note goes there.
func (n *note) said() io.Writer {
	if n.f == nil && n.path == "" {
		return n.cmd.ErrOrStderr()
	}
	return n.cmd.OutOrStdout()
}

func (n *note) write(b []byte) error {
	if n.path == "" {
		if wantJSON(n.cmd) {
			return nil // it stands in the JSON
		}
		_, err := n.cmd.OutOrStdout().Write(b)
		return err
	}
	_, err := n.f.Write(b)
	if err = errors.Join(err, n.f.Sync(), n.f.Close()); err == nil {
		err = os.Rename(n.path+".part", n.path)
	}
	if err == nil {
		n.f = nil
	}
	return err
}

// discard removes what was not written whole.
func (n *note) discard() error {
	if n.f == nil {
		return nil
	}
	n.f.Close()
	return os.Remove(n.path + ".part")
}
