package devissuer

import (
	"context"
	"path/filepath"
	"strings"
	"testing"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	grpcstatus "google.golang.org/grpc/status"
)

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

func sdsClient(t *testing.T, socket string) secretv3.SecretDiscoveryServiceClient {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return secretv3.NewSecretDiscoveryServiceClient(conn)
}

// unpack returns the secrets of an answer by name.
func unpack(t *testing.T, r *discoveryv3.DiscoveryResponse) map[string]*tlsv3.Secret {
	t.Helper()
	out := map[string]*tlsv3.Secret{}
	for _, a := range r.GetResources() {
		s := &tlsv3.Secret{}
		if err := a.UnmarshalTo(s); err != nil {
			t.Fatal(err)
		}
		out[s.GetName()] = s
	}
	return out
}

// trusted are the trust domains that a validation context has authorities for.
func trusted(t *testing.T, s *tlsv3.Secret) (out []string) {
	t.Helper()
	v := &tlsv3.SPIFFECertValidatorConfig{}
	if err := s.GetValidationContext().GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(v); err != nil {
		t.Fatal(err)
	}
	for _, td := range v.GetTrustDomains() {
		if !strings.HasPrefix(string(td.GetTrustBundle().GetInlineBytes()), "-----BEGIN CERTIFICATE-----") {
			t.Errorf("%s has no authority", td.GetName())
		}
		out = append(out, td.GetName())
	}
	return out
}

func TestSDS(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	socket, log := run(t, Config{Programs: []Program{{self(t), alice}}, Directories: []Directory{{filepath.Join(place(t), "bob"), bob}}, TTL: MinTTL})
	client := sdsClient(t, socket)
	stream, err := client.StreamSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	names := []string{alice.String(), "default", "ROOTCA", "spiffe://a.test", "spiffe://b.local", "ALL"}
	if err := stream.Send(&discoveryv3.DiscoveryRequest{ResourceNames: names, TypeUrl: secretType}); err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	got := unpack(t, first)
	if len(got) != len(names) || first.GetTypeUrl() != secretType {
		t.Fatalf("%d secrets of type %s, want %d", len(got), first.GetTypeUrl(), len(names))
	}
	for name, want := range map[string]string{"ROOTCA": "a.test", "spiffe://a.test": "a.test", "spiffe://b.local": "b.local", "ALL": "a.test b.local"} {
		if td := strings.Join(trusted(t, got[name]), " "); td != want {
			t.Errorf("%s trusts %s, want %s", name, td, want)
		}
	}
	cert := string(got["default"].GetTlsCertificate().GetCertificateChain().GetInlineBytes())
	if cert == "" || cert != string(got[alice.String()].GetTlsCertificate().GetCertificateChain().GetInlineBytes()) {
		t.Error("default is not the caller's own certificate")
	}

	// An acknowledgement is not answered; the renewal is. What Envoy refuses is in the log.
	if err := stream.Send(&discoveryv3.DiscoveryRequest{ResourceNames: names, TypeUrl: secretType, VersionInfo: first.GetVersionInfo(), ResponseNonce: first.GetNonce()}); err != nil {
		t.Fatal(err)
	}
	second, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if string(unpack(t, second)["default"].GetTlsCertificate().GetCertificateChain().GetInlineBytes()) == cert || second.GetVersionInfo() == first.GetVersionInfo() {
		t.Error("the second answer has nothing new")
	}
	if err := stream.Send(&discoveryv3.DiscoveryRequest{ResourceNames: names, TypeUrl: secretType, VersionInfo: first.GetVersionInfo(), ResponseNonce: second.GetNonce(),
		ErrorDetail: &status.Status{Message: "no such key"}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the refusal in the log", func() bool { return strings.Contains(log.String(), "no such key") })

	// Another name on the same stream is answered at once.
	for {
		if err := stream.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"ROOTCA"}, TypeUrl: secretType}); err != nil {
			t.Fatal(err)
		}
		r, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if got := unpack(t, r); len(got) == 1 && got["ROOTCA"] != nil {
			break // else a renewal of all names was under way
		}
	}
}

// Nobody gets a secret that is not his, and what is not served says so.
func TestSDSRefused(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	ask := func(client secretv3.SecretDiscoveryServiceClient, name string) error {
		stream, err := client.StreamSecrets(ctx)
		if err != nil {
			return err
		}
		if err := stream.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{name}, TypeUrl: secretType}); err != nil {
			return err
		}
		_, err = stream.Recv()
		return err
	}
	socket, _ := run(t, Config{Programs: []Program{{self(t), alice}}, Directories: []Directory{{filepath.Join(place(t), "bob"), bob}}})
	client := sdsClient(t, socket)
	for _, name := range []string{bob.String(), "spiffe://c.test", "a.test", "spiffe://a.test/", "nonsense"} {
		if err := ask(client, name); grpcstatus.Code(err) != codes.InvalidArgument {
			t.Errorf("%q: %v, want InvalidArgument", name, err)
		}
	}
	if _, err := client.FetchSecrets(ctx, &discoveryv3.DiscoveryRequest{ResourceNames: []string{"default"}}); grpcstatus.Code(err) != codes.Unimplemented {
		t.Errorf("FetchSecrets: %v", err)
	}
	delta, err := client.DeltaSecrets(ctx)
	if err == nil {
		_, err = delta.Recv()
	}
	if grpcstatus.Code(err) != codes.Unimplemented {
		t.Errorf("DeltaSecrets: %v", err)
	}
	other := filepath.Join(place(t), "other")
	copyFile(t, self(t), other)
	socket, _ = run(t, Config{Programs: []Program{{other, alice}}})
	if err := ask(sdsClient(t, socket), "default"); grpcstatus.Code(err) != codes.PermissionDenied {
		t.Errorf("a program that was not named: %v", err)
	}
}
