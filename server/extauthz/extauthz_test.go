package extauthz

import (
	"context"
	"io"
	"log/slog"
	"slices"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/server/envoywire"
	"github.com/knhk/sidecar/server/extproc"
)

const testID = "01932c5e-8a4b-7c3d-9e2f-112233445566.a"

// admitter answers as a test wants.
type admitter struct {
	plan     extproc.Plan
	decision policy.Decision
	panics   string // method that does
	admit    func()
	asked    []policy.Request
	routes   []string
	finished []string
}

func (a *admitter) Plan(route string) extproc.Plan {
	if a.panics == "plan" {
		panic("plan")
	}
	a.routes = append(a.routes, route)
	return a.plan
}

func (a *admitter) Admit(_ context.Context, req *policy.Request) policy.Decision {
	if a.panics == "admit" {
		panic("admit")
	}
	a.asked = append(a.asked, *req)
	if a.admit != nil {
		a.admit()
	}
	return a.decision
}

func (a *admitter) Finish(id string, o policy.Outcome, final bool) {
	if a.panics == "finish" {
		panic("finish")
	}
	if final {
		a.finished = append(a.finished, id+" "+o.Source+" "+string(o.Result)+" "+o.Details)
	}
}

// call is Envoy's side of a call without a network.
type call struct {
	grpc.ServerStream
	ctx     context.Context
	frame   []byte
	recvErr error
	sendErr error
	sent    [][]byte
}

func (c *call) Context() context.Context { return c.ctx }

func (c *call) RecvMsg(m any) error {
	if c.recvErr != nil {
		return c.recvErr
	}
	return envoywire.Codec{}.Unmarshal(mem.BufferSlice{mem.SliceBuffer(c.frame)}, m)
}

func (c *call) SendMsg(m any) error {
	if c.sendErr != nil {
		return c.sendErr
	}
	b, err := envoywire.Codec{}.Marshal(m)
	if err != nil {
		return err
	}
	c.sent = append(c.sent, b.Materialize())
	return nil
}

// serve gives the reply of a server with a to frame, and what it counted. The call must end as it must: nil after one answer.
func serve(t *testing.T, a *admitter, frame []byte) (*authv3.CheckResponse, []Event) {
	t.Helper()
	var events []Event
	s, err := New(Config{Admitter: a, Log: slog.New(slog.DiscardHandler), Count: func(e Event) { events = append(events, e) }})
	if err != nil {
		t.Fatal(err)
	}
	ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"))
	c := &call{ctx: ctx, frame: frame}
	if err := s.serve(c); err != nil || len(c.sent) != 1 {
		t.Fatalf("call: %v, %d answers; want one", err, len(c.sent))
	}
	var r authv3.CheckResponse
	if err := proto.Unmarshal(c.sent[0], &r); err != nil {
		t.Fatalf("answer does not parse: %v", err)
	}
	return &r, events
}

func encoded(t testing.TB, c *authv3.CheckRequest) []byte {
	t.Helper()
	b, err := proto.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func socket(host string, port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: host, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port}}}}
}

// checkOf is a check as Envoy 1.40 sends it with encode_raw_headers.
func checkOf(edit func(*authv3.AttributeContext)) *authv3.CheckRequest {
	raw := func(k, v string) *corev3.HeaderValue { return &corev3.HeaderValue{Key: k, RawValue: []byte(v)} }
	a := &authv3.AttributeContext{
		Source:      &authv3.AttributeContext_Peer{Address: socket("10.0.0.7", 53150), Principal: "spiffe://shop.example/web"},
		Destination: &authv3.AttributeContext_Peer{Address: socket("10.0.0.1", 443)},
		Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			Method: "GET", Scheme: "https", Host: "shop.example.com", Path: "/caf!", Protocol: "HTTP/2",
			HeaderMap: &corev3.HeaderMap{Headers: []*corev3.HeaderValue{
				raw(":method", "GET"), raw(":path", "/caf\xe9"), raw(":authority", "shop.example.com"), raw("x-request-id", "rid"),
				raw("x-request-id", "second"), raw("knhk-parent", testID),
			}},
		}},
		ContextExtensions: map[string]string{ContextRoute: "cart", ContextCluster: "cart-v2"},
		MetadataContext: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
			"knhk":  {Fields: map[string]*structpb.Value{"receipt": structpb.NewStringValue(testID)}},
			"other": {Fields: map[string]*structpb.Value{"receipt": structpb.NewStringValue("not this")}},
		}},
	}
	if edit != nil {
		edit(a)
	}
	return &authv3.CheckRequest{Attributes: a}
}

