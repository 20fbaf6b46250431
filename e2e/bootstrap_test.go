package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/protobuf/types/known/durationpb"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/envoy/bootstrap"
)

// world is an Envoy with the configuration of envoy/bootstrap between a stand-in for knhk and an upstream.
type world struct {
	side  *sidecar
	up    *harness.Upstream
	envoy *harness.Envoy
	addr  string
}

// start runs a world. edit may change the configuration, after what was made of it, before Envoy sees it.
func start(t *testing.T, edit func(*configv1.Config), after ...func(*bootstrapv3.Bootstrap)) *world {
	t.Helper()
	harness.RequireEnvoy(t)
	w := &world{side: runSidecar(t, ""), up: harness.RunUpstream(t)}
	cfg := &configv1.Config{
		Instance:  "a",
		Listeners: &configv1.Listeners{Envoy: w.side.addr},
		Envoy: &configv1.Envoy{
			Listener: "127.0.0.1:0", Admin: "127.0.0.1:0",
			Clusters: []*configv1.Cluster{
				{Name: "up", Endpoints: []string{w.up.HTTP()}},
				{Name: "rpc", Endpoints: []string{w.up.GRPC()}, Http2: true},
			},
			MessageTimeout: durationpb.New(2 * time.Second),
			AccessLogFlush: durationpb.New(10 * time.Millisecond),
		},
		Routes: []*configv1.Route{
			{Name: "all", Cluster: "up"},
			{Name: "allow", Cluster: "up", Prefix: "/allow/",
				Policy: &configv1.RoutePolicy{OnReceiptFailure: configv1.OnReceiptFailure_ALLOW}},
			{Name: "body", Cluster: "up", Prefix: "/body/", Policy: &configv1.RoutePolicy{ClassifyBody: true}},
			{Name: "off", Cluster: "up", Prefix: "/off/do/forge", Policy: &configv1.RoutePolicy{Exclude: true}},
			{Name: "ws", Cluster: "up", Prefix: "/ws/", Websocket: true},
			{Name: "hop", Cluster: "up", Prefix: "/hop/", InternalRedirects: 2},
			{Name: "rpc", Cluster: "rpc", Prefix: "/grpc.testing.TestService/"},
		},
	}
	if edit != nil {
		edit(cfg)
	}
	b, err := bootstrap.Bootstrap(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range after {
		f(b)
	}
	y, err := bootstrap.YAML(b)
	if err != nil {
		t.Fatal(err)
	}
	w.envoy = harness.RunEnvoy(t, harness.EnvoyConfig{Bootstrap: y})
	if w.addr, err = w.envoy.Listener(t.Context(), bootstrap.ListenerName); err != nil {
		t.Fatal(err)
	}
	return w
}

// do sends one request with the stand-in answering as told.
func (w *world) do(t *testing.T, a answer, r harness.Request) *harness.Response {
	t.Helper()
	w.side.reset(a)
	w.up.Forget()
	resp, err := harness.Do(t.Context(), w.addr, r)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

// messages waits until n messages came on the only stream and describes them: kind, end of stream, size of the body.
func (w *world) messages(t *testing.T, n int) []string {
	t.Helper()
	var out []string
	harness.Eventually(t, fmt.Sprintf("%d messages on one stream", n), func() bool {
		streams := w.side.seen()
		return len(streams) == 1 && len(streams[0]) >= n
	})
	for _, m := range w.side.seen()[0] {
		out = append(out, describe(m))
	}
	return out
}

func describe(m *extprocv3.ProcessingRequest) string {
	switch r := m.GetRequest().(type) {
	case *extprocv3.ProcessingRequest_RequestHeaders:
		return fmt.Sprintf("headers(end=%t)", r.RequestHeaders.GetEndOfStream())
	case *extprocv3.ProcessingRequest_RequestBody:
		return fmt.Sprintf("body(%d, end=%t)", len(r.RequestBody.GetBody()), r.RequestBody.GetEndOfStream())
	case *extprocv3.ProcessingRequest_RequestTrailers:
		return "trailers"
	case *extprocv3.ProcessingRequest_ResponseHeaders:
		return fmt.Sprintf("response headers(end=%t)", r.ResponseHeaders.GetEndOfStream())
	case *extprocv3.ProcessingRequest_ResponseTrailers:
		return "response trailers"
	}
	return fmt.Sprintf("%T", m.GetRequest())
}

// forged is what a client tries: our headers, a request id and one of Envoy's own controls.
var forged = map[string]string{
	"X-Knhk-Receipt": "forged", "X-Knhk-Class": "forged", "X-Knhk-Other": "forged",
	"X-Request-Id": "forged", "X-Envoy-Upstream-Rq-Timeout-Ms": "1", "Authorization": "secret", "Cookie": "secret",
}

func TestRequestsArriveClean(t *testing.T) {
	w := start(t, nil)
	resp := w.do(t, pass, harness.Request{Target: "/do/echo", Header: forged})
	var echo harness.Echo
	if err := json.Unmarshal(resp.Body, &echo); err != nil {
		t.Fatalf("%v in %q", err, resp.Body)
	}
	for name := range echo.Header {
		if strings.HasPrefix(strings.ToLower(name), bootstrap.HeaderPrefix) {
			t.Errorf("the upstream got %s", name)
		}
	}
	if id := echo.Header.Get("X-Request-Id"); id == "forged" || len(id) != 36 {
		t.Errorf("the upstream got request id %q, want one of Envoy's", id)
	}
	if ms := echo.Header.Get("X-Envoy-Expected-Rq-Timeout-Ms"); ms != "15000" {
		t.Errorf("the client changed the timeout: %q", ms)
	}
	if echo.Header.Get("Authorization") != "secret" {
		t.Error("the upstream did not get the client's own headers")
	}
	// What ext_proc tells us: the listed headers, pseudo headers among them, and the attributes; nothing else.
	first := w.side.seen()[0][0]
	got := map[string]string{}
	for _, h := range first.GetRequestHeaders().GetHeaders().GetHeaders() {
		got[h.GetKey()] = h.GetValue() + string(h.GetRawValue())
	}
	want := map[string]string{":method": "GET", ":scheme": "http", ":authority": "test.local", ":path": "/do/echo",
		"x-request-id": echo.Header.Get("X-Request-Id")}
	if !maps.Equal(got, want) {
		t.Errorf("headers forwarded to us:\n got %v\nwant %v", got, want)
	}
	attrs := first.GetAttributes()["envoy.filters.http.ext_proc"].GetFields()
	if r, c := attrs["xds.route_name"].GetStringValue(), attrs["xds.cluster_name"].GetStringValue(); r != "all" || c != "up" {
		t.Errorf("route %q, cluster %q", r, c)
	}
	if host, _, err := net.SplitHostPort(attrs["source.address"].GetStringValue()); err != nil || host != "127.0.0.1" {
		t.Errorf("source.address %v", attrs["source.address"])
	}
}

func TestPathsHaveOneSpelling(t *testing.T) {
	w := start(t, nil)
	for _, c := range []struct {
		target string
		status int
		path   string // as decided about and as forwarded
	}{
		{"/a/../do//status/204", 204, "/do/status/204"},
		{"/do/%2e%2e/do/status/204", 204, "/do/status/204"},
		{"/do%2fstatus/204", 400, ""}, // an escaped slash is refused: nobody agrees on what it means
	} {
		resp := w.do(t, pass, harness.Request{Target: c.target})
		if resp.Status != c.status {
			t.Errorf("%s: status %d, want %d", c.target, resp.Status, c.status)
		}
		if c.path == "" {
			continue
		}
		if seen := w.up.Seen(); len(seen) != 1 || seen[0].Path != c.path {
			t.Errorf("%s: upstream saw %v, want %s", c.target, seen, c.path)
		}
		for _, h := range w.side.seen()[0][0].GetRequestHeaders().GetHeaders().GetHeaders() {
			if h.GetKey() == ":path" && string(h.GetRawValue()) != c.path {
				t.Errorf("%s: we saw %s, want %s", c.target, h.GetRawValue(), c.path)
			}
		}
	}
	if resp := w.do(t, pass, harness.Request{Header: map[string]string{"x_knhk_receipt": "x"}}); resp.Status != 400 {
		t.Errorf("a header with underscores passed: %d", resp.Status)
	}
}

func TestResponseHeadersAreOurs(t *testing.T) {
	w := start(t, nil)
	for _, c := range []struct {
		name           string
		answer         answer
		req            harness.Request
		status         int
		receipt, class string // "" means: no such header at all
	}{
		{"an upstream forges, no metadata", pass, harness.Request{Target: "/do/forge"}, 200, "", ""},
		{"an upstream forges, metadata", receipt("id"), harness.Request{Target: "/do/forge"}, 200, "id", "W1"},
		{"excluded route, an upstream forges", receipt("id"), harness.Request{Target: "/off/do/forge"}, 200, "", ""},
		{"refused", refuse("id"), harness.Request{Header: forged}, 429, "id", "W1"},
		{"ext_proc fails", fail, harness.Request{Header: forged}, 503, "", ""},
		{"ext_proc is silent", silent, harness.Request{Header: forged}, 504, "", ""},
		{"ext_proc fails, the route allows", fail, harness.Request{Target: "/allow/do/forge", Header: forged}, 200, "", ""},
		{"ext_proc is silent, the route allows", silent, harness.Request{Target: "/allow/", Header: forged}, 200, "", ""},
		{"refused although the route allows", refuse("id"), harness.Request{Target: "/allow/"}, 429, "id", "W1"},
		{"upstream resets", receipt("id"), harness.Request{Target: "/do/reset"}, 503, "id", "W1"},
		{"no Host", receipt("id"), harness.MissingHost(), 400, "", ""},
		{"too many header bytes", receipt("id"), harness.OversizedHeaders(70), 431, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			resp := w.do(t, c.answer, c.req)
			if resp.Status != c.status {
				t.Errorf("status %d, want %d", resp.Status, c.status)
			}
			for name, want := range map[string]string{"X-Knhk-Receipt": c.receipt, "X-Knhk-Class": c.class, "X-Knhk-Other": ""} {
				got, there := resp.Header[name]
				if there != (want != "") || there && !slices.Equal(got, []string{want}) {
					t.Errorf("%s: %q, want %q", name, got, want)
				}
			}
			if c.status == 429 && resp.Header.Get("Retry-After") != "1" {
				t.Errorf("Retry-After %q", resp.Header.Get("Retry-After"))
			}
			if n := len(w.up.Seen()); (c.status == 429 || c.status == 504 || c.name == "ext_proc fails") && n != 0 {
				t.Errorf("the upstream saw %d requests", n)
			}
		})
	}
	resp := w.do(t, receipt("id"), harness.Request{Target: "/do/trailers"})
	if resp.Trailer.Get("X-Sum") != "1" || resp.Trailer.Get("X-Knhk-Receipt") != "" {
		t.Errorf("trailers %v", resp.Trailer)
	}
}

// The messages of a route that is classified by body, and what must be answered: the decision belongs to the headers
// if they end the request, else to the body if there is one, else to the trailers.
func TestBodyMessages(t *testing.T) {
	w := start(t, nil)
	for _, c := range []struct {
		name string
		req  harness.Request
		want []string
		sent int64 // what the upstream must receive
	}{
		{"no body", harness.Request{}, []string{"headers(end=true)"}, 0},
		{"one byte", harness.Request{Body: "x"}, []string{"headers(end=false)", "body(1, end=true)"}, 1},
		{"the limit of classification", harness.Request{Body: body(8192)}, []string{"headers(end=false)", "body(8192, end=true)"}, 8192},
		{"one more", harness.Request{Body: body(8193)}, []string{"headers(end=false)", "body(8193, end=true)"}, 8193},
		{"chunks, joined", harness.Request{Chunks: []string{body(500), body(524)}},
			[]string{"headers(end=false)", "body(1024, end=true)"}, 1024},
		{"chunked, but empty", harness.Request{Chunks: []string{}}, []string{"headers(end=false)", "body(0, end=true)"}, 0},
		// The body is whole, but Envoy cannot know that trailers are the end: not the end of the stream.
		{"with trailers", harness.Request{Chunks: []string{body(100)}, Trailer: map[string]string{"X-T": "1"}},
			[]string{"headers(end=false)", "body(100, end=false)", "trailers"}, 100},
		{"trailers alone: no body message", harness.Request{Trailer: map[string]string{"X-T": "1"}},
			[]string{"headers(end=false)", "trailers"}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.req.Method, c.req.Target = "POST", "/body/do/echo"
			resp := w.do(t, receipt("id"), c.req)
			if got := w.messages(t, len(c.want)); !slices.Equal(got, c.want) {
				t.Errorf("messages\n got %v\nwant %v", got, c.want)
			}
			checkUpload(t, resp, c.sent, len(c.req.Body))
		})
	}
	// Longer than the buffers: what fits comes in one message that is not the end, the rest goes on unseen.
	for _, c := range []struct {
		name string
		req  harness.Request
		sent int64
	}{
		{"3 MiB", harness.Request{Body: body(3 << 20)}, 3 << 20},
		{"3 MiB in chunks", harness.Request{Chunks: slices.Repeat([]string{body(32 << 10)}, 96)}, 3 << 20},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.req.Method, c.req.Target = "POST", "/body/do/echo"
			resp := w.do(t, receipt("id"), c.req)
			w.messages(t, 2)
			if got := w.side.seen()[0]; len(got) != 2 || got[1].GetRequestBody().GetEndOfStream() ||
				len(got[1].GetRequestBody().GetBody()) <= 8192 {
				t.Errorf("messages %v", w.messages(t, 2))
			}
			checkUpload(t, resp, c.sent, len(c.req.Body))
		})
	}
	t.Run("refused at the body", func(t *testing.T) {
		resp := w.do(t, func(m *extprocv3.ProcessingRequest) (*extprocv3.ProcessingResponse, error) {
			if m.GetRequestHeaders() != nil {
				return pass(m)
			}
			return refuse("id")(m)
		}, harness.Request{Method: "POST", Target: "/body/do/echo", Body: body(3 << 20)})
		if resp.Status != 429 || resp.Header.Get("X-Knhk-Receipt") != "id" || len(w.up.Seen()) != 0 {
			t.Errorf("status %d, header %v, upstream saw %v", resp.Status, resp.Header, w.up.Seen())
		}
	})
	t.Run("the server learns that bodies come", func(t *testing.T) {
		w.do(t, pass, harness.Request{Target: "/body/"})
		if got := w.side.seen()[0][0].GetProtocolConfig().GetRequestBodyMode().String(); got != "BUFFERED_PARTIAL" {
			t.Errorf("request_body_mode %s", got)
		}
		w.do(t, pass, harness.Request{})
		if got := w.side.seen()[0][0].GetProtocolConfig().GetRequestBodyMode().String(); got != "NONE" {
			t.Errorf("request_body_mode of an ordinary route %s", got)
		}
	})
}

