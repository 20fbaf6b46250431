package receipt_test

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/receipt/receipttest"
)

const (
	testOrigin = "example.org/knhk/1"
	testID     = "017f22e2-79b0-7cc3-98c4-dc0c0c07398f.a"
)

// awkward holds strings that are hard to put into JSON.
var awkward = []string{
	"", "plain", `quote " backslash \ slash /`, "controls \x00\x01\b\t\n\v\f\r\x1b\x1f\x7f", "grüße 世界 🙂",
	"line\u2028paragraph\u2029", "\ufeff", "\ufffd", "<script>&amp;", "\xff", "valid then \xc3\x28", "\xed\xa0\x80 a surrogate",
	"\xc0\x80 overlong", "ends early \xe2\x82", strings.Repeat("x", 3000), strings.Repeat("\xfe", 100), `{"b64":"_w"}`,
}

func anyText(r *rand.Rand) string {
	if r.IntN(2) == 0 {
		return awkward[r.IntN(len(awkward))]
	}
	b := make([]byte, r.IntN(12))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return string(b)
}

// anyUint prefers the ends of the range.
func anyUint(r *rand.Rand) uint64 {
	return []uint64{0, 1, 9, 10, 1 << 53, 1<<53 + 1, math.MaxInt64, math.MaxUint64, r.Uint64()}[r.IntN(9)]
}

func anyTime(r *rand.Rand) time.Time {
	return time.Unix(0, []int64{0, 1, 1772366400123456789, math.MaxInt64, r.Int64()}[r.IntN(5)]).UTC()
}

func fill(r *rand.Rand, b []byte) {
	if r.IntN(4) > 0 {
		for i := range b {
			b[i] = byte(r.Uint32())
		}
	}
}

func pick(r *rand.Rand, words ...string) string { return words[r.IntN(len(words))] }

func anyStatus(r *rand.Rand) uint32 { return []uint32{0, 100, 200, 429, 999}[r.IntN(5)] }

func anyDecision(r *rand.Rand) *receipt.Decision {
	d := &receipt.Decision{
		ID: testID, Ordinal: anyUint(r), Origin: pick(r, testOrigin, "a", "grüße"), Time: anyTime(r), Tenant: anyText(r),
		Class: pick(r, "R1", "W1", "C1", "unknown"), Verdict: pick(r, "admit", "park", "refuse"), Reason: pick(r, "ok", "no_credit"),
		Rule: anyText(r), Authz: anyText(r), Status: anyStatus(r), Tick: anyUint(r), WaitedNS: anyUint(r), DryRun: r.IntN(2) == 0,
		Capture: pick(r, "lean", "full", "observe"), SPIFFEID: anyText(r), Route: anyText(r), Cluster: anyText(r),
		Parent: pick(r, "", "017f22e2-79b0-7cc3-98c4-dc0c0c073980.other"),
	}
	for _, b := range [][]byte{d.Nonce[:], d.PolicyDigest[:], d.TraceID[:], d.SpanID[:], d.Request[:]} {
		fill(r, b)
	}
	return d
}

func anyOutcome(r *rand.Rand) *receipt.Outcome {
	o := &receipt.Outcome{
		ID: testID, Ordinal: anyUint(r), Origin: testOrigin, Time: anyTime(r), Source: pick(r, "als", "ext_proc", "ext_authz", "recovery"),
		Result: pick(r, "complete", "unknown"), Status: anyStatus(r), UpstreamStatus: anyStatus(r), Flags: anyText(r), Details: anyText(r),
		Cluster: anyText(r), UpstreamHost: anyText(r), Attempts: uint32(anyUint(r)), BytesIn: anyUint(r), BytesOut: anyUint(r),
		DurationNS: anyUint(r), CacheStatus: anyText(r), Late: r.IntN(2) == 0,
	}
	fill(r, o.Nonce[:])
	return o
}

func anyHeader(r *rand.Rand) *receipt.Header {
	h := &receipt.Header{
		Origin: testOrigin, Instance: pick(r, "a", "knhk-0"), Seq: 1 + anyUint(r)/2, Kind: pick(r, "block", "heartbeat", "final"),
		Time: anyTime(r), Root: receipt.EmptyRoot, Recovered: r.IntN(2) == 0,
	}
	for _, b := range [][]byte{h.LogID[:], h.Incarnation[:], h.Prev[:]} {
		fill(r, b)
	}
	h.Prev[0] |= 1
	switch {
	case r.IntN(4) == 0:
		h.Kind, h.Seq = receipt.HeaderOpen, 0
	case h.Kind == receipt.HeaderBlock:
		h.Count, h.First = 1+r.Uint64N(1000), 5+r.Uint64N(1<<60)
		h.Last = h.First + h.Count - 1 + r.Uint64N(2)
		fill(r, h.Root[:])
	}
	if r.IntN(3) == 0 {
		h.LostFrom, h.LostTo = 1, 5
	}
	return h
}

