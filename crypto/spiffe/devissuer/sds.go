package devissuer

import (
	"cmp"
	"encoding/pem"
	"fmt"
	"slices"
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Names of secrets that stand for what the caller has, as a SPIRE agent has them.
const (
	ownSVID    = "default" // the caller's SVID
	ownBundle  = "ROOTCA"  // the bundle of its trust domain
	allBundles = "ALL"     // those of all trust domains, each for its own IDs
)

// secretService is Envoy's SDS, state of the world, as a SPIRE agent serves it. Delta and single fetches are answered with Unimplemented.
type secretService struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
	i *Issuer
}

// StreamSecrets answers the newest request of the stream, and again whenever the caller's SVID is renewed.
func (d *secretService) StreamSecrets(stream secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	ctx := stream.Context()
	id, err := d.i.caller(ctx)
	if err != nil {
		return err
	}
	requests := make(chan *discoveryv3.DiscoveryRequest)
	go func() { // ends with the stream
		defer close(requests)
		for {
			r, err := stream.Recv()
			if err != nil {
				return
			}
			select {
			case requests <- r:
			case <-ctx.Done():
				return
			}
		}
	}()
	var (
		names   []string
		typeURL string
		sent    *svid
		version int
	)
	for {
		s, changed := d.i.book.get(id)
		if len(names) > 0 && s != sent {
			resources, err := d.i.secrets(s, names)
			if err != nil {
				d.i.log.WarnContext(ctx, "refused: secrets that the caller may not have", "id", id.String(), "error", err)
				return err
			}
			version++
			v := strconv.Itoa(version)
			if err := stream.Send(&discoveryv3.DiscoveryResponse{VersionInfo: v, Nonce: v, TypeUrl: typeURL, Resources: resources}); err != nil {
				return err
			}
			sent = s
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		case r, open := <-requests:
			if !open {
				return nil
			}
			if r.GetErrorDetail() != nil {
				d.i.log.ErrorContext(ctx, "Envoy refuses secrets", "id", id.String(), "names", r.GetResourceNames(), "error", r.GetErrorDetail().GetMessage())
			}
			if n := r.GetResponseNonce(); n != "" && n != strconv.Itoa(version) {
				continue // to an answer that another one has followed
			}
			// What is asked for anew is answered; an acknowledgement is not.
			if next := slices.Sorted(slices.Values(r.GetResourceNames())); !slices.Equal(next, names) {
				names, typeURL, sent = next, r.GetTypeUrl(), nil
			}
		}
	}
}

// secrets makes what was asked for, or refuses all of it.
func (i *Issuer) secrets(s *svid, names []string) ([]*anypb.Any, error) {
	var out []*anypb.Any
	for _, name := range names {
		secret := &tlsv3.Secret{Name: name}
		switch td := s.id.TrustDomain(); {
		case name == s.id.String(), name == ownSVID:
			secret.Type = &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
				CertificateChain: inline(pemOf("CERTIFICATE", s.cert)), PrivateKey: inline(pemOf("PRIVATE KEY", s.key)),
			}}
		case name == allBundles:
			all := make([]spiffeid.TrustDomain, 0, len(i.book.authorities))
			for td := range i.book.authorities {
				all = append(all, td)
			}
			slices.SortFunc(all, func(a, b spiffeid.TrustDomain) int { return cmp.Compare(a.Name(), b.Name()) })
			v, err := i.validation(all...)
			if err != nil {
				return nil, err
			}
			secret.Type = v
		default:
			if name != ownBundle {
				var err error
				if td, err = spiffeid.TrustDomainFromString(name); err != nil || !strings.HasPrefix(name, "spiffe://") || td.IDString() != name || i.book.authorities[td] == nil {
					return nil, status.Errorf(codes.InvalidArgument, "workload is not authorized for the requested identities [%q]", name)
				}
			}
			v, err := i.validation(td)
			if err != nil {
				return nil, err
			}
			secret.Type = v
		}
		a, err := pack(secret)
		if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	return out, nil
}

// validation has Envoy's SPIFFE validator believe each authority about IDs of its own trust domain only. SPIRE sends the same, for one
// trust domain too.
func (i *Issuer) validation(tds ...spiffeid.TrustDomain) (*tlsv3.Secret_ValidationContext, error) {
	cfg := &tlsv3.SPIFFECertValidatorConfig{}
	for _, td := range tds {
		cfg.TrustDomains = append(cfg.TrustDomains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{
			Name: td.Name(), TrustBundle: inline(pemOf("CERTIFICATE", i.book.authorities[td].cert.Raw)),
		})
	}
	a, err := pack(cfg)
	return &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
		CustomValidatorConfig: &corev3.TypedExtensionConfig{Name: "envoy.tls.cert_validator.spiffe", TypedConfig: a},
	}}, err
}

func pack(m proto.Message) (*anypb.Any, error) {
	a, err := anypb.New(m)
	if err != nil {
		return nil, fmt.Errorf("encode a secret: %w", err)
	}
	return a, nil
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}
