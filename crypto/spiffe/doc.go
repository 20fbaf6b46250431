// Package spiffe gives knhk its identity and says who is at the other end of a connection: X.509 SVIDs and bundles from the SPIFFE
// Workload API or from PEM files, and TLS configurations made of them.
//
// It promises that
//   - an SVID is taken into use only if it has the configured ID and no other, its key fits, it is valid now and an authority of its own
//     trust domain vouches for it; what replaces it is held to the same, and until it passes the last good one stays in use;
//   - an expired SVID is never given out: without one every handshake fails and Ready says why;
//   - a peer is who PeerID says only because an authority of that ID's own trust domain says so. Nothing else counts: no name, no address,
//     no authority of another domain, no resumed session;
//   - whoever allow does not let in never gets past the handshake, as a server sees it;
//   - a connection of ServerTLS or DialTLS ends when the first of both certificates expires, whatever is going on in it.
//
// It does not promise that a connection ends when a bundle loses an authority or allow changes its mind: connections are asked once, when
// they begin, so their age has to be bounded by those who serve them. It knows no revocation lists, as SPIFFE does not: SVIDs are short.
// A client has finished its handshake before the server has looked at its certificate (RFC 8446, section 2), so that a refusal shows in
// its first read. It does not keep the private key from whoever can read this process's memory.
//
// Package server calls it for its listeners, the command line for its clients. Package spiffetest has what tests need.
package spiffe
