// Package replicas tests two knhk behind one real Envoy: that each hears the outcomes of its own decisions, and that restarts of
// one or both and reloads of their configuration cost no request and no receipt while requests keep coming.
//
// It promises nothing about machines, only about processes: both replicas stand on this one. Its tests are lines of e2e/fault.
package replicas
