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
