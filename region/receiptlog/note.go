package receiptlog

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"strconv"
	"strings"
)

// cutNote splits a signed note into its text, with the last newline, and its signature lines (C2SP signed-note).
func cutNote(raw []byte) (text, sigs string, ok bool) {
	i := bytes.LastIndex(raw, []byte("\n\n"))
	if i < 0 {
		return "", "", false
	}
	return string(raw[:i+1]), string(raw[i+2:]), true
}

// signedBy reports whether raw has a signature line of the key, by name and key hash. It verifies nothing: bundles are
// verified by whoever reads them.
func signedBy(raw []byte, vkey string) bool {
	name, rest, ok := strings.Cut(vkey, "+")
	if !ok {
		return false
	}
	hash, _, ok := strings.Cut(rest, "+")
	if !ok {
		return false
	}
	want, err := strconv.ParseUint(hash, 16, 32)
	if err != nil {
		return false
	}
	for _, s := range noteSignatures(raw) {
		if s.name == name && s.hash == uint32(want) {
			return true
		}
	}
	return false
}

type noteSignature struct {
	name string
	hash uint32
}

// noteSignatures lists who is said to have signed raw.
func noteSignatures(raw []byte) (out []noteSignature) {
	_, sigs, _ := cutNote(raw)
	for line := range strings.Lines(sigs) {
		name, b64, ok := strings.Cut(strings.TrimSuffix(strings.TrimPrefix(line, "— "), "\n"), " ")
		if !ok {
			continue
		}
		sig, err := base64.StdEncoding.DecodeString(b64)
		if err != nil || len(sig) < 4 {
			continue
		}
		out = append(out, noteSignature{name, binary.BigEndian.Uint32(sig)})
	}
	return out
}
