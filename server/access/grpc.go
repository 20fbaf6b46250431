package access

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// AuthInfo is who is at the other end of a gRPC connection. Transport credentials give it; nothing else does.
type AuthInfo struct {
	credentials.CommonAuthInfo
	Who Who
}

// AuthType implements credentials.AuthInfo.
func (AuthInfo) AuthType() string { return "knhk" }

// CallGRPC is Call for a gRPC handler's context. Its error has the code PermissionDenied.
func (a *Authority) CallGRPC(ctx context.Context, on Listener, method string) error {
	var w Who
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(AuthInfo); ok {
			w = info.Who
		}
	}
	if err := a.Call(on, method, w); err != nil {
		return status.Error(codes.PermissionDenied, err.Error())
	}
	return nil
}
