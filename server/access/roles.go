package access

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/knhk/sidecar/crypto/spiffe"
)

// Role is a set of roles. The zero Role is nobody's.
type Role uint8

// The roles.
const (
	Envoy    Role = 1 << iota // has requests decided and reports outcomes
	Operator                  // runs knhk: everything of the admin listener
	Auditor                   // reads receipts, keys and metrics
	Peer                      // reads the log

	Every = Envoy | Operator | Auditor | Peer
)

// Roles are the roles there are, by the names that they have in knhk.yaml.
var Roles = []struct {
	Role Role
	Name string
}{{Envoy, "envoy"}, {Operator, "operator"}, {Auditor, "auditor"}, {Peer, "peer"}}

// String lists the names of the roles in r, "nobody" if there are none.
func (r Role) String() string {
	var names []string
	for _, known := range Roles {
		if r&known.Role != 0 {
			names = append(names, known.Name)
		}
	}
	if len(names) == 0 {
		return "nobody"
	}
	return strings.Join(names, "|")
}

// Principal is who a role is given to: SPIFFE IDs, or a user of this machine. The zero Principal is nobody.
type Principal struct {
	pattern spiffe.Pattern
	uid     uint32
	user    bool
}

// noUID is (uid_t)-1, which is no user.
const noUID = 1<<32 - 1

// ParsePrincipal reads "spiffe://domain/path", "spiffe://domain/path/*" or "uid:N", N in decimal.
func ParsePrincipal(s string) (Principal, error) {
	if text, ok := strings.CutPrefix(s, "uid:"); ok {
		n, err := strconv.ParseUint(text, 10, 32)
		if err != nil || n == noUID || strconv.FormatUint(n, 10) != text {
			return Principal{}, fmt.Errorf("%q is no user: want uid: and a number from 0 to %d", s, uint32(noUID-1))
		}
		return Principal{uid: uint32(n), user: true}, nil
	}
	if !strings.HasPrefix(s, "spiffe://") {
		return Principal{}, fmt.Errorf("%q: want spiffe://domain/path, spiffe://domain/path/* or uid:N", s)
	}
	p, err := spiffe.ParsePattern(s)
	return Principal{pattern: p}, err
}

// User reports whether p is a user of this machine: one counts on unix sockets, a SPIFFE ID where there is TLS.
func (p Principal) User() bool { return p.user }

// TrustDomain is that of the SPIFFE IDs which are meant; false for a user of this machine.
func (p Principal) TrustDomain() (spiffeid.TrustDomain, bool) {
	return p.pattern.TrustDomain(), !p.user
}

// String gives p as ParsePrincipal reads it.
func (p Principal) String() string {
	if p.user {
		return fmt.Sprintf("uid:%d", p.uid)
	}
	return p.pattern.String()
}

// Grants says who has which roles. It does not change: to change roles, make another.
type Grants struct {
	ids   spiffe.Index[Role]
	users map[int]Role
}

// NewGrants gives each role to the principals listed for it.
func NewGrants(lists map[Role][]Principal) *Grants {
	g := &Grants{users: map[int]Role{}}
	for role, list := range lists {
		for _, p := range list {
			if p.user {
				g.users[int(p.uid)] |= role
			} else {
				g.ids.Update(p.pattern, func(r Role) Role { return r | role })
			}
		}
	}
	return g
}

// OfID gives the roles of a SPIFFE ID, however many principals there are at the cost of its path's length.
func (g *Grants) OfID(id spiffeid.ID) (roles Role) {
	for r := range g.ids.Match(id) {
		roles |= r
	}
	return roles
}

// OfUser gives the roles of a user on a unix socket. Root and the user that knhk runs as have all: they could read its memory and
// its files as well.
func (g *Grants) OfUser(uid int) Role {
	switch {
	case uid < 0 || uid >= noUID:
		return 0
	case uid == 0 || uid == os.Geteuid():
		return Every
	}
	return g.users[uid]
}

// Who is at the other end of a connection, as the connection itself proves it: nothing that was sent over it counts. The zero Who
// is nobody.
type Who struct {
	ID       spiffeid.ID // of the certificate; zero without TLS
	UID      int         // of the process that connected to a unix socket, if User
	User     bool
	Insecure bool // a TCP connection to a listener that believes whoever connects: insecure_loopback
}

// String names who it is, for logs.
func (w Who) String() string {
	switch {
	case !w.ID.IsZero():
		return w.ID.String()
	case w.User:
		return fmt.Sprintf("uid:%d", w.UID)
	case w.Insecure:
		return "anyone on this machine"
	}
	return "nobody"
}

// Of gives the roles of w.
func (g *Grants) Of(w Who) Role {
	switch {
	case !w.ID.IsZero():
		return g.OfID(w.ID)
	case w.User:
		return g.OfUser(w.UID)
	case w.Insecure:
		return Every
	}
	return 0
}
