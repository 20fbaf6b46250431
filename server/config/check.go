package config

import (
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
	"github.com/knhk/sidecar/crypto/keys"
)

// fault reports a problem between settings. It points at the first of paths that the file sets; if any of them is wrong in
// itself, that has been told and nothing is added.
func (d *document) fault(message string, paths ...string) {
	for _, p := range paths {
		if d.isBad(p) {
			return
		}
	}
	path := paths[0]
	for _, p := range paths {
		if d.has(p) {
			path = p
			break
		}
	}
	line, column, _ := d.position(path)
	d.report(line, column, path, message)
}

// check judges what spans several fields, or what a constraint in config.proto cannot say. c has its defaults applied.
func (d *document) check(c *configv1.Config) {
	d.checkZeros()
	d.checkListeners(c)
	d.checkIdentity(c)
	d.checkKeys(c.GetKeys())
	d.checkLog(c)
	d.checkBeat(c)
	d.checkRules(c.GetClassRules())
	d.checkAuthz(c.GetAuthzRules())
	d.checkPolicy(c.GetDefaultRoute(), "default_route")
	d.checkClusters(c.GetEnvoy().GetClusters())
	d.checkReplicas(c)
	d.checkEnvoyTLS(c)
	d.checkRoutes(c)
	d.checkFilter(c)
	d.checkParents(c)
	if strings.ContainsRune(c.GetStateDir(), 0) {
		d.fault("contains a NUL", "state_dir")
	}
}

// checkZeros refuses a written 0 where 0 would silently become the default.
func (d *document) checkZeros() {
	for _, path := range []string{"log.wal_segment_mib", "log.wal_max_mib", "beat.r1.capacity", "beat.w1.capacity", "envoy.max_requests"} {
		if at, ok := d.places[path]; ok && strings.Trim(at.value.Value, "0") == "" {
			d.fault("must be at least 1; leave it out for the default", path)
		}
	}
}

func (d *document) checkListeners(c *configv1.Config) {
	type listener struct {
		path, text string
		public     bool // what it serves is meant for everyone
	}
	type bound struct {
		path string
		addr Address
	}
	var taken []bound
	for _, l := range []listener{
		{path: "listeners.envoy", text: c.GetListeners().GetEnvoy()},
		{path: "listeners.admin", text: c.GetListeners().GetAdmin()},
		{path: "listeners.tiles", text: c.GetListeners().GetTiles()},
		{path: "listeners.probes", text: c.GetListeners().GetProbes(), public: true},
		{path: "envoy.listener", text: c.GetEnvoy().GetListener(), public: true},
		{path: "envoy.admin", text: c.GetEnvoy().GetAdmin()},
	} {
		if l.text == "" {
			continue
		}
		addr, err := parseAddress(l.text)
		ofEnvoy := strings.HasPrefix(l.path, "envoy.")
		switch {
		case err != nil:
			d.fault(err.Error(), l.path)
			continue
		case ofEnvoy && addr.Network != "tcp":
			d.fault("want host:port: Envoy's own listeners are not unix sockets here", l.path)
			continue
		case ofEnvoy && addr.port() == 0:
			d.fault("port 0 is a different one at each start: name a port", l.path)
			continue
		case !ofEnvoy && !l.public:
			d.checkReachable(c, addr, l.path)
		case !addr.loopback() && !l.public:
			d.fault(fmt.Sprintf("%s can be reached from other machines, and Envoy's admin interface asks nobody who he is: use a "+
				"loopback address such as 127.0.0.1", addr), l.path)
		}
		for _, t := range taken {
			if addr.overlaps(t.addr) {
				d.fault(fmt.Sprintf("%s is taken by %s", addr, t.path), l.path, t.path)
			}
		}
		taken = append(taken, bound{l.path, addr})
	}
}

func (d *document) checkKeys(k *configv1.Keys) {
	var uris [2]keys.URI
	for i, part := range []struct{ path, uri string }{
		{"keys.identity.uri", k.GetIdentity().GetUri()}, {"keys.daily.uri", k.GetDaily().GetUri()},
	} {
		if part.uri == "" {
			continue // told by the constraints
		}
		uri, err := keys.ParseURI(part.uri)
		if err != nil {
			d.fault(strings.TrimPrefix(err.Error(), "keys: parse uri: "), part.path)
			return
		}
		uris[i] = uri
	}
	if uris[0] == uris[1] && uris[0].Label != "" {
		d.fault("names the same key as keys.identity.uri: the daily key must be another one, or it could never be replaced",
			"keys.daily.uri", "keys.identity.uri")
	}
}

