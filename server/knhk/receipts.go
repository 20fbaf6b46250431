package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"connectrpc.com/connect"
	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	adminv1 "github.com/knhk/sidecar/api/knhk/admin/v1"
	"github.com/knhk/sidecar/api/knhk/admin/v1/adminv1connect"
	"github.com/knhk/sidecar/crypto/receipt"
)

const defaultAdmin = "127.0.0.1:9003"

func receiptsCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "receipts",
		Short: "Read the receipts of a running knhk",
		Args:  args(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	adminFlags(cmd)
	cmd.AddCommand(getCmd(), listCmd(), exportCmd(), tailCmd(), statusCmd())
	return cmd
}

// said turns an error of the admin API into one line that says what to do.
func said(cmd *cobra.Command, err error) error {
	if err == nil {
		return nil
	}
	addr, _ := cmd.Flags().GetString("admin")
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return err
	}
	if r := (refusal{}); errors.As(err, &r) {
		return fmt.Errorf("admin listener %s: %w", addr, r)
	}
	switch ce.Code() {
	case connect.CodePermissionDenied:
		return fmt.Errorf("refused by knhk at %s: %s", addr, ce.Message())
	case connect.CodeUnavailable:
		return fmt.Errorf("cannot reach knhk at %s (%s): is it running? --admin or KNHK_ADMIN says where", addr, ce.Message())
	case connect.CodeFailedPrecondition:
		return fmt.Errorf("%s: ask again in a second, or let --wait 5s do that", ce.Message())
	case connect.CodeInvalidArgument:
		return usageError{errors.New(ce.Message())}
	}
	return errors.New(ce.Message())
}

func getCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "get ID",
		Short: "Get the bundle of one receipt, or tell it as a story",
		Long: `Get the bundle of one receipt as JSON, ready for 'knhk verify': by receipt id (the x-knhk-receipt header), or with
--request-id or --trace-id. --story verifies it under the log's own policy and tells it in words.

A fresh receipt has no proof until its block is sealed and signed, about a second later; --wait waits for that.`,
		Args: args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			req := &adminv1.GetRequest{}
			rid, _ := cmd.Flags().GetString("request-id")
			tid, _ := cmd.Flags().GetString("trace-id")
			switch n := len(a); {
			case n == 1 && rid == "" && tid == "":
				req.Key = &adminv1.GetRequest_Id{Id: a[0]}
			case n == 0 && rid != "" && tid == "":
				req.Key = &adminv1.GetRequest_RequestId{RequestId: rid}
			case n == 0 && rid == "" && tid != "":
				req.Key = &adminv1.GetRequest_TraceId{TraceId: tid}
			default:
				return usageError{errors.New("name one receipt: ID, --request-id or --trace-id")}
			}
			req.Evidence, _ = cmd.Flags().GetBool("evidence")
			story, _ := cmd.Flags().GetBool("story")
			req.Evidence = req.Evidence || story
			wait, _ := cmd.Flags().GetDuration("wait")
			c, err := client(cmd)
			if err != nil {
				return err
			}
			bundle, err := getBundle(cmd.Context(), c, req, wait)
			if err != nil {
				return said(cmd, err)
			}
			if !story {
				_, err = cmd.OutOrStdout().Write(append(bytes.TrimSuffix(bundle, []byte("\n")), '\n'))
				return err
			}
			return tellStory(cmd, c, bundle)
		},
	}
	cmd.Flags().String("request-id", "", "by x-request-id")
	cmd.Flags().String("trace-id", "", "by W3C trace id (32 hex digits)")
	cmd.Flags().Bool("evidence", false, "include the evidence: method, path, source and so on, with their salt")
	cmd.Flags().Bool("story", false, "tell the receipt in words")
	cmd.Flags().Duration("wait", 0, "wait this long for the receipt and its outcome to be sealed and signed")
	return cmd
}

