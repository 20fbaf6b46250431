package fault

// failClosed: what happens to a request when knhk cannot answer, on routes that deny. What must hold in each: no request reaches
// the upstream without a decision record.
var failClosed = []Fault{
	{"fail-closed/service-dead", "knhk was never started, or has ended: refused", 2, 6},
	{"fail-closed/service-hung", "frozen (SIGSTOP): refused after message_timeout; what it decides when thawed is told as too late", 2, 6},
	{"fail-closed/killed-after-admitting", "killed (SIGKILL) while the upstream works: the decision is there, its outcome unknown", 2, 10},
	{"fail-closed/garbage", "somebody at knhk's address sends messages that are none or do not fit, or does not speak HTTP/2: refused", 2, 6},
	{"fail-closed/grpc-error", "every gRPC error code for an answer: refused", 2, 6},
	{"fail-closed/missing-cluster", "Envoy's configuration has knhk's cluster under another name, or not at all: refused", 2, 4},
	{"fail-closed/socket-without-permission", "Envoy may not open knhk's unix socket: refused", 2, 6},
	{"fail-closed/log-full", "the write-ahead log is full: refused until a block is closed", 2, 6},
	{"fail-closed/disk-full", "the disk is full: refused until there is room; knhk does not start on it", 2, 6},
	{"fail-closed/log-read-only", "the state directory is read-only: durable and unsigned up to max_unsigned, then refused; does not start", 2, 6},
	{"fail-closed/failed-fsync", "an fsync of WAL or block store fails: refused, nothing signed until a restart has audited the state", 2, 8},
	{"fail-closed/token-away", "the HSM's token is gone: durable and unsigned up to max_unsigned, then refused; back: signed", 2, 6},
}

// authzClosed: the same with ext_authz instead of ext_proc, all routes denying.
var authzClosed = []Fault{
	{"authz-closed/service-dead", "ext_authz: knhk was never started, or has ended: refused", 1, 3},
	{"authz-closed/service-hung", "ext_authz: frozen (SIGSTOP): refused after message_timeout; what it decides when thawed is told as too late", 1, 3},
	{"authz-closed/killed-after-admitting", "ext_authz: killed (SIGKILL) while the upstream works: the decision is there, its outcome unknown", 1, 3},
	{"authz-closed/garbage", "ext_authz: somebody at knhk's address sends messages that are none, none at all or one that an error follows, or does not speak HTTP/2: refused", 1, 3},
	{"authz-closed/grpc-error", "ext_authz: every gRPC error code for an answer: refused", 1, 3},
	{"authz-closed/missing-cluster", "ext_authz: Envoy's configuration has knhk's cluster under another name, or not at all: refused", 1, 3},
	{"authz-closed/socket-without-permission", "ext_authz: Envoy may not open knhk's unix socket: refused", 1, 3},
	{"authz-closed/log-full", "ext_authz: the write-ahead log is full: refused until a block is closed", 1, 3},
	{"authz-closed/disk-full", "ext_authz: the disk is full: refused until there is room; knhk does not start on it", 1, 3},
	{"authz-closed/log-read-only", "ext_authz: the state directory is read-only: durable and unsigned up to max_unsigned, then refused; does not start", 1, 3},
	{"authz-closed/failed-fsync", "ext_authz: an fsync of WAL or block store fails: refused, nothing signed until a restart has audited the state", 1, 3},
	{"authz-closed/token-away", "ext_authz: the HSM's token is gone: durable and unsigned up to max_unsigned, then refused; back: signed", 1, 3},
}
