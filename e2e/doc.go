// Package e2e holds the tests that need a real Envoy; it exports nothing.
//
// The tests here promise what knhk relies on in Envoy: that the configuration of envoy/bootstrap makes it strip, forward,
// refuse and log as the services assume. They skip without an Envoy and fail without one under CI=true. harness has the
// processes, bench the measurements.
package e2e
