// Package crypto is the folder of everything that signs, or proves what was signed: key stores (keys, soft, hsm) and
// the receipts themselves (receipt). It holds no code.
//
// The packages below import nothing of this module but api and each other. Verification (keys, receipt) is pure Go and
// reaches no store, so an auditor builds it without C; only hsm needs cgo.
package crypto
