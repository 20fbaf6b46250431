package azure

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/knhk/sidecar/crypto/keys"
)

var errNoCredential = errors.New("no credential in the environment: set AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET or " +
	"AZURE_CLIENT_CERTIFICATE_PATH or AZURE_FEDERATED_TOKEN_FILE, or write token-source=file:/PATH or imds=true in the URI")

// credential chooses one credential, by what the URI and the environment name; it makes no call. The token-source is the file
// of a federated token (workload identity), which is read anew when it is needed; AZURE_TENANT_ID and AZURE_CLIENT_ID say whose.
// The metadata address is asked when imds=true says so, and then nothing else is.
func credential(u keys.URI, o azcore.ClientOptions) (azcore.TokenCredential, error) {
	federated := os.Getenv("AZURE_FEDERATED_TOKEN_FILE")
	if u.TokenSource != "" {
		federated = strings.TrimPrefix(u.TokenSource, "file:")
	}
	var c azcore.TokenCredential
	var err error
	switch {
	case u.IMDS:
		mo := &azidentity.ManagedIdentityCredentialOptions{ClientOptions: o}
		if id := os.Getenv("AZURE_CLIENT_ID"); id != "" {
			mo.ID = azidentity.ClientID(id)
		}
		c, err = azidentity.NewManagedIdentityCredential(mo)
	case federated != "":
		c, err = azidentity.NewWorkloadIdentityCredential(&azidentity.WorkloadIdentityCredentialOptions{
			ClientOptions: o, TokenFilePath: federated,
		})
	case os.Getenv("AZURE_CLIENT_SECRET") != "" || os.Getenv("AZURE_CLIENT_CERTIFICATE_PATH") != "":
		c, err = azidentity.NewEnvironmentCredential(&azidentity.EnvironmentCredentialOptions{ClientOptions: o})
	default:
		return nil, errNoCredential
	}
	if err != nil {
		return nil, fmt.Errorf("credential: %w", err)
	}
	return c, nil
}

// loopback is the credential of an endpoint that is spoken with in plain text: a stand-in for the service on this machine, which
// must not be shown a real one.
type loopback struct{}

func (loopback) GetToken(context.Context, policy.TokenRequestOptions) (azcore.AccessToken, error) {
	return azcore.AccessToken{Token: "loopback", ExpiresOn: time.Now().Add(time.Hour)}, nil
}

// plain speaks http where the client wrote https: the client shows no credential to an http URL, whoever it belongs to.
type plain struct{ *http.Client }

func (p plain) Do(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.URL.Scheme = "http"
	return p.Client.Do(r)
}
