package fault

// peers: hostile peers of the gRPC port.
var peers = []Fault{}
