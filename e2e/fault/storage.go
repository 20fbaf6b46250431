package fault

// storage: power loss, torn writes, damage, full and failing disks.
var storage = []Fault{}
