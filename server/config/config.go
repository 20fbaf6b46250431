// Package config reads knhk.yaml: strictly, with every default filled in, and with all problems told at once, each by
// file, line and column.
//
// It promises that a Config which Load returns is complete and consistent: whoever gets one checks nothing again. It
// promises nothing about the world: whether a directory can be written, a port is free or a token holds the key is found
// out by those who use them. It follows no file and reads no environment; package server decides when to load again, and
// Changes tells which settings a running server cannot take over. Load, `knhk check` and a reload are one code path.
//
// What the settings mean stands in api/knhk/config/v1/config.proto. Nothing in a Config is secret: key URIs name where a
// PIN is read, never the PIN.
package config

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/policy"
	"github.com/knhk/sidecar/policy/authz"
	"github.com/knhk/sidecar/policy/beat"
	"github.com/knhk/sidecar/policy/class"
	"github.com/knhk/sidecar/server/access"
)

// Config is one knhk.yaml with all defaults applied. It is not changed after Load; callers must not change it either.
type Config struct {
	File         string // as given to Load
	Origin       string
	Instance     string
	StateDir     string
	Listeners    Listeners
	Keys         Keys
	Log          Log
	Beat         Beat
	DefaultRoute RoutePolicy
	Envoy        Envoy
	DryRun       bool    // dry_run, or envoy.shadow_mode
	Parents      Parents // whose knhk-parent header is believed
	Shutdown     Shutdown
	Succeeds     Succeeds
	Identity     Identity                           // zero: none
	Roles        map[access.Role][]access.Principal // who has each role
	// InsecureLoopback: whoever connects to a TCP listener, all of which have loopback addresses then, has every role.
	InsecureLoopback bool
	// PolicyDigest names what decides about requests: the first half of the SHA-256 of the deterministic protobuf encoding
	// of beat, class_rules, authz_rules, default_route, routes and dry_run, with defaults applied. It stands in every record.
	PolicyDigest [16]byte

	pb     *configv1.Config
	routes map[string]*RoutePolicy
}

// Address is where to listen or connect, in the terms of package net. The zero Address is none.
type Address struct {
	Network string // "tcp" or "unix"
	Address string // host:port with a literal IP address, or the socket's path
}

// IsZero reports whether a is no address.
func (a Address) IsZero() bool { return a == Address{} }

// String returns a as it is written in knhk.yaml.
func (a Address) String() string {
	if a.Network == "unix" {
		return "unix:" + a.Address
	}
	return a.Address
}

// Listeners are the addresses of knhk itself.
type Listeners struct {
	Envoy, Admin Address
	Tiles        Address // zero: not served
	Probes       Address // zero: not served
}

// Identity is who knhk is to others: exactly one of WorkloadAPI and Files is set.
type Identity struct {
	ID          spiffeid.ID
	WorkloadAPI string // unix:/path
	Files       *TLSFiles
	SVIDTTL     time.Duration
}

// IsZero reports whether there is no identity.
func (i Identity) IsZero() bool { return i.ID.IsZero() }

// TLSFiles are names of PEM files.
type TLSFiles struct {
	Certificate, Key, CA string
	Federated            map[spiffeid.TrustDomain]string
}

// Keys are the signing keys.
type Keys struct {
	Identity, Daily  Key
	RotationInterval time.Duration // in (0, 24h]
	AllowExportable  bool
}

// Key is a key's URI and algorithm.
type Key struct {
	URI       string // passes keys.ParseURI
	Algorithm keys.Algorithm
}

// Log is the pace and size of the receipt log.
type Log struct {
	SealEvery      time.Duration
	MaxUnsigned    time.Duration
	Heartbeat      time.Duration
	OutcomeTimeout time.Duration
	SegmentBytes   int64 // size of one WAL segment
	MaxBytes       int64 // of all WAL segments, at least three times SegmentBytes
}

// Beat is the rhythm of admission.
type Beat struct {
	Cycle  time.Duration
	Tick   time.Duration // an eighth of Cycle
	R1, W1 ClassBeat
}

// Of returns the part of one class; ok is false for anything but R1 and W1.
func (b *Beat) Of(c policy.Class) (cb ClassBeat, ok bool) {
	switch c {
	case policy.R1:
		return b.R1, true
	case policy.W1:
		return b.W1, true
	}
	return ClassBeat{}, false
}

// ClassBeat is what one class may take, and how long its requests may wait.
type ClassBeat struct {
	Capacity      uint32        // requests per tick
	MaxWait       time.Duration // at most one cycle; 0 for R1
	MaxWaitTicks  uint32        // whole ticks within MaxWait
	CommitTimeout time.Duration
}

