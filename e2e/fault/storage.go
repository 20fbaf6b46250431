package fault

// storage: power loss, torn writes, damage, full and failing disks.
var storage = []Fault{
	{
		Name: "storage/power-loss", Test: 5, Full: 500,
		What: "kill -9 under load, then any part of what was not synced is gone, sectors torn and reordered; in a third of the rounds again " +
			"during recovery: every W1 id a client received is there once, lost R1 ordinals are declared, no fork, old bundles verify",
	},
}
