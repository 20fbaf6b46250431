package bootstrap

import (
	"bytes"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	configv1 "github.com/knhk/sidecar/api/knhk/config/v1"
)

const (
	// SDSCluster is the cluster of the SDS server.
	SDSCluster = "knhk-sds"

	defaultSVIDTTL  = time.Hour
	maxDrainTimeout = 5 * time.Second  // Envoy's own default
	sdsFetchTimeout = 15 * time.Second // after it Envoy starts without certificates, and refuses every connection that needs one
	secretAll       = "ALL"            // SPIRE's name for the bundles of every trust domain, each for its own IDs
	socketTLS       = "envoy.transport_sockets.tls"
	validatorSPIFFE = "envoy.tls.cert_validator.spiffe"
)

// curves are the key exchanges that are offered and taken, the best first: a hybrid with ML-KEM-768 (draft-ietf-tls-ecdhe-mlkem), so that
// traffic recorded today stays closed to the quantum computers of tomorrow.
var curves = []string{"X25519MLKEM768", "X25519", "P-256"}

// tlsFor has what every TLS context of one configuration shares.
type tlsFor struct {
	tls *configv1.EnvoyTLS
	id  spiffeid.ID // of Envoy
}

// envoyTLS reads envoy.tls; nil where Envoy has no certificate.
func envoyTLS(cfg *configv1.Config) (*tlsFor, error) {
	t := cfg.GetEnvoy().GetTls()
	if t == nil {
		return nil, nil
	}
	id, err := spiffeid.FromString(t.GetSpiffeId())
	if err != nil {
		return nil, fmt.Errorf("envoy.tls.spiffe_id %q: %w", t.GetSpiffeId(), err)
	}
	if id.Path() == "" {
		return nil, fmt.Errorf("envoy.tls.spiffe_id %q names a trust domain, not a workload", id)
	}
	if sdsSocket(cfg) == "" && t.GetFiles() == nil {
		return nil, errors.New("envoy.tls: neither sds nor files says where Envoy's certificate comes from")
	}
	return &tlsFor{tls: t, id: id}, nil
}

// sdsSocket returns the address of the SDS server, "" where there is none.
func sdsSocket(cfg *configv1.Config) string {
	t := cfg.GetEnvoy().GetTls()
	if t == nil || t.GetFiles() != nil {
		return ""
	}
	return orDefault(t.GetSds(), cfg.GetIdentity().GetWorkloadApi())
}

// sdsClusters returns the cluster of the SDS server, if there is one. Whoever listens on that socket is Envoy's identity: a unix socket alone.
func sdsClusters(cfg *configv1.Config) ([]*clusterv3.Cluster, error) {
	socket := sdsSocket(cfg)
	if socket == "" {
		return nil, nil
	}
	if !strings.HasPrefix(socket, "unix:/") {
		return nil, fmt.Errorf("envoy.tls.sds %q: want unix:/path", socket)
	}
	addr, err := anyAddress(strings.Replace(socket, "unix:///", "unix:/", 1))
	if err != nil {
		return nil, fmt.Errorf("envoy.tls.sds: %w", err)
	}
	// Its one stream stays open: a server of certificates is no replica to balance over, and needs none of them.
	c, err := cluster(cfg, SDSCluster, []*corev3.Address{addr}, true, 0)
	if err != nil {
		return nil, fmt.Errorf("cluster %s: %w", SDSCluster, err)
	}
	return []*clusterv3.Cluster{c}, nil
}

// svidTTL is how long a certificate lives.
func svidTTL(cfg *configv1.Config) time.Duration {
	return durationOr(cfg.GetIdentity().GetSvidTtl(), defaultSVIDTTL).AsDuration()
}

// lifetimes bounds what stands on one certificate. An SVID is renewed when half of its time is over, so a connection begins with half of
// it left at least, and must be gone within that: it takes no new streams after a third (connection) and a drain (GOAWAY first, the end
// after it); the streams that are then open, which Envoy lets run on, end because none lives longer than what is left (stream).
func lifetimes(cfg *configv1.Config) (connection, drain, stream time.Duration) {
	ttl := svidTTL(cfg)
	drain = min(maxDrainTimeout, ttl/24)
	return maxConnection(cfg), drain, ttl/6 - drain
}

