package crash

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/mod/sumdb/tlog"

	adminv1 "github.com/knhk/sidecar/api/knhk/admin/v1"
	"github.com/knhk/sidecar/api/knhk/admin/v1/adminv1connect"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/e2e/stack"
)

// auditor holds what was seen outside of knhk against what knhk says. Each check of a round costs what the round brought, not what
// all rounds did.
type auditor struct {
	s        *stack.Stack
	policy   string // file: the policy as it was when the log was new
	verifier *receipt.Verifier
	log      *publicLog
	admin    adminv1connect.ReceiptServiceClient

	requests map[string]*request // by path
	acked    map[string]*request // by the receipt id that the client got
	reached  map[string]string   // x-request-id of what the upstream saw, by path
	listed   map[string]bool     // ids that knhk has listed
	newest   string              // the last of them
	deaths   [][2]time.Time      // when a process was ended: between these
	early    *os.File            // bundles that were taken before a crash
	earlyN   int
}

// newAuditor pins the policy of a running stack.
func newAuditor(ctx context.Context, s *stack.Stack) (*auditor, error) {
	a := &auditor{s: s, policy: filepath.Join(s.Dir, "pinned-policy"), requests: map[string]*request{}, acked: map[string]*request{},
		reached: map[string]string{}, listed: map[string]bool{}}
	plain := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: harness.Patience}
	a.admin = adminv1connect.NewReceiptServiceClient(plain, "http://"+s.Admin)
	text, err := os.ReadFile(filepath.Join(s.StateDir, "policy"))
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(a.policy, text, 0o600); err != nil {
		return nil, err
	}
	p, err := receipt.ParsePolicy(text)
	if err != nil {
		return nil, err
	}
	a.verifier = receipt.NewVerifier(p)
	if a.log, err = openPublicLog(logDir(s.StateDir), text); err != nil {
		return nil, err
	}
	if a.early, err = os.Create(filepath.Join(s.Dir, "early.jsonl")); err != nil {
		return nil, err
	}
	return a, a.log.awaitFirst(ctx)
}

