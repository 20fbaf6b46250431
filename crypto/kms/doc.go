// Package kms is what the stores of keys in a key service share: Google Cloud KMS, AWS KMS, Azure Key Vault and Vault's transit
// engine each have a package below this one, which tells this package's Store what that service can do (Backend). It knows
// nothing about any of them.
//
// Store promises what keys.Store does, and: every call ends in time, whatever the service does (Config.Timeout), with a bounded
// number of calls under way and in the queue; a service that is away or throttles is not knocked at by every caller (a circuit
// breaker, as in crypto/hsm); a refused credential is tried again after a minute, not at each call; a version is proven by a
// signature when it is made; no signature is returned that does not verify in pure Go under the version's public key, so that
// neither the service nor whoever stands between can slip in another key; and what a version signed can be verified after
// the service has forgotten it, because public keys are kept in an Archive.
//
// It does not promise that the service keeps what it is trusted with: who administers it can disable and destroy keys, and can
// sign with them. State is never cached: a version that somebody disabled refuses at the next call.
//
// Packages gcp, aws, azure and vault and the server use it. Verification never does.
package kms
