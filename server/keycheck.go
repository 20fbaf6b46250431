package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"

	adminv1 "github.com/knhk/sidecar/api/knhk/admin/v1"
	"github.com/knhk/sidecar/api/knhk/admin/v1/adminv1connect"
	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/region/receiptlog"
	"github.com/knhk/sidecar/server/config"
	"github.com/knhk/sidecar/server/control"
)

// trials is how many signatures a check makes with a key to see how long one takes.
const trials = 5

// KeyCheck is what a check found out about one key.
type KeyCheck struct {
	Role       string         `json:"role"` // identity or daily
	Label      string         `json:"label"`
	ID         string         `json:"id,omitempty"` // of the version; empty when it is still to be made
	Algorithm  keys.Algorithm `json:"algorithm"`
	Custody    string         `json:"custody"`
	CanSign    bool           `json:"can_sign"`
	Exportable string         `json:"exportable"` // no, yes, or unknown
	Note       string         `json:"note"`       // what signed notes can do with it
	SignMS     float64        `json:"sign_ms,omitempty"`
	State      string         `json:"state"` // in words
}

// KeysReport is what a check found out about the keys of a configuration.
type KeysReport struct {
	Origin   string     `json:"origin,omitempty"` // empty while the log is not begun
	Sealed   bool       `json:"sealed"`
	Keys     []KeyCheck `json:"keys"`
	Warnings []string   `json:"warnings"`
}

// CheckKeys opens the keys of the configuration as New does, tries them and closes them again. Nothing is made, and nothing is signed
// that a log could hold. An error is what serve would end with. A PIN that is refused counts with the token as one try.
func CheckKeys(ctx context.Context, cfg *config.Config, log *slog.Logger) (_ *KeysReport, err error) {
	k, err := openKeys(ctx, cfg, keyOptions{log: log})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	r := &KeysReport{Origin: k.origin, Sealed: k.sealed, Keys: []KeyCheck{}, Warnings: []string{}}
	if k.sealed {
		return r, nil
	}
	id := KeyCheck{Role: roleIdentity, Label: k.label, Algorithm: cfg.Keys.Identity.Algorithm, Custody: k.custody(roleIdentity),
		State: "will be made when the log is begun", Exportable: toBeMade(cfg.Keys.Identity.URI)}
	if k.identity != nil {
		id.ID, id.State = k.identityID, "found"
		if err := id.try(ctx, k.store, k.identity); err != nil {
			return nil, fmt.Errorf("keys.identity: %w", err)
		}
		if limits, err := keys.Limits(k.identity.Public()); err == nil {
			id.Note = limits.Text
		}
	}
	if cfg.Keys.Identity.Algorithm != keys.Ed25519 {
		r.Warnings = append(r.Warnings, fmt.Sprintf("keys.identity is %s: torchwood, litewitness and other C2SP tools read Ed25519 only, so "+
			"witnesses cannot cosign this log", cfg.Keys.Identity.Algorithm))
	}
	day, warnings, err := k.checkDaily(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("keys.daily: %w", err)
	}
	r.Keys, r.Warnings = []KeyCheck{id, day}, append(r.Warnings, warnings...)
	software := 0
	for i, uri := range []string{cfg.Keys.Identity.URI, cfg.Keys.Daily.URI} {
		switch c := r.Keys[i]; {
		case strings.HasPrefix(uri, "soft:"): // of its nature
			if software++; software == 1 {
				r.Warnings = append(r.Warnings, "keys live in software: for development only; who can read their files has them for good")
			}
		case c.Exportable == "yes":
			r.Warnings = append(r.Warnings, fmt.Sprintf("keys.%s is exportable, which keys.allow_exportable lets pass: who has a copy signs without "+
				"the token, for ever", c.Role))
		}
	}
	// A checkpoint takes one signature of each key, one after the other.
	if both, every := ms(id.SignMS+day.SignMS), cfg.Log.SealEvery; both > every/2 {
		r.Warnings = append(r.Warnings, fmt.Sprintf("the two signatures of a checkpoint take %v, and log.seal_every asks for one every %v: set it to %v or more",
			both.Round(time.Millisecond), every, (4*both).Round(100*time.Millisecond)))
	}
	return r, nil
}

