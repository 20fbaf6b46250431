package receipt_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/receipt/receipttest"
)

// The files in testdata are the format: a difference breaks every receipt ever issued. -update writes them anew.
var update = flag.Bool("update", false, "write the golden files in testdata")

// golden compares got with a file in testdata.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs:\n%s", name, got)
	}
}

// vector is one leaf as testdata/leaves.json has it. The leaf is shown as text and hashed as its bytes.
type vector struct {
	Name string `json:"name"`
	Leaf string `json:"leaf"`
	Hash string `json:"leaf_hash"`
}

func goldenLeaves(t *testing.T) (vectors []vector, values map[string]any) {
	at := time.Date(2026, 3, 1, 12, 0, 0, 123456789, time.UTC)
	sequence := func(b []byte) {
		for i := range b {
			b[i] = byte(i)
		}
	}
	full := &receipt.Decision{
		ID: testID, Ordinal: 1<<64 - 1, Origin: testOrigin, Time: at, Tenant: "shop", Class: "W1", Verdict: "refuse", Reason: "no_credit",
		Rule: `say "cart" \ 世界`, Authz: "no-carts", Status: 429, Tick: 1 << 53, WaitedNS: 5_000_000, DryRun: true, Capture: "full",
		SPIFFEID: "spiffe://example.org/ns/shop/sa/cart", Route: "tab\tbell\a", Cluster: "not UTF-8 \xff\x00",
		Parent: "017f22e2-79b0-7cc3-98c4-dc0c0c073980.b-2",
	}
	for _, b := range [][]byte{full.Nonce[:], full.PolicyDigest[:], full.TraceID[:], full.SpanID[:], full.Request[:]} {
		sequence(b)
	}
	least := &receipt.Decision{
		ID: testID, Origin: testOrigin, Time: time.Unix(0, 0).UTC(), Class: "R1", Verdict: "admit", Reason: "ok", Capture: "lean",
	}
	outcome := &receipt.Outcome{
		ID: testID, Ordinal: 8, Origin: testOrigin, Time: at, Source: "als", Result: "upstream", Status: 503, UpstreamStatus: 502,
		Flags: "UF,URX", Details: "upstream_reset_before_response_started{connection_failure}", Cluster: "payments",
		UpstreamHost: "10.0.3.4:8443", Attempts: 3, BytesIn: 12, BytesOut: 1 << 60, DurationNS: 123456789, CacheStatus: `"edge"; fwd=miss`,
		Late: true,
	}
	header := &receipt.Header{
		Origin: testOrigin, Instance: "a", Seq: 9, Kind: receipt.HeaderFinal, Prev: receipt.EmptyRoot, Time: at, Count: 2, First: 7, Last: 8,
		Recovered: true, LostFrom: 9, LostTo: 265, Key: 1 << 40,
	}
	for _, b := range [][]byte{header.LogID[:], header.Incarnation[:], header.Root[:]} {
		sequence(b)
	}
	ks := testStatement()
	evidence := receipt.EvidenceFor(testID, &[32]byte{1, 2, 3}, &receipt.Request{Method: "GET", Path: "/\xff", Authority: "a.example"})
	leaf, err := receipt.SignKeyStatement(ks, testKeys.identity, testKeys.other)
	if err != nil {
		t.Fatal(err)
	}
	succeeds := testStatement()
	first(succeeds)
	succeeds.Succeeds = &receipt.Quote{Origin: oldLog, Identity: oldIdentity, Size: 1 << 40, Root: header.Root}
	succeedsLeaf, err := receipt.SignKeyStatement(succeeds, testKeys.identity, nil)
	if err != nil {
		t.Fatal(err)
	}
	seal := &receipt.Seal{Origin: testOrigin, Key: 7, Size: 1 << 40, Root: header.Root, Time: at, Reason: `the "HSM" is gone`}
	sealLeaf, err := receipt.SignSeal(seal, testKeys.identity, testKeys.daily)
	if err != nil {
		t.Fatal(err)
	}
	revocation := &receipt.Revocation{Origin: testOrigin, Key: testKeys.daily.VKey, Size: 1 << 40, Root: header.Root, Time: at, Reason: "stolen"}
	revocationNote, err := receipt.SignRevocation(revocation, testKeys.identity)
	if err != nil {
		t.Fatal(err)
	}
	values = map[string]any{
		"key, of a successor": succeeds, "seal": seal, "revocation": revocation,
		"decision, full": full, "decision, least": least, "outcome": outcome, "header": header, "key": ks, "evidence": evidence,
	}
	add := func(name string, leaf []byte) {
		vectors = append(vectors, vector{name, string(leaf), receipt.LeafHash(leaf).String()})
	}
	add("decision, full", receipt.AppendDecision(nil, full))
	add("decision, least", receipt.AppendDecision(nil, least))
	add("outcome", receipt.AppendOutcome(nil, outcome))
	add("header", receipt.AppendHeader(nil, header))
	add("key", leaf)
	add("key, of a successor", succeedsLeaf)
	add("seal", sealLeaf)
	add("revocation", revocationNote)
	add("evidence", receipt.AppendEvidence(nil, evidence))
	commitment := receipt.Commit(&evidence.Salt, evidence.Fields)
	vectors = append(vectors, vector{"commitment of the evidence", "", commitment.String()})
	return vectors, values
}

