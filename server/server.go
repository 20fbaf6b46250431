// Package server wires everything together and runs it: it alone starts and stops things.
//
// Start, each step needing the one before it:
//
//	configuration -> identity -> keys (none for a sealed log) -> receipt log (recovers what a crash left) -> admission -> listeners -> SERVING
//
// Stop, on the end of Run's context (SIGTERM):
//
//	NOT_SERVING (gRPC health, /readyz) -> wait shutdown.announce, so that Envoy turns away first
//	-> GOAWAY, streams finish, at most shutdown.drain -> stop the rest -> final block and header -> last checkpoint -> close
//
// Nothing else in the tree starts a goroutine that outlives a call, except the key stores and the transparency log, which
// own their workers until they are closed here.
package server

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
	"github.com/knhk/sidecar/crypto/spiffe"
	"github.com/knhk/sidecar/region/receiptlog"
	"github.com/knhk/sidecar/server/access"
	"github.com/knhk/sidecar/server/accesslog"
	"github.com/knhk/sidecar/server/admit"
	"github.com/knhk/sidecar/server/config"
	"github.com/knhk/sidecar/server/envoywire"
	"github.com/knhk/sidecar/server/extauthz"
	"github.com/knhk/sidecar/server/extproc"
	"github.com/knhk/sidecar/server/telemetry"
)

// Measured through Envoy on two cores: 64 stream workers save the growth of a new stack for each request, large buffers save
// system calls. What peers of the Envoy-facing listener can take at worst, all of them together, is bounded in guard.go: 586 MiB.
const (
	streamWorkers  = 64
	ioBuffer       = 128 << 10
	streamWindow   = 64 << 10 // of HTTP/2 flow control, fixed: what grpc-go does to find a better one costs a ping in every round trip
	connWindow     = 1 << 20
	maxStreams     = 1000             // per connection; Envoy opens more connections
	maxMessage     = 256 << 10        // headers, at most 60 KiB, may stand in a message twice, beside 32 KiB of body or 16 KiB of log
	maxMetadata    = 16 << 10         // of a stream's own header fields
	maxHeaderList  = 64 << 10         // of the other listeners
	pingEvery      = 30 * time.Second // of a silent connection; one that does not answer within pingTimeout is closed
	pingTimeout    = 20 * time.Second
	minKeepalive   = 10 * time.Second
	connectTimeout = 10 * time.Second
	healthPoll     = 100 * time.Millisecond
	httpHeaderTime = 5 * time.Second
	httpIdle       = 2 * time.Minute
	stopWait       = 15 * time.Second
	// Parts of identity.svid_ttl. An issuer renews a certificate after half of its life, so one that a connection begins with has half of it
	// left. gRPC says GOAWAY at connLife, give or take a tenth, and ends what is left connGrace later: after 0.45 of it at the latest.
	connLife, connGrace = 4, 6
)

// Server is one knhk. Make it with New, then call Run once.
type Server struct {
	path      string
	log       *slog.Logger
	cfg       atomic.Pointer[config.Config]
	keys      *keyring
	receipts  *receiptlog.Log
	metrics   *telemetry.Metrics
	pipeline  *admit.Pipeline
	grpc      *grpc.Server
	accessLog *accesslog.Server
	health    *health.Server
	http      []endpoint
	identity  *spiffe.Source // nil: none
	access    *access.Authority
	active    atomic.Int64 // ext_proc streams and ext_authz calls open now
	stopping  atomic.Bool
	guard     *guard
	envoy     net.Listener // as the guard hands it out

	listeners []net.Listener
}

// Option changes how New opens what is there.
type Option func(*options)

type options struct{ replaceDailyKey bool }

// ReplaceDailyKey goes on with a state directory whose key store has gone past it, a restored copy: the daily key is replaced
// before anything is signed. Where the log has gone on elsewhere since, this signs a second history.
func ReplaceDailyKey() Option { return func(o *options) { o.replaceDailyKey = true } }

