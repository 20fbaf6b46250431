// Package rotations holds the tests of changes of the daily key under load, with the real Envoy and keys in a SoftHSM token. It
// promises nothing to others and exports nothing.
//
// The changes are asked for over the control socket while requests keep coming. Nobody who checks the log is told of them: torchwood,
// litewitness and omniwitness pin the log's identity key once, when it is new, and must accept every checkpoint that was seen across
// all changes, and every bundle, from before, during and after, must verify under the one policy file from the start. The
// tests skip without an Envoy or SoftHSM.
package rotations
