//go:build !cgo

package hsm

import (
	"strings"
	"testing"
)

func TestOpenWithoutCgo(t *testing.T) {
	if s, err := Open(t.Context(), Config{}); s != nil || err == nil || !strings.Contains(err.Error(), "CGO_ENABLED=1") {
		t.Errorf("Open = %v, %v; want an error that says how to build PKCS#11 in", s, err)
	}
}