func body(n int) string { return strings.Repeat("b", n) }

// checkUpload checks what the upstream received; a content-length must stay one.
func checkUpload(t *testing.T, resp *harness.Response, sent int64, length int) {
	t.Helper()
	var echo harness.Echo
	if err := json.Unmarshal(resp.Body, &echo); err != nil {
		t.Fatalf("%v in %d %q", err, resp.Status, resp.Body)
	}
	if echo.Body != sent || length > 0 && echo.Length != int64(length) {
		t.Errorf("the upstream got %d bytes with content-length %d, want %d with %d", echo.Body, echo.Length, sent, length)
	}
	if resp.Header.Get("X-Knhk-Receipt") != "id" {
		t.Errorf("no receipt: %v", resp.Header)
	}
}

func TestOtherProtocols(t *testing.T) {
	w := start(t, nil)
	t.Run("websocket", func(t *testing.T) {
		w.side.reset(receipt("id"))
		c, err := harness.WebSocket(t.Context(), w.addr, "/ws/do/ws")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 5)
		if _, err := c.Read(got); err != nil || string(got) != "hello" {
			t.Errorf("echo %q, %v", got, err)
		}
		if _, err := harness.WebSocket(t.Context(), w.addr, "/do/ws"); err == nil {
			t.Error("a route without websocket upgraded")
		}
	})
	t.Run("grpc", func(t *testing.T) {
		w.side.reset(receipt("id"))
		cc, err := grpc.NewClient(w.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer cc.Close()
		resp, err := grpc_testing.NewTestServiceClient(cc).UnaryCall(t.Context(), &grpc_testing.SimpleRequest{ResponseSize: 100})
		if err != nil || len(resp.GetPayload().GetBody()) != 100 {
			t.Errorf("unary call: %v, %v", resp, err)
		}
	})
	t.Run("an internal redirect is a second stream with the same request id", func(t *testing.T) {
		resp := w.do(t, receipt("id"), harness.Request{Target: "/hop/do/redirect/302/do/status/204"})
		if resp.Status != 204 {
			t.Fatalf("status %d", resp.Status)
		}
		streams := w.side.seen()
		if len(streams) != 2 || len(w.up.Seen()) != 2 || w.up.Seen()[0].RequestID != w.up.Seen()[1].RequestID {
			t.Errorf("%d streams, upstream saw %v", len(streams), w.up.Seen())
		}
	})
}

