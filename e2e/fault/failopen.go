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
}
