package extauthz

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/server/extproc"
)

// Context extensions that the Envoy configuration sets for each route (ExtAuthzPerRoute.check_settings.context_extensions).
// Envoy sends nothing else that names a route.
const (
	ContextRoute   = "knhk.route"   // name of the route; absent: none matched, or one that the configuration does not list
	ContextCluster = "knhk.cluster" // name of its cluster
	ContextBody    = "knhk.body"    // BodyBuffered: the route has with_request_body
)

// BodyBuffered is the value of ContextBody. with_request_body must then be: max_request_bytes one more than the limit of a body that is
// classified, allow_partial_message true (else Envoy answers 413 itself), pack_as_bytes true (a body need not be UTF-8).
const BodyBuffered = "buffered"

// headerPartial is how Envoy says that it sends a part of the body.
const headerPartial = "x-envoy-auth-partial-body"

var errUnexpected = errors.New("unexpected check")

// check is a CheckRequest as far as it is read.
type check struct {
	req      policy.Request
	buffered bool   // Envoy is set up to send the body
	partial  bool   // and sent a part of it only
	length   string // content-length
	content  []byte
}

// parse reads a CheckRequest. An error that is not errUnexpected says that it is no valid protobuf: text that is not UTF-8 included.
func (c *check) parse(b []byte) error {
	var p authv3.CheckRequest
	if err := proto.Unmarshal(b, &p); err != nil {
		return fmt.Errorf("parse check: %w", err)
	}
	a := p.GetAttributes()
	if a == nil {
		return fmt.Errorf("%w: no attributes", errUnexpected)
	}
	c.req = policy.Request{
		Filter:   "ext_authz",
		Source:   address(a.GetSource().GetAddress()),
		SPIFFEID: principal(a.GetSource().GetPrincipal()),
	}
	if a.GetRequest().GetHttp() == nil {
		if a.GetRequest() != nil {
			return fmt.Errorf("%w: a request that is not HTTP", errUnexpected)
		}
		c.req.TCP, c.req.Authority = true, address(a.GetDestination().GetAddress())
		if c.req.Authority == "" && c.req.Source == "" {
			return fmt.Errorf("%w: neither a request nor addresses", errUnexpected)
		}
		return nil
	}
	c.http(a.GetRequest().GetHttp())
	if c.req.Method == "" {
		return fmt.Errorf("%w: no method", errUnexpected)
	}
	ext := a.GetContextExtensions()
	c.req.Route, c.req.Cluster, c.buffered = ext[ContextRoute], ext[ContextCluster], ext[ContextBody] == BodyBuffered
	c.req.Decided, c.req.GapCounted = decided(a.GetMetadataContext())
	return nil
}

// http reads the request. Envoy 1.40 replaces bytes of the path that are not UTF-8, but with encode_raw_headers the headers, path and
// method among them, come as they are; these count, so that a decision is about what goes on. Of a header that stands more than once the
// first counts, as in server/extproc.
func (c *check) http(h *authv3.AttributeContext_HttpRequest) {
	r := &c.req
	r.Method, r.Scheme, r.Authority, r.Path = h.GetMethod(), h.GetScheme(), h.GetHost(), h.GetPath()
	if c.content = h.GetRawBody(); len(c.content) == 0 {
		c.content = []byte(h.GetBody())
	}
	seen := make(map[string]bool, 8)
	for _, v := range h.GetHeaderMap().GetHeaders() {
		value := string(v.GetRawValue())
		if value == "" {
			value = v.GetValue()
		}
		c.header(v.GetKey(), value, seen)
	}
	for _, name := range [...]string{":method", ":scheme", ":authority", ":path", "x-request-id", "content-length", extproc.HeaderParent, headerPartial} {
		if value, ok := h.GetHeaders()[name]; ok {
			c.header(name, value, seen)
		}
	}
}

// header keeps one header if it is one of ours.
func (c *check) header(name, value string, seen map[string]bool) {
	var dst *string
	switch name {
	case ":method":
		dst = &c.req.Method
	case ":scheme":
		dst = &c.req.Scheme
	case ":authority":
		dst = &c.req.Authority
	case ":path":
		dst = &c.req.Path
	case "x-request-id":
		dst = &c.req.RequestID
	case "content-length":
		dst = &c.length
	case extproc.HeaderParent:
		dst = &c.req.Parent
	case headerPartial: // a client can add one, not take Envoy's away
		c.partial = c.partial || !strings.EqualFold(value, "false")
		return
	default:
		return
	}
	if !seen[name] {
		seen[name], *dst = true, value
	} else if name == extproc.HeaderParent { // several: nobody can say which is meant
		*dst = ""
	}
}

// body says what the decision knows of the body, at most limit bytes of it. False: Envoy is not set up to send it.
func (c *check) body(limit int) bool {
	r := &c.req
	length, err := strconv.ParseUint(c.length, 10, 63)
	switch {
	case !c.buffered:
		r.BodyMissing = true
		return false
	case c.partial, len(c.content) > limit, c.length != "" && (err != nil || length != uint64(len(c.content))):
		r.BodyLarge = true
	case len(c.content) > 0:
		r.HasBody, r.Body = true, c.content
	}
	return true
}

// address is host:port, or the path of a pipe; "" for none.
func address(a *corev3.Address) string {
	switch v := a.GetAddress().(type) {
	case *corev3.Address_SocketAddress:
		port := v.SocketAddress.GetNamedPort()
		if port == "" {
			port = strconv.FormatUint(uint64(v.SocketAddress.GetPortValue()), 10)
		}
		return net.JoinHostPort(v.SocketAddress.GetAddress(), port)
	case *corev3.Address_Pipe:
		return v.Pipe.GetPath()
	case *corev3.Address_EnvoyInternalAddress:
		return v.EnvoyInternalAddress.GetServerListenerName()
	}
	return ""
}

// principal is the SPIFFE ID among what Envoy says of the client's certificate: its first URI SAN, else its first DNS SAN, else its
// subject. The latter two are no identity here.
func principal(s string) string {
	if _, err := spiffeid.FromString(s); err != nil {
		return ""
	}
	return s
}

// decided is the receipt id that an earlier filter left: ext_proc, else another ext_authz; without one, whether it let the request pass.
func decided(m *corev3.Metadata) (id string, gap bool) {
	for _, ns := range [...]string{extproc.Namespace, extproc.NamespaceAuthz} {
		f := m.GetFilterMetadata()[ns].GetFields()
		if id := f[extproc.KeyReceipt].GetStringValue(); id != "" {
			return id, false
		}
		gap = gap || f[extproc.KeyGap].GetStringValue() != ""
	}
	return "", gap
}