// RoutePolicy is what is decided about the requests of a route.
type RoutePolicy struct {
	Class          policy.Class // R1 or W1
	AllowOnFailure bool         // on_receipt_failure: ALLOW
	Exclude        bool
	Tenant         string
	ClassifyBody   bool
}

// Envoy is what a generated Envoy configuration and the service must agree on. Clusters and routes are in Proto.
type Envoy struct {
	Listener, Admin       Address
	Capture               configv1.Capture // LEAN or FULL
	Filter                configv1.Filter  // EXT_PROC, EXT_AUTHZ or BOTH
	ShadowMode            bool             // Envoy lets everything pass; only with EXT_AUTHZ
	MessageTimeout        time.Duration
	AccessLogFlush        time.Duration
	MaxRequests           uint32
	MaxConnectionDuration time.Duration
}

// Shutdown is the pace of a SIGTERM.
type Shutdown struct {
	Announce, Drain time.Duration
}

// Proto returns the configuration as the message, defaults applied. The caller must not change it.
func (c *Config) Proto() *configv1.Config { return c.pb }

// Route returns what holds for the Envoy route of that name: its own policy if it is listed, else DefaultRoute.
// It does not allocate. The caller must not change what it points to.
func (c *Config) Route(name string) *RoutePolicy {
	if r, ok := c.routes[name]; ok {
		return r
	}
	return &c.DefaultRoute
}

// Classes returns the part that package class needs.
func (c *Config) Classes() class.Config {
	out := class.Config{Default: classRoute(c.DefaultRoute), Routes: make(map[string]class.Route, len(c.routes))}
	for name, r := range c.routes {
		out.Routes[name] = classRoute(*r)
	}
	for _, r := range c.pb.GetClassRules() {
		out.Rules = append(out.Rules, classRule(r))
	}
	return out
}

// Authz returns the rules that package authz needs, in order.
func (c *Config) Authz() []authz.Rule {
	out := make([]authz.Rule, len(c.pb.GetAuthzRules()))
	for i, r := range c.pb.GetAuthzRules() {
		out[i] = authzRule(r)
	}
	return out
}

// RouteNames returns the names of the routes that are listed, in no order.
func (c *Config) RouteNames() []string { return slices.Collect(maps.Keys(c.routes)) }

// Credits returns the part that package beat needs.
func (c *Config) Credits() beat.Config {
	return beat.Config{
		R1: beat.Limits{Capacity: c.Beat.R1.Capacity, MaxWaitTicks: c.Beat.R1.MaxWaitTicks},
		W1: beat.Limits{Capacity: c.Beat.W1.Capacity, MaxWaitTicks: c.Beat.W1.MaxWaitTicks},
	}
}

func classRule(r *configv1.ClassRule) class.Rule {
	return class.Rule{Name: r.GetName(), Expr: r.GetWhen(), Class: classOf(r.GetClass())}
}

func classRoute(r RoutePolicy) class.Route {
	return class.Route{Class: r.Class, ClassifyBody: r.ClassifyBody}
}

func classOf(c configv1.Class) policy.Class {
	switch c {
	case configv1.Class_R1:
		return policy.R1
	case configv1.Class_W1:
		return policy.W1
	}
	return policy.ClassUnknown
}

// Succeeds names the sealed log that this one goes on for. The zero value is none.
type Succeeds struct {
	Seal, Policy string // files
}

// IsZero reports whether there is no such log.
func (s Succeeds) IsZero() bool { return s == Succeeds{} }

