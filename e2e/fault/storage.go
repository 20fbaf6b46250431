package fault

// storage: power loss, torn writes, damage, full and failing disks.
var storage = []Fault{
	{
		Name: "storage/power-loss", Test: 5, Full: 500,
		What: "kill -9 under load, then any part of what was not synced is gone, sectors torn and reordered; in a third of the rounds again " +
			"during recovery: every W1 id a client received is there once, lost R1 ordinals are declared, no fork, old bundles verify",
	},
	{
		Name: "storage/eio", Test: 5, Full: 620,
		What: "EIO at each call that writes, syncs or renames, from the first start to the last, in turn: it goes on, refuses until " +
			"restarted (and signs nothing), or dies (Pebble's last word); then nothing acknowledged is gone, fsck finds nothing",
	},
	{
		Name: "storage/enospc", Test: 4, Full: 620,
		What: "the same with ENOSPC; requests are refused while there is no space, and admitted when there is, or after a restart",
	},
	{
		Name: "storage/bit-flip", Test: 10, Full: 1500,
		What: "one bit flipped in one file of state_dir or the keys, after kill -9 or an orderly end: knhk does not start and says why, or " +
			"fsck or reading names it, or every receipt is there and verifies",
	},
	{
		Name: "storage/tail-cut", Test: 6, Full: 3000,
		What: "power loss that cuts the write-ahead log at each byte of the last batch not synced: every W1 id a client received is there, " +
			"what was cut is declared",
	},
}