// New loads the configuration at path, opens keys and log, and binds the listeners; it serves nothing. If it fails, what it had
// opened is closed again. A log that is sealed needs no keys: its receipts are read, and nothing else.
func New(ctx context.Context, path string, log *slog.Logger, opts ...Option) (_ *Server, err error) {
	var o options
	for _, f := range opts {
		f(&o)
	}
	cfg, err := config.Load(path)
	if err != nil {
		return nil, err
	}
	s := &Server{path: path, log: log, guard: newGuard(log)}
	s.cfg.Store(cfg)
	defer func() {
		if err != nil {
			err = errors.Join(err, s.closeAll(context.WithoutCancel(ctx)))
		}
	}()
	if s.metrics, err = telemetry.New(); err != nil {
		return nil, err
	}
	if s.access, err = access.New(access.Config{
		Grants: access.NewGrants(cfg.Roles), Log: log, Now: time.Now,
		Refused: func(on access.Listener, cause access.Cause) { s.metrics.Refused(string(on), string(cause)) },
	}); err != nil {
		return nil, err
	}
	if err = s.openIdentity(ctx, cfg.Identity); err != nil {
		return nil, err
	}
	if s.keys, err = openKeys(ctx, cfg, keyOptions{make: true, log: log, observe: s.metrics.KeyStore}); err != nil {
		return nil, err
	}
	if s.receipts, err = receiptlog.Open(ctx, receiptlog.Config{
		Dir: cfg.StateDir, Origin: cfg.Origin, Instance: cfg.Instance,
		Identity: s.keys.identity, Daily: s.keys.daily, DailyLabel: s.keys.dailyLabel, DailyAlgorithm: cfg.Keys.Daily.Algorithm,
		DailyMaxAge: cfg.Keys.RotationInterval, SealEvery: cfg.Log.SealEvery, Heartbeat: cfg.Log.Heartbeat, MaxUnsigned: cfg.Log.MaxUnsigned,
		OutcomeTimeout: cfg.Log.OutcomeTimeout, SegmentBytes: cfg.Log.SegmentBytes, MaxBytes: cfg.Log.MaxBytes, Log: log,
		Succeeds: s.keys.succeeds, ReplaceDailyKey: o.replaceDailyKey,
	}); err != nil {
		return nil, err
	}
	if err = s.metrics.ObserveLog(s.receipts); err != nil {
		return nil, err
	}
	if s.pipeline, err = admit.New(admit.Config{
		Recorder: s.receipts, Policy: cfg, Meter: s.metrics, Log: log, Now: time.Now,
		Before: s.receipts.Before(),
	}); err != nil {
		return nil, err
	}
	if err = s.buildGRPC(); err != nil {
		return nil, err
	}
	return s, s.listen(ctx, cfg)
}

