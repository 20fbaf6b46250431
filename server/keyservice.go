package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"connectrpc.com/connect"

	adminv1 "github.com/knhk/sidecar/api/knhk/admin/v1"
	"github.com/knhk/sidecar/api/knhk/admin/v1/adminv1connect"
	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/rotation"
	"github.com/knhk/sidecar/region/receiptlog"
	"github.com/knhk/sidecar/server/access"
)

// maxReason bounds why a key was revoked or a log sealed, in bytes; it is signed and kept for ever.
const maxReason = 256

// keyLog is what of the log its keys are shown and changed by.
type keyLog interface {
	Origin() string
	IdentityVKey() string
	Keys() rotation.Info
	RotateKey(ctx context.Context) (rotation.Info, error)
	RevokeKey(ctx context.Context, vkey, reason string) (note []byte, err error)
	Seal(ctx context.Context, reason string) (leaf []byte, err error)
}

// keyService answers knhk.admin.v1.KeyService. It is served on the control socket alone.
type keyService struct {
	keys                          keyLog
	log                           *slog.Logger
	identityCustody, dailyCustody string // where the identity key and the daily keys live, in words
}

func (s *keyService) handler() *access.Mux {
	mux := &access.Mux{}
	mux.Handle(adminv1connect.NewKeyServiceHandler(s))
	return mux
}

// keyError maps errors of a key change to Connect's, in one place, and adds the way out: later is what to do about a change that may
// come about after all.
func keyError(err error, later string) error {
	code, hint := connect.CodeInternal, later
	switch {
	case err == nil:
		return nil
	case errors.Is(err, rotation.ErrSealed), errors.Is(err, receiptlog.ErrSealed):
		code, hint = connect.CodeFailedPrecondition, "its keys change no more"
	case errors.Is(err, rotation.ErrUnknownKey):
		code, hint = connect.CodeNotFound, "'knhk keys list' shows the keys it has had"
	case errors.Is(err, keys.ErrCredential):
		code, hint = connect.CodeFailedPrecondition, "correct what pin-source names and restart knhk"
	case errors.Is(err, keys.ErrUnavailable), errors.Is(err, keys.ErrThrottled):
		code, hint = connect.CodeUnavailable, cmp.Or(later, "ask again when the key store is back")
	case errors.Is(err, context.DeadlineExceeded):
		code, hint = connect.CodeDeadlineExceeded, cmp.Or(later, "'knhk keys list' shows whether it came about")
	case errors.Is(err, context.Canceled):
		code = connect.CodeCanceled
	}
	if hint != "" {
		err = fmt.Errorf("%w: %s", err, hint)
	}
	return connect.NewError(code, err)
}

// named begins an error with what was asked for, unless it does already.
func named(op string, err error) error {
	if strings.HasPrefix(err.Error(), op+": ") {
		return err
	}
	return fmt.Errorf("%s: %w", op, err)
}

// What knhk does about a revocation or a seal that it could not bring to its end.
const (
	revokesLater = "knhk may go on with it by itself: 'knhk keys list' shows the key revoked then; to ask again, name the KEY"
	sealsLater   = "requests stay refused, and knhk may go on with it by itself: 'knhk keys list' shows whether the log is sealed, or ask again"
)

func checkReason(reason string) error {
	switch {
	case strings.TrimSpace(reason) == "":
		return connect.NewError(connect.CodeInvalidArgument, errors.New("a reason is required: it is signed, and auditors read it"))
	case len(reason) > maxReason || !utf8.ValidString(reason) || strings.ContainsFunc(reason, unicode.IsControl):
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("the reason must be one line of at most %d bytes", maxReason))
	}
	return nil
}

func (s *keyService) List(context.Context, *adminv1.KeyServiceListRequest) (*adminv1.KeyServiceListResponse, error) {
	out := KeyList(s.keys.Origin(), s.keys.IdentityVKey(), s.keys.Keys())
	out.IdentityCustody, out.DailyCustody = s.identityCustody, s.dailyCustody
	return out, nil
}

// Phases of a log's keys beside rotation's: what was asked for is still to be made, and knhk goes on with it.
const (
	PhaseRevoking = "revoking"
	PhaseSealing  = "sealing"
)

