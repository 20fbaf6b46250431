package fault

// failOpen: the same on routes with on_receipt_failure ALLOW: what passed is counted.
var failOpen = []Fault{}
