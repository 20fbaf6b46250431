package azure

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/knhk/sidecar/crypto/keys"
)

// answer is Key Vault's refusal on one line; the client's own takes a page.
type answer struct {
	status      int
	code, inner string // error.code and error.innererror.code of the body
	text        string
}

func (a *answer) Error() string { return a.text }

func newAnswer(r *azcore.ResponseError) *answer {
	a := &answer{status: r.StatusCode, code: r.ErrorCode}
	var body struct {
		Error struct {
			Code, Message string
			InnerError    struct{ Code string }
		}
	}
	where := ""
	if r.RawResponse != nil {
		if b, err := runtime.Payload(r.RawResponse); err == nil && json.Unmarshal(b, &body) == nil {
			a.code, a.inner = body.Error.Code, body.Error.InnerError.Code
		}
		if req := r.RawResponse.Request; req != nil {
			where = req.Method + " " + req.URL.Host + req.URL.Path + ": "
		}
	}
	a.text = fmt.Sprintf("%sstatus %d %s %s: %.300q", where, a.status, a.code, a.inner, body.Error.Message)
	return a
}

// sentinel adds what the callers of package keys branch on. What is no answer of Key Vault's, a broken connection or a proxy's
// page, is keys.ErrUnavailable; a 404 says that a key is not there only in Key Vault's own words.
func sentinel(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	var login *azidentity.AuthenticationFailedError
	if errors.As(err, &login) {
		r := login.RawResponse
		switch {
		case r != nil && r.StatusCode == http.StatusTooManyRequests:
			return fmt.Errorf("%w: login: status %d", keys.ErrThrottled, r.StatusCode)
		case r != nil && r.StatusCode >= 400 && r.StatusCode < 500:
			return fmt.Errorf("%w: login: status %d", keys.ErrCredential, r.StatusCode)
		}
		return fmt.Errorf("%w: login: %.300q", keys.ErrUnavailable, err.Error())
	}
	if errors.Is(err, errNoCredential) {
		return fmt.Errorf("%w: %w", keys.ErrCredential, err)
	}
	var r *azcore.ResponseError
	if !errors.As(err, &r) {
		return fmt.Errorf("%w: %w", keys.ErrUnavailable, err)
	}
	a := newAnswer(r)
	switch a.status {
	case http.StatusNotFound:
		if a.code == "KeyNotFound" {
			return fmt.Errorf("%w: %w", keys.ErrNotFound, a)
		}
		return fmt.Errorf("%w: no answer of Key Vault's: %w", keys.ErrUnavailable, a)
	case http.StatusForbidden:
		switch a.inner {
		case "KeyDisabled", "KeyExpired", "KeyNotYetValid":
			return fmt.Errorf("%w: %w", keys.ErrDisabled, a)
		}
		return fmt.Errorf("%w: %w", keys.ErrCredential, a)
	case http.StatusUnauthorized:
		return fmt.Errorf("%w: %w", keys.ErrCredential, a)
	case http.StatusTooManyRequests:
		return fmt.Errorf("%w: %w", keys.ErrThrottled, a)
	case http.StatusConflict:
		if a.inner == "ObjectIsDeletedButRecoverable" {
			return fmt.Errorf("%w: the key was deleted: recover or purge it, or use another label", a)
		}
		return fmt.Errorf("%w: %w", keys.ErrUnavailable, a) // being deleted or recovered
	case http.StatusRequestTimeout:
		return fmt.Errorf("%w: %w", keys.ErrUnavailable, a)
	}
	if a.status >= 500 || a.status < 400 {
		return fmt.Errorf("%w: %w", keys.ErrUnavailable, a)
	}
	return a
}
