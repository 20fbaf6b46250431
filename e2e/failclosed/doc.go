// Package failclosed holds the tests of what becomes of a request when knhk cannot answer or cannot record: with the real Envoy, the
// configuration that `knhk bootstrap` writes and one fault at a time. On routes that deny, no request reaches the upstream
// without a decision record; on routes with on_receipt_failure ALLOW it passes, and what passed is counted, or the interval in
// which nobody could count is named. It exports nothing.
//
// Each fault meets both filters by which Envoy asks: ext_proc in both captures, with routes that deny and routes that let pass side by
// side, and ext_authz, which has one answer for all routes, once with each.
//
// The faults stand in e2e/fault (fail-closed/..., fail-open/..., authz-closed/... and authz-open/...). Each test shows by something other than knhk that its fault
// has happened, logs a row of the README's matrix, compares the upstream's journal with every exported receipt and audits
// the state directory. The tests skip without an Envoy and fail without one under CI=true; some need root.
package failclosed