// maxConnection is how long a connection lives, a third of a certificate where there are any.
func maxConnection(cfg *configv1.Config) time.Duration {
	d := durationOr(cfg.GetEnvoy().GetMaxConnectionDuration(), defaultMaxConnection).AsDuration()
	if cfg.GetEnvoy().GetTls() != nil {
		d = min(d, svidTTL(cfg)/3)
	}
	return d
}

// downstreamTLS is the transport socket of the listener; nil where envoy.tls.clients is empty.
func downstreamTLS(cfg *configv1.Config) (*corev3.TransportSocket, error) {
	t, err := envoyTLS(cfg)
	if err != nil || len(t.clients()) == 0 {
		return nil, err
	}
	common, err := t.common(t.clients(), "envoy.tls.clients", []string{"h2", "http/1.1"})
	if err != nil {
		return nil, err
	}
	return socket(&tlsv3.DownstreamTlsContext{
		CommonTlsContext:         common,
		RequireClientCertificate: wrapperspb.Bool(true),
		// A resumed session is not asked for its certificate again: it would outlive it.
		SessionTicketKeysType: &tlsv3.DownstreamTlsContext_DisableStatelessSessionResumption{
			DisableStatelessSessionResumption: true},
		DisableStatefulSessionResumption: true,
	})
}

// upstreamTLS is the transport socket to a server that has one of ids (the setting at field).
func upstreamTLS(cfg *configv1.Config, ids []string, field string, http2 bool) (*corev3.TransportSocket, error) {
	t, err := envoyTLS(cfg)
	if err != nil {
		return nil, err
	}
	if t == nil {
		return nil, fmt.Errorf("%s: mutual TLS needs envoy.tls: who Envoy is", field)
	}
	alpn := "http/1.1"
	if http2 {
		alpn = "h2"
	}
	common, err := t.common(ids, field, []string{alpn})
	if err != nil {
		return nil, err
	}
	return socket(&tlsv3.UpstreamTlsContext{
		CommonTlsContext: common,
		MaxSessionKeys:   wrapperspb.UInt32(0), // no resumption
	})
}

func (t *tlsFor) clients() []string {
	if t == nil {
		return nil
	}
	return t.tls.GetClients()
}

// common is the part of a TLS context that both directions have: TLS 1.3, Envoy's own certificate, and a peer that has one of ids.
func (t *tlsFor) common(ids []string, field string, alpn []string) (*tlsv3.CommonTlsContext, error) {
	matchers, domains, err := identities(ids, field)
	if err != nil {
		return nil, err
	}
	trust, err := t.trust(domains)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	return &tlsv3.CommonTlsContext{
		TlsParams: &tlsv3.TlsParameters{
			TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
			TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
			EcdhCurves:                curves,
		},
		TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{t.secret(t.id.String(), t.certificateFile())},
		ValidationContextType: &tlsv3.CommonTlsContext_CombinedValidationContext{
			CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
				DefaultValidationContext:         &tlsv3.CertificateValidationContext{MatchTypedSubjectAltNames: matchers},
				ValidationContextSdsSecretConfig: trust,
			}},
		AlpnProtocols: alpn,
	}, nil
}

// identities turns SPIFFE IDs, and patterns that end in "/*", into matchers of URI SANs, and says of which trust domains they are, sorted.
func identities(ids []string, field string) ([]*tlsv3.SubjectAltNameMatcher, []string, error) {
	var out []*tlsv3.SubjectAltNameMatcher
	var domains []string
	var errs []error
	for i, s := range ids {
		text, below := strings.CutSuffix(s, "/*")
		id, err := spiffeid.FromString(text)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("%s[%d] %q: %w", field, i, s, err))
			continue
		case !below && id.Path() == "":
			errs = append(errs, fmt.Errorf("%s[%d] %q names a trust domain, not a workload", field, i, s))
			continue
		}
		m := &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: id.String()}}
		if below {
			// With the slash: "/ns/a" must not cover "/ns/ab".
			m.MatchPattern = &matcherv3.StringMatcher_Prefix{Prefix: id.String() + "/"}
		}
		out = append(out, &tlsv3.SubjectAltNameMatcher{SanType: tlsv3.SubjectAltNameMatcher_URI, Matcher: m})
		domains = append(domains, id.TrustDomain().Name())
	}
	slices.Sort(domains)
	return out, slices.Compact(domains), errors.Join(errs...)
}

