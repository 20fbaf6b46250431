package authz

import (
	"net/netip"
	"strings"
)

const (
	maxHost  = 253 // characters of a name: RFC 1035 section 2.3.4
	maxLabel = 63
)

// Host gives the host of an authority in the one spelling that rules are compared with: lower case, without port and final dot; IP
// addresses as RFC 5952 and dotted decimals have them, without brackets. ok is false for whatever is no host, user information,
// percent-encoding, other spellings of IPv4 addresses (127.1, 0x7f000001) and names that are not ASCII included: servers differ
// in what they make of them.
func Host(authority string) (host string, ok bool) {
	var buf [maxHost]byte
	b, ok := appendHost(buf[:0], authority)
	return string(b), ok
}

func appendHost(dst []byte, authority string) (host []byte, ok bool) {
	name, port := authority, ""
	if v6, found := strings.CutPrefix(authority, "["); found {
		end := strings.IndexByte(v6, ']')
		if end < 0 {
			return nil, false
		}
		if port = v6[end+1:]; port != "" && port[0] != ':' || !digits(strings.TrimPrefix(port, ":")) {
			return nil, false
		}
		addr, err := netip.ParseAddr(v6[:end])
		if err != nil || !addr.Is6() || addr.Zone() != "" {
			return nil, false
		}
		return addr.Unmap().AppendTo(dst), true
	}
	if i := strings.IndexByte(authority, ':'); i >= 0 {
		name, port = authority[:i], authority[i+1:]
	}
	name = strings.TrimSuffix(name, ".")
	if name == "" || len(name) > maxHost || !digits(port) {
		return nil, false
	}
	label := 0 // where the current one begins in name
	for i := 0; i <= len(name); i++ {
		if i == len(name) || name[i] == '.' {
			if i == label || i-label > maxLabel {
				return nil, false
			}
			if i < len(name) {
				label = i + 1
				dst = append(dst, '.')
			}
			continue
		}
		c := name[i]
		switch {
		case c >= 'A' && c <= 'Z':
			c += 'a' - 'A'
		case c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_':
		default:
			return nil, false
		}
		dst = append(dst, c)
	}
	if last := name[label:]; digits(last) || len(last) > 1 && last[0] == '0' && (last[1] == 'x' || last[1] == 'X') {
		// What ends in a number is an IPv4 address to some (WHATWG URL), or nothing.
		if addr, err := netip.ParseAddr(name); err != nil || !addr.Is4() {
			return nil, false
		}
	}
	return dst, true
}

func digits(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return true
}

// hostPattern reads a host of a rule. below is true for "*.host".
func hostPattern(s string) (host string, below bool, fault string) {
	name, below := strings.CutPrefix(s, "*.")
	if addr, err := netip.ParseAddr(name); err == nil && addr.Is6() && addr.Zone() == "" {
		name = "[" + name + "]"
	}
	host, ok := Host(name)
	switch {
	case s == "*":
		return "", false, "leave hosts out to mean every host"
	case !ok:
		return "", false, "want a host such as shop.example.com, *.example.com or an IP address; names in other scripts as xn--"
	case strings.Contains(name[strings.LastIndexByte(name, ']')+1:], ":"):
		return "", false, "leave the port out: rules do not look at it"
	case below && (strings.Contains(host, ":") || digits(host[strings.LastIndexByte(host, '.')+1:])):
		return "", false, "there is nothing below an IP address"
	}
	return host, below, ""
}
