//go:build cgo

package hsm

import (
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/knhk/sidecar/crypto/keys"
)

// token is the state that all stores of a process share about one token: PKCS#11 knows one login for each token and
// process, and logs out silently when the last session closes.
type token struct {
	label string
	mod   *module

	// gen counts the losses of all sessions. A session, and every object handle found on it, is void once gen has moved on.
	// Written inside module.exclusive only.
	gen uint64

	// turn is held over slot search and login, so that one worker logs in and the others find themselves logged in. A channel
	// and not a mutex, because C calls are made with it held: tests that stop a call stop what waits for it.
	turn     chan struct{} // of capacity 1
	slot     uint
	slotGen  uint64                // gen in which slot was found
	pin      [32]byte              // MAC of the PIN that the token accepted last
	accepted bool                  // pin is set
	refused  map[[32]byte]struct{} // MACs of PINs that the token refused: never sent to it again
	locked   bool                  // the token said that its PIN is locked

	breakerTrips uint32
	breakerWait  time.Duration
	guard        sync.Mutex // over breaker and what it points to; held for moments
	breaker      *breaker   // nil: a new one, closed

	sights sights

	log atomic.Pointer[slog.Logger] // of the store opened last
}

// recover gives every worker new sessions: it closes all sessions of the token, or restarts the module when hard. seen is
// the generation in which the caller met the loss; when it has passed, somebody else has recovered and did is false.
func (t *token) recover(seen uint64, hard bool) (did bool, err error) {
	err = t.mod.exclusive(func() error {
		if t.gen != seen {
			return nil
		}
		did = true
		if hard || !t.mod.up {
			return t.mod.restart()
		}
		for _, h := range t.mod.claimed(t) {
			_ = t.mod.ck.CloseSession(h) // most are gone already; what is still open must not be left on the token
			t.mod.disclaim(h)
		}
		t.gen++
		return nil
	})
	return did, err
}

// open opens a session that is logged in. Between enter and exit. proved says that this store has shown its PIN before.
func (t *token) open(pin func() (string, error), proved bool) (pkcs11.SessionHandle, error) {
	t.turn <- struct{}{}
	defer func() { <-t.turn }()
	ck := t.mod.ck
	if err := t.findSlot(); err != nil {
		return 0, err
	}
	h, err := ck.OpenSession(t.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return 0, fmt.Errorf("C_OpenSession: %w", err)
	}
	if !t.mod.claim(h, t) {
		// A token was reset and counts handles anew: another worker still holds this number and may call on it, so this
		// worker must not, not even to close it.
		return 0, fmt.Errorf("session handle %d was given out twice: %w", h, errLost)
	}
	if err := t.login(h, pin, proved); err != nil {
		t.drop(h)
		return 0, err
	}
	return h, nil
}

// findSlot looks for the one token with the label; once for each generation. In turn.
func (t *token) findSlot() error {
	if t.slotGen == t.gen {
		return nil
	}
	ck := t.mod.ck
	slots, err := ck.GetSlotList(true)
	if err != nil {
		return fmt.Errorf("C_GetSlotList: %w", err)
	}
	var others []string
	found := 0
	for _, s := range slots {
		info, err := ck.GetTokenInfo(s)
		switch {
		case err != nil:
			others = append(others, fmt.Sprintf("slot %d: %v", s, err))
		case info.Label != t.label:
			if info.Flags&pkcs11.CKF_TOKEN_INITIALIZED != 0 {
				others = append(others, fmt.Sprintf("%q", info.Label))
			}
		default:
			found++
			t.slot = s
		}
	}
	switch {
	case found > 1:
		return fmt.Errorf("%d tokens are labelled %q: labels must tell tokens apart", found, t.label)
	case found == 0 && len(others) == 0:
		return fmt.Errorf("no token labelled %q, nor any other: %w", t.label, errAbsent)
	case found == 0:
		return fmt.Errorf("no token labelled %q among %s: %w", t.label, strings.Join(others, ", "), errAbsent)
	}
	t.slotGen = t.gen
	return nil
}

// login logs the process in unless it is. A token never sees a PIN twice that it has refused, and a store whose PIN is
// not the one the process is logged in with is refused without asking the token. In turn.
func (t *token) login(h pkcs11.SessionHandle, source func() (string, error), proved bool) error {
	si, err := t.mod.ck.GetSessionInfo(h)
	if err != nil {
		return fmt.Errorf("C_GetSessionInfo: %w", err)
	}
	in := si.State == pkcs11.CKS_RW_USER_FUNCTIONS
	if in && proved {
		return nil
	}
	if !in && si.State != pkcs11.CKS_RW_PUBLIC_SESSION {
		return fmt.Errorf("token %q: session is in state %d; is the security officer logged in by something in this process?",
			t.label, si.State)
	}
	pin, err := source()
	if err != nil {
		return fmt.Errorf("token %q: %w: %w", t.label, keys.ErrUnavailable, err)
	}
	mac := t.mod.reg.pinMAC(pin)
	if _, bad := t.refused[mac]; bad || t.locked {
		return fmt.Errorf("token %q: %w: it was refused before", t.label, keys.ErrCredential)
	}
	if in {
		return t.same(mac)
	}
	info, err := t.mod.ck.GetTokenInfo(t.slot)
	if err != nil {
		return fmt.Errorf("C_GetTokenInfo: %w", err)
	}
	switch {
	case info.Flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		t.locked = true
		return fmt.Errorf("token %q: %w: the token says that its PIN is locked", t.label, keys.ErrCredential)
	case info.Flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		// No latch: our PIN has not been refused, and the warning goes when somebody logs in.
		return fmt.Errorf("token %q: %w, so this process does not try its own; log in once with the vendor's tool", t.label, errLastTry)
	}
	switch err := t.mod.ck.Login(h, pkcs11.CKU_USER, pin); {
	case err == nil:
		t.pin, t.accepted = mac, true
		return nil
	case isCode(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN):
		return t.same(mac)
	case meaning(err).remedy == never:
		t.refused[mac] = struct{}{}
		t.locked = isCode(err, pkcs11.CKR_PIN_LOCKED)
		return fmt.Errorf("token %q: %w: C_Login: %w", t.label, keys.ErrCredential, err)
	default:
		return fmt.Errorf("token %q: C_Login: %w", t.label, err)
	}
}

// same accepts the PIN that the process is logged in with.
func (t *token) same(mac [32]byte) error {
	switch {
	case !t.accepted:
		return fmt.Errorf("token %q: something else in this process is logged in", t.label)
	case t.pin != mac:
		return fmt.Errorf("token %q: %w: it is not the PIN with which this process is logged in", t.label, keys.ErrCredential)
	}
	return nil
}

// drop closes a session of the caller's own. Between enter and exit.
func (t *token) drop(h pkcs11.SessionHandle) {
	_ = t.mod.ck.CloseSession(h)
	t.mod.disclaim(h) // after the close: until then nobody else may be given the number
}