func anyKeyStatement(r *rand.Rand) *receipt.KeyStatement {
	ks := &receipt.KeyStatement{
		Origin: testOrigin, Key: testKeys.daily.VKey, Predecessor: testKeys.other.VKey,
		Ended:     pick(r, receipt.EndedRotated, receipt.EndedExpired, receipt.EndedUntrusted, receipt.EndedLost, receipt.EndedRevoked),
		NotBefore: time.Unix(0, r.Int64N(1<<60)).UTC(), FirstSize: 1 + anyUint(r)/2,
	}
	ks.NotAfter = ks.NotBefore.Add(1 + time.Duration(r.Int64N(int64(receipt.MaxKeyAge))))
	fill(r, ks.FirstRoot[:])
	if r.IntN(3) == 0 {
		first(ks)
		if r.IntN(2) == 0 {
			ks.Succeeds = &receipt.Quote{Origin: oldLog, Identity: oldIdentity, Size: 1 + anyUint(r)/2}
			fill(r, ks.Succeeds.Root[:])
		}
	}
	return ks
}

// oldIdentity is the identity key of oldLog.
var oldIdentity = receipttest.NewKey(new(testing.T), oldLog, "old").VKey

func anySeal(r *rand.Rand) *receipt.Seal {
	s := &receipt.Seal{Origin: testOrigin, Key: r.Uint64N(1 << 40), Size: 1<<40 + anyUint(r)/2, Time: anyTime(r), Reason: anyReason(r)}
	fill(r, s.Root[:])
	return s
}

func anyRevocation(r *rand.Rand) *receipt.Revocation {
	x := &receipt.Revocation{Origin: testOrigin, Key: testKeys.daily.VKey, Size: 1 + anyUint(r)/2, Time: anyTime(r), Reason: anyReason(r)}
	fill(r, x.Root[:])
	return x
}

func anyReason(r *rand.Rand) string {
	return pick(r, "", "stolen", `"key\" <lost> 世界`+"\n", strings.Repeat("x", receipt.MaxReason))
}

// kind is one of the leaf types, for tests that hold for all of them.
type kind struct {
	name   string
	any    func(*rand.Rand) any
	append func(any) []byte
	parse  func([]byte) (any, error)
}

var kinds = []kind{
	{"decision", func(r *rand.Rand) any { return anyDecision(r) },
		func(x any) []byte { return receipt.AppendDecision(nil, x.(*receipt.Decision)) },
		func(b []byte) (any, error) { return receipt.ParseDecision(b) }},
	{"outcome", func(r *rand.Rand) any { return anyOutcome(r) },
		func(x any) []byte { return receipt.AppendOutcome(nil, x.(*receipt.Outcome)) },
		func(b []byte) (any, error) { return receipt.ParseOutcome(b) }},
	{"header", func(r *rand.Rand) any { return anyHeader(r) },
		func(x any) []byte { return receipt.AppendHeader(nil, x.(*receipt.Header)) },
		func(b []byte) (any, error) { return receipt.ParseHeader(b) }},
	{"key", func(r *rand.Rand) any { return anyKeyStatement(r) },
		func(x any) []byte {
			return append([]byte(receipt.KeyText(x.(*receipt.KeyStatement))), keyLines(x.(*receipt.KeyStatement))...)
		},
		func(b []byte) (any, error) { return receipt.ParseKeyStatement(b) }},
	{"seal", func(r *rand.Rand) any { return anySeal(r) },
		func(x any) []byte { return append([]byte(receipt.SealText(x.(*receipt.Seal))), noteLines(1)...) },
		func(b []byte) (any, error) { return receipt.ParseSeal(b) }},
	{"revocation", func(r *rand.Rand) any { return anyRevocation(r) },
		func(x any) []byte {
			return append([]byte(receipt.RevocationText(x.(*receipt.Revocation))), noteLines(1)...)
		},
		func(b []byte) (any, error) { return receipt.ParseRevocation(b) }},
	{"evidence", func(r *rand.Rand) any {
		e := &receipt.Evidence{ID: testID, Fields: []receipt.Field{{Name: anyText(r), Value: anyText(r)}, {Name: "a\x00", Value: anyText(r)}}}
		fill(r, e.Salt[:])
		return e
	},
		func(x any) []byte { return receipt.AppendEvidence(nil, x.(*receipt.Evidence)) },
		func(b []byte) (any, error) { return receipt.ParseEvidence(b) }},
}

