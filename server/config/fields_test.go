package config

import (
	"os"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/protobuf/reflect/protoreflect"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
)

// bend is a change of full.yaml that must be refused.
type bend struct {
	at   string // path in full.yaml of the setting that is changed
	to   string // its new value as written in YAML; "" takes the setting out of the file
	want string // part of the message
	path string // path of the problem when it is not at
}

const (
	notDuration = "missing unit"
	notUint     = "is not a whole number"
	notBool     = "is not true or false"
	notMapping  = "want a mapping"
	required    = "is required"
)

// fieldCase is what TestFields knows about one field of config.proto.
type fieldCase struct {
	bends []bend
	legal string // why every value of the right type is legal; then bends only holds wrong types
}

func bends(b ...bend) fieldCase { return fieldCase{bends: b} }

const eitherLegal = "a switch: both positions are legal by themselves"

// fieldCases has a case for every field there is, by the path of the field with [] for list items.
var fieldCases = map[string]fieldCase{
	"origin":    bends(bend{at: "origin", want: required}, bend{at: "origin", to: "https://example.com", want: "pattern"}),
	"instance":  bends(bend{at: "instance", want: required}, bend{at: "instance", to: "A.1", want: "pattern"}),
	"state_dir": bends(bend{at: "state_dir", want: required}, bend{at: "state_dir", to: `"/var\0"`, want: "NUL"}),

	"listeners": bends(bend{at: "listeners", want: required}, bend{at: "listeners", to: "5", want: notMapping}),
	"listeners.envoy": bends(bend{at: "listeners.envoy", want: required},
		bend{at: "listeners.envoy", to: "example.com:9000", want: "not an IP address"},
		bend{at: "listeners.envoy", to: "unix:run/x", want: "not absolute"}),
	"listeners.admin": bends(bend{at: "listeners.admin", want: required},
		bend{at: "listeners.admin", to: "9090", want: "missing port"},
		bend{at: "listeners.admin", to: "unix:/run/knhk/envoy.sock", want: "taken by listeners.envoy"}),
	"listeners.tiles": bends(bend{at: "listeners.tiles", to: ":9091", want: "not an IP address"}),
	"listeners.probes": bends(bend{at: "listeners.probes", to: "probes:80", want: "not an IP address"},
		bend{at: "listeners.probes", to: "0.0.0.0:9090", want: "taken by listeners.admin"}),

	"identity": bends(bend{at: "identity", to: "spiffe://example.com/knhk", want: notMapping},
		bend{at: "identity", to: "{spiffe_id: 'spiffe://example.com/knhk'}", want: "give workload_api or files"}),
	"identity.spiffe_id": bends(bend{at: "identity.spiffe_id", want: required},
		bend{at: "identity.spiffe_id", to: "knhk", want: "is no SPIFFE ID"},
		bend{at: "identity.spiffe_id", to: "spiffe://example.com", want: "names a trust domain"},
		bend{at: "identity.spiffe_id", to: "spiffe://example.com/*", want: "is no SPIFFE ID"}),
	"identity.workload_api": bends(
		bend{at: "identity.svid_ttl", to: "30m\n  workload_api: unix:/run/spire/agent.sock", want: "one of the two", path: "identity.files"},
		bend{at: "identity.files", to: "null\n  workload_api: tcp://127.0.0.1:1", want: "want unix:/path", path: "identity.workload_api"}),
	"identity.files":             bends(bend{at: "identity.files", to: "/etc/knhk", want: notMapping}),
	"identity.files.certificate": bends(bend{at: "identity.files.certificate", want: required}),
	"identity.files.key":         bends(bend{at: "identity.files.key", want: required}),
	"identity.files.ca":          bends(bend{at: "identity.files.ca", want: required}),
	"identity.files.federated":   bends(bend{at: "identity.files.federated", to: "partner.example", want: "want a list"}),
	"identity.files.federated[].trust_domain": bends(bend{at: "identity.files.federated[0].trust_domain", want: required},
		bend{at: "identity.files.federated[0].trust_domain", to: "Partner!", want: "not the name of a trust domain"},
		bend{at: "identity.files.federated[0].trust_domain", to: "spiffe://partner.example", want: "not the name of a trust domain"},
		bend{at: "identity.files.federated[0].trust_domain", to: "example.com", want: "is the own trust domain"},
		bend{at: "identity.files.federated[1].trust_domain", to: "partner.example", want: "taken by identity.files.federated[0]"}),
	"identity.files.federated[].ca": bends(bend{at: "identity.files.federated[0].ca", want: required}),
	"identity.svid_ttl":             bends(bend{at: "identity.svid_ttl", to: "2s", want: "3s"}, bend{at: "identity.svid_ttl", to: "721h", want: "2592000s"}),

	"roles": bends(bend{at: "roles", to: "[]", want: notMapping}),
	"roles.envoy": bends(bend{at: "roles.envoy", to: "spiffe://example.com/envoy", want: "want a list"},
		bend{at: "roles.envoy", to: "['spiffe://example.com/*/envoy']", want: "may only stand at the end", path: "roles.envoy[0]"},
		bend{at: "roles.envoy", to: "['spiffe://example.com/envoy', 'spiffe://example.com']", want: "names a trust domain", path: "roles.envoy[1]"}),
	"roles.operator": bends(bend{at: "roles.operator", to: "['uid:root']", want: "is no user", path: "roles.operator[0]"},
		bend{at: "roles.operator", to: "['uid:4294967295']", want: "is no user", path: "roles.operator[0]"}),
	"roles.auditor": bends(bend{at: "roles.auditor", to: "['*']", want: "want spiffe://", path: "roles.auditor[0]"},
		bend{at: "roles.auditor", to: "['']", want: "want spiffe://", path: "roles.auditor[0]"}),
	"roles.peer": bends(bend{at: "roles.peer", to: "['uid:007']", want: "is no user", path: "roles.peer[0]"},
		bend{at: "roles.peer", to: "['SPIFFE://example.com/x']", want: "want spiffe://", path: "roles.peer[0]"}),

	"insecure_loopback": bends(bend{at: "dry_run", to: "true\ninsecure_loopback: true", want: "cannot stand beside identity", path: "insecure_loopback"},
		bend{at: "dry_run", to: "true\ninsecure_loopback: 1", want: notBool, path: "insecure_loopback"}),

	"keys": bends(bend{at: "keys", want: required}, bend{at: "keys", to: "[]", want: notMapping}),
	"keys.identity": bends(bend{at: "keys.identity", want: required},
		bend{at: "keys.identity", to: "soft:x", want: notMapping}),
	"keys.identity.uri": bends(bend{at: "keys.identity.uri", want: required},
		bend{at: "keys.identity.uri", to: "file:/key", want: "soft:"}),
	"keys.identity.algorithm": bends(bend{at: "keys.identity.algorithm", to: "RSA", want: "want ED25519 or P256"},
		bend{at: "keys.identity.algorithm", to: "2", want: "want ED25519 or P256"}),
	"keys.daily": bends(bend{at: "keys.daily", want: required}, bend{at: "keys.daily", to: "x", want: notMapping}),
	"keys.daily.uri": bends(bend{at: "keys.daily.uri", want: required},
		bend{at: "keys.daily.uri", to: "pkcs11:token=t", want: "missing"},
		bend{at: "keys.daily.uri", to: "pkcs11:token=knhk;object=identity?module-path=/usr/lib/softhsm/libsofthsm2.so" +
			"&pin-source=file:/etc/knhk/pin", want: "same key"}),
	"keys.daily.algorithm": bends(bend{at: "keys.daily.algorithm", to: "ed25519", want: "want ED25519 or P256"}),
	"keys.rotation_interval": bends(bend{at: "keys.rotation_interval", to: "25h", want: "86400s"},
		bend{at: "keys.rotation_interval", to: "0s", want: "greater than 0s"},
		bend{at: "keys.rotation_interval", to: "-1h", want: "greater than 0s"}),
	"keys.allow_exportable": {bends(bend{at: "keys.allow_exportable", to: "yes", want: notBool}).bends, eitherLegal},

	"log": bends(bend{at: "log", to: "true", want: notMapping}),
	"log.seal_every": bends(bend{at: "log.seal_every", to: "99ms", want: "0.1"},
		bend{at: "log.seal_every", to: "61s", want: "60s"},
		bend{at: "log.seal_every", to: "5", want: notDuration}),
	"log.max_unsigned": bends(bend{at: "log.max_unsigned", to: "999ms", want: "1s"},
		bend{at: "log.max_unsigned", to: "61m", want: "3600s"},
		bend{at: "log.max_unsigned", to: "1s", want: "less than log.seal_every"}),
	"log.heartbeat": bends(bend{at: "log.heartbeat", to: "61m", want: "3600s"},
		bend{at: "log.heartbeat", to: "1s", want: "less than log.seal_every"}),
	"log.outcome_timeout": bends(bend{at: "log.outcome_timeout", to: "8d", want: "unknown unit"},
		bend{at: "log.outcome_timeout", to: "169h", want: "604800s"},
		bend{at: "log.outcome_timeout", to: "5s", want: "more than log.outcome_timeout", path: "routes[0].timeout"}),
	"log.wal_segment_mib": bends(bend{at: "log.wal_segment_mib", to: "1025", want: "1024"},
		bend{at: "log.wal_segment_mib", to: "0", want: "at least 1"},
		bend{at: "log.wal_segment_mib", to: "64MiB", want: notUint}),
	"log.wal_max_mib": bends(bend{at: "log.wal_max_mib", to: "95", want: "three segments"},
		bend{at: "log.wal_max_mib", to: "00", want: "at least 1"},
		bend{at: "log.wal_max_mib", to: "3073", want: "3072"}),

	"beat": bends(bend{at: "beat", to: "[]", want: notMapping}),
	"beat.cycle": bends(bend{at: "beat.cycle", to: "7ms", want: "0.008"}, bend{at: "beat.cycle", to: "9s", want: "8s"},
		bend{at: "beat.cycle", to: "80ms", want: "more than one cycle", path: "beat.w1.max_wait"}),
	"beat.r1": bends(bend{at: "beat.r1", to: "4096", want: notMapping}),
	"beat.r1.capacity": bends(bend{at: "beat.r1.capacity", to: "0", want: "at least 1"},
		bend{at: "beat.r1.capacity", to: "1000001", want: "1000000"}),
	"beat.r1.max_wait": bends(bend{at: "beat.r1.max_wait", to: "1ns", want: "never waits"},
		bend{at: "beat.r1.max_wait", to: "-1s", want: "0s"}),
	"beat.r1.commit_timeout": bends(bend{at: "beat.r1.commit_timeout", to: "51ms", want: "not loosened"},
		bend{at: "beat.r1.commit_timeout", to: "0s", want: "more than 0s"}),
	"beat.w1": bends(bend{at: "beat.w1", to: "''", want: notMapping}),
	"beat.w1.capacity": bends(bend{at: "beat.w1.capacity", to: "-1", want: notUint},
		bend{at: "beat.w1.capacity", to: "1e3", want: notUint}),
	"beat.w1.max_wait": bends(bend{at: "beat.w1.max_wait", to: "257ms", want: "more than one cycle"}),
	"beat.w1.commit_timeout": bends(bend{at: "beat.w1.commit_timeout", to: "501ms", want: "not loosened"},
		bend{at: "beat.w1.commit_timeout", to: "null", want: "has no value"}),

	"class_rules": bends(bend{at: "class_rules", to: "{}", want: "want a list"}),
	"class_rules[].name": bends(bend{at: "class_rules[0].name", to: "a b", want: "pattern"},
		bend{at: "class_rules[1].name", to: "static", want: "taken by class_rules[0]"}),
	"class_rules[].when": bends(bend{at: "class_rules[0].when", want: required, path: "class_rules[0].when"},
		bend{at: "class_rules[0].when", to: "path.size()", want: "want bool"},
		bend{at: "class_rules[1].when", to: "spiffe == ''", want: "undeclared reference to 'spiffe'"}),
	"class_rules[].class": bends(bend{at: "class_rules[0].class", want: required},
		bend{at: "class_rules[0].class", to: "C1", want: "want R1 or W1"}),

	"authz_rules": bends(bend{at: "authz_rules", to: "{}", want: "want a list"}),
	"authz_rules[].name": bends(bend{at: "authz_rules[0].name", to: "a:b", want: "pattern"},
		bend{at: "authz_rules[0].name", to: "''", want: "pattern"},
		bend{at: "authz_rules[1].name", to: "no-debug", want: "taken by authz_rules[0]"}),
	"authz_rules[].hosts": bends(bend{at: "authz_rules[0].hosts", to: "a", want: "want a list"},
		bend{at: "authz_rules[0].hosts", to: "[a, '*']", want: "leave hosts out", path: "authz_rules[0].hosts[1]"},
		bend{at: "authz_rules[0].hosts", to: "['a:80']", want: "leave the port out", path: "authz_rules[0].hosts[0]"}),
	"authz_rules[].routes": bends(bend{at: "authz_rules[0].routes", to: "['']", want: "is empty", path: "authz_rules[0].routes[0]"},
		bend{at: "authz_rules[0].routes", to: "{}", want: "want a list"}),
	"authz_rules[].methods": bends(bend{at: "authz_rules[0].methods", to: "[get]", want: "want GET", path: "authz_rules[0].methods[0]"},
		bend{at: "authz_rules[0].methods", to: "['G T']", want: "no method", path: "authz_rules[0].methods[0]"}),
	"authz_rules[].when": bends(bend{at: "authz_rules[0].when", to: "path.size()", want: "want bool"},
		bend{at: "authz_rules[1].when", to: "time.getHours('Europe/Berlin') < 8", want: "offset"},
		bend{at: "authz_rules[1].when", to: strings.Repeat("x", 4097), want: "4096"},
		bend{at: "authz_rules[1].when", to: "heat > 'a'", want: "no matching overload"}),
	"authz_rules[].effect": bends(bend{at: "authz_rules[0].effect", want: required},
		bend{at: "authz_rules[1].effect", to: "ALLOW", want: "want PERMIT or FORBID"}),

	"default_route":                    bends(bend{at: "default_route", to: "W1", want: notMapping}),
	"default_route.class":              bends(bend{at: "default_route.class", to: "r1", want: "want R1 or W1"}),
	"default_route.on_receipt_failure": bends(bend{at: "default_route.on_receipt_failure", to: "allow", want: "want DENY or ALLOW"}),
	"default_route.exclude":            {bends(bend{at: "default_route.exclude", to: "yes", want: notBool}).bends, eitherLegal},
	"default_route.tenant":             bends(bend{at: "default_route.tenant", to: strings.Repeat("x", 65), want: "64 characters"}),
	"default_route.classify_body": bends(bend{at: "default_route.tenant", to: "x\n  classify_body: true",
		want: "cannot stand beside exclude",
		path: "default_route.classify_body"}),

	"routes": bends(bend{at: "routes", to: "orders", want: "want a list"},
		bend{at: "routes", to: "[orders]", want: notMapping, path: "routes[0]"}),
	"routes[].name": bends(bend{at: "routes[0].name", to: "''", want: "pattern"},
		bend{at: "routes[1].name", to: "orders", want: "taken by routes[0]"}),
	"routes[].policy":       bends(bend{at: "routes[0].policy", to: "R1", want: notMapping}),
	"routes[].policy.class": bends(bend{at: "routes[1].policy.class", to: "hot", want: "want R1 or W1"}),
	"routes[].policy.on_receipt_failure": bends(bend{at: "routes[0].policy.on_receipt_failure", to: "true",
		want: "want DENY or ALLOW"}),
	"routes[].policy.exclude": {bends(bend{at: "routes[0].policy.tenant", to: "x\n      exclude: 1", want: notBool,
		path: "routes[0].policy.exclude"}).bends, eitherLegal},
	"routes[].policy.tenant": bends(bend{at: "routes[0].policy.tenant", to: strings.Repeat("é", 65), want: "64 characters"}),
	"routes[].policy.classify_body": bends(bend{at: "routes[0].policy.tenant", to: "x\n      exclude: true",
		want: "cannot stand beside exclude",
		path: "routes[0].policy.classify_body"}),
	"routes[].prefix": bends(bend{at: "routes[0].prefix", to: "orders", want: "pattern"},
		bend{at: "routes[1].prefix", to: "/orders", want: "never reach"}),
	"routes[].cluster": bends(bend{at: "routes[0].cluster", to: "order", want: "not the name of one of envoy.clusters"}),
	"routes[].timeout": bends(bend{at: "routes[0].timeout", to: "-1s", want: "0s"},
		bend{at: "routes[0].timeout", to: "31m", want: "more than log.outcome_timeout"}),
	"routes[].retries": bends(bend{at: "routes[0].retries", to: "11", want: "10"},
		bend{at: "routes[0].retries", to: "'2'", want: notUint}),
	"routes[].websocket": {bends(bend{at: "routes[1].websocket", to: "0", want: notBool},
		bend{at: "routes[0].retries", to: "2\n    websocket: true", want: "cannot stand beside policy.classify_body",
			path: "routes[0].websocket"}).bends,
		eitherLegal + ", except beside classify_body"},
	"routes[].internal_redirects": bends(bend{at: "routes[0].internal_redirects", to: "11", want: "10"}),

	"envoy": bends(bend{at: "envoy", to: "0", want: notMapping}),
	"envoy.listener": bends(bend{at: "envoy.listener", to: "0.0.0.0:0", want: "name a port"},
		bend{at: "envoy.listener", to: "unix:/x", want: "want host:port"},
		bend{at: "envoy.listener", to: "0.0.0.0:8081", want: "taken", path: "envoy.admin"}),
	"envoy.admin": bends(bend{at: "envoy.admin", to: "0.0.0.0:9901", want: "asks nobody who he is"},
		bend{at: "envoy.admin", to: "127.0.0.1:99999", want: "0 to 65535"}),
	"envoy.clusters": bends(bend{at: "envoy.clusters", to: "x", want: "want a list"}),
	"envoy.clusters[].name": bends(bend{at: "envoy.clusters[1].name", to: "orders", want: "taken by"},
		bend{at: "envoy.clusters[0].name", to: "/", want: "pattern"}),
	"envoy.clusters[].endpoints": bends(bend{at: "envoy.clusters[0].endpoints", to: "[]", want: "at least 1"},
		bend{at: "envoy.clusters[0].endpoints", want: required},
		bend{at: "envoy.clusters[0].endpoints", to: "['a:1', 'b']", want: "missing port", path: "envoy.clusters[0].endpoints[1]"},
		bend{at: "envoy.clusters[0].endpoints", to: "[':1']", want: "not a host", path: "envoy.clusters[0].endpoints[0]"},
		bend{at: "envoy.clusters[0].endpoints", to: "['a:0']", want: "port 0", path: "envoy.clusters[0].endpoints[0]"}),
	"envoy.clusters[].http2": {bends(bend{at: "envoy.clusters[0].http2", to: "h2", want: notBool}).bends, eitherLegal},
	"envoy.clusters[].spiffe_ids": bends(bend{at: "envoy.clusters[1].spiffe_ids", to: "spiffe://example.com/live", want: "want a list"},
		bend{at: "envoy.clusters[1].spiffe_ids", to: "['*']", want: "spiffe id", path: "envoy.clusters[1].spiffe_ids[0]"},
		bend{at: "envoy.clusters[1].spiffe_ids", to: "['spiffe://unknown.example/x']", want: "no authorities",
			path: "envoy.clusters[1].spiffe_ids[0]"},
		bend{at: "envoy.tls", want: "needs envoy.tls", path: "envoy.clusters[1].spiffe_ids"}),
	"envoy.clusters[].send_parent": bends(bend{at: "envoy.clusters[1].send_parent", to: "knhk-parent", want: notBool},
		bend{at: "envoy.clusters[1].spiffe_ids", want: "needs spiffe_ids", path: "envoy.clusters[1].send_parent"}),
	"envoy.tls": bends(bend{at: "envoy.tls", to: "true", want: notMapping},
		bend{at: "envoy.tls", to: "{spiffe_id: 'spiffe://example.com/envoy'}", want: "give sds or files"}),
	"envoy.tls.spiffe_id": bends(bend{at: "envoy.tls.spiffe_id", want: required},
		bend{at: "envoy.tls.spiffe_id", to: "envoy", want: "is no SPIFFE ID"},
		bend{at: "envoy.tls.spiffe_id", to: "spiffe://example.com/edge/*", want: "is no SPIFFE ID"},
		bend{at: "envoy.tls.spiffe_id", to: "spiffe://example.com", want: "names a trust domain"}),
	"envoy.tls.sds": bends(
		bend{at: "envoy.tls.spiffe_id", to: "spiffe://example.com/envoy\n    sds: unix:/run/spire/agent.sock", want: "one of the two", path: "envoy.tls.sds"},
		bend{at: "envoy.tls.files", to: "null\n    sds: 127.0.0.1:1", want: "want unix:/path", path: "envoy.tls.sds"}),
	"envoy.tls.files":             bends(bend{at: "envoy.tls.files", to: "/etc/envoy", want: notMapping}),
	"envoy.tls.files.certificate": bends(bend{at: "envoy.tls.files.certificate", want: required}),
	"envoy.tls.files.key":         bends(bend{at: "envoy.tls.files.key", want: required}),
	"envoy.tls.files.ca":          bends(bend{at: "envoy.tls.files.ca", want: required}),
	"envoy.tls.files.federated": bends(bend{at: "envoy.tls.files.federated", to: "partner.example", want: "want a list"},
		bend{at: "envoy.tls.files.federated", want: "no authorities of trust domain partner.example", path: "envoy.tls.clients[1]"}),
	"envoy.tls.files.federated[].trust_domain": bends(bend{at: "envoy.tls.files.federated[0].trust_domain", want: required},
		bend{at: "envoy.tls.files.federated[0].trust_domain", to: "Partner!", want: "not the name of a trust domain"},
		bend{at: "envoy.tls.files.federated[1].trust_domain", to: "partner.example", want: "taken by envoy.tls.files.federated[0]"}),
	"envoy.tls.files.federated[].ca": bends(bend{at: "envoy.tls.files.federated[0].ca", want: required}),
	"envoy.tls.clients": bends(bend{at: "envoy.tls.clients", to: "'*'", want: "want a list"},
		bend{at: "envoy.tls.clients", to: "['spiffe://example.com/*/x']", want: "may only stand at the end", path: "envoy.tls.clients[0]"},
		bend{at: "envoy.tls.clients", to: "['spiffe://unknown.example/x']", want: "no authorities", path: "envoy.tls.clients[0]"},
		bend{at: "envoy.tls.clients", want: "it is plain HTTP", path: "envoy.listener"}),
	"envoy.replicas": bends(bend{at: "envoy.replicas", to: "x", want: "want a list"},
		bend{at: "envoy.replicas[0].instance", to: "c", want: "lacks this replica", path: "envoy.replicas"}),
	"envoy.replicas[].instance": bends(bend{at: "envoy.replicas[0].instance", to: "A", want: "pattern"},
		bend{at: "envoy.replicas[1].instance", to: "a-1", want: "taken by envoy.replicas[0]"}),
	"envoy.replicas[].address": bends(bend{at: "envoy.replicas[1].address", want: required},
		bend{at: "envoy.replicas[1].address", to: "b:1", want: "not an IP address"},
		bend{at: "envoy.replicas[1].address", to: "127.0.0.1:0", want: "port 0"},
		bend{at: "envoy.replicas[0].address", to: "unix:/run/other.sock", want: "is not listeners.envoy"},
		bend{at: "envoy.replicas[1].address", to: "unix:/run/knhk/envoy.sock", want: "is the address of envoy.replicas[0] too"}),
	"envoy.capture": bends(bend{at: "envoy.capture", to: "OBSERVE", want: "want LEAN or FULL"}),
	"envoy.message_timeout": bends(bend{at: "envoy.message_timeout", to: "300ms",
		want: "does not exceed beat.w1.max_wait plus commit_timeout"},
		bend{at: "envoy.message_timeout", to: "61s", want: "60s"}),
	"envoy.access_log_flush": bends(bend{at: "envoy.access_log_flush", to: "9ms", want: "0.01"},
		bend{at: "envoy.access_log_flush", to: "11s", want: "10s"}),
	"envoy.max_requests": bends(bend{at: "envoy.max_requests", to: "0", want: "at least 1"},
		bend{at: "envoy.max_requests", to: "10000001", want: "10000000"}),
	"envoy.max_connection_duration": bends(bend{at: "envoy.max_connection_duration", to: "0s", want: "1s"},
		bend{at: "envoy.max_connection_duration", to: "25h", want: "86400s"}),

	"envoy.filter": bends(bend{at: "envoy.filter", to: "ext_authz", want: "want EXT_PROC or EXT_AUTHZ or BOTH"},
		bend{at: "envoy.filter", to: "EXT_AUTHZ", want: "needs envoy.filter EXT_PROC or BOTH", path: "envoy.capture"},
		bend{at: "envoy.filter", to: "BOTH", want: `route "orders" says DENY, default_route says ALLOW`,
			path: "routes[0].policy.on_receipt_failure"}),
	"envoy.shadow_mode": bends(bend{at: "envoy.shadow_mode", to: "yes", want: notBool},
		bend{at: "envoy.shadow_mode", to: "true", want: "needs envoy.filter EXT_AUTHZ"}),

	"parents": bends(bend{at: "parents", to: "spiffe://a/b", want: "want a list"},
		bend{at: "parents", to: "[shop.example/envoy]", want: "scheme", path: "parents[0]"},
		bend{at: "parents", to: "['spiffe://*/envoy']", want: "may only stand at the end", path: "parents[0]"},
		bend{at: "parents", to: "['spiffe://shop.example']", want: "names a trust domain", path: "parents[0]"},
		bend{at: "parents", to: "['spiffe://a/b', 'spiffe://a/b']", want: "stands in parents[0]", path: "parents[1]"}),

	"succeeds":        bends(bend{at: "succeeds", to: "/old", want: notMapping}),
	"succeeds.seal":   bends(bend{at: "succeeds.seal", want: required}, bend{at: "succeeds.seal", to: "''", want: "at least 1"}),
	"succeeds.policy": bends(bend{at: "succeeds.policy", want: required}, bend{at: "succeeds.policy", to: "''", want: "at least 1"}),

	"dry_run":  {bends(bend{at: "dry_run", to: "on", want: notBool}).bends, eitherLegal},
	"shutdown": bends(bend{at: "shutdown", to: "10s", want: notMapping}),
	"shutdown.announce": bends(bend{at: "shutdown.announce", to: "61s", want: "60s"},
		bend{at: "shutdown.announce", to: "{seconds: 1}", want: "want a duration"}),
	"shutdown.drain": bends(bend{at: "shutdown.drain", to: "-1ms", want: "0s"},
		bend{at: "shutdown.drain", to: "301s", want: "300s"}),
}

