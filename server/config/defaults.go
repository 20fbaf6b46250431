package config

import (
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
)

// The upper limits that config.proto states for budgets; they are the defaults too. Configuration may only tighten them.
const (
	maxCommitR1 = 50 * time.Millisecond
	maxCommitW1 = 500 * time.Millisecond
)

// applyDefaults fills in what is not set. config.proto states each default; a test compares the two.
func applyDefaults(c *configv1.Config) {
	setKeys(need(&c.Keys))
	setLog(need(&c.Log))
	setBeat(need(&c.Beat))
	setPolicy(need(&c.DefaultRoute))
	for _, r := range c.Routes {
		setPolicy(need(&r.Policy))
		if r.Prefix == "" {
			r.Prefix = "/"
		}
		setDuration(&r.Timeout, 15*time.Second)
	}
	setEnvoy(need(&c.Envoy))
	setEnvoyTLS(c)
	s := need(&c.Shutdown)
	setDuration(&s.Announce, 2*time.Second)
	setDuration(&s.Drain, 10*time.Second)
	if c.Identity != nil {
		setDuration(&c.Identity.SvidTtl, time.Hour)
	}
	l := need(&c.Listeners)
	addrs := []*string{&l.Envoy, &l.Admin, &l.Tiles, &l.Probes, &c.Envoy.Listener, &c.Envoy.Admin}
	for _, r := range c.Envoy.Replicas {
		addrs = append(addrs, &r.Address)
	}
	for _, a := range addrs {
		// Not looked up: the name means loopback to every resolver, and Envoy binds to literal addresses only.
		if port, ok := strings.CutPrefix(*a, "localhost:"); ok {
			*a = "127.0.0.1:" + port
		}
	}
}

func setKeys(k *configv1.Keys) {
	for _, k := range []*configv1.Key{need(&k.Identity), need(&k.Daily)} {
		if k.Algorithm == configv1.Algorithm_ALGORITHM_UNSPECIFIED {
			k.Algorithm = configv1.Algorithm_ED25519
		}
	}
	setDuration(&k.RotationInterval, 24*time.Hour)
}

func setLog(l *configv1.Log) {
	setDuration(&l.SealEvery, time.Second)
	setDuration(&l.MaxUnsigned, 5*time.Minute)
	setDuration(&l.Heartbeat, time.Minute)
	setDuration(&l.OutcomeTimeout, time.Hour)
	setUint(&l.WalSegmentMib, 64)
	setUint(&l.WalMaxMib, 1024)
}

func setBeat(b *configv1.Beat) {
	setDuration(&b.Cycle, 128*time.Millisecond)
	r1, w1 := need(&b.R1), need(&b.W1)
	setUint(&r1.Capacity, 4096)
	setUint(&w1.Capacity, 4096)
	setDuration(&r1.MaxWait, 0)
	setDuration(&w1.MaxWait, b.Cycle.AsDuration())
	setDuration(&r1.CommitTimeout, maxCommitR1)
	setDuration(&w1.CommitTimeout, maxCommitW1)
}

func setPolicy(p *configv1.RoutePolicy) {
	if p.Class == configv1.Class_CLASS_UNSPECIFIED {
		p.Class = configv1.Class_W1
	}
	if p.OnReceiptFailure == configv1.OnReceiptFailure_ON_RECEIPT_FAILURE_UNSPECIFIED {
		p.OnReceiptFailure = configv1.OnReceiptFailure_DENY
	}
}

func setEnvoy(e *configv1.Envoy) {
	setString(&e.Listener, "127.0.0.1:10000")
	setString(&e.Admin, "127.0.0.1:9901")
	if e.Capture == configv1.Capture_CAPTURE_UNSPECIFIED {
		e.Capture = configv1.Capture_LEAN
	}
	if e.Filter == configv1.Filter_FILTER_UNSPECIFIED {
		e.Filter = configv1.Filter_EXT_PROC
	}
	setDuration(&e.MessageTimeout, 2*time.Second)
	setDuration(&e.AccessLogFlush, 200*time.Millisecond)
	setUint(&e.MaxRequests, 100_000)
	setDuration(&e.MaxConnectionDuration, 5*time.Minute)
}

// need returns *m, made first if it is nil.
func need[T any](m **T) *T {
	if *m == nil {
		*m = new(T)
	}
	return *m
}

func setDuration(d **durationpb.Duration, def time.Duration) {
	if *d == nil {
		*d = durationpb.New(def)
	}
}

func setUint(n *uint32, def uint32) {
	if *n == 0 {
		*n = def
	}
}

func setString(s *string, def string) {
	if *s == "" {
		*s = def
	}
}
