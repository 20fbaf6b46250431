// Command witness is transparency-dev's witness (the core of omniwitness) for one log, in memory: it pins the log's verifier key,
// checks consistency and cosigns, over C2SP's tlog-witness protocol. Tests run it to see that a foreign witness accepts our
// checkpoints.
//
// It prints "listening HOST:PORT VKEY" and serves until it is killed.
package main

import (
	"context"
	"crypto/rand"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"

	fnote "github.com/transparency-dev/formats/note"
	"github.com/transparency-dev/witness/persistence/inmemory"
	"github.com/transparency-dev/witness/witness"
	"golang.org/x/mod/sumdb/note"
)

func main() {
	vkey := flag.String("log", "", "verifier key of the log to follow")
	flag.Parse()
	if err := run(context.Background(), *vkey); err != nil {
		fmt.Fprintln(os.Stderr, "witness:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, logKey string) error {
	logVerifier, err := note.NewVerifier(logKey)
	if err != nil {
		return fmt.Errorf("log key: %w", err)
	}
	skey, vkey, err := note.GenerateKey(rand.Reader, "witness.test/w")
	if err != nil {
		return err
	}
	signer, err := fnote.NewSignerForCosignatureV1(skey)
	if err != nil {
		return err
	}
	w, err := witness.New(ctx, witness.Opts{
		Persistence: inmemory.New(), Signers: []note.Signer{signer},
		VerifierForLog: func(_ context.Context, origin string) (note.Verifier, bool, error) {
			return logVerifier, origin == logVerifier.Name(), nil
		},
	})
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Printf("listening %s %s\n", ln.Addr(), vkey)
	http.HandleFunc("POST /add-checkpoint", witness.NewHTTPHandler(w).AddCheckpoint)
	return http.Serve(ln, nil)
}
