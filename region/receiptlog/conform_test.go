package receiptlog

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/torchwood"
	fnote "github.com/transparency-dev/formats/note"
	"github.com/transparency-dev/tessera/client"
	"github.com/transparency-dev/tessera/fsck"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/region/wal"
)

// TestForeignTools shows that tools which know nothing of us accept the log, across three changes of the daily key, with nothing
// but the identity key: Tessera's fsck, a torchwood client and policy, and transparency-dev's witness. The inner path of a receipt
// is checked with x/mod's own tlog arithmetic.
func TestForeignTools(t *testing.T) {
	f := newFixture(t)
	l := f.open()
	w := startWitness(t, l.IdentityVKey())
	policy, err := torchwood.ParsePolicy(l.Policy())
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	keysSeen := map[string]bool{}
	for change := range 4 {
		if change > 0 {
			if _, err := l.RotateKey(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		vkey, _ := l.DailyKey()
		keysSeen[vkey] = true
		for i := range 10 {
			id := f.decide(wal.Durable, fmt.Sprintf("%d-%d", change, i))
			f.outcome(id, 200)
			ids = append(ids, id)
		}
		v := f.bundle(ids[len(ids)-1], 2)
		if v.Keys[0].Key != vkey {
			t.Errorf("change %d: checkpoint signed by %s, key in force is %s", change, v.Keys[0].Key, vkey)
		}
		raw := l.Checkpoint()
		if _, n, err := torchwood.VerifyCheckpoint(raw, policy); err != nil {
			t.Errorf("change %d: torchwood refuses the checkpoint: %v", change, err)
		} else if len(n.Sigs) != 1 || len(n.UnverifiedSigs) != 1 {
			t.Errorf("change %d: %d known and %d unknown signatures, want the identity's and the daily key's", change, len(n.Sigs), len(n.UnverifiedSigs))
		}
		w.cosign(t, l, raw)
	}
	if len(keysSeen) != 4 {
		t.Errorf("%d daily keys, want 4", len(keysSeen))
	}
	// Bundles of before verify under the checkpoint of now.
	for _, id := range ids {
		f.bundle(id, 2)
	}
	innerPath(t, f, ids[3])
	f.close()
	f.fsckClean()

	dir := filepath.Join(f.cfg.Dir, "log")
	tree := client.FileFetcher{Root: dir}
	verifier, err := note.NewVerifier(l.IdentityVKey())
	if err != nil {
		t.Fatal(err)
	}
	if err := fsck.New(l.Origin(), verifier, tree, hashBundle, fsck.Opts{}).Check(t.Context()); err != nil {
		t.Errorf("tessera's fsck: %v", err)
	}
	torchwoodReads(t, dir, policy)
}

// torchwoodReads has torchwood's client read every entry of the log under its checkpoint.
func torchwoodReads(t *testing.T, dir string, policy torchwood.Policy) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(dir, "checkpoint"))
	if err != nil {
		t.Fatal(err)
	}
	cp, _, err := torchwood.VerifyCheckpoint(raw, policy)
	if err != nil {
		t.Fatal(err)
	}
	tiles, err := torchwood.NewTileFS(os.DirFS(dir))
	if err != nil {
		t.Fatal(err)
	}
	c, err := torchwood.NewClient(tiles)
	if err != nil {
		t.Fatal(err)
	}
	var headers, statements int64
	for i, entry := range c.AllEntries(t.Context(), cp.Tree, 0) {
		switch {
		case bytes.HasPrefix(entry, []byte(receipt.HeaderPrefix)):
			headers++
		case bytes.HasPrefix(entry, []byte(receipt.KeyPrefix)):
			statements++
		default:
			t.Errorf("entry %d is %q", i, entry)
		}
	}
	if err := c.Err(); err != nil {
		t.Errorf("torchwood's client: %v", err)
	}
	if headers+statements != cp.N || statements != 4 {
		t.Errorf("torchwood read %d headers and %d key statements of %d entries", headers, statements, cp.N)
	}
}

// innerPath checks a record's path with x/mod's arithmetic alone.
func innerPath(t *testing.T, f *fixture, id string) {
	t.Helper()
	raw, err := f.log.Bundle(t.Context(), id, false)
	if err != nil {
		t.Fatal(err)
	}
	b, err := receipt.ParseBundle(raw)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range b.Records {
		h, err := receipt.ParseHeader(b.Headers[r.Header].Leaf)
		if err != nil {
			t.Fatal(err)
		}
		proof := make(tlog.RecordProof, len(r.Path))
		for i, p := range r.Path {
			proof[i] = tlog.Hash(p)
		}
		if err := tlog.CheckRecord(proof, int64(r.Size), tlog.Hash(h.Root), int64(r.Index), tlog.RecordHash(r.Leaf)); err != nil {
			t.Errorf("x/mod: %v", err)
		}
	}
}

// witnessProcess is transparency-dev's witness, built from e2e/tools/witness.
type witnessProcess struct {
	url      string
	verifier note.Verifier
	size     int64
}

func startWitness(t *testing.T, logKey string) *witnessProcess {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "witness")
	build := exec.Command("go", "build", "-o", bin, ".")
	build.Dir = "../../e2e/tools/witness"
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the witness: %v\n%s", err, out)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, bin, "-log", logKey)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	fields := strings.Fields(line)
	if err != nil || len(fields) != 3 {
		t.Fatalf("witness said %q: %v", line, err)
	}
	w := &witnessProcess{url: "http://" + fields[1] + "/add-checkpoint"}
	if w.verifier, err = fnote.NewVerifierForCosignatureV1(fields[2]); err != nil {
		t.Fatal(err)
	}
	return w
}

// cosign submits a checkpoint with a consistency proof, as C2SP's tlog-witness says, and checks the cosignature.
func (w *witnessProcess) cosign(t *testing.T, l *Log, raw []byte) {
	t.Helper()
	cp, err := parseCheckpoint(raw)
	if err != nil {
		t.Fatal(err)
	}
	var body bytes.Buffer
	fmt.Fprintf(&body, "old %d\n", w.size)
	if w.size > 0 && uint64(w.size) < cp.size {
		tree := tlog.Tree{N: int64(cp.size), Hash: tlog.Hash(cp.root)}
		proof, err := tlog.ProveTree(int64(cp.size), w.size, torchwood.TileHashReaderWithContext(t.Context(), tree, tileReader{l.reader}))
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range proof {
			fmt.Fprintln(&body, base64.StdEncoding.EncodeToString(h[:]))
		}
	}
	body.WriteByte('\n')
	body.Write(raw)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.url, &body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	sig, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("the witness answers %s: %s %v", resp.Status, sig, err)
	}
	if _, err := note.Open(append(bytes.Clone(raw), sig...), note.VerifierList(w.verifier)); err != nil {
		t.Errorf("the witness's cosignature: %v", err)
	}
	w.size = int64(cp.size)
}
