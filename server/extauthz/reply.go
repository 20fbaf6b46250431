package extauthz

import (
	"strconv"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/server/extproc"
)

// Headers of responses.
const (
	HeaderReceipt = "x-knhk-receipt"
	HeaderClass   = "x-knhk-class"
)

// answer is an encoded CheckResponse. Its zero value is a denial, so that a path nobody thought of denies.
type answer struct {
	wire []byte
	id   string // receipt id in it
}

// EncodeFrame gives the CheckResponse.
func (a *answer) EncodeFrame() []byte {
	if len(a.wire) == 0 {
		return internalDenial
	}
	return a.wire
}

var internalDenial = func() []byte {
	a := denies(policy.Decision{Reason: policy.ReasonInternal})
	return a.wire
}()

// passes lets a request or connection go on and has Envoy remember what was decided.
func passes(req *policy.Request, d policy.Decision) answer {
	r := &authv3.CheckResponse{Status: status.New(codes.OK, "").Proto(), DynamicMetadata: remembered(d)}
	if d.ID != "" && !req.TCP {
		r.HttpResponse = &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{ResponseHeadersToAdd: receiptHeaders(d)}}
	}
	return encode(r, d.ID)
}

// denies answers in the upstream's stead. Of a connection Envoy reads the status alone, and closes it.
func denies(d policy.Decision) answer {
	if d.Reason == "" {
		d.Reason = policy.ReasonInternal
	}
	code, httpStatus := codes.Unavailable, extproc.RefusalStatus(d)
	switch httpStatus {
	case 403:
		code = codes.PermissionDenied
	case 429:
		code = codes.ResourceExhausted
	}
	headers := append(receiptHeaders(d), header("content-type", "text/plain"))
	if s := extproc.RetryAfter(d.RetryAfter); s > 0 {
		headers = append(headers, header("retry-after", strconv.FormatInt(s, 10)))
	}
	return encode(&authv3.CheckResponse{
		Status: status.New(code, extproc.DetailsPrefix+extproc.Text(string(d.Reason))).Proto(),
		HttpResponse: &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{
			Status: &typev3.HttpStatus{Code: typev3.StatusCode(httpStatus)}, Headers: headers, Body: extproc.RefusalBody(d),
		}},
		DynamicMetadata: remembered(d),
	}, d.ID)
}

// encode makes the answer; one that cannot be encoded is a denial.
func encode(r *authv3.CheckResponse, id string) answer {
	wire, err := proto.Marshal(r)
	if err != nil {
		wire = nil
	}
	return answer{wire, id}
}

// remembered is {receipt: ID, class: CLASS} or {gap: REASON}; nil when there is neither an id nor a gap. Envoy keeps it in the namespace of
// its filter, envoy.filters.http.ext_authz or envoy.filters.network.ext_authz.
func remembered(d policy.Decision) *structpb.Struct {
	text := func(s string) *structpb.Value { return structpb.NewStringValue(extproc.Text(s)) }
	switch {
	case d.ID != "":
		f := map[string]*structpb.Value{extproc.KeyReceipt: text(d.ID)}
		if d.Class != policy.ClassUnknown || !d.Passes() {
			f[extproc.KeyClass] = text(d.Class.String())
		}
		return &structpb.Struct{Fields: f}
	case d.Gap:
		return &structpb.Struct{Fields: map[string]*structpb.Value{extproc.KeyGap: text(string(d.Reason))}}
	}
	return nil
}

func receiptHeaders(d policy.Decision) []*corev3.HeaderValueOption {
	if d.ID == "" {
		return nil
	}
	h := []*corev3.HeaderValueOption{header(HeaderReceipt, extproc.Text(d.ID))}
	if d.Class != policy.ClassUnknown || !d.Passes() {
		h = append(h, header(HeaderClass, d.Class.String()))
	}
	return h
}

// header replaces whatever the upstream sent under that name.
func header(key, value string) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{
		Header:       &corev3.HeaderValue{Key: key, Value: value},
		AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
	}
}