// buildGRPC makes the server that Envoy talks to.
func (s *Server) buildGRPC() error {
	capture := "lean"
	if s.cfg.Load().Envoy.Capture == configv1.Capture_FULL {
		capture = "full"
	}
	ext, err := extproc.New(extproc.Config{
		Admitter: s.pipeline, Capture: capture, Log: s.log, Count: func(e extproc.Event) { s.metrics.Stream(e.String()) },
	})
	if err != nil {
		return err
	}
	authz, err := extauthz.New(extauthz.Config{
		Admitter: s.pipeline, Log: s.log, Count: func(e extauthz.Event) { s.metrics.Stream(e.String()) },
	})
	if err != nil {
		return err
	}
	ttl := s.cfg.Load().Identity.SVIDTTL // zero without identity
	als, err := accesslog.New(accesslog.Config{
		// A stream that began just before GOAWAY ends at a good moment, not when gRPC closes what is left.
		MaxStreamAge: ttl / connGrace,
		Sink:         s.pipeline, Log: s.log, Count: func(e accesslog.Event) {
			if e == accesslog.EventMalformed || e == accesslog.EventPanic {
				s.metrics.Unreceipted("accesslog_" + e.String())
			}
		},
	})
	if err != nil {
		return err
	}
	alive := keepalive.ServerParameters{Time: pingEvery, Timeout: pingTimeout}
	if ttl > 0 {
		alive.MaxConnectionAge, alive.MaxConnectionAgeGrace = ttl/connLife, ttl/connGrace
	}
	secure := transport{s: s}
	if !s.plain(s.cfg.Load().Listeners.Envoy) {
		secure.tls = s.tlsFor(access.OnEnvoy, "h2")
	}
	s.grpc = grpc.NewServer(
		grpc.Creds(secure),
		grpc.ForceServerCodecV2(envoywire.Codec{}),
		grpc.NumStreamWorkers(streamWorkers), grpc.ReadBufferSize(ioBuffer), grpc.WriteBufferSize(ioBuffer),
		grpc.StaticStreamWindowSize(streamWindow), grpc.StaticConnWindowSize(connWindow),
		grpc.MaxConcurrentStreams(maxStreams), grpc.MaxRecvMsgSize(maxMessage), grpc.MaxHeaderListSize(maxMetadata),
		grpc.ConnectionTimeout(connectTimeout),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minKeepalive, PermitWithoutStream: true}),
		grpc.KeepaliveParams(alive),
		// The guard first: what is refused has been counted too.
		grpc.ChainUnaryInterceptor(s.guard.unary, func(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			if err := s.access.CallGRPC(ctx, access.OnEnvoy, info.FullMethod); err != nil {
				return nil, err
			}
			return h(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			if srv == ext || srv == authz {
				s.active.Add(1)
				defer s.active.Add(-1)
			}
			return s.guard.stream(srv, ss, info, func(srv any, ss grpc.ServerStream) error {
				if err := s.access.CallGRPC(ss.Context(), access.OnEnvoy, info.FullMethod); err != nil {
					return err
				}
				return h(srv, ss)
			})
		}),
	)
	ext.Register(s.grpc)
	authz.Register(s.grpc)
	als.Register(s.grpc)
	s.accessLog = als
	s.health = health.NewServer()
	s.setHealth(healthpb.HealthCheckResponse_NOT_SERVING)
	healthpb.RegisterHealthServer(s.grpc, s.health)
	return nil
}

// services are the names whose health is told; the empty one is the server as a whole.
var services = []string{"", extproc.ServiceDesc.ServiceName, extauthz.ServiceDesc.ServiceName, accesslog.ServiceDesc.ServiceName}

func (s *Server) setHealth(st healthpb.HealthCheckResponse_ServingStatus) {
	for _, name := range services {
		s.health.SetServingStatus(name, st)
	}
}

// Ready says why requests are not being admitted; nil when they are.
func (s *Server) Ready() error {
	if s.stopping.Load() {
		return errors.New("stopping")
	}
	if s.identity != nil {
		if err := s.identity.Ready(); err != nil {
			return err
		}
	}
	return s.receipts.Refusing()
}

// Receipts is the log, for those who run a Server in their own process.
func (s *Server) Receipts() *receiptlog.Log { return s.receipts }