var admitted = policy.Decision{ID: testID, Class: policy.W1, Verdict: policy.Admit, Reason: policy.ReasonOK}

// TestRequest: what of a check becomes what of a request.
func TestRequest(t *testing.T) {
	base := policy.Request{
		Method: "GET", Scheme: "https", Authority: "shop.example.com", Path: "/caf\xe9", RequestID: "rid", Route: "cart", Cluster: "cart-v2",
		Source: "10.0.0.7:53150", SPIFFEID: "spiffe://shop.example/web", Parent: testID, Decided: testID,
	}
	classified := extproc.Plan{ClassifyBody: true, BodyLimit: 4}
	body := func(content, partial, length string) func(*authv3.AttributeContext) {
		return func(a *authv3.AttributeContext) {
			a.ContextExtensions[ContextBody] = BodyBuffered
			h := a.Request.Http
			h.RawBody = []byte(content)
			for k, v := range map[string]string{headerPartial: partial, "content-length": length} {
				if v != "" {
					h.HeaderMap.Headers = append(h.HeaderMap.Headers, &corev3.HeaderValue{Key: k, RawValue: []byte(v)})
				}
			}
		}
	}
	for name, c := range map[string]struct {
		plan extproc.Plan
		edit func(*authv3.AttributeContext)
		want func(*policy.Request)
	}{
		"as Envoy sends it": {},
		"headers as a map": { // without encode_raw_headers
			edit: func(a *authv3.AttributeContext) {
				a.Request.Http.HeaderMap, a.Request.Http.Headers = nil, map[string]string{"x-request-id": "rid", "knhk-parent": "p"}
			},
			want: func(r *policy.Request) { r.Path, r.Parent = "/caf!", "p" },
		},
		"raw headers weigh more than the map": {
			edit: func(a *authv3.AttributeContext) { a.Request.Http.Headers = map[string]string{"x-request-id": "other"} },
		},
		"the subject of a certificate is no identity": {
			edit: func(a *authv3.AttributeContext) { a.Source.Principal = "CN=spiffe://shop.example/web" },
			want: func(r *policy.Request) { r.SPIFFEID = "" },
		},
		"nor is a DNS name": {
			edit: func(a *authv3.AttributeContext) { a.Source.Principal = "web.shop.example" },
			want: func(r *policy.Request) { r.SPIFFEID = "" },
		},
		"route not listed": {
			edit: func(a *authv3.AttributeContext) { a.ContextExtensions = nil },
			want: func(r *policy.Request) { r.Route, r.Cluster = "", "" },
		},
		"a receipt that is no text": {
			edit: func(a *authv3.AttributeContext) {
				a.MetadataContext.FilterMetadata["knhk"].Fields["receipt"] = structpb.NewNumberValue(1)
			},
			want: func(r *policy.Request) { r.Decided = "" },
		},
		"another ext_authz has asked": {
			edit: func(a *authv3.AttributeContext) {
				m := a.MetadataContext.FilterMetadata
				m["envoy.filters.http.ext_authz"] = m["knhk"]
				delete(m, "knhk")
			},
		},
		"tcp": {
			edit: func(a *authv3.AttributeContext) { a.Request = nil },
			want: func(r *policy.Request) {
				*r = policy.Request{TCP: true, Authority: "10.0.0.1:443", Source: "10.0.0.7:53150", SPIFFEID: "spiffe://shop.example/web"}
			},
		},
		"tcp over a pipe": {
			edit: func(a *authv3.AttributeContext) {
				a.Request = nil
				a.Destination.Address = &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: "/run/x"}}}
			},
			want: func(r *policy.Request) {
				*r = policy.Request{TCP: true, Authority: "/run/x", Source: "10.0.0.7:53150", SPIFFEID: "spiffe://shop.example/web"}
			},
		},
		"body": {plan: classified, edit: body("abc", "false", "3"), want: func(r *policy.Request) { r.HasBody, r.Body = true, []byte("abc") }},
		"body without a length": {
			plan: classified, edit: body("abcd", "false", ""), want: func(r *policy.Request) { r.HasBody, r.Body = true, []byte("abcd") }},
		"no body":              {plan: classified, edit: body("", "", "")},
		"body over the limit":  {plan: classified, edit: body("abcde", "false", ""), want: func(r *policy.Request) { r.BodyLarge = true }},
		"part of a body":       {plan: classified, edit: body("abc", "true", ""), want: func(r *policy.Request) { r.BodyLarge = true }},
		"shorter than it says": {plan: classified, edit: body("abc", "false", "4"), want: func(r *policy.Request) { r.BodyLarge = true }},
		"length is no number":  {plan: classified, edit: body("abc", "false", "x"), want: func(r *policy.Request) { r.BodyLarge = true }},
		"not set up for bodies": {
			plan: classified,
			edit: func(a *authv3.AttributeContext) { a.Request.Http.Body = "abc" },
			want: func(r *policy.Request) { r.BodyMissing = true },
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := &admitter{plan: c.plan, decision: admitted}
			serve(t, a, encoded(t, checkOf(c.edit)))
			want := base
			if c.want != nil {
				c.want(&want)
			}
			want.TraceID = [16]byte{0x0a, 0xf7, 0x65, 0x19, 0x16, 0xcd, 0x43, 0xdd, 0x84, 0x48, 0xeb, 0x21, 0x1c, 0x80, 0x31, 0x9c}
			want.SpanID = [8]byte{0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31}
			if len(a.asked) != 1 {
				t.Fatalf("asked %d times", len(a.asked))
			}
			got := a.asked[0]
			if string(got.Body) != string(want.Body) {
				t.Errorf("body %q, want %q", got.Body, want.Body)
			}
			got.Body, want.Body = nil, nil
			if !equal(got, want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
		})
	}
}

