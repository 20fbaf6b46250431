package config

import (
	"bufio"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/policy/beat"
	"github.com/knhk/sidecar/policy/class"
	"github.com/knhk/sidecar/server/access"
)

// minimal sets only what has no default.
const minimal = `origin: example.com/x
instance: a
state_dir: /x
listeners:
  envoy: unix:/run/e.sock
  admin: localhost:9090
insecure_loopback: true
keys:
  identity: {uri: soft:k}
  daily: {uri: soft:k}
`

func parse(t *testing.T, text string) *Config {
	t.Helper()
	c, err := Parse("knhk.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// documented is a default as config.proto states it, for one field of one message (ClassBeat: of r1 and w1 apart).
type documented struct{ message, field, value string }

var (
	defaultIn      = regexp.MustCompile(`[Dd]efault (?:and upper limit )?"?([^\s;,"]*)`)
	defaultOfClass = regexp.MustCompile(`(R1|W1): (?:default and upper limit (one cycle|[0-9a-z]+)|must be (0))`)
)

// documentedDefaults reads the comments of config.proto.
func documentedDefaults(t *testing.T) []documented {
	t.Helper()
	f, err := os.Open("../../api/knhk/config/v1/config.proto")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var found []documented
	message, comment := "", ""
	isMessage := regexp.MustCompile(`^message (\w+) \{`)
	isField := regexp.MustCompile(`^  (?:repeated )?[\w.]+ (\w+) = [0-9]+`)
	for lines := bufio.NewScanner(f); lines.Scan(); {
		line := lines.Text()
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "//"); ok {
			comment += rest
			continue
		}
		if m := isMessage.FindStringSubmatch(line); m != nil {
			message = m[1]
		}
		if m := isField.FindStringSubmatch(line); m != nil && message != "" && strings.Contains(strings.ToLower(comment), "default ") {
			if message == "ClassBeat" && m[1] != "capacity" {
				for _, c := range defaultOfClass.FindAllStringSubmatch(comment, -1) {
					value := strings.NewReplacer("one cycle", "128ms").Replace(c[2] + c[3])
					found = append(found, documented{"beat." + strings.ToLower(c[1]), m[1], value})
				}
			} else if d := defaultIn.FindStringSubmatch(comment); d != nil {
				found = append(found, documented{message, m[1], strings.TrimRight(d[1], ".")})
			} else {
				t.Errorf("cannot read the default in the comment of %s.%s: %s", message, m[1], comment)
			}
		}
		comment = ""
	}
	return found
}

// TestDefaults holds the comments of config.proto against what Load gives.
func TestDefaults(t *testing.T) {
	c := parse(t, strings.Replace(minimal, "insecure_loopback: true", "identity: {spiffe_id: 'spiffe://x/y', workload_api: 'unix:/s'}", 1)+
		"routes:\n- name: r\n")
	instances := make(map[string][]protoreflect.Message) // by name of the message, and by path
	var walk func(m protoreflect.Message, path string)
	walk = func(m protoreflect.Message, path string) {
		name := string(m.Descriptor().Name())
		instances[name] = append(instances[name], m)
		instances[path] = append(instances[path], m)
		m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
			switch p := join(path, f.TextName()); {
			case f.Message() == nil:
			case f.IsList():
				for i := range v.List().Len() {
					walk(v.List().Get(i).Message(), fmt.Sprintf("%s[%d]", p, i))
				}
			default:
				walk(v.Message(), p)
			}
			return true
		})
	}
	walk(c.Proto().ProtoReflect(), "")
	all := documentedDefaults(t)
	if len(all) < 28 {
		t.Errorf("only %d defaults found in the comments: %v", len(all), all)
	}
	for _, d := range all {
		if len(instances[d.message]) == 0 {
			t.Errorf("%s.%s: no such message in the effective configuration", d.message, d.field)
		}
		for _, m := range instances[d.message] {
			f := m.Descriptor().Fields().ByName(protoreflect.Name(d.field))
			if got := plain(m, f); got != normal(f, d.value) {
				t.Errorf("%s.%s is %s, documented is %s", d.message, d.field, got, d.value)
			}
		}
	}
}

