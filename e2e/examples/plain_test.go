package examples

import (
	"net/http"
	"testing"
)

func TestExtProc(t *testing.T) {
	s := prepare(t, "ext-proc")
	s.start("knhk.yaml", "envoy.yaml")
	url, c := "http://"+s.addr(listenerAddr), s.plain()
	for _, c := range []call{
		{"a page", c, "", "/", nil, 200, judged{"admit", "ok", "", "", false}},
		{"a forged id", c, "", "/hot/page", map[string]string{"x-knhk-receipt": "forged"}, 200, judged{"admit", "ok", "", "", false}},
	} {
		s.check(url, c)
	}
}

func TestExtAuthz(t *testing.T) {
	s := prepare(t, "ext-authz")
	s.start("knhk.yaml", "envoy.yaml")
	url, c := "http://"+s.addr(listenerAddr), s.plain()
	for _, c := range []call{
		{"reading", c, "", "/", nil, 200, judged{"admit", "ok", "", "anyone-reads", false}},
		{"writing", c, http.MethodPost, "/", nil, 403, judged{"refuse", "authz_no_rule", "", "", false}},
		{"what is internal", c, "", "/internal/x", nil, 403, judged{"refuse", "authz_forbidden", "", "no-internal", false}},
	} {
		s.check(url, c)
	}
	if n := s.app.CountPath("/internal/x"); n != 0 {
		t.Errorf("a refused request reached the upstream %d times", n)
	}
}

// In shadow mode what would be refused passes, and its receipt says so.
func TestExtAuthzShadow(t *testing.T) {
	s := prepare(t, "ext-authz")
	s.start("knhk-shadow.yaml", "envoy-shadow.yaml")
	url, c := "http://"+s.addr(listenerAddr), s.plain()
	for _, c := range []call{
		{"reading", c, "", "/", nil, 200, judged{"admit", "ok", "", "anyone-reads", true}},
		{"writing", c, http.MethodPost, "/", nil, 200, judged{"refuse", "authz_no_rule", "", "", true}},
		{"what is internal", c, "", "/internal/x", nil, 200, judged{"refuse", "authz_forbidden", "", "no-internal", true}},
	} {
		s.check(url, c)
	}
	if n := s.app.CountPath("/internal/x"); n != 1 {
		t.Errorf("a request that is only watched reached the upstream %d times", n)
	}
}
