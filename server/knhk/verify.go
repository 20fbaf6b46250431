package main

import (
	"bytes"
	"encoding/json/jsontext"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/region/receiptlog"
)

func verifyCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify --policy FILE BUNDLE...",
		Short: "Verify bundles offline",
		Long: `Verify bundles with nothing but a policy file: no network, no service, no state directory. A BUNDLE is a file with one
bundle, or with one a line as 'knhk receipts export' writes; "-" is standard input.

One line for each bundle says what it proves or why it is refused. Exit code 1 if any is refused.

With --revocation the verdict heeds what became of keys since: a FILE holds a revocation or a seal, as 'knhk keys revoke --out' writes it,
or several, as /revocations of the admin listener gives them. Bundles must then be consistent with each; one that was fetched before
the revocation brings no proof of that and is refused: fetch it anew.`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, files []string) error {
			path, _ := cmd.Flags().GetString("policy")
			if path == "" {
				return usageError{errors.New("--policy is required: the policy file of the log, from its state directory, or /policy of its " +
					"admin listener")}
			}
			raw, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			p, err := receipt.ParsePolicy(raw)
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			v := &verification{cmd: cmd}
			revocations, _ := cmd.Flags().GetStringArray("revocation")
			if cmd.Flags().Changed("revocation") && len(revocations) == 0 { // a lone empty value comes back as none
				revocations = []string{""}
			}
			for _, f := range revocations {
				if f == "" {
					return usageError{errors.New("--revocation names no file: an empty name must not pass for nothing to heed")}
				}
				if err := v.revoke(p, f); err != nil {
					return err
				}
			}
			v.verifier = receipt.NewVerifier(p)
			v.quiet, _ = cmd.Flags().GetBool("quiet")
			v.story, _ = cmd.Flags().GetBool("story")
			for _, f := range files {
				v.file(f)
			}
			return v.finish()
		},
	}
	cmd.Flags().StringP("policy", "p", "", "policy file of the log (required)")
	cmd.Flags().StringArray("revocation", nil, "file with revocations or a seal to heed (may be given several times)")
	cmd.Flags().BoolP("quiet", "q", false, "only say what is refused, and the sum")
	cmd.Flags().Bool("story", false, "tell each receipt in words")
	return cmd
}

type verification struct {
	cmd          *cobra.Command
	verifier     *receipt.Verifier
	quiet, story bool
	ok, refused  int
	results      []verifyResult
	revocations  []verifyRevocation
}

// verifyRevocation is one that was heeded.
type verifyRevocation struct {
	File   string `json:"file"`
	Origin string `json:"origin"`
	Key    string `json:"key,omitempty"` // of a daily key; empty: the log is sealed
	Size   uint64 `json:"size"`
	Time   string `json:"time"`
	Reason string `json:"reason,omitempty"`
}

// revoke has p heed every revocation and seal of a file.
func (v *verification) revoke(p *receipt.Policy, path string) error {
	raw, err := readNotes(path)
	if err != nil {
		return err
	}
	notes := splitNotes(raw)
	if len(notes) == 0 {
		notes = [][]byte{nil}
	}
	for _, n := range notes {
		if !bytes.HasPrefix(n, []byte(receipt.RevocationPrefix)) && !bytes.HasPrefix(n, []byte(receipt.SealPrefix)) {
			return fmt.Errorf("%s: neither a revocation nor a seal: 'knhk keys revoke --out FILE' writes one", path)
		}
		if err := p.Revoke(n); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if s, err := receipt.ParseSeal(n); err == nil {
			v.revocations = append(v.revocations, verifyRevocation{path, s.Origin, "", s.Size, s.Time.Format(time.RFC3339Nano), s.Reason})
		} else if r, err := receipt.ParseRevocation(n); err == nil {
			v.revocations = append(v.revocations, verifyRevocation{path, r.Origin, r.Key, r.Size, r.Time.Format(time.RFC3339Nano), r.Reason})
		}
	}
	return nil
}

// maxNotes bounds a file of revocations.
const maxNotes = 1 << 20

func readNotes(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxNotes+1))
	if err == nil && len(raw) > maxNotes {
		err = fmt.Errorf("%s: more than %d bytes: too long for revocations", path, maxNotes)
	}
	return raw, err
}

// splitNotes takes apart what stands one after the other: each note begins with the line that says what it is. What stands before
// the first is a note of its own, which nobody will take.
func splitNotes(raw []byte) (notes [][]byte) {
	start := 0
	for at := 0; at < len(raw); {
		rest := raw[at:]
		if at > start && (bytes.HasPrefix(rest, []byte(receipt.RevocationPrefix)) || bytes.HasPrefix(rest, []byte(receipt.SealPrefix))) {
			notes, start = append(notes, raw[start:at]), at
		}
		end := bytes.IndexByte(rest, '\n')
		if end < 0 {
			break
		}
		at += end + 1
	}
	if start < len(raw) {
		notes = append(notes, raw[start:])
	}
	return notes
}

type verifyResult struct {
	File    string `json:"file"`
	Number  int    `json:"number"` // of the bundle in its file, from 1; 0 if the file cannot be read
	OK      bool   `json:"ok"`
	ID      string `json:"id,omitempty"`
	Verdict string `json:"verdict,omitempty"`
	Result  string `json:"result,omitempty"`
	Size    uint64 `json:"checkpoint_size,omitempty"`
	Daily   string `json:"daily_vkey,omitempty"` // the key that signed the checkpoint
	Pins    int    `json:"pins,omitempty"`       // revocations that the checkpoint is consistent with
	Sealed  bool   `json:"sealed,omitempty"`     // it is the last checkpoint of a sealed log
	Error   string `json:"error,omitempty"`
}