// TestFields fails for a field without a case, so that no setting is added without its refusals.
func TestFields(t *testing.T) {
	full, err := os.ReadFile("testdata/full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Parse("full.yaml", full); err != nil {
		t.Fatalf("full.yaml itself: %v", err)
	}
	seen := make(map[string]bool)
	fieldPaths((&configv1.Config{}).ProtoReflect().Descriptor(), "", func(path string, _ protoreflect.FieldDescriptor) {
		seen[path] = true
		c, ok := fieldCases[path]
		if !ok || len(c.bends) == 0 {
			t.Errorf("%s: no case in fieldCases", path)
		}
		for _, b := range c.bends {
			t.Run(b.at+"="+printable(b.to), func(t *testing.T) { b.run(t, string(full)) })
		}
	})
	for path := range fieldCases {
		if !seen[path] {
			t.Errorf("fieldCases has %s, which is no field", path)
		}
	}
}

// fieldPaths calls fn for every field of md and of the messages in it.
func fieldPaths(md protoreflect.MessageDescriptor, path string, fn func(string, protoreflect.FieldDescriptor)) {
	for i := range md.Fields().Len() {
		f := md.Fields().Get(i)
		p := join(path, f.TextName())
		fn(p, f)
		if f.Message() != nil && f.Message().FullName() != "google.protobuf.Duration" {
			if f.IsList() {
				p += "[]"
			}
			fieldPaths(f.Message(), p, fn)
		}
	}
}