func TestAccessLog(t *testing.T) {
	w := start(t, nil)
	w.do(t, receipt("id"), harness.Request{Target: "/do/cached", Header: forged})
	harness.Eventually(t, "an access log entry", func() bool { return len(w.side.logged()) == 1 })
	e := w.side.logged()[0]
	common := e.GetCommonProperties()
	md := common.GetMetadata().GetFilterMetadata()[bootstrap.MetadataNamespace].GetFields()
	if md[bootstrap.MetadataReceipt].GetStringValue() != "id" || md[bootstrap.MetadataClass].GetStringValue() != "W1" {
		t.Errorf("metadata %v", common.GetMetadata())
	}
	if id := e.GetRequest().GetRequestId(); id == "" || id != w.up.Seen()[0].RequestID {
		t.Errorf("request id %q", id)
	}
	if common.GetRouteName() != "all" || common.GetUpstreamCluster() != "up" || e.GetResponse().GetResponseCode().GetValue() != 200 {
		t.Errorf("entry %v", e)
	}
	if h := e.GetResponse().GetResponseHeaders(); len(h) != 1 || h["cache-status"] != "upstream; hit" {
		t.Errorf("response headers %v", h)
	}
	if h := e.GetRequest().GetRequestHeaders(); len(h) != 0 {
		t.Errorf("request headers %v: a client's secrets are not for the log", h)
	}
	w.side.mu.Lock()
	defer w.side.mu.Unlock()
	if !slices.Equal(w.side.names, []string{"knhk@envoy-a"}) {
		t.Errorf("log names %v", w.side.names)
	}
}

