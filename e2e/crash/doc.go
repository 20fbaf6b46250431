// Package crash holds the tests of the death of the process: kill -9 of the knhk program under load, with the real Envoy and a real
// upstream. It exports nothing.
//
// Two journals are kept outside of knhk, one of every response that a client received and one of every request that the upstream
// saw. After each crash they are held against the receipts that knhk lists and against the log as anybody can read it from its
// public tiles; in the end against an export of everything, `knhk verify` and `knhk fsck`. What is read uses the admin API, the
// tiles and crypto/receipt only. The loss of a machine cannot be had this way: region/receiptlog's TestMachineCrash simulates it.
// The tests skip without an Envoy and fail without one under CI=true.
package crash
