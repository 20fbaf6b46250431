package receipt_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/knhk/sidecar/crypto/keys"
	"github.com/knhk/sidecar/crypto/receipt"
	"github.com/knhk/sidecar/crypto/receipt/receipttest"
	"golang.org/x/mod/sumdb/note"
)

func verifierOf(t *testing.T, k receipttest.Key) note.Verifier {
	t.Helper()
	v, err := keys.Verifier(k.VKey)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func testStatement() *receipt.KeyStatement {
	return &receipt.KeyStatement{
		Origin: testOrigin, Key: testKeys.daily.VKey, Predecessor: testKeys.other.VKey, Ended: receipt.EndedRotated,
		NotBefore: time.Unix(100, 1).UTC(), NotAfter: time.Unix(100, 1).UTC().Add(receipt.MaxKeyAge), FirstSize: 7, FirstRoot: receipt.Hash{7},
	}
}

func TestKeyStatement(t *testing.T) {
	identity, other := verifierOf(t, testKeys.identity), verifierOf(t, testKeys.other)
	first := testStatement()
	first.Predecessor, first.Ended, first.FirstSize, first.FirstRoot = "", "", 0, receipt.EmptyRoot
	first.Succeeds = &receipt.Quote{Origin: oldLog, Identity: receipttest.NewKey(t, oldLog, "old").VKey, Size: 9, Root: receipt.Hash{9}}
	next := testStatement()
	firstLeaf, err := receipt.SignKeyStatement(first, testKeys.identity, nil)
	if err != nil {
		t.Fatal(err)
	}
	nextLeaf, err := receipt.SignKeyStatement(next, testKeys.identity, testKeys.other)
	if err != nil {
		t.Fatal(err)
	}
	lost := testStatement()
	lost.Ended = receipt.EndedLost
	lostLeaf, err := receipt.SignKeyStatement(lost, testKeys.identity, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(nextLeaf, []byte(receipt.KeyText(next)+"\n— ")) {
		t.Errorf("not a signed note over the text:\n%s", nextLeaf)
	}
	for _, c := range []struct {
		name        string
		leaf        []byte
		identity    note.Verifier
		predecessor note.Verifier
		want        *receipt.KeyStatement // nil: refused
	}{
		{"first", firstLeaf, identity, nil, first},
		{"next, predecessor from the statement", nextLeaf, identity, nil, next},
		{"next, predecessor known", nextLeaf, identity, other, next},
		{"its predecessor is lost", lostLeaf, identity, nil, lost},
		{"its predecessor is lost, and known", lostLeaf, identity, other, lost},
		{"its predecessor is lost, and another", lostLeaf, identity, verifierOf(t, testKeys.daily), nil},
		{"lost, but two lines", append(bytes.Clone(lostLeaf), nextLeaf[bytes.LastIndex(nextLeaf, []byte("— ")):]...), identity, nil, nil},
		{"first, asked for a predecessor", firstLeaf, identity, other, nil},
		{"next, another predecessor", nextLeaf, identity, verifierOf(t, testKeys.daily), nil},
		{"next, the identity key as predecessor", nextLeaf, identity, identity, nil},
		{"another identity", nextLeaf, other, nil, nil},
		{"an identity of another log", nextLeaf, verifierOf(t, receipttest.NewKey(t, "example.org/2", "identity")), nil, nil},
		{"a line more", append(bytes.Clone(nextLeaf), "— "+testOrigin+" AAAAAQA=\n"...), identity, nil, nil},
		{"a line less", nextLeaf[:bytes.LastIndex(nextLeaf, []byte("— "))], identity, nil, nil},
		{"another text", bytes.Replace(nextLeaf, []byte(`"first_size":"7"`), []byte(`"first_size":"8"`), 1), identity, nil, nil},
		{"no note", []byte(receipt.KeyText(next)), identity, nil, nil},
	} {
		got, err := receipt.VerifyKeyStatement(c.leaf, c.identity, c.predecessor)
		if c.want == nil && err == nil || c.want != nil && (err != nil || !reflect.DeepEqual(got, c.want)) {
			t.Errorf("%s: got %+v, %v", c.name, got, err)
		}
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: an error of several lines: %q", c.name, err)
		}
	}
}

// oldLog is a log that is sealed.
const oldLog = "example.org/knhk/0"

// succeeds makes a statement the first one of a successor.
func succeeds(origin, identity string, size uint64) func(ks *receipt.KeyStatement) {
	return func(ks *receipt.KeyStatement) {
		ks.FirstSize, ks.FirstRoot, ks.Predecessor, ks.Ended = 0, receipt.EmptyRoot, "", ""
		ks.Succeeds = &receipt.Quote{Origin: origin, Identity: identity, Size: size, Root: receipt.Hash{9}}
	}
}

func TestSignKeyStatementRefuses(t *testing.T) {
	foreign := receipttest.NewKey(t, "example.org/2", "identity")
	for _, c := range []struct {
		name                  string
		change                func(ks *receipt.KeyStatement)
		identity, predecessor note.Signer
	}{
		{"no predecessor's signer", func(*receipt.KeyStatement) {}, testKeys.identity, nil},
		{"another predecessor's signer", func(*receipt.KeyStatement) {}, testKeys.identity, testKeys.daily},
		{"a predecessor that is not stated", func(ks *receipt.KeyStatement) { ks.Predecessor = "" }, testKeys.identity, testKeys.other},
		{"an identity of another log", func(*receipt.KeyStatement) {}, foreign, testKeys.other},
		{"the identity key as daily key", func(ks *receipt.KeyStatement) { ks.Key = testKeys.identity.VKey }, testKeys.identity, testKeys.other},
		{"the identity key as predecessor", func(ks *receipt.KeyStatement) { ks.Predecessor = testKeys.identity.VKey }, testKeys.identity,
			testKeys.identity},
		{"its own predecessor", func(ks *receipt.KeyStatement) { ks.Predecessor = ks.Key }, testKeys.identity, testKeys.daily},
		{"more than a day", func(ks *receipt.KeyStatement) { ks.NotAfter = ks.NotAfter.Add(1) }, testKeys.identity, testKeys.other},
		{"no time", func(ks *receipt.KeyStatement) { ks.NotAfter = ks.NotBefore }, testKeys.identity, testKeys.other},
		{"backwards", func(ks *receipt.KeyStatement) { ks.NotAfter = ks.NotBefore.Add(-1) }, testKeys.identity, testKeys.other},
		{"zero times", func(ks *receipt.KeyStatement) { ks.NotBefore, ks.NotAfter = time.Time{}, time.Time{}.Add(1) }, testKeys.identity,
			testKeys.other},
		{"a first root that is not of nothing", func(ks *receipt.KeyStatement) {
			ks.FirstSize, ks.Predecessor, ks.Ended = 0, "", ""
		}, testKeys.identity, nil},
		{"a first one with a predecessor", func(ks *receipt.KeyStatement) { ks.FirstSize, ks.FirstRoot = 0, receipt.EmptyRoot },
			testKeys.identity, testKeys.other},
		{"a first one with an end", func(ks *receipt.KeyStatement) {
			ks.FirstSize, ks.FirstRoot, ks.Predecessor, ks.Ended = 0, receipt.EmptyRoot, "", receipt.EndedLost
		}, testKeys.identity, nil},
		{"a later one without an end", func(ks *receipt.KeyStatement) { ks.Ended = "" }, testKeys.identity, nil},
		{"an unknown end", func(ks *receipt.KeyStatement) { ks.Ended = "tired" }, testKeys.identity, nil},
		{"rotated without the predecessor's signer", func(*receipt.KeyStatement) {}, testKeys.identity, nil},
		{"revoked with the predecessor's signer", func(ks *receipt.KeyStatement) { ks.Ended = receipt.EndedRevoked }, testKeys.identity,
			testKeys.other},
		{"a later one that succeeds a log", func(ks *receipt.KeyStatement) {
			ks.Succeeds = &receipt.Quote{Origin: oldLog, Identity: receipttest.NewKey(t, oldLog, "old").VKey, Size: 9}
		}, testKeys.identity, testKeys.other},
		{"it succeeds itself", succeeds(testOrigin, testKeys.other.VKey, 9), testKeys.identity, nil},
		{"it succeeds an empty log", succeeds(oldLog, receipttest.NewKey(t, oldLog, "old").VKey, 0), testKeys.identity, nil},
		{"it succeeds a log by a key of another name", succeeds(oldLog, testKeys.other.VKey, 9), testKeys.identity, nil},
		{"it succeeds a log whose identity key is the daily key", succeeds(oldLog, receipttest.NewKey(t, oldLog, "daily").VKey, 9),
			testKeys.identity, nil},
		{"it succeeds a log with the same identity key", succeeds(oldLog, receipttest.NewKey(t, oldLog, "identity").VKey, 9),
			testKeys.identity, nil},
		{"a key in upper case", func(ks *receipt.KeyStatement) { ks.Key = strings.ToUpper(ks.Key) }, testKeys.identity, testKeys.other},
		{"no key", func(ks *receipt.KeyStatement) { ks.Key = "" }, testKeys.identity, testKeys.other},
		{"a bad origin", func(ks *receipt.KeyStatement) { ks.Origin = "a b" }, testKeys.identity, testKeys.other},
	} {
		ks := testStatement()
		c.change(ks)
		if _, err := receipt.SignKeyStatement(ks, c.identity, c.predecessor); err == nil {
			t.Errorf("%s: signed", c.name)
		}
	}
}

// p256Key is a signer of signature type 2, ECDSA over P-256.
type p256Key struct {
	note.Verifier
	private *ecdsa.PrivateKey
}

func (k p256Key) Sign(msg []byte) ([]byte, error) {
	sum := sha256.Sum256(msg)
	return ecdsa.SignASN1(rand.Reader, k.private, sum[:])
}

func newP256(t *testing.T) receipttest.Key {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	vkey, err := keys.VKey(testOrigin, private.Public())
	if err != nil {
		t.Fatal(err)
	}
	v, err := keys.Verifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	return receipttest.Key{Signer: p256Key{v, private}, VKey: vkey}
}

// TestP256 has P-256 keys in both roles.
func TestP256(t *testing.T) {
	l := &receipttest.Log{Origin: testOrigin, Instance: "a", Identity: newP256(t), Now: time.Unix(1, 0)}
	state := func(k receipttest.Key) {
		l.RotateTo(t, k, &receipt.KeyStatement{
			Origin: testOrigin, NotBefore: l.Now, NotAfter: l.Now.Add(time.Hour),
			FirstSize: uint64(len(l.Leaves)), FirstRoot: l.Root(t, len(l.Leaves)),
		})
	}
	state(newP256(t))
	l.SealHeader(t, l.NextHeader(receipt.HeaderOpen))
	state(newP256(t))
	d, _ := l.NewDecision()
	b := l.Bundle(t, nil, 2, place{Block: l.Seal(t, receipt.AppendDecision(nil, d))})
	if _, err := receipt.Verify(l.Policy(t), b); err != nil {
		t.Fatal(err)
	}
	eachProof(b, func(p *receipt.Proof) { p.Text[len(p.Text)-6] ^= 1 })
	if _, err := receipt.Verify(l.Policy(t), b); err == nil {
		t.Error("a changed P-256 signature was accepted")
	}
}

func TestParsePolicy(t *testing.T) {
	identity, second := testKeys.identity.VKey, receipttest.NewKey(t, "example.org/knhk/2", "identity").VKey
	w := receipttest.Witness(t, "w.example", "w", time.Unix(1, 0)).VKey
	for _, c := range []struct {
		name, text, want string // want: in the error; empty: accepted
	}{
		{"one log", "log " + identity + "\n", ""},
		{"one log, no line end", "log " + identity, ""},
		{"quorum none", "log " + identity + "\nquorum none\n", ""},
		{"a URL and comments", "# logs\n\tlog " + identity + " https://example.org/ # ours\n\n", ""},
		{"lines that end as Windows ends them, and one that is empty", "log " + identity + "\r\n\r\nquorum none\r\n \f\r # end\r\n", ""},
		{"two logs", "log " + identity + "\nlog " + second + "\n", ""},
		{"a witness", "log " + identity + "\nwitness w " + w + " https://w.example\nquorum w\n", ""},
		{"a group", "witness w " + w + "\ngroup g any w\nquorum g\nlog " + identity + "\n", ""},
		{"empty", "", "no log line"},
		{"only a quorum", "quorum none\n", "no log line"},
		{"a witness without a quorum", "log " + identity + "\nwitness w " + w + "\n", "no quorum"},
		{"an unknown quorum", "log " + identity + "\nquorum w\n", "not defined"},
		{"two quorums", "log " + identity + "\nquorum none\nquorum none\n", "line 3"},
		{"two keys for a log", "log " + identity + "\nlog " + testKeys.other.VKey + "\n", "line 2: a second identity key"},
		{"a log twice", "log " + identity + "\nlog " + identity + "\n", "line 2: a second identity key"},
		{"a log without key", "log\n", "line 1"},
		{"a log with more", "log " + identity + " a b\n", "line 1"},
		{"a changed key", "log " + strings.Replace(identity, "+", "+0", 1) + "\n", "line 1"},
		{"a witness as log", "log " + w + "\n", "line 1"},
		{"an unknown word", "log " + identity + "\nlogs x\n", "line 2"},
		{"too long", "log " + identity + "\n" + strings.Repeat("#", 64<<10), "at most"},
	} {
		p, err := receipt.ParsePolicy([]byte(c.text))
		if c.want != "" {
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: got %v, want an error with %q", c.name, err, c.want)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if vkey, ok := p.Identity(testOrigin); !ok || vkey != identity {
			t.Errorf("%s: identity %q", c.name, vkey)
		}
		if _, ok := p.Identity("elsewhere"); ok {
			t.Errorf("%s: an identity for an unknown log", c.name)
		}
	}
}

// TestTwoLogs verifies bundles of two logs under one policy, each under its own key only.
func TestTwoLogs(t *testing.T) {
	l1, b1 := receipttest.Sample(t, testOrigin)
	l2, b2 := receipttest.Sample(t, "example.org/knhk/2")
	p, err := receipt.ParsePolicy(append([]byte("log "+l2.Identity.VKey+"\n"), "log "+l1.Identity.VKey+"\n"...))
	if err != nil {
		t.Fatal(err)
	}
	v := receipt.NewVerifier(p)
	for i, b := range []*receipt.Bundle{b1, b2} {
		if got, err := v.Verify(b); err != nil || got.Origin != p.Origins()[i] {
			t.Errorf("log %d: %v", i, err)
		}
	}
	b1.Keys = b2.Keys
	if _, err := v.Verify(b1); err == nil {
		t.Error("the keys of another log were accepted")
	}
}