// getBundle asks until the bundle is there and has its outcome, or wait is over.
func getBundle(ctx context.Context, c adminv1connect.ReceiptServiceClient, req *adminv1.GetRequest, wait time.Duration) ([]byte, error) {
	deadline := time.Now().Add(wait)
	for {
		resp, err := c.Get(ctx, req)
		again := connect.CodeOf(err) == connect.CodeFailedPrecondition || connect.CodeOf(err) == connect.CodeNotFound
		if err == nil {
			b, perr := receipt.ParseBundle(resp.GetBundle())
			again = perr == nil && len(b.Records) < 2
		}
		if !again || time.Now().After(deadline) {
			return resp.GetBundle(), err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func tellStory(cmd *cobra.Command, c adminv1connect.ReceiptServiceClient, bundle []byte) error {
	s, err := c.Status(cmd.Context(), &adminv1.StatusRequest{})
	if err != nil {
		return said(cmd, err)
	}
	p, err := receipt.ParsePolicy(fmt.Appendf(nil, "log %s\nquorum none\n", s.GetIdentityVkey()))
	if err != nil {
		return err
	}
	b, err := receipt.ParseBundle(bundle)
	if err != nil {
		return err
	}
	v, err := receipt.Verify(p, b)
	if err != nil {
		return fmt.Errorf("the receipt does not verify: %w", err)
	}
	for _, line := range receipt.Describe(v) {
		fmt.Fprintln(cmd.OutOrStdout(), line)
	}
	return nil
}

func listCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List receipts, newest first",
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			req := &adminv1.ListRequest{}
			req.Limit, _ = cmd.Flags().GetUint32("limit")
			req.Before, _ = cmd.Flags().GetString("before")
			req.RequestId, _ = cmd.Flags().GetString("request-id")
			req.TraceId, _ = cmd.Flags().GetString("trace-id")
			c, err := client(cmd)
			if err != nil {
				return err
			}
			resp, err := c.List(cmd.Context(), req)
			if err != nil {
				return said(cmd, err)
			}
			if wantJSON(cmd) {
				out := make([]recordJSON, 0, len(resp.GetReceipts()))
				for _, r := range resp.GetReceipts() {
					out = append(out, toJSON(r))
				}
				return printJSON(cmd, out)
			}
			fmt.Fprintf(cmd.OutOrStdout(), summaryFormat+"\n", "RECEIPT", "STATE", "CLASS", "VERDICT", "REASON", "STATUS", "RESULT")
			for _, r := range resp.GetReceipts() {
				fmt.Fprintln(cmd.OutOrStdout(), summaryLine(r))
			}
			return nil
		},
	}
	cmd.Flags().Uint32("limit", 20, "at most this many")
	cmd.Flags().String("before", "", "only receipts before this id")
	cmd.Flags().String("request-id", "", "only receipts of this x-request-id")
	cmd.Flags().String("trace-id", "", "only receipts of this W3C trace id")
	return cmd
}

// recordJSON shows records as JSON within JSON.
type recordJSON struct {
	ID       string          `json:"id"`
	State    string          `json:"state"`
	Decision json.RawMessage `json:"decision,omitempty"`
	Outcome  json.RawMessage `json:"outcome,omitempty"`
}

func toJSON(r *adminv1.Receipt) recordJSON {
	return recordJSON{r.GetId(), r.GetState(), json.RawMessage(r.GetDecision()), json.RawMessage(r.GetOutcome())}
}

// summaryFormat lines up what list prints.
const summaryFormat = "%-45s %-8s %-5s %-7s %-16s %-6s %s"

func summaryLine(r *adminv1.Receipt) string {
	d := &receipt.Decision{}
	if p, err := receipt.ParseDecision([]byte(receipt.DecisionPrefix + r.GetDecision())); err == nil {
		d = p
	}
	status, result := "-", "pending"
	if o, err := receipt.ParseOutcome([]byte(receipt.OutcomePrefix + r.GetOutcome())); err == nil {
		status, result = fmt.Sprint(o.Status), o.Result
	}
	return fmt.Sprintf(summaryFormat, r.GetId(), r.GetState(), d.Class, d.Verdict, d.Reason, status, result)
}

func exportCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "export",
		Short: "Export the bundles of all receipts, one JSON a line",
		Long: `Export the bundles of every receipt that is under the latest signed checkpoint, one JSON a line, in order of admission.
The result goes to --file, written aside and renamed when it is whole, or to standard output. 'knhk verify' reads it.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			path, _ := cmd.Flags().GetString("file")
			if path == "" {
				return export(cmd, cmd.OutOrStdout())
			}
			part := path + ".part"
			f, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
			if err != nil {
				return err
			}
			if err = errors.Join(export(cmd, f), f.Sync(), f.Close()); err == nil {
				err = os.Rename(part, path)
			}
			if err != nil {
				return errors.Join(err, os.Remove(part))
			}
			return nil
		},
	}
	cmd.Flags().Bool("evidence", false, "include the evidence")
	cmd.Flags().String("file", "", "write to this file instead of standard output")
	return cmd
}

// export writes every bundle to out, one a line. After an error what it has written is not whole.
func export(cmd *cobra.Command, out io.Writer) error {
	req := &adminv1.ExportRequest{}
	req.Evidence, _ = cmd.Flags().GetBool("evidence")
	c, err := client(cmd)
	if err != nil {
		return err
	}
	stream, err := c.Export(cmd.Context(), req)
	if err != nil {
		return said(cmd, err)
	}
	defer stream.Close()
	bar := progress(cmd, "exporting")
	var done uint64
	var line bytes.Buffer
	for stream.Receive() {
		m := stream.Msg()
		done = m.GetDone()
		line.Reset()
		if err := json.Compact(&line, m.GetBundle()); err != nil {
			return err
		}
		line.WriteByte('\n')
		if _, err := out.Write(line.Bytes()); err != nil {
			return err
		}
		bar(done, m.GetTotal())
	}
	bar(done, done)
	if err := stream.Err(); err != nil {
		return said(cmd, err)
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "exported %d receipts\n", done)
	return nil
}

// progress returns a function that shows how far a long work is, on standard error if that is a terminal.
func progress(cmd *cobra.Command, what string) func(done, total uint64) {
	f, ok := cmd.ErrOrStderr().(*os.File)
	if !ok {
		return func(uint64, uint64) {}
	}
	if fi, err := f.Stat(); err != nil || fi.Mode()&os.ModeCharDevice == 0 {
		return func(uint64, uint64) {}
	}
	bar := progressbar.NewOptions64(-1, progressbar.OptionSetWriter(f), progressbar.OptionSetDescription(what), progressbar.OptionShowCount(),
		progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionClearOnFinish())
	return func(done, total uint64) {
		if total > 0 && bar.GetMax64() != int64(total) {
			bar.ChangeMax64(int64(total))
		}
		bar.Set64(int64(done))
	}
}

func tailCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "tail",
		Short: "Follow records as they are written",
		Long:  `Follow decisions and outcomes as they are written, until interrupted. A reader that is too slow misses records.`,
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := client(cmd)
			if err != nil {
				return err
			}
			stream, err := c.Tail(cmd.Context(), &adminv1.TailRequest{})
			if err != nil {
				return said(cmd, err)
			}
			defer stream.Close()
			for stream.Receive() {
				r := stream.Msg().GetReceipt()
				switch {
				case r == nil: // we are connected
				case wantJSON(cmd):
					b, err := json.Marshal(toJSON(r))
					if err != nil {
						return err
					}
					fmt.Fprintln(cmd.OutOrStdout(), string(b))
				default:
					fmt.Fprintln(cmd.OutOrStdout(), tailLine(r))
				}
			}
			if cmd.Context().Err() != nil {
				return nil
			}
			return said(cmd, stream.Err())
		},
	}
}

func tailLine(r *adminv1.Receipt) string {
	if d, err := receipt.ParseDecision([]byte(receipt.DecisionPrefix + r.GetDecision())); err == nil {
		return fmt.Sprintf("%s decision %s %s %s route=%q", d.ID, d.Class, d.Verdict, d.Reason, d.Route)
	}
	if o, err := receipt.ParseOutcome([]byte(receipt.OutcomePrefix + r.GetOutcome())); err == nil {
		return fmt.Sprintf("%s outcome  %s %d %s", o.ID, o.Result, o.Status, o.Details)
	}
	return r.GetId()
}

func statusCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Say how the log stands",
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := client(cmd)
			if err != nil {
				return err
			}
			s, err := c.Status(cmd.Context(), &adminv1.StatusRequest{})
			if err != nil {
				return said(cmd, err)
			}
			expires := rfc3339(s.GetDailyExpiresUnixNs())
			unsigned := time.Duration(s.GetUnsignedNs()).Round(time.Millisecond)
			if wantJSON(cmd) {
				return printJSON(cmd, map[string]any{
					"origin": s.GetOrigin(), "identity_vkey": s.GetIdentityVkey(), "daily_vkey": s.GetDailyVkey(), "daily_expires": expires,
					"identity_custody": s.GetIdentityCustody(), "daily_custody": s.GetDailyCustody(), "sealed": s.GetSealed(), "decisions": s.GetDecisions(), "pending_outcomes": s.GetPendingOutcomes(), "blocks": s.GetBlocks(),
					"checkpoint_size": s.GetCheckpointSize(), "unsigned_seconds": unsigned.Seconds(), "refusing": s.GetRefusing(),
					"checkpoint": s.GetCheckpoint(),
				})
			}
			until := cmp.Or(expires, "-")
			if s.GetSealed() {
				until = "- (the log is sealed: nothing signs for it any more)"
			}
			refusing := s.GetRefusing()
			if refusing == "" {
				refusing = "no"
			}
			fmt.Fprintf(cmd.OutOrStdout(), `origin       %s
identity     %s
  lives in   %s
daily key    %s
  lives in   %s
  signs until %s
decisions    %d since start, %d wait for their outcome
blocks       %d
checkpoint   %d leaves signed, oldest unsigned record %v old
refusing     %s
`, s.GetOrigin(), s.GetIdentityVkey(), cmp.Or(s.GetIdentityCustody(), "-"), cmp.Or(s.GetDailyVkey(), "-"),
				cmp.Or(s.GetDailyCustody(), "-"), until, s.GetDecisions(), s.GetPendingOutcomes(),
				s.GetBlocks(), s.GetCheckpointSize(), unsigned, refusing)
			return nil
		},
	}
}