// keyLines are as many signature lines as ks wants.
func keyLines(ks *receipt.KeyStatement) string {
	if ks.Ended == receipt.EndedRotated {
		return noteLines(2)
	}
	return noteLines(1)
}

// noteLines are signature lines that parse; what they sign is not looked at here.
func noteLines(n int) string {
	return "\n" + strings.Join([]string{"— " + testOrigin + " AAAAAQA=\n", "— " + testOrigin + " AAAAAgA=\n"}[:n], "")
}

// noteText is the text of what a kind that is a signed note parses, empty for a kind that is not.
func noteText(x any) string {
	switch x := x.(type) {
	case *receipt.KeyStatement:
		return receipt.KeyText(x)
	case *receipt.Seal:
		return receipt.SealText(x)
	case *receipt.Revocation:
		return receipt.RevocationText(x)
	}
	return ""
}

func TestRoundTrip(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(1, 2))
			for range 3000 {
				x := k.any(r)
				leaf := k.append(x)
				got, err := k.parse(leaf)
				if err != nil {
					t.Fatalf("%v\n%s", err, leaf)
				}
				if !reflect.DeepEqual(got, x) {
					t.Fatalf("got  %+v\nwant %+v\n%s", got, x, leaf)
				}
				if again := k.append(got); !bytes.Equal(again, leaf) {
					t.Fatalf("got  %s\nwant %s", again, leaf)
				}
			}
		})
	}
}

// TestMutatedLeaf changes leaves at random: what still parses must be spelled as the appender spells it.
func TestMutatedLeaf(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(3, 4))
			parsed := 0
			for range 5000 {
				leaf := mutate(r, k.append(k.any(r)))
				x, err := k.parse(leaf)
				if err != nil {
					if strings.Contains(err.Error(), "\n") {
						t.Fatalf("an error of several lines: %q", err)
					}
					continue
				}
				parsed++
				if text := noteText(x); text != "" { // the signature lines are not part of what is parsed
					if leaf = leaf[:bytes.LastIndex(leaf, []byte("\n\n"))+1]; text != string(leaf) {
						t.Fatalf("two spellings:\n%s\n%s", leaf, text)
					}
				} else if again := k.append(x); !bytes.Equal(again, leaf) {
					t.Fatalf("two spellings:\n%s\n%s", leaf, again)
				}
			}
			if parsed == 0 {
				t.Error("no mutation parsed: the test shows nothing")
			}
		})
	}
}

