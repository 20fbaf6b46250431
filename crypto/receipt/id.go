package receipt

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
)

// MaxInstance is the greatest length of an instance name in bytes.
const MaxInstance = 63

const uuidText = 36

// AppendID appends a receipt id: a UUIDv7 (RFC 9562 section 5.7) in lower case, a dot and the instance. unixMilli counts
// milliseconds since 1970 and keeps its low 48 bits; random must be fresh, 74 of its 80 bits are used. It allocates
// nothing when dst has room for 37 bytes and the instance. The instance is not checked: see ValidInstance.
func AppendID(dst []byte, unixMilli int64, random *[10]byte, instance string) []byte {
	u := newUUID(unixMilli, random)
	return appendID(dst, &u, instance)
}

func newUUID(unixMilli int64, random *[10]byte) (u uuid.UUID) {
	binary.BigEndian.PutUint64(u[:8], uint64(unixMilli)<<16)
	u[6] = 0x70 | random[0]&0x0f
	u[7] = random[1]
	copy(u[8:], random[2:])
	u[8] = 0x80 | u[8]&0x3f
	return u
}

func appendID(dst []byte, u *uuid.UUID, instance string) []byte {
	dst = hex.AppendEncode(dst, u[0:4])
	dst = append(dst, '-')
	dst = hex.AppendEncode(dst, u[4:6])
	dst = append(dst, '-')
	dst = hex.AppendEncode(dst, u[6:8])
	dst = append(dst, '-')
	dst = hex.AppendEncode(dst, u[8:10])
	dst = append(dst, '-')
	dst = hex.AppendEncode(dst, u[10:16])
	dst = append(dst, '.')
	return append(dst, instance...)
}

// NewID is AppendID into a string; it returns the UUID beside it.
func NewID(now time.Time, random *[10]byte, instance string) (string, uuid.UUID) {
	u := newUUID(now.UnixMilli(), random)
	var buf [uuidText + 1 + MaxInstance]byte
	return string(appendID(buf[:0], &u, instance)), u
}

// ParseID splits a receipt id. It accepts only what AppendID writes: a UUID of version 7 and RFC variant in lower case and
// a valid instance.
func ParseID(s string) (id uuid.UUID, instance string, err error) {
	if len(s) < uuidText+2 || s[uuidText] != '.' {
		return uuid.UUID{}, "", fmt.Errorf("parse receipt id %.64q: want UUIDv7, a dot and an instance", s)
	}
	id, err = uuid.Parse(s[:uuidText])
	if err != nil {
		return uuid.UUID{}, "", fmt.Errorf("parse receipt id %.64q: %w", s, err)
	}
	for i := range uuidText {
		if c := s[i]; c >= 'A' && c <= 'F' {
			return uuid.UUID{}, "", fmt.Errorf("parse receipt id %.64q: upper case", s)
		}
	}
	if id.Version() != 7 || id.Variant() != uuid.RFC4122 {
		return uuid.UUID{}, "", fmt.Errorf("parse receipt id %.64q: not a UUIDv7", s)
	}
	instance = s[uuidText+1:]
	if err := ValidInstance(instance); err != nil {
		return uuid.UUID{}, "", fmt.Errorf("parse receipt id %.64q: %w", s, err)
	}
	return id, instance, nil
}

// IDTime returns the millisecond a receipt id was made in, as its maker's clock had it.
func IDTime(id uuid.UUID) time.Time {
	return time.UnixMilli(int64(binary.BigEndian.Uint64(id[:8]) >> 16)).UTC()
}

// ValidInstance says whether s can be an instance name: 1 to MaxInstance of a-z, 0-9 and "-", as in a DNS label.
func ValidInstance(s string) error {
	if s == "" || len(s) > MaxInstance {
		return fmt.Errorf("instance %.80q: want 1 to %d characters", s, MaxInstance)
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return fmt.Errorf("instance %q: only a-z, 0-9 and - may stand in it", s)
		}
	}
	if s[0] == '-' || s[len(s)-1] == '-' {
		return errors.New("instance: must not begin or end with -")
	}
	return nil
}