// build turns a message that has defaults applied and passed every check into a Config.
func build(file string, pb *configv1.Config) (*Config, error) {
	c := &Config{
		File:     file,
		Origin:   pb.GetOrigin(),
		Instance: pb.GetInstance(),
		StateDir: pb.GetStateDir(),
		Keys: Keys{
			Identity:         key(pb.GetKeys().GetIdentity()),
			Daily:            key(pb.GetKeys().GetDaily()),
			RotationInterval: pb.GetKeys().GetRotationInterval().AsDuration(),
			AllowExportable:  pb.GetKeys().GetAllowExportable(),
		},
		Log: Log{
			SealEvery:      pb.GetLog().GetSealEvery().AsDuration(),
			MaxUnsigned:    pb.GetLog().GetMaxUnsigned().AsDuration(),
			Heartbeat:      pb.GetLog().GetHeartbeat().AsDuration(),
			OutcomeTimeout: pb.GetLog().GetOutcomeTimeout().AsDuration(),
			SegmentBytes:   int64(pb.GetLog().GetWalSegmentMib()) << 20,
			MaxBytes:       int64(pb.GetLog().GetWalMaxMib()) << 20,
		},
		Envoy: Envoy{
			Capture:               pb.GetEnvoy().GetCapture(),
			Filter:                pb.GetEnvoy().GetFilter(),
			ShadowMode:            pb.GetEnvoy().GetShadowMode(),
			MessageTimeout:        pb.GetEnvoy().GetMessageTimeout().AsDuration(),
			AccessLogFlush:        pb.GetEnvoy().GetAccessLogFlush().AsDuration(),
			MaxRequests:           pb.GetEnvoy().GetMaxRequests(),
			MaxConnectionDuration: pb.GetEnvoy().GetMaxConnectionDuration().AsDuration(),
		},
		DefaultRoute: routePolicy(pb.GetDefaultRoute()),
		DryRun:       dryRun(pb),
		Shutdown: Shutdown{
			Announce: pb.GetShutdown().GetAnnounce().AsDuration(),
			Drain:    pb.GetShutdown().GetDrain().AsDuration(),
		},
		Succeeds: Succeeds{Seal: pb.GetSucceeds().GetSeal(), Policy: pb.GetSucceeds().GetPolicy()},
		pb:       pb,
		routes:   make(map[string]*RoutePolicy, len(pb.GetRoutes())),
	}
	cycle := pb.GetBeat().GetCycle().AsDuration()
	tick := cycle / beat.TicksPerCycle
	c.Beat = Beat{Cycle: cycle, Tick: tick, R1: classBeat(pb.GetBeat().GetR1(), tick), W1: classBeat(pb.GetBeat().GetW1(), tick)}
	for _, a := range []struct {
		to   *Address
		from string
	}{
		{&c.Listeners.Envoy, pb.GetListeners().GetEnvoy()},
		{&c.Listeners.Admin, pb.GetListeners().GetAdmin()},
		{&c.Listeners.Tiles, pb.GetListeners().GetTiles()},
		{&c.Listeners.Probes, pb.GetListeners().GetProbes()},
		{&c.Envoy.Listener, pb.GetEnvoy().GetListener()},
		{&c.Envoy.Admin, pb.GetEnvoy().GetAdmin()},
	} {
		if a.from == "" {
			continue
		}
		var err error
		if *a.to, err = parseAddress(a.from); err != nil {
			return nil, fmt.Errorf("config: %w", err)
		}
	}
	if err := c.buildIdentity(pb); err != nil {
		return nil, err
	}
	var err error
	if c.Parents, err = parents(pb.GetParents()); err != nil {
		return nil, fmt.Errorf("config: parents: %w", err)
	}
	for _, r := range pb.GetRoutes() {
		p := routePolicy(r.GetPolicy())
		c.routes[r.GetName()] = &p
	}
	encoded, err := proto.MarshalOptions{Deterministic: true}.Marshal(&configv1.Config{
		Beat: pb.GetBeat(), ClassRules: pb.GetClassRules(), DefaultRoute: pb.GetDefaultRoute(), Routes: pb.GetRoutes(),
		AuthzRules: pb.GetAuthzRules(), DryRun: dryRun(pb),
	})
	if err != nil {
		return nil, fmt.Errorf("config: encode the policy for its digest: %w", err)
	}
	sum := sha256.Sum256(encoded)
	copy(c.PolicyDigest[:], sum[:])
	return c, nil
}

func key(k *configv1.Key) Key {
	alg := keys.Ed25519
	if k.GetAlgorithm() == configv1.Algorithm_P256 {
		alg = keys.P256
	}
	return Key{URI: k.GetUri(), Algorithm: alg}
}

func classBeat(b *configv1.ClassBeat, tick time.Duration) ClassBeat {
	wait := b.GetMaxWait().AsDuration()
	return ClassBeat{
		Capacity:      b.GetCapacity(),
		MaxWait:       wait,
		MaxWaitTicks:  uint32(min(wait/tick, beat.View)),
		CommitTimeout: b.GetCommitTimeout().AsDuration(),
	}
}

func routePolicy(r *configv1.RoutePolicy) RoutePolicy {
	return RoutePolicy{
		Class:          classOf(r.GetClass()),
		AllowOnFailure: r.GetOnReceiptFailure() == configv1.OnReceiptFailure_ALLOW,
		Exclude:        r.GetExclude(),
		Tenant:         r.GetTenant(),
		ClassifyBody:   r.GetClassifyBody(),
	}
}
