package fault

// failOpen: the same on routes with on_receipt_failure ALLOW. What must hold in each: requests pass, and what passed is counted
// exactly by knhk, by Envoy or by both; where knhk cannot know, it names the interval.
var failOpen = []Fault{
	{"fail-open/service-dead", "pass; Envoy's failure_mode_allowed is exact, knhk names the interval", 2, 6},
	{"fail-open/service-hung", "pass after message_timeout; access log and Envoy's failure_mode_allowed are exact", 2, 6},
	{"fail-open/killed-after-admitting", "pass; Envoy's failure_mode_allowed is exact, knhk names the interval", 2, 10},
	{"fail-open/garbage", "pass; Envoy's failure_mode_allowed is exact, knhk names the interval", 2, 6},
	{"fail-open/grpc-error", "pass; Envoy's failure_mode_allowed is exact, knhk names the interval", 2, 6},
	{"fail-open/missing-cluster", "pass; Envoy's failure_mode_allowed is exact, knhk names the interval", 2, 4},
	{"fail-open/socket-without-permission", "pass; Envoy's failure_mode_allowed is exact, knhk names the interval", 2, 6},
	{"fail-open/log-full", "pass; service and access log are exact", 2, 6},
	{"fail-open/disk-full", "pass; service and access log are exact", 2, 6},
	{"fail-open/log-read-only", "pass once refused; service and access log are exact", 2, 6},
	{"fail-open/failed-fsync", "pass; service and access log, or Envoy if knhk has ended, are exact", 2, 8},
	{"fail-open/token-away", "pass once refused; service and access log are exact", 2, 6},
}

// authzOpen: the same with ext_authz instead of ext_proc, all routes letting pass.
var authzOpen = []Fault{
	{"authz-open/service-dead", "ext_authz: pass; Envoy's failure_mode_allowed is exact, knhk names the interval", 1, 3},
	{"authz-open/service-hung", "ext_authz: pass after message_timeout; access log and Envoy's failure_mode_allowed are exact", 1, 3},
	{"authz-open/killed-after-admitting", "ext_authz: pass; Envoy's failure_mode_allowed is exact, knhk names the interval", 1, 3},
	{"authz-open/garbage", "ext_authz: pass; Envoy's failure_mode_allowed is exact, knhk names the interval", 1, 3},
	{"authz-open/grpc-error", "ext_authz: pass; Envoy's failure_mode_allowed is exact, knhk names the interval", 1, 3},
	{"authz-open/missing-cluster", "ext_authz: pass; Envoy's failure_mode_allowed is exact, knhk names the interval", 1, 3},
	{"authz-open/socket-without-permission", "ext_authz: pass; Envoy's failure_mode_allowed is exact, knhk names the interval", 1, 3},
	{"authz-open/log-full", "ext_authz: pass; service and access log are exact", 0, 3}, // waits for 45 s
	{"authz-open/disk-full", "ext_authz: pass; service and access log are exact", 1, 3},
	{"authz-open/log-read-only", "ext_authz: pass once refused; service and access log are exact", 1, 3},
	{"authz-open/failed-fsync", "ext_authz: pass; service and access log, or Envoy if knhk has ended, are exact", 1, 3},
	{"authz-open/token-away", "ext_authz: pass once refused; service and access log are exact", 1, 3},
}