// plain writes a field as a comment would.
func plain(m protoreflect.Message, f protoreflect.FieldDescriptor) string {
	v := m.Get(f)
	switch {
	case f.Message() != nil:
		if !m.Has(f) {
			return "unset"
		}
		return v.Message().Interface().(*durationpb.Duration).AsDuration().String()
	case f.Enum() != nil:
		return string(f.Enum().Values().ByNumber(v.Enum()).Name())
	}
	return v.String()
}

func normal(f protoreflect.FieldDescriptor, text string) string {
	if d, err := time.ParseDuration(text); err == nil && f.Message() != nil {
		return d.String()
	}
	return text
}

func TestLoadFull(t *testing.T) {
	c, err := Load("testdata/full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	believed, err := parents([]string{"spiffe://shop.example/envoy", "spiffe://shop.example/edge/*"})
	if err != nil {
		t.Fatal(err)
	}
	const ms = time.Millisecond
	const module = "?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source="
	want := Config{
		File: "testdata/full.yaml", Origin: "example.com/knhk/prod", Instance: "a-1", StateDir: "/var/lib/knhk",
		Listeners: Listeners{
			Envoy: Address{"unix", "/run/knhk/envoy.sock"}, Admin: Address{"tcp", "127.0.0.1:9090"}, Tiles: Address{"tcp", "[::1]:9091"},
			Probes: Address{"tcp", "0.0.0.0:9092"},
		},
		Keys: Keys{
			Identity:         Key{"pkcs11:token=knhk;object=identity" + module + "file:/etc/knhk/pin", keys.P256},
			Daily:            Key{"pkcs11:token=knhk;object=daily" + module + "env:KNHK_PIN", keys.P256},
			RotationInterval: 12 * time.Hour, AllowExportable: true,
		},
		Log: Log{2 * time.Second, 3 * time.Minute, 30 * time.Second, 30 * time.Minute, 32 << 20, 512 << 20},
		Beat: Beat{
			Cycle: 256 * ms, Tick: 32 * ms,
			R1: ClassBeat{1000, 0, 0, 20 * ms}, W1: ClassBeat{500, 100 * ms, 3, 200 * ms}, // 100 ms are three whole ticks of 32 ms
		},
		DefaultRoute: RoutePolicy{Class: policy.R1, AllowOnFailure: true, Exclude: true, Tenant: "shared"},
		Envoy: Envoy{
			Address{"tcp", "0.0.0.0:8080"}, Address{"tcp", "127.0.0.1:8081"}, configv1.Capture_FULL, configv1.Filter_EXT_PROC, false,
			3 * time.Second, 100 * ms, 5000, 10 * time.Minute,
		},
		DryRun: true, Parents: believed, Shutdown: Shutdown{time.Second, 20 * time.Second},
		Succeeds: Succeeds{Seal: "/var/lib/knhk/old.seal", Policy: "/var/lib/knhk/old.policy"},
	}
	partner, other := spiffeid.RequireTrustDomainFromString("partner.example"), spiffeid.RequireTrustDomainFromString("other.example")
	want.Identity = Identity{
		ID: spiffeid.RequireFromString("spiffe://example.com/knhk"), SVIDTTL: 30 * time.Minute,
		Files: &TLSFiles{
			"/etc/knhk/certificate.pem", "/etc/knhk/key.pem", "/etc/knhk/bundle.pem",
			map[spiffeid.TrustDomain]string{partner: "/etc/knhk/partner.pem", other: "/etc/knhk/other.pem"},
		},
	}
	want.Roles = map[access.Role][]access.Principal{
		access.Envoy:    {principal(t, "spiffe://example.com/envoy"), principal(t, "spiffe://example.com/edge/*"), principal(t, "uid:101")},
		access.Operator: {principal(t, "spiffe://example.com/ops/alice")}, access.Auditor: {principal(t, "spiffe://partner.example/auditor")},
		access.Peer: {principal(t, "spiffe://other.example/*")},
	}
	got := *c
	got.PolicyDigest, got.pb, got.routes = [16]byte{}, nil, nil
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if r := c.Route("orders"); *r != (RoutePolicy{Class: policy.W1, Tenant: "shop", ClassifyBody: true}) {
		t.Errorf("route orders: %+v", r)
	}
	if r := c.Route("no such route"); r != &c.DefaultRoute {
		t.Errorf("a route that is not listed: %+v", r)
	}
	if n := testing.AllocsPerRun(100, func() { c.Route("orders") }); n != 0 {
		t.Errorf("Route allocates %v times", n)
	}
	if _, ok := c.Beat.Of(policy.ClassUnknown); ok {
		t.Error("the unknown class has a beat")
	}
	if b, ok := c.Beat.Of(policy.R1); !ok || b.Capacity != 1000 {
		t.Errorf("beat of R1: %+v", b)
	}
	// What the other packages are given is what they accept.
	if _, err := class.New(c.Classes()); err != nil {
		t.Error(err)
	}
	if _, err := beat.New(c.Credits()); err != nil {
		t.Error(err)
	}
	if cl := c.Classes(); len(cl.Rules) != 2 || cl.Rules[0].Class != policy.R1 || !cl.Routes["orders"].ClassifyBody || len(cl.Routes) != 2 {
		t.Errorf("classes: %+v", cl)
	}
}

func TestLocalhost(t *testing.T) {
	c := parse(t, minimal)
	if c.Listeners.Admin != (Address{"tcp", "127.0.0.1:9090"}) || c.Proto().GetListeners().GetAdmin() != "127.0.0.1:9090" {
		t.Errorf("localhost is %v", c.Listeners.Admin)
	}
	if !c.Listeners.Tiles.IsZero() {
		t.Errorf("tiles are served on %v, though nobody asked", c.Listeners.Tiles)
	}
}

func TestPolicyDigest(t *testing.T) {
	base := parse(t, minimal)
	for _, c := range []struct {
		name, add string
		same      bool
	}{
		{"nothing", "", true},
		{"a default written out", "beat: {cycle: 128ms, w1: {capacity: 4096}}\ndefault_route: {class: W1}\n", true},
		{"what is no policy", "log: {seal_every: 2s}\nshutdown: {drain: 1s}\nenvoy: {capture: FULL}\n", true},
		{"capacity", "beat: {w1: {capacity: 4095}}\n", false},
		{"a rule", "class_rules: [{name: a, when: 'true', class: R1}]\n", false},
		{"an authorisation rule", "authz_rules: [{name: a, effect: PERMIT}]\n", false},
		{"the default route", "default_route: {tenant: x}\n", false},
		{"a route", "routes: [{name: a}]\n", false},
		{"dry_run", "dry_run: true\n", false},
	} {
		got := parse(t, minimal+c.add).PolicyDigest
		if same := got == base.PolicyDigest; same != c.same {
			t.Errorf("%s: same digest is %v, want %v", c.name, same, c.same)
		}
	}
	// Records refer to digests: this one may only change with a reason that the CHANGELOG tells.
	if got := fmt.Sprintf("%x", base.PolicyDigest); got != "1d21cf514696046fa26bba7ca6134fec" {
		t.Errorf("digest of the default policy is %s", got)
	}
}

// reloadable is the complement of immutable: a new setting has to be put into one of the two.
var reloadable = []string{
	"beat.r1", "beat.w1", "class_rules", "authz_rules", "parents", "default_route", "routes", "envoy.listener", "envoy.admin", "envoy.clusters",
	"envoy.message_timeout", "envoy.access_log_flush", "envoy.max_requests", "envoy.max_connection_duration", "envoy.replicas", "envoy.tls",
	"envoy.filter", "envoy.shadow_mode",
	"dry_run", "shutdown", "roles",
}

func TestEverySettingIsImmutableOrReloadable(t *testing.T) {
	fieldPaths((&configv1.Config{}).ProtoReflect().Descriptor(), "", func(path string, f protoreflect.FieldDescriptor) {
		if path == "beat" || path == "envoy" { // their parts differ
			return
		}
		in := slices.ContainsFunc(reloadable, func(p string) bool {
			return path == p || strings.HasPrefix(path, p+".") || strings.HasPrefix(path, p+"[")
		})
		if in == isImmutable(path) {
			t.Errorf("%s: reloadable %v, immutable %v", path, in, isImmutable(path))
		}
	})
}

func TestChanges(t *testing.T) {
	full, err := os.ReadFile("testdata/full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	before := parse(t, string(full))
	for _, c := range []struct {
		at, to string
		want   []string
	}{
		{"origin", "example.com/knhk/other", []string{"origin"}},
		{"listeners.tiles", "", []string{"listeners.tiles"}},
		{"identity.svid_ttl", "29m", []string{"identity.svid_ttl"}},
		{"identity.files.federated", "[]", []string{"identity.files.federated"}},
		{"roles", "{}", nil},
		{"roles.envoy", "[]", nil},
		{"keys.daily.algorithm", "ED25519", []string{"keys.daily.algorithm"}},
		{"keys.rotation_interval", "6h", []string{"keys.rotation_interval"}},
		{"keys.allow_exportable", "false", []string{"keys.allow_exportable"}},
		{"succeeds.seal", "/other", []string{"succeeds.seal"}},
		{"log", "{seal_every: 3s}", []string{"log.heartbeat", "log.max_unsigned", "log.outcome_timeout", "log.seal_every",
			"log.wal_max_mib", "log.wal_segment_mib"}}, // those left out go back to their defaults
		{"beat.cycle", "512ms", []string{"beat.cycle"}}, // tick numbers count this clock
		{"beat.w1.capacity", "501", nil},
		{"class_rules", "[]", nil},
		{"authz_rules", "[]", nil},
		{"routes", "[]", nil},
		{"dry_run", "false", nil},
		{"instance", "a-1 # the same", nil},
	} {
		text, _, _ := edit(t, string(full), c.at, c.to)
		if got := Changes(before, parse(t, text)); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.at, got, c.want)
		}
	}
}