// KeyList puts what a log knows of its keys into the API's words; custody is not among it.
func KeyList(origin, identity string, info rotation.Info) *adminv1.KeyServiceListResponse {
	out := &adminv1.KeyServiceListResponse{
		Origin: origin, Keys: []*adminv1.Key{{Vkey: identity, Role: "identity", InForce: info.Seal == nil}},
		Phase: string(info.Phase), LastError: info.LastError, Revocations: info.Revocations, Seal: info.Seal,
	}
	if info.Seal != nil {
		out.Keys[0].Ended = "sealed"
	}
	switch {
	case info.Sealing:
		out.Phase = PhaseSealing
	case info.Revoking != "":
		out.Phase = PhaseRevoking
	}
	next := info.Due
	// A rotation that was asked for and failed is not tried again while the key is fresh.
	if !info.NextAttempt.IsZero() && out.Phase != string(rotation.PhaseFresh) {
		next = info.NextAttempt
	}
	if !next.IsZero() && info.Seal == nil {
		out.NextUnixNs = next.UnixNano()
	}
	for _, r := range info.Retired {
		out.Undestroyed = append(out.Undestroyed, r.Label+" "+r.ID)
	}
	for _, k := range info.Keys {
		key := &adminv1.Key{
			Vkey: k.VKey, Role: "daily", NotBeforeUnixNs: k.NotBefore.UnixNano(), NotAfterUnixNs: k.NotAfter.UnixNano(),
			FirstSize: k.FirstSize, LastSize: k.LastSize, Ended: k.Ended, Revoked: k.Revoked,
		}
		if k.Ended == "" {
			key.InForce = info.Seal == nil
			if info.Seal != nil {
				key.Ended = "sealed"
			}
		}
		out.Keys = append(out.Keys, key)
	}
	return out
}

func (s *keyService) Rotate(ctx context.Context, _ *adminv1.KeyServiceRotateRequest) (*adminv1.KeyServiceRotateResponse, error) {
	info, err := s.keys.RotateKey(ctx)
	if err != nil {
		s.log.ErrorContext(ctx, "daily key: asked to rotate", "error", err)
		return nil, keyError(named("rotate daily key", err), "")
	}
	var old string // the one whose range the new key's follows
	for _, k := range info.Keys {
		if k.VKey != info.VKey {
			old = k.VKey
		}
	}
	s.log.InfoContext(ctx, "daily key rotated, as asked", "old", old, "new", info.VKey, "until", info.NotAfter.Format(time.RFC3339))
	return &adminv1.KeyServiceRotateResponse{OldVkey: old, NewVkey: info.VKey, NotAfterUnixNs: info.NotAfter.UnixNano(), FirstSize: info.Index}, nil
}

func (s *keyService) Revoke(ctx context.Context, req *adminv1.KeyServiceRevokeRequest) (*adminv1.KeyServiceRevokeResponse, error) {
	if err := checkReason(req.GetReason()); err != nil {
		return nil, err
	}
	if req.GetVkey() == s.keys.IdentityVKey() {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("that is the identity key: without it the log ends, so it is "+
			"revoked by sealing: knhk keys revoke --identity"))
	}
	note, err := s.keys.RevokeKey(ctx, req.GetVkey(), req.GetReason())
	if err != nil {
		s.log.ErrorContext(ctx, "daily key: asked to revoke", "key", req.GetVkey(), "error", err)
		return nil, keyError(named("revoke daily key", err), revokesLater)
	}
	r, err := receipt.ParseRevocation(note)
	if err != nil {
		return nil, keyError(err, "")
	}
	var now string
	if info := s.keys.Keys(); info.Seal == nil {
		now = info.VKey
	}
	s.log.WarnContext(ctx, "daily key revoked, as asked", "key", r.Key, "size", r.Size, "reason", r.Reason, "in_force", now)
	return &adminv1.KeyServiceRevokeResponse{Vkey: r.Key, Revocation: note, InForceVkey: now}, nil
}

func (s *keyService) Seal(ctx context.Context, req *adminv1.KeyServiceSealRequest) (*adminv1.KeyServiceSealResponse, error) {
	if err := checkReason(req.GetReason()); err != nil {
		return nil, err
	}
	leaf, err := s.keys.Seal(ctx, req.GetReason())
	if err != nil {
		s.log.ErrorContext(ctx, "asked to seal the log", "error", err)
		return nil, keyError(named("seal log", err), sealsLater)
	}
	seal, err := receipt.ParseSeal(leaf)
	if err != nil {
		return nil, keyError(err, "")
	}
	s.log.WarnContext(ctx, "log sealed, as asked: nothing is decided or signed any more", "size", seal.Size, "reason", seal.Reason)
	return &adminv1.KeyServiceSealResponse{Seal: leaf, Size: seal.Size}, nil
}

// DirKeyList is KeyList for a directory that nobody serves from.
func DirKeyList(k *receiptlog.DirKeys) *adminv1.KeyServiceListResponse {
	return KeyList(k.Origin, k.Identity, rotation.Info{Keys: k.Keys, Revocations: k.Revocations, Seal: k.Seal, Retired: k.Retired})
}