// TestStrict has one leaf for each way to be wrong. The change is made to a leaf that parses.
func TestStrict(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	d := anyDecision(r)
	d.Tenant, d.Rule, d.Authz, d.Status, d.DryRun, d.TraceID, d.Parent = "shop", "<&>", "staff", 429, true, [16]byte{1}, ""
	d.Ordinal, d.Time, d.Class, d.Verdict, d.Reason, d.Capture = 7, time.Unix(1, 5).UTC(), "W1", "refuse", "ok", "lean"
	d.ID, d.Origin, d.Tick, d.Nonce = testID, testOrigin, 0, [16]byte{}
	good := string(receipt.AppendDecision(nil, d))
	if _, err := receipt.ParseDecision([]byte(good)); err != nil {
		t.Fatal(err)
	}
	swap := func(old, new string) string {
		if strings.Count(good, old) != 1 {
			t.Fatalf("%q stands %d times in %s", old, strings.Count(good, old), good)
		}
		return strings.Replace(good, old, new, 1)
	}
	for _, c := range []struct{ name, leaf, want string }{
		{"empty", "", "does not begin"},
		{"only a prefix", receipt.DecisionPrefix, "EOF"},
		{"another type's prefix", swap("knhk/decision/v1", "knhk/outcome/v1"), "does not begin"},
		{"another version", swap("decision/v1", "decision/v2"), "does not begin"},
		{"no object", receipt.DecisionPrefix + "[]", `want '{'`},
		{"null", receipt.DecisionPrefix + "null", `want '{'`},
		{"empty object", receipt.DecisionPrefix + "{}", `field "id" is missing`},
		{"a line break after it", good + "\n", "canonical"},
		{"a space in front", swap("{\"id\"", " {\"id\""), "canonical"},
		{"a space within", swap(`,"nonce"`, `, "nonce"`), "canonical"},
		{"a second object", good + "{}", "something follows"},
		{"cut short", good[:len(good)-1], "EOF"},
		{"an unknown field", swap(`,"nonce"`, `,"noncE"`), `unknown field "noncE"`},
		{"an escaped name", swap(`,"nonce"`, `,"\u006eonce"`), "unknown field"},
		{"an extra field at the end", good[:len(good)-1] + `,"x":1}`, `unknown field "x"`},
		{"a field twice", swap(`,"nonce"`, `,"id":"`+testID+`","nonce"`), `"id": twice or out of order`},
		{"fields swapped", swap(`"class":"W1","verdict":"refuse"`, `"verdict":"refuse","class":"W1"`), `field "class" is missing`},
		{"a required field left out", swap(`"ordinal":"7",`, ""), `field "ordinal" is missing`},
		{"the last field left out", good[:strings.LastIndex(good, `,"request"`)] + "}", `field "request" is missing`},
		{"an optional field that is empty", swap(`"tenant":"shop"`, `"tenant":""`), "canonical"},
		{"an optional number that is zero", swap(`"status":429`, `"status":0`), "canonical"},
		{"a flag that is false", swap(`"dry_run":true`, `"dry_run":false`), `field "dry_run"`},
		{"a null", swap(`"tenant":"shop"`, `"tenant":null`), `field "tenant"`},
		{"a number for a string", swap(`"tenant":"shop"`, `"tenant":5`), `field "tenant"`},
		{"an integer that is a number", swap(`"ordinal":"7"`, `"ordinal":7`), `field "ordinal"`},
		{"an integer with a leading zero", swap(`"ordinal":"7"`, `"ordinal":"07"`), `field "ordinal"`},
		{"an integer with a plus", swap(`"ordinal":"7"`, `"ordinal":"+7"`), `field "ordinal"`},
		{"a negative integer", swap(`"ordinal":"7"`, `"ordinal":"-7"`), `field "ordinal"`},
		{"an empty integer", swap(`"ordinal":"7"`, `"ordinal":""`), `field "ordinal"`},
		{"an escaped integer", swap(`"ordinal":"7"`, `"ordinal":"\u0037"`), `field "ordinal"`},
		{"an integer of 65 bits", swap(`"ordinal":"7"`, `"ordinal":"18446744073709551616"`), `field "ordinal"`},
		{"an integer with an underscore", swap(`"ordinal":"7"`, `"ordinal":"1_0"`), `field "ordinal"`},
		{"a status as a string", swap(`"status":429`, `"status":"429"`), `field "status"`},
		{"a status with a fraction", swap(`"status":429`, `"status":429.0`), `field "status"`},
		{"a status with an exponent", swap(`"status":429`, `"status":4e2`), `field "status"`},
		{"a status out of range", swap(`"status":429`, `"status":1000`), `field "status"`},
		{"a time before 1970", swap(`"time":"1000000005"`, `"time":"-1"`), `field "time"`},
		{"a time of 64 bits", swap(`"time":"1000000005"`, `"time":"9223372036854775808"`), `field "time"`},
		{"short bytes", swap(`"nonce":"AAAAAAAAAAAAAAAAAAAAAA"`, `"nonce":"AAAAAAAAAAAAAAAAAAAA"`), `field "nonce"`},
		{"padded base64", swap(`"nonce":"AAAAAAAAAAAAAAAAAAAAAA"`, `"nonce":"AAAAAAAAAAAAAAAAAAAAAA=="`), `field "nonce"`},
		{"base64 with loose bits", swap(`"nonce":"AAAAAAAAAAAAAAAAAAAAAA"`, `"nonce":"AAAAAAAAAAAAAAAAAAAAAB"`), `field "nonce"`},
		{"standard base64", swap(`"nonce":"AAAAAAAAAAAAAAAAAAAAAA"`, `"nonce":"//////////////////////"`), `field "nonce"`},
		{"a needless escape", swap(`"tenant":"shop"`, `"tenant":"sho\u0070"`), "canonical"},
		{"HTML escapes", swap(`"rule":"<&>"`, `"rule":"\u003c\u0026\u003e"`), "canonical"},
		{"an escaped slash", swap(`"tenant":"shop"`, `"tenant":"a\/b"`), "canonical"},
		{"an authorisation rule before the class rule", swap(`"rule":"<&>","authz":"staff"`, `"authz":"staff","rule":"<&>"`), `"rule": twice or out of order`},
		{"an authorisation rule that is empty", swap(`"authz":"staff"`, `"authz":""`), "canonical"},
		{"an authorisation rule that is no string", swap(`"authz":"staff"`, `"authz":["staff"]`), `field "authz"`},
		{"a lone surrogate", swap(`"tenant":"shop"`, `"tenant":"\ud800"`), `field "tenant"`},
		{"bytes that are not UTF-8", swap(`"tenant":"shop"`, "\"tenant\":\"\xff\""), `field "tenant"`},
		{"base64 of valid text", swap(`"tenant":"shop"`, `"tenant":{"b64":"c2hvcA"}`), `field "tenant"`},
		{"base64 of nothing", swap(`"tenant":"shop"`, `"tenant":{"b64":""}`), `field "tenant"`},
		{"an object that is no base64", swap(`"tenant":"shop"`, `"tenant":{"b64":"_w","x":1}`), `field "tenant"`},
		{"a bad id", swap(testID, strings.ToUpper(testID)), `field "id"`},
		{"an unknown class", swap(`"class":"W1"`, `"class":"W2"`), `field "class"`},
		{"an unknown verdict", swap(`"verdict":"refuse"`, `"verdict":"Refuse"`), `field "verdict"`},
		{"a reason that is no word", swap(`"reason":"ok"`, `"reason":"o k"`), `field "reason"`},
		{"an unknown capture", swap(`"capture":"lean"`, `"capture":"thin"`), `field "capture"`},
		{"an origin with a space", swap(testOrigin, "example org"), `field "origin"`},
		{"an origin with a plus", swap(testOrigin, "example+org"), `field "origin"`},
		{"an empty origin", swap(testOrigin, ""), `field "origin"`},
		{"too long", swap(`"tenant":"shop"`, `"tenant":"`+strings.Repeat("x", receipt.MaxLeaf)+`"`), "at most"},
		{"a zero trace id", swap(`"trace_id":"AQAAAAAAAAAAAAAAAAAAAA"`, `"trace_id":"AAAAAAAAAAAAAAAAAAAAAA"`), "canonical"},
		{"its own parent", swap(`,"request"`, `,"parent":"`+testID+`","request"`), `field "parent"`},
		{"a parent that is no id", swap(`,"request"`, `,"parent":"x","request"`), `field "parent"`},
	} {
		_, err := receipt.ParseDecision([]byte(c.leaf))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want an error with %q", c.name, err, c.want)
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: an error of several lines: %q", c.name, err)
		}
	}
}

