// Package extauthz holds the tests of ext_authz with the real Envoy and the knhk program: HTTP requests and TCP connections, alone and
// chained with ext_proc in either order, redirects that Envoy follows itself, bodies, header values that are no UTF-8, shadow mode. It
// exports nothing. Envoy's configuration is written by hand, as by a user who does not use `knhk bootstrap`.
//
// Each test ends with an audit, as in e2e/transactions. The tests skip without an Envoy and fail without one under CI=true.
package extauthz