func TestParseAddress(t *testing.T) {
	for _, c := range []struct {
		in, network, addr string // no network: refused
		loopback          bool
	}{
		{"127.0.0.1:80", "tcp", "127.0.0.1:80", true},
		{"127.9.9.9:0", "tcp", "127.9.9.9:0", true}, // all of 127/8; port 0 is for tests
		{"[::1]:80", "tcp", "[::1]:80", true},
		{"[::ffff:127.0.0.1]:80", "tcp", "[::ffff:127.0.0.1]:80", true},
		{"0.0.0.0:80", "tcp", "0.0.0.0:80", false},
		{"[::]:80", "tcp", "[::]:80", false},
		{"10.0.0.1:80", "tcp", "10.0.0.1:80", false},
		{"[fe80::1%eth0]:80", "tcp", "[fe80::1%eth0]:80", false},
		{"unix:/run/x.sock", "unix", "/run/x.sock", true},
		{in: "unix:x.sock"}, {in: "unix:"}, {in: "unix:/"}, {in: "unix:/run/"}, {in: "unix:/" + strings.Repeat("x", 107)},
		{in: "unix:/a\x00b"}, {in: "unix://"},
		{in: "80"}, {in: ":80"}, {in: "::1:80"}, {in: "127.0.0.1"}, {in: "127.0.0.1:"}, {in: "127.0.0.1:http"}, {in: "127.0.0.1:65536"},
		{in: "127.0.0.1:+80"}, {in: "127.0.0.1:080"}, {in: "127.1:80"}, {in: "example.com:80"}, {in: "tcp://127.0.0.1:80"}, {in: ""},
	} {
		a, err := parseAddress(c.in)
		if a.Network != c.network || a.Address != c.addr || (err == nil) != (c.network != "") {
			t.Errorf("%q: %+v, %v", c.in, a, err)
		}
		if err == nil && (a.loopback() != c.loopback || a.String() != c.in) {
			t.Errorf("%q: loopback %v, written %s", c.in, a.loopback(), a)
		}
	}
}

