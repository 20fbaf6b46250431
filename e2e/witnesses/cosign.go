package witnesses

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"filippo.io/torchwood"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/knhk/sidecar/e2e/harness"
)

// client calls loopback alone, past any proxy.
var client = &http.Client{Transport: &http.Transport{}, Timeout: harness.Patience}

// maxAnswer bounds what is read of an answer: cosignatures are a line each.
const maxAnswer = 64 << 10

// Cosign has both witnesses cosign a checkpoint, whose consistency with the ones before is proven from hashes, and verifies it with
// what they added, under a torchwood policy of the log's identity key and both of them. The checkpoints of a log come in the order in
// which they were made; hashes must hold all trees up to this one's.
func (s *Set) Cosign(ctx context.Context, checkpoint []byte, hashes tlog.HashReader) error {
	n, err := note.Open(checkpoint, note.VerifierList(s.log))
	if err != nil {
		return fmt.Errorf("cosign: %w", err)
	}
	c, err := torchwood.ParseCheckpoint(n.Text)
	if err != nil {
		return fmt.Errorf("cosign: %w", err)
	}
	signed := bytes.Clone(checkpoint)
	for _, w := range s.witnesses {
		lines, err := w.cosign(ctx, c.Tree, checkpoint, hashes)
		if err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
		signed = append(signed, lines...)
	}
	got, n, err := torchwood.VerifyCheckpoint(signed, s.policy)
	if err != nil {
		return fmt.Errorf("cosigned checkpoint: %w\n%s", err, signed)
	}
	if got.Tree != c.Tree || len(n.Sigs) != 1+len(s.witnesses) {
		return fmt.Errorf("cosigned checkpoint has %d known signatures, want the log's and %d:\n%s", len(n.Sigs), len(s.witnesses), signed)
	}
	s.last = got
	return nil
}

// cosign submits until there is an answer. A witness may have cosigned and the answer be lost, when a machine is so busy that one of
// the witness's own limits of 5 seconds passes; it then says what size it has, and is asked for the cosignature of that.
func (w *witness) cosign(ctx context.Context, tree tlog.Tree, checkpoint []byte, hashes tlog.HashReader) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, harness.Patience)
	defer cancel()
	if tree.N < w.size {
		return nil, fmt.Errorf("the log had %d leaves, now %d", w.size, tree.N)
	}
	lost := false
	for {
		body, err := w.request(tree, checkpoint, hashes)
		if err != nil {
			return nil, err
		}
		status, kind, answer, err := w.submit(ctx, body)
		switch {
		case err != nil && ctx.Err() != nil:
			return nil, err
		case err != nil:
			lost = true
			select {
			case <-ctx.Done():
				return nil, err
			case <-time.After(100 * time.Millisecond):
			}
		case lost && status == http.StatusConflict && kind == "text/x.tlog.size" && strings.TrimSpace(string(answer)) == strconv.FormatInt(tree.N, 10):
			w.size = tree.N
		case status != http.StatusOK:
			return nil, &Refusal{Status: status, Text: strings.TrimSpace(string(answer)), Old: w.size, New: tree.N}
		default:
			w.size = tree.N
			return answer, nil
		}
	}
}

// Refusal is a witness's answer to a checkpoint that it does not cosign.
type Refusal struct {
	Status   int // HTTP, as C2SP's tlog-witness has it: 403 no known key (omniwitness: 500), 409 another size, 422 bad proof
	Text     string
	Old, New int64 // leaves
}

// Error says what was refused, and why.
func (r *Refusal) Error() string {
	return fmt.Sprintf("refuses %d leaves after %d: status %d: %s", r.New, r.Old, r.Status, r.Text)
}

// request is the body of add-checkpoint.
func (w *witness) request(tree tlog.Tree, checkpoint []byte, hashes tlog.HashReader) ([]byte, error) {
	body := fmt.Appendf(nil, "old %d\n", w.size)
	if w.size > 0 && w.size < tree.N {
		proof, err := tlog.ProveTree(tree.N, w.size, hashes)
		if err != nil {
			return nil, fmt.Errorf("consistency of %d and %d leaves: %w", w.size, tree.N, err)
		}
		for _, h := range proof {
			body = fmt.Appendln(body, base64.StdEncoding.EncodeToString(h[:]))
		}
	}
	body = append(body, '\n')
	return append(body, checkpoint...), nil
}

func (w *witness) submit(ctx context.Context, body []byte) (status int, kind string, answer []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.url, bytes.NewReader(body))
	if err != nil {
		return 0, "", nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", nil, err
	}
	defer resp.Body.Close()
	answer, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	return resp.StatusCode, resp.Header.Get("Content-Type"), answer, err
}
