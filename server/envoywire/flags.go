package envoywire

import (
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
)

// Flags are Envoy's response flags: bit n stands for field n of envoy.data.accesslog.v3.ResponseFlags.
type Flags uint64

// The flags by which Result tells how a transaction ended.
const (
	FlagNoHealthyUpstream        Flags = 1 << 2  // UH
	FlagUpstreamOverflow         Flags = 1 << 8  // UO
	FlagNoRoute                  Flags = 1 << 9  // NR
	FlagUnauthorized             Flags = 1 << 13 // UAEX
	FlagNoCluster                Flags = 1 << 25 // NC
	FlagUpstreamTimeout          Flags = 1 << 3  // UT
	FlagUpstreamRemoteReset      Flags = 1 << 5  // UR
	FlagUpstreamConnectFailure   Flags = 1 << 6  // UF
	FlagUpstreamConnectionClosed Flags = 1 << 7  // UC
	FlagDownstreamClosed         Flags = 1 << 15 // DC
	FlagStreamIdleTimeout        Flags = 1 << 17 // SI
	FlagMaxStreamDuration        Flags = 1 << 20 // UMSDR
	FlagDurationTimeout          Flags = 1 << 23 // DT
	FlagUpstreamProtocolError    Flags = 1 << 24 // UPE
	FlagDownstreamReset          Flags = 1 << 28 // DR
)

// flagNames are the short names of Envoy's access log operator %RESPONSE_FLAGS%, by field number.
var flagNames = [...]string{
	1: "LH", 2: "UH", 3: "UT", 4: "LR", 5: "UR", 6: "UF", 7: "UC", 8: "UO", 9: "NR", 10: "DI", 11: "FI", 12: "RL",
	13: "UAEX", 14: "RLSE", 15: "DC", 16: "URX", 17: "SI", 18: "IH", 19: "DPE", 20: "UMSDR", 21: "RFCF", 22: "NFCF",
	23: "DT", 24: "UPE", 25: "NC", 26: "OM", 27: "DF", 28: "DR",
}

// fieldUnauthorized is the one flag that is a message: its being there is the flag.
const fieldUnauthorized = 13

// String gives the short names in field order, joined by commas; "" for none.
func (f Flags) String() string {
	if f == 0 {
		return ""
	}
	names := make([]string, 0, 4)
	for n, name := range flagNames {
		if f&(1<<n) != 0 && name != "" {
			names = append(names, name)
		}
	}
	return strings.Join(names, ",")
}

// has reports whether any of the flags in g is set.
func (f Flags) has(g Flags) bool { return f&g != 0 }

// Scan reads a ResponseFlags message, or a further piece of one. Fields that have no name here are passed over.
func (f *Flags) Scan(b []byte) error {
	r := NewReader(b)
	for r.Next() {
		switch {
		case int(r.Num) >= len(flagNames):
		case r.Num == fieldUnauthorized:
			if r.Type == protowire.BytesType {
				*f |= 1 << fieldUnauthorized
			}
		case r.Type == protowire.VarintType:
			*f &^= 1 << r.Num
			if r.Scalar != 0 {
				*f |= 1 << r.Num
			}
		}
	}
	return r.Err()
}
