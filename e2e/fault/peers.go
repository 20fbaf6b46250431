package fault

// peers: hostile peers of the gRPC port. In each: no good request fails, its p99 stays under twice the usual (or 5 ms more; judged in
// the full run alone), peak RSS under 1 GiB, goroutines as many as before.
var peers = []Fault{
	{"peers/mute-streams", "1,800 streams without a message, on both services: no good request fails, p99, peak RSS and goroutines within bounds", 1, 5},
	{"peers/idle-streams", "10,000 streams without a message on 20 connections: the same", 1, 5},
	{"peers/rapid-reset", "5,000 pairs of HEADERS and RST_STREAM: the same", 1, 5},
	{"peers/one-byte-frames", "50 messages in 905 DATA frames of one byte, each 100 bytes short: the same", 1, 5},
	{"peers/unfinished", "1,600 messages of 256 KiB on 8 connections, each without its last byte: the same, and the connections are ended", 1, 5},
	{"peers/unfinished-bytes", "400,000 DATA frames of one byte in 150 unfinished messages: the same", 1, 5},
	{"peers/oversized", "length prefixes of 4 GiB and 16 MiB, endless CONTINUATION, finished header lists of 1 MiB: the same", 1, 5},
	{"peers/half-preface", "500 connections that never finish their preface: the same, and a newcomer is served", 1, 5},
	{"peers/control-floods", "100,000 PING and 10,000 SETTINGS by peers that read nothing: the same", 1, 5},
	{"peers/slow-readers", "400 streams with a window of 0 and 60 or 2,000 empty messages, by a peer that reads nothing: the same", 1, 5},
	{"peers/garbage", "300 messages that are no protobuf, a third of them said to be gzip: the same", 1, 5},
	{"peers/silence", "a connection with 100 streams that stay silent: it is closed after 15 s", 1, 1},
}
