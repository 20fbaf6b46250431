// Package tokens holds the tests of an HSM token that goes away and comes back under load, with the real Envoy and SoftHSM. It promises
// nothing to others and exports nothing.
//
// Whatever the token does, every request that reaches the upstream has its decision in the log; records stay unsigned for at most
// max_unsigned while requests are admitted, then requests are refused; when the token is back everything is signed, and knhk has no
// more goroutines, threads and open files than before. The daily key is changed in between, and changes are asked for while there is
// no token. In the full fault run knhk is built with the race detector, and must sign again within five seconds. The tests skip
// without an Envoy or SoftHSM.
package tokens