func (b bend) run(t *testing.T, full string) {
	text, line, column := edit(t, full, b.at, b.to)
	cfg, err := Parse("x.yaml", []byte(text))
	if err == nil || cfg != nil {
		t.Fatalf("accepted:\n%s", text)
	}
	want := b.path
	if want == "" {
		want = b.at
	}
	for _, p := range err.(Errors) {
		if p.Path != want || !strings.Contains(p.Message, b.want) {
			continue
		}
		if p.Line < 1 || p.Column < 1 || p.File != "x.yaml" || p.Snippet == "" {
			t.Errorf("problem without a position: %+v", p)
		}
		// A value that is no scalar may begin in the next line, so its key is pointed at.
		value := column + utf8.RuneCountInString(b.at[strings.LastIndexByte(b.at, '.')+1:]+": ")
		if b.path == "" && b.to != "" && (p.Line != line || p.Column != column && p.Column < value) {
			t.Errorf("problem at %d:%d, want %d:%d\n%v", p.Line, p.Column, line, value, p)
		}
		source, marker, _ := strings.Cut(p.Snippet, "\n")
		if n := utf8.RuneCountInString(marker); n > utf8.RuneCountInString(source)+1 {
			t.Errorf("the marker is beyond the line:\n%s", p.Snippet)
		}
		return
	}
	t.Errorf("no problem at %s with %q, but:\n%v", want, b.want, err)
}

