package fault

// crash: the death of the process under load.
var crash = []Fault{}
