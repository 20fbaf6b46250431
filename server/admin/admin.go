// Package admin serves the people and tools that run knhk: receipts over Connect (gRPC, gRPC-Web and JSON over HTTP),
// /metrics, /livez, /readyz, /policy (the policy file of the log), /keys, /jwks.json, /revocations and Go's profiles under /debug/pprof/.
//
// It promises to be read-only: nothing here changes what is admitted or recorded. It authenticates nobody: server puts package access
// before it. It starts nothing; server serves the handler.
package admin

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/pprof"

	"connectrpc.com/connect"

	adminv1 "github.com/knhk/sidecar/api/knhk/admin/v1"
	"github.com/knhk/sidecar/api/knhk/admin/v1/adminv1connect"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/region/receiptlog"
	"github.com/knhk/sidecar/server/access"
)

const (
	defaultList = 100
	maxList     = 10000
	tailBuffer  = 1024 // records a slow reader may lag behind before it misses some
)

// Config is what New needs; all fields are required unless they say otherwise.
type Config struct {
	Log     *receiptlog.Log
	Metrics http.Handler
	// Ready says why requests are not being admitted; nil when they are.
	Ready func() error
	// Where the keys live, in words; empty for a sealed log, which needs none.
	IdentityCustody, DailyCustody string
}

// New returns the handler of the admin listener.
func New(cfg Config) *access.Mux {
	mux := &access.Mux{}
	mux.Handle(adminv1connect.NewReceiptServiceHandler(&receipts{cfg.Log, cfg.IdentityCustody, cfg.DailyCustody}))
	publishKeys(mux, cfg.Log)
	mux.Handle("GET /metrics", cfg.Metrics)
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := cfg.Ready(); err != nil {
			http.Error(w, "not ready: "+err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("GET /policy", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Write(cfg.Log.Policy())
	})
	return mux
}

// receipts answers knhk.admin.v1.ReceiptService.
type receipts struct {
	log                           *receiptlog.Log
	identityCustody, dailyCustody string
}

// code maps the log's errors to Connect's, in one place.
func code(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, receiptlog.ErrNotFound):
		return connect.NewError(connect.CodeNotFound, err)
	case errors.Is(err, receiptlog.ErrPending):
		return connect.NewError(connect.CodeFailedPrecondition, err)
	case errors.Is(err, access.ErrRevoked):
		return connect.NewError(connect.CodePermissionDenied, err)
	case errors.Is(err, context.Canceled):
		return connect.NewError(connect.CodeCanceled, err)
	}
	return connect.NewError(connect.CodeInternal, err)
}

func invalid(err error) error { return connect.NewError(connect.CodeInvalidArgument, err) }

func (r *receipts) Get(ctx context.Context, req *adminv1.GetRequest) (*adminv1.GetResponse, error) {
	id := req.GetId()
	var ids []string
	var err error
	switch req.GetKey().(type) {
	case *adminv1.GetRequest_Id:
		if _, _, err := receipt.ParseID(id); err != nil {
			return nil, invalid(err)
		}
	case *adminv1.GetRequest_RequestId:
		ids, err = r.log.ByRequestID(req.GetRequestId())
	case *adminv1.GetRequest_TraceId:
		ids, err = r.log.ByTraceID(req.GetTraceId())
	default:
		return nil, invalid(errors.New("name a receipt by id, request_id or trace_id"))
	}
	if err != nil {
		return nil, code(err)
	}
	if id == "" {
		if len(ids) == 0 {
			return nil, code(receiptlog.ErrNotFound)
		}
		id = ids[0]
	}
	b, err := r.log.Bundle(ctx, id, req.GetEvidence())
	if err != nil {
		return nil, code(err)
	}
	return &adminv1.GetResponse{Bundle: b}, nil
}

