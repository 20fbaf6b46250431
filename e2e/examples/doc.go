// Package examples holds the tests of the directories below examples/: knhk and the real Envoy are started from the very files that are
// there, and requests are sent.
//
// Only what has to differ for tests that run beside each other is replaced: ports, the paths of SPIRE's sockets, and the paths of programs.
// Each 127.0.0.1:PORT becomes a free one, 127.0.0.1:8080 and 127.0.0.1:8443 the upstreams; /tmp/spire-server and /tmp/spire-agent
// become directories of the test; /usr/local/bin/NAME becomes the program's path. Relative paths stay: the working directory is the test's.
// That envoy.yaml is what `knhk bootstrap` writes is tested in server/knhk.
//
// With KNHK_ISSUER=spire, as `make test-spire` sets it, the SPIRE example gets its identities from a real SPIRE that its own files
// configure, else from the development issuer on the same socket.
package examples
