package transactions

import (
	"testing"

	"github.com/knhk/sidecar/e2e/audited"
	"github.com/knhk/sidecar/e2e/stack"
)

// world is a running stack that is audited when its test ends, with what the tests here do to it.
type world struct {
	*audited.World
	t *testing.T
}

// start makes a stack and starts all of it.
func start(t *testing.T, cfg stack.Config) *world {
	t.Helper()
	return &world{audited.Start(t, cfg), t}
}
