package receipt_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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

// TestPythonAccepts has the sample bundle, told with less, and those at the edge of what is refused.
func TestPythonAccepts(t *testing.T) {
	l, good := receipttest.Sample(t, testOrigin)
	type sample struct {
		name, want string
		bundle     *receipt.Bundle
	}
	less := func(change func(*receipt.Bundle)) *receipt.Bundle {
		b := good.Clone()
		change(b)
		return b
	}
	samples := []sample{
		{"the sample", "admit, complete", good},
		{"without evidence", "admit, complete", less(func(b *receipt.Bundle) { b.Evidence = nil })},
		{"without outcome", "admit, pending", less(func(b *receipt.Bundle) { b.Records, b.Headers = b.Records[:1], b.Headers[:1] })},
		{"without the older key", "admit, complete", less(func(b *receipt.Bundle) { b.Keys = b.Keys[:1] })},
	}
	for name, fn := range accepted {
		if l, b := fn(t); len(l.Witnesses) == 0 { // it reads no policy with witnesses: TestPythonUsage
			samples = append(samples, sample{name, "verified ", b})
		}
	}
	var bundles [][]byte
	for _, s := range samples {
		data, err := s.bundle.Marshal()
		if err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		bundles = append(bundles, data)
	}
	lines, status := verifyInPython(t, l.PolicyText(), bundles...)
	if status != 0 || len(lines) != len(bundles) {
		t.Fatalf("exit status %d: %q", status, lines)
	}
	for i, line := range lines {
		if !strings.Contains(line, samples[i].want) {
			t.Errorf("%s: %s", samples[i].name, line)
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

// leftToKnhk lists the attacks that verify.py knowingly accepts, each with the words of its docstring that say so. It grows
// by an edit of both only.
var leftToKnhk = map[string]string{
	"a second line of the identity key":   otherSpelling,
	"an index with a leading zero":        otherSpelling,
	"a hash with loose bits":              otherSpelling,
	"a key statement in another spelling": otherSpelling,

	"a heartbeat with records": noRecorder,

	"a header twice":            ofNoUse,
	"a header without a record": ofNoUse,

	"a decision after its block":           timeOrder,
	"an outcome after its block":           timeOrder,
	"a block after the daily key's end":    timeOrder,
	"a block before the daily key's begin": timeOrder,
	"a block after the last leaf":          timeOrder,
	"blocks whose times go back":           timeOrder,

	"a key statement without its predecessor":              aboutKeys,
	"a key statement signed by another predecessor":        aboutKeys,
	"a key that is not the predecessor":                    aboutKeys,
	"a rotated key that did not sign, and does not say so": aboutKeys,
	"a lost key that signed all the same":                  aboutKeys,

	"two outcomes, neither late":       outcomeOrder,
	"a late outcome after a known one": outcomeOrder,
	"two late outcomes":                outcomeOrder,

	"an ordinal declared lost":            betweenHeaders,
	"headers of two logs' directories":    betweenHeaders,
	"two headers for one sequence number": betweenHeaders,
	"headers with ordinals in common":     betweenHeaders,
}

// The words of verify.py's docstring for what it leaves to knhk verify.
const (
	otherSpelling  = "other spellings of a value"
	noRecorder     = "values that no recorder writes"
	ofNoUse        = "parts that are too many or of no use"
	timeOrder      = "the order of times"
	aboutKeys      = "what a key statement says of its predecessor"
	outcomeOrder   = "which outcomes may follow one another"
	aboutPins      = "looks at no proof of consistency"
	betweenHeaders = "whether headers agree on recorder, sequence and ordinals"
)

// leftMutations has errors of the Go verifier, for mutations of the sample bundle that verify.py may accept.
var leftMutations = []struct{ goError, why string }{
	{"proof: hash ", otherSpelling},       // loose bits in the last character of its base64
	{"have one sequence number", ofNoUse}, // the same header again
	{"not the predecessor", ofNoUse},      // the same key statement again
	{"verify: pin ", aboutPins},
	{`field "pins"`, aboutPins},
}

// TestPythonAdmitsWhatItLeaves keeps verify.py short enough to be read, and its docstring complete.
func TestPythonAdmitsWhatItLeaves(t *testing.T) {
	source, err := os.ReadFile(verifyPy)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(source, []byte("\n")); n > 150 {
		t.Errorf("verify.py has %d lines; 150 are what an auditor reads in ten minutes", n)
	}
	_, rest, _ := strings.Cut(string(source), `"""`)
	docstring, _, _ := strings.Cut(rest, `"""`)
	docstring = strings.Join(strings.Fields(docstring), " ")
	said := func(name, why string) {
		if !strings.Contains(docstring, why) {
			t.Errorf("%s: the docstring does not say that %q is left to knhk verify", name, why)
		}
	}
	known := map[string]bool{}
	for _, a := range attacks {
		known[a.name] = true
	}
	for name, why := range leftToKnhk {
		if said(name, why); !known[name] {
			t.Errorf("there is no attack %q", name)
		}
	}
	for _, m := range leftMutations {
		said(m.goError, m.why)
	}
}

// TestPythonAttacks has verify.py refuse every attack but those in leftToKnhk, which it must accept: one that it learns to
// refuse leaves the list.
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
		why, left := leftToKnhk[names[i]]
		switch refused := strings.Contains(line, ": refused: "); {
		case !refused && !left:
			t.Errorf("%s: %s", names[i], line)
		case refused && left:
			t.Errorf("%s: refused, although the list leaves it to knhk verify (%s): %s", names[i], why, line)
		}
	}
}

// TestPythonMutations has verify.py refuse mutations of a bundle that the Go verifier refuses, field by field and of its
// JSON, but for those in leftMutations.
func TestPythonMutations(t *testing.T) {
	const perField, ofJSON = 10, 300
	l, good := receipttest.Sample(t, testOrigin)
	data, err := good.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	v := receipt.NewVerifier(l.Policy(t))
	var goErrors []string
	var bundles [][]byte
	// keep keeps what Go refuses. What it does not is the same bundle: TestMutations shows that nothing else is.
	keep := func(mutated []byte) {
		b, err := receipt.ParseBundle(mutated)
		if err == nil {
			_, err = v.Verify(b)
		}
		if err != nil {
			goErrors, bundles = append(goErrors, err.Error()), append(bundles, mutated)
		}
	}
	for i, field := range mutations {
		r := rand.New(rand.NewPCG(13, uint64(i)))
		for range perField {
			b := good.Clone()
			field.change(r, b)
			if mutated, err := b.Marshal(); err == nil { // not every change can be written as a bundle
				keep(mutated)
			}
		}
	}
	r := rand.New(rand.NewPCG(14, 0))
	for range ofJSON {
		keep(mutate(r, data))
	}
	for _, forged := range unwritable(t) {
		keep(forged)
	}
	lines, status := verifyInPython(t, l.PolicyText(), bundles...)
	if status != 1 || len(lines) != len(bundles) || len(bundles) < ofJSON {
		t.Fatalf("exit status %d, %d lines for %d bundles", status, len(lines), len(bundles))
	}
	left := 0
	for i, line := range lines {
		switch {
		case strings.Contains(line, ": refused: "):
		case slices.ContainsFunc(leftMutations, func(m struct{ goError, why string }) bool { return strings.Contains(goErrors[i], m.goError) }):
			left++
		default:
			t.Errorf("Go: %s\nPython: %s", goErrors[i], line)
		}
	}
	t.Logf("%d refused, %d left to knhk verify", len(bundles)-left, left)
}

// unwritable are attacks that Bundle.Marshal would not write: JSON for which a lenient reader must not fall.
func unwritable(t *testing.T) [][]byte {
	salt, fields := make([]byte, 31), []receipt.Field{{Name: "method", Value: "GET"}}
	commitment := sha256.New()
	commitment.Write([]byte("knhk/commitment/v1\n"))
	commitment.Write(salt)
	commitment.Write(binary.BigEndian.AppendUint64(nil, 1))
	commitment.Write([]byte("\x01\x00\x00\x00\x00\x00\x00\x00\x06method\x02\x00\x00\x00\x00\x00\x00\x00\x03GET"))
	short := staged(func(s *scene) *bundle {
		s.d.Request = receipt.Hash(commitment.Sum(nil))
		b := s.both(unchanged)
		b.Evidence = &receipt.Evidence{ID: s.d.ID, Fields: fields}
		return b
	})
	base64URL := base64.RawURLEncoding.EncodeToString
	var out [][]byte
	for _, forgery := range []struct {
		of       func(testing.TB) (*log, *bundle)
		old, new string
	}{
		{accepted["one block"], "knhk/bundle/v1", "knhk/bundle/v2"},
		{accepted["one block"], `"index": "1"`, `"index": "-1"`},
		{accepted["one block"], `"size": "2"`, `"size": "-2"`},
		{accepted["one block"], `\nindex 0\n`, `\nindex -1\n`},
		{accepted["one block"], `\nindex 2\n`, `\nindex -1\n`},
		{accepted["ordinals with gaps"], `"index": "0"`, `"index": "-1"`},
		{short, base64URL(make([]byte, 32)), base64URL(salt)},
	} {
		_, b := forgery.of(t)
		data, err := b.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(data, []byte(forgery.old)) {
			t.Fatalf("no %s in the bundle", forgery.old)
		}
		out = append(out, bytes.Replace(data, []byte(forgery.old), []byte(forgery.new), 1))
	}
	return out
}

func TestPythonUsage(t *testing.T) {
	l, b := receipttest.Sample(t, testOrigin)
	data, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	long := append([]byte{1}, make([]byte, 33)...)
	hash := sha256.Sum256(append([]byte(testOrigin+"\n"), long...))
	for name, policy := range map[string]string{
		"a long key":                   fmt.Sprintf("log %s+%x+%s\n", testOrigin, hash[:4], base64.StdEncoding.EncodeToString(long)),
		"no log":                       "quorum none\n",
		"a witness":                    string(l.PolicyText()) + "witness w " + receipttest.Witness(t, "w", "w", l.Now).VKey + "\nquorum w\n",
		"a typo":                       "logg " + testKeys.identity.VKey + "\n",
		"a bad key":                    "log " + testOrigin + "+00000000+AAAA\n",
		"another hash":                 "log " + testOrigin + "+00000000" + testKeys.identity.VKey[len(testOrigin)+9:] + "\n",
		"a witness's key as the log's": "log " + receipttest.Witness(t, "w", "w", l.Now).VKey + "\n",
		"two keys":                     "log " + testKeys.identity.VKey + "\nlog " + testKeys.other.VKey + "\n",
	} {
		if lines, status := verifyInPython(t, []byte(policy), data); status != 2 {
			t.Errorf("policy with %s: exit status %d: %q", name, status, lines)
		}
	}
	if _, status := verifyInPython(t, l.PolicyText()); status != 2 {
		t.Errorf("no bundle: exit status %d", status)
	}
}
