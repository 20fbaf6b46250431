// Package region is the root of what keeps records safe and spreads them: the write-ahead log (wal), blocks and the
// transparency log built from it (receiptlog), and what regions promise each other. It holds no code of its own.
//
// Packages below it may import crypto, policy and api; they never import server or envoy.
package region
