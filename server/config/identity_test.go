package config

import (
	"slices"
	"strings"
	"testing"

	"github.com/knhk/sidecar/server/access"
)

func principal(t *testing.T, s string) access.Principal {
	t.Helper()
	p, err := access.ParsePrincipal(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

const withIdentity = "identity: {spiffe_id: 'spiffe://example.com/knhk', workload_api: 'unix:/run/agent.sock'}\n"

// TestReachable: a TCP listener needs an identity, or loopback and the word for it. What is for anyone needs neither.
func TestReachable(t *testing.T) {
	file := func(listeners, more string) string {
		return "origin: example.com/x\ninstance: a\nstate_dir: /x\nkeys: {identity: {uri: 'soft:k'}, daily: {uri: 'soft:k'}}\nlisteners: {" +
			listeners + "}\n" + more
	}
	const unix = "envoy: 'unix:/e', admin: 'unix:/a'"
	for _, c := range []struct {
		name, text, path string // path of the problem, "" for none
	}{
		{"sockets alone", file(unix, ""), ""},
		{"sockets and an identity", file(unix, withIdentity), ""},
		{"sockets and insecure_loopback", file(unix, "insecure_loopback: true\n"), ""},
		{"any address with an identity", file("envoy: '0.0.0.0:1', admin: '192.0.2.1:2', tiles: '[::]:3'", withIdentity), ""},
		{"loopback with an identity", file("envoy: '127.0.0.1:1', admin: 'localhost:2'", withIdentity), ""},
		{"loopback that is believed", file("envoy: '127.0.0.1:1', admin: '[::1]:2'", "insecure_loopback: true\n"), ""},
		{"loopback without a word", file("envoy: '127.0.0.1:1', admin: 'unix:/a'", ""), "listeners.envoy"},
		{"insecure_loopback: false", file("envoy: 'unix:/e', admin: 'localhost:2'", "insecure_loopback: false\n"), "listeners.admin"},
		{"insecure_loopback is about loopback", file(unix+", tiles: '0.0.0.0:3'", "insecure_loopback: true\n"), "listeners.tiles"},
		{"another machine, no identity", file("envoy: '192.0.2.1:1', admin: 'unix:/a'", ""), "listeners.envoy"},
		{"probes are for anyone", file(unix+", probes: '0.0.0.0:8'", ""), ""},
		{"a replica elsewhere", file("envoy: '192.0.2.1:1', admin: 'unix:/a'", withIdentity+
			"envoy: {replicas: [{instance: a, address: '192.0.2.1:1'}, {instance: b, address: '192.0.2.2:1'}]}\n"), ""},
		{"a replica elsewhere, no identity", file(unix,
			"envoy: {replicas: [{instance: a, address: 'unix:/e'}, {instance: b, address: '192.0.2.2:1'}]}\n"), "envoy.replicas[1].address"},
	} {
		_, err := Parse("x.yaml", []byte(c.text))
		if c.path == "" {
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		problems, _ := err.(Errors)
		if len(problems) != 1 || problems[0].Path != c.path {
			t.Errorf("%s: %v, want one problem at %s", c.name, err, c.path)
			continue
		}
		for _, way := range []string{"set identity", "unix:/path", "loopback address"} {
			if !strings.Contains(problems[0].Message, way) {
				t.Errorf("%s: %q does not name the way out %q", c.name, problems[0].Message, way)
			}
		}
	}
}

// TestIdentityNotes: knhk check says which role nobody has where it counts.
func TestIdentityNotes(t *testing.T) {
	const head = "origin: example.com/x\ninstance: a\nstate_dir: /x\nkeys: {identity: {uri: 'soft:k'}, daily: {uri: 'soft:k'}}\n"
	for _, c := range []struct {
		name, text string
		want       []string
	}{
		{"nobody", withIdentity + "listeners: {envoy: '127.0.0.1:1', admin: '127.0.0.1:2', tiles: '127.0.0.1:3'}\n",
			[]string{"nobody has role envoy", "nobody has role operator", "nobody has role auditor", "nobody has role peer"}},
		{"tiles are not served", withIdentity + "listeners: {envoy: '127.0.0.1:1', admin: '127.0.0.1:2'}\n" +
			"roles: {envoy: ['spiffe://x/y'], operator: ['spiffe://x/*']}\n", []string{"nobody has role auditor"}},
		{"users where there is TLS, IDs where there is none", withIdentity + "listeners: {envoy: 'unix:/e', admin: '127.0.0.1:2'}\n" +
			"roles: {envoy: ['spiffe://x/y'], operator: ['uid:7'], auditor: ['uid:7', 'spiffe://x/y']}\n", []string{
			"nobody has role envoy but root and the own user: listeners.envoy is a unix socket, where only uid:N counts",
			"nobody has role operator: listeners.admin has TLS, where only SPIFFE IDs count"}},
		{"sockets", "listeners: {envoy: 'unix:/e', admin: 'unix:/a'}\nroles: {envoy: ['uid:101'], operator: ['uid:7']}\n",
			[]string{"nobody has role auditor but root and the own user"}},
		{"everyone", "insecure_loopback: true\nlisteners: {envoy: '127.0.0.1:1', admin: '127.0.0.1:2'}\n",
			[]string{"insecure_loopback: every process of this machine may have receipts written and read them all: for development only"}},
		{"an Envoy that cannot prove who it is", withIdentity + "listeners: {envoy: '127.0.0.1:1', admin: 'unix:/a'}\n" +
			"roles: {envoy: ['spiffe://x/y'], operator: ['uid:7'], auditor: ['uid:7']}\nenvoy: {clusters: [{name: a, endpoints: ['127.0.0.1:3']}]}\n",
			[]string{"envoy.tls is not there: knhk bootstrap writes no Envoy that could prove to this knhk who it is"}},
		{"IDs that nobody vouches for", "identity: {spiffe_id: 'spiffe://x/knhk', files: {certificate: c, key: k, ca: a, federated: [{trust_domain: z, ca: z}]}}\n" +
			"listeners: {envoy: '127.0.0.1:1', admin: 'unix:/a'}\n" +
			"roles: {envoy: ['spiffe://x/y', 'spiffe://w/*', 'spiffe://z/y'], operator: ['uid:7'], auditor: ['uid:7']}\n",
			[]string{"nobody can be spiffe://w/*, of role envoy: identity.files.federated has no authority of w"}},
		{"rules about routes of another's configuration", "listeners: {envoy: 'unix:/e', admin: 'unix:/a'}\nroles: {envoy: ['uid:7'], operator: ['uid:7'], auditor: ['uid:7']}\n" +
			"routes: [{name: orders, prefix: /, cluster: a}]\nenvoy: {clusters: [{name: a, endpoints: ['127.0.0.1:3']}]}\n" +
			"authz_rules: [{name: r, routes: [orders, oders], effect: FORBID}]\n",
			[]string{"authz rule r is about route oders, which is not under routes: Envoy has to have one of that name"}},
		{"everyone, whatever the roles are", "insecure_loopback: true\nlisteners: {envoy: '127.0.0.1:1', admin: '127.0.0.1:2'}\nroles: {auditor: ['uid:7']}\n",
			[]string{"insecure_loopback: every process of this machine may have receipts written and read them all: for development only",
				"roles count on unix sockets only: insecure_loopback gives every role to whoever connects over TCP"}},
		{"upstreams elsewhere", "listeners: {envoy: 'unix:/e', admin: 'unix:/a'}\nroles: {envoy: ['uid:1'], operator: ['uid:7'], auditor: ['uid:7']}\n" +
			"envoy:\n  tls: {spiffe_id: 'spiffe://x/e', sds: 'unix:/s', clients: ['spiffe://x/c']}\n  clusters:\n" +
			"  - {name: near, endpoints: ['127.0.0.1:1', 'localhost:2', '[::1]:3']}\n  - {name: far, endpoints: ['127.0.0.1:1', '192.0.2.1:2']}\n" +
			"  - {name: named, endpoints: ['up.example:2']}\n  - {name: proven, endpoints: ['192.0.2.1:2'], spiffe_ids: ['spiffe://x/u']}\n",
			[]string{"envoy.clusters without spiffe_ids are spoken to in the plain, and whoever has their addresses is believed: far, named"}},
		{"parents that nobody can prove to be", "parents: ['spiffe://x/y']\nlisteners: {envoy: 'unix:/e', admin: 'unix:/a'}\n" +
			"roles: {envoy: ['uid:1'], operator: ['uid:7'], auditor: ['uid:7']}\n",
			[]string{"parents: the Envoy that `knhk bootstrap` writes removes knhk-parent, because without envoy.tls.clients nobody shows who he is"}},
	} {
		notes := parse(t, head+c.text).Notes()
		if !slices.Equal(notes[1:], c.want) { // the first is about software keys
			t.Errorf("%s: %q, want %q", c.name, notes[1:], c.want)
		}
	}
}