func equal(a, b policy.Request) bool {
	type plain struct {
		a, b, c, d, e, f, g, h, i, j, k string
		t                               [16]byte
		s                               [8]byte
		x                               [4]bool
	}
	of := func(r policy.Request) plain {
		return plain{r.Method, r.Scheme, r.Authority, r.Path, r.RequestID, r.Route, r.Cluster, r.Source, r.SPIFFEID, r.Parent, r.Decided,
			r.TraceID, r.SpanID, [4]bool{r.TCP, r.HasBody, r.BodyLarge, r.BodyMissing}}
	}
	return of(a) == of(b)
}

// TestReply: what of a decision becomes what of a reply. Only a decision that passes is OK.
func TestReply(t *testing.T) {
	for name, c := range map[string]struct {
		a       admitter
		frame   []byte
		code    codes.Code
		http    int32
		body    string
		headers string // of either reply
		meta    string
		events  []Event
	}{
		"admitted": {a: admitter{decision: admitted}, headers: "x-knhk-receipt=" + testID + " x-knhk-class=W1", meta: "class=W1 receipt=" + testID,
			events: []Event{EventAdmitted}},
		"decided by another replica": {a: admitter{decision: policy.Decision{ID: testID, Verdict: policy.Admit}},
			headers: "x-knhk-receipt=" + testID, meta: "receipt=" + testID, events: []Event{EventAdmitted}},
		"excluded by plan": {a: admitter{plan: extproc.Plan{Exclude: true}}, events: []Event{EventExcluded}},
		"excluded":         {a: admitter{decision: policy.Decision{Excluded: true}}, events: []Event{EventExcluded}},
		"gap":              {a: admitter{decision: policy.Decision{Gap: true, Reason: policy.ReasonLogFull}}, meta: "gap=log_full", events: []Event{EventGap}},
		"no credit": {
			a:    admitter{decision: policy.Decision{ID: testID, Class: policy.R1, Reason: policy.ReasonNoCredit, Status: 429, RetryAfter: 1}},
			code: codes.ResourceExhausted, http: 429, body: "refused: no_credit, receipt " + testID + "\n",
			headers: "x-knhk-receipt=" + testID + " x-knhk-class=R1 content-type=text/plain retry-after=1",
			meta:    "class=R1 receipt=" + testID, events: []Event{EventRefused},
		},
		"forbidden": {a: admitter{decision: policy.Decision{Reason: policy.ReasonAuthzForbid, Status: 403}}, code: codes.PermissionDenied, http: 403,
			body: "refused: authz_forbidden\n", headers: "content-type=text/plain", events: []Event{EventRefused}},
		"admitted without a receipt": {a: admitter{decision: policy.Decision{Verdict: policy.Admit}}, code: codes.Unavailable, http: 503,
			body: "refused: internal\n", headers: "content-type=text/plain", events: []Event{EventRefused}},
		"a verdict nobody knows, no receipt": {a: admitter{decision: policy.Decision{Verdict: 77}}, code: codes.Unavailable, http: 503,
			body: "refused: internal\n", headers: "content-type=text/plain", events: []Event{EventRefused}},
		"a reason that is no text": {a: admitter{decision: policy.Decision{Reason: "\xff"}}, code: codes.Unavailable, http: 503,
			body: "refused: invalid\n", headers: "content-type=text/plain", events: []Event{EventRefused}},
		"zero decision": {code: codes.Unavailable, http: 503, body: "refused: internal\n", headers: "content-type=text/plain",
			events: []Event{EventRefused}},
		"panic": {a: admitter{panics: "admit", decision: admitted}, code: codes.Unavailable, http: 503, body: "refused: internal\n",
			headers: "content-type=text/plain", events: []Event{EventPanic, EventRefused}},
		"panic where the route allows": {a: admitter{panics: "admit", plan: extproc.Plan{Allow: true}}, meta: "gap=internal",
			events: []Event{EventPanic, EventGap}},
		"panic of the plan": {a: admitter{panics: "plan", decision: admitted}, code: codes.Unavailable, http: 503,
			body: "refused: internal\n", headers: "content-type=text/plain", events: []Event{EventPanic}},
		"no protobuf": {a: admitter{decision: admitted}, frame: []byte{0xff}, code: codes.Unavailable, http: 503, body: "refused: internal\n",
			headers: "content-type=text/plain", events: []Event{EventMalformed}},
		"text that is not UTF-8": {a: admitter{decision: admitted}, code: codes.Unavailable, http: 503, body: "refused: internal\n",
			// attributes.request.http.path (1.4.2.4)
			frame:   []byte{0x0a, 0x07, 0x22, 0x05, 0x12, 0x03, 0x22, 0x01, 0xff},
			headers: "content-type=text/plain", events: []Event{EventMalformed}},
		"empty": {a: admitter{decision: admitted}, frame: []byte{}, code: codes.Unavailable, http: 503, body: "refused: internal\n",
			headers: "content-type=text/plain", events: []Event{EventUnexpected}},
		"empty attributes": {a: admitter{decision: admitted}, frame: []byte{0x0a, 0}, code: codes.Unavailable, http: 503,
			body: "refused: internal\n", headers: "content-type=text/plain", events: []Event{EventUnexpected}},
		"a request that is not HTTP": {a: admitter{decision: admitted}, frame: []byte{0x0a, 2, 0x22, 0}, code: codes.Unavailable, http: 503,
			body: "refused: internal\n", headers: "content-type=text/plain", events: []Event{EventUnexpected}},
		"no method": {a: admitter{decision: admitted}, frame: []byte{0x0a, 4, 0x22, 2, 0x12, 0}, code: codes.Unavailable, http: 503,
			body: "refused: internal\n", headers: "content-type=text/plain", events: []Event{EventUnexpected}},
	} {
		t.Run(name, func(t *testing.T) {
			frame := c.frame
			if frame == nil {
				frame = encoded(t, checkOf(nil))
			}
			r, events := serve(t, &c.a, frame)
			if got := codes.Code(r.GetStatus().GetCode()); got != c.code {
				t.Errorf("status %v, want %v", got, c.code)
			}
			d := r.GetDeniedResponse()
			if int32(d.GetStatus().GetCode()) != c.http || d.GetBody() != c.body {
				t.Errorf("denied %v %q, want %d %q", d.GetStatus().GetCode(), d.GetBody(), c.http, c.body)
			}
			var headers []string
			for _, h := range append(d.GetHeaders(), r.GetOkResponse().GetResponseHeadersToAdd()...) {
				headers = append(headers, h.GetHeader().GetKey()+"="+h.GetHeader().GetValue())
				if h.GetAppendAction() != corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD {
					t.Errorf("header %s is appended", h.GetHeader().GetKey())
				}
			}
			if got := strings.Join(headers, " "); got != c.headers {
				t.Errorf("headers %q, want %q", got, c.headers)
			}
			var meta []string
			for k, v := range r.GetDynamicMetadata().GetFields() {
				meta = append(meta, k+"="+v.GetStringValue())
			}
			slices.Sort(meta)
			if got := strings.Join(meta, " "); got != c.meta {
				t.Errorf("metadata %q, want %q", got, c.meta)
			}
			if !slices.Equal(events, c.events) {
				t.Errorf("events %v, want %v", events, c.events)
			}
		})
	}
}