func (d *document) checkLog(c *configv1.Config) {
	l := c.GetLog()
	less := func(a, b *durationpb.Duration, why string, paths ...string) {
		if a.AsDuration() < b.AsDuration() {
			d.fault(fmt.Sprintf("%v is less than %s, %v", a.AsDuration(), why, b.AsDuration()), paths...)
		}
	}
	less(l.GetHeartbeat(), l.GetSealEvery(), "log.seal_every, the time between blocks", "log.heartbeat", "log.seal_every")
	less(l.GetMaxUnsigned(), l.GetSealEvery(), "log.seal_every: records would be overdue before their block is closed",
		"log.max_unsigned", "log.seal_every")
	less(l.GetOutcomeTimeout(), c.GetEnvoy().GetAccessLogFlush(), "envoy.access_log_flush: outcomes would come too late",
		"log.outcome_timeout", "envoy.access_log_flush")
	if seg, total := uint64(l.GetWalSegmentMib()), uint64(l.GetWalMaxMib()); total < 3*seg {
		d.fault(fmt.Sprintf("%d MiB hold less than three segments of %d MiB: one is written, one is prepared, one is kept",
			total, seg), "log.wal_max_mib", "log.wal_segment_mib")
	}
}

func (d *document) checkBeat(c *configv1.Config) {
	b := c.GetBeat()
	cycle := b.GetCycle().AsDuration()
	if wait := b.GetR1().GetMaxWait().AsDuration(); wait != 0 {
		d.fault(fmt.Sprintf("is %v: a hot request never waits; leave it out", wait), "beat.r1.max_wait")
	}
	if wait := b.GetW1().GetMaxWait().AsDuration(); wait > cycle {
		d.fault(fmt.Sprintf("%v is more than one cycle, %v: no tick is promised further ahead", wait, cycle),
			"beat.w1.max_wait", "beat.cycle")
	}
	limit := c.GetEnvoy().GetMessageTimeout().AsDuration()
	for _, k := range []struct {
		name string
		beat *configv1.ClassBeat
		most time.Duration
	}{{"r1", b.GetR1(), maxCommitR1}, {"w1", b.GetW1(), maxCommitW1}} {
		path := "beat." + k.name
		commit, wait := k.beat.GetCommitTimeout().AsDuration(), k.beat.GetMaxWait().AsDuration()
		switch {
		case commit <= 0:
			d.fault("must be more than 0s: no decision could be recorded", path+".commit_timeout")
		case commit > k.most:
			d.fault(fmt.Sprintf("%v is more than the %v of class %s: budgets can be tightened, not loosened",
				commit, k.most, strings.ToUpper(k.name)), path+".commit_timeout")
		case limit <= wait || limit-wait <= commit: // not a sum: it could overflow
			d.fault(fmt.Sprintf("%v does not exceed %s.max_wait plus commit_timeout, %v + %v: Envoy would give up on requests "+
				"that are still being decided", limit, path, wait, commit),
				"envoy.message_timeout", path+".max_wait", path+".commit_timeout", "beat.cycle")
		}
	}
}

func (d *document) checkPolicy(p *configv1.RoutePolicy, path string) {
	if p.GetExclude() && p.GetClassifyBody() {
		d.fault("cannot stand beside exclude: an excluded request never reaches us, nor does its body",
			path+".classify_body", path+".exclude")
	}
}

func (d *document) checkClusters(clusters []*configv1.Cluster) {
	names := make(map[string]string, len(clusters))
	for i, c := range clusters {
		path := fmt.Sprintf("envoy.clusters[%d]", i)
		d.unique(names, c.GetName(), path+".name", path+".name")
		for j, e := range c.GetEndpoints() {
			at := fmt.Sprintf("%s.endpoints[%d]", path, j)
			host, port, err := splitHostPort(e)
			switch {
			case err != nil:
				d.fault(err.Error()+": want host:port", at)
			case host == "" || strings.ContainsAny(host, " /@?#"):
				d.fault(fmt.Sprintf("%q is not a host", printable(host)), at)
			case port == "0":
				d.fault("port 0 cannot be connected to", at)
			}
		}
	}
}

