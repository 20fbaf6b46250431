// Package access says who may do what on knhk's listeners.
//
// Who somebody is comes from the connection alone: the SPIFFE ID of a certificate that was verified in a TLS handshake, or the user
// that the kernel names at the other end of a unix socket. No header and no network address is ever believed. What a role may do
// stands in one table, rules.go, by listener and path; what is not in it nobody may do, so that a new method is closed until somebody
// decides who needs it. Roles are looked up for each call, so that a reload that takes one away holds at once, for open connections
// too; what of a call is still running then is ended.
//
// It does no TLS and listens nowhere: package server puts its interceptors and handlers on the listeners.
package access