func TestFullCapture(t *testing.T) {
	w := start(t, func(c *configv1.Config) { c.Envoy.Capture = configv1.Capture_FULL })
	w.do(t, receipt("id"), harness.Request{Target: "/do/cached"})
	want := []string{"headers(end=true)", "response headers(end=false)"}
	if got := w.messages(t, 2); !slices.Equal(got, want) {
		t.Errorf("messages %v, want %v", got, want)
	}
	m := w.side.seen()[0][1]
	got := map[string]string{}
	for _, h := range m.GetResponseHeaders().GetHeaders().GetHeaders() {
		got[h.GetKey()] = string(h.GetRawValue())
	}
	if got[":status"] != "200" || got["cache-status"] != "upstream; hit" || got["date"] != "" {
		t.Errorf("response headers forwarded to us %v", got)
	}
	attrs := m.GetAttributes()["envoy.filters.http.ext_proc"].GetFields()
	if attrs["xds.cluster_name"].GetStringValue() != "up" || attrs["upstream.address"].GetStringValue() != w.up.HTTP() ||
		attrs["upstream.request_attempt_count"].GetNumberValue() != 1 {
		t.Errorf("attributes %v", attrs)
	}
	w.do(t, receipt("id"), harness.Request{Target: "/do/trailers"})
	want = []string{"headers(end=true)", "response headers(end=false)", "response trailers"}
	if got := w.messages(t, 3); !slices.Equal(got, want) {
		t.Errorf("messages %v, want %v", got, want)
	}
	// A response that breaks off: the stream is still open then, and ends without a trailer message.
	w.side.reset(receipt("id"))
	resp, err := harness.CutMidBody(t.Context(), w.addr, "/do/cut/100")
	if err != nil || resp.Status != 200 {
		t.Fatalf("%v, %v", resp, err)
	}
	want = []string{"headers(end=false)", "response headers(end=false)"}
	if got := w.messages(t, 2); !slices.Equal(got, want) {
		t.Errorf("messages %v, want %v", got, want)
	}
	harness.Eventually(t, "the end of the stream", func() bool { return len(w.side.ended()) > 0 })
	t.Logf("a cut in the response body ends the stream with: %v", w.side.ended())
}

