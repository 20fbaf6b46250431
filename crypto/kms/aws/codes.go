package aws

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	smithy "github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/knhk/sidecar/crypto/keys"
)

// sentinels is what the service's error codes mean here. KMSInvalidStateException stands for keys scheduled for deletion, and for
// others: backend.why asks which.
var sentinels = map[string]error{
	"NotFoundException": keys.ErrNotFound,
	"DisabledException": keys.ErrDisabled,

	"AccessDeniedException":               keys.ErrCredential,
	"AccessDenied":                        keys.ErrCredential,
	"UnrecognizedClientException":         keys.ErrCredential,
	"InvalidClientTokenId":                keys.ErrCredential,
	"InvalidSignatureException":           keys.ErrCredential,
	"SignatureDoesNotMatch":               keys.ErrCredential,
	"IncompleteSignature":                 keys.ErrCredential,
	"MissingAuthenticationToken":          keys.ErrCredential,
	"MissingAuthenticationTokenException": keys.ErrCredential,
	"ExpiredToken":                        keys.ErrCredential,
	"ExpiredTokenException":               keys.ErrCredential,
	"NotAuthorized":                       keys.ErrCredential,
	"OptInRequired":                       keys.ErrCredential,

	"ThrottlingException":                    keys.ErrThrottled,
	"Throttling":                             keys.ErrThrottled,
	"TooManyRequestsException":               keys.ErrThrottled,
	"RequestLimitExceeded":                   keys.ErrThrottled,
	"ProvisionedThroughputExceededException": keys.ErrThrottled,
	"LimitExceededException":                 keys.ErrThrottled, // the account's number of keys: raise it

	"DependencyTimeoutException":  keys.ErrUnavailable,
	"KMSInternalException":        keys.ErrUnavailable,
	"InternalFailure":             keys.ErrUnavailable,
	"InternalServiceError":        keys.ErrUnavailable,
	"ServiceUnavailable":          keys.ErrUnavailable,
	"ServiceUnavailableException": keys.ErrUnavailable,
	"KeyUnavailableException":     keys.ErrUnavailable,
	"ConflictException":           keys.ErrUnavailable,
}

const invalidState = "KMSInvalidStateException"

// sentinel adds what the callers of package keys branch on. An error that the service did not send is one of the way to it, or
// of the credentials.
func sentinel(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	var api smithy.APIError
	if errors.As(err, &api) {
		if s := sentinels[api.ErrorCode()]; s != nil {
			return fmt.Errorf("%w: %w", s, err)
		}
		var resp *smithyhttp.ResponseError
		if errors.As(err, &resp) {
			switch status := resp.HTTPStatusCode(); {
			case status >= 500:
				return fmt.Errorf("%w: %w", keys.ErrUnavailable, err)
			case status == http.StatusTooManyRequests:
				return fmt.Errorf("%w: %w", keys.ErrThrottled, err)
			case status >= 300 && status < 400:
				return fmt.Errorf("%w: redirects are not followed: %w", keys.ErrUnavailable, err)
			}
		}
		return err
	}
	if strings.Contains(err.Error(), "failed to retrieve credentials") || strings.Contains(err.Error(), "get identity") {
		return fmt.Errorf("%w: %w", keys.ErrCredential, err)
	}
	var sent *smithyhttp.RequestSendError
	var resp *smithyhttp.ResponseError
	if errors.As(err, &sent) || errors.As(err, &resp) {
		return fmt.Errorf("%w: %w", keys.ErrUnavailable, err)
	}
	return err
}

func isCode(err error, code string) bool {
	var api smithy.APIError
	return errors.As(err, &api) && api.ErrorCode() == code
}