// toBeMade says whether a key that knhk makes will be exportable: in a token it never is, and a file always.
func toBeMade(uri string) string {
	if strings.HasPrefix(uri, "soft:") {
		return "yes"
	}
	return "no"
}

func ms(f float64) time.Duration { return time.Duration(f * float64(time.Millisecond)) }

// try signs a few times with a key: what knhk signs in a log begins otherwise (keys.ProofMessage).
func (c *KeyCheck) try(ctx context.Context, store keys.Store, s keys.Signer) error {
	var took []time.Duration
	for range trials {
		start := time.Now()
		msg := keys.ProofMessage(c.Label, c.ID)
		sig, err := s.Sign(ctx, msg)
		if err == nil {
			err = keys.Verify(s.Algorithm(), s.Public(), msg, sig)
		}
		if err != nil {
			return err
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	c.CanSign, c.SignMS, c.Exportable = true, float64(took[trials/2].Microseconds())/1000, "unknown"
	if i, err := keys.Inspect(ctx, store, c.Label, c.ID); err == nil {
		c.Exportable = map[bool]string{true: "yes", false: "no"}[i.Exportable]
	}
	return nil
}

// checkDaily looks for the daily key in force in its store, and tries it.
func (k *keyring) checkDaily(ctx context.Context, cfg *config.Config) (c KeyCheck, warnings []string, err error) {
	c = KeyCheck{Role: roleDaily, Label: k.dailyLabel, Algorithm: cfg.Keys.Daily.Algorithm, Custody: k.custody(roleDaily), Exportable: toBeMade(cfg.Keys.Daily.URI),
		State: "will be made when the log is begun"}
	versions, err := k.daily.Versions(ctx, k.dailyLabel)
	if err != nil {
		return c, nil, err
	}
	if k.pinned == "" {
		if n := len(enabledOf(versions)); n > 0 {
			warnings = append(warnings, fmt.Sprintf("keys.daily: %d enabled versions of key %q are there, and the log is not begun: a label belongs to one "+
				"log; if another log uses it, give this one another", n, k.dailyLabel))
		}
		return c, warnings, nil
	}
	vkey, unknown := inForce(ctx, cfg.StateDir)
	if vkey == "" {
		c.State = "not known: " + unknown
		return c, nil, nil
	}
	pub, err := keys.PublicKey(vkey)
	if err != nil {
		return c, nil, err
	}
	for _, v := range enabledOf(versions) {
		if !keys.SamePublic(v.Public, pub) {
			continue
		}
		s, err := k.daily.Signer(ctx, k.dailyLabel, v.ID)
		if err != nil {
			return c, nil, err
		}
		c.ID, c.State, c.Algorithm = v.ID, "in force", v.Algorithm
		if limits, err := keys.Limits(v.Public); err == nil {
			c.Note = limits.Text
		}
		return c, nil, c.try(ctx, k.daily, s)
	}
	return c, nil, fmt.Errorf("the key in force, %s, is not among the enabled versions of %q: if this state_dir is a restored copy, the log has gone "+
		"on without it, and a new state_dir is the safe way; 'knhk serve --replace-daily-key' goes on with a new daily key", vkey, k.dailyLabel)
}

func enabledOf(versions []keys.Version) (out []keys.Version) {
	for _, v := range versions {
		if v.State == keys.Enabled {
			out = append(out, v)
		}
	}
	return out
}

// inForce is the verifier key of the daily key in force, of the running service or else from the directory.
func inForce(ctx context.Context, dir string) (vkey, unknown string) {
	c := adminv1connect.NewKeyServiceClient(&http.Client{Transport: control.Transport(dir)}, "http://knhk")
	l, err := c.List(ctx, &adminv1.KeyServiceListRequest{})
	if errors.Is(err, control.ErrNotRunning) {
		var k *receiptlog.DirKeys
		if k, err = receiptlog.ReadKeys(dir); err == nil {
			l = DirKeyList(k)
		}
	}
	if err != nil {
		return "", err.Error()
	}
	for _, k := range l.GetKeys() {
		if k.GetRole() == roleDaily && k.GetInForce() {
			return k.GetVkey(), ""
		}
	}
	return "", "no daily key is in force"
}
