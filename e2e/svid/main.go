// Command svid is the smallest workload: it fetches its X.509 SVID from the Workload API once and prints it, with its key and all
// bundles, as JSON. End-to-end tests copy it to other paths to be other programs: issuers know programs by their path.
//
// Exit codes: 0 printed; 3 the Workload API issues nothing to this program; 1 anything else.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// SVID is what it prints; certificates and key are PEM.
type SVID struct {
	ID          string            `json:"id"`
	Certificate string            `json:"certificate"` // the chain, the leaf first
	Key         string            `json:"key"`
	Bundles     map[string]string `json:"bundles"` // by the name of the trust domain
}

func main() {
	socket := flag.String("socket", "", "address of the Workload API, unix:/path")
	wait := flag.Duration("wait", 0, "how long to ask again after a refusal")
	flag.Parse()
	out, err := fetch(context.Background(), *socket, *wait)
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(out)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "svid:", err)
		if status.Code(err) == codes.PermissionDenied {
			os.Exit(3)
		}
		os.Exit(1)
	}
}

func fetch(ctx context.Context, socket string, wait time.Duration) (*SVID, error) {
	ctx, cancel := context.WithTimeout(ctx, wait+2*time.Minute)
	defer cancel()
	var x *workloadapi.X509Context
	var err error
	for end := time.Now().Add(wait); ; time.Sleep(50 * time.Millisecond) {
		if x, err = workloadapi.FetchX509Context(ctx, workloadapi.WithAddr(socket)); err == nil {
			break
		}
		if !time.Now().Before(end) {
			return nil, err
		}
	}
	own := x.DefaultSVID()
	cert, key, err := own.Marshal()
	if err != nil {
		return nil, err
	}
	out := &SVID{ID: own.ID.String(), Certificate: string(cert), Key: string(key), Bundles: map[string]string{}}
	for _, b := range x.Bundles.Bundles() {
		pem, err := b.Marshal()
		if err != nil {
			return nil, err
		}
		out.Bundles[b.TrustDomain().Name()] = string(pem)
	}
	return out, nil
}
