package receiptlog

import "bytes"

// cutNote splits a signed note into its text, with the last newline, and its signature lines (C2SP signed-note).
func cutNote(raw []byte) (text, sigs string, ok bool) {
	i := bytes.LastIndex(raw, []byte("\n\n"))
	if i < 0 {
		return "", "", false
	}
	return string(raw[:i+1]), string(raw[i+2:]), true
}