// Run serves until ctx ends, then stops in order. It returns nil after an orderly stop.
func (s *Server) Run(ctx context.Context) error {
	cfg := s.cfg.Load()
	// What records must outlive what asks for records: it has a context of its own, cancelled in the stop sequence.
	logCtx, stopLog := context.WithCancel(context.WithoutCancel(ctx))
	defer stopLog()
	admission, stopAdmission := context.WithCancel(context.WithoutCancel(ctx))
	defer stopAdmission()
	// Connections wait in the listeners' queues since New: the first request must find a tick, whatever goroutine runs first.
	s.pipeline.Advance()
	var pipeline, recorders errgroup.Group
	pipeline.Go(func() error { return s.pipeline.Run(admission) })
	if s.identity != nil { // to the end: whoever drains has connections still
		pipeline.Go(func() error { return s.identity.Run(admission) })
	}
	recorders.Go(func() error {
		err := s.receipts.Run(logCtx)
		if err != nil { // it refuses from now on; so do we, rather than die and take the reason along
			s.log.Error("receipt log has stopped; every request is refused until restart", "error", err)
		}
		return nil
	})

	serving, cancel := context.WithCancel(ctx)
	defer cancel()
	g, serving := errgroup.WithContext(serving)
	g.Go(func() error { return s.grpc.Serve(s.envoy) })
	g.Go(func() error { return s.guard.run(serving) })
	for _, e := range s.http {
		g.Go(e.serve)
	}
	g.Go(func() error { return s.watchHealth(serving) })
	g.Go(func() error { return s.watchConfig(serving) })
	g.Go(func() error { // the stop sequence, up to the recorders
		<-serving.Done()
		s.stopServing(cfg)
		return nil
	})
	s.log.Info("knhk is serving", "envoy", cfg.Listeners.Envoy.String(), "admin", cfg.Listeners.Admin.String(),
		"tiles", cfg.Listeners.Tiles.String(), "origin", s.receipts.Origin(), "identity", s.receipts.IdentityVKey(),
		"identity_key_in", s.keys.custody(roleIdentity), "daily_keys_in", s.keys.custody(roleDaily))
	if s.identity != nil {
		s.log.Info("connections are mutual TLS 1.3", "spiffe_id", s.identity.ID().String())
	}
	if cfg.InsecureLoopback {
		s.log.Warn("insecure_loopback: whoever connects on this machine is believed, and may do everything: for development only")
	}
	if s.keys.sealed {
		s.log.Warn("the log is sealed: its receipts are served, every request is refused", "origin", s.receipts.Origin())
	}
	err := g.Wait()
	s.receipts.Stop()
	// First the pipeline, which ends by reporting the outcomes that it holds for the access log, then what takes them.
	stopAdmission()
	err = errors.Join(err, pipeline.Wait())
	stopLog()
	err = errors.Join(err, recorders.Wait(), s.closeAll(context.WithoutCancel(ctx)))
	s.log.Info("knhk has stopped")
	return err
}

// stopServing announces the stop, lets streams finish and ends what is left.
func (s *Server) stopServing(cfg *config.Config) {
	s.stopping.Store(true)
	s.setHealth(healthpb.HealthCheckResponse_NOT_SERVING)
	s.log.Info("stopping: health is NOT_SERVING", "announce", cfg.Shutdown.Announce, "drain", cfg.Shutdown.Drain)
	time.Sleep(cfg.Shutdown.Announce)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.grpc.GracefulStop()
	}()
	deadline := time.Now().Add(cfg.Shutdown.Drain)
	// A transaction is over when its outcome is known. A lean one's ext_proc stream ends with the decision, long before: what
	// Envoy logs when nobody listens is lost, and its outcome would be unknown.
	for (s.active.Load() > 0 || s.receipts.Stats().Pending > 0) && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	// Envoy never ends an access log stream: after the last request they get one flush more, then they are ended.
	time.Sleep(min(2*cfg.Envoy.AccessLogFlush, max(time.Until(deadline), 0)))
	s.accessLog.Drain()
	select {
	case <-done:
	case <-time.After(max(time.Until(deadline), time.Second)):
	}
	s.grpc.Stop()
	<-done
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	for _, srv := range s.http {
		if srv.Shutdown(ctx) != nil {
			srv.Close()
		}
	}
}

// watchHealth shows in gRPC health what /readyz says.
func (s *Server) watchHealth(ctx context.Context) error {
	tick := time.NewTicker(healthPoll)
	defer tick.Stop()
	for {
		st := healthpb.HealthCheckResponse_SERVING
		if s.Ready() != nil {
			st = healthpb.HealthCheckResponse_NOT_SERVING
		}
		s.setHealth(st)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// closeAll closes what New opened, in reverse order.
func (s *Server) closeAll(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopWait)
	defer cancel()
	var errs []error
	for _, ln := range s.listeners {
		if err := ln.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	if s.receipts != nil {
		errs = append(errs, s.receipts.Close(ctx))
	}
	if s.keys != nil {
		errs = append(errs, s.keys.close())
	}
	if s.identity != nil {
		errs = append(errs, s.identity.Close())
	}
	if s.metrics != nil {
		errs = append(errs, s.metrics.Shutdown(ctx))
	}
	return errors.Join(errs...)
}
