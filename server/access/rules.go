package access

import (
	"path"
	"strings"
)

// Listener names one of knhk's listeners, as in knhk.yaml; Control is the socket in the state directory.
type Listener string

// The listeners on which somebody has to be somebody. The probes listener is for anyone and has no rules: it serves /livez and /readyz
// and nothing else.
const (
	OnEnvoy   Listener = "envoy"
	OnAdmin   Listener = "admin"
	OnTiles   Listener = "tiles"
	OnControl Listener = "control"
)

// rules is the one table of who may do what: by listener and gRPC method, Connect procedure or HTTP path. A path that ends in "/" stands
// for everything below it. What is not here nobody may do.
var rules = map[Listener]map[string]Role{
	OnEnvoy: {
		"/envoy.service.ext_proc.v3.ExternalProcessor/Process":          Envoy,
		"/envoy.service.auth.v3.Authorization/Check":                    Envoy,
		"/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs": Envoy,
		"/grpc.health.v1.Health/Check":                                  Envoy,
		"/grpc.health.v1.Health/Watch":                                  Envoy,
		"/grpc.health.v1.Health/List":                                   Envoy,
	},
	OnAdmin: {
		"/knhk.admin.v1.ReceiptService/Get":    Operator | Auditor,
		"/knhk.admin.v1.ReceiptService/List":   Operator | Auditor,
		"/knhk.admin.v1.ReceiptService/Export": Operator | Auditor,
		"/knhk.admin.v1.ReceiptService/Tail":   Operator | Auditor,
		"/knhk.admin.v1.ReceiptService/Status": Operator | Auditor,
		"/policy":                              Operator | Auditor,
		"/keys":                                Operator | Auditor,
		"/jwks.json":                           Operator | Auditor,
		"/revocations":                         Operator | Auditor,
		"/metrics":                             Operator | Auditor,
		"/livez":                               Operator | Auditor,
		"/readyz":                              Operator | Auditor,
		// Profiles show what is in memory, and take processor time.
		"/debug/pprof/": Operator,
	},
	OnTiles: {
		"/checkpoint": Operator | Auditor | Peer,
		"/tile/":      Operator | Auditor | Peer,
	},
	// The socket itself lets in root and the user that knhk runs as only, who have every role.
	OnControl: {
		"/knhk.admin.v1.KeyService/List":   Operator,
		"/knhk.admin.v1.KeyService/Rotate": Operator,
		"/knhk.admin.v1.KeyService/Revoke": Operator,
		"/knhk.admin.v1.KeyService/Seal":   Operator,
	},
}

// Allowed gives the roles of which one is enough to call method, a gRPC method, Connect procedure or HTTP path, on a listener. Without
// a rule it is none.
func Allowed(on Listener, method string) Role {
	table := rules[on]
	if role, ok := table[method]; ok {
		return role
	}
	// What routes the call may clean the path first, and so reach something else.
	if path.Clean(method) != strings.TrimSuffix(method, "/") {
		return 0
	}
	for i := strings.LastIndexByte(method, '/'); i > 0; i = strings.LastIndexByte(method[:i], '/') {
		if role, ok := table[method[:i+1]]; ok {
			return role
		}
	}
	return 0
}

// Any gives the roles that may do something on a listener: whoever has none of them need not be let in.
func Any(on Listener) (any Role) {
	for _, role := range rules[on] {
		any |= role
	}
	return any
}