// trust names the authorities of trust domains. Several of them cannot stand in one list: each would be believed about all IDs.
func (t *tlsFor) trust(domains []string) (*tlsv3.SdsSecretConfig, error) {
	name := secretAll
	if len(domains) == 1 {
		name = "spiffe://" + domains[0]
	}
	for _, d := range domains {
		if t.tls.GetFiles() != nil && t.authorities(d) == "" {
			return nil, fmt.Errorf("envoy.tls.files has no authorities of trust domain %s: name them under federated", d)
		}
	}
	return t.secret(name, t.trustFile(domains)), nil
}

// authorities returns the PEM file of a trust domain's authorities, "" if there is none.
func (t *tlsFor) authorities(domain string) string {
	if domain == t.id.TrustDomain().Name() {
		return t.tls.GetFiles().GetCa()
	}
	for _, f := range t.tls.GetFiles().GetFederated() {
		if f.GetTrustDomain() == domain {
			return f.GetCa()
		}
	}
	return ""
}

// secret is where Envoy gets a secret: from the SDS server, or from a file with its description (see Secrets).
func (t *tlsFor) secret(name, file string) *tlsv3.SdsSecretConfig {
	src := &corev3.ConfigSource{ResourceApiVersion: corev3.ApiVersion_V3, InitialFetchTimeout: durationpb.New(sdsFetchTimeout)}
	if t.tls.GetFiles() != nil {
		src.ConfigSourceSpecifier = &corev3.ConfigSource_PathConfigSource{PathConfigSource: &corev3.PathConfigSource{Path: file}}
	} else {
		src.ConfigSourceSpecifier = &corev3.ConfigSource_ApiConfigSource{ApiConfigSource: &corev3.ApiConfigSource{
			ApiType:                   corev3.ApiConfigSource_GRPC,
			TransportApiVersion:       corev3.ApiVersion_V3,
			SetNodeOnFirstMessageOnly: true,
			GrpcServices: []*corev3.GrpcService{{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{
				EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: SDSCluster}}}},
		}}
	}
	return &tlsv3.SdsSecretConfig{Name: name, SdsConfig: src}
}

func (t *tlsFor) certificateFile() string { return t.tls.GetFiles().GetCertificate() + ".sds.yaml" }

func (t *tlsFor) trustFile(domains []string) string {
	if len(domains) == 1 {
		return t.authorities(domains[0]) + "." + domains[0] + ".sds.yaml"
	}
	return t.tls.GetFiles().GetCa() + ".all.sds.yaml"
}

// SecretFile is a file that a generated configuration names.
type SecretFile struct {
	Path string
	YAML []byte // an SDS response with one secret; it names PEM files and holds no key
}