// checkReplicas wants the list to be the same in every replica's file: this one stands in it as it is.
func (d *document) checkReplicas(c *configv1.Config) {
	names := make(map[string]string)
	addrs := make(map[Address]string)
	self := len(c.GetEnvoy().GetReplicas()) == 0
	for i, r := range c.GetEnvoy().GetReplicas() {
		path := fmt.Sprintf("envoy.replicas[%d]", i)
		d.unique(names, r.GetInstance(), path+".instance", path+".instance")
		if r.GetAddress() == "" {
			continue // told by the constraints
		}
		addr, err := parseAddress(r.GetAddress())
		switch {
		case err != nil:
			d.fault(err.Error(), path+".address")
			continue
		case addr.Network == "tcp" && addr.port() == 0:
			d.fault("port 0 cannot be connected to", path+".address")
		case !addr.loopback() && c.GetIdentity() == nil:
			d.fault(fmt.Sprintf("%s is on another machine, and there is no TLS to it: set identity, or use unix:/path, or, for "+
				"development, a loopback address such as 127.0.0.1", addr), path+".address")
		}
		if other, dup := addrs[addr]; dup {
			d.fault(fmt.Sprintf("%s is the address of %s too", addr, other), path+".address")
		}
		addrs[addr] = path
		if r.GetInstance() == c.GetInstance() {
			self = true
			if r.GetAddress() != c.GetListeners().GetEnvoy() {
				d.fault(fmt.Sprintf("%s is not listeners.envoy, %s: Envoy would not find this replica", addr, c.GetListeners().GetEnvoy()),
					path+".address", "listeners.envoy")
			}
		}
	}
	if !self {
		d.fault(fmt.Sprintf("lacks this replica, instance %q", c.GetInstance()), "envoy.replicas", "instance")
	}
}

func (d *document) checkRoutes(c *configv1.Config) {
	clusters := make(map[string]bool)
	for _, cl := range c.GetEnvoy().GetClusters() {
		clusters[cl.GetName()] = true
	}
	names, prefixes := make(map[string]string), make(map[string]string)
	for i, r := range c.GetRoutes() {
		path := fmt.Sprintf("routes[%d]", i)
		d.unique(names, r.GetName(), path+".name", path+".name")
		d.checkPolicy(r.GetPolicy(), path+".policy")
		if r.GetWebsocket() && r.GetPolicy().GetClassifyBody() {
			d.fault("cannot stand beside policy.classify_body: a websocket has no body that ends", path+".websocket",
				path+".policy.classify_body")
		}
		if timeout := r.GetTimeout().AsDuration(); timeout > c.GetLog().GetOutcomeTimeout().AsDuration() {
			d.fault(fmt.Sprintf("%s.timeout, %v, is more than log.outcome_timeout, %v: "+
				"the outcome would be recorded as unknown while the request runs", path, timeout, c.GetLog().GetOutcomeTimeout().AsDuration()), path+".timeout", "log.outcome_timeout")
		}
		if r.GetCluster() == "" {
			continue
		}
		if !clusters[r.GetCluster()] {
			d.fault(fmt.Sprintf("%q is not the name of one of envoy.clusters", printable(r.GetCluster())), path+".cluster")
		}
		if other, dup := prefixes[r.GetPrefix()]; dup {
			d.fault(fmt.Sprintf("%q is the prefix of %s too: Envoy would never reach this route", printable(r.GetPrefix()), other),
				path+".prefix", path+".name")
		} else {
			prefixes[r.GetPrefix()] = path
		}
	}
}

// unique reports value if it has been seen in another place.
func (d *document) unique(seen map[string]string, value, place string, paths ...string) {
	if value == "" {
		return // told by the constraints
	}
	if first, dup := seen[value]; dup {
		line, _, _ := d.position(first)
		d.fault(fmt.Sprintf("%q is taken by %s in line %d", printable(value), parent(first), line), paths...)
		return
	}
	seen[value] = place
}
