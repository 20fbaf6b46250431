package access

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

func grants(t *testing.T, lists map[Role][]string) *Grants {
	t.Helper()
	out := map[Role][]Principal{}
	for role, names := range lists {
		for _, n := range names {
			p, err := ParsePrincipal(n)
			if err != nil {
				t.Fatal(err)
			}
			if p.String() != n {
				t.Errorf("%q is written as %q", n, p)
			}
			out[role] = append(out[role], p)
		}
	}
	return NewGrants(out)
}

func authority(t *testing.T, lists map[Role][]string, refused func(Listener, Cause)) *Authority {
	t.Helper()
	a, err := New(Config{Grants: grants(t, lists), Log: slog.New(slog.DiscardHandler), Now: time.Now, Refused: refused})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestGrants: an ID has what it is given, by name or by a path above it, and nothing by resembling one that has more.
func TestGrants(t *testing.T) {
	other := os.Geteuid() + 1
	g := grants(t, map[Role][]string{
		Envoy:    {"spiffe://a.test/envoy", "spiffe://a.test/edge/*", "uid:4294967294"},
		Operator: {"spiffe://a.test/ops/*", "spiffe://a.test/edge/eu/1"},
		Auditor:  {"spiffe://b.test/*", "uid:4294967293"},
		Peer:     {"spiffe://a.test/ops/alice", "uid:4294967294"},
	})
	for id, want := range map[string]Role{
		"spiffe://a.test/envoy":      Envoy,
		"spiffe://a.test/envoy/x":    0,
		"spiffe://a.test/envoy2":     0,
		"spiffe://b.test/envoy":      Auditor,
		"spiffe://a.test/edge":       0,
		"spiffe://a.test/edgeling/1": 0,
		"spiffe://a.test/edge/eu":    Envoy,
		"spiffe://a.test/edge/eu/1":  Envoy | Operator,
		"spiffe://a.test/ops/alice":  Operator | Peer,
		"spiffe://a.test/ops/bob/x":  Operator,
		"spiffe://b.test":            0, // the trust domain itself is nobody
		"spiffe://b.test/x/y/z":      Auditor,
		"spiffe://b.test.evil/x":     0,
		"spiffe://a.test":            0,
	} {
		if got := g.Of(Who{ID: spiffeid.RequireFromString(id)}); got != want {
			t.Errorf("%s: %s, want %s", id, got, want)
		}
	}
	for uid, want := range map[int]Role{
		0: Every, os.Geteuid(): Every, 4294967294: Envoy | Peer, 4294967293: Auditor, other: 0, -1: 0, 4294967295: 0,
	} {
		if got := g.Of(Who{User: true, UID: uid}); got != want {
			t.Errorf("uid %d: %s, want %s", uid, got, want)
		}
	}
	if got := g.Of(Who{}); got != 0 {
		t.Errorf("nobody: %s", got) // its UID is 0 too
	}
	if got := g.Of(Who{Insecure: true}); got != Every {
		t.Errorf("insecure: %s", got)
	}
	if got := g.Of(Who{ID: spiffeid.RequireFromString("spiffe://c.test/x"), Insecure: true, User: true}); got != 0 {
		t.Errorf("a certificate without a role, whatever else: %s", got)
	}
}

// TestAllowed: what has no rule is nobody's, and a path that would be cleaned is no path.
func TestAllowed(t *testing.T) {
	for _, c := range []struct {
		on     Listener
		method string
		want   Role
	}{
		{OnAdmin, "/metrics", Operator | Auditor},
		{OnAdmin, "/metrics/", 0},
		{OnAdmin, "/METRICS", 0},
		{OnAdmin, "metrics", 0},
		{OnAdmin, "", 0},
		{OnAdmin, "/", 0},
		{OnAdmin, "*", 0},
		{OnAdmin, "/debug/pprof/", Operator},
		{OnAdmin, "/debug/pprof/heap", Operator},
		{OnAdmin, "/debug/pprof/../../metrics", 0},
		{OnAdmin, "/debug/pprof//heap", 0},
		{OnAdmin, "/debug/pprof", 0},
		{OnAdmin, "/debug/", 0},
		{OnAdmin, "/tile/0", 0},
		{OnTiles, "/tile/0/000", Operator | Auditor | Peer},
		{OnTiles, "/tile/../checkpoint", 0},
		{OnTiles, "/metrics", 0},
		{OnEnvoy, "/grpc.health.v1.Health/Check", Envoy},
		{OnEnvoy, "/envoy.service.ext_proc.v3.ExternalProcessor/", 0},
		{OnControl, "/knhk.admin.v1.KeyService/Rotate", Operator},
		{OnAdmin, "/knhk.admin.v1.KeyService/Rotate", 0},
		{"probes", "/livez", 0},
		{"", "/metrics", 0},
	} {
		if got := Allowed(c.on, c.method); got != c.want {
			t.Errorf("%s %s: %s, want %s", c.on, c.method, got, c.want)
		}
	}
	// Auditors and peers never get profiles or keys; only operators do.
	for on, table := range rules {
		for path, role := range table {
			if role == 0 {
				t.Errorf("%s %s: a rule for nobody", on, path)
			}
			if on != OnEnvoy && role&Envoy != 0 || on == OnEnvoy && role != Envoy {
				t.Errorf("%s %s: %s: Envoys have their listener, and it has nobody else", on, path, role)
			}
			if on != OnEnvoy && role&Operator == 0 {
				t.Errorf("%s %s: %s lacks the operator", on, path, role)
			}
		}
	}
}

// TestNewMethod: a method that somebody registers and gives no rule is refused to everyone, over gRPC and HTTP.
func TestNewMethod(t *testing.T) {
	var causes []Cause
	a := authority(t, map[Role][]string{Envoy | Operator | Auditor | Peer: {"spiffe://a.test/all"}}, func(_ Listener, c Cause) { causes = append(causes, c) })
	srv := grpc.NewServer()
	srv.RegisterService(&grpc.ServiceDesc{ServiceName: "knhk.fake.v1.New", HandlerType: (*any)(nil), Methods: []grpc.MethodDesc{{MethodName: "Do"}}}, struct{}{})
	all := Who{ID: spiffeid.RequireFromString("spiffe://a.test/all")}
	for name, info := range srv.GetServiceInfo() {
		for _, m := range info.Methods {
			path := "/" + name + "/" + m.Name
			if Allowed(OnEnvoy, path) != 0 {
				t.Errorf("%s has a rule", path)
			}
			for _, w := range []Who{all, {Insecure: true}, {User: true, UID: 0}} {
				ctx := peer.NewContext(context.Background(), &peer.Peer{AuthInfo: AuthInfo{Who: w}})
				if err := a.CallGRPC(ctx, OnEnvoy, path); status.Code(err) != codes.PermissionDenied {
					t.Errorf("%s as %s: %v", path, w, err)
				}
			}
		}
	}
	mux := &Mux{}
	mux.HandleFunc("GET /new", func(http.ResponseWriter, *http.Request) { t.Error("it was reached") })
	if p := mux.Patterns(); len(p) != 1 || p[0] != "GET /new" {
		t.Errorf("patterns %q", p)
	}
	rec := httptest.NewRecorder()
	req := httptest.NewRequest(http.MethodGet, "/new", nil)
	a.Handler(OnAdmin, mux).ServeHTTP(rec, req.WithContext(WithWho(req.Context(), Who{Insecure: true})))
	if rec.Code != http.StatusForbidden {
		t.Errorf("over HTTP: %d", rec.Code)
	}
	for _, c := range causes {
		if c != NoRule {
			t.Errorf("refused for %s", c)
		}
	}
	if len(causes) != 4 {
		t.Errorf("%d refusals counted", len(causes))
	}
}

// TestNobody: a gRPC call or a request whose connection says nothing about who is there is refused, whatever its headers say.
func TestNobody(t *testing.T) {
	a := authority(t, nil, nil)
	const health = "/grpc.health.v1.Health/Check"
	for name, p := range map[string]*peer.Peer{"no peer": nil, "no auth info": {}, "an empty one": {AuthInfo: AuthInfo{}}} {
		ctx := context.Background()
		if p != nil {
			ctx = peer.NewContext(ctx, p)
		}
		if err := a.CallGRPC(ctx, OnEnvoy, health); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v", name, err)
		}
	}
	h := a.Handler(OnAdmin, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("it was reached") }))
	req := httptest.NewRequest(http.MethodGet, "/metrics", nil)
	for _, name := range []string{"X-Forwarded-Client-Cert", "X-Spiffe-Id", "Authorization", "X-Forwarded-For", "Forwarded"} {
		req.Header.Set(name, "URI=spiffe://a.test/ops/alice")
	}
	req.RemoteAddr = "127.0.0.1:1"
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, req)
	if rec.Code != http.StatusForbidden || strings.Contains(rec.Body.String(), "alice") {
		t.Errorf("%d %s", rec.Code, rec.Body)
	}
}