func TestOverlaps(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"127.0.0.1:80", "127.0.0.1:80", true},
		{"127.0.0.1:80", "127.0.0.1:81", false},
		{"127.0.0.1:80", "127.0.0.2:80", false},
		{"127.0.0.1:80", "0.0.0.0:80", true},
		{"[::]:80", "127.0.0.1:80", true}, // Linux binds both families
		{"127.0.0.1:0", "127.0.0.1:0", false},
		{"unix:/a", "unix:/b/../a", true},
		{"unix:/a", "unix:/b", false},
		{"unix:/a", "127.0.0.1:80", false},
	} {
		a, errA := parseAddress(c.a)
		b, errB := parseAddress(c.b)
		if errA != nil || errB != nil || a.overlaps(b) != c.want || b.overlaps(a) != c.want {
			t.Errorf("%s and %s: overlaps is %v, want %v", c.a, c.b, a.overlaps(b), c.want)
		}
	}
}

// TestRulePositions: the fault is the name "nope" or "nöpe", and the position is where the file has it.
func TestRulePositions(t *testing.T) {
	for name, rule := range map[string]string{
		"plain":                    "when: path == 'a' && nope",
		"single quotes":            "when: 'path == ''a'' && nope'",
		"double quotes":            `when: "path == \"a\\u00e9\" && nope"`,
		"double quotes, escapes":   `when: "path == '\x41\u00e9\U0001F600' &&\tnope"`,
		"literal":                  "when: |\n    path == 'a' &&\n      nope",
		"literal, stripped":        "when: |-\n    path == 'a' && nope\n",
		"literal, indent told":     "when: |2\n    path == 'a' && nope\n",
		"folded":                   "when: >\n    path == 'a' &&\n    nope\n",
		"folded with a blank line": "when: >-\n    path == 'a'\n\n    &&\n\n    nope\n",
		"plain over two lines":     "when: path == 'a'\n    && nope",
		"quoted over two lines":    "when: \"path == 'a'\n    && nope\"",
		"behind wide characters":   "when: path == 'äöü😀' && nope",
		"beside a comment":         "when: path == 'a' && nope # nope",
		"CRLF":                     "when: |\r\n    path == 'a' &&\r\n    nope\r",
		"in a flow mapping":        "{when: \"path == 'a' && nope\", class: R1}",
	} {
		text := minimal + "class_rules:\n- name: a\n  class: W1\n  " + rule + "\n"
		if strings.HasPrefix(rule, "{") {
			text = minimal + "class_rules:\n- " + rule + "\n"
		}
		_, err := Parse("x.yaml", []byte(text))
		problems, _ := err.(Errors)
		if i := slices.IndexFunc(problems, func(p Problem) bool { return strings.Contains(p.Message, "reference to 'nope'") }); i < 0 {
			t.Errorf("%s: %v", name, err)
		} else {
			lines := strings.Split(text, "\n")
			p := problems[i]
			if got := string([]rune(lines[p.Line-1])[p.Column-1:]); !strings.HasPrefix(got, "nope") {
				t.Errorf("%s: points at %q\n%v", name, got, p)
			}
		}
	}
}
