package fault

// restart: orderly restarts and reloads under load.
var restart = []Fault{}
