// Package envoy is the root of everything that knows Envoy's own configuration language; it holds no code.
//
// The packages below it turn knhk's view of traffic into Envoy resources. They promise to be pure: no clock, disk or
// network, the same input gives the same bytes. They may import api and each other, nothing else of this module.
// bootstrap writes a complete static configuration for an Envoy beside knhk.
package envoy
