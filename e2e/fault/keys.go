package fault

// keys: changes of the daily key, and tokens that come and go, under load.
var keys = []Fault{
	{"keys/change", "the daily key is replaced (`knhk keys rotate`, SoftHSM): no request fails, every decision has its receipt, bundles from " +
		"before, during and after verify under the first policy file; torchwood and a witness that know nothing of it accept every checkpoint", 5, 100},
	{"keys/token", "the token is removed for a while and returned, keys changed in between: every admitted request is recorded, refused once unsigned for " +
		"max_unsigned, signed again soon, no goroutine or thread left behind", 3, 100},
}
