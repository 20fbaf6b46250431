package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/knhk/sidecar/crypto/receipt/receipttest"
)

// TestForgedFiles has the program verify forged bundles, some of every field, as files: it refuses each one, and says so.
func TestForgedFiles(t *testing.T) {
	l, good := receipttest.Sample(t, "example.org/knhk/1")
	_, foreign := receipttest.Sample(t, "example.org/knhk/2")
	f, err := receipttest.NewForger(good, l.PolicyText(), foreign)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	policy := write("policy", l.PolicyText())
	data, err := good.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	files := []string{write("good", data)}
	const each = 3
	for i := range f.Fields {
		r := rand.New(rand.NewPCG(21, uint64(i)))
		for n, draws := 0, 0; n < each && draws < 100; draws++ {
			x := f.Forge(&f.Fields[i], r)
			if x.Same || x.Less || x.Bundle == nil || !bytes.Equal(x.Policy, l.PolicyText()) {
				continue
			}
			data, err := x.Bundle.Marshal()
			if err != nil {
				continue // cannot even be written
			}
			n++
			files = append(files, write(fmt.Sprintf("forged-%d-%d", i, n), data))
		}
	}
	var out bytes.Buffer
	cmd := root()
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	cmd.SetArgs(append([]string{"verify", "--policy", policy, "-o", "json"}, files...))
	if err := cmd.Execute(); err == nil {
		t.Error("forged bundles, and no error")
	}
	var report struct {
		Bundles []verifyResult `json:"bundles"`
	}
	if err := json.Unmarshal(out.Bytes(), &report); err != nil {
		t.Fatalf("%v in %.400s", err, out.Bytes())
	}
	if len(report.Bundles) != len(files) || len(files) < 200 {
		t.Fatalf("%d files, %d verdicts", len(files), len(report.Bundles))
	}
	for i, r := range report.Bundles {
		if r.OK != (i == 0) || !r.OK && r.Error == "" {
			t.Errorf("%s: %+v", files[i], r)
		}
	}
	t.Logf("%d forged files refused", len(files)-1)
}