func TestGoldenLeaves(t *testing.T) {
	vectors, values := goldenLeaves(t)
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(vectors); err != nil {
		t.Fatal(err)
	}
	golden(t, "leaves.json", buf.Bytes())

	data, err := os.ReadFile("testdata/leaves.json")
	if err != nil {
		t.Fatal(err)
	}
	var stored []vector
	if err := json.Unmarshal(data, &stored); err != nil {
		t.Fatal(err)
	}
	for _, v := range stored {
		for _, k := range kinds {
			name, _, _ := strings.Cut(v.Name, ",")
			if k.name != name {
				continue
			}
			if got, err := k.parse([]byte(v.Leaf)); err != nil || !reflect.DeepEqual(got, values[v.Name]) {
				t.Errorf("%s: got %+v, %v", v.Name, got, err)
			}
		}
	}
}

func TestGoldenBundle(t *testing.T) {
	l, b := receipttest.Sample(t, testOrigin)
	data, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "bundle.json", data)
	golden(t, "policy.txt", l.PolicyText())
}

// TestGoldenBundleVerifies verifies the stored bundle under the stored policy and nothing made anew: bundles verify for
// ever, whatever becomes of the code that made them. The story it tells is golden, too.
func TestGoldenBundleVerifies(t *testing.T) {
	text, err := os.ReadFile("testdata/policy.txt")
	if err != nil {
		t.Fatal(err)
	}
	p, err := receipt.ParsePolicy(text)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile("testdata/bundle.json")
	if err != nil {
		t.Fatal(err)
	}
	b, err := receipt.ParseBundle(data)
	if err != nil {
		t.Fatal(err)
	}
	v, err := receipt.Verify(p, b)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "story.txt", []byte(strings.Join(receipt.Describe(v), "\n")+"\n"))
}

// TestDescribe has the sentences that the golden story does not have.
func TestDescribe(t *testing.T) {
	v := &receipt.Verified{
		Origin: testOrigin, Identity: testKeys.identity.VKey,
		Decision: receipt.Decision{
			ID: testID, Origin: testOrigin, Class: "unknown", Verdict: "refuse", Reason: "brand_new", Status: 429, WaitedNS: 1 << 63, DryRun: true,
			Route: "red \x1b[31m\n", Parent: testID,
		},
		Outcomes: []receipt.Outcome{{Source: "recovery", Result: "brand_new", Status: 799, Late: true, Attempts: 2, Cluster: "\u202eevil"}},
		Headers:  []receipt.VerifiedHeader{{Header: receipt.Header{Recovered: true, Count: 2}}},
		Places:   []receipt.Place{{}, {Index: 1}},
		Keys:     []receipt.VerifiedKey{{KeyStatement: receipt.KeyStatement{Key: testKeys.daily.VKey}}},
		Cosignatures: []receipt.Cosignature{
			{Name: "w.example", Time: time.Unix(1772366400, 0)},
		},
	}
	story := strings.Join(receipt.Describe(v), "\n")
	for _, want := range []string{
		"No class was found for it, and it was refused with 429 Too Many Requests after waiting 9223372036854775808 ns: brand_new.",
		"This was a dry run", `on route "red \x1b[31m\n"`, "caused by " + testID, "It ended as brand_new, the client got 799",
		`"\u202eevil"`, "after 2 attempts", "after the outcome had been recorded as unknown", "sealed by recovery after a crash",
		"it states no predecessor", "Witness w.example cosigned it at 2026-03-01 12:00:00.000 UTC.",
	} {
		if !strings.Contains(story, want) {
			t.Errorf("no %q in\n%s", want, story)
		}
	}
	if strings.ContainsAny(story, "\x1b\u202e") {
		t.Errorf("control characters in the story: %q", story)
	}
	if strings.Contains(story, "Authorisation") {
		t.Errorf("an authorisation rule out of nothing: %s", story)
	}
	v.Decision.Authz = "no\ncarts"
	for reason, want := range map[string]string{
		"authz_forbidden":  `: an authorisation rule forbids it. Authorisation rule "no\ncarts" forbids it.`,
		"authz_rule_error": `: an authorisation rule failed or cost too much. Authorisation rule "no\ncarts" is the one that failed.`,
		"no_credit":        `: no tick it could wait for had a credit left. Authorisation rule "no\ncarts" permits it.`,
	} {
		v.Decision.Reason = reason
		if story := strings.Join(receipt.Describe(v), "\n"); !strings.Contains(story, want) {
			t.Errorf("no %q in\n%s", want, story)
		}
	}
}