// Secrets returns the files that Envoy reads besides the bootstrap when envoy.tls.files is set, none otherwise. Envoy reads a certificate
// again when its file is replaced, but only one that SDS has named: what stands in the bootstrap itself it reads once (seen with
// 1.40.0, watched_directory or not). So the bootstrap names these files as its SDS server, and these name the PEM files.
func Secrets(cfg *configv1.Config) ([]SecretFile, error) {
	t, err := envoyTLS(cfg)
	if err != nil {
		return nil, fmt.Errorf("bootstrap: secrets: %w", err)
	}
	files := cfg.GetEnvoy().GetTls().GetFiles()
	if t == nil || files == nil {
		return nil, nil
	}
	cert := &tlsv3.TlsCertificate{CertificateChain: fromFile(files.GetCertificate()), PrivateKey: fromFile(files.GetKey())}
	if path.Dir(files.GetCertificate()) == path.Dir(files.GetKey()) {
		// Every move into the directory counts, a swap of a symbolic link too, as Kubernetes does it.
		cert.WatchedDirectory = watch(files.GetCertificate())
	}
	secrets := map[string]*tlsv3.Secret{
		t.certificateFile(): {Name: t.id.String(), Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: cert}},
	}
	sets := [][]string{t.clients()}
	if overTLS(cfg) {
		sets = append(sets, []string{cfg.GetIdentity().GetSpiffeId()})
	}
	for _, c := range cfg.GetEnvoy().GetClusters() {
		sets = append(sets, c.GetSpiffeIds())
	}
	for _, ids := range sets {
		_, domains, err := identities(ids, "spiffe ids")
		if err != nil {
			return nil, fmt.Errorf("bootstrap: secrets: %w", err)
		}
		if len(domains) == 0 {
			continue
		}
		if secrets[t.trustFile(domains)], err = t.trustSecret(domains); err != nil {
			return nil, fmt.Errorf("bootstrap: secrets: %w", err)
		}
	}
	var out []SecretFile
	for file, s := range secrets {
		packed, err := anypb.New(s)
		if err != nil {
			return nil, fmt.Errorf("bootstrap: secret %s: %w", s.GetName(), err)
		}
		var text bytes.Buffer
		text.WriteString("# Written by `knhk bootstrap --write-secrets`. Envoy reads the files named here again when they are replaced by a rename.\n")
		if err := encodeYAML(&text, &discoveryv3.DiscoveryResponse{Resources: []*anypb.Any{packed}}); err != nil {
			return nil, fmt.Errorf("bootstrap: secret %s: %w", s.GetName(), err)
		}
		out = append(out, SecretFile{Path: file, YAML: text.Bytes()})
	}
	slices.SortFunc(out, func(a, b SecretFile) int { return strings.Compare(a.Path, b.Path) })
	return out, nil
}

// trustSecret describes the authorities of one trust domain, or of all that are known, each for its own IDs alone.
func (t *tlsFor) trustSecret(domains []string) (*tlsv3.Secret, error) {
	if len(domains) == 1 {
		ca := t.authorities(domains[0])
		return &tlsv3.Secret{Name: "spiffe://" + domains[0], Type: &tlsv3.Secret_ValidationContext{
			ValidationContext: &tlsv3.CertificateValidationContext{TrustedCa: fromFile(ca), WatchedDirectory: watch(ca)},
		}}, nil
	}
	own := t.id.TrustDomain().Name()
	v := &tlsv3.SPIFFECertValidatorConfig{TrustDomains: []*tlsv3.SPIFFECertValidatorConfig_TrustDomain{
		{Name: own, TrustBundle: fromFile(t.authorities(own))},
	}}
	for _, f := range t.tls.GetFiles().GetFederated() {
		v.TrustDomains = append(v.TrustDomains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{
			Name: f.GetTrustDomain(), TrustBundle: fromFile(f.GetCa())})
	}
	packed, err := anypb.New(v)
	if err != nil {
		return nil, err
	}
	return &tlsv3.Secret{Name: secretAll, Type: &tlsv3.Secret_ValidationContext{
		ValidationContext: &tlsv3.CertificateValidationContext{
			// The validator does not use it; but it is what Envoy watches, and when it changes the validator reads its files again.
			TrustedCa:             fromFile(t.authorities(own)),
			WatchedDirectory:      watch(t.authorities(own)),
			CustomValidatorConfig: &corev3.TypedExtensionConfig{Name: validatorSPIFFE, TypedConfig: packed},
		},
	}}, nil
}

func fromFile(name string) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_Filename{Filename: name}}
}

func watch(file string) *corev3.WatchedDirectory {
	return &corev3.WatchedDirectory{Path: path.Dir(file)}
}

func socket(m proto.Message) (*corev3.TransportSocket, error) {
	packed, err := anypb.New(m)
	if err != nil {
		return nil, fmt.Errorf("tls context: %w", err)
	}
	return &corev3.TransportSocket{Name: socketTLS, ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: packed}}, nil
}
