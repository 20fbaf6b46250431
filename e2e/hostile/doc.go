// Package hostile holds the tests of knhk's gRPC port against peers that are not Envoy: they attack it with bare HTTP/2 frames
// while a good client goes on through the real Envoy. It promises nothing to others and exports nothing.
//
// Each attack must be seen to have happened by the attacker's own counters and what the server said to it. Quiet phases and attacks
// take turns. Under attack no good request may fail, and in the full fault run (`make fault`) the median of the good client's p99 may be at most
// twice that of the quiet phases, or 5 ms more; if it is not after three phases of each, nine are judged together. `make test` shows
// the p99 and does not judge it: it must pass on a machine that others keep busy. The most that knhk ever held resident must
// stay under 1 GiB: the 586 MiB that server/guard.go lets peers take at worst, beside what knhk needs itself. Afterwards the
// goroutines must be as many as before. Attacks are paced so that this process, which is also the good client and the upstream,
// takes at most half a core: who computes on all cores of the attacked machine slows everybody, whatever knhk does. The tests skip
// without an Envoy.
package hostile
