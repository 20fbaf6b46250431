package gcp

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/knhk/sidecar/crypto/keys"
)

// sentinels is what the service's codes mean here. A code that is not in it comes back as it is. FailedPrecondition stands for
// a version that is not enabled, and for much else: backend.why asks which.
var sentinels = map[codes.Code]error{
	codes.NotFound:          keys.ErrNotFound,
	codes.PermissionDenied:  keys.ErrCredential,
	codes.Unauthenticated:   keys.ErrCredential,
	codes.ResourceExhausted: keys.ErrThrottled,
	codes.Unavailable:       keys.ErrUnavailable,
	codes.Internal:          keys.ErrUnavailable,
	codes.Unknown:           keys.ErrUnavailable,
	codes.Aborted:           keys.ErrUnavailable,
	codes.DeadlineExceeded:  context.DeadlineExceeded,
	codes.Canceled:          context.Canceled,
}

// sentinel adds what the callers of package keys branch on.
func sentinel(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if s := sentinels[status.Code(err)]; s != nil {
		return fmt.Errorf("%w: %w", s, err)
	}
	return err
}

func isCode(err error, c codes.Code) bool { return err != nil && status.Code(err) == c }