// bundle waits for the bundle of a receipt and verifies it under the pinned policy.
func (a *auditor) bundle(ctx context.Context, id string) ([]byte, *receipt.Verified, error) {
	ctx, cancel := context.WithTimeout(ctx, harness.Patience)
	defer cancel()
	for {
		resp, err := a.admin.Get(ctx, &adminv1.GetRequest{Key: &adminv1.GetRequest_Id{Id: id}, Evidence: true})
		if err == nil {
			v, err := a.verify(resp.GetBundle())
			return resp.GetBundle(), v, err
		}
		if connect.CodeOf(err) != connect.CodeFailedPrecondition { // not under a checkpoint yet
			return nil, nil, fmt.Errorf("get %s: %w", id, err)
		}
		select {
		case <-ctx.Done():
			return nil, nil, fmt.Errorf("get %s: %w", id, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (a *auditor) verify(raw []byte) (*receipt.Verified, error) {
	b, err := receipt.ParseBundle(raw)
	if err != nil {
		return nil, err
	}
	v, err := a.verifier.Verify(b)
	if err != nil {
		return nil, err
	}
	a.log.saw(tlog.Tree{N: int64(v.Size), Hash: tlog.Hash(v.Root)})
	return v, nil
}

// keep takes the bundle of a receipt before a crash, to be verified after it.
func (a *auditor) keep(ctx context.Context, id string) ([]byte, error) {
	raw, _, err := a.bundle(ctx, id)
	if err != nil {
		return nil, err
	}
	a.earlyN++
	_, err = a.early.Write(raw)
	return raw, err
}

// round checks what a round has brought. journal is what clients saw.
func (a *auditor) round(ctx context.Context, journal []*request) error {
	for _, r := range journal {
		a.requests[r.path] = r
		if r.id == "" {
			continue
		}
		if other := a.acked[r.id]; other != nil {
			return fmt.Errorf("receipt %s was given to %s and to %s", r.id, other.path, r.path)
		}
		a.acked[r.id] = r
	}
	if err := a.settle(ctx, false); err != nil {
		return err
	}
	if err := a.log.read(ctx); err != nil {
		return err
	}
	if err := a.list(ctx); err != nil {
		return err
	}
	for _, r := range journal {
		if r.id != "" && !a.listed[r.id] {
			return fmt.Errorf("%s %s: status %d with receipt %s, which is not under the log", r.class, r.path, r.status, r.id)
		}
	}
	return a.upstream(ctx)
}

// settle waits until every record is under a signed checkpoint; all: and every decision has its outcome.
func (a *auditor) settle(ctx context.Context, all bool) error {
	deadline := time.Now().Add(harness.Patience)
	for {
		st, err := a.admin.Status(ctx, &adminv1.StatusRequest{})
		if err != nil {
			return err
		}
		if st.GetUnsignedNs() == 0 && st.GetCheckpointSize() > 0 && (!all || st.GetPendingOutcomes() == 0) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not settled: %d outcomes pending, unsigned for %v", st.GetPendingOutcomes(), time.Duration(st.GetUnsignedNs()))
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// page is how many receipts are listed at once.
const page = 500

// list lists the receipts that are new since it was last called. Each is under the log, and none was listed before.
func (a *auditor) list(ctx context.Context) error {
	before, newest := "", a.newest
	for {
		resp, err := a.admin.List(ctx, &adminv1.ListRequest{Limit: page, Before: before})
		if err != nil {
			return fmt.Errorf("list: %w", err)
		}
		for _, r := range resp.GetReceipts() {
			if r.GetId() == a.newest {
				a.newest = newest
				return nil
			}
			if before == "" {
				newest = r.GetId()
			}
			before = r.GetId()
			if a.listed[r.GetId()] {
				return fmt.Errorf("receipt %s is listed twice", r.GetId())
			}
			if r.GetState() != "logged" {
				return fmt.Errorf("receipt %s is %s", r.GetId(), r.GetState())
			}
			a.listed[r.GetId()] = true
		}
		if len(resp.GetReceipts()) < page {
			if a.newest != "" {
				return fmt.Errorf("receipt %s, once listed, is gone", a.newest)
			}
			a.newest = newest
			return nil
		}
	}
}

// upstream takes what the upstream saw and looks for the decision about each.
func (a *auditor) upstream(ctx context.Context) error {
	seen := a.s.Upstream.Seen()
	a.s.Upstream.Forget()
	for _, s := range seen {
		if _, twice := a.reached[s.Path]; twice {
			return fmt.Errorf("the upstream saw %s twice", s.Path)
		}
		a.reached[s.Path] = s.RequestID
		if r := a.requests[s.Path]; r != nil && r.id != "" {
			continue // its receipt was looked for
		}
		// Nobody got an id for it: find it by its x-request-id.
		resp, err := a.admin.List(ctx, &adminv1.ListRequest{Limit: 10, RequestId: s.RequestID})
		if err != nil {
			return err
		}
		if len(resp.GetReceipts()) == 0 {
			return fmt.Errorf("the upstream saw %s (x-request-id %s), but there is no decision", s.Path, s.RequestID)
		}
	}
	return nil
}

// died says whether a process was ended while a request was under way.
func (a *auditor) died(r *request) bool {
	for _, d := range a.deaths {
		if r.begun.Before(d[1]) && r.ended.After(d[0]) {
			return true
		}
	}
	return false
}

// exported is what an export of everything has shown.
type exported struct {
	ids     map[string]bool
	decided map[string][]string // ids by path

	receipts, records, unknown, late, twice int
}

// export exports everything and verifies each receipt under the pinned policy.
func (a *auditor) export(ctx context.Context) (*exported, error) {
	if err := a.settle(ctx, true); err != nil {
		return nil, err
	}
	file := filepath.Join(a.s.Dir, "all.jsonl")
	if _, err := a.s.Run(ctx, nil, "receipts", "export", "--evidence", "--file", file); err != nil {
		return nil, err
	}
	if err := a.log.read(ctx); err != nil {
		return nil, err
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	e := &exported{ids: map[string]bool{}, decided: map[string][]string{}}
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, receipt.MaxBundle+1)
	for sc.Scan() {
		v, path, err := a.whole(sc.Bytes())
		if err != nil {
			return nil, err
		}
		d := &v.Decision
		if e.ids[d.ID] {
			return nil, fmt.Errorf("receipt %s is in the log twice", d.ID)
		}
		e.ids[d.ID] = true
		e.decided[path] = append(e.decided[path], d.ID)
		e.receipts++
		e.records += 1 + len(v.Outcomes)
		if v.Outcomes[0].Result == "unknown" {
			e.unknown++
		}
		if len(v.Outcomes) > 1 {
			e.late++
		}
	}
	return e, sc.Err()
}

// judge holds an export against both journals and the log.
func (a *auditor) judge(e *exported) error {
	if uint64(e.records) != a.log.records {
		return fmt.Errorf("the headers in the log count %d records, the export has %d", a.log.records, e.records)
	}
	for id, r := range a.acked {
		if !e.ids[id] {
			return fmt.Errorf("%s %s: receipt %s is not in the export", r.class, r.path, id)
		}
	}
	for path := range a.reached {
		if len(e.decided[path]) == 0 {
			return fmt.Errorf("the upstream saw %s, but there is no decision", path)
		}
	}
	e.twice = 0
	for path, list := range e.decided {
		// Envoy asks again when knhk dies before it has answered: the first decision went nowhere.
		if r := a.requests[path]; len(list) > 1 && (r == nil || !a.died(r)) {
			return fmt.Errorf("%s has %d decisions: %v", path, len(list), list)
		}
		e.twice += len(list) - 1
	}
	return a.refusals()
}

// whole verifies one bundle of the export, which has its outcome, and holds it against the request it is about.
func (a *auditor) whole(raw []byte) (_ *receipt.Verified, path string, err error) {
	b, err := receipt.ParseBundle(raw)
	if err != nil {
		return nil, "", err
	}
	v, err := a.verifier.Verify(b)
	if err != nil {
		return nil, "", err
	}
	for _, h := range b.Headers {
		if !a.log.leaves[receipt.LeafHash(h.Leaf)] {
			return nil, "", fmt.Errorf("%s: its header is not in the log", v.Decision.ID)
		}
	}
	if v.Pending() {
		return nil, "", fmt.Errorf("%s has no outcome", v.Decision.ID)
	}
	if v.Evidence == nil {
		return nil, "", fmt.Errorf("%s has no evidence", v.Decision.ID)
	}
	for _, f := range v.Evidence.Fields {
		if f.Name == "path" {
			path = f.Value
		}
	}
	r := a.requests[path]
	if r == nil {
		return nil, "", fmt.Errorf("%s is about %q, which nobody asked for", v.Decision.ID, path)
	}
	if got := a.acked[v.Decision.ID]; got != nil && got != r {
		return nil, "", fmt.Errorf("%s is about %s, but was given to %s", v.Decision.ID, path, got.path)
	}
	if _, ran := a.reached[path]; ran && r.id == v.Decision.ID && v.Decision.Verdict != "admit" {
		return nil, "", fmt.Errorf("%s: the upstream saw %s, the verdict is %s", v.Decision.ID, path, v.Decision.Verdict)
	}
	if o := v.Outcomes[len(v.Outcomes)-1]; o.Result == "complete" && r.id == v.Decision.ID && int(o.Status) != r.status {
		return nil, "", fmt.Errorf("%s: %s got status %d, the outcome says %d", v.Decision.ID, path, r.status, o.Status)
	}
	if v.Decision.Class != r.class {
		return nil, "", fmt.Errorf("%s: class %s on a route of %s", v.Decision.ID, v.Decision.Class, r.class)
	}
	return v, path, nil
}

// refusals checks that what was refused without a receipt did not go on, and that what was answered did.
func (a *auditor) refusals() error {
	for path, r := range a.requests {
		_, ran := a.reached[path]
		switch {
		case r.id == "" && ran:
			return fmt.Errorf("%s: %d without receipt, but the upstream saw it", path, r.status)
		case r.id == "" && r.status != http.StatusServiceUnavailable && r.status != http.StatusGatewayTimeout:
			return fmt.Errorf("%s: %d without receipt", path, r.status)
		case r.status == http.StatusOK && !ran:
			return fmt.Errorf("%s: %d, but the upstream has not seen it", path, r.status)
		}
	}
	return nil
}

// earlier verifies, with the program, every bundle that was taken before a crash.
func (a *auditor) earlier(ctx context.Context) error {
	if a.earlyN == 0 {
		return errors.New("no bundle was taken before a crash")
	}
	out, err := a.s.Run(ctx, nil, "verify", "-o", "json", "--policy", a.policy, a.early.Name())
	if err != nil {
		return err
	}
	var said struct {
		OK, Refused int
	}
	if err := json.Unmarshal(out, &said); err != nil {
		return err
	}
	if said.OK != a.earlyN || said.Refused != 0 {
		return fmt.Errorf("%d of %d bundles taken before a crash verify, %d are refused", said.OK, a.earlyN, said.Refused)
	}
	return nil
}

// fsckReport is what `knhk fsck -o json` prints.
type fsckReport struct {
	Incarnations, Headers, Decisions, Outcomes, Unlogged uint64
	Problems                                             []struct{ Where, What string }
}

// fsck audits the directory of a knhk that does not run.
func fsck(ctx context.Context, s *stack.Stack) (*fsckReport, error) {
	out, err := s.Run(ctx, nil, "fsck", "-o", "json", s.StateDir)
	if err != nil {
		return nil, err
	}
	r := &fsckReport{Problems: nil}
	if err := json.Unmarshal(out, r); err != nil {
		return nil, fmt.Errorf("fsck: %w: %s", err, out)
	}
	if r.Problems == nil || len(r.Problems) > 0 {
		return nil, fmt.Errorf("fsck: %s", out)
	}
	return r, nil
}
