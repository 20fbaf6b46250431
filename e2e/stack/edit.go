package stack

import (
	"encoding/json"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/knhk/sidecar/e2e/harness"
	"github.com/knhk/sidecar/envoy/bootstrap"
)

// EditResources is a Config.EditBootstrap that changes the listeners and clusters of what `knhk bootstrap` wrote. What cannot be read or
// written again fails the test.
func EditResources(t harness.TB, change func(*bootstrapv3.Bootstrap_StaticResources)) func([]byte) []byte {
	return func(y []byte) []byte {
		out, err := editResources(y, change)
		if err != nil {
			t.Fatalf("edit the bootstrap: %v", err)
		}
		return out
	}
}

func editResources(y []byte, change func(*bootstrapv3.Bootstrap_StaticResources)) ([]byte, error) {
	var tree any
	if err := yaml.Unmarshal(y, &tree); err != nil {
		return nil, err
	}
	js, err := json.Marshal(tree)
	if err != nil {
		return nil, err
	}
	var b bootstrapv3.Bootstrap
	if err := protojson.Unmarshal(js, &b); err != nil {
		return nil, err
	}
	change(b.GetStaticResources())
	return bootstrap.YAML(&b)
}
