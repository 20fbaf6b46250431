package crash

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/knhk/sidecar/crypto/receipt"
)

// blind makes sure that the audit would have seen it: what was read is changed as a broken promise would have shown, one change at a
// time, and each must be found. knhk runs; what is changed is put back.
func (a *auditor) blind(ctx context.Context, e *exported) error {
	judge := func() error { return a.judge(e) }
	var calm, refused *request // answered while knhk lived; refused while it was dead
	for _, r := range a.requests {
		if r.id != "" && !a.died(r) {
			calm = r
		} else if r.id == "" {
			refused = r
		}
	}
	if calm == nil || refused == nil {
		return errors.New("the load has not had both answers and refusals")
	}
	var one *receipt.Header
	for _, h := range a.log.incarnations {
		one = h
	}
	later := *one
	later.Time = later.Time.Add(time.Second)
	gap := *one
	gap.Incarnation[0]++
	gap.Seq, gap.Kind, gap.Count, gap.First, gap.Last, gap.Root = 3, receipt.HeaderHeartbeat, 0, 0, 0, receipt.EmptyRoot
	size, newest := a.log.tree.N, a.newest
	for _, c := range []struct {
		what  string
		spoil func() (undo func())
		look  func() error
		want  string
	}{
		{"an id that was given to a client is in no block",
			func() func() { a.acked["lost"] = calm; return func() { delete(a.acked, "lost") } }, judge, "is not in the export"},
		{"the upstream saw a request without decision",
			func() func() { a.reached["/undecided"] = ""; return func() { delete(a.reached, "/undecided") } }, judge, "no decision"},
		{"a request was decided about twice in calm", func() func() {
			e.decided[calm.path] = append(e.decided[calm.path], "again")
			return func() { e.decided[calm.path] = e.decided[calm.path][:1] }
		}, judge, "2 decisions"},
		{"a record is in the log but not in the export",
			func() func() { e.records--; return func() { e.records++ } }, judge, "the export has"},
		{"a refused request went on", func() func() {
			a.reached[refused.path] = ""
			return func() { delete(a.reached, refused.path) }
		}, a.refusals, "but the upstream saw it"},
		{"an answer without upstream", func() func() {
			id := a.reached[calm.path]
			delete(a.reached, calm.path)
			return func() { a.reached[calm.path] = id }
		}, a.refusals, "has not seen it"},
		{"two headers for one key", nil, func() error { return a.log.entry(receipt.AppendHeader(nil, &later)) }, "two headers"},
		{"a gap in seq", nil, func() error { return a.log.entry(receipt.AppendHeader(nil, &gap)) }, "begins with seq 3"},
		{"a checkpoint of another history", func() func() {
			fork := tlog.Tree{N: size / 2, Hash: tlog.Hash{1}}
			a.log.saw(fork)
			return func() { delete(a.log.seen, fork) }
		}, func() error { return a.log.read(ctx) }, "two histories"},
		{"a checkpoint of more than there is", func() func() {
			ahead := tlog.Tree{N: size + 1e6, Hash: tlog.Hash{1}}
			a.log.saw(ahead)
			return func() { delete(a.log.seen, ahead) }
		}, func() error { return a.log.read(ctx) }, "was signed before"},
		{"a receipt that was listed is gone",
			func() func() { a.newest = "gone"; return func() { a.newest = newest } }, func() error { return a.list(ctx) }, "listed"},
	} {
		if c.spoil != nil {
			undo := c.spoil()
			err := c.look()
			undo()
			if err == nil || !strings.Contains(err.Error(), c.want) {
				return fmt.Errorf("the audit is blind for: %s: %v", c.what, err)
			}
		} else if err := c.look(); err == nil || !strings.Contains(err.Error(), c.want) {
			return fmt.Errorf("the audit is blind for: %s: %v", c.what, err)
		}
	}
	return errors.Join(a.judge(e), a.log.read(ctx)) // all is as before
}