// TestEnds: a call that Envoy has ended has no answer, and the decision made for it has an outcome.
func TestEnds(t *testing.T) {
	undelivered := []string{testID + " ext_authz aborted answer_not_delivered"}
	for name, c := range map[string]struct {
		a      admitter
		call   call
		cancel bool // while Admit runs
		want   []string
		code   codes.Code
	}{
		"answer cannot be sent": {a: admitter{decision: admitted}, call: call{sendErr: io.ErrClosedPipe}, want: undelivered, code: codes.Canceled},
		"ended while it waited": {a: admitter{decision: admitted}, cancel: true, want: undelivered, code: codes.Canceled},
		"nothing recorded":      {cancel: true, code: codes.Canceled},
		"finish panics":         {a: admitter{decision: admitted, panics: "finish"}, cancel: true, code: codes.Canceled},
		"no message":            {a: admitter{decision: admitted}, call: call{recvErr: io.EOF}, code: codes.Canceled},
		"reset":                 {call: call{recvErr: status.Error(codes.Canceled, "")}, code: codes.Canceled},
		"too large":             {call: call{recvErr: status.Error(codes.ResourceExhausted, "")}, code: codes.ResourceExhausted},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := New(Config{Admitter: &c.a, Log: slog.New(slog.DiscardHandler)})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if c.cancel {
				c.a.admit = cancel
			}
			c.call.ctx, c.call.frame = ctx, encoded(t, checkOf(nil))
			if err := s.serve(&c.call); status.Code(err) != c.code {
				t.Errorf("call ended with %v, want %v", err, c.code)
			}
			if !slices.Equal(c.a.finished, c.want) || len(c.call.sent) != 0 {
				t.Errorf("finished %q, want %q; %d answers", c.a.finished, c.want, len(c.call.sent))
			}
		})
	}
}

