package fault

// restart: orderly restarts and reloads under load, two replicas behind one Envoy, in lean and in full capture at once.
var restart = []Fault{
	{"restart/sigterm-one", "SIGTERM of one of two replicas under load, started again: no request fails, every receipt is whole", 2, 20},
	{"restart/rolling", "both replicas one after the other under load: no request fails, every receipt is whole", 2, 20},
	{"restart/reload", "100 reloads of a changed configuration under load: no request fails, every receipt is whole", 1, 5},
}
