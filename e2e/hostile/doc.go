// Package hostile holds the tests of knhk's gRPC port against peers that are not Envoy: they attack it with bare HTTP/2 frames
// while a good client goes on through the real Envoy. It promises nothing to others and exports nothing.
//
// Each attack must be seen to have happened by the attacker's own counters and what the server said to it. Meanwhile no good
// request may fail and the resident memory must stay under its cap; afterwards the goroutines must be as many as before.
// The good client's p99 and knhk's CPU are figures of each row and not judged: on a shared machine they say more about the neighbours.
// The tests skip without an Envoy.
package hostile
