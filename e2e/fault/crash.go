package fault

// crash: the death of the process under load.
var crash = []Fault{
	{Name: "crash/kill-9", Test: 20, Full: 200,
		What: "kill -9 of knhk under load, at a random moment, sometimes again while it recovers or stops: every receipt that a client received " +
			"(W1; R1 too, since the machine lives) is in a block under the log exactly once, every request the upstream saw has its " +
			"decision, seq and ordinals are dense, no fork, fsck agrees, older bundles verify; meanwhile Envoy lets nothing pass"},
	{Name: "crash/restart-1m", Test: 0, Full: 3,
		What: "kill -9 under load of a knhk with 1,000,000 receipts, 100,000 of them without outcome: from exec to /readyz 200 in less than 2 s"},
}
