// Package failclosed holds the tests of what becomes of a request when knhk cannot answer or cannot record: with the real Envoy, the
// configuration that `knhk bootstrap` writes and one fault at a time. On routes that deny, no request reaches the upstream
// without a decision record; on routes with on_receipt_failure ALLOW it passes, and what passed is counted, or the interval in
// which nobody could count is named. It exports nothing.
//
// The faults stand in e2e/fault (fail-closed/... and fail-open/...). Each test shows by something other than knhk that its fault
// has happened, logs a row of the README's matrix, compares the upstream's journal with every exported receipt and audits
// the state directory. The tests skip without an Envoy and fail without one under CI=true; some need root.
package failclosed
