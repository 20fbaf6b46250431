// Package sidecars holds the tests of knhk in a chain: a workload calls through its own Envoy, mutual TLS leads to the Envoy before the
// upstream, and each of the two has a knhk with a log of its own. Then the rules of who may pass, judged by the client's certificate,
// and two filters of one Envoy that ask about the same request.
//
// Everything is real: Envoy with what `knhk bootstrap` writes, knhk, and certificates of an authority of the test. The tests skip
// without an Envoy and fail without one under CI=true. It exports nothing.
package sidecars
