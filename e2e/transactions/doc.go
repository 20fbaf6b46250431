// Package transactions holds the tests of the whole: the real Envoy, the knhk program and an upstream, for every kind of
// transaction that the README makes a promise about. It exports nothing. What a fault does to them stands in e2e/failclosed.
//
// Each test ends with an audit: every receipt is exported and verified offline, everything is stopped, and `knhk fsck` must
// find nothing wrong with the state directory. The tests skip without an Envoy and fail without one under CI=true.
package transactions