// TestHeaderRules has one header for each rule of Header.Validate.
func TestHeaderRules(t *testing.T) {
	good := receipt.Header{
		Origin: testOrigin, Instance: "a", Seq: 4, Kind: receipt.HeaderBlock, Prev: receipt.Hash{1}, Time: time.Unix(1, 0).UTC(),
		Count: 3, Root: receipt.Hash{2}, First: 10, Last: 12,
	}
	none := func(h *receipt.Header) { h.Count, h.Root, h.First, h.Last = 0, receipt.EmptyRoot, 0, 0 }
	for _, c := range []struct {
		name   string
		change func(*receipt.Header)
		want   string // empty: accepted
	}{
		{"as it is", func(h *receipt.Header) {}, ""},
		{"ordinals with gaps", func(h *receipt.Header) { h.Last = 20 }, ""},
		{"a heartbeat", func(h *receipt.Header) { h.Kind = receipt.HeaderHeartbeat; none(h) }, ""},
		{"an open header", func(h *receipt.Header) { h.Kind, h.Seq = receipt.HeaderOpen, 0; none(h) }, ""},
		{"the first open header", func(h *receipt.Header) { h.Kind, h.Seq, h.Prev = receipt.HeaderOpen, 0, receipt.Hash{}; none(h) }, ""},
		{"a final header with records", func(h *receipt.Header) { h.Kind = receipt.HeaderFinal }, ""},
		{"a final header without", func(h *receipt.Header) { h.Kind = receipt.HeaderFinal; none(h) }, ""},
		{"losses before the records", func(h *receipt.Header) { h.LostFrom, h.LostTo = 5, 10 }, ""},
		{"losses after the records", func(h *receipt.Header) { h.LostFrom, h.LostTo = 13, 20 }, ""},
		{"an unknown kind", func(h *receipt.Header) { h.Kind = "other" }, "kind"},
		{"an open header later on", func(h *receipt.Header) { h.Kind = receipt.HeaderOpen; none(h) }, "seq"},
		{"a block as number 0", func(h *receipt.Header) { h.Seq = 0 }, "seq"},
		{"no previous header", func(h *receipt.Header) { h.Prev = receipt.Hash{} }, "prev"},
		{"an open header with records", func(h *receipt.Header) { h.Kind, h.Seq = receipt.HeaderOpen, 0 }, "count"},
		{"a heartbeat with records", func(h *receipt.Header) { h.Kind = receipt.HeaderHeartbeat }, "count"},
		{"a block without records", none, "count"},
		{"a root without records", func(h *receipt.Header) { h.Kind = receipt.HeaderFinal; none(h); h.Root[0]++ }, "root"},
		{"ordinals without records", func(h *receipt.Header) { h.Kind = receipt.HeaderFinal; none(h); h.Last = 1 }, "first"},
		{"too many records for the ordinals", func(h *receipt.Header) { h.Count = 4 }, "last"},
		{"ordinals backwards", func(h *receipt.Header) { h.First, h.Last = 12, 10 }, "last"},
		{"a count that overflows", func(h *receipt.Header) { h.Count = math.MaxUint64 }, "last"},
		{"losses backwards", func(h *receipt.Header) { h.LostFrom, h.LostTo = 9, 8 }, "lost_from"},
		{"losses among the records", func(h *receipt.Header) { h.LostFrom, h.LostTo = 12, 13 }, "lost_from"},
		{"losses just before the last record", func(h *receipt.Header) { h.LostFrom, h.LostTo = 1, 11 }, "lost_from"},
		{"a bad instance", func(h *receipt.Header) { h.Instance = "a.b" }, "instance"},
		{"no time", func(h *receipt.Header) { h.Time = time.Time{} }, "time"},
	} {
		h := good
		c.change(&h)
		got, err := receipt.ParseHeader(receipt.AppendHeader(nil, &h))
		switch {
		case c.want == "" && (err != nil || !reflect.DeepEqual(got, &h)):
			t.Errorf("%s: got %+v, %v", c.name, got, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), fmt.Sprintf("field %q", c.want))):
			t.Errorf("%s: got %v, want an error about %s", c.name, err, c.want)
		}
		if invalid := h.Validate(); c.name != "no time" && (invalid == nil) != (c.want == "") {
			t.Errorf("%s: Validate says %v", c.name, invalid)
		}
	}
}