// file verifies every bundle of a file. Bundles are JSON values one after the other, so a damaged one ends its file: what
// follows cannot be told apart. So does a file that cannot be read: what cannot be checked is refused.
func (v *verification) file(path string) {
	in := v.cmd.InOrStdin()
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			v.add(verifyResult{File: path, Error: err.Error()}, nil)
			return
		}
		defer f.Close()
		in = f
	}
	dec := jsontext.NewDecoder(in)
	for n := 1; ; n++ {
		raw, err := dec.ReadValue()
		if errors.Is(err, io.EOF) && n > 1 {
			return
		}
		r := verifyResult{File: path, Number: n}
		if err != nil {
			r.Error = fmt.Sprintf("not a bundle: %v", err)
			if errors.Is(err, io.EOF) {
				r.Error = "not a bundle: empty"
			}
			v.add(r, nil)
			return
		}
		b, err := receipt.ParseBundle(bytes.Clone(raw))
		var ok *receipt.Verified
		if err == nil {
			ok, err = v.verifier.Verify(b)
		}
		if err != nil {
			r.Error = err.Error()
		} else {
			r.OK, r.ID, r.Verdict, r.Result, r.Size = true, ok.Decision.ID, ok.Decision.Verdict, "pending", ok.Size
			r.Daily, r.Pins, r.Sealed = ok.Keys[0].Key, len(ok.Pins), ok.Seal != nil
			if n := len(ok.Outcomes); n > 0 {
				r.Result = ok.Outcomes[n-1].Result
			}
		}
		v.add(r, ok)
	}
}

func (v *verification) add(r verifyResult, ok *receipt.Verified) {
	if r.OK {
		v.ok++
	} else {
		v.refused++
	}
	switch out := v.cmd.OutOrStdout(); {
	case wantJSON(v.cmd):
		v.results = append(v.results, r)
	case !r.OK && r.Number == 0:
		fmt.Fprintf(out, "REFUSED %s: %s\n", r.File, r.Error)
	case !r.OK:
		fmt.Fprintf(out, "REFUSED %s #%d: %s\n", r.File, r.Number, r.Error)
	case v.story:
		for _, line := range receipt.Describe(ok) {
			fmt.Fprintln(out, line)
		}
	case !v.quiet:
		more := ""
		switch {
		case r.Pins == 1:
			more = ", consistent with 1 revocation"
		case r.Pins > 1:
			more = fmt.Sprintf(", consistent with %d revocations", r.Pins)
		}
		fmt.Fprintf(out, "ok %s: %s, %s, under a signed log of %d leaves%s\n", r.ID, r.Verdict, r.Result, r.Size, more)
	}
}

func (v *verification) finish() error {
	if wantJSON(v.cmd) {
		if err := printJSON(v.cmd, map[string]any{
			"ok": v.ok, "refused": v.refused, "bundles": v.results, "revocations": append([]verifyRevocation{}, v.revocations...),
		}); err != nil {
			return err
		}
	} else if v.quiet || v.ok+v.refused > 1 {
		fmt.Fprintf(v.cmd.OutOrStdout(), "%d verified, %d refused\n", v.ok, v.refused)
	}
	if v.refused > 0 {
		return errSaid
	}
	return nil
}

func fsckCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "fsck STATE_DIR",
		Short: "Audit a state directory",
		Long: `Audit a state directory that no knhk serves from: the checkpoint's signatures, every leaf and tile of the log, the chain
of headers, every record of every block against its header, evidence, indices and the write-ahead log, and that every record
ever numbered is there or declared lost. It changes nothing. To audit a running knhk, give it a copy taken while it was
stopped, or a snapshot of its volume.

Exit code 1 if anything is wrong; every problem is named.`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelError}))
			r, err := receiptlog.Fsck(cmd.Context(), a[0], log, progress(cmd, "checking"))
			if errors.Is(err, receiptlog.ErrInUse) {
				return fmt.Errorf("audit %s: a running knhk owns it: stop that one, or audit a copy", a[0])
			}
			if err != nil {
				return err
			}
			if wantJSON(cmd) {
				if r.Problems == nil {
					r.Problems = []receiptlog.Problem{}
				}
				if err := printJSON(cmd, r); err != nil {
					return err
				}
			} else {
				out := cmd.OutOrStdout()
				for _, p := range r.Problems {
					fmt.Fprintf(out, "WRONG %s: %s\n", p.Where, p.What)
				}
				fmt.Fprintf(out, "%s: %d leaves signed: %d headers of %d incarnations, %d key statements; %d blocks with %d decisions and "+
					"%d outcomes; %d blocks not signed yet; %d records not in a block yet; %d problems\n", r.Origin, r.CheckpointSize, r.Headers, r.Incarnations, r.KeyStatements,
					r.Blocks, r.Decisions, r.Outcomes, r.Unlogged, r.Unsealed, len(r.Problems))
			}
			if len(r.Problems) > 0 {
				return errSaid
			}
			return nil
		},
	}
	return cmd
}