// TestRevoke: a reload ends what runs for one who lost the role, even where nobody reads, and nothing else.
func TestRevoke(t *testing.T) {
	lists := map[Role][]string{Auditor: {"uid:4294967294"}, Operator: {"uid:4294967293"}}
	a := authority(t, lists, nil)
	type end struct {
		uid   int
		cause error
	}
	begun, ended := make(chan int, 2), make(chan end, 2)
	h := a.Handler(OnAdmin, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		uid := caller(r).UID
		begun <- uid
		var err error
		for err == nil && uid == 4294967294 { // writes more than anybody reads, until that fails
			_, err = w.Write(make([]byte, 1<<20))
		}
		<-r.Context().Done()
		ended <- end{uid, context.Cause(r.Context())}
	}))
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		uid := 4294967294
		if r.URL.RawQuery == "operator" {
			uid = 4294967293
		}
		h.ServeHTTP(w, r.WithContext(WithWho(r.Context(), Who{User: true, UID: uid})))
	}))
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	srv.Start()
	defer srv.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for _, query := range []string{"", "?operator"} {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, srv.URL+"/metrics"+query, nil)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			resp, err := http.DefaultClient.Do(req)
			if err == nil {
				<-ctx.Done()
				resp.Body.Close()
			}
		}()
	}
	<-begun
	<-begun
	delete(lists, Auditor)
	a.Set(grants(t, lists))
	if got := <-ended; got.uid != 4294967294 || got.cause != ErrRevoked {
		t.Errorf("ended: %+v", got)
	}
	cancel()
	if got := <-ended; got.cause == ErrRevoked {
		t.Errorf("the operator's call was ended by the reload: %+v", got)
	}
}