func TestOutcomeRules(t *testing.T) {
	good := anyOutcome(rand.New(rand.NewPCG(7, 8)))
	for name, change := range map[string]func(*receipt.Outcome){
		"source": func(o *receipt.Outcome) { o.Source = "rumour" },
		"result": func(o *receipt.Outcome) { o.Result = "" },
		"status": func(o *receipt.Outcome) { o.Status = 99 },
		"id":     func(o *receipt.Outcome) { o.ID = "x" },
		"origin": func(o *receipt.Outcome) { o.Origin = "a\u00a0b" },
		"time":   func(o *receipt.Outcome) { o.Time = time.Unix(-1, 0) },
	} {
		o := *good
		change(&o)
		if _, err := receipt.ParseOutcome(receipt.AppendOutcome(nil, &o)); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestAppendDoesNotAllocate(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 10))
	d, o, h := anyDecision(r), anyOutcome(r), anyHeader(r)
	d.Tenant, d.Rule, d.Authz, d.Route, d.SPIFFEID, d.Cluster = awkward[2], awkward[3], awkward[5], awkward[4], awkward[15], awkward[14]
	request := receipt.Request{Method: "GET", Path: strings.Repeat("/x", 300)}
	var salt [32]byte
	buf := make([]byte, 0, 64<<10)
	for name, fn := range map[string]func(){
		"decision": func() { buf = receipt.AppendDecision(buf[:0], d) },
		"outcome":  func() { buf = receipt.AppendOutcome(buf[:0], o) },
		"header":   func() { buf = receipt.AppendHeader(buf[:0], h) },
		"leafhash": func() { receipt.LeafHash(buf) },
		"commit":   func() { request.Commit(&salt) },
	} {
		if n := testing.AllocsPerRun(100, fn); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}
