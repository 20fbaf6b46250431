package fault

// peers: hostile peers of the gRPC port.
var peers = []Fault{
	{"peers/mute-streams", "streams that never speak, on both services: no good request fails, RSS under 1 GiB, goroutines as many as before", 1, 5},
	{"peers/idle-streams", "10,000 idle streams over many connections: the same", 1, 5},
	{"peers/rapid-reset", "HEADERS and RST_STREAM in bursts: the same", 1, 5},
	{"peers/one-byte-frames", "messages in DATA frames of one byte: the same", 1, 5},
	{"peers/oversized", "length prefix of 4 GiB, 16 MiB bodies, header lists of 1 MiB, endless CONTINUATION: the same", 1, 5},
	{"peers/half-preface", "connections that never finish their preface: the same", 1, 5},
	{"peers/control-floods", "floods of PING and SETTINGS by a peer that reads nothing: the same", 1, 5},
	{"peers/slow-readers", "streams with a window of 0 that ask 2,000 times each: the same", 1, 5},
	{"peers/garbage", "messages that are no protobuf, and compressed bombs: the same", 1, 5},
}