func TestOptIn(t *testing.T) {
	w := start(t, func(c *configv1.Config) {
		c.DefaultRoute = &configv1.RoutePolicy{Exclude: true}
		c.Routes = []*configv1.Route{
			{Name: "on", Cluster: "up", Prefix: "/on/"},
			{Name: "off", Cluster: "up", Prefix: "/off/do/forge", Policy: &configv1.RoutePolicy{Exclude: true}},
		}
	})
	for _, c := range []struct {
		target  string
		status  int
		receipt string
	}{{"/on/do/forge", 200, "id"}, {"/off/do/forge", 200, ""}, {"/nowhere", 404, ""}} {
		resp := w.do(t, receipt("id"), harness.Request{Target: c.target})
		if resp.Status != c.status || resp.Header.Get("X-Knhk-Receipt") != c.receipt {
			t.Errorf("%s: %d, receipt %q", c.target, resp.Status, resp.Header.Get("X-Knhk-Receipt"))
		}
	}
	// Turned on per route, the filter must still fail closed.
	if resp := w.do(t, fail, harness.Request{Target: "/on/"}); resp.Status != 503 {
		t.Errorf("a failing sidecar on a route that opted in: %d", resp.Status)
	}
}

// No route means no upstream, but the request is still ours to judge.
func TestNoRoute(t *testing.T) {
	w := start(t, func(c *configv1.Config) { c.Routes = c.Routes[1:] })
	resp := w.do(t, receipt("id"), harness.Request{Target: "/nowhere"})
	if resp.Status != 404 || resp.Header.Get("X-Knhk-Receipt") != "id" {
		t.Errorf("%d, %v", resp.Status, resp.Header)
	}
}
