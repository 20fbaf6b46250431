// Package identity holds end-to-end tests of identities: what the real Envoy does with the TLS, the certificates and the filters that
// envoy/bootstrap writes; who is let in and who is not, where every program has the identity that an issuer gives it; and what renewal does to
// requests under load. The issuer is the development issuer, or with KNHK_ISSUER=spire a real SPIRE (`make test-spire`).
package identity