// TestRefuse: every refusal is counted, the log has a few of each kind.
func TestRefuse(t *testing.T) {
	var out bytes.Buffer
	now := time.Unix(1e9, 0)
	n := 0
	a, err := New(Config{
		Grants: NewGrants(nil), Log: slog.New(slog.NewTextHandler(&out, nil)), Now: func() time.Time { return now },
		Refused: func(Listener, Cause) { n++ },
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		a.Refuse(OnAdmin, Handshake, io.EOF)
	}
	a.Refuse(OnAdmin, NoRole, io.EOF)
	now = now.Add(sayEvery)
	a.Refuse(OnAdmin, Handshake, io.EOF)
	if lines := strings.Count(out.String(), "\n"); lines != 3 || n != 1002 || !strings.Contains(out.String(), "not_logged_before=999") {
		t.Errorf("%d lines for %d refusals:\n%s", lines, n, &out)
	}
}

// BenchmarkCall is what access adds to a request of Envoy.
func BenchmarkCall(b *testing.B) {
	list := make([]Principal, 0, 10_000)
	for i := range 10_000 {
		p, err := ParsePrincipal("spiffe://a.test/edge" + strings.Repeat("x", i%10) + "/*")
		if err != nil {
			b.Fatal(err)
		}
		list = append(list, p)
	}
	a, err := New(Config{Grants: NewGrants(map[Role][]Principal{Envoy: list}), Log: slog.New(slog.DiscardHandler), Now: time.Now})
	if err != nil {
		b.Fatal(err)
	}
	ctx := peer.NewContext(context.Background(), &peer.Peer{AuthInfo: AuthInfo{Who: Who{ID: spiffeid.RequireFromString("spiffe://a.test/edge/eu/1")}}})
	b.ReportAllocs()
	for b.Loop() {
		if err := a.CallGRPC(ctx, OnEnvoy, "/envoy.service.ext_proc.v3.ExternalProcessor/Process"); err != nil {
			b.Fatal(err)
		}
	}
}
