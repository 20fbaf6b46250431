package keys

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// VersionID is the form of the ids that stores without ids of their own (soft, hsm) give to versions, for example
// "0003-20261123T220405Z-9f3a61c2". The number orders versions even when the clock went back, the random part keeps two
// processes that create at the same moment from making one id twice, and the time is for people. 30 ASCII bytes up to
// number 9999: it fits a short CKA_ID.
type VersionID struct {
	Number  uint64    // 1 for the first version of a label
	Created time.Time // UTC, whole seconds; by the creator's clock, so not to be trusted for key age
	Random  string    // 8 lower-case hexadecimal digits
}

const versionTime = "20060102T150405Z"

// NextVersionID makes the id that follows ids, the ids of all versions of the label that are known. Ids of another form
// are passed over.
func NextVersionID(ids []string, now time.Time) VersionID {
	var last uint64
	for _, id := range ids {
		if v, err := ParseVersionID(id); err == nil {
			last = max(last, v.Number)
		}
	}
	var r [4]byte
	rand.Read(r[:]) // never fails: crypto/rand ends the process instead
	return VersionID{Number: last + 1, Created: now.UTC().Truncate(time.Second), Random: hex.EncodeToString(r[:])}
}

// ParseVersionID reads the text form, strictly: only what String writes is accepted.
func ParseVersionID(s string) (VersionID, error) {
	parts := strings.Split(s, "-")
	if len(parts) != 3 {
		return VersionID{}, errors.New("version id: want NUMBER-TIME-RANDOM")
	}
	n, err := strconv.ParseUint(parts[0], 10, 63)
	if err != nil {
		return VersionID{}, fmt.Errorf("version id: number: %w", err)
	}
	t, err := time.Parse(versionTime, parts[1])
	if err != nil {
		return VersionID{}, fmt.Errorf("version id: time: %w", err)
	}
	if b, err := hex.DecodeString(parts[2]); err != nil || len(b) != 4 || hex.EncodeToString(b) != parts[2] {
		return VersionID{}, errors.New("version id: random part is not 8 lower-case hexadecimal digits")
	}
	v := VersionID{Number: n, Created: t, Random: parts[2]}
	if v.Number == 0 || v.String() != s {
		return VersionID{}, errors.New("version id: not in its canonical form")
	}
	return v, nil
}

// String returns the text form.
func (v VersionID) String() string {
	return fmt.Sprintf("%04d-%s-%s", v.Number, v.Created.Format(versionTime), v.Random)
}

// CompareVersionIDs orders ids by number, then by text; ids of another form come first, by text. For slices.SortFunc.
func CompareVersionIDs(a, b string) int {
	va, errA := ParseVersionID(a)
	vb, errB := ParseVersionID(b)
	switch {
	case errA != nil && errB == nil:
		return -1
	case errA == nil && errB != nil:
		return 1
	case errA == nil && va.Number != vb.Number:
		if va.Number < vb.Number {
			return -1
		}
		return 1
	}
	return strings.Compare(a, b)
}

// CheckLabel says whether a store of this module can name a key so: 1 to 64 printable ASCII characters, no space at
// either end. Stores with stricter names of their own refuse more.
func CheckLabel(label string) error {
	if len(label) == 0 || len(label) > 64 {
		return fmt.Errorf("label has %d bytes, want 1 to 64", len(label))
	}
	for _, c := range []byte(label) {
		if c < ' ' || c > '~' {
			return fmt.Errorf("label %q holds a character that is not printable ASCII", label)
		}
	}
	if strings.TrimSpace(label) != label {
		return fmt.Errorf("label %q begins or ends with a space", label)
	}
	return nil
}
