package vault

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/hashicorp/vault/api"

	"github.com/knhk/sidecar/crypto/keys"
)

// answer is Vault's refusal on one line; the client's own takes several.
type answer struct {
	status int
	text   string
}

func (a *answer) Error() string { return a.text }

// sentinel adds what the callers of package keys branch on. What is no answer of Vault's, a broken connection or a proxy's page,
// is keys.ErrUnavailable. A 404 says that a key is not there only when Vault says nothing else: a mount or namespace that is
// missing comes with words, and must not read as a key that is lost.
func sentinel(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	var r *api.ResponseError
	if !errors.As(err, &r) {
		return fmt.Errorf("%w: %w", keys.ErrUnavailable, err)
	}
	text := &answer{r.StatusCode, fmt.Sprintf("%s %s: status %d: %.300q", r.HTTPMethod, r.URL, r.StatusCode, strings.Join(r.Errors, "; "))}
	switch {
	case r.RawError:
		return fmt.Errorf("%w: no answer of Vault's: %w", keys.ErrUnavailable, text)
	case r.StatusCode == http.StatusNotFound && len(r.Errors) == 0:
		return fmt.Errorf("%w: %w", keys.ErrNotFound, text)
	case r.StatusCode == http.StatusNotFound:
		return fmt.Errorf("%w: is there a transit engine at this mount, in this namespace? %w", keys.ErrUnavailable, text)
	case r.StatusCode == http.StatusForbidden, r.StatusCode == http.StatusUnauthorized,
		r.StatusCode == http.StatusBadRequest && strings.Contains(text.Error(), "missing client token"):
		return fmt.Errorf("%w: %w", keys.ErrCredential, text)
	case r.StatusCode == http.StatusTooManyRequests:
		return fmt.Errorf("%w: %w", keys.ErrThrottled, text)
	case r.StatusCode >= 500, r.StatusCode == http.StatusPreconditionFailed, r.StatusCode == 472, r.StatusCode == 473:
		return fmt.Errorf("%w: %w", keys.ErrUnavailable, text) // 503: sealed or no active node; 412: a standby that lags behind
	}
	return text
}

// badRequest says whether Vault answered that it will not do what was asked.
func badRequest(err error) bool {
	var a *answer
	return errors.As(err, &a) && a.status == http.StatusBadRequest
}
