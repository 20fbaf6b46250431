package receipt_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/receipt/receipttest"
)

const verifyPy = "../../examples/verify.py"

// python returns the interpreter; without one the test is skipped, but not where CI=true.
func python(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("python3")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("no python3 on PATH")
		}
		t.Skip("no python3 on PATH")
	}
	return path
}

// verifyInPython runs examples/verify.py and returns its lines and its exit status.
func verifyInPython(t *testing.T, policy []byte, bundles ...[]byte) (lines []string, status int) {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	args := []string{"-I", "-B", verifyPy, write("policy", policy)}
	for i, b := range bundles {
		args = append(args, write(string(rune('a'+i%26))+strings.Repeat("z", i/26), b))
	}
	cmd := exec.CommandContext(t.Context(), python(t), args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if strings.Contains(stderr.String(), "Traceback") {
		t.Fatal(stderr.String())
	}
	return strings.Split(strings.TrimSuffix(string(out), "\n"), "\n"), cmd.ProcessState.ExitCode()
}

func TestPythonAccepts(t *testing.T) {
	l, b := receipttest.Sample(t, testOrigin)
	var bundles [][]byte
	for _, change := range []func(*receipt.Bundle){
		func(*receipt.Bundle) {},
		func(b *receipt.Bundle) { b.Evidence = nil },
		func(b *receipt.Bundle) { b.Records, b.Headers = b.Records[:1], b.Headers[:1] },
		func(b *receipt.Bundle) { b.Keys = b.Keys[:1] },
	} {
		c := b.Clone()
		change(c)
		data, err := c.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		bundles = append(bundles, data)
	}
	lines, status := verifyInPython(t, l.PolicyText(), bundles...)
	if status != 0 || len(lines) != len(bundles) {
		t.Fatalf("exit status %d: %q", status, lines)
	}
	for i, line := range lines {
		if want := []string{"admit, complete", "admit, complete", "admit, pending", "admit, complete"}[i]; !strings.Contains(line, want) {
			t.Errorf("bundle %d: %s", i, line)
		}
	}
}

// TestPythonAcceptsAwkwardText has the strings that are hard to put into JSON in a record and its evidence.
func TestPythonAcceptsAwkwardText(t *testing.T) {
	l := receipttest.New(t, testOrigin)
	var bundles [][]byte
	for _, s := range awkward {
		d, _ := l.NewDecision()
		salt, request := [32]byte{1}, receipt.Request{Path: s}
		d.Route, d.Request = s, request.Commit(&salt)
		b := l.Bundle(t, nil, 1, place{Block: l.Seal(t, receipt.AppendDecision(nil, d))})
		b.Evidence = receipt.EvidenceFor(d.ID, &salt, &request)
		data, err := b.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		bundles = append(bundles, data)
	}
	if lines, status := verifyInPython(t, l.PolicyText(), bundles...); status != 0 {
		t.Fatalf("exit status %d: %q", status, lines)
	}
}

// pythonRefused has the Python verifier check bundles that the Go verifier refuses with the errors given, and fails unless it
// refuses those that left does not cover and accepts the others.
func TestPythonAttacks(t *testing.T) {
	var policy []byte
	var names []string
	var bundles [][]byte
	for _, a := range attacks {
		if a.goOnly {
			continue
		}
		l, b := a.make(t)
		data, err := b.Marshal()
		if err != nil {
			t.Fatalf("%s: %v", a.name, err)
		}
		if policy = l.PolicyText(); !bytes.Contains(policy, []byte(testOrigin)) {
			t.Fatalf("%s: another log", a.name)
		}
		names, bundles = append(names, a.name), append(bundles, data)
	}
	lines, status := verifyInPython(t, policy, bundles...)
	if status != 1 || len(lines) != len(bundles) {
		t.Fatalf("exit status %d, %d lines for %d bundles", status, len(lines), len(bundles))
	}
	for i, line := range lines {
		if !strings.Contains(line, "refused") {
			t.Errorf("%s: %s", names[i], line)
		} else {
			t.Logf("%s: %s", names[i], line[strings.Index(line,"refused"):])
		}
	}
}

func TestPythonMutations(t *testing.T) {
	l, good := receipttest.Sample(t, testOrigin)
	data, err := good.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	var bundles [][]byte
	v := receipt.NewVerifier(l.Policy(t))
	for i, field := range mutations {
		r := rand.New(rand.NewPCG(13, uint64(i)))
		for range 60 {
			b := good.Clone()
			field.change(r, b)
			_, refused := v.Verify(b)
			if text, err := b.Marshal(); err == nil && refused != nil {
				names, bundles = append(names, field.name+": "+refused.Error()), append(bundles, text)
			}
		}
	}
	println(len(bundles))
	r := rand.New(rand.NewPCG(13, 0))
	for range 2000 {
		m := mutate(r, data)
		b, err := receipt.ParseBundle(m)
		if err == nil {
			if _, err = v.Verify(b); err == nil {
				continue // another spelling of the same bundle: TestJSONMutations shows that nothing else is
			}
		}
		names, bundles = append(names, "JSON: "+err.Error()), append(bundles, m)
	}
	println(len(bundles))
	lines, status := verifyInPython(t, l.PolicyText(), bundles...)
	if status != 1 || len(lines) != len(bundles) {
		t.Fatalf("exit status %d, %d lines for %d bundles", status, len(lines), len(bundles))
	}
	for i, line := range lines {
		if !strings.Contains(line, "refused") {
			t.Errorf("%s: %s", names[i], line)
		}
	}
}

func TestPythonUsage(t *testing.T) {
	l, b := receipttest.Sample(t, testOrigin)
	data, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for name, policy := range map[string]string{
		"no log":    "quorum none\n",
		"a witness": string(l.PolicyText()) + "witness w " + receipttest.Witness(t, "w", "w", l.Now).VKey + "\nquorum w\n",
		"a typo":    "logg x\n",
		"a bad key": "log " + testOrigin + "+00000000+AAAA\n",
		"two keys":  "log " + testKeys.identity.VKey + "\nlog " + testKeys.other.VKey + "\n",
	} {
		if lines, status := verifyInPython(t, []byte(policy), data); status != 2 {
			t.Errorf("policy with %s: exit status %d: %q", name, status, lines)
		}
	}
	if _, status := verifyInPython(t, l.PolicyText()); status != 2 {
		t.Errorf("no bundle: exit status %d", status)
	}
}