func TestNew(t *testing.T) {
	for _, cfg := range []Config{{}, {Admitter: &admitter{}}, {Log: slog.New(slog.DiscardHandler)}} {
		if s, err := New(cfg); err == nil || s != nil {
			t.Errorf("%+v accepted", cfg)
		}
	}
	for e := range numEvents {
		if e.String() == "unknown" || e.String() == "" {
			t.Errorf("event %d has no name", e)
		}
	}
}

// FuzzCheck: whatever bytes come, there is one answer that parses, and without a decision that passes it is no OK.
func FuzzCheck(f *testing.F) {
	f.Add(encoded(f, checkOf(nil)), true)
	f.Add(encoded(f, checkOf(func(a *authv3.AttributeContext) { a.Request = nil })), true)
	f.Add([]byte{0x0a, 0}, false)
	f.Add([]byte{0xff}, true)
	f.Fuzz(func(t *testing.T, b []byte, admit bool) {
		a := &admitter{plan: extproc.Plan{ClassifyBody: true, BodyLimit: 8}}
		if admit {
			a.decision = admitted
		}
		r, _ := serve(t, a, b)
		ok := r.GetStatus().GetCode() == int32(codes.OK)
		if ok != (admit && len(a.asked) == 1) {
			t.Errorf("OK %v, asked %d times, admits %v", ok, len(a.asked), admit)
		}
		if !ok && r.GetDeniedResponse().GetStatus().GetCode() < 400 {
			t.Errorf("denial without a status: %v", r)
		}
		if len(a.asked) == 1 && a.asked[0].TCP && a.asked[0].Method != "" {
			t.Errorf("a connection with a method: %+v", a.asked[0])
		}
	})
}