func (r *receipts) List(ctx context.Context, req *adminv1.ListRequest) (*adminv1.ListResponse, error) {
	limit := int(req.GetLimit())
	if limit == 0 {
		limit = defaultList
	}
	if limit > maxList {
		return nil, invalid(fmt.Errorf("limit %d: at most %d", limit, maxList))
	}
	var sums []receiptlog.Summary
	var ids []string
	var err error
	switch {
	case req.GetRequestId() != "" && req.GetTraceId() != "":
		return nil, invalid(errors.New("give request_id or trace_id, not both"))
	case req.GetRequestId() != "":
		ids, err = r.log.ByRequestID(req.GetRequestId())
	case req.GetTraceId() != "":
		ids, err = r.log.ByTraceID(req.GetTraceId())
	default:
		if req.GetBefore() != "" {
			if _, _, err := receipt.ParseID(req.GetBefore()); err != nil {
				return nil, invalid(err)
			}
		}
		sums, err = r.log.List(ctx, limit, req.GetBefore())
	}
	if err != nil {
		return nil, code(err)
	}
	for i := len(ids) - 1; i >= 0 && len(sums) < limit; i-- {
		s, err := r.log.Get(ctx, ids[i])
		if err != nil {
			return nil, code(err)
		}
		sums = append(sums, s)
	}
	out := &adminv1.ListResponse{}
	for _, s := range sums {
		out.Receipts = append(out.Receipts, &adminv1.Receipt{
			Id: s.ID, State: string(s.State), Decision: body(s.Decision, receipt.DecisionPrefix), Outcome: body(s.Outcome, receipt.OutcomePrefix),
		})
	}
	return out, nil
}

// body is a record's JSON without its prefix.
func body(leaf []byte, prefix string) string {
	if len(leaf) < len(prefix) {
		return ""
	}
	return string(leaf[len(prefix):])
}

func (r *receipts) Export(ctx context.Context, req *adminv1.ExportRequest, out *connect.ServerStream[adminv1.ExportResponse]) error {
	total, err := r.log.Receipts()
	if err != nil {
		return code(err)
	}
	var done uint64
	for b, err := range r.log.Export(ctx, req.GetEvidence()) {
		if err != nil {
			return code(err)
		}
		done++
		if err := out.Send(&adminv1.ExportResponse{Bundle: b, Done: done, Total: max(total, done)}); err != nil {
			return err
		}
	}
	return nil
}

func (r *receipts) Tail(ctx context.Context, _ *adminv1.TailRequest, out *connect.ServerStream[adminv1.TailResponse]) error {
	ch := make(chan receiptlog.Event, tailBuffer)
	defer r.log.Subscribe(ch)()
	// Headers go out at once, so that the reader knows that it is following.
	if err := out.Send(&adminv1.TailResponse{}); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			if err := context.Cause(ctx); errors.Is(err, access.ErrRevoked) {
				return code(err)
			}
			return nil
		case e := <-ch:
			rec := &adminv1.Receipt{Id: e.ID, State: string(receiptlog.StatePending)}
			if len(e.Leaf) > len(receipt.DecisionPrefix) && string(e.Leaf[:len(receipt.DecisionPrefix)]) == receipt.DecisionPrefix {
				rec.Decision = body(e.Leaf, receipt.DecisionPrefix)
			} else {
				rec.Outcome = body(e.Leaf, receipt.OutcomePrefix)
			}
			if err := out.Send(&adminv1.TailResponse{Receipt: rec}); err != nil {
				return err
			}
		}
	}
}

func (r *receipts) Status(context.Context, *adminv1.StatusRequest) (*adminv1.StatusResponse, error) {
	s := r.log.Stats()
	vkey, expires := r.log.DailyKey()
	out := &adminv1.StatusResponse{
		Origin: r.log.Origin(), IdentityVkey: r.log.IdentityVKey(), DailyVkey: vkey,
		IdentityCustody: r.identityCustody, DailyCustody: r.dailyCustody, Sealed: r.log.Sealed() != nil, Decisions: s.Decisions, PendingOutcomes: uint64(s.Pending), Blocks: s.Blocks,
		CheckpointSize: s.CheckpointSize, UnsignedNs: int64(s.Unsigned), Checkpoint: string(r.log.Checkpoint()),
	}
	if !expires.IsZero() {
		out.DailyExpiresUnixNs = expires.UnixNano()
	}
	if s.Refusing != nil {
		out.Refusing = s.Refusing.Error()
	}
	return out, nil
}