var keyLine = regexp.MustCompile(`^((?:  )*(?:- )?)([a-z0-9_]+):`)

// edit replaces the setting at path in the text of a YAML file with block style mappings, or takes it out, and says
// where its key stands. A setting is its line and the deeper lines below.
func edit(t *testing.T, text, path, to string) (out string, line, column int) {
	t.Helper()
	d := &document{file: "edit", places: make(map[string]place), bad: make(map[string]bool)}
	if !d.read([]byte(text), new(configv1.Config)) {
		t.Fatal(d.problems)
	}
	at, ok := d.places[path]
	if !ok {
		t.Fatalf("%s is not in the file", path)
	}
	line = at.key.Line
	m := keyLine.FindStringSubmatch(d.lines[line-1])
	if m == nil {
		t.Fatalf("line %d is not a key: %q", line, d.lines[line-1])
	}
	indent, end := len(m[1]), line
	for end < len(d.lines) {
		rest := strings.TrimLeft(d.lines[end], " ")
		if rest != "" && len(d.lines[end])-len(rest) <= indent {
			break
		}
		end++
	}
	lines := append([]string(nil), d.lines[:line-1]...)
	switch {
	case to != "":
		lines = append(lines, m[1]+m[2]+": "+to)
	case strings.HasSuffix(m[1], "- "):
		lines = append(lines, m[1]+"# taken out") // the item keeps its dash
	}
	lines = append(lines, d.lines[end:]...)
	return strings.Join(lines, "\n"), line, indent + 1
}
