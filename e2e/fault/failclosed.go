package fault

// failClosed: what happens to a request when knhk cannot answer, on routes that deny.
var failClosed = []Fault{}
